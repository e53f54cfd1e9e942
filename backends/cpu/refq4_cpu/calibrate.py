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
from typing import Protocol

import torch
from torch import Tensor

from refq4.backend import PackedWeight, PreparedWeight
from refq4.internals.buildcache import CacheError, cache_directory, cache_key, cached

from . import build
from .kernels import TILES, ProductKernel, candidates

__all__ = ["LARGEST_M", "MEASURED_M", "Winners", "calibrated", "winner"]

MEASURED_M = (1, 2, 4, 8, 16, 32, 64, 256)
LARGEST_M = MEASURED_M[-1]  # its winner serves all M above
N, K, BLOCKSIZE = 512, 4096, 64
REPEATS = 5

# "bfloat16 tiles16" -> {"1": kernel name, "2": ..., ...}
Winners = dict[str, dict[str, str]]
# layout -> the calibration weight in it
Weights = dict[str, PackedWeight | PreparedWeight]
Prepare = Callable[[PackedWeight], PreparedWeight | None]


class Product(Protocol):
    """One product with a named kernel: the backend's own way to run it."""

    def __call__(
        self, x: Tensor, weight: PackedWeight | PreparedWeight, bias: None, kernel: ProductKernel, threads: int
    ) -> object: ...


def winner(winners: Winners, dtype: torch.dtype, m: int, layout: str) -> str | None:
    """The name of the kernel that was fastest for such a product, or None if there was no choice to measure."""
    measured = max(tokens for tokens in MEASURED_M if tokens <= max(m, 1))
    return winners.get(_row(dtype, layout), {}).get(str(measured))


def calibrated(library: build.Library, prepare: Prepare, product: Product) -> Winners:
    """The winners from the file beside the library, measured if there is none; kept where the directory lets us."""

    def measured() -> Winners:
        canonical = _weight()
        tiles = prepare(canonical)
        weights: Weights = {"canonical": canonical, TILES: canonical if tiles is None else tiles}
        return _measure(library.tier.features, weights, product)

    def build_it(target: Path) -> None:
        target.write_text(json.dumps(measured(), indent=1))

    tier = f"refq4_cpu-{library.tier.name}"
    name = f"{tier}-{library.key}-{cache_key(str((MEASURED_M, N, K, BLOCKSIZE, REPEATS)))[:8]}.calibration.json"
    try:
        winners: Winners = json.loads(cached(cache_directory("cpu"), name, build_it).read_text())
    except CacheError:  # the compiled library came with the machine, and this user can't write beside it
        return measured()
    return winners


def _row(dtype: torch.dtype, layout: str) -> str:
    return f"{str(dtype).removeprefix('torch.')} {layout}"


def _weight() -> PackedWeight:
    random = torch.Generator().manual_seed(4)
    packed = torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8, generator=random)
    absmax = torch.rand(N * K // BLOCKSIZE, generator=random) + 0.5
    return PackedWeight(packed, absmax, torch.linspace(-1, 1, 16), BLOCKSIZE, (N, K), "calibration")


def _measure(features: tuple[str, ...], weights: Weights, product: Product) -> Winners:
    winners: Winners = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for layout in ("canonical", TILES):
            row = {}
            for m in MEASURED_M:
                able = candidates(features, dtype, m, K, BLOCKSIZE, layout)
                if len(able) > 1:
                    x = torch.randn(m, K, generator=torch.Generator().manual_seed(m)).to(dtype)
                    row[str(m)] = _fastest(able, x, weights[layout], product).name
            if row:
                winners[_row(dtype, layout)] = row
    return winners


def _fastest(
    able: tuple[ProductKernel, ...], x: Tensor, weight: PackedWeight | PreparedWeight, product: Product
) -> ProductKernel:
    """Interleaved, so that a slow moment of the machine hits all alike; the shortest time, the one least disturbed."""
    times: dict[str, list[float]] = {kernel.name: [] for kernel in able}
    for _ in range(REPEATS + 1):
        for kernel in able:
            start = time.perf_counter()
            product(x, weight, None, kernel, threads=1)
            times[kernel.name].append(time.perf_counter() - start)
    return min(able, key=lambda kernel: min(times[kernel.name]))
