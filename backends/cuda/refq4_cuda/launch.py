"""From an op and its tensors to a kernel launch: variant, grid, block, shared memory, and the bytes of its argument.

    tensors, sizes  --->  geometry.py: which kernel, how cut up  --->  Launch  --->  driver.py (a GPU) or the emulator

Nothing of CUDA is imported here, and no tensor's values are read: a launch can be planned for any architecture on any
machine, from tensors on any device. The emulator is fed the same bytes as a GPU.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from ctypes import sizeof
from typing import NamedTuple

import torch
from torch import Tensor

from refq4.backend import Nested, PackedWeight
from refq4.codebooks import Code

from . import geometry, gradient
from .arguments import DequantizeArguments, ProductArguments, QuantizeArguments, packer
from .geometry import THREADS, Limits, Plan, Shape, Variant, ceil_div, grouped_variants, log2, product_variants
from .operands import table_factor

__all__ = [
    "Launch",
    "Product",
    "Variant",
    "all_variants",
    "dequantize_4bit",
    "dequantize_blockwise",
    "filled",
    "planned_product",
    "product",
    "product_of",
    "quantize",
    "shape_of",
]

DTYPES = {torch.float32: "FP32", torch.float16: "FP16", torch.bfloat16: "BF16"}
_BLOCK = (THREADS, 1, 1)
_MOST_CTAS = 4096  # enough to fill any device several times; the kernels loop over what is left

_pack_quantize = packer(QuantizeArguments)
_pack_dequantize = packer(DequantizeArguments)
_pack_product = packer(ProductArguments)
_ROOM = ProductArguments.partial.offset
_fill = struct.Struct(f"3P{_ROOM - 24}s2P{sizeof(ProductArguments) - _ROOM - 16}s").pack


class Launch(NamedTuple):
    """One kernel launch.

    Attributes:
        variant: what to compile.
        grid: CTAs in x, y, z.
        block: threads of a CTA.
        shared: dynamic shared memory in bytes.
        arguments: the packed struct, exactly what ``cuLaunchKernel`` gets as its argument buffer.
        buffers: every tensor whose address stands in ``arguments``.
    """

    variant: Variant
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    arguments: bytes
    buffers: tuple[Tensor, ...]


def all_variants(arch: int) -> list[Variant]:
    """Everything that can be launched on an architecture."""
    made = [_dequantize_variant(dtype, bits) for dtype in DTYPES for bits in (4, 8)]
    made += [_quantize_variant(dtype) for dtype in DTYPES]
    made += [
        variant
        for dtype in DTYPES
        for packs in (False, True)
        for variant in (_absmax_variant(dtype), _codes_variant(dtype, packs))
    ]
    products = [*product_variants(arch), *grouped_variants(arch), *gradient.transposed_variants(arch)]
    return list(dict.fromkeys(made)) + products


# --- quantising -----------------------------------------------------------------------------------------------------


def quantize(
    A: Tensor,
    code: Code,
    blocksize: int,
    packs: bool,
    out: Tensor,
    absmax: Tensor,
    arch: int,
    measures: bool = True,
) -> list[Launch]:
    """A [any shape] -> ``out`` (two codes a byte if ``packs``) and ``absmax`` fp32 [blocks].

    One launch where the vectorised kernel serves, else two: scales, then codes. Unless it ``measures``, ``absmax`` is
    what it was, and the second of these does the rest.
    """
    numel = A.numel()
    if numel == 0:
        return []
    length = code.order.numel()
    pad = code.zero_code() if packs and numel % 2 else 0
    arguments = _pack_quantize(
        A.data_ptr(), numel, blocksize, code.thresholds.data_ptr(), code.order.data_ptr(), length, pad,
        absmax.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    buffers = (A, code.thresholds, code.order, absmax, out)
    aligned = A.data_ptr() % 16 == 0 and out.data_ptr() % 4 == 0
    if measures and packs and length <= 16 and log2(blocksize) >= 3 and aligned:
        warps = ceil_div(numel, max(blocksize, THREADS))
        return [_launch(_quantize_variant(A.dtype), ceil_div(warps, THREADS // 32), arguments, buffers)]
    blocks, items = ceil_div(numel, blocksize), ceil_div(numel, 2) if packs else numel
    codes = _launch(_codes_variant(A.dtype, packs), ceil_div(items, THREADS), arguments, buffers)
    scales = _launch(_absmax_variant(A.dtype), ceil_div(blocks, THREADS // 32), arguments, buffers)
    return [scales, codes] if measures else [codes]


def _quantize_variant(dtype: torch.dtype) -> Variant:
    return Variant("quantize_2_vectorised.cu", "quantize_4bit", (f"T_{DTYPES[dtype]}",))


def _absmax_variant(dtype: torch.dtype) -> Variant:
    return Variant("quantize_1_naive.cu", "block_absmax", (f"T_{DTYPES[dtype]}",))


def _codes_variant(dtype: torch.dtype, packs: bool) -> Variant:
    return Variant("quantize_1_naive.cu", "block_codes", (*["PACKED"][: int(packs)], f"T_{DTYPES[dtype]}"))


# --- dequantising ---------------------------------------------------------------------------------------------------


def dequantize_4bit(weight: PackedWeight, out: Tensor, arch: int) -> list[Launch]:
    """The weight -> ``out``, its dtype one of the three, its elements the weight's in order."""
    return _dequantize(weight.packed, weight.code, weight.blocksize, weight.absmax, weight.nested, out, 4)


