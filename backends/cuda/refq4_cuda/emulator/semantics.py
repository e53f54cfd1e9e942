"""The table of instructions: an opcode, the types of its operands, and a function of whole rows.

    @pure("mul.wide.u32", "u64 = u32 u32")            results = sources
    def _(a, b):                                      one element per lane, dtypes as the signature says
        return a.astype(u64) * b

    @on_lanes("vote.sync.any.pred", "pred = pred u32", meets=named_lanes)
    def _(m, s, holds, mask):                         what needs more than values gets the batch and the selection, too
        ...

Types: u, s, f and the number of bits (f16, f32 and f64 are numpy's floats); ``b16`` with bf16 bits is a u16; ``pred``
is a bool; ``address``; ``int`` is a number as written; ``any`` is not read. A ``?`` stands behind what may be missing.
An instruction whose lanes must come together says in ``meets`` which ones. Opcodes whose modifiers make too many
combinations are made when they are first looked up, by a function entered with ``family``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .parse import Instruction, Vector

__all__ = ["Known", "Row", "dtype_of", "family", "find", "known", "on_lanes", "pure", "results_of"]

Function = Callable[..., Any]
Row = Any  # a numpy row, one element per lane


class Known(NamedTuple):
    """One opcode: the types of what it writes and of what it reads, in order, and the function.

    ``on_lanes``: the function takes the batch and the selection first. ``meets``: of (batch, selection, readers of the
    sources), which lanes are complete: a mask, or None where nobody is missing.
    """

    results: tuple[str, ...]
    sources: tuple[str, ...]
    function: Function
    on_lanes: bool = False
    meets: Function | None = None


TABLE: dict[str, Known] = {}
FAMILIES: dict[str, list[Callable[[list[str]], Known | None]]] = {}


def pure(opcode: str, signature: str) -> Callable[[Function], Function]:
    """Enter a function of values into the table; see the top of the file."""

    def enter(function: Function) -> Function:
        TABLE[opcode] = known(signature, function)
        return function

    return enter


def on_lanes(opcode: str, signature: str, meets: Function | None = None) -> Callable[[Function], Function]:
    """Enter a function of (batch, selection, values)."""

    def enter(function: Function) -> Function:
        TABLE[opcode] = known(signature, function, True, meets)
        return function

    return enter


def known(signature: str, function: Function, on_lanes: bool = False, meets: Function | None = None) -> Known:
    """An entry by its signature."""
    results, sources = signature.split("=")
    return Known(tuple(results.split()), tuple(sources.split()), function, on_lanes, meets)


def family(*names: str) -> Callable[[Callable[[list[str]], Known | None]], Callable[[list[str]], Known | None]]:
    """Enter a function that makes the opcodes which begin with a name from their parts, or gives None."""

    def enter(make: Callable[[list[str]], Known | None]) -> Callable[[list[str]], Known | None]:
        for name in names:
            FAMILIES.setdefault(name, []).append(make)
        return make

    return enter


def find(instruction: Instruction) -> Known | None:
    """What is known of an instruction, or None."""
    opcode = instruction.opcode
    if not opcode.startswith(("setp.", "bar", "mov.")):
        return _find(opcode)
    if opcode.startswith("setp.") and "|" in instruction.text:
        opcode += ".|"  # the second result is the opposite
    elif opcode.startswith("bar") and instruction.operands == ("0",):
        opcode += ".0"  # all threads of the block
    elif opcode.startswith("mov.") and any(isinstance(operand, Vector) for operand in instruction.operands):
        opcode += "".join(f".{len(o.parts) if isinstance(o, Vector) else 1}" for o in instruction.operands)
    return _find(opcode)


@lru_cache(maxsize=4096)
def _find(opcode: str) -> Known | None:
    parts = opcode.split(".")
    made = (make(parts) for make in FAMILIES.get(parts[0], ()))
    return TABLE.get(opcode) or next((one for one in made if one is not None), None)


def results_of(instruction: Instruction) -> int:
    """How many operands, from the first on, an instruction writes."""
    if (found := find(instruction)) is None:
        return 0
    return len(found.results) - (found.results[-1:] == ("pred?",) and "|" not in instruction.text)


def dtype_of(type_name: str) -> Any:
    """The numpy dtype of a type in a signature."""
    if type_name == "pred":
        return np.dtype(bool)
    return np.dtype(f"{type_name[0].replace('s', 'i')}{int(type_name[1:]) // 8}")
