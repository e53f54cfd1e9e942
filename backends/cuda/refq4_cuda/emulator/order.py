"""Global memory with a shadow: what ``run_ptx`` checks of kernels of which nothing is known.

The project's own kernels never write what they read, and ``memory.py`` checks just that, fast. Here each cell (the
smallest access that the kernel makes) remembers its last writer and the last instruction's readers, as shared memory
does:

    writer    | thread, time, atomic? |        thread: its number in the grid; time: the clock of the accesses
    readers   | lowest, highest, time |        of the last instruction that read the cell

Two accesses, one of them a write, are in order if one thread makes both; if both threads are of one block and it has
met at a barrier since (one warp: or at __syncwarp); or if the first one's block has counted itself in by an atomic or a
volatile store, behind a barrier, and the second one's by a later one (``memory.py``). Atomics and volatile accesses are
in order with one another, and what only they have written may be read at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .errors import Fault, RaceError
from .memory import NOBODY, Buffer, GlobalMemory, Region

__all__ = ["OrderedMemory"]

WARP = 32


class Shadow:
    """The last accesses to one buffer, by cell."""

    def __init__(self, buffer: Buffer, grain: int) -> None:
        cells = (buffer.base + buffer.nbytes - buffer.start) // grain + 1
        self.writer = np.full(cells, NOBODY, np.int64)
        self.low_reader, self.high_reader = self.writer.copy(), self.writer.copy()
        self.written, self.read = np.zeros(cells, np.int64), np.zeros(cells, np.int64)
        self.strong = np.zeros(cells, bool)


class OrderedMemory(GlobalMemory):
    """``GlobalMemory`` that checks the order of all accesses.

    Args:
        tensors, blocks, threads, regions: as for ``GlobalMemory``.
        grain: the smallest access to global memory, in bytes.
    """

    def __init__(
        self, tensors: Sequence[Tensor], blocks: int, threads: int, regions: Sequence[Region] = (), grain: int = 1
    ) -> None:
        super().__init__(tensors, blocks, threads, regions)
        self.grain = grain
        self.shadows = {buffer.base: Shadow(buffer, grain) for buffer in self.buffers}
        self.barriers = self.warp_syncs = np.zeros(0, np.int64)

    def start(self, lanes: int) -> None:
        self.barriers, self.warp_syncs = np.zeros(lanes, np.int64), np.zeros(lanes, np.int64)

    def barrier(self, lanes: np.ndarray) -> None:
        super().barrier(lanes)
        self.barriers[lanes] = self.warp_syncs[lanes] = self.clock

    def warp_sync(self, lanes: np.ndarray) -> None:
        self.clock += 1
        self.warp_syncs[lanes] = self.clock

    def _note_read(self, buffer: Buffer, offset: np.ndarray, lanes: np.ndarray, size: int, strong: bool) -> None:
        shadow, (cells, who) = self.shadows[buffer.base], self._cells(offset, lanes, size)
        plain = ~shadow.strong[cells]
        self._require_order(shadow.writer, shadow.written, cells, who, plain, buffer, ("reads", "writes"))
        if not strong:
            self.clock += 1
            shadow.read[cells], threads = self.clock, self.numbers[who]
            shadow.high_reader[cells], shadow.low_reader[cells[::-1]] = threads, threads[::-1]

    def _cells(self, offset: np.ndarray, lanes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        count = max(size // self.grain, 1)
        return ((offset // self.grain)[:, None] + np.arange(count)).reshape(-1), np.repeat(lanes, count)

    def _note_write(
        self, buffer: Buffer, offset: np.ndarray, lanes: np.ndarray, size: int, strong: bool, values: np.ndarray | None
    ) -> None:
        shadow, (cells, who) = self.shadows[buffer.base], self._cells(offset, lanes, size)
        verbs = ("writes", "writes")
        considered = ~shadow.strong[cells] if strong else np.ones(len(cells), bool)
        self._require_order(shadow.writer, shadow.written, cells, who, considered, buffer, verbs)
        if not strong:
            for readers in (shadow.low_reader, shadow.high_reader):
                self._require_order(readers, shadow.read, cells, who, considered, buffer, ("writes", "reads"))
        self.clock += 1
        threads = self.numbers[who]
        shadow.writer[cells], shadow.written[cells], shadow.strong[cells] = threads, self.clock, strong
        if values is not None and (clash := shadow.writer[cells] != threads).any():
            self._refuse_twice(shadow, buffer, offset, lanes, values, clash.reshape(len(offset), -1).any(axis=1))

    def _refuse_twice(
        self, shadow: Shadow, buffer: Buffer, offset: np.ndarray, lanes: np.ndarray, values: np.ndarray, clash: Any
    ) -> None:
        """Several lanes write one place in one instruction: well only if of one block, and the same value."""
        order = np.lexsort((np.arange(len(offset)), offset))
        rows = np.ascontiguousarray(values).reshape(len(values), -1)
        same_place = offset[order][1:] == offset[order][:-1]
        block = self.numbers[lanes] // self.block_size
        differs = (rows[order][1:] != rows[order][:-1]).any(axis=1) | (block[order][1:] != block[order][:-1])
        wrong = np.zeros(len(offset), bool)
        wrong[order[1:][same_place & differs]] = True
        if wrong.any():
            self._race(buffer, offset, lanes, wrong, "writes", "another thread writes it, too, in the same instruction")

    def _require_order(
        self, before: np.ndarray, times: np.ndarray, cells: np.ndarray, lanes: np.ndarray, considered: np.ndarray,
        buffer: Buffer, verbs: tuple[str, str],
    ) -> None:  # fmt: skip
        other, when = before[cells], times[cells]
        mine = self.numbers[lanes]
        doubtful = considered & (other != NOBODY) & (other != mine)
        if not doubtful.any():
            return
        theirs, ours = other // self.block_size, mine // self.block_size
        same_warp = other % self.block_size // WARP == mine % self.block_size // WARP
        met = when < np.where(same_warp, self.warp_syncs[lanes], self.barriers[lanes])
        counted_in = self.last_atomic[theirs]
        spoken_for = (when <= self.released[theirs]) | (other == self.counted_by[theirs])
        counted = (counted_in > 0) & (counted_in < self.last_atomic[ours]) & spoken_for
        wrong = doubtful & ~np.where(theirs == ours, met, counted)
        if wrong.any():
            first = int(np.nonzero(wrong)[0][0])
            there = f"thread {int(other[first]) % self.block_size} of block number {int(theirs[first])}"
            between = "__syncwarp() or __syncthreads()" if same_warp[first] else "__syncthreads()"
            if theirs[first] != ours[first]:
                between = "order: blocks meet only by atomics, or by another launch"
            self._race(
                buffer, cells * self.grain, lanes, wrong, verbs[0], f"{there} {verbs[1]} it, too, with no {between}"
            )

    def _race(
        self, buffer: Buffer, offset: np.ndarray, lanes: np.ndarray, wrong: np.ndarray, does: str, too: str
    ) -> None:
        place = self._name(buffer.start + int(offset[wrong][0]))
        raise Fault(
            RaceError,
            lanes[wrong],
            f"{does} {place}; {too}: a race",
            "look for two threads that own the same element, a missing tail mask, or a missing barrier between the two",
        )
