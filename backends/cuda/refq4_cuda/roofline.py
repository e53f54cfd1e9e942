"""What the counts of ``counts.json`` would mean on six GPUs: predictions, for want of them. No figure was measured.

A product takes as long as the part of the machine that is busiest with it, plus what is outside its loop, plus a start:

    memory      packed weights and scales, read once                    at 88 % of a copy's bandwidth
    l2          x, read once by every CTA
    issue       instructions per weight                                 4 x 32 lanes a clock and multiprocessor
    alu         integer and logic operations per weight                 64 lanes a clock, 128 on sm_120
    l1          wavefronts of shared memory and L1                      1 a clock
    tensor      multiply-adds of the tokens, filled up to whole tiles   mma.sync, dense
    outside     the table, and the sums' way out: of the busiest multiprocessor's CTAs, then of a tile's last one

Beside it stand decoding and cuBLAS (two kernels: the decoded weight is written, and read again), cuBLAS on bf16
weights, and bitsandbytes 0.50.2. Theirs is a roofline without an outside. Latencies are in none of them: a kernel with
too few loads under way stays below its roofline.

    python -m refq4_cuda.roofline              the table of docs/cuda-kernels.md
    python -m refq4_cuda.roofline --write      the cross-overs of crossovers.json, by this model
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import lru_cache

from .counts import known
from .crossover import FILE, is_fused
from .geometry import RUNGS, Plan, Shape, plan

__all__ = [
    "GPUS",
    "SHAPES",
    "Gpu",
    "Prediction",
    "bitsandbytes",
    "cublas",
    "decoded",
    "predict",
    "show",
    "table",
    "turns",
]

SHAPES = ((4096, 4096), (1024, 4096), (11008, 4096), (8192, 8192), (28672, 8192))
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
MOST_TOKENS = 512
START = 1.5e-6
_READ_SHARE, _COPY_SHARE, _CUBLAS_SHARE = 0.88, 0.9, 0.76


@dataclass(frozen=True)
class Gpu:
    """One that an architecture is modelled by; bytes and clocks a second, multiply-adds of mma.sync a clock."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    l2: float
    tensor: float
    flops: float
    alu: int = 64

    @property
    def reads(self) -> float:
        """Bytes a second that a kernel reads from memory."""
        return _READ_SHARE * _COPY_SHARE * self.bandwidth


# Of the vendor's data sheets: multiprocessors, boost clock, memory, dense bf16 with fp32 sums. Estimated: the L2 cache,
# and what mma.sync reaches: on sm_90 1,270 a clock, where newer instructions set the peak; else 76 % of 1,024 or 256 a
# clock, as cuBLAS of the peak.
GPUS = {
    80: Gpu("A100", 108, 1.41e9, 2.04e12, 4.0e12, 780, 312e12),
    86: Gpu("RTX 3090", 82, 1.695e9, 0.936e12, 2.0e12, 195, 71e12),
    89: Gpu("RTX 4090", 128, 2.52e9, 1.008e12, 4.5e12, 195, 165e12),
    90: Gpu("H200", 132, 1.755e9, 4.8e12, 5.5e12, 1270, 989e12),
    100: Gpu("B200", 148, 1.85e9, 8.0e12, 9.0e12, 780, 2250e12),
    120: Gpu("RTX 5090", 170, 2.41e9, 1.79e12, 6.0e12, 195, 209e12, alu=128),
}


@dataclass(frozen=True)
class Prediction:
    """Seconds by part of the machine; the largest decides. ``outside`` comes on top."""

    parts: dict[str, float]
    outside: float = 0.0

    @property
    def limit(self) -> str:
        """The part that is busiest, or what is outside if that takes longer."""
        largest = max(self.parts, key=lambda name: self.parts[name])
        return "outside" if self.outside > self.parts[largest] else largest

    @property
    def seconds(self) -> float:
        """Of the product as a whole."""
        return max(self.parts.values()) + self.outside + START


