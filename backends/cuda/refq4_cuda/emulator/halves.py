"""fp16 and bf16 arithmetic, one number or two in a register: computed without loss, rounded once.

fma.rn.bf16x2 %r4, %r1, %r2, %r3;      two products, two sums, two roundings; the first number in the low half
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .floating import HALF_NAN, from_bfloat, rounded_to_odd, to_bfloat
from .semantics import Pure, family, pure

__all__ = ["decode_half", "encode_half"]

Row = Any  # a numpy row, one element per lane
F32, F64 = np.float32, np.float64


def decode_half(bits: Row, kind: str) -> Row:
    """16-bit patterns as fp64 numbers."""
    bits = np.ascontiguousarray(bits)
    return (bits.view(np.float16) if kind == "f16" else from_bfloat(bits)).astype(F64)


def encode_half(values: Row, kind: str) -> Row:
    """fp64 numbers as 16-bit patterns, rounded once, with the hardware's NaN."""
    if kind == "f16":
        bits = values.astype(np.float16).view(np.uint16)
    else:
        cut = values.astype(F32)  # rounded to odd in fp32 first, so that rounding twice is rounding once
        words = cut.view(np.int32)
        error = np.where(np.isfinite(cut), values - cut, 0.0)
        inexact = (error != 0) & (words & 1 == 0)
        away = np.where((error > 0) == (values > 0), 1, -1).astype(np.int32)
        bits = to_bfloat(np.where(inexact, words + away, words).view(F32))
    return np.where(np.isnan(values), HALF_NAN, bits)


def _fma(a: Row, b: Row, c: Row) -> Row:
    return rounded_to_odd(a * b, c)  # the product of two halves is exact in fp64


def _extreme(pick: Callable[..., Row], larger: bool) -> Callable[..., Row]:
    """A number wins against a NaN, and +0 is larger than -0."""

    def extreme(a: Row, b: Row) -> Row:
        negative = np.signbit(a) & np.signbit(b) if larger else np.signbit(a) | np.signbit(b)
        zero = np.where(negative, -0.0, 0.0)
        return np.where((a == 0) & (b == 0), zero, pick(a, b))

    return extreme


_FUNCTIONS: dict[str, tuple[int, Callable[..., Row]]] = {
    "add": (2, rounded_to_odd),
    "sub": (2, lambda a, b: rounded_to_odd(a, -b)),
    "mul": (2, np.multiply),
    "fma": (3, _fma),
    "min": (2, _extreme(np.fmin, False)),
    "max": (2, _extreme(np.fmax, True)),
    "ex2": (1, np.exp2),
    "tanh": (1, np.tanh),
}
_PLAIN = {"rn", "approx", "ftz"}  # ftz has no meaning for bf16, and fp16 has its own below
_CLAMPS = {"sat", "relu", "NaN"}


def _numbers(parts: list[str]) -> Pure | None:
    """``fma.rn.relu.bf16x2`` and its kin; None for other types than halves."""
    name, *modifiers, kind = parts
    if kind.removesuffix("x2") not in ("f16", "bf16") or set(modifiers) - _PLAIN - _CLAMPS:
        return None
    half, count = kind.removesuffix("x2"), _FUNCTIONS[name][0]
    compute = _FUNCTIONS[name][1]
    if "NaN" in modifiers:
        compute = np.minimum if name == "min" else np.maximum
    flushes = "ftz" in modifiers and half == "f16"

    def function(*rows: Row) -> Row:
        values = [decode_half(np.ascontiguousarray(row).view(np.uint16), half) for row in rows]
        if flushes:
            values = [np.where(np.abs(v) < 2.0**-14, np.copysign(0.0, v), v) for v in values]
        result = compute(*values)
        if "sat" in modifiers:
            result = np.where(result > 0, np.minimum(result, 1.0), 0.0)
        if "relu" in modifiers:
            result = np.where(result <= 0, 0.0, result)
        if flushes:
            result = np.where(np.abs(result) < 2.0**-14, np.copysign(0.0, result), result)
        return encode_half(result, half).view(rows[0].dtype)

    register = "u32" if kind.endswith("x2") else "u16"
    return Pure(register, (register,) * count, function)


for _name in _FUNCTIONS:
    family(_name)(_numbers)

for _kind, _sign in (("u16", 0x8000), ("u32", 0x80008000)):
    for _half in ("f16", "bf16"):
        _type = _half + ("x2" if _kind == "u32" else "")
        pure(f"neg.{_type}", f"{_kind} = {_kind}")(lambda a, s=_sign: a ^ a.dtype.type(s))
        pure(f"abs.{_type}", f"{_kind} = {_kind}")(lambda a, s=_sign: a & ~a.dtype.type(s))
