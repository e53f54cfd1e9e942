"""Whether accesses to memory are in order: the check for races and for unwritten bytes, one for all memories.

    writer                  | stamp | stamp | ...    of each cell: clock << 31 | thread, or NEVER, or with PENDING
    low_reader, high_reader | stamp | stamp | ...    the lowest and the highest thread of the last instruction that read

A cell is the smallest access that the kernel makes to that memory. The clock ticks with every access and every barrier,
so "a barrier lies between" is a comparison of stamps. Two accesses to a cell, one of them a write, are in order

    if one thread makes both
    within a block      if the block has met at a barrier since the first one (one warp: or at __syncwarp)
    between blocks      if the first one's block has counted itself in since, by an atomic or a volatile store, and the
                        second one's with a later one. The thread that does it speaks for itself, and for what lies
                        before its block's last barrier

Atomics are in order with one another, in global memory volatile accesses as well; what only they have written there may
be read at any time. Of readers in several instructions between two barriers only the last are kept.

What cp.async copies is PENDING from its issue until the thread that issued it has waited for its group; then it counts
as written by that thread at that moment, and other threads still need a barrier.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import Fault, RaceError, UninitialisedError

__all__ = ["PENDING", "WARP", "Order", "Shadow"]

WARP = 32
THREAD_BITS = 31
THREAD = (1 << THREAD_BITS) - 1
PENDING = 1 << 62
NEVER = -1


class Order:
    """The clock of a launch, and who has met whom and when.

    Args:
        blocks: of the grid.
        padded: threads of a block, in whole warps: a thread's number is its block's times this, and its own.

    Attributes:
        lanes, first: of the batch that is running, and the number of its first thread.
        instruction: what is running; ``history`` has it for each tick of the clock.
    """

    def __init__(self, blocks: int, padded: int) -> None:
        self.padded, self.first, self.clock, self.instruction = padded, 0, 0, 0
        self.history = array("i", [0])
        self.barriers, self.atomics, self.released = (np.zeros(blocks, np.int64) for _ in range(3))
        self.counted_by = np.full(blocks, NEVER, np.int64)
        self.start(0, 0)

    def start(self, first: int, lanes: int) -> None:
        """A batch of so many lanes begins."""
        self.first, self.lanes = first, np.arange(lanes)
        self.block_met, self.warp_met = np.zeros(lanes, np.int64), np.zeros(lanes, np.int64)
        self.oldest = 0  # barrier of any lane: what is older is in order for all of them, within their blocks

    def tick(self) -> int:
        """The next stamp, without a thread."""
        self.clock += 1
        self.history.append(self.instruction)
        return self.clock << THREAD_BITS

    def barrier(self, s: Any) -> None:
        """All threads of the blocks in ``s`` have met."""
        now = self.tick()
        self.block_met[s] = self.warp_met[s] = self.barriers[self._block(s)] = now
        self.oldest = int(self.block_met.min())

    def warp_sync(self, s: Any) -> None:
        """All threads of the warps in ``s``, as far as they take part, have met."""
        self.warp_met[s] = self.tick()

    def acquire(self, s: Any) -> None:
        """These lanes see what other blocks have released."""
        self.atomics[self._block(s)] = self.tick()

    def count_in(self, s: Any) -> None:
        """These lanes release what lies before their blocks' last barriers, and what they have done themselves."""
        block = self._block(s)
        self.acquire(s)
        self.released[block], self.counted_by[block] = self.barriers[block], self.lanes[s] + self.first

    def _block(self, s: Any) -> np.ndarray:
        block: np.ndarray = (self.lanes[s] + self.first) // self.padded
        return block

    def counted(self, before: np.ndarray, theirs: np.ndarray, ours: np.ndarray) -> np.ndarray:
        """Whether atomics of both blocks stand between stamps of one and now."""
        spoken_for = (before < self.released[theirs]) | (before & THREAD == self.counted_by[theirs])
        both: np.ndarray = (self.atomics[theirs] > 0) & (self.atomics[theirs] < self.atomics[ours]) & spoken_for
        return both


