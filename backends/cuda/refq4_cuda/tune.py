"""Measuring on a GPU where decoding and cuBLAS overtake the fused kernel: what ``refq4 tune`` does.

For each shape, both ways are run at a few numbers of tokens, through weights that together are larger than the L2
cache, as a model's are. The cross-over is the last number of tokens up to which the fused kernel has not lost yet. It
is kept in the cache directory under the GPU's architecture and number of multiprocessors (``crossover.py``), and is
what plans go by from then on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refq4.backend import PackedWeight
from refq4.codebooks import get_codebook

from . import crossover, launch
from .geometry import plan

if TYPE_CHECKING:
    from .backend import PlannedBackend

__all__ = ["SHAPES", "TOKENS", "Clock", "tune"]

SHAPES = ((4096, 4096), (1024, 4096), (11008, 4096), (8192, 8192), (28672, 8192))
TOKENS = (16, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512)
_ROUNDS = 9

Clock = Callable[[Callable[[], object]], Callable[[], float]]  # makes ready to run it once and tell the seconds


def tune(
    backend: PlannedBackend,
    device: torch.device,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    clock: Clock | None = None,
    keeps: bool = True,
) -> Iterator[str]:
    """Measure, keep, and tell: a line for each shape, and where it was written.

    Args:
        shapes: of the weights, (N, K); K a multiple of 64.
        tokens: rising.
        clock: takes the time; on a GPU that of a CUDA graph's replay, by the device's own clock.
        keeps: not where it is a rehearsal: the emulator's time says nothing of a GPU's.
    """
    processor, rows = backend.processor(device), []
    clock = clock or (_replayed if device.type == "cuda" else _by_the_clock)
    for n, k in shapes:
        weights = _weights(backend, n, k, device)
        last, told = 0, []
        for m in tokens:
            fused, decoded = _both(backend, weights, m, clock)
            told.append(f"{m}: {1e6 * fused:.1f}/{1e6 * decoded:.1f}")
            if fused > decoded:
                break
            last = m
        else:  # it never lost: beyond what was measured, the model's figure is the better guess
            last = max([last, *crossover.modelled_turns(n, k, processor.arch)[:1]])
        if last == 0:  # it never won, which says nothing of fewer tokens than the fewest
            last = min([tokens[0] - 1, *crossover.modelled_turns(n, k, processor.arch)[:1]])
        rows.append((n, k, (last,)))
        yield f"{n} x {k}: fused up to {last} tokens (µs fused/decoded at {', '.join(told)})"
    if not keeps:
        yield "not kept: no GPU was measured"
        return
    path = crossover.keep(processor.arch, processor.multiprocessors, rows)
    plan.cache_clear()
    yield f"kept in {path}; processes that begin now go by it"


def _weights(backend: PlannedBackend, n: int, k: int, device: torch.device) -> list[PackedWeight]:
    """Random ones, as many as it takes to leave none of them in the L2 cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    code, made = get_codebook("nf4").on(device), []
    for _ in range(1 + 2 * cache // (n * k // 2)):
        packed, absmax = backend.quantize_4bit(torch.randn(n, k, device=device, dtype=torch.bfloat16), code, 64)
        made.append(PackedWeight(packed, absmax, code.values, 64, (n, k), "nf4"))
    return made


def _both(backend: PlannedBackend, weights: Sequence[PackedWeight], m: int, clock: Clock) -> tuple[float, float]:
    """Seconds of a product, fused and decoded: medians of rounds in which the two take turns."""
    n, k = weights[0].shape
    x = torch.randn(m, k, device=weights[0].packed.device, dtype=torch.bfloat16)
    y, processor = x.new_empty(m, n), backend.processor(x.device)

    def fused(weight: PackedWeight) -> None:
        made = launch.product_of(
            weight, x.dtype, m, True, processor.arch, processor.multiprocessors, "ring", processor.limits
        )
        assert made is not None  # a rung that is named serves any number of tokens
        processor.run([launch.filled(made, x, x.data_ptr(), None, y, processor.counters)])

    def decoded(weight: PackedWeight) -> Tensor:
        return backend.dequantize_and_multiply(x, weight, None, y)

    def all_of(way: Callable[[PackedWeight], object]) -> Callable[[], float]:
        return clock(lambda: [way(weight) for weight in weights])

    with torch.no_grad():
        runs = [all_of(way) for way in (fused, decoded)]
        rounds = [[run() / len(weights) for run in runs] for _ in range(1 + _ROUNDS)][1:]  # the first one compiles
    first, second = (median(taken) for taken in zip(*rounds, strict=True))
    return first, second


def _replayed(run: Callable[[], object]) -> Callable[[], float]:
    """Captured in a graph after one call outside it, so that launching from Python is not what is measured."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def once() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return once


def _by_the_clock(run: Callable[[], object]) -> Callable[[], float]:
    def once() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return once
