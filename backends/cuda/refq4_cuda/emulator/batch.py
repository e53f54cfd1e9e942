"""Some blocks of a grid, run together: one lane per thread, one row per register.

    lane      0 ... 31 | 32 ... 63 | ... |             warps of the first block, then those of the second, ...
    thread    its number in the block                  a block of 48 threads has two warps, the second half empty

A selection of lanes is a slice where the lanes follow one another (all of them, as a rule), and an index array where
they do not: a slice costs numpy no copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .barriers import Meetings
from .errors import Fault, UninitialisedError
from .memory import GenericMemory, GlobalMemory, Memory, PrivateMemory, unsigned
from .order import WARP
from .program import Program
from .shared import Shared

if TYPE_CHECKING:
    from ..launch import Launch

__all__ = ["Batch"]


class Batch:
    """The state of some blocks of one launch.

    Attributes:
        rows: (unsigned, signed, floating) views of the rows, by slot; a predicate's row is bool in all three.
        existing, live: which lanes are threads at all, and which of them have not returned yet.
        block, warp: of each lane, counted in this batch.
    """

    def __init__(
        self,
        program: Program,
        launch: Launch,
        blocks: np.ndarray,
        memory: GlobalMemory,
        checks: bool,
    ) -> None:
        self.program, self.memory, self.checks = program, memory, checks
        self.grid, self.shape, self.blocks = launch.grid, launch.block, blocks
        in_block = int(np.prod(self.shape))
        self.padded = -(-in_block // WARP) * WARP
        self.count = count = len(blocks) * self.padded
        self.order = memory.order
        self.order.start(int(blocks[0]) * self.padded, count)
        self.lanes = self.order.lanes
        self.thread = self.lanes % self.padded
        self.block, self.warp = self.lanes // self.padded, self.lanes // WARP
        self.existing = self.thread < in_block
        self.live = self.existing.copy()
        self.meetings = Meetings(self)
        self.carry, self.ticks = np.zeros(count, bool), 0
        self.dynamic_shared, arguments = launch.shared, launch.arguments
        room = program.static_shared + launch.shared
        self.shared = Shared(self.order, len(blocks), room, program.grain["shared"], checks)
        threads = count if program.local else 0
        local = PrivateMemory(self.order, "local", threads, program.local, program.grain["local"], checks)
        given = PrivateMemory(self.order, "argument", 1, len(arguments), 1, False, arguments)
        self.spaces: dict[str, Memory] = {"global": memory, "shared": self.shared, "local": local, "param": given}
        self.spaces["generic"] = GenericMemory(self.order, dict(self.spaces))
        none: list[Any] = [None] * len(program.slots)
        self.rows: tuple[list[np.ndarray], ...] = (none, none.copy(), none.copy())
        self._make_rows()
        self.written = {slot: np.zeros(count, bool) for slot in program.watched}

    def tick(self) -> int:
        """A clock that grows with each read; it says nothing of time."""
        self.ticks += 1
        return self.ticks

    def require_written(self, slot: int, s: Any) -> None:
        """Raise if a lane is about to read a register that it has not written."""
        known = self.written[slot][s]
        if self.checks and not known.all():
            raise Fault(
                UninitialisedError,
                self.lanes[s][~known],
                f"reads register {self.program.watched[slot]}, which it has not written",
                "look for a variable that only one branch sets",
            )

    def where(self, lane: int) -> tuple[tuple[int, int, int], int]:
        """The block (x, y, z) and the thread of a lane."""
        number = int(self.blocks[lane // self.padded])
        x, y, _ = self.grid
        return (number % x, number // x % y, number // (x * y)), lane % self.padded

    def _make_rows(self) -> None:
        """Registers of one width lie in one array; constants are one element that numpy repeats."""
        for width, slots in self.program.owned.items():
            store = np.empty((len(slots), self.count), unsigned[width] if width else bool)
            for bank, view in zip(self.rows, _views(store, width), strict=True):
                for slot, row in zip(slots, view, strict=True):
                    bank[slot] = row
        for slot, one in self.program.constants.items():
            width = self.program.slots[slot]
            for bank, view in zip(self.rows, _views(one, width), strict=True):
                bank[slot] = np.ndarray(self.count, view.dtype, view, strides=(0,))
        for name, slot in self.program.specials.items():
            self.rows[0][slot][:] = self._special(name)

    def _special(self, name: str) -> Any:
        lane = self.lanes % WARP
        if name.startswith("%lanemask_"):
            below, own = (1 << lane.astype(np.uint64)) - 1, 1 << lane.astype(np.uint64)
            masks = {"eq": own, "lt": below, "le": below | own, "ge": ~below, "gt": ~(below | own)}
            return masks[name[-2:]] & np.uint64(0xFFFFFFFF)
        others = {"%laneid": lane, "%warpid": self.thread // WARP, "%nwarpid": self.padded // WARP,
                  "%dynamic_smem_size": self.dynamic_shared, "%total_smem_size": self.shared.size}  # fmt: skip
        if name in others:
            return others[name]
        what, axis = name[1:].split(".")
        index = "xyz".index(axis)
        if what in ("ntid", "nctaid"):
            return (self.shape if what == "ntid" else self.grid)[index]
        sizes = self.shape if what == "tid" else self.grid
        number = self.thread if what == "tid" else self.blocks[self.block]
        return number // int(np.prod(sizes[:index], dtype=np.int64)) % sizes[index]


def _views(row: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same bits as unsigned, signed and floating-point numbers."""
    if width == 0:
        return row, row, row
    return row, row.view(f"i{width}"), row.view(f"f{width}") if width > 1 else row
