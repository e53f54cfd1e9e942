"""The functions of the 4-bit layer, under the names and signatures they have in ``bitsandbytes.functional``.

    quantise  here                             quantize_4bit, quantize_nf4, quantize_fp4
    and back                                   dequantize_4bit, dequantize_nf4, dequantize_fp4, get_4bit_type
    8 bits    refq4/internals/blockwise.py     quantize_blockwise, dequantize_blockwise: for the scales
    multiply  refq4/matmul.py                  matmul_4bit, gemv_4bit, choose_path
    tables    refq4/codebooks.py               create_normal_map, create_fp4_map, create_dynamic_map
    state     refq4/state.py                   QuantState

Each has the same parameters, defaults and errors as there. Each checks its arguments (once, here: backends don't check
them), then calls an op (``refq4/internals/dispatch.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import layout
from .codebooks import create_dynamic_map, create_fp4_map, create_normal_map, get_codebook
from .internals import dispatch
from .internals.blockwise import dequantize_blockwise, quantize_blockwise, quantize_scales
from .internals.checks import check_blocksize, check_floats, check_storage, write_into
from .internals.format import WEIGHT_DTYPES
from .matmul import choose_path, gemv_4bit, matmul_4bit
from .registry import requested_backend
from .state import QuantState

__all__ = [
    "QuantState",
    "choose_path",
    "create_dynamic_map",
    "create_fp4_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "matmul_4bit",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
]

DEFAULT_BLOCKSIZE = 64


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
    *,
    backend: str | None = None,
    allow_nonfinite: bool = False,
    scales: str = "absmax",
    importance: Tensor | None = None,
) -> tuple[Tensor, QuantState]:
    """Quantise a tensor to 4 bits an element, in blocks that share a scale.

    Mirrors ``bitsandbytes.functional.quantize_4bit``; QLoRA (Dettmers et al. 2023), section 3.

    Args:
        A: any shape, fp32, fp16 or bf16; read as one flat row-major sequence. Not modified.
        absmax: fp32 [blocks] (uint8 [blocks] with ``compress_statistics``) to be filled and used in the state.
        out: the packed result is written here instead of into a new tensor.
        blocksize: elements per block: 32, 64, ..., 4096; 64 if None. The last block may be short.
        compress_statistics: also quantise the scales: their mean is subtracted and kept as ``offset``, the rest is
            stored in 8 bits in blocks of 256. The scales then take 0.127 bits per weight instead of 0.5 (blocksize 64).
        quant_type: a codebook's name: "nf4", "fp4", or any registered one.
        quant_storage: dtype the packed bytes are stored under: uint8, bf16, fp16 or fp32.
        backend: overrides the backend in effect for this call.
        allow_nonfinite: quantise a tensor even if it has NaN or infinities: their block decodes to NaN, and with
            ``compress_statistics`` the whole tensor does (a warning says so).
        scales: "absmax" uses each block's largest magnitude, as bitsandbytes does; "search" uses the scale with the
            smallest squared error (``refq4/internals/scale_search.py``). The format is the same: any reader decodes it.
        importance: [K], for ``scales="search"`` and A [..., K]: the weight of an error in each column, such as the mean
            square of the activation that the column is multiplied by. All columns have the same weight if None.

    Returns:
        (packed, state): packed [ceil(numel/2 / itemsize), 1] in ``quant_storage``.

    Raises:
        ValueError: unknown quant_type, blocksize, storage dtype or scales; NaN or infinity in A; ``out``, ``absmax`` or
            ``importance`` that don't fit.
        TypeError: A is not an fp32, fp16 or bf16 tensor.

    Example:
        >>> packed, state = quantize_4bit(torch.linspace(-1, 1, 64).view(1, 64), quant_type="nf4")
        >>> packed.shape, float(state.absmax)
        (torch.Size([32, 1]), 1.0)
    """
    check_floats("A", A, WEIGHT_DTYPES)
    blocksize = check_blocksize(blocksize if blocksize is not None else DEFAULT_BLOCKSIZE)
    book = get_codebook(quant_type)
    check_storage(quant_storage)
    chosen = requested_backend(backend)
    A = A.detach()

    packed, found = dispatch.quantize_4bit(A, blocksize, book.name, allow_nonfinite, chosen)
    if scales != "absmax" or importance is not None:
        from .internals.scale_search import search_scales  # of no use to a layer that is only loaded and called

        found = search_scales(A, found, blocksize, book.name, chosen, scales, importance)
        packed, _ = dispatch.quantize_4bit(A, blocksize, book.name, allow_nonfinite, chosen, absmax=found)
    stored = layout.to_storage(packed, quant_storage)
    code = get_4bit_type(book.name, device=A.device)
    state = QuantState(found, A.shape, code, blocksize, book.name, A.dtype)
    if compress_statistics:
        state.absmax, state.offset, state.state2 = quantize_scales(found, chosen, warn=allow_nonfinite)
    state.absmax = write_into("absmax", absmax, state.absmax)
    return write_into("out", out, stored), state


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
    *,
    backend: str | None = None,
) -> Tensor:
    """Decode a packed tensor: ``code[i] * absmax`` in fp32, rounded once to the target dtype.

    Mirrors ``bitsandbytes.functional.dequantize_4bit``: as there, a packed *row* ([1, b], the transpose of the
    column that ``quantize_4bit`` returns) is decoded to the transposed tensor.

    Args:
        A: the packed tensor, any storage dtype.
        quant_state: what ``quantize_4bit`` returned; its dtype is the target dtype.
        absmax: fp32 [blocks], when there is no ``quant_state``; then ``out`` gives shape and dtype.
        out: written instead of a new tensor; contiguous, of the state's shape and dtype.
        blocksize: used without ``quant_state``; 64 if None.
        quant_type: used without ``quant_state``.
        backend: overrides the backend in effect for this call.

    Returns:
        A tensor of the state's shape and dtype.

    Raises:
        ValueError: neither a ``quant_state`` nor ``absmax`` and ``out``; or sizes that don't fit together.

    Example:
        >>> packed, state = quantize_4bit(torch.tensor([[1.0, -0.5, 0.0, 0.25]]), quant_type="nf4")
        >>> dequantize_4bit(packed, state)
        tensor([[ 1.0000, -0.5251,  0.0000,  0.2461]])
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("dequantize_4bit needs a quant_state, or absmax and out together")
        blocksize = check_blocksize(blocksize if blocksize is not None else DEFAULT_BLOCKSIZE)
        code = get_4bit_type(get_codebook(quant_type).name, device=A.device)
        quant_state = QuantState(absmax, out.shape, code, blocksize, quant_type, out.dtype)
    weight, dtype = quant_state.packed_weight(A), quant_state.dtype or torch.float32
    result = write_into("out", out, dispatch.dequantize_4bit(weight, dtype, requested_backend(backend)))
    is_row = A.dim() == 2 and A.shape[0] == 1 and A.shape[1] > 1
    return result.t() if is_row and result.dim() == 2 else result


