"""The product kernels and which of them serves a call.

Each kernel is known by its name, which is also its file's and its C function's; the library is asked for it once, when
it is loaded. Choosing takes two steps: what *can* serve (tier, dtype, layout, shape), then, among several that can,
what was fastest when this machine was calibrated (``calibrate.py``). ``REFQ4_CPU_KERNEL`` selects one kernel;
calibration and fallback are skipped, and a call that the kernel can't serve is refused with the reason.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from refq4.backend import PreparedWeight

from . import build
from .features import FEATURES

__all__ = [
    "DTYPES",
    "GRAD_INPUT_KERNELS",
    "KERNEL_VARIABLE",
    "PRODUCT_KERNELS",
    "TILES",
    "ProductKernel",
    "addresses",
    "can_tile",
    "candidates",
    "checked_tiles",
    "forced",
    "grad_input_kernel",
    "tile_bytes",
]

KERNEL_VARIABLE = "REFQ4_CPU_KERNEL"
TILES = "tiles16"  # the layout of kernels/tiles.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum dtype of kernels/refq4.h

_ALL = frozenset(DTYPES)
_BF16 = frozenset({torch.bfloat16})


@dataclass(frozen=True)
class ProductKernel:
    """One rung: a file in ``kernels/`` and what it asks for."""

    name: str
    feature: str = "c"  # in features.py: a tier that has the feature has the kernel
    dtypes: frozenset[torch.dtype] = _ALL
    reads_tiles: bool = True
    any_shape: bool = False  # else see can_tile
    most_tokens: int | None = None

    def refuses(
        self, features: tuple[str, ...], dtype: torch.dtype, m: int, k: int, blocksize: int, layout: str
    ) -> str | None:
        """None if it can serve, else the reason."""
        if self.feature not in features:
            return f"{self.name} needs a tier with {self.feature}"
        if dtype not in self.dtypes:
            return f"{self.name} does not take {dtype}"
        if layout == TILES and not self.reads_tiles:
            return f"{self.name} reads the canonical layout only"
        if self.most_tokens is not None and m > self.most_tokens:
            return f"{self.name} takes at most {self.most_tokens} token(s), not {m}"
        if not self.any_shape and not can_tile(k, blocksize):
            return f"{self.name} needs a blocksize of 32, 64, 128, ... that divides K (K={k}, blocksize {blocksize})"
        return None


PRODUCT_KERNELS = (
    ProductKernel("gemv_4bit_1_scalar", reads_tiles=False, any_shape=True),
    ProductKernel("gemm_4bit_1_scalar", reads_tiles=False, any_shape=True),
    ProductKernel("gemm_4bit_2_avx2", "avx2"),
    ProductKernel("gemm_4bit_3_avx2_bytes", "avx2", dtypes=_BF16),
    ProductKernel("gemm_4bit_4_avx2_blocked", "avx2"),
    ProductKernel("gemv_4bit_2_avx2", "avx2", dtypes=_BF16, reads_tiles=False, most_tokens=1),
    ProductKernel("gemm_4bit_3_avx512", "avx512"),
    ProductKernel("gemv_4bit_2_avx512", "avx512", reads_tiles=False, most_tokens=1),
    ProductKernel("gemm_4bit_5_avx512_rows", "avx512", reads_tiles=False, most_tokens=16),
    ProductKernel("gemm_4bit_4_avx512_bf16", "avx512_bf16", dtypes=_BF16),
    ProductKernel("gemv_4bit_3_avx512_bf16", "avx512_bf16", dtypes=_BF16, reads_tiles=False, most_tokens=1),
    ProductKernel("gemm_4bit_5_avx512_bf16_rows", "avx512_bf16", dtypes=_BF16, reads_tiles=False, most_tokens=16),
    ProductKernel("gemm_4bit_5_avx512_bf16_blocked", "avx512_bf16", dtypes=_BF16),
    ProductKernel("gemm_4bit_2_neon", "neon"),
    ProductKernel("gemv_4bit_2_neon", "neon", reads_tiles=False, most_tokens=1),
    ProductKernel("gemm_4bit_3_neon_fhm", "neon_fhm", dtypes=_BF16),
    ProductKernel("gemv_4bit_3_neon_fhm", "neon_fhm", dtypes=_BF16, reads_tiles=False, most_tokens=1),
    ProductKernel("gemm_4bit_3_neon_bf16", "neon_bf16", dtypes=_BF16),
    ProductKernel("gemv_4bit_3_neon_bf16", "neon_bf16", dtypes=_BF16, reads_tiles=False, most_tokens=1),
)

GRAD_INPUT_KERNELS = (  # read the canonical layout only, transposed; the last one that can serve does
    ProductKernel("grad_input_4bit_1_blocked", reads_tiles=False, any_shape=True),
    ProductKernel("grad_input_4bit_2_avx512_bf16", "avx512_bf16", dtypes=_BF16, reads_tiles=False),
)


@cache
def grad_input_kernel(features: tuple[str, ...], dtype: torch.dtype, k: int, blocksize: int) -> str:
    """The name of the kernel that multiplies by a stored weight [N, K] as it is, along its rows."""
    able = [kn for kn in GRAD_INPUT_KERNELS if kn.refuses(features, dtype, 1, k, blocksize, "canonical") is None]
    return able[-1].name


def addresses(library: build.Library) -> dict[str, int]:
    """The address of each product kernel that the library's tier has, by name.

    Raises:
        BuildError: the library has no kernel of a name above.
    """
    all_kernels = (*PRODUCT_KERNELS, *GRAD_INPUT_KERNELS)
    wanted = [kernel.name for kernel in all_kernels if kernel.feature in library.tier.features]
    found = {name: library.functions.refq4_kernel(name.encode()) for name in wanted}
    if missing := [name for name, address in found.items() if address is None]:
        raise build.BuildError(
            f"{library.path} has no kernel {', '.join(missing)}, which refq4_cpu/kernels.py lists for the tier "
            f"{library.tier}. Each of them must stand in the table of kernels/library.c under that name"
        )
    return found


def can_tile(k: int, blocksize: int) -> bool:
    """Whether the tile layout (and all kernels but the scalar ones) can hold such rows."""
    return blocksize >= 32 and blocksize & (blocksize - 1) == 0 and k % blocksize == 0


def tile_bytes(n: int, k: int, blocksize: int) -> int:
    """Panels of sixteen rows, each a record of 64 bytes of scales and 8 bytes of codes an element for every block."""
    return -(-n // 16) * (k // blocksize) * (64 + 8 * blocksize)


def checked_tiles(weight: PreparedWeight) -> tuple[Tensor, Tensor]:
    """The tensors of tiles and code, checked against the shape: the core does not know these sizes, and C does not ask.

    Raises:
        ValueError: one of them is missing, or has another dtype, size or device.
    """
    (*experts, n, k), blocksize = weight.shape, weight.blocksize
    n *= math.prod(experts)
    if not can_tile(k, blocksize):
        raise ValueError(f"tiles hold no weight of K = {k} at blocksize {blocksize}")
    wanted = (("tiles", torch.uint8, tile_bytes(n, k, blocksize)), ("code", torch.float32, 16))
    for (name, dtype, numel), tensor in zip(wanted, weight.tensors, strict=False):
        fits = tensor.dtype == dtype and tensor.numel() == numel and tensor.device.type == "cpu"
        if not (fits and tensor.is_contiguous()):
            raise ValueError(
                f"{name} of a weight [{n}, {k}] at blocksize {blocksize} must be {numel} contiguous {dtype} elements "
                f"on the CPU, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
    if len(weight.tensors) < 2:
        raise ValueError("a weight in tiles comes with its code")
    return weight.tensors[0], weight.tensors[1]


def forced() -> ProductKernel | None:
    """The kernel that ``REFQ4_CPU_KERNEL`` names, if it is set.

    Raises:
        ValueError: there is no such kernel; the message lists them.
    """
    if KERNEL_VARIABLE not in os.environ:  # asked in every call: get() would raise and catch two errors first
        return None
    asked = os.environ[KERNEL_VARIABLE]
    if not asked:
        return None
    for kernel in PRODUCT_KERNELS:
        if kernel.name == asked:
            return kernel
    known = ", ".join(kernel.name for kernel in PRODUCT_KERNELS)
    raise ValueError(f"the environment variable {KERNEL_VARIABLE}={asked!r} is not a kernel; known: {known}")


def candidates(
    features: tuple[str, ...], dtype: torch.dtype, m: int, k: int, blocksize: int, layout: str
) -> tuple[ProductKernel, ...]:
    """The kernels worth timing for a call, the one expected to be fastest first.

    A rung for older processors is no candidate where a newer one can serve. Between the rungs of AVX2 (decode in
    registers, or once for all tokens), and between fp32 multiply-adds and vdpbf16ps, the processor decides. The rungs
    of rows are made for stored bytes that come from memory, where they take half of the others' time; the calibration's
    weight lies in a cache and would not show it, so where one of them can serve, the others are no candidates.
    """
    able = [kn for kn in PRODUCT_KERNELS if kn.refuses(features, dtype, m, k, blocksize, layout) is None]
    # Later features first; among equals the one-token kernel, which needs no rearranging.
    order = list(FEATURES)
    able.sort(key=lambda kernel: (-order.index(kernel.feature), kernel.most_tokens != 1))
    outdated = {old for kernel in able for old in FEATURES[kernel.feature].outdates}
    newest = [kn for kn in able if kn.feature not in outdated and kn.name != "gemv_4bit_1_scalar"]
    return tuple([kn for kn in newest if kn.name.endswith("_rows")] or newest)
