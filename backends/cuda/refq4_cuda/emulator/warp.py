"""Instructions that threads execute together: barriers of a block or a warp, shuffles, votes.

    bar.sync 0               all threads of the block, at one instruction        (others: barriers.py)
    bar.warp.sync, shfl,     the lanes named in the mask that have not returned
    vote, match, redux
    mma, ldmatrix            all 32 lanes of the warp                            (tensor.py)

``gather`` says which groups of lanes are complete: all participating lanes have arrived. The scheduler lets the others
wait at the instruction. A lane that waits to the end for lanes that never arrive is a divergence, and an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .errors import ConvergenceError, Fault
from .order import WARP
from .parse import Instruction
from .program import UNSIGNED, Step

if TYPE_CHECKING:
    from .batch import Batch
    from .decode import Decoder

__all__ = ["COMPANY", "Company", "Gather", "named_lanes", "whole_block", "whole_warp"]

Gather = Callable[["Batch", Any], np.ndarray | None]
Decode = Callable[["Decoder", Instruction], Step]
_ALL = 0xFFFFFFFF


class Company(NamedTuple):
    """One opcode: its step, and who must be there (a mask over the group, or None where nobody is missing)."""

    decode: Callable[[Decoder, Instruction], Step]
    gather: Callable[[Decoder, Instruction], Gather]


# --- who must be there ------------------------------------------------------------------------------------------------


def whole_block(decoder: Decoder, instruction: Instruction) -> Gather:
    """All threads of the block."""

    def gather(m: Batch, s: Any) -> np.ndarray | None:
        block = m.block[s]
        if len(block) == m.count:
            return None
        there = np.bincount(block, minlength=len(m.blocks))
        complete = there == np.bincount(m.block[m.existing], minlength=len(m.blocks))
        return None if complete[block].all() else complete[block]

    return gather


def whole_warp(decoder: Decoder, instruction: Instruction) -> Gather:
    """All lanes of the warp."""

    def gather(m: Batch, s: Any) -> np.ndarray | None:
        return None if _is_warps(s) else _named_are_there(m, s, np.full(len(m.lanes[s]), _ALL, np.uint64))

    return gather


def named_lanes(position: int) -> Callable[[Decoder, Instruction], Gather]:
    """The lanes in the mask that stands at a position among the operands."""

    def made(decoder: Decoder, instruction: Instruction) -> Gather:
        _, slot, _ = decoder.source(str(instruction.operands[position]), "u32", instruction)

        def gather(m: Batch, s: Any) -> np.ndarray | None:
            mask = m.rows[UNSIGNED][slot][s]
            left_out = mask >> (m.lanes[s] % WARP).astype(np.uint32) & 1 == 0
            if left_out.any():
                raise Fault(
                    ConvergenceError,
                    m.lanes[s][left_out],
                    f"synchronises under the mask {int(mask[left_out][0]):#010x}, which leaves it out",
                    "look at the mask: it must name every lane that gets here",
                )
            if _is_warps(s):
                return None
            running = np.bincount(m.warp[m.live], 2.0 ** (m.lanes[m.live] % WARP), m.count // WARP).astype(np.uint64)
            return _named_are_there(m, s, mask & running[m.warp[s]])

        return gather

    return made


def _is_warps(s: Any) -> bool:
    """Whether a selection is made of whole warps: lanes are sorted, so 32 of them 31 apart follow one another."""
    if isinstance(s, slice):
        return bool(s.start % WARP == 0 and s.stop % WARP == 0)
    if len(s) % WARP:
        return False
    first, last = s[::WARP], s[WARP - 1 :: WARP]
    return not bool((first % WARP).any()) and bool((last - first == WARP - 1).all())


def _named_are_there(m: Batch, s: Any, mask: Any) -> np.ndarray | None:
    lanes = m.lanes[s]
    bits = np.bincount(m.warp[s], weights=2.0 ** (lanes % WARP), minlength=m.count // WARP).astype(np.uint64)
    complete: np.ndarray = mask & ~bits[m.warp[s]] == 0
    return None if complete.all() else complete


# --- barriers ---------------------------------------------------------------------------------------------------------


def _barrier(decoder: Decoder, instruction: Instruction) -> Step:
    return lambda m, s: m.order.barrier(s)


def _warp_sync(decoder: Decoder, instruction: Instruction) -> Step:
    return lambda m, s: m.order.warp_sync(s)


# --- shuffles ---------------------------------------------------------------------------------------------------------

_SOURCE_LANE: dict[str, Callable[..., Any]] = {
    "bfly": np.bitwise_xor,
    "down": np.add,
    "up": np.subtract,
    "idx": lambda lane, by: by & (WARP - 1),
}


def _shuffle(mode: str) -> Callable[[Decoder, Instruction], Step]:
    def decode(decoder: Decoder, instruction: Instruction) -> Step:
        has_predicate = "|" in instruction.text
        result, *rest = instruction.operands
        predicate = str(rest.pop(0)) if has_predicate else "_"
        target = None if result == "_" else decoder.target(str(result), "u32", instruction)[1]
        value, by, clamp = (decoder.source(str(o), "u32", instruction)[1] for o in rest[:3])
        answer = None if predicate == "_" else decoder.target(predicate, "pred", instruction)[1]

        def step(m: Batch, s: Any) -> None:
            u, lanes = m.rows[UNSIGNED], m.lanes[s]
            lane = lanes % WARP
            # The clamp operand packs two fields: in bits 8..12 the lanes' segment, in bits 0..4 its end.
            packed = u[clamp][s].astype(np.int64)
            segment, end = packed >> 8 & 31, packed & 31
            wanted = _SOURCE_LANE[mode](lane, u[by][s].astype(np.int64) & 31)
            lowest, highest = lane & segment, (lane & segment) | (end & ~segment)
            if mode == "idx":
                wanted = lowest | (wanted & ~segment)
            inside = wanted >= highest if mode == "up" else wanted <= highest
            origin = np.where(inside, lanes - lane + wanted, lanes)
            here = np.zeros(m.count, bool)
            here[s] = True
            if not here[origin].all():
                raise Fault(
                    ConvergenceError,
                    lanes[~here[origin]],
                    f"asks lane {int(origin[~here[origin]][0]) % WARP} for its value, which takes no part",
                    "look at the mask, and at which lanes got here",
                )
            values = u[value][origin]
            if target is not None:
                u[target][s] = values
            if answer is not None:
                u[answer][s] = inside

        return step

    return decode


# --- votes ------------------------------------------------------------------------------------------------------------


def _bits_of(m: Batch, s: Any, holds: np.ndarray) -> np.ndarray:
    """For each lane, the bits of the lanes of its warp that take part and for which ``holds``."""
    lanes = m.lanes[s]
    weights = np.where(holds, 2.0 ** (lanes % WARP), 0.0)
    bits: np.ndarray = np.bincount(m.warp[s], weights, m.count // WARP)[m.warp[s]].astype(np.uint32)
    return bits


def _vote(mode: str) -> Decode:
    def decode(decoder: Decoder, instruction: Instruction) -> Step:
        result, operand, _ = instruction.operands
        target = decoder.target(result, "u32" if mode == "ballot" else "pred", instruction)[1]
        read = decoder.predicate(operand, instruction)

        def step(m: Batch, s: Any) -> None:
            holds = read(m, s)
            yes, no = _bits_of(m, s, holds), _bits_of(m, s, ~holds)
            answers = {"ballot": yes, "any": yes != 0, "all": no == 0, "uni": (yes == 0) | (no == 0)}
            m.rows[UNSIGNED][target][s] = answers[mode]

        return step

    return decode


def _equals(m: Batch, s: Any, values: np.ndarray) -> np.ndarray:
    """For each lane, the bits of the lanes of its warp with the same value."""
    found = np.zeros(len(values), np.uint32)
    _, group = np.unique(np.stack((m.warp[s].astype(np.uint64), values.astype(np.uint64))), axis=1, return_inverse=True)
    group = group.reshape(-1)
    bits = np.bincount(group, 2.0 ** (m.lanes[s] % WARP)).astype(np.uint32)
    found[:] = bits[group]
    return found


def _match(every: bool, bits: str) -> Decode:
    def decode(decoder: Decoder, instruction: Instruction) -> Step:
        result, *rest = instruction.operands
        answer = decoder.target(rest.pop(0), "pred", instruction)[1] if len(rest) > 2 else None
        target = None if result == "_" else decoder.target(result, "u32", instruction)[1]
        source = decoder.source(rest[0], f"u{bits}", instruction)[1]

        def step(m: Batch, s: Any) -> None:
            equal, there = _equals(m, s, m.rows[UNSIGNED][source][s]), _bits_of(m, s, np.ones(len(m.lanes[s]), bool))
            if answer is not None:
                m.rows[UNSIGNED][answer][s] = equal == there
            if target is not None:
                m.rows[UNSIGNED][target][s] = np.where(equal == there, equal, np.uint32(0)) if every else equal

        return step

    return decode


_REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
               "xor": np.bitwise_xor}  # fmt: skip


def _reduce(operation: str, kind: str) -> Decode:
    """``redux.sync``: one number of a warp, for all its lanes that take part."""

    def decode(decoder: Decoder, instruction: Instruction) -> Step:
        target = decoder.target(instruction.operands[0], kind, instruction)[1]
        bank, source, _ = decoder.source(instruction.operands[1], kind, instruction)

        def step(m: Batch, s: Any) -> None:
            warp, values = m.warp[s], m.rows[bank][source][s]
            starts = np.nonzero(np.r_[True, warp[1:] != warp[:-1]])[0]  # lanes are in order, so warps are
            results = _REDUCTIONS[operation].reduceat(values, starts)
            m.rows[bank][target][s] = np.repeat(results, np.diff(np.r_[starts, len(warp)]))

        return step

    return decode


def _active(decoder: Decoder, instruction: Instruction) -> Step:
    target = decoder.target(instruction.operands[0], "u32", instruction)[1]

    def step(m: Batch, s: Any) -> None:
        m.rows[UNSIGNED][target][s] = _bits_of(m, s, np.ones(len(m.lanes[s]), bool))

    return step


def _elect(decoder: Decoder, instruction: Instruction) -> Step:
    """``elect.sync``: the lowest lane that takes part."""
    result, answer, _ = instruction.operands
    target = None if result == "_" else decoder.target(result, "u32", instruction)[1]
    elected = decoder.target(answer, "pred", instruction)[1]

    def step(m: Batch, s: Any) -> None:
        there = _bits_of(m, s, np.ones(len(m.lanes[s]), bool)).astype(np.int64)
        lowest = np.log2(there & -there).astype(np.uint32)
        if target is not None:
            m.rows[UNSIGNED][target][s] = lowest
        m.rows[UNSIGNED][elected][s] = m.lanes[s] % WARP == lowest

    return step


# --- the table --------------------------------------------------------------------------------------------------------

COMPANY: dict[str, Company] = {"bar.warp.sync": Company(_warp_sync, named_lanes(0))}
for _opcode in ("bar.sync", "barrier.sync", "barrier.sync.aligned"):
    COMPANY[_opcode] = Company(_barrier, whole_block)
for _mode in _SOURCE_LANE:
    COMPANY[f"shfl.sync.{_mode}.b32"] = Company(_shuffle(_mode), named_lanes(-1))
for _mode in ("any", "all", "uni"):
    COMPANY[f"vote.sync.{_mode}.pred"] = Company(_vote(_mode), named_lanes(-1))
COMPANY["vote.sync.ballot.b32"] = Company(_vote("ballot"), named_lanes(-1))
for _bits in ("32", "64"):
    COMPANY[f"match.any.sync.b{_bits}"] = Company(_match(False, _bits), named_lanes(-1))
    COMPANY[f"match.all.sync.b{_bits}"] = Company(_match(True, _bits), named_lanes(-1))
for _operation in _REDUCTIONS:
    for _kind in ("u32", "s32") if _operation in ("add", "min", "max") else ("b32",):
        COMPANY[f"redux.sync.{_operation}.{_kind}"] = Company(
            _reduce(_operation, _kind.replace("b", "u")), named_lanes(-1)
        )
COMPANY["elect.sync"] = Company(_elect, named_lanes(-1))
COMPANY["activemask.b32"] = Company(_active, lambda decoder, instruction: lambda m, s: None)
