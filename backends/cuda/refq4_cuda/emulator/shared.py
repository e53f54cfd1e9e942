"""Shared memory: a block's own, and cp.async, whose copies arrive when the thread that issued them has waited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .memory import PrivateMemory
from .order import PENDING, Order

__all__ = ["Shared"]


@dataclass
class Copy:
    """One cp.async of some lanes, under way."""

    lanes: np.ndarray
    group: np.ndarray
    places: np.ndarray  # [lanes, bytes] in the memory
    cells: np.ndarray  # [lanes, cells each] of the shadow
    data: np.ndarray  # [lanes, bytes]


class Shared(PrivateMemory):
    """The shared memory of the blocks of one batch."""

    def __init__(self, order: Order, blocks: int, size: int, grain: int, checks: bool) -> None:
        super().__init__(order, "shared", blocks, size, grain, checks)
        self.copies: list[Copy] = []
        self.commits = np.zeros(len(order.lanes), np.int64)

    def copy(self, address: np.ndarray, s: Any, data: np.ndarray) -> None:
        """cp.async is issued: ``data`` [lanes, bytes] will be there once its group has been waited for."""
        ((buffer, _, at),) = self.parts(address, s, data.shape[1], "copies (cp.async) to")
        lanes, places = self.order.lanes[s], at[:, None] + np.arange(data.shape[1])
        cells, who = self.cells(at, lanes, data.shape[1])
        if self.checks:
            shadow = self.shadow(buffer)
            shadow.write(cells, who, "writes", False)
            shadow.writer[cells] |= PENDING
        buffer.bytes[places] = 0xFF
        self.copies.append(Copy(lanes, self.commits[s].copy(), places, cells.reshape(len(at), -1), data))

    def commit(self, s: Any) -> None:
        """The copies issued since the last commit become a group."""
        self.commits[s] += 1

    def wait(self, s: Any, newest: int | None) -> None:
        """Wait for all groups but the ``newest`` ones, or (None) for every copy, committed or not."""
        waiting = np.zeros(len(self.commits), bool)
        waiting[s] = True
        now, left = self.order.tick(), []
        for copy in self.copies:
            done = waiting[copy.lanes]
            if newest is not None:
                done &= copy.group < self.commits[copy.lanes] - newest
            self.buffer.bytes[copy.places[done]] = copy.data[done]
            if self.checks:
                self.shadow(self.buffer).writer[copy.cells[done]] = (now | copy.lanes[done] + self.order.first)[:, None]
            if not done.all():
                left.append(Copy(*(part[~done] for part in vars(copy).values())))
        self.copies = left