def quantize_nf4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
    *,
    backend: str | None = None,
) -> tuple[Tensor, QuantState]:
    """:func:`quantize_4bit` with ``quant_type="nf4"``.

    Example:
        >>> quantize_nf4(torch.ones(2))[0].tolist()
        [[255]]
    """
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage, backend=backend)


def quantize_fp4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
    *,
    backend: str | None = None,
) -> tuple[Tensor, QuantState]:
    """:func:`quantize_4bit` with ``quant_type="fp4"``.

    Example:
        >>> quantize_fp4(torch.ones(2))[0].tolist()
        [[51]]
    """
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage, backend=backend)


def dequantize_nf4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """:func:`dequantize_4bit` with ``quant_type="nf4"``.

    Example:
        >>> dequantize_nf4(*quantize_nf4(torch.ones(2)))
        tensor([1., 1.])
    """
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4", backend=backend)


def dequantize_fp4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """:func:`dequantize_4bit` with ``quant_type="fp4"``.

    Example:
        >>> dequantize_fp4(*quantize_fp4(torch.ones(2)))
        tensor([1., 1.])
    """
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4", backend=backend)


def get_4bit_type(
    typename: str, device: torch.device | str | None = None, blocksize: int = DEFAULT_BLOCKSIZE
) -> Tensor:
    """Return the 16 values of a codebook as a new fp32 tensor. Mirrors ``bitsandbytes.functional.get_4bit_type``.

    Args:
        typename: a codebook's name.
        device: the CPU if None (bitsandbytes: "cuda").
        blocksize: "af4" exists for blocks of 64 only.

    Raises:
        NotImplementedError: no such type, as in bitsandbytes; or "af4" with another blocksize.

    Example:
        >>> get_4bit_type("nf4")[[0, 7, 15]]
        tensor([-1.,  0.,  1.])
    """
    try:
        book = get_codebook(typename)
    except ValueError as error:
        raise NotImplementedError(str(error)) from None
    if typename == "af4" and blocksize != DEFAULT_BLOCKSIZE:
        raise NotImplementedError(f"af4's values are optimal for blocks of {DEFAULT_BLOCKSIZE}, not of {blocksize}")
    return torch.tensor(book.values, dtype=torch.float32, device=device)
