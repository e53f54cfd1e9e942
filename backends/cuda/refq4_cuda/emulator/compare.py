"""setp, set and slct in all their forms: a comparison, perhaps joined with a predicate, of any type.

setp.lt.and.f32 %p1|%p2, %f1, %f2, !%p3;       p1 = (f1 < f2) and not p3;  p2 = not (f1 < f2) and not p3
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .floating import decode, flush
from .semantics import Known, Row, family, pure

__all__: list[str] = []

COMPARISONS: dict[str, Callable[[Row, Row], Row]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_JOINS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


_FLOATING = COMPARISONS | {  # false for a NaN; those with a u are true
    "ne": lambda a, b: (a < b) | (a > b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


def _unordered(compare: Callable[[Row, Row], Row]) -> Callable[[Row, Row], Row]:
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


_FLOATING |= {f"{name}u": _unordered(compare) for name, compare in COMPARISONS.items()}


def _compare(name: str, kind: str, flushes: bool) -> tuple[str, Callable[[Row, Row], Row]] | None:
    """The type in which operands are read, and the comparison."""
    if kind not in ("f16", "bf16", "f32", "f64"):
        plain = COMPARISONS.get(_UNSIGNED_NAMES.get(name, name))
        return None if plain is None or "x" in kind else (kind.replace("b", "u"), plain)
    if (compare := _FLOATING.get(name)) is None:
        return None
    if kind in ("f16", "bf16"):
        return "u16", lambda a, b: compare(decode(a, kind), decode(b, kind))
    return kind, (lambda a, b: compare(flush(a), flush(b))) if flushes and kind == "f32" else compare


@family("setp")
def _setp(parts: list[str]) -> Known | None:
    """``setp.CmpOp{.BoolOp}{.ftz}.type``, and with ``.|`` behind it the form of two results."""
    two = parts[-1] == "|"
    name, *middle, kind = parts[1:-1] if two else parts[1:]
    join = next((_JOINS[part] for part in middle if part in _JOINS), None)
    found = _compare(name, kind, "ftz" in middle)
    if found is None or set(middle) - {*_JOINS, "ftz"}:
        return None
    read, compare = found
    if join is None and not two:
        return Known(("pred",), (read, read), compare)

    def function(a: Row, b: Row, *p: Row) -> Row:
        holds = compare(a, b)
        first = join(holds, *p) if join else holds
        return (first, join(~holds, *p) if join else ~holds) if two else first

    return Known(("pred",) * (1 + two), (read, read, *(["pred"] if join else [])), function)


@family("set")
def _set(parts: list[str]) -> Known | None:
    """``set.CmpOp{.BoolOp}{.ftz}.dtype.stype``: all ones, or 1.0, where the comparison holds."""
    *compared, result, kind = parts
    found = _setp([*compared, kind]) if result in ("u32", "s32", "f32") else None
    if found is None:
        return None
    true = np.uint32(0x3F800000 if result == "f32" else 0xFFFFFFFF)
    return Known(("u32",), found.sources, lambda *operands: np.where(found.function(*operands), true, np.uint32(0)))


for _size in ("16", "32", "64"):
    for _kind in (f"b{_size}", f"s{_size}", f"u{_size}", *([f"f{_size}"] if _size != "16" else [])):
        for _by in ("s32", "f32"):
            _signature = f"u{_size} = u{_size} u{_size} {_by}"
            pure(f"slct.{_kind}.{_by}", _signature)(lambda a, b, c: np.where(c >= 0, a, b))
