"""Shared memory with a shadow: for each grain of it, who wrote it last, who has read it, and when.

    data      | 4 bytes | 4 bytes | ...           per block, poisoned with 0xFF
    writer    |  stamp  |  stamp  | ...           stamp = clock << 20 | lane;  -1 never written;  + PENDING cp.async
    readers   |  stamp, stamp     | ...           the lowest and the highest lane of the last instruction that read it

Two accesses to a grain, one of them a write, are in order if the same thread makes both, or if a barrier of the block
lies between them, or a barrier of the warp (``__syncwarp``) where both threads are of one warp. The clock ticks with
every access and every barrier, so "a barrier lies between" is a comparison of numbers. A grain is the smallest access
that the kernel makes. Of readers in several instructions between two barriers only the last are kept.

What cp.async copies is PENDING from its issue until the thread that issued it has waited for its group; then it counts
as written by that thread at that moment, and other threads still need a barrier.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import AccessError, Fault, RaceError, UninitialisedError
from .memory import unsigned

__all__ = ["Shared"]

LANE_BITS = 20
LANE = (1 << LANE_BITS) - 1
PENDING = 1 << 62
NEVER = -1


@dataclass
class Copy:
    """One cp.async of some lanes, under way."""

    lanes: np.ndarray
    group: np.ndarray
    cell: np.ndarray  # [lanes] index in elements of ``data``
    grains: np.ndarray  # [lanes * grains each]
    data: np.ndarray  # [lanes, bytes]


class Shared:
    """The shared memory of the blocks of one batch.

    Args:
        blocks: how many; ``lanes`` per block, padded to whole warps.
        size: bytes per block.
        grain: bytes that one shadow entry stands for.
        checks: keep the shadow.
    """

    def __init__(self, blocks: int, lanes: int, size: int, grain: int, checks: bool) -> None:
        self.size = size
        self.stride = -(-max(size, 1) // 16) * 16
        self.bytes = np.full(blocks * self.stride, 0xFF, np.uint8)
        self.views = {(n, 1): self.bytes.view(kind) for n, kind in unsigned.items()}
        self.views |= {(n, c): self.views[n, 1].reshape(-1, c) for n in (1, 2, 4, 8) for c in (2, 4) if n * c <= 16}
        self.origin = np.repeat(np.arange(blocks, dtype=np.int64) * self.stride, lanes)
        self.checks, self.grain = checks, grain
        self.clock, self.instruction = 0, 0  # the scheduler keeps the instruction that is running
        self.history = array("i", [0])  # at each tick of the clock, the instruction
        self.atomic: np.ndarray | None = None  # per grain: whether an atomic wrote it last; made with the first one
        self.lane = np.arange(blocks * lanes, dtype=np.int64)
        if checks:
            grains = len(self.bytes) // grain
            self.writer = np.full(grains, NEVER, np.int64)
            self.low_reader = np.full(grains, NEVER, np.int64)
            self.high_reader = np.full(grains, NEVER, np.int64)
        self.block_barrier = np.zeros(blocks * lanes, np.int64)  # per lane: the stamp of its last barrier
        self.warp_barrier = np.zeros(blocks * lanes, np.int64)
        self.oldest_barrier = 0  # of all lanes: what is older than this is in order for everybody
        self.copies: list[Copy] = []
        self.commits = np.zeros(blocks * lanes, np.int64)

    def read(self, address: np.ndarray, s: Any, element: int, count: int) -> np.ndarray:
        """The values at ``address`` (int64, one per lane of the selection ``s``)."""
        at = self._cells(address, s, element * count, "reads")
        if self.checks:
            grains, lanes = self._grains(at, s, element * count)
            self._check_read(grains, lanes)
        values: np.ndarray = self.views[element, count].take(at // (element * count), axis=0)
        return values

    def write(self, address: np.ndarray, s: Any, values: np.ndarray) -> None:
        """Store ``values`` [lanes] or [lanes, count]."""
        element, count = values.itemsize, values.shape[1] if values.ndim > 1 else 1
        size = element * count
        at = self._cells(address, s, size, "writes")
        view = self.views[element, count]
        view[at // size] = values
        if self.checks:
            grains, lanes = self._grains(at, s, size)
            stamp = self._check_write(grains, lanes)
            twice = self.writer[grains] != stamp
            if twice.any():
                lost = np.asarray(view[at // size] != values).reshape(len(at), -1).any(axis=1)
                if lost.any():
                    raise Fault(
                        RaceError,
                        self.lane[s][lost],
                        f"writes shared byte {int(address[lost][0])}, and another thread writes another value there "
                        "in the same instruction: a race",
                        "look for two lanes that compute the same index",
                    )

    def update(self, address: np.ndarray, s: Any, size: int, function: Callable[[np.ndarray, Any], np.ndarray]) -> Any:
        """One atomic of each lane, no two at one address; what was there before. Atomics are in order with atomics."""
        at = self._cells(address, s, size, "updates")
        if self.checks:
            if self.atomic is None:
                self.atomic = np.zeros(len(self.writer), bool)
            grains, lanes = self._grains(at, s, size)
            plain = ~self.atomic[grains]
            if plain.any():
                self._check_writer(grains[plain], lanes[plain])
            for readers in (self.low_reader, self.high_reader):
                self._refuse(readers[grains], grains, lanes, "updates", "read")
            self._tick()
            self.writer[grains], self.atomic[grains] = self.clock << LANE_BITS | lanes, True
        view = self.views[size, 1]
        before = view[at // size]
        view[at // size] = function(before, slice(None))
        return before

    # --- cp.async ---------------------------------------------------------------------------------------------------

    def copy(self, address: np.ndarray, s: Any, data: np.ndarray) -> None:
        """cp.async is issued: ``data`` [lanes, bytes] will be there once its group has been waited for."""
        size = data.shape[1]
        at = self._cells(address, s, size, "copies (cp.async) to")
        grains, lanes = self._grains(at, s, size) if self.checks else (at, at)
        if self.checks:
            self._check_write(grains, lanes)
            self.writer[grains] |= PENDING
        cells = at[:, None] + np.arange(size)
        self.bytes[cells] = 0xFF
        self.copies.append(Copy(self.lane[s], self.commits[s].copy(), at, grains.reshape(len(at), -1), data))

    def commit(self, s: Any) -> None:
        """The copies issued since the last commit become a group."""
        self.commits[s] += 1

    def wait(self, s: Any, newest: int | None) -> None:
        """Wait for all groups but the ``newest`` ones, or (None) for every copy, committed or not."""
        waiting = np.zeros(len(self.commits), bool)
        waiting[s] = True
        self._tick()
        left = []
        for copy in self.copies:
            done = waiting[copy.lanes]
            if newest is not None:
                done &= copy.group < self.commits[copy.lanes] - newest
            if done.any():
                size = copy.data.shape[1]
                self.bytes[copy.cell[done][:, None] + np.arange(size)] = copy.data[done]
                if self.checks:
                    self.writer[copy.grains[done]] = (self.clock << LANE_BITS | copy.lanes[done])[:, None]
            if not done.all():
                rest = ~done
                left.append(Copy(*(part[rest] for part in vars(copy).values())))
        self.copies = left

    # --- barriers ---------------------------------------------------------------------------------------------------

    def barrier(self, s: Any) -> None:
        """Every thread of the blocks in ``s`` has arrived."""
        self._tick()
        self.block_barrier[s] = self.warp_barrier[s] = self.clock << LANE_BITS
        self.oldest_barrier = int(self.block_barrier.min())

    def warp_sync(self, s: Any) -> None:
        """Every thread of the warps in ``s`` has arrived."""
        self._tick()
        self.warp_barrier[s] = self.clock << LANE_BITS

    # --- checks -----------------------------------------------------------------------------------------------------

    def _cells(self, address: np.ndarray, s: Any, size: int, does: str) -> np.ndarray:
        """Addresses as indices into ``bytes``, in bounds and aligned."""
        wrong = None
        if int(np.bitwise_or.reduce(address)) & (size - 1):
            wrong, what = address & (size - 1) != 0, f"which is not a multiple of {size}"
            look = "look for a vector access to a row whose stride is not a multiple of the vector"
        elif int(address.min()) < 0 or int(address.max()) > self.size - size:
            wrong, what = (address < 0) | (address > self.size - size), f"outside its {self.size} bytes"
            look = "look at the size given at launch, and at the index"
        if wrong is not None:
            where = int(address[wrong][0])
            raise Fault(AccessError, self.lane[s][wrong], f"{does} {size} shared bytes at {where}, {what}", look)
        cells: np.ndarray = self.origin[s] + address
        return cells

    def _grains(self, at: np.ndarray, s: Any, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The shadow entries that the accesses touch, flat, and the lane of each."""
        lanes: np.ndarray = self.lane[s]
        count = size // self.grain
        if count == 1:
            return at // self.grain, lanes
        return ((at // self.grain)[:, None] + np.arange(count)).reshape(-1), np.repeat(lanes, count)

    def _check_read(self, grains: np.ndarray, lanes: np.ndarray) -> None:
        self._check_writer(grains, lanes)
        self._tick()
        stamp = self.clock << LANE_BITS | lanes
        self.high_reader[grains] = stamp
        self.low_reader[grains[::-1]] = stamp[::-1]

    def _check_writer(self, grains: np.ndarray, lanes: np.ndarray) -> None:
        """Raise if what is read there was never written, is still on its way, or was written without a barrier."""
        writer = self.writer[grains]
        if int(writer.min()) == NEVER:
            at = writer == NEVER
            raise Fault(
                UninitialisedError,
                lanes[at],
                f"reads shared byte {self._byte(grains[at])}, which nobody has written",
                "look for a table or a tile that is filled only in part, or a wrong offset between the two",
            )
        newest = int(writer.max())
        if newest >= PENDING:
            at = writer >= PENDING
            raise Fault(
                UninitialisedError,
                lanes[at],
                f"reads shared byte {self._byte(grains[at])}, which cp.async is still filling",
                "look for a wait_group that leaves too many groups open, or a missing wait",
            )
        if newest >= self.oldest_barrier:
            self._refuse(writer, grains, lanes, "reads", "written")

    def _check_write(self, grains: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """Raise on a race; note the write and return its stamps."""
        for shadow, verb in ((self.writer, "written"), (self.low_reader, "read"), (self.high_reader, "read")):
            before = shadow[grains]
            if int(before.max()) >= self.oldest_barrier:
                self._refuse(before, grains, lanes, "writes", verb)
        self._tick()
        stamp = self.clock << LANE_BITS | lanes
        self.writer[grains] = stamp
        if self.atomic is not None:
            self.atomic[grains] = False
        return stamp

    def _refuse(self, before: np.ndarray, grains: np.ndarray, lanes: np.ndarray, does: str, verb: str) -> None:
        """Raise if an earlier access is not in order with this one."""
        other = before & LANE
        same_warp = other >> 5 == lanes >> 5
        settled = np.where(same_warp, self.warp_barrier[lanes], self.block_barrier[lanes])
        wrong = (before >= settled) & (other != lanes) | (before >= PENDING)
        if wrong.any():
            byte = self._byte(grains[wrong])
            barrier = "__syncwarp()" if same_warp[wrong][0] else "__syncthreads()"
            thread = int(other[wrong][0]) % (len(self.lane) * self.stride // len(self.bytes))
            raise Fault(
                RaceError,
                lanes[wrong],
                f"{does} shared byte {byte}, {verb} by thread {thread} with no barrier between: a race",
                f"look for a missing {barrier} between the two, in a loop also at its end: they may be of different "
                "rounds",
                self.history[int(before[wrong][0] & ~PENDING) >> LANE_BITS],
            )

    def _tick(self) -> None:
        self.clock += 1
        self.history.append(self.instruction)

    def _byte(self, grains: np.ndarray) -> int:
        return int(grains[0]) * self.grain % self.stride
