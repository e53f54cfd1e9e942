"""Floating point, rounded as the hardware rounds: once per instruction, to nearest even, subnormals kept.

NaNs are the hardware's own: an arithmetic instruction gives 0x7FFFFFFF whatever NaN went in, and a conversion to 16
bits gives 0x7FFF. numpy's would be others, and a test of bits would see it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .semantics import pure

__all__ = [
    "canonical", "exact_fma_64", "from_bfloat", "fused_multiply_add",
    "rounded_to_odd", "to_bfloat", "to_half", "two_sum",
]  # fmt: skip

Row = Any  # a numpy row, one element per lane

F32_NAN = np.uint32(0x7FFFFFFF).view(np.float32)
HALF_NAN = np.uint16(0x7FFF)


def canonical(values: Row) -> Row:
    """fp32 results with the hardware's NaN. The sum of squares is a NaN exactly if one of the values is."""
    if np.isnan(np.dot(values, values)):
        values = np.where(np.isnan(values), F32_NAN, values)
    return values


def fused_multiply_add(a: Row, b: Row, c: Row) -> Row:
    """a * b + c in fp32 with one rounding, made from two in fp64.

    The product of two 24-bit significands is exact in 53 bits; the sum is not. Its rounding to fp64 can change the one
    to fp32 only where the fp64 sum lies half-way between two fp32 numbers: its low 28 bits are then zero. There the
    part that was rounded off decides. Rounding the fp64 sum *to odd* keeps that part in its last bit (Boldo and
    Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).
    """
    product = a.astype(np.float64) * b
    total = product + c
    if not (total.view(np.uint64) & np.uint64((1 << 28) - 1)).all():
        total = rounded_to_odd(product, c.astype(np.float64))
    return canonical(total.astype(np.float32))


def two_sum(x: Row, y: Row) -> tuple[Row, Row]:
    """The sum, rounded to nearest, and what was rounded off, exact (Knuth); a NaN where the sum is not finite."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def rounded_to_odd(x: Row, y: Row) -> Row:
    """x + y in fp64, rounded to odd."""
    total, lost = two_sum(x, y)
    bits = total.view(np.int64)
    move = (lost != 0) & np.isfinite(lost) & (bits & 1 == 0)
    step = np.where((lost > 0) == (total > 0), 1, -1)  # of the magnitude, towards what was lost
    return np.where(move, bits + step, bits).view(np.float64)


def exact_fma_64(a: Row, b: Row, c: Row) -> Row:
    """a * b + c in fp64 with one rounding: the product in two parts (Dekker), their sum with c rounded to odd."""
    high = a * b
    a1, b1 = (v * 134217729.0 - (v * 134217729.0 - v) for v in (a, b))  # the upper 26 bits of each
    a2, b2 = a - a1, b - b1
    low = a2 * b2 - (((high - a1 * b1) - a2 * b1) - a1 * b2)
    total, lost = two_sum(c, low)
    upper, upper_lost = two_sum(high, total)
    result = upper + rounded_to_odd(upper_lost, lost)
    return np.where(np.isfinite(result), result, a * b + c)  # overflow in between, infinities and NaN


def _canonical_of(function: Callable[..., Row]) -> Callable[..., Row]:
    return lambda a, b: canonical(function(a, b))


def _extreme(function: Callable[..., Row], join: Callable[..., Row]) -> Callable[..., Row]:
    """min or max: a number wins against a NaN, and +0 is larger than -0: ``join`` of two zeros' bits sees to it."""

    def extreme(a: Row, b: Row) -> Row:
        joined = join(np.ascontiguousarray(a).view(np.uint32), np.ascontiguousarray(b).view(np.uint32))
        return canonical(np.where(a == b, joined.view(np.float32), function(a, b)))

    return extreme


for rounding in ("", ".rn"):
    pure(f"add{rounding}.f32", "f32 = f32 f32")(_canonical_of(np.add))
    pure(f"sub{rounding}.f32", "f32 = f32 f32")(_canonical_of(np.subtract))
    pure(f"mul{rounding}.f32", "f32 = f32 f32")(_canonical_of(np.multiply))
pure("rcp.rn.f32", "f32 = f32")(lambda a: canonical(np.float32(1) / a))
pure("fma.rn.f32", "f32 = f32 f32 f32")(fused_multiply_add)
pure("min.f32", "f32 = f32 f32")(_extreme(np.fmin, np.bitwise_or))
pure("max.f32", "f32 = f32 f32")(_extreme(np.fmax, np.bitwise_and))
pure("abs.f32", "u32 = u32")(lambda a: a & np.uint32(0x7FFFFFFF))
pure("neg.f32", "u32 = u32")(lambda a: a ^ np.uint32(0x80000000))


# --- conversions ------------------------------------------------------------------------------------------------------


def to_half(values: Row) -> Row:
    """fp32 -> fp16 bits."""
    return np.where(np.isnan(values), HALF_NAN, values.astype(np.float16).view(np.uint16))


def to_bfloat(values: Row) -> Row:
    """fp32 -> bf16 bits: what is cut off carries into what stays, a tie towards the even one."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), HALF_NAN, rounded.astype(np.uint16))


def from_bfloat(bits: Row) -> Row:
    """bf16 bits -> fp32, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _pair(convert: Callable[[Row], Row]) -> Callable[..., Row]:
    """The first source becomes the high half."""
    return lambda high, low: convert(high).astype(np.uint32) << np.uint32(16) | convert(low)


pure("cvt.rn.bf16x2.f32", "u32 = f32 f32")(_pair(to_bfloat))
pure("cvt.rn.f16x2.f32", "u32 = f32 f32")(_pair(to_half))
pure("cvt.rn.f16.f32", "u16 = f32")(to_half)
pure("cvt.f32.f16", "f32 = f16")(lambda a: canonical(a.astype(np.float32)))
