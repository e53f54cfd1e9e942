"""MatMul4Bit: a linear layer that is differentiable in its input and bias, and frozen in its 4-bit weight.

    forward     y = A @ W.t() + bias            W decoded from 4 bits for the call, then dropped
    backward    grad_A    = grad_y @ W          W decoded a second time
                grad_bias = sum of grad_y over all leading dimensions
                grad_W    : none. The weight is frozen; QLoRA trains adapters beside it

Mirrors ``bitsandbytes.autograd._functions.MatMul4Bit`` (0.49.1). Its own grad_bias sums over the first dimension and
leaves the others to autograd, which reduces a gradient to its input's shape; for a 1-D input that fails.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .internals import ops
from .registry import requested_backend
from .state import QuantState

__all__ = ["MatMul4Bit"]


class MatMul4Bit(torch.autograd.Function):
    """``MatMul4Bit.apply(A, B, out, bias, quant_state)``: the differentiable path of :func:`refq4.matmul_4bit`.

    Args (to ``apply``):
        A: [..., K], fp32, fp16, bf16, or fp64 (the exact path).
        B: the packed weight in any storage dtype and orientation, of a tensor [N, K].
        out: must be None: a result that autograd tracks can't be written into given memory.
        bias: [N] in A's dtype, or None.
        quant_state: the QuantState of B.
        backend: the choice of backend; by default the one in effect. Backward keeps it.

    Example:
        >>> import torch, refq4
        >>> B, state = refq4.functional.quantize_4bit(torch.randn(8, 64), quant_type="nf4")
        >>> A = torch.randn(2, 64, requires_grad=True)
        >>> refq4.autograd.MatMul4Bit.apply(A, B, None, None, state).sum().backward()
        >>> A.grad.shape
        torch.Size([2, 64])
    """

    @staticmethod
    def forward(
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        quant_state: QuantState | None = None,
        backend: str | None = None,
    ) -> Tensor:
        if quant_state is None:
            raise ValueError("MatMul4Bit needs the quant_state that quantize_4bit returned with the weight")
        if out is not None:
            raise ValueError("out= can't be combined with a differentiable result; copy the result where it is wanted")
        return ops.matmul("gemm_4bit", A, quant_state.packed_weight(B), bias, requested_backend(backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, B, _, bias, quant_state, backend = (*inputs, None)[:6]  # without a state there was an error
        ctx.save_for_backward(B)
        ctx.save_for_forward(B)
        ctx.quant_state = quant_state
        ctx.backend = requested_backend(backend)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.inputs = len(inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        (B,) = ctx.saved_tensors
        grad_A, grad_bias = ops.matmul_backward(
            grad_output,
            ctx.quant_state.packed_weight(B),
            ctx.backend,
            ctx.needs_input_grad[0],
            ctx.bias_dtype if ctx.needs_input_grad[3] else None,
        )
        return (grad_A, None, None, grad_bias, None, None)[: ctx.inputs]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        tangent_A, tangent_bias = tangents[0], tangents[3]  # torch fills in zeros; none only for an operand not there
        assert tangent_A is not None
        (B,) = ctx.saved_tensors
        weight = ctx.quant_state.packed_weight(B)
        result = tangent_A @ ops.dequantize_4bit(weight, tangent_A.dtype, ctx.backend).t()
        return result if tangent_bias is None else result + tangent_bias

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        quant_state: QuantState | None = None,
        backend: str | None = None,
    ) -> tuple[Tensor, int]:
        dim_A, dim_B, _, dim_bias, *_ = in_dims
        if dim_B is not None:
            raise NotImplementedError("vmap over quantised weights: loop over them instead, each has its own scales")
        A = A.movedim(dim_A, 0) if dim_A is not None else A.unsqueeze(0).expand(info.batch_size, *A.shape)
        fused = bias if dim_bias is None else None
        y: Tensor = MatMul4Bit.apply(A, B, out, fused, quant_state, backend)  # type: ignore[no-untyped-call]
        if bias is not None and dim_bias is not None:
            rows = bias.movedim(dim_bias, 0)
            y = y + rows.view(rows.shape[0], *[1] * (A.dim() - 2), rows.shape[-1])
        return y, 0
