"""Floating point: computed without loss in fp64, rounded once, subnormals kept, as the hardware does.

    fma.rn.bf16x2 %r4, %r1, %r2, %r3;       decode -> a * b + c, to odd -> encode, of each half; the first one is low
    cvt{.rounding}{.ftz}{.sat}{.relu}.to.from d, a;
    cvt.rn.bf16x2.f32 d, a, b;              two at once: a becomes the high half

The usual fp32 instructions are computed in fp32, which is faster. NaNs are the hardware's own: an fp32 instruction
gives 0x7FFFFFFF whatever NaN went in, one of 16 bits 0x7FFF. numpy's would be others, and a test of bits would see it.

The ``.approx`` and ``.full`` forms are computed in fp64 and rounded once: at least as near to the truth as the hardware
is, whose error NVIDIA bounds (2 units in the last place for ex2, rcp, sqrt and rsqrt). Results agree within those
bounds, not in bits; their special values (infinities, NaN, signed zeros) are the hardware's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .semantics import Known, Row, dtype_of, family, pure

__all__ = ["canonical", "decode", "encode", "flush"]

F16, F32, F64 = np.float16, np.float32, np.float64
FLOATS = {"f16": F16, "f32": F32, "f64": F64}
NANS: dict[Any, Any] = {F32: np.uint32(0x7FFFFFFF).view(F32), F16: np.uint16(0x7FFF).view(F16)}
HALF_NAN = np.uint16(0x7FFF)


def canonical(values: Row) -> Row:
    """Results with the hardware's NaN. The sum of squares of fp32 is a NaN exactly if one of the values is."""
    if np.isnan(np.dot(values, values)):
        values = np.where(np.isnan(values), NANS[values.dtype.type], values)
    return values


def flush(values: Row) -> Row:
    """Zeros of the same sign in place of subnormals."""
    return np.where(np.abs(values) < np.finfo(values.dtype).tiny, np.copysign(values.dtype.type(0), values), values)


# --- rounding ---------------------------------------------------------------------------------------------------------


