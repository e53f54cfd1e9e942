"""The gradient of a linear layer that is differentiable in its input and bias, and frozen in its 4-bit weight.

    forward     y = A @ W.t() + bias            W decoded from 4 bits by the kernel; no decoded weight is kept
    backward    grad_A    = grad_y @ W          W decoded a second time
                grad_bias = sum of grad_y over all leading dimensions
                grad_W    : none. The weight is frozen; QLoRA trains adapters beside it

Most kernels decode a few weights at a time. The reference, and some calls on a GPU, decode all of W to memory for the
length of the call.

Both are linear, so each is the other's gradient: forward's input gets its gradient by ``grad_input_4bit``, and the
gradient of that is a product again. This gives derivatives of any order, in reverse and forward mode.

In PyTorch's eager mode a call goes through a ``torch.autograd.Function``. The ops of ``torch.ops.refq4``, which
compiled graphs are made of, get the same gradient and the same rule for vmap at the end of this file.

Mirrors ``bitsandbytes.autograd._functions.MatMul4Bit`` (0.49.1). Its own grad_bias sums over the first dimension and
leaves the others to autograd, which reduces a gradient to its input's shape; for a 1-D input that fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .internals import dispatch
from .internals.schemas import Weight, flatten, library, unflatten
from .registry import Resolved, requested_backend
from .state import QuantState

__all__ = ["MatMul4Bit", "differentiable"]


class MatMul4Bit:
    """``MatMul4Bit.apply(A, B, out, bias, quant_state)``: the differentiable path of :func:`refq4.matmul_4bit`.

    Example:
        >>> import torch, refq4
        >>> B, state = refq4.functional.quantize_4bit(torch.randn(8, 64), quant_type="nf4")
        >>> A = torch.randn(2, 64, requires_grad=True)
        >>> refq4.autograd.MatMul4Bit.apply(A, B, None, None, state).sum().backward()
        >>> A.grad.shape
        torch.Size([2, 64])
    """

    @staticmethod
    def apply(
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        quant_state: QuantState | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """A [..., K] times the transpose of a packed weight [N, K], plus the bias.

        Args:
            A: [..., K], fp32, fp16, bf16, or fp64 (the exact path).
            B: the packed weight in any storage dtype and orientation, of a tensor [N, K].
            out: must be None: a result that autograd tracks can't be written into an existing tensor.
            bias: [N] in A's dtype, or None.
            quant_state: the QuantState of B.
            backend: the choice of backend; by default the one in effect. Backward keeps it.
        """
        if quant_state is None:
            raise ValueError("MatMul4Bit needs the quant_state that quantize_4bit returned with the weight")
        if out is not None:
            raise ValueError("out= can't be combined with a differentiable result; copy the result where it is wanted")
        return differentiable("gemm_4bit", A, quant_state.packed_weight(B), bias, requested_backend(backend))


def differentiable(op: str, A: Tensor, weight: Weight, bias: Tensor | None, backend: str | Resolved) -> Tensor:
    """``gemv_4bit``, ``gemm_4bit`` or ``grad_input_4bit`` of A, with all its derivatives.

    Example:
        >>> from refq4.functional import quantize_4bit
        >>> B, state = quantize_4bit(torch.eye(64), quant_type="nf4")
        >>> A = torch.ones(2, 64, requires_grad=True)
        >>> y = differentiable("gemm_4bit", A, state.packed_weight(B), None, "reference")
        >>> torch.autograd.grad(y.sum(), A)[0].shape
        torch.Size([2, 64])
    """
    if torch.compiler.is_compiling():  # Dynamo sees through the ops; they have the same gradient
        return _Function.forward(op, A, weight, bias, backend)
    if torch._C._are_functorch_transforms_active():
        return _Function.apply(op, A, weight, bias, backend)  # type: ignore[no-any-return, no-untyped-call]
    # as in autograd.grad(is_grads_batched=True): torch's ops only
    if _is_batched(A) or (bias is not None and _is_batched(bias)):
        W = dispatch.dequantize_4bit(weight, A.dtype, backend)  # type: ignore[arg-type]
        out = A @ (W if op == dispatch.GRAD_INPUT else W.t())
        return out if bias is None else out + bias
    A, bias = _unwrap(A), None if bias is None else _unwrap(bias)
    if not (dispatch.wants_grad(A) or dispatch.wants_grad(bias)):  # as in a backward that nobody differentiates
        return _Function.forward(op, A, weight, bias, backend)
    return _apply(op, A, weight, bias, backend)


class _Function(torch.autograd.Function):
    """What autograd and torch.func are told of the three ops."""

    @staticmethod
    def forward(op: str, A: Tensor, weight: Weight, bias: Tensor | None, backend: str | Resolved) -> Tensor:
        if op == dispatch.GRAD_INPUT:
            return dispatch.grad_input(A, weight, backend)
        return dispatch.product(op, A, weight, bias, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _remember(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_A, grad_bias = _gradients(ctx, grad_outputs[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        return None, grad_A, None, grad_bias, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        _, A, _, bias, _ = tangents  # torch fills in zeros; none only for an operand that is not there
        return differentiable(ctx.op, A, _weight(ctx), bias, ctx.backend)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], op: str, *operands: Any) -> tuple[Tensor, int]:
        return _more_tokens(differentiable, info.batch_size, in_dims[1:], op, *operands)


# What Function.apply does outside of torch.func, less its binding of each call's arguments to forward's signature: that
# takes a hundred Python calls, longer than all the rest. A tensor that outlived a transform still stands for another.
_apply: Callable[..., Tensor] = super(torch.autograd.Function, _Function).apply
_unwrap = torch._C._functorch.unwrap_if_dead
_is_batched = torch._C._functorch.is_legacy_batchedtensor


# --- one context, one backward, one rule for vmap -------------------------------------------------------------------


def _remember(ctx: Any, op: str, A: Tensor, weight: Weight, bias: Tensor | None, backend: str | Resolved) -> None:
    tensors, *ctx.sizes = flatten(weight)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.op, ctx.backend = op, backend
    ctx.bias_dtype = None if bias is None else bias.dtype


def _weight(ctx: Any) -> Weight:
    return unflatten(ctx.saved_tensors, *ctx.sizes, ctx.backend)


def _gradients(ctx: Any, grad: Tensor, needs_A: bool, needs_bias: bool) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the operands; that of a bias [N] sums over all leading dimensions, in bias's dtype."""
    grad_A = grad_bias = None
    if needs_A:
        op = "gemm_4bit" if ctx.op == dispatch.GRAD_INPUT else dispatch.GRAD_INPUT
        grad_A = differentiable(op, grad, _weight(ctx), None, ctx.backend)
    if needs_bias:
        leading = tuple(range(grad.dim() - 1))
        grad_bias = grad.sum(leading, dtype=ctx.bias_dtype) if leading else grad.to(ctx.bias_dtype)
    return grad_A, grad_bias


