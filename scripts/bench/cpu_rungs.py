"""Time each rung of the CPU kernels on this machine: the product alone, without the layer around it.

python scripts/bench/cpu_rungs.py                                                under a minute on two cores; printed
python scripts/bench/cpu_rungs.py --json docs/benchmarks/rungs/cpu-avx2.json     and kept, for docs/cpu-kernels.md

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
from refq4_cpu.kernels import KERNEL_VARIABLE, PRODUCT_KERNELS, ProductKernel
from torch import Tensor

from refq4.backend import Call, PackedWeight
from refq4.bench.measure import interleaved, limits, machine
from refq4.bench.peers import random_weights
from refq4.codebooks import get_codebook

BLOCKSIZE = 64
TOKENS = (1, 4, 16, 128)
SCALAR_GEMV_TO = 16  # a token takes it 20 ms
IN_CACHE = (768, 1024)  # 0.4 MB of packed bytes and scales: they stay in the L2 cache of one core


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures here")
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("N", "K"))
    parser.add_argument("--layers", type=int, default=8, help="weights in rotation (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    asked = parser.parse_args()
    report = measured(*asked.shape, asked.layers, asked.rounds)
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


def packed_weight(backend: CpuBackend, weight: Tensor) -> PackedWeight:
    code = get_codebook("nf4").on("cpu")
    packed, absmax = backend.quantize_4bit(weight.float(), code, BLOCKSIZE)
    n, k = weight.shape
    return PackedWeight(packed, absmax, code.values, BLOCKSIZE, (n, k), "nf4")


if __name__ == "__main__":
    main()