def two_sum(x: Row, y: Row) -> tuple[Row, Row]:
    """The sum, rounded to nearest, and what was rounded off, exact (Knuth); a NaN where the sum is not finite."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def to_odd(nearest: Row, lost: Row) -> Row:
    """A number that was rounded to nearest, rounded to odd instead; ``lost`` has the sign of exact - nearest.

    A second rounding to fewer digits is then as if it were the only one (Boldo and Melquiond, "Emulation of a FMA and
    correctly rounded sums", 2008).
    """
    if not lost.any():
        return nearest
    bits = nearest.view(f"i{nearest.itemsize}")
    move = (lost != 0) & np.isfinite(lost) & (bits & 1 == 0)
    towards = np.where((lost > 0) == ~np.signbit(nearest), 1, -1).astype(bits.dtype)  # a step of the magnitude
    return np.where(move, bits + towards, bits).view(nearest.dtype)


def sum_to_odd(x: Row, y: Row) -> Row:
    """x + y in fp64, rounded to odd."""
    return to_odd(*two_sum(x, y))


def fused_multiply_add(a: Row, b: Row, c: Row) -> Row:
    """a * b + c in fp32 with one rounding, made from two in fp64.

    The product of two 24-bit significands is exact in 53 bits; the sum is not. Its rounding to fp64 can change the one
    to fp32 only where the fp64 sum lies half-way between two fp32 numbers: its low 28 bits are then zero.
    """
    product = a.astype(F64) * b
    total = product + c
    if not (total.view(np.uint64) & np.uint64((1 << 28) - 1)).all():
        total = sum_to_odd(product, c.astype(F64))
    return canonical(total.astype(F32))


def exact_fma_64(a: Row, b: Row, c: Row) -> Row:
    """a * b + c in fp64 with one rounding: the product in two parts (Dekker), their sum with c rounded to odd."""
    high = a * b
    a1, b1 = (v * 134217729.0 - (v * 134217729.0 - v) for v in (a, b))  # the upper 26 bits of each
    a2, b2 = a - a1, b - b1
    low = a2 * b2 - (((high - a1 * b1) - a2 * b1) - a1 * b2)
    total, lost = two_sum(c, low)
    upper, upper_lost = two_sum(high, total)
    result = upper + sum_to_odd(upper_lost, lost)
    return np.where(np.isfinite(result), result, a * b + c)  # overflow in between, infinities and NaN


def nudged(mode: str, nearest: Row, error: Row) -> Row:
    """The nearest number, moved to the neighbour that ``mode`` wants; ``error`` has the sign of exact - nearest."""
    down = (error < 0) & ((mode == "rm") | (mode == "rz") & (nearest > 0))
    up = (error > 0) & ((mode == "rp") | (mode == "rz") & (nearest < 0))
    nearest = np.where(down, np.nextafter(nearest, nearest.dtype.type(-np.inf)), nearest)
    return np.where(up, np.nextafter(nearest, nearest.dtype.type(np.inf)), nearest)


# --- to fp64 and back -------------------------------------------------------------------------------------------------


def decode(row: Row, kind: str, flushes: bool = False) -> Row:
    """Numbers of a kind (f16 and bf16 may be bits, two in an element) as fp64; integers stay."""
    if kind == "bf16":
        row = (np.ascontiguousarray(row).view(np.uint16).astype(np.uint32) << np.uint32(16)).view(F32)
    elif kind == "f16":
        row = np.ascontiguousarray(row).view(F16)
    if flushes and kind != "bf16":
        row = flush(row)
    return row.astype(F64) if row.dtype.kind == "f" else row


def encode(values: Row, kind: str, modifiers: Any = ()) -> Row:
    """fp64 numbers (or integers) as numbers of a kind, halves as bits: clamped, rounded once, the hardware's NaN."""
    if "sat" in modifiers:
        values = np.where(values > 0, np.minimum(values, 1.0), 0.0)
    elif "relu" in modifiers:
        values = np.where(values <= 0, 0.0, values)
    if kind in ("f16", "bf16") and values.dtype.kind != "f":
        values = values.astype(F64)
    rounding = next((m for m in modifiers if m in ("rz", "rm", "rp")), "rn")
    if kind == "bf16" and rounding == "rn":
        single = values.astype(F32)
        if values.dtype == F32:
            return to_bfloat(single)
        return to_bfloat(to_odd(single, np.where(np.isfinite(single), values - single, 0.0)))
    result = values.astype(FLOATS.get(kind, F32))
    if rounding != "rn":
        if values.dtype.kind != "f":  # 64 bits of an integer are exact in Python's
            error = np.array([(int(v) > int(r)) - (int(v) < int(r)) for v, r in zip(values, result, strict=True)])
        else:
            error = values - result.astype(F64)
        result = nudged(rounding, result, error)
    if "ftz" in modifiers:
        result = flush(result)
    if kind == "f64":
        return result
    result = np.where(np.isnan(result), NANS[result.dtype.type], result)
    if kind == "f16":
        return result.view(np.uint16)
    return result if kind == "f32" else (result.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def to_bfloat(values: Row) -> Row:
    """fp32 -> bf16 bits: what is cut off carries into what stays, a tie towards the even one."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), HALF_NAN, rounded.astype(np.uint16))


# --- arithmetic -------------------------------------------------------------------------------------------------------


def _extreme(function: Callable[..., Row], join: Callable[..., Row]) -> Callable[..., Row]:
    """min or max: a number wins against a NaN, and +0 is larger than -0: ``join`` of two zeros' bits sees to it."""

    def extreme(a: Row, b: Row) -> Row:
        bits = f"u{a.itemsize}"
        joined = join(np.ascontiguousarray(a).view(bits), np.ascontiguousarray(b).view(bits)).view(a.dtype)
        return np.where(a == b, joined, function(a, b))

    return extreme


_MIN, _MAX = _extreme(np.fmin, np.bitwise_or), _extreme(np.fmax, np.bitwise_and)
_EXACT: dict[str, tuple[int, Callable[..., Row]]] = {  # in fp64; what encode then rounds is as if it were exact
    "add": (2, sum_to_odd),
    "sub": (2, lambda a, b: sum_to_odd(a, -b)),
    "mul": (2, np.multiply),
    "fma": (3, lambda a, b, c: sum_to_odd(a * b, c)),
    "div": (2, np.divide),
    "min": (2, _MIN),
    "max": (2, _MAX),
    "rcp": (1, np.reciprocal),
    "sqrt": (1, np.sqrt),
    "rsqrt": (1, lambda a: 1 / np.sqrt(a)),
    "ex2": (1, np.exp2),
    "lg2": (1, np.log2),
    "sin": (1, np.sin),
    "cos": (1, np.cos),
    "tanh": (1, np.tanh),
    "abs": (1, np.abs),
    "neg": (1, np.negative),
}


@family(*_EXACT)
def _arithmetic(parts: list[str]) -> Known | None:
    """fp32 and halves, one or two in a register, with any modifiers."""
    name, *modifiers, kind = parts
    number = kind.removesuffix("x2")
    if kind not in ("f32", "f16", "bf16", "f16x2", "bf16x2") or set(modifiers) - {
        "rn", "rz", "rm", "rp", "approx", "full", "ftz", "sat", "relu", "NaN"
    }:  # fmt: skip
        return None
    count, compute = _EXACT[name]
    if "NaN" in modifiers:
        compute = {"min": np.minimum, "max": np.maximum}.get(name, compute)

    def function(*rows: Row) -> Row:
        values = compute(*(decode(row, number, "ftz" in modifiers) for row in rows))
        return encode(values, number, modifiers).view(rows[0].dtype)

    register = "f32" if kind == "f32" else "u32" if kind.endswith("x2") else "u16"
    return Known((register,), (register,) * count, function)


def _usual(function: Callable[..., Row]) -> Callable[..., Row]:
    return lambda *values: canonical(function(*values))


_function: Callable[..., Row]
for _name, _function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
    for _rounding in ("", ".rn"):
        pure(f"{_name}{_rounding}.f32", "f32 = f32 f32")(_usual(_function))
        pure(f"{_name}{_rounding}.f64", "f64 = f64 f64")(_function)
for _name, _function in (("min", _MIN), ("max", _MAX)):
    pure(f"{_name}.f32", "f32 = f32 f32")(_usual(_function))
    pure(f"{_name}.f64", "f64 = f64 f64")(_function)
pure("fma.rn.f32", "f32 = f32 f32 f32")(fused_multiply_add)
pure("fma.rn.f64", "f64 = f64 f64 f64")(exact_fma_64)
pure("div.rn.f64", "f64 = f64 f64")(np.divide)
for _opcode, _name in (("rcp.rn", "rcp"), ("rcp.approx.ftz", "rcp"), ("sqrt.rn", "sqrt"), ("rsqrt.approx", "rsqrt"),
                       ("rsqrt.approx.ftz", "rsqrt"), ("abs", "abs"), ("neg", "neg")):  # fmt: skip
    pure(f"{_opcode}.f64", "f64 = f64")(_EXACT[_name][1])
for _type, _kinds, _sign in (("u16", ("f16", "bf16"), 1 << 15), ("u32", ("f16x2", "bf16x2"), 0x80008000),
                             ("u32", ("f32",), 1 << 31)):  # fmt: skip
    for _kind in _kinds:  # bits stay bits, also of a NaN
        pure(f"neg.{_kind}", f"{_type} = {_type}")(lambda a, s=_sign: a ^ a.dtype.type(s))
        pure(f"abs.{_kind}", f"{_type} = {_type}")(lambda a, s=_sign: a & ~a.dtype.type(s))
for _kind in ("f32", "f64"):
    pure(f"copysign.{_kind}", f"{_kind} = {_kind} {_kind}")(lambda sign, value: np.copysign(value, sign))
    pure(f"testp.finite.{_kind}", f"pred = {_kind}")(np.isfinite)
    pure(f"testp.infinite.{_kind}", f"pred = {_kind}")(np.isinf)
    pure(f"testp.notanumber.{_kind}", f"pred = {_kind}")(np.isnan)
    pure(f"testp.number.{_kind}", f"pred = {_kind}")(lambda a: ~np.isnan(a))
    pure(f"testp.subnormal.{_kind}", f"pred = {_kind}")(lambda a: (a != 0) & (flush(a) == 0))
    pure(f"testp.normal.{_kind}", f"pred = {_kind}")(lambda a: np.isfinite(a) & (flush(a) != 0))


# --- conversions ------------------------------------------------------------------------------------------------------

_WHOLE: dict[str, Callable[[Row], Row]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_FLOATING = (*FLOATS, "bf16")


def _pair(convert: Callable[[Row], Row]) -> Callable[..., Row]:
    """The first source becomes the high half."""
    return lambda high, low: convert(high).astype(np.uint32) << np.uint32(16) | convert(low)


pure("cvt.f32.f16", "f32 = f16")(lambda a: canonical(a.astype(F32)))


@family("cvt")
def _cvt(parts: list[str]) -> Known | None:
    """Any conversion that the table of usual ones lacks."""
    *modifiers, to, source = parts[1:]
    if set(modifiers) - {"rn", "rz", "rm", "rp", "rna", *_WHOLE, "ftz", "sat", "relu", "satfinite", "pack"}:
        return None
    flushes = "ftz" in modifiers  # fp32 numbers, on the way in and on the way out
    modifiers = [m for m in modifiers if m != "ftz" or to == "f32"]
    if to in ("f16x2", "bf16x2") and source == "f32":
        return Known(("u32",), ("f32", "f32"), _pair(lambda a: encode(a, to.removesuffix("x2"), modifiers)))
    if to == "tf32" and source == "f32":
        return Known(("u32",), ("u32",), lambda a: (a + np.uint32(0x1000)) & np.uint32(0xFFFFE000))  # rna: ties away
    if any(kind not in _FLOATING and kind[0] not in "us" for kind in (to, source)):
        return None
    whole = next((_WHOLE[m] for m in modifiers if m in _WHOLE), None)

    def function(a: Row) -> Row:
        value = decode(a, source, flushes and source == "f32")
        if to in _FLOATING:
            return encode(whole(value) if whole else value, to, modifiers)
        if source in _FLOATING:
            return _to_integer((whole or np.trunc)(value), to, source)
        if "sat" in modifiers:
            limits, has = np.iinfo(dtype_of(to)), np.iinfo(value.dtype)
            value = np.clip(value, max(limits.min, has.min), min(limits.max, has.max))
        return value.astype(dtype_of(to))

    return Known((_register(to),), (_register(source),), function)


def _to_integer(whole: Row, kind: str, source: str) -> Row:
    """Clamped to what the type holds; a NaN gives 0, or the top bit where 64 bits take part."""
    dtype, limits = dtype_of(kind), np.iinfo(dtype_of(kind))
    low, high, nan = whole <= float(limits.min), whole >= float(limits.max), np.isnan(whole)
    lost = 1 << dtype.itemsize * 8 - 1 if source == "f64" or dtype.itemsize == 8 else 0
    inside = np.where(low | high | nan, 0, whole).astype(dtype)
    clamped = np.select([low, high], [dtype.type(limits.min), dtype.type(limits.max)], inside)
    return np.where(nan, np.array(lost, f"u{dtype.itemsize}").view(dtype), clamped)


def _register(kind: str) -> str:
    return "u16" if kind in ("f16", "bf16") else kind
