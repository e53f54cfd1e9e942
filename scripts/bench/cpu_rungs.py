"""Time each rung of the CPU kernels on this machine: the product alone, without the layer around it.

python scripts/bench/cpu_rungs.py                                                under a minute on two cores; printed
python scripts/bench/cpu_rungs.py --json docs/benchmarks/rungs/cpu-avx2.json     and kept, for docs/cpu-kernels.md
python scripts/bench/cpu_rungs.py --training                                     many tokens: forward, gradient, torch
python scripts/bench/cpu_rungs.py --model                                        how much of reading is hidden

NF4 in blocks of 64, bf16 activations, weights [4096, 4096] in rotation, all kernels interleaved, medians. Scalar ops
are timed beside those of this machine's tier. What ``python -m refq4 bench`` measures is whole layers, and the peers.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from refq4_cpu import CpuBackend
from refq4_cpu.kernels import KERNEL_VARIABLE, PRODUCT_KERNELS, ProductKernel, tile_bytes
from torch import Tensor

from refq4.backend import Call, PackedWeight
from refq4.bench.measure import interleaved, limits, machine
from refq4.bench.peers import random_weights
from refq4.codebooks import get_codebook

BLOCKSIZE = 64
TOKENS = (1, 4, 16, 128)
TOKENS_OF_A_TILE = 8  # of gemm_4bit_4_avx512_bf16
SCALAR_GEMV_TO = 16  # a token takes it 20 ms
MODEL_TOKENS = (1, 8, 16, 32, 128, 512)
TRAINING = [
    (n, k, m) for n, k in ((1024, 1024), (2816, 1024), (1024, 2816), (2048, 2048), (5632, 2048)) for m in (128, 512)
]
IN_CACHE = (768, 1024)  # 0.4 MB of packed bytes and scales: they stay in the L2 cache of one core


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures here")
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("N", "K"))
    parser.add_argument("--layers", type=int, default=8, help="weights in rotation (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    parser.add_argument(
        "--training", action="store_true", help="the products of a training step, as shares of the peak"
    )
    parser.add_argument("--model", action="store_true", help="a product beside its arithmetic, look-ups and reading")
    asked = parser.parse_args()
    if asked.training:
        print(shares_of_the_peak(asked.rounds))
        return
    report = (model if asked.model else measured)(*asked.shape, asked.layers, asked.rounds)
    if asked.model:
        print("\n".join(model_table(report)))
    text = json.dumps(report, indent=1) + "\n"
    print(text, end="")
    if asked.json is not None:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(text)


def measured(n: int, k: int, layers: int, rounds: int) -> dict[str, Any]:
    """Milliseconds by kernel and M, by op and tier, and how fast one core decodes what is in its cache."""
    backend = CpuBackend()
    weights = random_weights(n, k, layers)
    packed = [packed_weight(backend, weight) for weight in weights]
    engines = {kernel: engine for kernel in PRODUCT_KERNELS if (engine := engine_of(kernel, n, k)) is not None}
    ms: dict[str, dict[str, float]] = {kernel.name: {} for kernel in engines}
    for m in TOKENS:
        x = torch.randn(m, k).bfloat16()
        runs = {
            kernel.name: product(kernel, engine, packed, x)
            for kernel, engine in engines.items()
            if m <= most_tokens(kernel)
        }
        for name, seconds in interleaved(runs, rounds, layers, layers if m < 16 else 1).items():
            ms[name][str(m)] = 1e3 * seconds
    return {
        "machine": machine(backend),
        "limits": limits(backend),
        "shape": [n, k],
        "ms": ms,
        "ops": ops(backend, weights[0].float(), packed[0], rounds),
        "in_cache_weights_s": in_cache(engines),
    }


def engine_of(kernel: ProductKernel, n: int, k: int) -> CpuBackend | None:
    """A backend that has been told to use this kernel and remembers it; None where this machine lacks it."""
    with patch.dict(os.environ, {KERNEL_VARIABLE: kernel.name}):
        engine = CpuBackend()
        call = Call("gemm_4bit", "cpu", torch.bfloat16, 1, n, k, BLOCKSIZE, "nf4")
        if engine.can_run(call) is not None:
            return None
        few = packed_weight(engine, torch.randn(16, k))
        for m in (tokens for tokens in TOKENS if tokens <= most_tokens(kernel)):
            product(kernel, engine, [few], torch.randn(m, k).bfloat16())(0)
    return engine


def most_tokens(kernel: ProductKernel) -> int:
    """What a kernel takes, or what can be waited for."""
    return SCALAR_GEMV_TO if kernel.name == "gemv_4bit_1_scalar" else kernel.most_tokens or TOKENS[-1]


def product(
    kernel: ProductKernel, engine: CpuBackend, packed: list[PackedWeight], x: Tensor
) -> Callable[[int], Tensor]:
    """The product with the weight of a number, in the layout that the kernel is for."""
    weights = [(engine.prepare_weight(weight) if kernel.reads_tiles else None) or weight for weight in packed]
    return lambda layer: engine.gemm_4bit(x, weights[layer], None)


def ops(backend: CpuBackend, A: Tensor, weight: PackedWeight, rounds: int) -> dict[str, dict[str, float]]:
    """Quantising and dequantising by the plain loops and by this machine's tier."""
    with patch.dict(os.environ, {"REFQ4_CPU_TIER": "c"}):
        scalar = CpuBackend()
        scalar.library()  # the tier is read where the library is loaded
    code, out = get_codebook("nf4").on("cpu"), torch.empty(weight.shape, dtype=torch.bfloat16)
    engines = {"c": scalar, str(backend.info()["tier"]): backend}
    runs: dict[str, dict[str, Callable[[int], object]]] = {
        "quantise fp32": {t: lambda _, e=e: e.quantize_4bit(A, code, BLOCKSIZE) for t, e in engines.items()},
        "dequantise to bfloat16, into memory at hand": {
            t: lambda _, e=e: e.dequantize_into(weight, out) for t, e in engines.items()
        },
    }
    return {op: {t: 1e3 * s for t, s in interleaved(of, rounds).items()} for op, of in runs.items()}


