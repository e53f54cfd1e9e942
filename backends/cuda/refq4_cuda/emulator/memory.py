"""Global memory: the tensors of a launch, at the addresses that stand in the kernel's argument bytes.

                base                          base + nbytes
    ... nothing |  x                          | nothing ... | packed         | nothing ...
                ^ an address is inside one buffer, or it is an error

Each buffer keeps numpy views of its bytes, one per access size. A view starts at the aligned address at or below the
buffer, so that an aligned access is one element of it whatever the buffer's own alignment.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .errors import AccessError, Fault, RaceError

__all__ = ["GlobalMemory", "Region", "name_of", "unsigned"]

unsigned: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
NOBODY = -1


class Region(NamedTuple):
    """Memory that is no tensor of the launch by itself: a module's array, or what an argument's strides span."""

    base: int
    nbytes: int
    what: str
    element: int = 1  # bytes of one, for messages that count elements


def name_of(tensor: Tensor) -> str:
    """A tensor as messages name it: ``float32 [4, 64]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


class Buffer:
    """One region's bytes, and for each byte written in this launch, which thread did it and when."""

    def __init__(self, region: Region) -> None:
        self.base, self.nbytes, self.what, self.element = region
        self.start = self.base & ~15
        self._views: dict[tuple[int, int], np.ndarray] = {}
        self.writers: np.ndarray | None = None
        self.times = np.zeros(0, np.int64)

    def view(self, element: int, count: int) -> np.ndarray:
        """The memory as rows of ``count`` elements (or as elements, for one)."""
        found = self._views.get((element, count))
        if found is None:
            row = element * count
            rows = (self.base + self.nbytes - self.start) // row
            memory = (ctypes.c_uint8 * (rows * row)).from_address(self.start)
            flat = np.frombuffer(memoryview(memory), unsigned[element])
            found = self._views[element, count] = flat.reshape(-1, count) if count > 1 else flat
        return found

    def record(self, first: np.ndarray, size: int, threads: np.ndarray, clock: int) -> np.ndarray | None:
        """Note who writes ``size`` bytes from ``first`` on, and say where another thread does too (None: nowhere)."""
        if self.writers is None:
            self.writers, self.times = np.full(self.nbytes, NOBODY, np.int32), np.zeros(self.nbytes, np.int64)
        clash = None
        for byte in range(size):
            at = first + byte
            before = self.writers[at]
            self.writers[at] = threads
            self.times[at] = clock
            wrong = ((before != NOBODY) & (before != threads)) | (self.writers[at] != threads)
            clash = wrong if clash is None else clash | wrong
        return clash if clash is not None and clash.any() else None


