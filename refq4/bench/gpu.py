"""The bench on a GPU: products against what people use today, the other ops, all next to the speed of a copy.

Each figure is a median of passes through several weights, which together are larger than the L2 cache, so that every
weight comes from memory as it does in a model. Times are the device's own (CUDA events), taken in two ways:

    plain    launched from Python: what eager code waits for, the launches' overhead included where it shows
    graph    the same pass captured once in a CUDA graph and replayed: what the kernels themselves take

Peers take turns within a round, so a change of the clock rate hits all of them. What a copy reaches is measured in
the same process, before the rest. Not here: the CPU, which is ``measure``.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..backend import Backend, PackedWeight
from ..codebooks import get_codebook
from ..internals.verbatim import Console
from .measure import machine, make_named
from .peers import DEVICE_DTYPES, GPU_PEERS, Product, random_weights
from .show import gpu_ops_table, gpu_table

__all__ = ["TIMERS", "Timer", "layers_to_rotate", "measured", "ops", "products"]

# A timer takes one pass, prepares it, and returns what runs it once and tells the milliseconds.
Pass = Callable[[], object]
Timer = Callable[[Pass], Callable[[], float]]


def plain(run: Pass) -> Callable[[], float]:
    """The pass launched from Python, between two events."""

    def once() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    return once


def replayed(run: Pass) -> Callable[[], float]:
    """The pass captured in a graph; what is timed is its replay."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # once outside: kernels are compiled and loaded, torch's workspaces are there
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return plain(graph.replay)


TIMERS: Mapping[str, Timer] = {"plain": plain, "graph": replayed}


