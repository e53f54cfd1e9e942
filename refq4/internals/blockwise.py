"""The 8-bit stage: blockwise quantisation, and with it the scales of a 4-bit tensor (double quantisation).

    quantize_blockwise     any tensor -> 8-bit codes, a scale a block          decode_scales   a state's scales in fp32
    dequantize_blockwise   and back                                            slice_state     the state of some rows
    quantize_scales        the scales of a 4-bit tensor -> 8 bits, mean taken off

The first two are public as ``refq4.functional.quantize_blockwise`` and ``dequantize_blockwise``. Like the 4-bit
functions there, they check what they are given, then call an op (``refq4/internals/dispatch.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import layout
from ..codebooks import create_dynamic_map
from ..registry import requested_backend
from ..state import QuantState
from . import dispatch
from .checks import check_blocksize, check_floats, check_positive, warn_caller, write_into
from .format import NESTED_BLOCKSIZE, WEIGHT_DTYPES

__all__ = ["decode_scales", "dequantize_blockwise", "quantize_blockwise", "quantize_scales", "slice_state"]


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
    *,
    backend: str | None = None,
) -> tuple[Tensor, QuantState]:
    """Quantise to 8 bits in blocks; by default with the signed dynamic map. The nearest entry wins, a tie goes down.

    Mirrors ``bitsandbytes.functional.quantize_blockwise``.

    Args:
        A: any shape, fp32, fp16 or bf16.
        code: fp32 [2 to 256] values to choose from; the dynamic map if None.
        absmax, out: filled instead of new tensors.
        blocksize: 32, 64, ..., 4096.
        nested: quantise the scales too.
        backend: overrides the backend in effect for this call.

    Returns:
        (codes uint8 [A.shape], state).

    Raises:
        ValueError, TypeError: as :func:`refq4.functional.quantize_4bit`.

    Example:
        >>> q, state = quantize_blockwise(torch.tensor([1.0, 0.0, -0.5]))
        >>> q.tolist(), float(state.absmax)
        ([255, 127, 35], 1.0)
    """
    check_floats("A", A, WEIGHT_DTYPES)
    check_blocksize(blocksize)
    code = (create_dynamic_map() if code is None else code).to(A.device)
    chosen = requested_backend(backend)
    q, scales = dispatch.quantize_blockwise(A.detach(), code, blocksize, chosen)
    state = QuantState(scales, code=code, blocksize=blocksize, dtype=A.dtype)
    if nested:
        state.absmax, state.offset, state.state2 = quantize_scales(scales, chosen, blocksize=blocksize)
    state.absmax = write_into("absmax", absmax, state.absmax)
    return write_into("out", out, q), state


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Decode 8-bit codes. Mirrors ``bitsandbytes.functional.dequantize_blockwise``.

    Args:
        A: uint8, any shape.
        quant_state: what ``quantize_blockwise`` returned; the other arguments are then ignored.
        absmax, code, blocksize: used without ``quant_state``; the result is then fp32.
        out: written instead of a new tensor.
        nested: has no effect (kept for the signature): the state knows.
        backend: overrides the backend in effect for this call.

    Raises:
        ValueError: neither ``quant_state`` nor ``absmax``, or sizes that don't fit.
        TypeError: A is not uint8.

    Example:
        >>> q, state = quantize_blockwise(torch.tensor([1.0, 0.0, -0.5]))
        >>> [round(v, 4) for v in dequantize_blockwise(q, state).tolist()]
        [1.0, 0.0, -0.5008]
    """
    if quant_state is None:
        if absmax is None:
            raise ValueError("dequantize_blockwise needs a quant_state or absmax")
        code = create_dynamic_map() if code is None else code
        quant_state = QuantState(absmax, code=code.to(A.device), blocksize=blocksize, dtype=torch.float32)
    if quant_state.code is None or quant_state.blocksize is None:
        raise ValueError("this QuantState has no code or no blocksize: make it with quantize_blockwise")
    check_positive("blocksize", quant_state.blocksize)
    chosen = requested_backend(backend)
    scales = decode_scales(quant_state, chosen)
    dtype = quant_state.dtype or torch.float32
    result = dispatch.dequantize_blockwise(A, scales, quant_state.code, quant_state.blocksize, dtype, chosen)
    return write_into("out", out, result)


# --- the scales of a 4-bit tensor ------------------------------------------------------------------------------------


def quantize_scales(
    scales: Tensor, backend: str | None = None, *, blocksize: int = NESTED_BLOCKSIZE, warn: bool = False
) -> tuple[Tensor, Tensor, QuantState]:
    """Double quantisation: scales fp32 [blocks] -> (uint8 [blocks], their mean fp32 [], the 8-bit state).

    Taking the mean off first lets the signed 8-bit map spend its fine steps around the common scale. The mean is
    torch's own fp32 mean, which checkpoints depend on.
    """
    offset = scales.mean() if scales.numel() else scales.new_zeros(())
    if warn and not torch.compiler.is_compiling() and not bool(offset.isfinite()):
        warn_caller(
            "the tensor holds NaN or infinity, and with compress_statistics=True its mean scale does too: every "
            "element will decode to NaN. Without compress_statistics only the blocks concerned would."
        )
    q, state2 = quantize_blockwise(scales - offset, blocksize=blocksize, backend=backend)
    return q, offset, state2


def decode_scales(quant_state: QuantState, backend: str | None = None) -> Tensor:
    """The fp32 scales of a state, double quantisation undone.

    Returns:
        fp32 [blocks]; the state's own tensor where it is not nested.

    Example:
        >>> from refq4.functional import quantize_4bit
        >>> packed, state = quantize_4bit(torch.ones(512, 64), quant_type="nf4", compress_statistics=True)
        >>> state.absmax.dtype, decode_scales(state).unique()
        (torch.uint8, tensor([1.]))
    """
    if quant_state.state2 is None:
        return quant_state.absmax
    if quant_state.offset is None:
        raise ValueError("this QuantState is nested but lacks the offset")
    return dequantize_blockwise(quant_state.absmax, quant_state.state2, backend=backend).float() + quant_state.offset


def slice_state(quant_state: QuantState, start: int, stop: int) -> QuantState | None:
    """The state of elements ``start`` to ``stop`` of the flattened tensor, if they are whole rows and whole blocks.

    Where the cut falls inside a nested block, the piece gets the decoded fp32 scales instead: the same numbers.

    Returns:
        The piece's own state, or None where rows or blocks would be cut.
    """
    shape, blocksize = quant_state.geometry()
    row = shape[1:].numel()
    if not shape or not row or start % row or stop % row or start % blocksize:
        return None
    if stop % blocksize and stop != shape.numel():
        return None
    piece = quant_state.copy()
    piece.shape = torch.Size(((stop - start) // row, *shape[1:]))
    first, last = start // blocksize, layout.block_count(stop, blocksize)
    if piece.state2 is not None:
        blocksize2 = piece.state2.blocksize or NESTED_BLOCKSIZE
        if first % blocksize2:
            piece.absmax = decode_scales(quant_state)
            piece.offset = piece.state2 = None
        else:
            last2 = layout.block_count(last, blocksize2)
            piece.state2.absmax = piece.state2.absmax[first // blocksize2 : last2]
    piece.absmax = piece.absmax[first:last]
    return piece