@lru_cache(maxsize=1 << 15)
def predict(shape: Shape, arch: int = 90, rung: str = "ring") -> Prediction:
    """A rung's time at any number of tokens; of rungs other than the ring, sm_90 alone has been counted."""
    gpu = GPUS[arch]
    cut = plan(shape, arch, gpu.multiprocessors, rung)
    if cut is None:
        raise ValueError(f"there is no plan for {shape}")
    tokens = next((int(d.removeprefix("TOKENS=")) for d in cut.variant.defines if d.startswith("TOKENS=")), 1)
    passes, ctas = -(-shape.m // tokens), cut.grid[0] * cut.grid[1]
    instructions, alu, l1 = known()["loops"][str(arch)][str(tokens) if rung == "ring" else f"{rung} {tokens}"]
    uneven = -(-ctas // gpu.multiprocessors) * gpu.multiprocessors / ctas  # the busiest multiprocessor against the mean
    weights, clocks = shape.n * shape.k * passes, gpu.multiprocessors * gpu.clock / uneven
    parts = {
        "memory": _weight_bytes(shape) / gpu.reads,
        "l2": ctas // cut.splits // passes * shape.m * shape.k * 2 / gpu.l2,
        "issue": weights * instructions / 128 / clocks,
        "alu": weights * alu / gpu.alu / clocks,
        "l1": weights * l1 / 32 / clocks,
        "tensor": weights * tokens / gpu.tensor / clocks if cut.rounded else 0.0,
    }
    return Prediction(parts, _outside(cut, tokens, gpu) if rung == "ring" else 0.0)


def _outside(cut: Plan, tokens: int, gpu: Gpu) -> float:
    """Eight warps of a CTA issue four instructions a clock; a multiprocessor's CTAs do so one after the other."""
    counts = known()["outside"][f"{tokens}x{cut.row_warps}"]
    mine, tiles = (-(-ctas // gpu.multiprocessors) for ctas in (cut.grid[0] * cut.splits, cut.grid[0]))
    issued: float = mine * counts["alone"] if cut.splits == 1 else mine * counts["each"] + tiles * counts["last"]
    return issued * 8 / 4 / gpu.clock


def decoded(shape: Shape, arch: int) -> float:
    """Seconds of decoding the weight to bf16, and of cuBLAS on that."""
    gpu = GPUS[arch]
    return START + (_weight_bytes(shape) + 2 * shape.n * shape.k) / gpu.reads + cublas(shape, arch)


def cublas(shape: Shape, arch: int) -> float:
    """Seconds of the same product on bf16 weights."""
    gpu = GPUS[arch]
    moved = 2 * (shape.n * shape.k + shape.m * (shape.n + shape.k))
    return START + max(moved / gpu.reads, 2 * shape.m * shape.n * shape.k / (_CUBLAS_SHARE * gpu.flops))


# Instructions, integer ones and L1 wavefronts per weight of bitsandbytes' kernels, in the cubin for sm_90 of its wheel:
# a plain one for up to four tokens (8.7 for one, 20 for four), and one for the tensor cores, 32 tokens at a time.
_SIMT = ((8.7, 3.8), (5.4, 1.83), (1.75, 0.0))  # for one token, and what each more adds
_MMA, _MMA_TOKENS = (8.1, 3.25, 4.25), 32


def bitsandbytes(shape: Shape, arch: int) -> float:
    """Seconds of its fused kernels, or of its decoding and cuBLAS where the model says that this is faster."""
    gpu, simt = GPUS[arch], shape.m <= 4
    per = [first + more * (shape.m - 1) for first, more in _SIMT] if simt else list(_MMA)
    passes = 1 if simt else -(-shape.m // _MMA_TOKENS)
    clocks = shape.n * shape.k * passes / (gpu.multiprocessors * gpu.clock)
    parts = (per[0] / 128 * clocks, per[1] / gpu.alu * clocks, per[2] / 32 * clocks)
    return min(START + max(_weight_bytes(shape) / gpu.reads, *parts), decoded(shape, arch))


def _weight_bytes(shape: Shape) -> float:
    """Of packed codes and scales."""
    numel, scale = shape.n * shape.k, 1 + 4 / shape.nested if shape.nested else 4.0
    return numel / 2 + numel / shape.blocksize * scale


def _bf16(m: int, n: int, k: int) -> Shape:
    return Shape("BF16", m, n, k, 64, 0, aligned=True)


# --- where decoding and cuBLAS take over ------------------------------------------------------------------------------

_OTHER_SHAPES = ((2048, 2048), (1024, 8192), (4096, 14336), (14336, 4096), (8192, 28672))


def turns(n: int, k: int, arch: int) -> list[int]:
    """The numbers of tokens after which the other way is faster; the last one at the end of what is modelled."""
    found, fused = [], True
    for m in range(1, MOST_TOKENS + 1):
        shape = _bf16(m, n, k)
        if fused != (predict(shape, arch).seconds <= decoded(shape, arch)):
            found.append(m - 1)
            fused = not fused
    return [*found, MOST_TOKENS] if fused else found


def _write() -> None:
    rows = {arch: [(n, k, turns(n, k, arch)) for n, k in SHAPES + _OTHER_SHAPES] for arch in GPUS}
    lines = ",\n".join(
        f' "{arch}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in of) + "\n ]" for arch, of in rows.items()
    )
    FILE.write_text("{\n" + lines + "\n}\n")


# --- the table of the docs --------------------------------------------------------------------------------------------


def table(arch: int) -> str:
    """Markdown: microseconds of each way, the chosen one in bold, and how many times cuBLAS on bf16 takes."""
    heads = ("N × K", "M", "fused", "limit", "decode + cuBLAS", "cuBLAS bf16", "bitsandbytes", "× cuBLAS bf16")
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for n, k in SHAPES:
        for m in TOKENS:
            shape = _bf16(m, n, k)
            fused, other, plain = predict(shape, arch), decoded(shape, arch), cublas(shape, arch)
            chosen = is_fused(m, n, k, arch, GPUS[arch].multiprocessors)
            texts = [f"{1e6 * seconds:.1f}" for seconds in (fused.seconds, other)]
            texts[not chosen] = f"**{texts[not chosen]}**"
            ratio = plain / (fused.seconds if chosen else other)
            cells = (f"{n} × {k}" if m == 1 else "", m, texts[0], fused.limit, texts[1], f"{1e6 * plain:.1f}")
            lines.append(
                "| " + " | ".join(map(str, cells)) + f" | {1e6 * bitsandbytes(shape, arch):.1f} | {ratio:.2f} |"
            )
    return "\n".join(lines)


def show() -> None:
    """The rungs at one token on an H200, and the table of each architecture."""
    for rung in reversed(RUNGS):
        made = predict(_bf16(1, 4096, 4096), 90, rung)
        print(f"{rung:12} {1e6 * made.seconds:7.1f} µs   limit: {made.limit}")
    for arch, gpu in GPUS.items():
        print(f"### sm_{arch}, as in the {gpu.name}\n\n{table(arch)}\n")


def main(arguments: list[str] | None = None) -> None:
    """The command at the top of the file."""
    parser = argparse.ArgumentParser(prog="python -m refq4_cuda.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write crossovers.json anew")
    if parser.parse_args(arguments).write:
        _write()
    else:
        show()


if __name__ == "__main__":
    main()
