"""atom and red: one lane after the other, in the order of lanes; each gets what it found.

atom.relaxed.gpu.global.add.f32 %f1, [%rd1], %f2;       red: the same without a result
     '- order and scope: every atomic here is as strong as there is
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .addresses import address_of
from .halves import decode_half, encode_half
from .memory import unsigned
from .parse import Instruction, width_of
from .program import UNSIGNED, Step

if TYPE_CHECKING:
    from .batch import Batch
    from .decode import Decoder

__all__ = ["find_atomic"]

Row = Any  # a numpy row, one element per lane


def _increment(old: Row, limit: Row) -> Row:
    return np.where(old >= limit, old.dtype.type(0), old + old.dtype.type(1))


def _decrement(old: Row, limit: Row) -> Row:
    return np.where((old == 0) | (old > limit), limit, old - old.dtype.type(1))


_OPERATIONS: dict[str, Callable[..., Row]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "cas": lambda old, compare, new: np.where(old == compare, new, old),
    "inc": _increment,
    "dec": _decrement,
}
_MODIFIERS = {"relaxed", "acquire", "release", "acq_rel", "cta", "cluster", "gpu", "sys", "noftz", "global", "shared",
              "shared::cta", "L2::cache_hint"}  # fmt: skip


def find_atomic(opcode: str) -> Callable[[Decoder, Instruction], Step] | None:
    """What decodes an atomic, or None."""
    family, *modifiers, kind = opcode.split(".")
    operation = next((m for m in modifiers if m in _OPERATIONS), None)
    if family not in ("atom", "red") or operation is None or set(modifiers) - _MODIFIERS - {operation}:
        return None
    if kind.startswith(("f", "bf")) and operation not in ("add", "min", "max"):
        return None
    return _atomic


def _as(kind: str, function: Callable[..., Row]) -> Callable[..., Row]:
    """The operation on rows of bits."""
    half = kind.removesuffix("x2")
    if half in ("f16", "bf16"):

        def halves(*rows: Row) -> Row:
            values = (decode_half(np.ascontiguousarray(row).view(np.uint16), half) for row in rows)
            return encode_half(function(*values), half).view(rows[0].dtype)

        return halves
    dtype = f"{kind[0].replace('b', 'u').replace('s', 'i')}{width_of(kind)}"
    return lambda *rows: function(*(row.view(dtype) for row in rows)).view(rows[0].dtype)


def _atomic(decoder: Decoder, instruction: Instruction) -> Step:
    family, *modifiers, kind = instruction.opcode.split(".")
    operation = next(m for m in modifiers if m in _OPERATIONS)
    spaces = [m for m in modifiers if m in ("global", "shared", "shared::cta")]
    space = spaces[0].partition("::")[0] if spaces else "generic"
    size, returns = width_of(kind), family == "atom"
    to = None
    if returns and instruction.operands[0] != "_":
        to = decoder.target(instruction.operands[0], f"u{8 * size}", instruction)[1]
    base, width, offset = decoder.address(instruction.operands[int(returns)], instruction)
    wanted = 2 if operation == "cas" else 1
    given = instruction.operands[1 + returns : 1 + returns + wanted]
    slots = [decoder.source(operand, f"u{8 * size}", instruction)[1] for operand in given]
    function = _as(kind, _OPERATIONS[operation])

    def step(m: Batch, s: Any) -> None:
        address, lanes = address_of(m, s, base, width, offset), m.lanes[s]
        values = [m.rows[UNSIGNED][slot][s].astype(unsigned[size], copy=False) for slot in slots]
        found = np.empty(len(lanes), unsigned[size])
        for some in _turns(address):
            found[some] = m.spaces[space].update(address[some], lanes[some], size, function, *(v[some] for v in values))
        if to is not None:
            m.rows[UNSIGNED][to][s] = found

    return step


def _turns(address: np.ndarray) -> Iterator[np.ndarray]:
    """The lanes in groups that have no address in common, each lane after those before it at its address."""
    left = np.arange(len(address))
    while len(left):
        first = np.sort(np.unique(address[left], return_index=True)[1])
        yield left[first]
        left = np.delete(left, first)
