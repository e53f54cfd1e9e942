"""Instructions that threads execute together: barriers, shuffles, tensor-core products.

    bar.sync                 all threads of the block
    bar.warp.sync, shfl      the lanes named in the mask
    mma                      all 32 lanes of the warp

``gather`` says which groups of lanes are complete: all participating lanes have arrived. The scheduler lets the others
wait at the instruction. A lane that waits to the end for lanes that never arrive is a divergence, and an error.

mma.m16n8k16: registers of lane 4 g + t (g = 0..7, t = 0..3), each with two 16-bit numbers, low half first.

                 k = 2t, 2t+1   2t+8, 2t+9                 n = g                            n = 2t, 2t+1
    A  row g   [     a0       |     a2     ]   B  k = 2t   [ b0 ]      C, D  row g        [   c0, c1   ]
       row g+8 [     a1       |     a3     ]      k = 2t+8 [ b1 ]            row g+8      [   c2, c3   ]

So one register of a warp, seen as 16-bit numbers, is an 8 x 8 block of A, or of B transposed: [lane, half] in memory
is [g, 2t + half]. m16n8k8 has the left half of A (a0, a1) and the upper half of B (b0).

Products of 16-bit numbers are exact; the sum with C is made in fp64 and rounded once to fp32. Hardware sums in an order
and with roundings that NVIDIA does not publish: results agree within the error budget, not in bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .batch import WARP
from .errors import ConvergenceError, Fault
from .floating import canonical, from_bfloat
from .parse import Instruction, Operand, Vector
from .program import FLOAT, UNSIGNED, Step

if TYPE_CHECKING:
    from .batch import Batch
    from .decode import Decoder

__all__ = ["COMPANY", "Company"]

Gather = Callable[["Batch", Any], np.ndarray | None]
_ALL = 0xFFFFFFFF
_LANE = np.arange(WARP)


class Company(NamedTuple):
    """One opcode: its step, and who must be there (a mask over the group, or None where nobody is missing)."""

    decode: Callable[[Decoder, Instruction], Step]
    gather: Callable[[Decoder, Instruction], Gather]


# --- who must be there ------------------------------------------------------------------------------------------------


def _whole_block(decoder: Decoder, instruction: Instruction) -> Gather:
    def gather(m: Batch, s: Any) -> np.ndarray | None:
        block = m.block[s]
        if len(block) == m.count:
            return None
        there = np.bincount(block, minlength=len(m.blocks))
        complete = there == np.bincount(m.block[m.existing], minlength=len(m.blocks))
        return None if complete[block].all() else complete[block]

    return gather


def _whole_warp(decoder: Decoder, instruction: Instruction) -> Gather:
    def gather(m: Batch, s: Any) -> np.ndarray | None:
        return None if _is_warps(s) else _named_are_there(m, s, np.uint64(_ALL))

    return gather


def _named_lanes(position: int) -> Callable[[Decoder, Instruction], Gather]:
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
            return None if _is_warps(s) else _named_are_there(m, s, mask.astype(np.uint64))

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
    if [str(o) for o in instruction.operands] != ["0"]:
        raise decoder.unknown(instruction, "a barrier other than __syncthreads()")

    def step(m: Batch, s: Any) -> None:
        m.shared.barrier(s)
        m.memory.barrier(m.lanes[s])

    return step


def _warp_sync(decoder: Decoder, instruction: Instruction) -> Step:
    if decoder.integer(str(instruction.operands[0])) & _ALL != _ALL:
        raise decoder.unknown(instruction, "__syncwarp() with a mask")
    return lambda m, s: m.shared.warp_sync(s)


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


# --- tensor cores -----------------------------------------------------------------------------------------------------


def _mma(k: int, bf16: bool) -> Callable[[Decoder, Instruction], Step]:
    def decode(decoder: Decoder, instruction: Instruction) -> Step:
        def slots(operand: Operand, kind: str) -> list[int]:
            parts = operand.parts if isinstance(operand, Vector) else ()
            return [decoder.source(part, kind, instruction)[1] for part in parts]

        d, a, b, c = instruction.operands
        to = [decoder.target(part, "f32", instruction)[1] for part in (d.parts if isinstance(d, Vector) else ())]
        a_slots, b_slots, c_slots = slots(a, "u32"), slots(b, "u32"), slots(c, "f32")
        if (len(to), len(a_slots), len(b_slots), len(c_slots)) != (4, k // 4, k // 8, 4):
            raise decoder.unknown(instruction, "with other numbers of registers")

        def block(m: Batch, s: Any, slot: int) -> np.ndarray:
            """One register of each warp as an 8 x 8 block of numbers, in fp64."""
            halves = np.ascontiguousarray(m.rows[UNSIGNED][slot][s]).view(np.uint16)
            numbers = from_bfloat(halves) if bf16 else halves.view(np.float16)
            return numbers.astype(np.float64).reshape(-1, 8, 8)

        def step(m: Batch, s: Any) -> None:
            left = [block(m, s, slot) for slot in a_slots]
            right = [block(m, s, slot) for slot in b_slots]
            upper = np.concatenate(left[0::2], axis=2)
            lower = np.concatenate(left[1::2], axis=2)
            columns = np.concatenate(right, axis=2)  # [warp, n, k]
            product = np.concatenate([upper, lower], axis=1) @ columns.transpose(0, 2, 1)  # [warp, 16, 8]
            f = m.rows[FLOAT]
            for i in range(4):
                rows = slice(0, 8) if i < 2 else slice(8, 16)
                part = product[:, rows, i % 2 :: 2].reshape(-1) + f[c_slots[i]][s]
                f[to[i]][s] = canonical(part.astype(np.float32))

        return step

    return decode


# --- the table --------------------------------------------------------------------------------------------------------

COMPANY: dict[str, Company] = {
    "bar.sync": Company(_barrier, _whole_block),
    "bar.warp.sync": Company(_warp_sync, _named_lanes(0)),
}
for _mode in _SOURCE_LANE:
    COMPANY[f"shfl.sync.{_mode}.b32"] = Company(_shuffle(_mode), _named_lanes(-1))
for _type in ("bf16", "f16"):
    for _k in (8, 16):
        _name = f"mma.sync.aligned.m16n8k{_k}.row.col.f32.{_type}.{_type}.f32"
        COMPANY[_name] = Company(_mma(_k, _type == "bf16"), _whole_warp)