def dequantize_blockwise(
    q: Tensor, absmax: Tensor, code: Tensor, blocksize: int, out: Tensor, arch: int
) -> list[Launch]:
    """q uint8 [any shape], code fp32 [256] -> ``out`` [same shape]."""
    return _dequantize(q, code, blocksize, absmax, None, out, 8)


def _dequantize(
    codes: Tensor, code: Tensor, blocksize: int, absmax: Tensor, nested: Nested | None, out: Tensor, bits: int
) -> list[Launch]:
    if out.numel() == 0:
        return []
    scales, buffers = _scales(absmax, nested, blocksize)
    shifted = log2(blocksize) >= 3 and (nested is None or log2(nested.blocksize) >= 0)
    aligned = shifted and codes.data_ptr() % bits == 0 and out.data_ptr() % 16 == 0
    arguments = _pack_dequantize(codes.data_ptr(), code.data_ptr(), *scales, out.data_ptr(), out.numel(), aligned)
    groups = ceil_div(out.numel(), 8 if aligned else 1)
    variant = _dequantize_variant(out.dtype, bits)
    return [_launch(variant, ceil_div(groups, THREADS), arguments, (codes, code, *buffers, out))]


def _dequantize_variant(dtype: torch.dtype, bits: int) -> Variant:
    return Variant("dequantize.cu", "dequantize", (*["EIGHT_BIT"][: int(bits == 8)], f"T_{DTYPES[dtype]}"))


# --- products -------------------------------------------------------------------------------------------------------


class Product(NamedTuple):
    """A product's launch but for what changes from call to call.

    ``weight`` and ``rest`` are the bytes of the argument behind the addresses of x, bias and y, and behind those of
    the room for ``sums`` numbers and ``tiles`` counters.
    """

    variant: Variant
    grid: tuple[int, int, int]
    shared: int
    weight: bytes
    rest: bytes
    sums: int
    tiles: int
    buffers: tuple[Tensor, ...]


def product(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    y: Tensor,
    arch: int,
    multiprocessors: int,
    rung: str | None = None,
    limits: Limits | None = None,
    transposed: bool = False,
) -> list[Launch] | None:
    """x [M, K] times the transpose of weight [N, K], plus bias [N] -> ``y`` [M, N], all in x's dtype.

    Args:
        multiprocessors: how many the device has; decides how far K is split.
        rung: one of ``geometry.RUNGS`` instead of the best one.
        limits: what the device has room for; without, what is published of the architecture.
        transposed: the weight is [K, N], as for the gradient of a layer's input; ``rung`` is one of ``gradient.RUNGS``.

    Returns:
        None above the cross-over: dequantise and call ``torch.matmul``.
    """
    if 0 in y.shape:
        return []
    address = x.data_ptr()
    made = product_of(weight, x.dtype, x.shape[0], address % 16 == 0, arch, multiprocessors, rung, limits, transposed)
    return None if made is None else [filled(made, x, address, bias, y)]


