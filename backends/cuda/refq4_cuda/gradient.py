"""Products with the weight the other way round: the gradient of a layer's input, and experts stored as [K, N].

    y [M, N] = x [M, K] times w [K, N]        the gradient: x is that of the layer's output, w its weight as stored

    rung            asks for                                                                            serves
    --------------  ----------------------------------------------------------------------------------  ---------------
    tensor_core     fp16 or bf16 (on sm_75 fp16 only), blocks of 16 or more, a power of two; 16          M up to 192
                    divides N, and 8 divides K; 16-byte addresses
    tiled           nothing                                                                             M up to 32

Both decode tiles in shared memory; the full weight is nowhere. Above its M, the weight is decoded once and torch
multiplies. These cross-overs, too, are predictions: decoding is paid again for every 64 tokens, and cuBLAS
multiplies at twice the rate of ``mma.sync``.
"""

from __future__ import annotations

from .geometry import Plan, Shape, Variant, ceil_div, choose, grouped, log2, splits_of
from .limits import THREADS, Limits, published

__all__ = ["CROSS_OVER", "RUNGS", "plan", "refuses", "transposed_variants"]

RUNGS = ("tensor_core", "tiled")
CROSS_OVER = {"tensor_core": 192, "tiled": 32}
_TOKENS = {"tensor_core": (8, 32, 64), "tiled": (32,)}
_COLUMNS = {"tensor_core": 128, "tiled": 64}
_DEPTH = 64  # k in a step of the tensor cores
_SHARED, _REGISTERS = 36 << 10, 192  # of a CTA, of a thread


def plan(
    shape: Shape,
    arch: int,
    multiprocessors: int,
    rung: str | None = None,
    limits: Limits | None = None,
    products: int = 1,
) -> Plan | None:
    """As ``geometry.plan``: the upper rung that serves the shape, or None above its cross-over.

    Raises:
        ValueError: ``rung`` does not serve the shape, or there is no such rung.
    """
    limits = limits or published(arch)
    best = choose(rung, RUNGS, refuses, shape, arch, limits)
    if rung is None and shape.m > CROSS_OVER[best]:
        return None
    tokens = next(t for t in _TOKENS[best] if t >= min(shape.m, _TOKENS[best][-1]))
    columns, groups = ceil_div(shape.n, _COLUMNS[best]), ceil_div(shape.m, tokens)
    variant = _variant(best, shape.dtype, tokens)
    if best == "tiled":
        return Plan(variant, (columns, groups, products))
    tiles = columns * groups
    splits = splits_of(tiles * products, shape.k // _DEPTH, multiprocessors)
    room = tiles * products if splits > 1 else 0
    sums = room * splits * _COLUMNS[best] * tokens
    return Plan(variant, (tiles, splits, products), row_warps=4, splits=splits, sums=sums, tiles=room)


def refuses(rung: str, shape: Shape, arch: int, limits: Limits) -> str | None:
    """None if the rung serves the shape, else what it asks for."""
    if rung == "tiled":
        return None
    if shape.dtype == "FP32" or (shape.dtype == "BF16" and arch < 80):
        return f"has no tensor cores for {shape.dtype} on sm_{arch}"
    if not shape.aligned or log2(shape.blocksize) < 4 or (shape.nested and log2(shape.nested) < 0):
        return "needs blocksizes that are powers of two, 16 or more, and 16-byte aligned tensors"
    if shape.n % 16 or shape.k % 8 or not 0 < shape.k < 1 << 26:
        return f"needs N to be a multiple of 16 and K of 8, below {1 << 26}, not {shape.n} and {shape.k}"
    if limits.cta < _SHARED or limits.registers < THREADS * _REGISTERS:
        return f"needs {_SHARED} bytes of shared memory and {THREADS * _REGISTERS} registers in a CTA"
    return None


def transposed_variants(arch: int) -> list[Variant]:
    """Every kernel that can be launched on the architecture, for one product and for those of experts."""
    tensor = ("FP16", "BF16") if arch >= 80 else ("FP16",)
    made = [_variant("tiled", dtype, 32) for dtype in ("FP32", "FP16", "BF16")]
    made += [_variant("tensor_core", dtype, tokens) for dtype in tensor for tokens in _TOKENS["tensor_core"]]
    return made + [grouped(variant) for variant in made]


def _variant(rung: str, dtype: str, tokens: int) -> Variant:
    file = f"grad_input_4bit_{2 if rung == 'tensor_core' else 1}_{rung}.cu"
    return Variant(file, f"transposed_{rung}", (f"TOKENS={tokens}", f"T_{dtype}"))
