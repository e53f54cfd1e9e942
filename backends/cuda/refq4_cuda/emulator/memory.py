"""The memories of a launch: bytes at addresses. Every access is checked for bounds and alignment, then for its order.

    global       the tensors of a launch, at the addresses that stand in the kernel's argument bytes
                     base                          base + nbytes
         ... nothing |  x                          | nothing ... | packed         | nothing ...
                     ^ an address is inside one buffer, or it is an error
    shared       from 0 on, of each block; poisoned with 0xFF
    local        from 0 on, of each thread: arrays that are indexed at run time, spilled numbers, what calls pass
    argument     from 0 on, the launch's argument bytes

A buffer keeps numpy views of its bytes, one per access size. They start at the aligned address at or below it, so that
an aligned access is one element of a view whatever the buffer's own alignment. ``order.py`` has the check for races.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .errors import AccessError, Fault, RaceError
from .order import THREAD, Order, Shadow
from .program import selection

__all__ = ["LOCAL_WINDOW", "SHARED_WINDOW", "WINDOWS", "GenericMemory", "GlobalMemory", "Memory", "PrivateMemory",
           "Region", "name_of", "unsigned"]  # fmt: skip

SHARED_WINDOW, LOCAL_WINDOW = 1 << 61, 1 << 62  # where generic addresses begin: no tensor's is that large
WINDOWS = {"global": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW}
unsigned: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Region(NamedTuple):
    """Memory that a launch may touch: a tensor, a module's array, or what an argument's strides span."""

    base: int
    nbytes: int
    what: str
    element: int = 1  # bytes of one, for messages that count elements


def name_of(tensor: Tensor) -> str:
    """A tensor as messages name it: ``float32 [4, 64]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


