"""Barriers with a number, with a count of threads, or with a question: ``bar.sync 1, 64``, ``bar.arrive``, ``bar.red``.

    producers   ... write; bar.arrive 1, 64     they count, and go on
    consumers   bar.sync 1, 64; read ...        they wait until 64 threads have come, whatever their instructions are

``warp.py`` has the usual ``bar.sync 0``, which all threads of a block must reach at the same instruction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .parse import Instruction
from .program import UNSIGNED, Step
from .warp import COMPANY, Company, Gather, whole_block

if TYPE_CHECKING:
    from .batch import Batch
    from .decode import Decoder

__all__ = ["NUMBERED", "is_plain"]


def is_plain(instruction: Instruction) -> bool:
    """Whether a barrier is the block's usual one."""
    return [str(operand) for operand in instruction.operands] == ["0"]


def _operands(decoder: Decoder, instruction: Instruction) -> tuple[int, int | None]:
    number = decoder.source(instruction.operands[0], "u32", instruction)[1]
    more = instruction.operands[1:]
    return number, decoder.source(more[0], "u32", instruction)[1] if more else None


def numbered(decoder: Decoder, instruction: Instruction) -> Gather:
    """Which lanes' barrier is complete; the others wait."""
    number, wanted = _operands(decoder, instruction)

    def gather(m: Batch, s: Any) -> np.ndarray | None:
        lanes = m.lanes[s]
        fresh = ~m.meetings.passes[lanes]
        if fresh.any():
            u = m.rows[UNSIGNED]
            threads = None if wanted is None else u[wanted][s][fresh]
            m.meetings.come(lanes[fresh], u[number][s][fresh], threads, waits=True)
        passes = m.meetings.passes[lanes]
        return None if passes.all() else passes

    return gather


def passed(decoder: Decoder, instruction: Instruction) -> Step:
    """What lanes do when the barrier is complete: forget it."""

    def step(m: Batch, s: Any) -> None:
        m.meetings.passes[s] = False

    return step


def _arrive(decoder: Decoder, instruction: Instruction) -> Step:
    number, wanted = _operands(decoder, instruction)

    def step(m: Batch, s: Any) -> None:
        u = m.rows[UNSIGNED]
        m.meetings.come(m.lanes[s], u[number][s], None if wanted is None else u[wanted][s], waits=False)

    return step


def _ask(operation: str) -> Any:
    """``bar.red``: a barrier of the whole block that counts, or joins, a predicate of all its threads."""

    def decode(decoder: Decoder, instruction: Instruction) -> Step:
        target, number, operand = instruction.operands
        if number != "0":
            raise decoder.unknown(instruction, "a question at another barrier than the block's")
        slot = decoder.target(target, "u32" if operation == "popc" else "pred", instruction)[1]
        read = decoder.predicate(operand, instruction)

        def step(m: Batch, s: Any) -> None:
            m.order.barrier(s)
            block = m.block[s]
            yes = np.bincount(block, read(m, s), len(m.blocks)).astype(np.uint32)[block]
            all_of_them = np.bincount(block, minlength=len(m.blocks))[block]
            m.rows[UNSIGNED][slot][s] = {"popc": yes, "and": yes == all_of_them, "or": yes > 0}[operation]

        return step

    return decode


NUMBERED = Company(passed, numbered)
for _prefix, _suffix in (("bar", ""), ("barrier", ""), ("barrier", ".aligned"), ("barrier.cta", ""), ("bar.cta", "")):
    COMPANY[f"{_prefix}.arrive{_suffix}"] = Company(_arrive, lambda decoder, instruction: lambda m, s: None)
    COMPANY.setdefault(f"{_prefix}.sync{_suffix}", COMPANY["bar.sync"])
    for _operation, _kind in (("popc", "u32"), ("and", "pred"), ("or", "pred")):
        COMPANY[f"{_prefix}.red.{_operation}{_suffix}.{_kind}"] = Company(_ask(_operation), whole_block)