def _more_tokens(run: Callable[..., Tensor], batch: int, dims: Any, op: str, *operands: Any) -> tuple[Tensor, int]:
    """vmap's rule: a batch dimension is more tokens. ``operands`` are A, weight, bias and backend, ``dims`` theirs."""
    A, weight, bias, backend = operands
    dim_A, *dims_of_weight, dim_bias, _ = dims
    if any(d is not None for d in tree_leaves(dims_of_weight)):
        raise NotImplementedError("vmap over quantised weights: loop over them instead, each has its own scales")
    A = A.movedim(dim_A, 0) if dim_A is not None else A.unsqueeze(0).expand(batch, *A.shape)
    several = "gemm_4bit" if op == "gemv_4bit" else op  # one token for each entry is several in all
    if bias is None or dim_bias is None:
        return run(several, A, weight, bias, backend), 0
    rows = bias.movedim(dim_bias, 0)
    y = run(several, A, weight, None, backend)
    return y + rows.view(batch, *[1] * (A.dim() - 2), rows.shape[-1]), 0


# --- the same for the ops -------------------------------------------------------------------------------------------


def _register(op: str) -> None:
    has_bias = op != dispatch.GRAD_INPUT

    def operands(A: Tensor, *rest: Any) -> tuple[Tensor, Weight, Tensor | None, str]:
        *flat, backend = rest
        bias = flat.pop() if has_bias else None
        return A, unflatten(*flat, backend), bias, backend

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _remember(ctx, op, *operands(*inputs))

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        grad_A, grad_bias = _gradients(ctx, grad, needs[0], has_bias and needs[2 + len(ctx.sizes)])
        of_weight = [None] * len(ctx.saved_tensors), *[None] * len(ctx.sizes)
        return (grad_A, *of_weight, grad_bias, None) if has_bias else (grad_A, *of_weight, None)

    def batched(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        dims = in_dims if has_bias else (*in_dims, None)
        return _more_tokens(_Function.forward, info.batch_size, dims, op, *operands(*inputs))

    torch.library.register_autograd(f"refq4::{op}", backward, setup_context=setup_context, lib=library)
    torch.library.register_vmap(f"refq4::{op}", batched, lib=library)


for _op in ("gemv_4bit", "gemm_4bit", dispatch.GRAD_INPUT):
    _register(_op)
