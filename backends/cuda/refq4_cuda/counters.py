"""Counters of CTAs that have arrived, zero between launches: each CTA along K counts itself, the last one sets it back.

They must be zero before a launch, and to clear them would be a kernel of its own before each product. So a megabyte is
taken from the driver and cleared, once for a device, and who may use which counters at what time is settled here:

    a stream        keeps a region, since its launches run one after the other and leave zeros behind
    a CUDA graph    keeps what each launch in it was given: replays of one graph don't overlap, those of two may
    all given away, or more counters than a region has:  0, and the caller makes a tensor of zeros

The memory is none of torch's, so no graph's private pool can own it. It is never given back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Counters"]

REGION = 4096  # counters of a stream
REGIONS = 32
GRAPHS = 131072  # counters for launches in graphs
_PER_THREAD = 2  # the stream that is another one in each thread, under one handle


class Counters:
    """Of one device, whose context is current when this is made.

    Args:
        index: torch's number of it.
        ask: calls a driver function by name and gives its result, or raises.
        driver: the bindings; asked for captures in every call.
    """

    def __init__(self, index: int, ask: Callable[..., Any], driver: Any) -> None:
        size = 4 * (REGION * REGIONS + GRAPHS)
        self._start = int(ask("cuMemAlloc", size))
        ask("cuMemsetD8", self._start, 0, size)
        ask("cuStreamSynchronize", 0)  # other streams don't wait for the one that clears
        self._index, self._is_capturing = index, driver.cuStreamIsCapturing
        self._regions: dict[int, int] = {}
        self._in_graphs = 0
        self._lock = threading.Lock()

    def here(self, tiles: int) -> int:
        """The address of ``tiles`` counters for one launch on torch's current stream, or 0."""
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        status, mode = self._is_capturing(stream)
        if status or int(mode):
            return self._for_graph(tiles)
        if tiles > REGION or stream == _PER_THREAD:
            return 0
        try:
            return self._regions[stream]
        except KeyError:
            return self._new_region(stream)

    def _new_region(self, stream: int) -> int:
        with self._lock:
            if stream not in self._regions:
                taken = len(self._regions)
                self._regions[stream] = self._start + 4 * REGION * taken if taken < REGIONS else 0
            return self._regions[stream]

    def _for_graph(self, tiles: int) -> int:
        with self._lock:
            first = self._in_graphs
            if first + tiles > GRAPHS:
                return 0
            self._in_graphs += tiles
            return self._start + 4 * (REGION * REGIONS + first)
