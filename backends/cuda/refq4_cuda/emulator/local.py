"""Local memory: what a thread has for itself beyond registers, in bytes, and which of them it has written.

thread 0   | depot ...   | param0 | ...        arrays that are indexed at run time, spilled numbers,
thread 1   | depot ...   | param0 | ...        and what calls pass; one row per lane
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import AccessError, Fault, UninitialisedError
from .memory import unsigned

__all__ = ["Local"]


class Local:
    """The local memory of the lanes of one batch."""

    def __init__(self, lanes: int, size: int, checks: bool) -> None:
        self.size, self.checks = size, checks
        self.stride = -(-max(size, 1) // 16) * 16
        self.bytes = np.full(lanes * self.stride, 0xFF, np.uint8)
        self.written = np.zeros(lanes * self.stride, bool)
        self.lane = np.arange(lanes, dtype=np.int64)

    def read(self, address: np.ndarray, s: Any, element: int, count: int) -> np.ndarray:
        """The values at ``address`` (int64, one per lane of ``s``): [lanes], or [lanes, count]."""
        at = self._cells(address, s, element * count, "reads")
        if self.checks:
            unwritten = ~self.written[at].all(axis=1)
            if unwritten.any():
                raise Fault(
                    UninitialisedError,
                    self.lane[s][unwritten],
                    f"reads local byte {int(address[unwritten][0])}, which it has not written",
                    "look for an array of the thread's own that is filled only in part",
                )
        values: np.ndarray = self.bytes[at].view(unsigned[element])
        return values if count > 1 else values.reshape(-1)

    def write(self, address: np.ndarray, s: Any, values: np.ndarray) -> None:
        """Store ``values`` [lanes] or [lanes, count]."""
        rows = np.ascontiguousarray(values).reshape(len(address), -1).view(np.uint8)
        at = self._cells(address, s, rows.shape[1], "writes")
        self.bytes[at], self.written[at] = rows, True

    def _cells(self, address: np.ndarray, s: Any, size: int, does: str) -> np.ndarray:
        wrong = (address < 0) | (address > self.size - size) | (address & (size - 1) != 0)
        if wrong.any():
            where = int(address[wrong][0])
            raise Fault(
                AccessError,
                self.lane[s][wrong],
                f"{does} {size} local bytes at {where}, outside its {self.size} bytes or not a multiple of {size}",
                "look at the index into an array of the thread's own",
            )
        cells: np.ndarray = (self.lane[s] * self.stride + address)[:, None] + np.arange(size)
        return cells
