"""Which kernel serves which M on this machine: measured once, kept beside the compiled library.

On some processors vdpbf16ps does twice the work of an fp32 multiply-add, on others half of it, so no table written
here would be right everywhere. The first product therefore times the candidates on a small weight (a megabyte, so
that arithmetic shows and not the memory) at a few M; a call takes the winner of the largest M not above its own.
On one thread, so that a busy machine disturbs it little; half a second, once per library and processor.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from refq4.buildcache import cache_key, cached

from .kernels import TILES, ProductKernel, candidates

__all__ = ["MEASURED_M", "Winners", "calibrated"]

MEASURED_M = (1, 2, 4, 8, 16, 32)
N, K, BLOCKSIZE = 512, 4096, 64
REPEATS = 5

# "bfloat16 tiles16" -> {"1": kernel name, "2": ..., ...}
Winners = dict[str, dict[str, str]]
# (kernel, x, layout) -> one product on the calibration weight
Multiply = Callable[[ProductKernel, Tensor, str], object]


def calibrated(path: Path, tier: int, multiply: Multiply) -> Winners:
    """The winners from the file beside the library at ``path``, measured if there is none.

    Args:
        path: the compiled library.
        tier: its REFQ4_TIER.
        multiply: runs one kernel once, on a weight of [N, K] in the layout named.
    """

    def build(target: Path) -> None:
        target.write_text(json.dumps(_measure(tier, multiply), indent=1))

    name = f"{path.stem}-{cache_key(str((MEASURED_M, N, K, BLOCKSIZE, REPEATS)))[:8]}.calibration.json"
    winners: Winners = json.loads(cached(path.parent, name, build).read_text())
    return winners


def _measure(tier: int, multiply: Multiply) -> Winners:
    winners: Winners = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for layout in ("canonical", TILES):
            row = {}
            for m in MEASURED_M:
                able = candidates(tier, dtype, m, K, BLOCKSIZE, layout)
                if len(able) > 1:
                    x = torch.randn(m, K, generator=torch.Generator().manual_seed(m)).to(dtype)
                    row[str(m)] = _fastest(able, x, layout, multiply).name
            if row:
                winners[f"{str(dtype).removeprefix('torch.')} {layout}"] = row
    return winners


def _fastest(able: tuple[ProductKernel, ...], x: Tensor, layout: str, multiply: Multiply) -> ProductKernel:
    """Interleaved, so that a slow moment of the machine hits all alike; the shortest time, the one least disturbed."""
    times: dict[str, list[float]] = {kernel.name: [] for kernel in able}
    for _ in range(REPEATS + 1):
        for kernel in able:
            start = time.perf_counter()
            multiply(kernel, x, layout)
            times[kernel.name].append(time.perf_counter() - start)
    return min(able, key=lambda kernel: min(times[kernel.name]))
