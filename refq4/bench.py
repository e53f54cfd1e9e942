"""python -m refq4.bench: how fast, next to what people use today, and how far from what the machine can do.

Peers are interleaved: each round calls each of them once, on the next of several layers whose weights together don't
fit the last-level cache, and the medians of many rounds are compared. So a slow moment of the machine hits all of
them, and no one is timed on a cached weight. The Python call is included; that is what users wait for.

    limits      main memory read, fp32 multiply-add, bf16 dot product: measured first, in the same process
    products    shape x M: milliseconds and how many times faster refq4 is than each peer
    ops         quantise, dequantise, rearrange; a call on a 64 x 64 layer

Not here: correctness, which is ``python -m refq4 verify``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from .backend import Backend, PackedWeight
from .bench_peers import PEERS, Peer, random_weights
from .codebooks import get_codebook
from .registry import check_usable

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYERS = 8

Run = Callable[[int], object]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    asked = _parser().parse_args(arguments)
    logging.disable(logging.WARNING)  # peers announce missing extras on import
    torch.set_num_threads(asked.threads)
    console = Console(stderr=asked.json == Path("-"))
    if not console.is_terminal:  # a file has no width: don't break the columns
        console = Console(stderr=asked.json == Path("-"), width=150)
    backend = check_usable(asked.backend)
    assert backend is not None
    report: dict[str, Any] = {"machine": machine(backend), "limits": limits(backend)}
    console.print(_describe(report))
    report["products"] = []
    for n, k in asked.shapes:
        report["products"] += products(backend, n, k, asked.m, DTYPES[asked.dtype], asked.rounds, asked.peers)
        console.print(product_table(report["products"], n, k, report["limits"]))
    if asked.ops:
        report["ops"] = ops(backend, asked.rounds)
        console.print(ops_table(report["ops"]))
    if asked.json is not None:
        text = json.dumps(report, indent=1)
        sys.stdout.write(text + "\n") if asked.json == Path("-") else asked.json.write_text(text)
    if asked.png is not None:
        from .bench_plot import roofline

        roofline(report, asked.png)
    return 0


# --- measuring ----------------------------------------------------------------------------------------------------


def interleaved(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Medians in seconds: each round calls each run once, after one unmeasured call each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(0)
    for i in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run(i)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def limits(backend: Backend) -> dict[str, float]:
    """The machine's limits where the backend can measure them, else nothing."""
    measure = getattr(backend, "limits", None)
    return dict(measure()) if measure is not None else {}


def machine(backend: Backend) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "backend": backend.name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{key: value for key, value in backend.info().items() if key in ("tier", "processor", "compiler", "pool")},
    }


