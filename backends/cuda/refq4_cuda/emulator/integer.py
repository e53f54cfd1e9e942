"""Integers, predicates and moves: wrap-around arithmetic, clamped shifts, bytes chosen from a register."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .semantics import dtype_of, pure

__all__ = ["constant", "each", "shift_left", "shift_right"]

Row = Any  # a numpy row, one element per lane
SIZES = ("16", "32", "64")


def each(family: str, kinds: str, function: Callable[..., Row], signature: str = "{t} = {t} {t}") -> None:
    """One function for all sizes of some kinds: ``add`` for ``s u`` enters add.s16 ... add.u64."""
    for kind in kinds.split():
        for size in SIZES:
            pure(f"{family}.{kind}{size}", signature.format(t=kind.replace("b", "u") + size))(function)


each("add", "s u", np.add)
each("sub", "s u", np.subtract)
each("mul.lo", "s u", np.multiply)
each("mad.lo", "s u", lambda a, b, c: a * b + c, "{t} = {t} {t} {t}")
each("min", "s u", np.minimum)
each("max", "s u", np.maximum)
each("neg", "s", np.negative, "{t} = {t}")
each("and", "b", np.bitwise_and)
each("or", "b", np.bitwise_or)
each("xor", "b", np.bitwise_xor)
each("not", "b", np.invert, "{t} = {t}")
each("selp", "b s u", lambda a, b, p: np.where(p, a, b), "{t} = {t} {t} pred")
each("mov", "b s u", lambda a: a, "{t} = {t}")
for name, function in {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.items():
    pure(f"{name}.pred", "pred = pred pred")(function)
pure("not.pred", "pred = pred")(np.logical_not)
pure("mov.pred", "pred = pred")(lambda a: a)
pure("selp.f32", "u32 = u32 u32 pred")(lambda a, b, p: np.where(p, a, b))
pure("mov.f32", "u32 = u32")(lambda a: a)
pure("cvta.to.global.u64", "u64 = u64")(lambda a: a)  # global addresses are generic addresses


def _widening(wide: Any) -> Callable[..., Row]:
    return lambda a, b: a.astype(wide) * b.astype(wide)


for narrow, wide in (("u32", "u64"), ("s32", "s64"), ("u16", "u32"), ("s16", "s32")):
    pure(f"mul.wide.{narrow}", f"{wide} = {narrow} {narrow}")(_widening(dtype_of(wide)))


# --- division: towards zero -------------------------------------------------------------------------------------------


def divide(a: Row, b: Row) -> Row:
    """By zero it gives all ones. numpy rounds down, so a negative quotient with a remainder goes up by one."""
    quotient = a // np.where(b == 0, b.dtype.type(1), b)
    up = (quotient < 0) & (quotient * b != a)
    quotient = np.where(up, quotient + quotient.dtype.type(1), quotient)
    return np.where(b == 0, ~(a ^ a), quotient)


each("div", "s u", divide)
each("rem", "s u", lambda a, b: a - divide(a, b) * b)


# --- shifts, bytes ---------------------------------------------------------------------------------------------------


def constant(row: Row) -> int | None:
    """The number of a row that stands for a constant (one element, repeated), else None."""
    return int(row[0]) if row.strides == (0,) else None


def shift_left(a: Row, by: Row) -> Row:
    """PTX clamps the amount: past the width nothing is left."""
    bits = a.itemsize * 8
    if (amount := constant(by)) is not None and amount < bits:
        return a << a.dtype.type(amount)
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a: Row, by: Row) -> Row:
    """As to the left; a signed number fills up with its sign."""
    bits = a.itemsize * 8
    if (amount := constant(by)) is not None and amount < bits:
        return a >> a.dtype.type(amount)
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, a.dtype.type(0))


each("shl", "b", shift_left, "{t} = {t} u32")
each("shr", "s u", shift_right, "{t} = {t} u32")


@pure("prmt.b32", "u32 = u32 u32 u32")
def _(a: Row, b: Row, selector: Row) -> Row:
    """Each nibble of the selector picks one of the eight bytes of (b, a); its top bit asks for that byte's sign."""
    pool = np.stack((a, b), axis=1).view(np.uint8)  # [lanes, 8], a's low byte first
    nibbles = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)
    picked = np.take_along_axis(pool, (nibbles & 7).astype(np.intp), axis=1)
    if (nibbles & 8).any():
        picked = np.where(nibbles & 8, (picked >> 7) * np.uint8(255), picked)
    return picked.view(np.uint32)[:, 0]
