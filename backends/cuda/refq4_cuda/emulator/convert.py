"""cvt from any number to any other, in all rounding and saturating forms.

cvt{.rounding}{.ftz}{.sat}{.relu}.to.from d, a;       roundings: rn rz rm rp, to an integer rni rzi rmi rpi
cvt.rn.bf16x2.f32 d, a, b;                            two at once: a becomes the high half
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .floating import canonical
from .functions import nudged
from .halves import decode_half, encode_half
from .semantics import Pure, dtype_of, family, flush

__all__: list[str] = []

Row = Any  # a numpy row, one element per lane
F32, F64 = np.float32, np.float64
_WHOLE: dict[str, Callable[[Row], Row]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_HALVES, _FLOATS = ("f16", "bf16"), ("f16", "bf16", "f32", "f64")


def _read(kind: str, flushes: bool) -> Callable[[Row], Row]:
    """A row as fp64, or as it is for integers."""
    if kind in _HALVES:
        return lambda a: decode_half(a, kind)
    if kind == "f32" and flushes:
        return lambda a: flush(a).astype(F64)
    return (lambda a: a.astype(F64)) if kind in _FLOATS else (lambda a: a)


def _to_integer(value: Row, kind: str, rounding: str, source: str) -> Row:
    """Rounded, then clamped to what the type holds; a NaN gives 0, or the top bit where 64 bits take part."""
    dtype, limits = dtype_of(kind), np.iinfo(dtype_of(kind))
    whole = _WHOLE[rounding](value)
    safe = np.where(np.isnan(whole), 0, np.clip(whole, float(limits.min), float(limits.max)))
    low, high = whole <= float(limits.min), whole >= float(limits.max)
    result = np.where(low | high, 0, safe).astype(dtype)
    result = np.where(low, dtype.type(limits.min), np.where(high, dtype.type(limits.max), result))
    lost = 1 << dtype.itemsize * 8 - 1 if source == "f64" or dtype.itemsize == 8 else 0
    return np.where(np.isnan(value), np.array(lost, f"u{dtype.itemsize}").view(dtype), result)


def _to_half(value: Row, kind: str, rounding: str) -> Row:
    bits = encode_half(value, kind)
    if rounding == "rz":  # one step back where rounding went away from zero
        away = (np.abs(decode_half(bits, kind)) > np.abs(value)) & np.isfinite(value)
        bits = np.where(away, bits - np.uint16(1), bits)
    return bits


def _to_float(value: Row, kind: str, rounding: str) -> Row:
    """A number (fp64, or an integer) in fp32 or fp64."""
    result = value.astype(F32 if kind == "f32" else F64)
    if rounding in ("rz", "rm", "rp"):
        error = value - result.astype(F64) if value.dtype.itemsize < 8 or value.dtype.kind == "f" else None
        if error is None:  # 64-bit integers: exact in Python's
            error = np.array([(int(v) > int(r)) - (int(v) < int(r)) for v, r in zip(value, result, strict=True)])
        result = nudged(rounding, result, error)
    return canonical(result) if kind == "f32" else result


@family("cvt")
def _cvt(parts: list[str]) -> Pure | None:
    """Any conversion that the table of usual ones lacks."""
    *modifiers, to, source = parts[1:]
    rounding = next((m for m in modifiers if m.removesuffix("i") in ("rn", "rz", "rm", "rp", "rna")), "rn")
    if set(modifiers) - {rounding, "ftz", "sat", "relu", "satfinite", "pack"}:
        return None
    if to in ("f16x2", "bf16x2") and source == "f32":
        return _pair(to.removesuffix("x2"), modifiers, rounding)
    if to == "tf32" and source == "f32":
        return Pure("u32", ("u32",), lambda a: (a + np.uint32(0x1000)) & np.uint32(0xFFFFE000))  # rna: ties away
    if any(kind not in _FLOATS and kind[0] not in "us" for kind in (to, source)):
        return None
    read = _read(source, "ftz" in modifiers)

    def function(a: Row) -> Row:
        value = read(a)
        if to in _FLOATS:
            if rounding in _WHOLE:
                value = _WHOLE[rounding](value)
            value = _clamped(value, modifiers)
            if to in _HALVES:
                return _to_half(value.astype(F64), to, rounding)
            result = _to_float(value, to, rounding)
            return flush(result) if "ftz" in modifiers and to == "f32" else result
        if source in _FLOATS:
            return _to_integer(value, to, rounding if rounding in _WHOLE else "rzi", source)
        if "sat" in modifiers:
            limits = np.iinfo(dtype_of(to))
            low = max(limits.min, int(np.iinfo(value.dtype).min))
            value = np.clip(value, low, min(limits.max, int(np.iinfo(value.dtype).max)))
        return value.astype(dtype_of(to))

    return Pure(_register(to), (_register(source),), function)


def _register(kind: str) -> str:
    return "u16" if kind in _HALVES else kind


def _clamped(value: Row, modifiers: list[str]) -> Row:
    if "sat" in modifiers:
        return np.where(value > 0, np.minimum(value, 1.0), 0.0)
    return np.where(value <= 0, 0.0, value) if "relu" in modifiers else value


def _pair(kind: str, modifiers: list[str], rounding: str) -> Pure:
    def function(high: Row, low: Row) -> Row:
        upper, lower = (_to_half(_clamped(v.astype(F64), modifiers), kind, rounding) for v in (high, low))
        return upper.astype(np.uint32) << np.uint32(16) | lower

    return Pure("u32", ("f32", "f32"), function)