def products(
    backend: Backend,
    n: int,
    k: int,
    tokens: Sequence[int],
    dtype: torch.dtype,
    rounds: int,
    peers: Sequence[str],
    layers: int = LAYERS,
) -> list[dict[str, Any]]:
    """One row per M: medians of every peer on [n, k] weights.

    Returns:
        Dicts with ``n k m dtype ms`` (peer to milliseconds) and ``missing`` (peer to the reason).
    """
    weights = random_weights(n, k, layers)
    made: dict[str, Callable[[Tensor, int], object]] = {}
    missing: dict[str, str] = {}
    for peer in PEERS:
        if peer.name in peers:
            _make(peer, backend, weights, dtype, made, missing)
    del weights
    rows = []
    with torch.inference_mode():
        for m in track(tokens, description=f"{n} x {k}", transient=True, console=Console(stderr=True)):
            x = torch.randn(m, k).to(dtype)
            runs: dict[str, Run] = {name: partial(_call, call, x, layers) for name, call in made.items()}
            medians = interleaved(runs, max(15, rounds // max(1, m // 32)))
            ms = {name: 1e3 * seconds for name, seconds in medians.items()}
            rows.append({"n": n, "k": k, "m": m, "dtype": str(dtype), "ms": ms, "missing": missing})
    return rows


def _make(
    peer: Peer, backend: Backend, weights: list[Tensor], dtype: torch.dtype,
    made: dict[str, Callable[[Tensor, int], object]], missing: dict[str, str],
) -> None:  # fmt: skip
    try:
        made[peer.name] = peer.make(backend, weights, dtype)
    except (ImportError, NotImplementedError, RuntimeError) as error:
        missing[peer.name] = f"{type(error).__name__}: {error}".splitlines()[0]


def ops(backend: Backend, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of the ops around the product, on 4096 x 4096: {op: {who: ms}}."""
    n = k = 4096
    code, A = get_codebook("nf4").on("cpu"), torch.randn(n, k)
    packed, absmax = backend.quantize_4bit(A, code, 64)
    weight = PackedWeight(packed, absmax, code.values, 64, (n, k), "nf4")
    out: dict[str, dict[str, float]] = {}
    rounds = max(15, rounds // 4)
    quantise: dict[str, Run] = {"refq4": lambda _: backend.quantize_4bit(A, code, 64)}
    try:
        import bitsandbytes.functional as bnb

        quantise["bitsandbytes"] = lambda _: bnb.quantize_4bit(A, quant_type="nf4")
    except ImportError:
        pass
    out["quantise fp32"] = interleaved(quantise, rounds)
    for dtype in (torch.bfloat16, torch.float32):
        # A fresh result costs page faults; a clone has the same, so it is the fair yardstick for the memory's speed.
        like = A.to(dtype)
        name = f"dequantise to {str(dtype).removeprefix('torch.')}"
        dequantise: dict[str, Run] = {
            "refq4": partial(_ignore, partial(backend.dequantize_4bit, weight, dtype)),
            "clone of it": partial(_ignore, like.clone),
        }
        out[name] = interleaved(dequantise, rounds)
    if backend.prepare_weight(weight) is not None:
        out["rearrange (prepare_weight)"] = interleaved({"refq4": lambda _: backend.prepare_weight(weight)}, rounds)
    small = products(backend, 64, 64, [1], torch.bfloat16, 400, ["refq4", "bitsandbytes packed"], layers=1)
    out["product 1 x 64 x 64"] = {name: ms / 1e3 for name, ms in small[0]["ms"].items()}
    return {op: {who: 1e3 * seconds for who, seconds in row.items()} for op, row in out.items()}


def _call(product: Callable[[Tensor, int], object], x: Tensor, layers: int, i: int) -> object:
    return product(x, i % layers)


def _ignore(run: Callable[[], object], _: int) -> object:
    return run()


# --- showing ------------------------------------------------------------------------------------------------------


def _describe(report: dict[str, Any]) -> str:
    about, limit = report["machine"], report["limits"]
    line = ", ".join(f"{key} {value}" for key, value in about.items())
    if limit:
        line += (
            f"\nlimits: memory read {limit['read_gb_s']:.1f} GB/s, fp32 FMA {limit['fma_gflop_s']:.0f} GFLOP/s, "
            f"bf16 dot {limit['dot_gflop_s']:.0f} GFLOP/s"
        )
    return line


def product_table(rows: list[dict[str, Any]], n: int, k: int, limit: dict[str, float]) -> Table:
    """The rows of one shape: refq4's figures, then how many times as long each peer takes."""
    table = Table(title=f"N x K = {n} x {k}")
    rows = [row for row in rows if (row["n"], row["k"]) == (n, k)]
    others = [name for name in rows[0]["ms"] if name != "refq4"]
    for heading in ("M", "refq4 ms", "GB/s", "GFLOP/s", "of limits", *(f"{name} ms (x)" for name in others)):
        table.add_column(heading, justify="right")
    for row in rows:
        ours = row["ms"]["refq4"]
        gb_s, gflop_s = weight_bytes(n, k) / ours / 1e6, 2e-6 * row["m"] * n * k / ours
        peers = [f"{row['ms'][name]:.3f} ({row['ms'][name] / ours:.2f})" for name in others]
        table.add_row(
            str(row["m"]), f"{ours:.3f}", f"{gb_s:.1f}", f"{gflop_s:.0f}", _share(gb_s, gflop_s, row, limit), *peers
        )
    for name, reason in rows[0]["missing"].items():
        table.caption = "\n".join(filter(None, [str(table.caption or ""), f"{name}: {reason}"]))
    return table


def weight_bytes(n: int, k: int, blocksize: int = 64) -> float:
    """What a product must read of the weight: packed codes and fp32 scales."""
    return n * k / 2 + 4 * n * k / blocksize


def _share(gb_s: float, gflop_s: float, row: dict[str, Any], limit: dict[str, float]) -> str:
    if not limit:
        return ""
    peak = max(limit["dot_gflop_s"] if "bfloat16" in row["dtype"] else 0, limit["fma_gflop_s"]) or float("inf")
    memory, arithmetic = gb_s / limit["read_gb_s"], gflop_s / peak
    return f"{memory:.0%} read" if memory > arithmetic else f"{arithmetic:.0%} peak"


def ops_table(rows: dict[str, dict[str, float]]) -> Table:
    """One line per op."""
    table = Table(title="ops on 4096 x 4096", caption="milliseconds; a clone shows what the memory allows")
    table.add_column("op")
    table.add_column("refq4", justify="right")
    table.add_column("others")
    for op, row in rows.items():
        others = [f"{who} {ms:.3f} ({ms / row['refq4']:.2f}x)" for who, ms in row.items() if who != "refq4"]
        table.add_row(op, f"{row['refq4']:.3f}", ", ".join(others))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m refq4.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=SHAPES, metavar="NxK")
    parser.add_argument("--m", nargs="+", type=int, default=TOKENS, help="tokens per call")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the activations")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=48, help="per peer at small M; never fewer than 15")
    parser.add_argument("--peers", nargs="+", default=[p.name for p in PEERS if p.usual], metavar="NAME")
    parser.add_argument("--ops", action="store_true", help="the other ops as well")
    parser.add_argument("--json", type=Path, help="write the figures here ('-' for standard output)")
    parser.add_argument("--png", type=Path, help="draw the roofline here (needs matplotlib)")
    parser.add_argument("--quick", dest="shapes", action="store_const", const=SHAPES[:1], help="the first shape only")
    return parser


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    return int(n), int(k)


if __name__ == "__main__":
    raise SystemExit(main())