class Buffer:
    """Bytes, seen as elements of any size, and their shadow, which is made when it is needed."""

    def __init__(self, memory: Memory, its_bytes: np.ndarray) -> None:
        self.memory, self.bytes = memory, its_bytes
        self.shadow: Shadow | None = None
        self._views: dict[tuple[int, int], np.ndarray] = {}

    def view(self, element: int, count: int) -> np.ndarray:
        """The memory as rows of ``count`` elements (or as elements, for one)."""
        found = self._views.get((element, count))
        if found is None:
            row = element * count
            flat = self.bytes[: len(self.bytes) // row * row].view(unsigned[element])
            found = self._views[element, count] = flat.reshape(-1, count) if count > 1 else flat
        return found


Part = tuple[Buffer, Any, np.ndarray]  # a buffer, which of the lanes access it, and where (offsets of its bytes)


class Memory:
    """What all memories have in common; where an address lies says the subclass.

    Args:
        order: of the launch.
        grain: the smallest access in bytes, which is a cell of a shadow.
        checks: whether there are shadows; ``readers``: whether they remember who reads.
    """

    of_grid = False

    def __init__(self, order: Order, grain: int, checks: bool, readers: bool = True) -> None:
        self.order, self.grain, self.checks, self.readers = order, grain, checks, readers

    def parts(self, address: np.ndarray, s: Any, size: int, does: str) -> list[Part]:
        """The lanes sorted by buffer, bounds and alignment checked; ``does`` is what a message says that they do."""
        raise NotImplementedError

    def name(self, buffer: Buffer, byte: int) -> str:
        """A byte of a buffer as messages name it."""
        raise NotImplementedError

    def read(self, address: np.ndarray, s: Any, element: int, count: int, strong: bool = False) -> np.ndarray:
        """The values at ``address`` (int64, one per lane of ``s``): [lanes] for one element, [lanes, count] for more.

        A ``strong`` one (volatile, relaxed, acquire) sees what other blocks released before.
        """
        size, result = element * count, np.empty(0)
        for buffer, at, offset in self.parts(address, s, size, "reads"):
            memory = buffer.memory
            if strong and memory.of_grid:
                self.order.acquire(self.order.lanes[s][at])
            if memory.checks and (memory.readers or buffer.shadow is not None):  # else nobody has written there
                cells, lanes = memory.cells(offset, self.order.lanes[s][at], size)
                memory.shadow(buffer).read(cells, lanes, strong and memory.of_grid)
            values: np.ndarray = buffer.view(element, count).take(offset // size, axis=0)
            if len(values) == len(address):
                return values
            if not result.size:
                result = np.empty((len(address), *values.shape[1:]), values.dtype)
            result[at] = values
        return result

    def write(self, address: np.ndarray, s: Any, values: np.ndarray, strong: bool = False) -> None:
        """Store ``values`` [lanes] or [lanes, count]; a ``strong`` one (volatile, release) counts its block in."""
        element, count = values.itemsize, values.shape[1] if values.ndim > 1 else 1
        size = element * count
        for buffer, at, offset in self.parts(address, s, size, "writes"):
            view, places, lanes = buffer.view(element, count), offset // size, self.order.lanes[s][at]
            memory, released = buffer.memory, strong and buffer.memory.of_grid
            view[places] = values[at]
            if memory.checks:
                memory.shadow(buffer).write(*memory.cells(offset, lanes, size), "writes", released)
                mine, last = lanes + self.order.first, memory.shadow(buffer).writer[offset // memory.grain] & THREAD
                if (last != mine).any():  # several lanes write to one place, in one instruction
                    lost = np.reshape(view[places] != values[at], (len(lanes), -1)).any(axis=1)
                    wrong = lost | (last // self.order.padded != mine // self.order.padded)
                    if wrong.any():
                        name = memory.name(buffer, int(offset[wrong][0]))
                        raise Fault(
                            RaceError,
                            lanes[wrong],
                            f"writes {name}, and another thread writes there too, in the same instruction: a race",
                            "look for two blocks or lanes that compute the same index, or a missing tail mask",
                        )
            if released:
                self.order.count_in(lanes)

    def update(self, address: np.ndarray, s: Any, size: int, function: Callable[..., Any], *rows: Any) -> np.ndarray:
        """One atomic of each lane, no two at one address; what was there before, of which and ``rows`` it makes new."""
        found = np.empty(len(address), unsigned[size])
        for buffer, at, offset in self.parts(address, s, size, "updates"):
            memory, lanes = buffer.memory, self.order.lanes[s][at]
            if memory.checks:
                memory.shadow(buffer).write(*memory.cells(offset, lanes, size), "updates", True)
            view, places = buffer.view(size, 1), offset // size
            found[at] = before = view[places]
            view[places] = function(before, *(row[at] for row in rows))
            if memory.of_grid:
                self.order.count_in(lanes)
        return found

    def shadow(self, buffer: Buffer) -> Shadow:
        """A buffer's shadow, made when it is asked for first."""
        if buffer.shadow is None:
            cells = len(buffer.bytes) // self.grain + 1
            name = lambda byte: self.name(buffer, byte)  # noqa: E731
            buffer.shadow = Shadow(self.order, cells, self.grain, name, self.of_grid, self.readers)
        return buffer.shadow

    def cells(self, offset: np.ndarray, lanes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The cells that accesses touch, flat, and the lane of each."""
        count = size // self.grain
        if count <= 1:
            return offset // self.grain, lanes
        return ((offset // self.grain)[:, None] + np.arange(count)).reshape(-1), np.repeat(lanes, count)


_LOOK = {
    "shared": "the size given at launch, and at the index",
    "local": "the index into an array of the thread's own",
    "argument": "the index into the struct",
}


class PrivateMemory(Memory):
    """Memory of its own for each block or thread, addressed from 0 on.

    Args:
        space: shared, local or argument.
        copies: how many there are; ``origin`` says for each lane where its own begins.
        size: of one, in bytes.
        initial: its bytes, if they are not poison.
    """

    def __init__(
        self, order: Order, space: str, copies: int, size: int, grain: int, checks: bool, initial: bytes = b""
    ) -> None:
        super().__init__(order, grain, checks)
        self.space, self.size, self.stride = space, size, -(-max(size, 1) // 16) * 16
        self.buffer = Buffer(self, np.full(copies * self.stride, 0xFF, np.uint8))
        self.buffer.bytes[: len(initial)] = np.frombuffer(initial, np.uint8)
        self.origin = np.repeat(np.arange(copies, dtype=np.int64) * self.stride, len(order.lanes) // max(copies, 1))

    def parts(self, address: np.ndarray, s: Any, size: int, does: str) -> list[Part]:
        wrong = None
        if int(np.bitwise_or.reduce(address)) & (size - 1):
            wrong, what = address & (size - 1) != 0, f"which is not a multiple of {size}"
            look = "a vector access to a row whose stride is not a multiple of the vector"
        elif int(address.view(np.uint64).max()) > self.size - size:
            wrong, what = (address < 0) | (address > self.size - size), f"outside its {self.size} bytes"
            look = _LOOK[self.space]
        if wrong is not None:
            where = f"{does} {size} {self.space} bytes at {int(address[wrong][0])}, {what}"
            raise Fault(AccessError, self.order.lanes[s][wrong], where, f"look at {look}")
        return [(self.buffer, slice(None), self.origin[s] + address)]

    def name(self, buffer: Buffer, byte: int) -> str:
        return f"{self.space} byte {byte % self.stride}"


class GlobalMemory(Memory):
    """All buffers of a launch."""

    of_grid = True

    def __init__(self, regions: Sequence[Region], order: Order, grain: int, checks: bool, readers: bool) -> None:
        super().__init__(order, grain, checks, readers)
        unique = {region[:2]: region for region in regions if region.nbytes}
        self.regions = [unique[key] for key in sorted(unique)]
        self.bases = [region.base for region in self.regions]
        self.starts = [base & ~15 for base in self.bases]
        self.buffers = [Buffer(self, _bytes(region)) for region in self.regions]

    def parts(self, address: np.ndarray, s: Any, size: int, does: str) -> list[Part]:
        if (k := bisect_right(self.bases, int(address[0])) - 1) >= 0:  # the usual case, quickly: all in one buffer
            region, start = self.regions[k], self.starts[k]
            inside = int((address - region.base).view(np.uint64).max()) <= region.nbytes - size
            if inside and not int(np.bitwise_or.reduce(address)) & (size - 1):
                return [(self.buffers[k], slice(None), address - start)]
        self.require_aligned(address, s, size, does)
        which = np.searchsorted(np.array(self.bases, np.int64), address, "right") - 1
        found: list[Part] = []
        for k in np.unique(which).tolist():
            at = np.nonzero(which == k)[0]
            last = self.bases[k] + self.regions[k].nbytes - size if k >= 0 else -(1 << 63)  # below the first, or none
            outside = address[at] > last
            if outside.any():
                raise Fault(
                    AccessError,
                    self.order.lanes[s][at][outside],
                    f"{does} {size} bytes at {self._named(int(address[at][outside][0]))}, outside every buffer",
                    "look for a missing tail mask, a wrong row stride, or an index that wraps in 32 bits",
                )
            found.append((self.buffers[k], at, address[at] - self.starts[k]))
        return found

    def require_aligned(self, address: np.ndarray, s: Any, size: int, does: str = "reads") -> None:
        """Raise unless every address is a multiple of the access's size."""
        misaligned = address & (size - 1) != 0
        if misaligned.any():
            at = int(address[misaligned][0])
            raise Fault(
                AccessError,
                self.order.lanes[s][misaligned],
                f"{does} {size} bytes at {self._named(at)}: address {at:#x} is not a multiple of {size}",
                "look for a vector access on a row whose start is not aligned, or a missing check at launch",
            )

    def place(self, address: int) -> str | None:
        """An address inside a buffer as ``uint8 [128] + 20``, else None."""
        k = bisect_right(self.bases, address) - 1
        inside = k >= 0 and address - self.bases[k] < self.regions[k].nbytes
        return f"{self.regions[k].what} + {address - self.bases[k]}" if inside else None

    def name(self, buffer: Buffer, byte: int) -> str:
        return self._named(self.starts[self.buffers.index(buffer)] + byte)

    def _named(self, address: int) -> str:
        """An address in terms of the buffer that it is in, or the nearest."""
        if not self.regions:
            return f"address {address:#x} (the launch has no buffers)"
        near = min(self.regions, key=lambda r: max(r.base - address, address - (r.base + r.nbytes - 1)))
        element = f"element {(address - near.base) // near.element}, " if near.element > 1 else ""
        return f"{element}byte {address - near.base} of {near.what} ({near.nbytes} bytes)"


class GenericMemory(Memory):
    """Addresses that say by their size which memory they mean."""

    def __init__(self, order: Order, memories: dict[str, Memory]) -> None:
        super().__init__(order, 1, False)
        self.memories = memories

    def parts(self, address: np.ndarray, s: Any, size: int, does: str) -> list[Part]:
        starts = np.searchsorted([SHARED_WINDOW, LOCAL_WINDOW], address, "right")
        found: list[Part] = []
        for k, (space, window) in enumerate(WINDOWS.items()):
            here = np.nonzero(starts == k)[0]
            if len(here):
                some = selection(self.order.lanes[s][here])
                parts = self.memories[space].parts(address[here] - window, some, size, does)
                found += [(buffer, here[at], offset) for buffer, at, offset in parts]
        return found


def _bytes(region: Region) -> np.ndarray:
    before = region.base & 15
    memory = (ctypes.c_uint8 * (before + region.nbytes)).from_address(region.base - before)
    return np.frombuffer(memoryview(memory), np.uint8)
