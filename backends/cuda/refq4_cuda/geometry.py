"""Which kernel serves a product of what shape, and how its work is cut up. Numbers in, numbers out: no tensors.

    rung                 asks for                                                        serves
    -------------------  --------------------------------------------------------------  ----------------------
    ring                 sm_80, fp16 or bf16, blocks of 64 or more, aligned, 68 KB       M by crossover.py
    tensor_core          the same from blocks of 32 and from sm_75 (fp16 only there)     M up to 128
    vectorised           blocks of 32 or more, aligned; any dtype                        M up to 16
    naive                nothing                                                         M up to 16

*Aligned*: the blocksize is a power of two that divides K, and x and the packed bytes begin at 16-byte addresses. The
uppermost that will do, and for which the device has room, is taken. Above its M, the weight is dequantised and torch
multiplies. Where that is, is measured by ``refq4 tune``, or else predicted from instruction counts
(docs/cuda-kernels.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from .crossover import is_fused
from .limits import ARCHITECTURES, LEAST, THREADS, Limits, no_room, published

__all__ = [
    "ARCHITECTURES",
    "CROSS_OVER",
    "LEAST",
    "RUNGS",
    "THREADS",
    "Limits",
    "Shape",
    "Variant",
    "choose",
    "grouped",
    "grouped_variants",
    "no_room",
    "plan",
    "product_variants",
    "ring_plan",
    "published",
    "splits_of",
]

RUNGS = ("ring", "tensor_core", "vectorised", "naive")
_REGISTERS = {"ring": 256, "tensor_core": 128, "vectorised": 256}  # of a thread, at most
CROSS_OVER = {"ring": 128, "tensor_core": 128, "vectorised": 16, "naive": 16}  # the ring's for experts: crossover.py


class Variant(NamedTuple):  # a NamedTuple is made and hashed in a fraction of a dataclass's time; each call needs both
    """One compilation: a file in ``kernels/``, the kernel's name in it, and the macros, sorted."""

    file: str
    entry: str
    defines: tuple[str, ...]


class Shape(NamedTuple):
    """What decides how a product is served. ``dtype`` is "FP32", "FP16" or "BF16"; ``nested`` a blocksize or 0."""

    dtype: str
    m: int
    n: int
    k: int
    blocksize: int
    nested: int
    aligned: bool


@dataclass(frozen=True)
class Plan:
    """A kernel and how it is launched; ``row_warps`` and ``splits`` are explained in ``gemm_4bit_4_ring.cu``.

    ``sums`` and ``tiles`` are what it needs of a workspace (0: none); ``rounded``: it rounds the code at a factor.
    """

    variant: Variant
    grid: tuple[int, int, int]
    shared: int = 0
    rounded: bool = False
    row_warps: int = 1
    splits: int = 1
    sums: int = 0
    tiles: int = 0


@lru_cache(maxsize=4096)
def plan(
    shape: Shape,
    arch: int,
    multiprocessors: int,
    rung: str | None = None,
    limits: Limits | None = None,
    products: int = 1,
) -> Plan | None:
    """The uppermost rung that serves the shape, or None above its cross-over.

    Args:
        rung: this one instead, at any M; for tests and lessons.
        limits: what the device has room for; where there is none, what is published of the architecture.
        products: how many of this shape one launch computes, along gridDim.z.

    Raises:
        ValueError: ``rung`` does not serve the shape, or there is no such rung.
    """
    limits = limits or published(arch)
    best = choose(rung, RUNGS, refuses, shape, arch, limits)
    if rung is not None:
        fused = True
    elif best == "ring":
        fused = is_fused(shape.m, shape.n, shape.k, arch, multiprocessors)
    else:
        fused = shape.m <= CROSS_OVER[best]
    return _PLANNERS[best](shape, multiprocessors, limits, products) if fused else None


def choose(
    rung: str | None, rungs: Sequence[str], refuses: Callable[..., str | None], shape: Shape, arch: int, limits: Limits
) -> str:
    """The rung that is asked for, or else the uppermost that serves the shape, at any M.

    Raises:
        ValueError: ``rung`` does not serve the shape, or there is no such rung.
    """
    if rung is None:
        return next(name for name in rungs if refuses(name, shape, arch, limits) is None)
    if rung not in rungs:
        raise ValueError(f"no rung is called {rung!r}; there are {', '.join(rungs)}")
    if (reason := refuses(rung, shape, arch, limits)) is not None:
        raise ValueError(f"the rung {rung!r} does not serve this product: it {reason}")
    return rung


