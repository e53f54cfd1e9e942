"""The table of instructions that compute: an opcode, the types of its operands, and a numpy function of whole rows.

    @pure("mul.wide.u32", "u64 = u32 u32")
    def _(a, b):                   one element per lane, dtypes as the signature says
        return a.astype(u64) * b

Types: u, s, f and the number of bits (f16 and f32 are numpy's floats); ``b16`` with bf16 bits is a u16; ``pred`` is a
bool; ``find`` looks an opcode up. The families are in ``integer.py``, ``bits.py``, ``floating.py``, ``functions.py``,
``halves.py``, ``compare.py`` and ``convert.py``. Those whose modifiers make too many combinations for a table are made
when they are first looked up, by a function entered with ``family``. Two modifiers are the same everywhere, and are
put around what the rest of the opcode says: ``.ftz`` (subnormals are zeros) and ``.sat`` (results from 0 to 1).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

__all__ = ["PURE", "Pure", "dtype_of", "family", "find", "pure"]

Function = Callable[..., Any]
Row = Any  # a numpy row, one element per lane
SMALLEST_NORMAL = np.float32(2.0**-126)


class Pure(NamedTuple):
    """One opcode: the type of the result, those of the sources, and the function."""

    result: str
    sources: tuple[str, ...]
    function: Function


PURE: dict[str, Pure] = {}


def pure(opcode: str, signature: str) -> Callable[[Function], Function]:
    """Enter a function into the table; see the top of the file."""

    def enter(function: Function) -> Function:
        result, sources = signature.split("=")
        PURE[opcode] = Pure(result.strip(), tuple(sources.split()), function)
        return function

    return enter


FAMILIES: dict[str, Callable[[list[str]], Pure | None]] = {}


def family(name: str) -> Callable[[Callable[[list[str]], Pure | None]], Callable[[list[str]], Pure | None]]:
    """Enter a function that makes the opcodes which begin with ``name`` from their parts, or gives None."""

    def enter(make: Callable[[list[str]], Pure | None]) -> Callable[[list[str]], Pure | None]:
        FAMILIES[name] = make
        return make

    return enter


@lru_cache(maxsize=1024)
def find(opcode: str) -> Pure | None:
    """What is known of an opcode, or None."""
    if opcode in PURE:
        return PURE[opcode]
    parts = opcode.split(".")
    if parts[0] in FAMILIES and (made := FAMILIES[parts[0]](parts)) is not None:
        return made
    for modifier, around in (("ftz", _flushing), ("sat", _saturating)):
        if modifier in parts and parts[-1] == "f32":
            known = find(".".join(part for part in parts if part != modifier))
            return known and around(known)
    return None


def flush(values: Row) -> Row:
    """fp32 numbers, or their bits, with zeros of the same sign in place of subnormals."""
    numbers = values if values.dtype.kind == "f" else np.ascontiguousarray(values).view(np.float32)
    small = np.abs(numbers) < SMALLEST_NORMAL
    return np.where(small, np.copysign(np.float32(0), numbers), numbers).view(values.dtype)


def _flushing(known: Pure) -> Pure:
    """fp32 stands in a signature as f32, or as u32 where bits do."""

    def function(*values: Row) -> Row:
        result = known.function(
            *(flush(v) if k in ("f32", "u32") else v for v, k in zip(values, known.sources, strict=True))
        )
        return flush(result) if known.result in ("f32", "u32") else result

    return known._replace(function=function)


def _saturating(known: Pure) -> Pure:
    def function(*values: Row) -> Row:
        result = known.function(*values)
        return np.where(result > 0, np.minimum(result, result.dtype.type(1)), result.dtype.type(0))

    return known._replace(function=function)


def dtype_of(type_name: str) -> Any:
    """The numpy dtype of a type in a signature."""
    if type_name == "pred":
        return np.dtype(bool)
    kind, bits = re.fullmatch(r"([usf])(\d+)", type_name).groups()  # type: ignore[union-attr]
    return np.dtype(f"{kind.replace('s', 'i')}{int(bits) // 8}")
