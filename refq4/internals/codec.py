"""Quantising and decoding meet a backend here, in four ops of ``torch.ops.refq4``.

    functional.py, blockwise.py --> quantize_4bit, dequantize_4bit, quantize_blockwise, dequantize_blockwise
                                      '- torch's dispatcher --> the kernel, which is the body: checks, and the backend

The product has a file of its own, ``refq4/internals/dispatch.py``. What is checked, and why, is the same for both:
``refq4/internals/checks.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backend import Call, PackedWeight
from ..codebooks import code_from_values, get_codebook
from ..registry import Resolved, run_op
from .checks import (
    check_blockwise,
    check_code,
    check_memory,
    check_quantisable,
    check_scales,
    check_target,
    check_weight_memory,
    checked_weight,
)
from .schemas import implement, implement_on_weight

__all__ = ["decode", "dequantize_4bit", "dequantize_blockwise", "quantize_4bit", "quantize_blockwise"]


@implement("quantize_4bit")
def quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, allow_nonfinite: bool, backend: str, *, absmax: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A [any shape] -> packed uint8 [ceil(numel/2)], absmax fp32 [blocks]: the largest magnitudes, or those given."""
    check_quantisable(A, blocksize)
    A = check_memory("A", A)
    call = _elementwise("quantize_4bit", A, A.dtype, blocksize, quant_type)
    code = get_codebook(quant_type).on(A.device)
    if absmax is None:
        packed, scales = run_op(call, backend, "quantize_4bit", A, code, blocksize)
    else:
        check_scales(absmax, A.shape, blocksize)
        absmax = check_memory("absmax", absmax)
        from .scale_search import backend_for_scales  # only a search gives any

        found = backend_for_scales(call(), backend)
        packed, scales = run_op(call, found, "quantize_4bit", A, code, blocksize, absmax)
    if not allow_nonfinite:
        _refuse_nonfinite(scales, blocksize)
    return packed, scales


def _refuse_nonfinite(absmax: Tensor, blocksize: int) -> None:
    """A block's absmax is finite exactly when all its elements are, so the scales alone tell."""
    bad = ~absmax.isfinite()
    if bool(bad.any()):
        block = int(bad.nonzero()[0])
        raise ValueError(
            f"the tensor to quantise has a NaN or an infinity: {int(bad.sum())} of {absmax.numel()} blocks of "
            f"{blocksize} hold one, the first is block {block} (elements {block * blocksize} to "
            f"{(block + 1) * blocksize - 1} of the flattened tensor). It would spoil its block, and with double "
            f"quantisation the whole tensor. Clean the tensor, or pass allow_nonfinite=True to quantise it as it is."
        )


def decode(weight: PackedWeight, dtype: torch.dtype, backend: str | Resolved) -> Tensor:
    """-> ``dtype`` [weight.shape]. The kernel of dequantize_4bit, which the gradient of a product calls as well."""
    check_weight_memory(weight)
    check_target(dtype)
    numel, nested, device = torch.Size(weight.shape).numel(), weight.nested is not None, weight.packed.device.type

    def call() -> Call:
        return Call("dequantize_4bit", device, dtype, 1, 1, numel, weight.blocksize, weight.quant_type, nested)

    result: Tensor = run_op(call, backend, "dequantize_4bit", weight, dtype)
    return result


dequantize_4bit = implement_on_weight("dequantize_4bit", at=0, check=checked_weight)(decode)


@implement("quantize_blockwise")
def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int, backend: str) -> tuple[Tensor, Tensor]:
    """A [any shape], code fp32 [<= 256] -> codes uint8 [same shape], absmax fp32 [blocks]."""
    check_quantisable(A, blocksize)
    check_code(code, A.device)
    A, code = check_memory("A", A), check_memory("code", code)
    call = _elementwise("quantize_blockwise", A, A.dtype, blocksize, f"{code.numel()} values")
    q, absmax = run_op(call, backend, "quantize_blockwise", A, code_from_values(code), blocksize)
    return q, absmax


@implement("dequantize_blockwise")
def dequantize_blockwise(
    q: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, backend: str
) -> Tensor:
    """Codes uint8 [any shape] -> ``dtype`` [same shape]."""
    q, absmax, code = check_memory("codes", q), check_memory("absmax", absmax), check_memory("code", code)
    check_blockwise(q, absmax, code, blocksize)
    check_target(dtype)
    call = _elementwise("dequantize_blockwise", q, dtype, blocksize, f"{code.numel()} values")
    result: Tensor = run_op(call, backend, "dequantize_blockwise", q, absmax, code, blocksize, dtype)
    return result


def _elementwise(op: str, tensor: Tensor, dtype: torch.dtype, blocksize: int, code: str) -> Callable[[], Call]:
    return lambda: Call(op, tensor.device.type, dtype, 1, 1, tensor.numel(), blocksize, code)
