"""What the counts of ``sass.py`` would mean on an H200: predictions, for want of one. No figure here was measured.

A product takes as long as the part of the machine that is busiest with it, plus a start:

    memory      packed weights and scales, read once                    at 88 % of a copy's 4.3 TB/s
    l2          x, read once by every CTA                               5.5 TB/s
    issue       instructions per weight                                 4 x 32 lanes a clock and multiprocessor
    alu         integer and logic operations per weight                 64 lanes a clock
    l1          wavefronts of shared memory and L1                      1 a clock
    tensor      multiply-adds of the tokens, filled up to whole tiles   1,270 a clock: mma.sync in bf16, dense

Latencies are not in it: a kernel with too few loads under way stays below its roofline.
"""

from __future__ import annotations

from dataclasses import dataclass

from .geometry import Shape, plan
from .sass import count

__all__ = ["Prediction", "cublas_seconds", "predict", "show"]

MULTIPROCESSORS, CLOCK, ARCH = 132, 1.755e9, 90
COPY_BANDWIDTH, READ_SHARE, L2_BANDWIDTH = 4.3e12, 0.88, 5.5e12
TENSOR_FMA, CUBLAS_FLOPS = 1270, 750e12
START = 1.5e-6
SHAPES = ((4096, 4096), (8192, 8192), (28672, 8192))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Prediction:
    """Seconds by part of the machine; the largest decides."""

    parts: dict[str, float]

    @property
    def limit(self) -> str:
        """The part that is busiest."""
        return max(self.parts, key=lambda name: self.parts[name])

    @property
    def seconds(self) -> float:
        """Of the product as a whole."""
        return self.parts[self.limit] + START


def predict(shape: Shape, rung: str | None = None) -> Prediction:
    """The roofline of one product."""
    chosen = plan(shape, ARCH, MULTIPROCESSORS, rung)
    if chosen is None:
        raise ValueError(f"above the cross-over there is no kernel to predict: {shape}")
    counted = count(chosen.variant, ARCH)
    if counted.instructions is None or counted.alu is None or counted.l1 is None:
        raise ValueError(f"{chosen.variant} has no hot loop to count")
    tokens = next((int(d.removeprefix("TOKENS=")) for d in chosen.variant.defines if d.startswith("TOKENS=")), 1)
    passes = -(-shape.m // tokens)
    ctas = chosen.grid[0] * chosen.grid[1]
    uneven = -(-ctas // MULTIPROCESSORS) * MULTIPROCESSORS / ctas  # the busiest multiprocessor against the mean
    weights = shape.n * shape.k * passes
    clocks = MULTIPROCESSORS * CLOCK / uneven
    row_tiles = -(-ctas // (passes * chosen.splits)) if shape.dtype != "FP32" else ctas
    return Prediction(
        {
            "memory": weight_bytes(shape) / (READ_SHARE * COPY_BANDWIDTH),
            "l2": row_tiles * shape.m * shape.k * 2 / L2_BANDWIDTH,
            "issue": weights * counted.instructions / 128 / clocks,
            "alu": weights * counted.alu / 64 / clocks,
            "l1": weights * counted.l1 / 32 / clocks,
            "tensor": weights * tokens / TENSOR_FMA / clocks if chosen.rounded else 0.0,
        }
    )


def weight_bytes(shape: Shape) -> float:
    """Of packed codes and scales."""
    numel = shape.n * shape.k
    return numel / 2 + numel / shape.blocksize * (1 + 4 / shape.nested if shape.nested else 4)


def cublas_seconds(shape: Shape) -> float:
    """The same product on bf16 weights: a copy's bandwidth, or 750 TFLOP/s."""
    moved = 2 * (shape.n * shape.k + shape.m * (shape.n + shape.k))
    return max(moved / (READ_SHARE * COPY_BANDWIDTH), 2 * shape.m * shape.n * shape.k / CUBLAS_FLOPS) + START


def show() -> None:
    """Two tables: the rungs at one token, and the best rung at all sizes."""
    print("predicted for an H200 from instruction counts; nothing was measured\n")
    print("N x K = 4096 x 4096, M = 1, bf16, NF4, blocks of 64")
    for rung in ("naive", "vectorised", "tensor_core", "ring"):
        made = predict(Shape("BF16", 1, 4096, 4096, 64, 0, True), rung)
        print(f"  {rung:12} {made.seconds * 1e6:7.1f} us   limit: {made.limit}")
    print(f"\n{'N x K':>14}{'M':>5}{'us':>8}  {'limit':8}{'of copy bandwidth':>18}{'x cuBLAS bf16':>15}")
    for n, k in SHAPES:
        for m in TOKENS:
            shape = Shape("BF16", m, n, k, 64, 0, True)
            made = predict(shape)
            share = weight_bytes(shape) / made.seconds / COPY_BANDWIDTH
            faster = cublas_seconds(shape) / made.seconds
            print(f"{f'{n} x {k}':>14}{m:5}{made.seconds * 1e6:8.1f}  {made.limit:8}{share:18.0%}{faster:15.2f}")