def refuses(rung: str, shape: Shape, arch: int, limits: Limits) -> str | None:
    """None if the rung serves the shape, else what it asks for."""
    if rung == "naive":
        return None
    smallest = 64 if rung == "ring" else 32
    if not (shape.aligned and log2(shape.blocksize) >= 0 and shape.k > 0 and shape.k % shape.blocksize == 0):
        return "needs a blocksize that is a power of two and divides K, and 16-byte aligned tensors"
    if shape.blocksize < smallest:
        return f"needs blocks of {smallest} or more, not {shape.blocksize}"
    if shape.nested and log2(shape.nested) < 0:
        return f"needs a nested blocksize that is a power of two, not {shape.nested}"
    if rung != "vectorised" and (shape.dtype == "FP32" or (shape.dtype == "BF16" and arch < 80)):
        return f"has no tensor cores for {shape.dtype} on sm_{arch}"
    if rung == "ring" and arch < 80:
        return f"needs cp.async, which sm_{arch} lacks"
    # 64 tokens of x, and all blocks, are counted in 32 bits there.
    if rung == "ring" and (shape.k >= 1 << 26 or shape.n * shape.k // shape.blocksize >= 1 << 31):
        return "counts elements of x and blocks in 32 bits, and this product has too many"
    if limits.registers < (registers := THREADS * _REGISTERS[rung]):
        return f"needs {registers} registers in a CTA, and the device has {limits.registers}"
    wanted = {"ring": _ring_shared(2), "tensor_core": _TENSOR_SHARED}.get(rung, 0)
    if wanted > limits.cta:
        return f"needs {wanted} bytes of shared memory in a CTA, and the device allows {limits.cta}"
    return None


def log2(size: int) -> int:
    """The exponent of a power of two, else -1."""
    return size.bit_length() - 1 if size > 0 and size & (size - 1) == 0 else -1


def ceil_div(a: int, b: int) -> int:
    """How many b cover a."""
    return -(-a // b)


# --- one planner per rung -------------------------------------------------------------------------------------------

_VECTOR_TOKENS = (1, 4)
_TENSOR_TOKENS = (8, 32)
_TENSOR_SHARED = 256 * 32 * 4  # the table of pairs, once per bank
_MOST_SPLITS = 8
_RING_ROW_TILES = {8: 2, 16: 2, 32: 4, 64: 2}  # tokens at a time: row tiles of 16 per warp


def naive_variant(dtype: str) -> Variant:
    """The naive GEMV for a dtype."""
    return Variant("gemv_4bit_1_naive.cu", "gemv_naive", (f"T_{dtype}",))


def vectorised_variant(dtype: str, tokens: int) -> Variant:
    """The vectorised GEMV for a dtype and so many tokens at a time."""
    return Variant("gemv_4bit_2_vectorised.cu", "gemv_vectorised", (f"TOKENS={tokens}", f"T_{dtype}"))


def tensor_core_variant(dtype: str, tokens: int) -> Variant:
    """The plain tensor-core GEMM for a dtype and so many tokens at a time."""
    return Variant("gemm_4bit_3_tensor_core.cu", "gemm_tensor_core", (f"TOKENS={tokens}", f"T_{dtype}"))


def ring_variant(arch: int, dtype: str, tokens: int) -> Variant:
    """The ring GEMM for a dtype and so many tokens at a time, as it is launched on an architecture."""
    return _ring_variant(dtype, tokens, _ring_stages(published(arch), tokens))


def _ring_variant(dtype: str, tokens: int, stages: int) -> Variant:
    defines = (
        f"ROW_TILES={_RING_ROW_TILES[tokens]}",
        f"STAGES={stages}",
        f"TOKENS={tokens}",
        f"T_{dtype}",
    )
    return Variant("gemm_4bit_4_ring.cu", "gemm_ring", defines)


def _ring_stages(limits: Limits, tokens: int) -> int:
    """As many stages, 2 to 4, as shared memory holds beside the CTAs that registers allow (RESIDENT in the kernel)."""
    resident = 2 if tokens <= 16 else 1
    most = 3 if tokens <= 16 else 4
    reserved = 1024  # bytes of each CTA that the driver keeps
    room = min(limits.cta, limits.multiprocessor // resident - reserved)
    if room < _ring_shared(2):
        room = limits.cta  # fewer CTAs than registers allow
    return max(stages for stages in range(2, most + 1) if _ring_shared(stages) <= max(room, _ring_shared(2)))


def _ring_shared(stages: int) -> int:
    """Bytes: the table with the ring in its gaps, and the scales of each warp's stages."""
    return max(256, 8 * stages * 16) * 256 + 8 * stages * 64 * 4


def product_variants(arch: int) -> list[Variant]:
    """Every product kernel that can be launched on the architecture."""
    dtypes = ("FP32", "FP16", "BF16")
    tensor = ("FP16", "BF16") if arch >= 80 else ("FP16",)
    made = [naive_variant(dtype) for dtype in dtypes]
    made += [vectorised_variant(dtype, tokens) for dtype in dtypes for tokens in _VECTOR_TOKENS]
    made += [tensor_core_variant(dtype, tokens) for dtype in tensor for tokens in _TENSOR_TOKENS]
    if arch >= 80:
        made += [ring_variant(arch, dtype, tokens) for dtype in tensor for tokens in _RING_ROW_TILES]
    return made


def grouped_variants(arch: int) -> list[Variant]:
    """The same for a product for each expert, of which the ring multiplies up to 32 tokens at a time."""
    return [grouped(variant) for variant in product_variants(arch) if "TOKENS=64" not in variant.defines]


def grouped(variant: Variant) -> Variant:
    """A product's kernel for the tiles of a list (``grouped.cuh``)."""
    return variant._replace(defines=("GROUPED", *variant.defines))


def _naive(shape: Shape, multiprocessors: int, limits: Limits, products: int) -> Plan:
    return Plan(naive_variant(shape.dtype), (ceil_div(shape.n, THREADS // 32), min(shape.m, 65535), products))


def _vectorised(shape: Shape, multiprocessors: int, limits: Limits, products: int) -> Plan:
    tokens = next(t for t in _VECTOR_TOKENS if t >= min(shape.m, _VECTOR_TOKENS[-1]))
    grid = (ceil_div(shape.n, THREADS // 32), ceil_div(shape.m, tokens), products)
    return Plan(vectorised_variant(shape.dtype, tokens), grid)


def _tensor_core(shape: Shape, multiprocessors: int, limits: Limits, products: int) -> Plan:
    tokens = next(t for t in _TENSOR_TOKENS if t >= min(shape.m, _TENSOR_TOKENS[-1]))
    grid = (ceil_div(shape.n, 16), ceil_div(shape.m, tokens), products)
    return Plan(tensor_core_variant(shape.dtype, tokens), grid, shared=_TENSOR_SHARED, rounded=True)


def _ring(shape: Shape, multiprocessors: int, limits: Limits, products: int) -> Plan:
    tokens = next(t for t in _RING_ROW_TILES if t >= min(shape.m, 64))
    # x is read once per CTA: warps side by side share it, and the more tokens, the more that matters.
    row_warps = 1 if shape.m <= 2 else 2 if shape.m <= 4 else 4
    while row_warps > 1 and _leaves_idle(
        _MOST_SPLITS * products * _ring_tiles(shape, tokens, row_warps), multiprocessors
    ):
        row_warps //= 2
    steps = shape.k // (8 // row_warps * 64 * (4 // _RING_ROW_TILES[tokens]))
    splits = splits_of(products * _ring_tiles(shape, tokens, row_warps), steps, multiprocessors)
    return ring_plan(shape, limits, tokens, row_warps, splits, products)


def _ring_tiles(shape: Shape, tokens: int, row_warps: int) -> int:
    return ceil_div(shape.n, row_warps * 16 * _RING_ROW_TILES[tokens]) * ceil_div(shape.m, tokens)


def ring_plan(shape: Shape, limits: Limits, tokens: int, row_warps: int, splits: int, products: int = 1) -> Plan:
    """The ring kernel cut up in a given way."""
    stages, rows = _ring_stages(limits, tokens), row_warps * 16 * _RING_ROW_TILES[tokens]
    tiles = _ring_tiles(shape, tokens, row_warps)
    return Plan(
        _ring_variant(shape.dtype, tokens, stages),
        (tiles, splits, products),
        shared=_ring_shared(stages),
        rounded=True,
        row_warps=row_warps,
        splits=splits,
        sums=tiles * products * splits * rows * tokens if splits > 1 else 0,
        tiles=tiles * products if splits > 1 else 0,
    )


def splits_of(tiles: int, steps: int, multiprocessors: int) -> int:
    """How many CTAs share K, so that all multiprocessors have about the same to do.

    The busiest has ceil(tiles * s / multiprocessors) CTAs of 1/s of the work each; adding up costs a little for each s.
    At least two steps are left to each warp, unless that leaves multiprocessors idle.
    """
    most = min(_MOST_SPLITS, steps // 2)
    if _leaves_idle(tiles * most, multiprocessors):
        most = min(_MOST_SPLITS, steps)
    most = max(1, most)
    return min(range(1, most + 1), key=lambda s: (ceil_div(tiles * s, multiprocessors) / s * (1 + 0.03 * (s - 1)), s))


def _leaves_idle(ctas: int, multiprocessors: int) -> bool:
    """Whether more than a quarter of them would have nothing to do."""
    return 4 * ctas < 3 * multiprocessors


_PLANNERS = {"ring": _ring, "tensor_core": _tensor_core, "vectorised": _vectorised, "naive": _naive}
