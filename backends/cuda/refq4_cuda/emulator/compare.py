"""setp, set and slct in all their forms: a comparison, perhaps joined with a predicate, of any type.

setp.lt.and.f32 %p1|%p2, %f1, %f2, !%p3;       p1 = (f1 < f2) and not p3;  p2 = not (f1 < f2) and not p3
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .halves import decode_half
from .semantics import Pure, family, flush, pure

__all__ = ["complement"]

Row = Any  # a numpy row, one element per lane
COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
               "ge": np.greater_equal}  # fmt: skip
_JOINS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _comparison(name: str) -> Callable[[Row, Row], Row] | None:
    """By name; the plain ones are false for a NaN, those with a u are true."""
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "ne":
        return lambda a, b: (a < b) | (a > b)
    if name in COMPARISONS:
        return COMPARISONS[name]
    if name[:-1] in COMPARISONS and name[-1] == "u":
        compare = COMPARISONS[name[:-1]]
        return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)
    return None


def _compare(name: str, kind: str, flushes: bool) -> tuple[str, Callable[[Row, Row], Row]] | None:
    """The type in which operands are read, and the comparison."""
    half = kind.removesuffix("x2")
    if half in ("f16", "bf16"):
        if (compare := _comparison(name)) is None or kind != half:
            return None
        return "u16", lambda a, b: compare(decode_half(a, half), decode_half(b, half))
    if kind in ("f32", "f64"):
        if (compare := _comparison(name)) is None:
            return None
        return kind, (lambda a, b: compare(flush(a), flush(b))) if flushes and kind == "f32" else compare
    plain = COMPARISONS.get(_UNSIGNED_NAMES.get(name, name))
    return None if plain is None else (kind.replace("b", "u"), plain)


def _setp(parts: list[str], negated: bool = False) -> Pure | None:
    """``setp.CmpOp{.BoolOp}{.ftz}.type``; the second result is made by the decoder, with ``complement``."""
    name, *middle, kind = parts[1:]
    join = next((_JOINS[part] for part in middle if part in _JOINS), None)
    found = _compare(name, kind, "ftz" in middle)
    if found is None or set(middle) - {*_JOINS, "ftz"}:
        return None
    read, compare = found
    holds: Callable[[Row, Row], Row] = (lambda a, b: ~compare(a, b)) if negated else compare
    if join is None:
        return Pure("pred", (read, read), holds)
    return Pure("pred", (read, read, "pred"), lambda a, b, p: join(holds(a, b), p))


family("setp")(_setp)


def complement(opcode: str) -> Pure | None:
    """The second result of a setp with two: the comparison negated, then joined."""
    return _setp(opcode.split("."), negated=True)


@family("set")
def _set(parts: list[str]) -> Pure | None:
    """``set.CmpOp{.BoolOp}{.ftz}.dtype.stype``: all ones, or 1.0, where the comparison holds."""
    *compared, result, kind = parts
    found = _setp([*compared, kind]) if result in ("u32", "s32", "f32") else None
    if found is None:
        return None
    true = np.uint32(0x3F800000 if result == "f32" else 0xFFFFFFFF)
    return Pure("u32", found.sources, lambda *operands: np.where(found.function(*operands), true, np.uint32(0)))


for _bits in ("16", "32", "64"):
    for _kind in "bsu":
        _type = f"u{_bits}"
        pure(f"slct.{_kind}{_bits}.s32", f"{_type} = {_type} {_type} s32")(lambda a, b, c: np.where(c >= 0, a, b))
        pure(f"slct.{_kind}{_bits}.f32", f"{_type} = {_type} {_type} f32")(lambda a, b, c: np.where(c >= 0, a, b))
pure("slct.f32.s32", "u32 = u32 u32 s32")(lambda a, b, c: np.where(c >= 0, a, b))
pure("slct.f64.s32", "u64 = u64 u64 s32")(lambda a, b, c: np.where(c >= 0, a, b))
