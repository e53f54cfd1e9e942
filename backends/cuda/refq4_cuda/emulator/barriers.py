"""Barriers of a block: the usual one, and those with a number, with a count of threads, or with a question.

bar.sync 0               all threads of the block, at one instruction
bar.sync 1, 64           until 64 threads have come, whatever their instructions are
bar.arrive 1, 64         counted there, and goes on
bar.red.popc 0           the usual one, and how many threads' predicate holds
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import EmulatorError, Fault
from .semantics import Row, on_lanes

if TYPE_CHECKING:
    from .batch import Batch

__all__ = ["Meetings"]


def _complete(m: Batch, s: Any, readers: list[Any]) -> np.ndarray | None:
    """Which lanes' numbered barrier is complete; the others wait."""
    fresh = ~m.meetings.passes[s]
    if fresh.any():
        m.meetings.come(m.lanes[s][fresh], *(read(m, s)[fresh] for read in readers), waits=True)
    passes = m.meetings.passes[s]
    return None if passes.all() else passes.copy()


def _whole_block(m: Batch, s: Any, readers: list[Any]) -> np.ndarray | None:
    """All threads of the block."""
    block = m.block[s]
    if len(block) == m.count:
        return None
    there = np.bincount(block, minlength=len(m.blocks))
    complete = there == np.bincount(m.block[m.existing], minlength=len(m.blocks))
    return None if complete[block].all() else complete[block]


def _pass(m: Batch, s: Any, *rows: Row) -> None:
    """What lanes do when their numbered barrier is complete: forget it."""
    m.meetings.passes[s] = False


def _arrive(m: Batch, s: Any, number: Row, *count: Row) -> None:
    m.meetings.come(m.lanes[s], number, *count, waits=False)


def _ask(operation: str) -> Any:
    """A barrier of the whole block that counts, or joins, a predicate of all its threads."""

    def function(m: Batch, s: Any, number: Row, holds: Row) -> Row:
        if number.any():
            what = f"asks at barrier {int(number.max())}, and the emulator knows the question at barrier 0 only"
            raise Fault(EmulatorError, m.lanes[s], what, "look at the number of the barrier")
        m.order.barrier(s)
        block = m.block[s]
        yes = np.bincount(block, holds, len(m.blocks)).astype(np.uint32)[block]
        everyone = np.bincount(block, minlength=len(m.blocks))[block]
        return {"popc": yes, "and": yes == everyone, "or": yes > 0}[operation]

    return function


for _prefix, _suffix in (("bar", ""), ("barrier", ""), ("barrier", ".aligned"), ("barrier.cta", ""), ("bar.cta", "")):
    on_lanes(f"{_prefix}.sync{_suffix}.0", " = any", _whole_block)(lambda m, s, number: m.order.barrier(s))
    on_lanes(f"{_prefix}.sync{_suffix}", " = u32 u32?", _complete)(_pass)
    on_lanes(f"{_prefix}.arrive{_suffix}", " = u32 u32?", lambda *ignored: None)(_arrive)
    for _operation, _kind in (("popc", "u32"), ("and", "pred"), ("or", "pred")):
        on_lanes(f"{_prefix}.red.{_operation}{_suffix}.{_kind}", f"{_kind} = u32 pred", _whole_block)(_ask(_operation))


class Meetings:
    """Who has come to which numbered barrier of the blocks of a batch.

    Attributes:
        passes: the lanes whose barrier is complete and who may go on.
        changed: whether that is news for lanes that wait at other instructions.
    """

    def __init__(self, m: Batch) -> None:
        self.m = m
        self.passes = np.zeros(m.count, bool)
        self.changed = False
        self._there: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}  # (block, number) -> waiting, arrived

    def come(self, lanes: np.ndarray, numbers: Row, wanted: Row | None = None, *, waits: bool) -> None:
        """Lanes come to the barriers ``numbers``; ``wanted`` threads complete one (None: all of the block)."""
        block = self.m.block[lanes]
        for key in sorted(set(zip(block.tolist(), numbers.tolist(), strict=True))):
            here = (block == key[0]) & (numbers == key[1])
            none = np.zeros(self.m.count, bool)
            waiting, arrived = self._there.setdefault(key, (none, none.copy()))
            (waiting if waits else arrived)[lanes[here]] = True
            everyone = int((self.m.existing & (self.m.block == key[0])).sum())
            if int((waiting | arrived).sum()) >= (everyone if wanted is None else int(wanted[here][0])):
                released = np.nonzero(waiting)[0]
                self.passes[released] = self.changed = True
                if len(released):
                    self.m.order.barrier(released)
                del self._there[key]
