"""The reference backend: each op as a plain PyTorch function. It is slow, and the baseline for all others.

All code is simple, except that long tensors are processed in chunks, so that quantising a large matrix never needs
more than a few megabytes of intermediates. It runs on any device and in any dtype PyTorch computes in;
fp64 activations take the *exact path* (weights decoded in fp32, products in fp64), which gradient checks use.

It is registered the way a third party's backend would be: by an entry point in ``pyproject.toml``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import layout
from .backend import Backend, BackendUnsupportedError, Call, Nested, PackedWeight, PreparedWeight
from .codebooks import Code

CHUNK = 1 << 20  # elements worked on at a time


class ReferenceBackend(Backend):
    """Pure PyTorch, every op, every device."""

    name = "reference"
    priority = 0
    dtypes = (*Backend.dtypes, torch.float64)
    description = "pure PyTorch: slow and plain, the baseline for all others"

    def wrong_device(self, call: Call) -> str | None:
        return None if call.device != "meta" else "meta tensors hold no values"

    def kernel(self, call: Call) -> str:
        return {"gemv_4bit": "dequantize + linear", "gemm_4bit": "dequantize + linear"}.get(call.op, "PyTorch")

    def quantize_4bit(
        self, A: Tensor, code: Code, blocksize: int, absmax: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        codes, absmax = self._quantize(A.reshape(-1), code, blocksize, absmax)
        return layout.pack(codes, pad_code=code.zero_code()), absmax

    def dequantize_4bit(self, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        numel = torch.Size(weight.shape).numel()
        codes = layout.unpack(weight.packed, numel)
        absmax = nested_absmax(weight.absmax, weight.nested) if weight.nested else weight.absmax
        flat = self.dequantize_blockwise(codes, absmax, weight.code, weight.blocksize, dtype)
        return flat.reshape(weight.shape)

    def quantize_blockwise(self, A: Tensor, code: Code, blocksize: int) -> tuple[Tensor, Tensor]:
        return self._quantize(A, code, blocksize, None)

    def _quantize(self, A: Tensor, code: Code, blocksize: int, absmax: Tensor | None) -> tuple[Tensor, Tensor]:
        flat = A.reshape(-1)
        codes = torch.empty(flat.numel(), dtype=torch.uint8, device=A.device)
        scales = torch.empty(layout.block_count(flat.numel(), blocksize), dtype=torch.float32, device=A.device)
        for elements, blocks in _chunks(flat.numel(), blocksize):
            x = flat[elements].float().view(scales[blocks].numel(), -1)
            scales[blocks] = x.abs().amax(dim=1) if absmax is None else absmax[blocks]
            codes[elements] = code.order[_rank(_scale(x, scales[blocks]), code.thresholds)].view(-1)
        return codes.view(A.shape), scales

    def dequantize_blockwise(
        self, q: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
    ) -> Tensor:
        flat = q.reshape(-1)
        out = torch.empty(flat.numel(), dtype=dtype, device=q.device)
        for elements, blocks in _chunks(flat.numel(), blocksize):
            values = code[flat[elements].int()].view(absmax[blocks].numel(), -1)
            out[elements] = (values * absmax[blocks].unsqueeze(1)).view(-1).to(dtype)
        return out.view(q.shape)

    def gemv_4bit(self, x: Tensor, weight: PackedWeight | PreparedWeight, bias: Tensor | None) -> Tensor:
        return self.gemm_4bit(x, weight, bias)

    def gemm_4bit(self, x: Tensor, weight: PackedWeight | PreparedWeight, bias: Tensor | None) -> Tensor:
        if isinstance(weight, PreparedWeight):
            raise BackendUnsupportedError(f"the reference reads the canonical layout only, not {weight.layout!r}")
        return torch.nn.functional.linear(x, self.dequantize_4bit(weight, x.dtype), bias)


def nested_absmax(q: Tensor, nested: Nested) -> Tensor:
    """Undo double quantisation: code[q[i]] * absmax[i // blocksize] + offset, each operation rounded to fp32.

    The offset is added to all scales, so the scale of a block much smaller than the mean can be slightly negative.
    bitsandbytes decodes such a checkpoint in the same way.

    Args:
        q: uint8 [blocks].

    Returns:
        fp32 [blocks].
    """
    return ReferenceBackend().dequantize_blockwise(
        q, nested.absmax, nested.code, nested.blocksize, torch.float32
    ) + nested.offset.to(torch.float32)


def _chunks(numel: int, blocksize: int) -> Iterator[tuple[slice, slice]]:
    """Pairs (elements, blocks) that cover a flat tensor: runs of whole blocks, then the short block if there is one."""
    whole = numel - numel % blocksize
    step = max(CHUNK // blocksize, 1) * blocksize
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        yield slice(start, stop), slice(start // blocksize, stop // blocksize)
    if whole != numel:
        yield slice(whole, numel), slice(whole // blocksize, whole // blocksize + 1)


def _scale(x: Tensor, absmax: Tensor) -> Tensor:
    """Each row of x brought into [-1, 1]: clamp(x * (1/absmax), -1, 1).

    A row of zeros (or so near zero that 1/absmax overflows) becomes zeros instead of NaN or infinities.
    """
    inverse = 1.0 / absmax
    inverse = torch.where(inverse.isfinite(), inverse, torch.zeros_like(inverse))
    return (x * inverse.unsqueeze(1)).clamp_(-1.0, 1.0)


def _rank(scaled: Tensor, thresholds: Tensor) -> Tensor:
    """How many thresholds lie below each number; none below a NaN."""
    scaled = torch.where(scaled.isnan(), thresholds[0], scaled)
    return torch.bucketize(scaled, thresholds, out_int32=True)