def product_of(
    weight: PackedWeight,
    dtype: torch.dtype,
    tokens: int,
    aligned: bool,
    arch: int,
    multiprocessors: int,
    rung: str | None = None,
    limits: Limits | None = None,
    transposed: bool = False,
) -> Product | None:
    """As :func:`product`, but for what a call brings: planned, and packed."""
    shape = shape_of(weight, dtype, tokens, aligned, transposed)
    chosen = (gradient if transposed else geometry).plan(shape, arch, multiprocessors, rung, limits)
    return None if chosen is None else planned_product(weight, dtype, tokens, chosen, transposed)


def shape_of(weight: PackedWeight, dtype: torch.dtype, tokens: int, aligned: bool, transposed: bool = False) -> Shape:
    """The shape of a product with a weight, or with an expert of it, as ``geometry.py`` wants it."""
    nested_blocksize = 0 if weight.nested is None else weight.nested.blocksize
    aligned = aligned and weight.packed.data_ptr() % 16 == 0
    n, k = _sizes(weight, transposed)
    return Shape(DTYPES[dtype], tokens, n, k, weight.blocksize, nested_blocksize, aligned)


def planned_product(
    weight: PackedWeight, dtype: torch.dtype, tokens: int, chosen: Plan, transposed: bool = False
) -> Product:
    """The bytes of a plan's argument that depend on the weight and the number of tokens alone."""
    factor = table_factor(weight.quant_type, dtype) if chosen.rounded else 1.0
    scales, buffers = _scales(weight.absmax, weight.nested, weight.blocksize)
    packed = _pack_product(
        0, 0, 0, tokens, *_sizes(weight, transposed), weight.packed.data_ptr(), weight.code.data_ptr(), *scales, 0, 0,
        chosen.row_warps, chosen.splits, factor, 1 / factor,
    )  # fmt: skip
    return Product(
        chosen.variant, chosen.grid, chosen.shared, packed[24:_ROOM], packed[_ROOM + 16 :], chosen.sums,
        chosen.tiles, (weight.packed, weight.code, *buffers),
    )  # fmt: skip


def _sizes(weight: PackedWeight, transposed: bool) -> tuple[int, int]:
    """N and K, also of an expert; of a weight that is stored as [K, N] if ``transposed``."""
    n, k = weight.shape[-2:]
    return (k, n) if transposed else (n, k)


def filled(
    made: Product,
    x: Tensor,
    x_address: int,
    bias: Tensor | None,
    y: Tensor,
    counters: Callable[[int], int] | None = None,
) -> Launch:
    """The launch of one call: the addresses of its tensors, and room for its sums.

    Args:
        x_address: of x; the caller has asked for it.
        counters: gives the address of so many counters that are zero, or 0 where it has none left; a tensor is made
            for them then.
    """
    variant, grid, shared, weight, rest, sums, tiles, buffers = made
    bias_address, added = (0, ()) if bias is None else (bias.data_ptr(), (bias,))
    partial = arrived = 0
    if sums:
        room = torch.empty(sums, dtype=torch.float32, device=x.device)
        partial, arrived = room.data_ptr(), 0 if counters is None else counters(tiles)
        buffers = (*buffers, room)
        if not arrived:
            zeros = torch.zeros(tiles, dtype=torch.int32, device=x.device)
            arrived, buffers = zeros.data_ptr(), (*buffers, zeros)
    arguments = _fill(x_address, bias_address, y.data_ptr(), weight, partial, arrived, rest)
    # as Launch(...), in one call instead of two
    return tuple.__new__(Launch, (variant, grid, _BLOCK, shared, arguments, (x, y, *buffers, *added)))


# --- what all of them share -----------------------------------------------------------------------------------------


def _scales(absmax: Tensor, nested: Nested | None, blocksize: int) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
    """The fields of ``Scales`` in order, and the tensors they point to."""
    shift = log2(blocksize)
    if nested is None:
        return (absmax.data_ptr(), 0, 0, 0, blocksize, 1, shift, 0), (absmax,)
    fields = (
        nested.absmax.data_ptr(), absmax.data_ptr(), nested.code.data_ptr(), nested.offset.data_ptr(),
        blocksize, nested.blocksize, shift, log2(nested.blocksize),
    )  # fmt: skip
    return fields, (absmax, nested.absmax, nested.code, nested.offset)


def _launch(variant: Variant, ctas: int, arguments: bytes, buffers: tuple[Tensor, ...]) -> Launch:
    return Launch(variant, (min(ctas, _MOST_CTAS), 1, 1), _BLOCK, 0, arguments, buffers)