def measured(backend: Backend, asked: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The report of ``python -m refq4 bench --device cuda``; tables go to the console as they come.

    For a backend that computes on the CPU in place of a GPU it is a rehearsal: the same report, by the host's clock.
    """
    device = backend.devices[0]
    on_gpu = device == "cuda"
    limits = {"copy_gb_s": copy_bandwidth() if on_gpu else copy_bandwidth(1 << 20, 5, device, by_the_clock)}
    report: dict[str, Any] = {"machine": about(backend), "limits": limits, "products": []}
    console.print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    console.print(f"limit: a copy reads and writes {report['limits']['copy_gb_s']:.0f} GB/s together")
    cache = torch.cuda.get_device_properties(0).L2_cache_size if on_gpu else 0
    rounds, timers = (max(15, asked.rounds), TIMERS) if on_gpu else (1, {"plain": by_the_clock})
    for n, k in asked.shapes:
        layers = max(asked.layers, layers_to_rotate(n, k, cache))
        dtype = DEVICE_DTYPES[asked.dtype]
        report["products"] += products(
            backend, n, k, asked.m, dtype, rounds, asked.peers, layers, device=device, timers=timers
        )
        console.print(gpu_table(report["products"], n, k, report["limits"]))
    if asked.ops:
        report["ops"] = ops(backend, rounds, device=device, timers=timers)
        console.print(gpu_ops_table(report["ops"], report["limits"]))
    return report


def by_the_clock(run: Pass) -> Callable[[], float]:
    """The pass by the host's clock, where it is the host that computes."""

    def once() -> float:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    return once


def products(
    backend: Backend,
    n: int,
    k: int,
    tokens: Sequence[int],
    dtype: torch.dtype,
    rounds: int,
    peers: Sequence[str],
    layers: int,
    device: str = "cuda",
    timers: Mapping[str, Timer] = TIMERS,
) -> list[dict[str, Any]]:
    """One row per M: medians of every peer on ``layers`` weights [n, k].

    Returns:
        Dicts with ``n k m dtype layers``, ``ms`` (timer to peer to milliseconds of one call) and ``missing`` (peer to
        the reason).
    """
    made, missing = make_named(GPU_PEERS, peers, backend, random_weights(n, k, layers, device), dtype)
    rows = []
    with torch.inference_mode():
        for m in tqdm(tokens, desc=f"{n} x {k}", leave=False, disable=None):
            x = torch.randn(m, k, device=device).to(dtype)
            passes = {name: partial(_through, product, x, layers) for name, product in made.items()}
            ms = {
                timer: {name: per_pass / layers for name, per_pass in medians.items()}
                for timer, medians in in_turns(passes, rounds, timers).items()
            }
            about_it = {"n": n, "k": k, "m": m, "dtype": str(dtype), "layers": layers}
            rows.append({**about_it, "ms": ms, "missing": missing})
    return rows


def ops(
    backend: Backend,
    rounds: int,
    n: int = 8192,
    k: int = 8192,
    device: str = "cuda",
    timers: Mapping[str, Timer] = TIMERS,
) -> dict[str, dict[str, float]]:
    """{op: {"bytes" that must move, and milliseconds per timer}}, on a bf16 weight [n, k] larger than the L2."""
    A = torch.randn(n, k, device=device).bfloat16()
    code = get_codebook("nf4").on(A.device)
    packed, absmax = backend.quantize_4bit(A, code, 64)
    weight = PackedWeight(packed, absmax, code.values, 64, (n, k), "nf4")
    runs: dict[str, Pass] = {
        "quantise bf16": lambda: backend.quantize_4bit(A, code, 64),
        "dequantise to bf16": lambda: backend.dequantize_4bit(weight, torch.bfloat16),
        "copy bf16": A.clone,
    }
    small = packed.numel() + 4 * absmax.numel()
    moved = {"copy bf16": 4 * n * k}  # the others read one of the two forms and write the other
    medians = in_turns(runs, rounds, timers)
    return {
        op: {"bytes": moved.get(op, 2 * n * k + small), **{timer: row[op] for timer, row in medians.items()}}
        for op in runs
    }


def in_turns(passes: Mapping[str, Pass], rounds: int, timers: Mapping[str, Timer]) -> dict[str, dict[str, float]]:
    """{timer: {name: median milliseconds of a pass}}; each round takes every pass once, in every way."""
    with torch.no_grad():
        for run in passes.values():
            run()
        ready = {(timer, name): prepare(run) for timer, prepare in timers.items() for name, run in passes.items()}
        times: dict[tuple[str, str], list[float]] = {key: [] for key in ready}
        for _ in range(rounds):
            for key, once in ready.items():
                times[key].append(once())
    return {timer: {name: statistics.median(times[timer, name]) for name in passes} for timer in timers}


def copy_bandwidth(size: int = 1 << 30, rounds: int = 20, device: str = "cuda", timer: Timer = plain) -> float:
    """GB/s that a copy within the GPU's memory moves, read and written bytes together."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    once = timer(partial(torch.empty_like(source).copy_, source))
    once()
    return 2 * size / statistics.median(once() for _ in range(rounds)) / 1e6


def layers_to_rotate(n: int, k: int, cache: int) -> int:
    """So many that their packed codes are three times the L2 cache: none is left of a pass when the next comes."""
    return -(-3 * cache // (n * k // 2))


def about(backend: Backend) -> dict[str, Any]:
    """What the figures depend on."""
    try:
        peer = version("bitsandbytes")
    except PackageNotFoundError:
        peer = "not installed"
    told = {**machine(backend), "date": datetime.date.today().isoformat(), "bitsandbytes": peer}
    if "cuda" not in backend.devices:
        return {**told, "gpu": f"none: {backend.name} on the CPU"}
    gpu = torch.cuda.get_device_properties(0)
    return {
        **told,
        "gpu": gpu.name,
        "multiprocessors": gpu.multi_processor_count,
        "L2 MiB": gpu.L2_cache_size >> 20,
        "cuda": torch.version.cuda,
    }


def _through(product: Product, x: Tensor, layers: int) -> None:
    for i in range(layers):
        product(x, i)
