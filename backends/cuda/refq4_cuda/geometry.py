"""Which kernel serves a product of what shape, and how its work is cut up. Numbers in, numbers out: no tensors.

    rung                 asks for                                                        serves
    -------------------  --------------------------------------------------------------  ----------------------
    ring                 sm_80, fp16 or bf16, blocks of 64 or more, aligned              M up to 128
    tensor_core          the same from blocks of 32 and from sm_75 (fp16 only there)     M up to 128
    vectorised           blocks of 32 or more, aligned; any dtype                        M up to 16
    naive                nothing                                                         M up to 16

*Aligned*: the blocksize is a power of two that divides K, and x and the packed bytes begin at 16-byte addresses. The
uppermost that will do is taken. Above its M, the weight is dequantised and torch multiplies; these cross-overs are
predictions from instruction counts (docs/cuda-kernels.md), since no GPU was there to measure them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

__all__ = ["ARCHITECTURES", "CROSS_OVER", "RUNGS", "THREADS", "Shape", "Variant", "plan", "product_variants"]

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
THREADS = 256
RUNGS = ("ring", "tensor_core", "vectorised", "naive")
CROSS_OVER = {"ring": 128, "tensor_core": 128, "vectorised": 16, "naive": 16}


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

    ``sums`` and ``tiles`` are what it needs of a workspace (0: none); ``rounded`` asks for the rounded table.
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
def plan(shape: Shape, arch: int, multiprocessors: int, rung: str | None = None) -> Plan | None:
    """The uppermost rung that serves the shape, or None above its cross-over.

    Args:
        rung: this one instead, at any M; for tests and lessons.

    Raises:
        ValueError: ``rung`` does not serve the shape, or there is no such rung.
    """
    if rung is not None:
        if rung not in RUNGS:
            raise ValueError(f"no rung is called {rung!r}; there are {', '.join(RUNGS)}")
        if (reason := refuses(rung, shape, arch)) is not None:
            raise ValueError(f"the rung {rung!r} does not serve this product: it {reason}")
        return _PLANNERS[rung](shape, arch, multiprocessors)
    best = next(name for name in RUNGS if refuses(name, shape, arch) is None)
    return _PLANNERS[best](shape, arch, multiprocessors) if shape.m <= CROSS_OVER[best] else None


def refuses(rung: str, shape: Shape, arch: int) -> str | None:
    """None if the rung serves the shape, else what it asks for."""
    if rung == "naive":
        return None
    smallest = 64 if rung == "ring" else 32
    if not (shape.aligned and log2(shape.blocksize) >= 0 and shape.k > 0 and shape.k % shape.blocksize == 0):
        return "wants a blocksize that is a power of two and divides K, and 16-byte aligned tensors"
    if shape.blocksize < smallest:
        return f"wants blocks of {smallest} or more, not {shape.blocksize}"
    if shape.nested and log2(shape.nested) < 0:
        return f"wants a nested blocksize that is a power of two, not {shape.nested}"
    if rung != "vectorised" and (shape.dtype == "FP32" or (shape.dtype == "BF16" and arch < 80)):
        return f"has no tensor cores for {shape.dtype} on sm_{arch}"
    if rung == "ring" and arch < 80:
        return f"needs cp.async, which sm_{arch} lacks"
    # 64 tokens of x, and all blocks, are counted in 32 bits there.
    if rung == "ring" and (shape.k >= 1 << 26 or shape.n * shape.k // shape.blocksize >= 1 << 31):
        return "counts elements of x and blocks in 32 bits, and this product has too many"
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
    """The ring GEMM for a dtype and so many tokens at a time."""
    defines = (
        f"ROW_TILES={_RING_ROW_TILES[tokens]}",
        f"STAGES={_ring_stages(arch, tokens)}",
        f"TOKENS={tokens}",
        f"T_{dtype}",
    )
    return Variant("gemm_4bit_4_ring.cu", "gemm_ring", defines)


def _ring_stages(arch: int, tokens: int) -> int:
    """As many stages as the architecture's shared memory holds beside the CTAs that registers allow."""
    if arch in (86, 89, 120):  # 100 KB a multiprocessor
        return 2
    if tokens <= 16:  # two CTAs a multiprocessor, of 164 KB on sm_80, 228 KB on sm_90 and sm_100
        return 2 if arch == 80 else 3
    return 4


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


def _naive(shape: Shape, arch: int, multiprocessors: int) -> Plan:
    return Plan(naive_variant(shape.dtype), (ceil_div(shape.n, THREADS // 32), min(shape.m, 65535), 1))


def _vectorised(shape: Shape, arch: int, multiprocessors: int) -> Plan:
    tokens = next(t for t in _VECTOR_TOKENS if t >= min(shape.m, _VECTOR_TOKENS[-1]))
    grid = (ceil_div(shape.n, THREADS // 32), ceil_div(shape.m, tokens), 1)
    return Plan(vectorised_variant(shape.dtype, tokens), grid)


def _tensor_core(shape: Shape, arch: int, multiprocessors: int) -> Plan:
    tokens = next(t for t in _TENSOR_TOKENS if t >= min(shape.m, _TENSOR_TOKENS[-1]))
    grid = (ceil_div(shape.n, 16), ceil_div(shape.m, tokens), 1)
    return Plan(tensor_core_variant(shape.dtype, tokens), grid, shared=256 * 32 * 4, rounded=True)


def _ring(shape: Shape, arch: int, multiprocessors: int) -> Plan:
    tokens = next(t for t in _RING_ROW_TILES if t >= min(shape.m, 64))
    row_tiles, stages = _RING_ROW_TILES[tokens], _ring_stages(arch, tokens)
    groups = ceil_div(shape.m, tokens)
    # x is read once per CTA: warps side by side share it, and the more tokens, the more that matters.
    row_warps = 1 if shape.m <= 2 else 2 if shape.m <= 4 else 4
    rows = row_warps * 16 * row_tiles
    tiles = ceil_div(shape.n, rows) * groups
    splits = _splits(tiles, shape.k // (8 // row_warps * 64 * (4 // row_tiles)), multiprocessors)
    return Plan(
        ring_variant(arch, shape.dtype, tokens),
        (tiles, splits, 1),
        shared=max(256, 8 * stages * 16) * 256 + 8 * stages * 64 * 4,
        rounded=True,
        row_warps=row_warps,
        splits=splits,
        sums=tiles * splits * rows * tokens if splits > 1 else 0,
        tiles=tiles if splits > 1 else 0,
    )


def _splits(tiles: int, steps: int, multiprocessors: int) -> int:
    """How many CTAs share K, so that all multiprocessors have about the same to do.

    The busiest has ceil(tiles * s / multiprocessors) CTAs of 1/s of the work each; adding up costs a little for each s.
    At least two steps are left to each warp.
    """
    most = max(1, min(8, steps // 2))
    return min(range(1, most + 1), key=lambda s: (ceil_div(tiles * s, multiprocessors) / s * (1 + 0.03 * (s - 1)), s))


_PLANNERS = {"ring": _ring, "tensor_core": _tensor_core, "vectorised": _vectorised, "naive": _naive}
