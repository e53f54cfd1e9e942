"""Who has come to the numbered barriers of the blocks that run; ``barriers.py`` has the instructions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .batch import Batch

__all__ = ["Meetings"]


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

    def come(self, lanes: np.ndarray, numbers: np.ndarray, wanted: np.ndarray | None, waits: bool) -> None:
        """Lanes come to the barriers ``numbers``; ``wanted`` threads complete one (None: all of the block)."""
        block = self.m.block[lanes]
        for key in sorted(set(zip(block.tolist(), numbers.tolist(), strict=True))):
            here = (block == key[0]) & (numbers == key[1])
            none = np.zeros(self.m.count, bool)
            waiting, arrived = self._there.setdefault(key, (none, none.copy()))
            (waiting if waits else arrived)[lanes[here]] = True
            everyone = int((self.m.existing & (self.m.block == key[0])).sum())
            if int((waiting | arrived).sum()) >= (everyone if wanted is None else int(wanted[here][0])):
                self._complete(np.nonzero(waiting)[0])
                del self._there[key]

    def _complete(self, lanes: np.ndarray) -> None:
        self.passes[lanes] = self.changed = True
        if len(lanes):
            self.m.order.barrier(lanes)
