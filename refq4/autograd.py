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

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .backend import PackedWeight
from .internals import dispatch
from .internals.dispatch import GRAD_INPUT
from .internals.schemas import flatten, library, unflatten
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


def differentiable(op: str, A: Tensor, weight: PackedWeight, bias: Tensor | None, backend: str | Resolved) -> Tensor:
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
    out: Tensor = _Function.apply(op, A, weight, bias, backend)  # type: ignore[no-untyped-call]
    return out


class _Function(torch.autograd.Function):
    """What autograd and torch.func are told of the three ops."""

    @staticmethod
    def forward(op: str, A: Tensor, weight: PackedWeight, bias: Tensor | None, backend: str | Resolved) -> Tensor:
        if op == GRAD_INPUT:
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
    def vmap(info: Any, in_dims: tuple[Any, ...], op: str, A: Tensor, weight: PackedWeight, *rest: Any) -> Any:
        (bias, backend), several = rest, _for_several(op)
        run = lambda A, bias: differentiable(several, A, weight, bias, backend)  # noqa: E731
        return _more_tokens(info.batch_size, A, in_dims[1], bias, in_dims[3], in_dims[2], run)


# torch binds the arguments of each call to forward's signature; to find that takes longer than all the rest of apply
_Function.forward.__signature__ = inspect.signature(_Function.forward)  # type: ignore[attr-defined]


# --- one context, one backward, one rule for vmap -------------------------------------------------------------------


def _remember(ctx: Any, op: str, A: Tensor, weight: PackedWeight, bias: Tensor | None, backend: str | Resolved) -> None:
    flat = flatten(weight)
    tensors = [t for t in flat if isinstance(t, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.flat = [... if isinstance(t, Tensor) else t for t in flat]  # '...' stands for the next of the tensors
    ctx.op, ctx.backend = op, backend
    ctx.bias_dtype = None if bias is None else bias.dtype


def _weight(ctx: Any) -> PackedWeight:
    tensors = iter(ctx.saved_tensors)
    return unflatten(*[next(tensors) if t is ... else t for t in ctx.flat])


def _gradients(ctx: Any, grad: Tensor, needs_A: bool, needs_bias: bool) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the operands; that of a bias [N] sums over all leading dimensions, in bias's dtype."""
    grad_A = grad_bias = None
    if needs_A:
        op = "gemm_4bit" if ctx.op == GRAD_INPUT else GRAD_INPUT
        grad_A = differentiable(op, grad, _weight(ctx), None, ctx.backend)
    if needs_bias:
        leading = tuple(range(grad.dim() - 1))
        grad_bias = grad.sum(leading, dtype=ctx.bias_dtype) if leading else grad.to(ctx.bias_dtype)
    return grad_A, grad_bias


def _for_several(op: str) -> str:
    """The op for a batch of such calls: one token for each entry is several in all."""
    return "gemm_4bit" if op == "gemv_4bit" else op


def _more_tokens(
    batch: int,
    A: Tensor,
    dim_A: int | None,
    bias: Tensor | None,
    dim_bias: int | None,
    dims_of_weight: Any,
    run: Callable[[Tensor, Tensor | None], Tensor],
) -> tuple[Tensor, int]:
    """vmap's rule: a batch dimension is more tokens."""
    if any(d is not None for d in tree_leaves(dims_of_weight)):
        raise NotImplementedError("vmap over quantised weights: loop over them instead, each has its own scales")
    A = A.movedim(dim_A, 0) if dim_A is not None else A.unsqueeze(0).expand(batch, *A.shape)
    if bias is None or dim_bias is None:
        return run(A, bias), 0
    rows = bias.movedim(dim_bias, 0)
    return run(A, None) + rows.view(rows.shape[0], *[1] * (A.dim() - 2), rows.shape[-1]), 0


# --- the same for the ops -------------------------------------------------------------------------------------------


def _register(op: str) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        A, *flat, backend = inputs
        bias = None if op == GRAD_INPUT else flat.pop()
        _remember(ctx, op, A, unflatten(*flat), bias, backend)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_A, *others = ctx.needs_input_grad  # torch appends an argument of its own
        has_bias = op != GRAD_INPUT
        grad_A, grad_bias = _gradients(ctx, grad, needs_A, has_bias and others[10])
        return (grad_A, *[None] * 10, grad_bias, None) if has_bias else (grad_A, *[None] * 10, None)

    def batched(info: Any, in_dims: tuple[Any, ...], A: Tensor, *rest: Any) -> tuple[Tensor, int]:
        *flat, backend = rest
        bias, dim_bias = (None, None) if op == GRAD_INPUT else (flat.pop(), in_dims[-2])
        weight, dims, several = unflatten(*flat), in_dims[1:11], _for_several(op)
        run = lambda A, bias: _Function.forward(several, A, weight, bias, backend)  # noqa: E731
        return _more_tokens(info.batch_size, A, in_dims[0], bias, dim_bias, dims, run)

    torch.library.register_autograd(f"refq4::{op}", backward, setup_context=setup_context, lib=library)
    torch.library.register_vmap(f"refq4::{op}", batched, lib=library)


def _prepared_batched(info: Any, in_dims: tuple[Any, ...], A: Tensor, *rest: Any) -> tuple[Tensor, int]:
    *flat, bias, _, backend = rest
    run = lambda A, bias: torch.ops.refq4.matmul_prepared.default(A, *flat, bias, "gemm_4bit", backend)  # noqa: E731
    return _more_tokens(info.batch_size, A, in_dims[0], bias, in_dims[-3], in_dims[1:-3], run)


for _op in ("gemv_4bit", "gemm_4bit", GRAD_INPUT):
    _register(_op)
torch.library.register_vmap("refq4::matmul_prepared", _prepared_batched, lib=library)