class GlobalMemory:
    """All buffers of a launch, and what orders its blocks: their atomics.

        block 0    threads write; __syncthreads(); thread 0: atomic
        block 1                                                       thread 0: atomic; threads read

    What one block writes, another may read if the first has counted itself in with an atomic since, and the second has
    with a later one. The thread that does it for the first block speaks for itself and for what lies before the block's
    last barrier.

    Args:
        tensors: the buffers; ``regions`` are further ones.
        blocks, threads: of the grid, and of a block.

    Attributes:
        numbers: for each lane of the batch that is running, its thread's number in the grid.
    """

    def __init__(self, tensors: Sequence[Tensor], blocks: int, threads: int, regions: Sequence[Region] = ()) -> None:
        self.block_size = threads
        self.numbers = np.zeros(0, np.int32)
        self.clock = 0
        self.last_barrier = np.zeros(blocks, np.int64)
        self.last_atomic = np.zeros(blocks, np.int64)
        self.released = np.zeros(blocks, np.int64)  # the last barrier before the last atomic
        self.counted_by = np.full(blocks, NOBODY, np.int32)  # the thread that made it
        plain = [Region(t.data_ptr(), t.numel() * t.element_size(), name_of(t)) for t in tensors if t.numel()]
        seen = {region[:2]: region for region in [*plain, *regions]}
        self.buffers = [Buffer(seen[key]) for key in sorted(seen)]
        self.bases = [buffer.base for buffer in self.buffers]

    def start(self, lanes: int) -> None:
        """A batch of so many lanes begins."""

    def warp_sync(self, lanes: np.ndarray) -> None:
        """These lanes of a warp have met: here it orders nothing that is checked."""

    def read(
        self, address: np.ndarray, lanes: np.ndarray, element: int, count: int, strong: bool = False
    ) -> np.ndarray:
        """The values at ``address`` (uint64, one per lane): [lanes] for one element, [lanes, count] for a vector.

        A ``strong`` one (volatile, relaxed, acquire) sees what other blocks released before.
        """
        if strong:
            self.clock += 1
            self.last_atomic[self.numbers[lanes] // self.block_size] = self.clock
        buffer, offset = self._one(address, element * count)
        if buffer is not None:
            self._note_read(buffer, offset, lanes, element * count, strong)
            return buffer.view(element, count).take(offset // (element * count), axis=0)
        result = np.empty((len(address), count) if count > 1 else len(address), unsigned[element])
        for buffer, at, offset in self._each(address, lanes, element * count, "reads"):
            self._note_read(buffer, offset, lanes[at], element * count, strong)
            result[at] = buffer.view(element, count)[offset // (element * count)]
        return result

    def write(self, address: np.ndarray, lanes: np.ndarray, values: np.ndarray, strong: bool = False) -> None:
        """Store ``values`` [lanes] or [lanes, count]; a ``strong`` one (volatile, release) counts its block in."""
        element, count = values.itemsize, values.shape[1] if values.ndim > 1 else 1
        self.clock += 1
        for buffer, at, offset in self._each(address, lanes, element * count, "writes"):
            self._note_write(buffer, offset, lanes[at], element * count, strong, values[at])
            buffer.view(element, count)[offset // (element * count)] = values[at]
        if strong:
            self.count_in(lanes)

    def update(
        self, address: np.ndarray, lanes: np.ndarray, size: int, function: Callable[[np.ndarray, Any], np.ndarray]
    ) -> np.ndarray:
        """One atomic of each lane, no two at one address; what was there before.

        ``function`` makes the new values from the old ones and from which of the lanes they belong to.
        """
        found = np.empty(len(address), unsigned[size])
        for buffer, at, offset in self._each(address, lanes, size, "updates"):
            self._note_write(buffer, offset, lanes[at], size, True, None)
            view, cells = buffer.view(size, 1), offset // size
            found[at] = before = view[cells]
            view[cells] = function(before, at)
        self.count_in(lanes)
        return found

    def count_in(self, lanes: np.ndarray) -> None:
        """The blocks of these lanes release what lies before their last barrier."""
        self.clock += 1
        block = self.numbers[lanes] // self.block_size
        self.last_atomic[block], self.released[block] = self.clock, self.last_barrier[block]
        self.counted_by[block] = self.numbers[lanes]

    def barrier(self, lanes: np.ndarray) -> None:
        """All threads of the blocks of these lanes have met."""
        self.clock += 1
        self.last_barrier[self.numbers[lanes] // self.block_size] = self.clock

    def place(self, address: int) -> str | None:
        """An address inside a buffer as ``uint8 [128] + 20``, else None."""
        k = bisect_right(self.bases, address) - 1
        inside = k >= 0 and address - self.bases[k] < self.buffers[k].nbytes
        return f"{self.buffers[k].what} + {address - self.bases[k]}" if inside else None

    def _note_write(
        self, buffer: Buffer, offset: np.ndarray, lanes: np.ndarray, size: int, strong: bool, values: np.ndarray | None
    ) -> None:
        """Raise if another thread writes here, too. An atomic has no ``values``, and may."""
        if values is None:
            return
        first = offset - (buffer.base - buffer.start)
        clash = buffer.record(first, size, self.numbers[lanes], self.clock)
        if clash is not None:
            raise Fault(
                RaceError,
                lanes[clash],
                f"writes byte {int(first[clash][0])} of {buffer.what}, which another thread writes too: a race",
                "look for two blocks or lanes that own the same output, or a missing tail mask",
            )

    def _note_read(self, buffer: Buffer, offset: np.ndarray, lanes: np.ndarray, size: int, strong: bool) -> None:
        """Raise if another block wrote here and no atomics stand between."""
        if buffer.writers is None:
            return
        first = offset - (buffer.base - buffer.start)
        writer = buffer.writers[first]
        theirs, ours = writer // self.block_size, self.numbers[lanes] // self.block_size
        counted_in = self.last_atomic[theirs]
        spoken_for = (buffer.times[first] <= self.released[theirs]) | (writer == self.counted_by[theirs])
        ordered = (counted_in > 0) & (counted_in < self.last_atomic[ours]) & spoken_for
        wrong = (writer != NOBODY) & (theirs != ours) & ~ordered
        if wrong.any():
            raise Fault(
                RaceError,
                lanes[wrong],
                f"reads byte {int(first[wrong][0])} of {buffer.what}, which block number {int(theirs[wrong][0])} "
                "writes, with no atomic of both between that speaks for it: a race",
                "look at the counter that says whose sums are complete, and the __syncthreads() before it is raised",
            )

    def _one(self, address: np.ndarray, size: int) -> tuple[Buffer | None, np.ndarray]:
        """The usual case, quickly: all lanes in one buffer, in bounds, aligned. The offset is from the view's start."""
        k = bisect_right(self.bases, int(address[0])) - 1
        if k < 0:
            return None, address
        buffer = self.buffers[k]
        offset = address - np.uint64(buffer.start)
        shift = buffer.base - buffer.start
        inside = int(offset.max()) <= buffer.nbytes + shift - size and (shift == 0 or int(offset.min()) >= shift)
        if not inside or int(np.bitwise_or.reduce(offset)) & (size - 1):
            return None, address
        return buffer, offset.view(np.int64)

    def _each(
        self, address: np.ndarray, lanes: np.ndarray, size: int, does: str
    ) -> list[tuple[Buffer, Any, np.ndarray]]:
        """The lanes sorted by buffer, every check made."""
        buffer, offset = self._one(address, size)
        if buffer is not None:
            return [(buffer, slice(None), offset)]
        self.require_aligned(address, lanes, size, does)
        which = np.searchsorted(np.array(self.bases, np.uint64), address, "right") - 1
        found: list[tuple[Buffer, Any, np.ndarray]] = []
        for k in np.unique(which):
            at = np.nonzero(which == k)[0]
            outside = np.ones(len(at), bool)
            buffer = self.buffers[k] if k >= 0 else None  # below the first one, or there are none
            if buffer is not None and size <= buffer.nbytes:
                outside = address[at] - np.uint64(buffer.base) > np.uint64(buffer.nbytes - size)
            if buffer is None or outside.any():
                raise Fault(
                    AccessError,
                    lanes[at][outside],
                    f"{does} {size} bytes at {self._name(int(address[at][outside][0]))}, outside every buffer",
                    "look for a missing tail mask, a wrong row stride, or an index that wraps in 32 bits",
                )
            found.append((buffer, at, (address[at] - np.uint64(buffer.start)).view(np.int64)))
        return found

    def require_aligned(self, address: np.ndarray, lanes: np.ndarray, size: int, does: str = "reads") -> None:
        """Raise unless every address is a multiple of the access's size."""
        misaligned = address & np.uint64(size - 1) != 0
        if misaligned.any():
            at = int(address[misaligned][0])
            raise Fault(
                AccessError,
                lanes[misaligned],
                f"{does} {size} bytes at {self._name(at)}: address {at:#x} is not a multiple of {size}",
                "look for a vector access on a row whose start is not aligned, or a missing check at launch",
            )

    def _name(self, address: int) -> str:
        """An address in terms of the nearest buffer below (or the first one)."""
        if not self.buffers:
            return f"address {address:#x} (the launch has no buffers)"
        below = self.buffers[max(bisect_right(self.bases, address) - 1, 0)]
        gap = min(self.buffers, key=lambda b: min(abs(address - b.base), abs(address - b.base - b.nbytes)))
        near = below if below.base <= address < below.base + below.nbytes else gap
        element = f"element {(address - near.base) // near.element}, " if near.element > 1 else ""
        return f"{element}byte {address - near.base} of {near.what} ({near.nbytes} bytes)"