def in_cache(engines: dict[ProductKernel, CpuBackend]) -> dict[str, float]:
    """Weights a second of one core, one token, by each kernel that reads tiles."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        n, k = IN_CACHE
        packed = [packed_weight(CpuBackend(), torch.randn(n, k))]
        x = torch.randn(1, k).bfloat16()
        runs = {kn.name: product(kn, engine, packed, x) for kn, engine in engines.items() if kn.reads_tiles}
        return {name: n * k / seconds for name, seconds in interleaved(runs, 2000).items()}
    finally:
        torch.set_num_threads(threads)


def model(n: int, k: int, layers: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of products of tiles, and what their parts would take alone (look-ups: those of AVX-512 BF16)."""
    backend = CpuBackend()
    packed = [packed_weight(backend, weight) for weight in random_weights(n, k, layers)]
    tiles = [backend.prepare_weight(weight) or weight for weight in packed]
    found, rows = limits(backend), []
    peak = found["dot_gflop_s"] or found["fma_gflop_s"]
    layout = getattr(tiles[0], "layout", "canonical")
    for m in MODEL_TOKENS:
        x = torch.randn(m, k).bfloat16()
        kernel = backend.kernel(Call("gemm_4bit", "cpu", torch.bfloat16, m, n, k, BLOCKSIZE, "nf4", layout=layout))
        run: dict[str, Callable[[int], object]] = {"tiles": lambda i, x=x: backend.gemm_4bit(x, tiles[i], None)}
        seconds = interleaved(run, rounds, layers, layers if m < 32 else 1)["tiles"]
        served = m if "blocked" in kernel else min(m, TOKENS_OF_A_TILE)  # by one look-up
        arithmetic = 2e-6 * m * n * k / peak
        parts = {
            "multiplying": arithmetic,
            "decoding": arithmetic / served,
            "reading": 1e-6 * tile_bytes(n, k, BLOCKSIZE) / found["read_gb_s"],
        }
        rows.append({"m": m, "kernel": kernel, **parts, "ms": 1e3 * seconds})
    return {"machine": machine(backend), "limits": found, "shape": [n, k], "rows": rows}


def model_table(report: dict[str, Any]) -> list[str]:
    """Rows in Markdown: the parts, the longest of them and their sum, what was measured, and its share of the best."""
    lines = []
    for row in report["rows"]:
        parts = [row[part] for part in ("multiplying", "decoding", "reading")]
        shown = " | ".join(f"{ms:.2g}" if ms < 10 else f"{ms:.1f}" for ms in (*parts, max(parts), sum(parts)))
        lines.append(f"| {row['m']} | {shown} | {row['ms']:.3g} | {max(parts) / row['ms']:.0%} |")
    return lines


def shares_of_the_peak(rounds: int) -> str:
    """A table in Markdown: how much of this machine's bf16 peak (or fp32 peak) products of many tokens reach."""
    backend = CpuBackend()
    found = limits(backend)
    peak = 1e9 * (found["dot_gflop_s"] or found["fma_gflop_s"])
    lines = [f"{peak / 1e9:.0f} GFLOP/s"]
    for n, k, m in TRAINING:
        weight = torch.randn(n, k)
        packed, whole = packed_weight(backend, weight), weight.bfloat16()
        tiles, x, grad = (
            backend.prepare_weight(packed) or packed,
            torch.randn(m, k).bfloat16(),
            torch.randn(m, n).bfloat16(),
        )
        runs: dict[str, Callable[[int], object]] = {
            "tiles": lambda _, x=x, w=tiles: backend.gemm_4bit(x, w, None),
            "stored bytes": lambda _, x=x, w=packed: backend.gemm_4bit(x, w, None),
            "torch bf16": lambda _, x=x, w=whole: torch.nn.functional.linear(x, w),
            "gradient": lambda _, g=grad, w=packed: backend.grad_input_4bit(g, w),
            "torch bf16, the other way": lambda _, g=grad, w=whole: g @ w,
        }
        if len(lines) == 1:
            lines += [f"| M × N × K | {' | '.join(runs)} |", f"| --- |{' --- |' * len(runs)}"]
        shares = [2 * m * n * k / peak / seconds for seconds in interleaved(runs, rounds).values()]
        lines.append(f"| {m} × {n} × {k} | {' | '.join(f'{share:.2f}' for share in shares)} |")
    return "\n".join(lines)


def packed_weight(backend: CpuBackend, weight: Tensor) -> PackedWeight:
    code = get_codebook("nf4").on("cpu")
    packed, absmax = backend.quantize_4bit(weight.float(), code, BLOCKSIZE)
    n, k = weight.shape
    return PackedWeight(packed, absmax, code.values, BLOCKSIZE, (n, k), "nf4")


if __name__ == "__main__":
    main()