class Shadow:
    """The last accesses to the cells of one buffer.

    Args:
        cells: how many; ``grain`` bytes each.
        name: what a message calls a byte of the buffer.
        of_grid: the launch's blocks share it, and found it written; else it is one block's or one thread's.
        readers: whether to remember who reads.
    """

    def __init__(
        self, order: Order, cells: int, grain: int, name: Callable[[int], str], of_grid: bool, readers: bool
    ) -> None:
        self.order, self.grain, self.name, self.of_grid = order, grain, name, of_grid
        self.writer = np.full(cells, NEVER, np.int64)
        self.readers = [self.writer.copy(), self.writer.copy()] if readers else []
        self.strong: np.ndarray | None = None  # cells that an atomic or volatile access wrote last; made with the first

    def read(self, cells: np.ndarray, lanes: np.ndarray, strong: bool) -> None:
        """Raise where what is read there is not written, or not in order; note a read that is not ``strong``."""
        writer = self.writer[cells]
        exempt = self.strong[cells] if self.of_grid and self.strong is not None else None
        if self._require_written(writer, cells, lanes) >= (0 if self.of_grid else self.order.oldest):
            self._require_order(writer, cells, lanes, "reads", "written", exempt)
        if self.readers and not strong:
            stamp = self.order.tick() | lanes + self.order.first
            low, high = self.readers
            high[cells], low[cells[::-1]] = stamp, stamp[::-1]

    def write(self, cells: np.ndarray, lanes: np.ndarray, does: str, strong: bool) -> None:
        """Raise where the write is not in order; note it."""
        writer = self.writer[cells]
        exempt = self.strong[cells] if strong and self.strong is not None else None
        if does == "updates":
            self._require_written(writer, cells, lanes)
        self._require_order(writer, cells, lanes, does, "written", exempt)
        for readers in () if strong and self.of_grid else self.readers:
            self._require_order(readers[cells], cells, lanes, does, "read", None)
        self.writer[cells] = self.order.tick() | lanes + self.order.first
        if strong and self.strong is None:
            self.strong = np.zeros(len(self.writer), bool)
        if self.strong is not None:
            self.strong[cells] = strong

    def _require_written(self, writer: np.ndarray, cells: np.ndarray, lanes: np.ndarray) -> int:
        """The newest of the stamps; raise where there must be one and is none, or one of a copy under way."""
        newest = int(writer.max() if self.of_grid else writer.view(np.uint64).max())  # here NEVER is the largest
        if self.of_grid or newest < PENDING:
            return newest
        wrong = writer == NEVER
        what = "nobody has written"
        look = "look for an array, a table or a tile that is filled only in part, or a wrong offset between two"
        if not wrong.any():
            wrong, what = writer >= PENDING, "cp.async is still filling"
            look = "look for a wait_group that leaves too many groups open, or a missing wait"
        name = self.name(int(cells[wrong][0]) * self.grain)
        raise Fault(UninitialisedError, lanes[wrong], f"reads {name}, which {what}", look)

    def _require_order(
        self, before: np.ndarray, cells: np.ndarray, lanes: np.ndarray, does: str, did: str, exempt: np.ndarray | None
    ) -> None:
        order = self.order
        doubtful_from = 0 if self.of_grid else order.oldest
        if int(before.max()) < doubtful_from:
            return
        mine = lanes + order.first
        doubtful = (before >= doubtful_from) & ((before & THREAD != mine) | (before >= PENDING))
        at = np.nonzero(doubtful if exempt is None else doubtful & ~exempt)[0]
        if not len(at):
            return
        before, mine = before[at], mine[at]
        other = before & THREAD
        theirs, ours, same_warp = other // order.padded, mine // order.padded, other // WARP == mine // WARP
        settled = before < np.where(same_warp, order.warp_met[lanes[at]], order.block_met[lanes[at]])
        if (theirs != ours).any():
            settled = np.where(theirs == ours, settled, order.counted(before, theirs, ours))
        if settled.all():
            return
        k = int(np.nonzero(~settled)[0][0])
        who, between = f"thread {int(other[k]) % order.padded}", "barrier"
        barrier = "__syncwarp()" if same_warp[k] else "__syncthreads()"
        look = (
            f"look for a missing {barrier} between the two, in a loop also at its end: they may be of different rounds"
        )
        if self.of_grid:
            look += "; or for two threads that own the same element, or a missing tail mask"
        if theirs[k] != ours[k]:
            who, between = f"{who} of block number {int(theirs[k])}", "atomic of both"
            look = (
                "blocks meet only by atomics, or by another launch: look for two blocks that own the same element, a "
                "missing tail mask, or the counter that says what is complete, and the __syncthreads() before it"
            )
        raise Fault(
            RaceError,
            lanes[at][~settled],
            f"{does} {self.name(int(cells[at[k]]) * self.grain)}, {did} by {who} with no {between} between: a race",
            look,
            order.history[int(before[k] & ~PENDING) >> THREAD_BITS],
        )
