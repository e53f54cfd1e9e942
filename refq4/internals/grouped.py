"""The grouped product: every row of x times the 4-bit weight of its own expert, as a mixture of experts needs it.

    x        [T, K]     rows sorted by expert             | e0 e0 e0 | e2 | e5 e5 |
    offsets  [E + 1]    the rows of expert e               0          3 3  4 4 4  6
    weight   [E, N, K]  quantised as one flat tensor, as bitsandbytes stores a parametrised parameter
                        (or [E, K, N], "transposed": gpt-oss stores its experts so)

A backend that has ``grouped_gemm_4bit`` takes it in one call. For any other it is one product for each expert that has
rows, on that expert's part of the bytes; where blocks straddle experts the whole weight is decoded and multiplied.

The gradient of x is a grouped product with the same weight, the other way round: ``transposed`` flipped.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import layout, registry
from ..backend import Call, Nested, PackedWeight, PreparedWeight
from ..registry import Resolved, run_op
from ..state import QuantState
from .checks import (
    ACTIVATION_DTYPES,
    check_device,
    check_floats,
    check_memory,
    check_weight_memory,
)
from .dispatch import decode, grad_input, is_deferred, product, wants_grad
from .format import dtype_name
from .prepared import MOST_RESTORES, Preparable
from .schemas import implement_on_weight, library, unflatten

__all__ = ["grouped_gemm_4bit", "one_expert", "own_layout"]

OP = "grouped_gemm_4bit"


def grouped_gemm_4bit(
    x: Tensor,
    weight: Tensor,
    state: QuantState,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The rows of each expert times that expert's 4-bit weight; differentiable in x and bias.

    Args:
        x: [T, K], fp32, fp16, bf16 or fp64, its rows sorted by expert.
        weight: the packed bytes of all experts.
        state: their QuantState, of shape [E, N, K], or [E, K, N] if ``transposed``.
        offsets: integers [E + 1]: expert e has the rows ``offsets[e]`` to ``offsets[e + 1]``; from 0 to T.
        bias: [E, N] in x's dtype.
        transposed: how the weight is stored.
        backend: overrides the backend in effect for this call.

    Returns:
        [T, N] in x's dtype.

    Raises:
        ValueError: a size or an offset is off.
        TypeError: x is no float tensor.

    Example:
        >>> from refq4.functional import quantize_4bit
        >>> packed, state = quantize_4bit(torch.randn(3, 8, 64), quant_type="nf4")
        >>> grouped_gemm_4bit(torch.randn(5, 64), packed, state, torch.tensor([0, 2, 2, 5])).shape
        torch.Size([5, 8])
    """
    choice = registry.requested_backend(backend)
    if bias is not None and wants_grad(bias):
        expert = torch.searchsorted(offsets, torch.arange(x.shape[0], device=offsets.device), right=True) - 1
        rows = bias[expert.to(bias.device)]
        return grouped_gemm_4bit(x, weight, state, offsets, transposed=transposed, backend=backend) + rows
    bound: tuple[PackedWeight | PreparedWeight, Resolved | str] | None = None
    if isinstance(weight, Preparable) and not transposed and not wants_grad(x) and weight._restores < MOST_RESTORES:
        bound = own_layout(weight, state, x, choice)
    experts, engine = bound or (state.packed_weight(weight), choice)
    if isinstance(engine, Resolved):
        return _grouped(x, experts, bias, offsets, transposed, engine)
    return _op(x, experts, bias, offsets, transposed, engine)


def own_layout(weight: Any, state: QuantState, x: Tensor, choice: str) -> tuple[PreparedWeight, Resolved | str] | None:
    """Give the experts in the backend's own layout, made now if there is none; as for a layer (pipeline.py, step 2).

    With them comes the backend that was found, or its name where the call is traced: the op resolves it then.
    """
    deferred = is_deferred()
    form = weight.form(state, deferred)
    if deferred:
        prepared = form.prepared if form is not None and form.choice == choice else None
        return None if prepared is None else (prepared, prepared.backend)
    # what a form was made of has been checked
    geometry: Any = state.geometry() if form is None else (state.shape, state.blocksize)
    (shape, blocksize), nested = geometry, state.state2 is not None
    engine = registry.resolve(_call(x, shape, blocksize, state.quant_type or "custom", nested), choice)
    if form is None or form.backend is not engine.backend:
        form = weight.prepare(state, engine.backend, choice) if engine.backend.has(OP) else None
    return None if form is None or form.prepared is None else (form.prepared, engine)


# --- the kernel of the op ---------------------------------------------------------------------------------------------


def _grouped(
    x: Tensor,
    weight: PackedWeight | PreparedWeight,
    bias: Tensor | None,
    offsets: Tensor,
    transposed: bool,
    backend: str | Resolved,
) -> Tensor:
    n = _check(x, weight, bias, transposed)
    x, offsets = check_memory("x", x.resolve_neg()), _checked_offsets(offsets, weight.shape[0], x.shape[0])
    if bias is not None:
        bias = check_memory("bias", bias.resolve_neg())
    if isinstance(weight, PackedWeight):
        check_weight_memory(weight)
    if 0 in x.shape or n == 0:
        rows = x.new_zeros(x.shape[0], n)
        return rows if bias is None else rows + bias.repeat_interleave(offsets.diff().to(bias.device), dim=0)
    nested, kind = (
        (weight.nested is not None, "canonical") if isinstance(weight, PackedWeight) else (False, weight.layout)
    )

    def call() -> Call:
        return _call(x, weight.shape, weight.blocksize, weight.quant_type, nested, kind, transposed)

    engine = registry.resolve(call(), backend) if isinstance(backend, str) else backend
    if isinstance(weight, PreparedWeight) or (engine.backend.has(OP) and one_expert(weight, 0) is not None):
        result: Tensor = run_op(call, engine, OP, x, weight, bias, offsets, transposed)
        return result
    return _expert_by_expert(x, weight, bias, offsets, transposed, engine)


def _expert_by_expert(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, offsets: Tensor, transposed: bool, engine: Resolved
) -> Tensor:
    whole = None if one_expert(weight, 0) is not None else decode(weight, x.dtype, engine)
    y = x.new_empty(x.shape[0], weight.shape[2 if transposed else 1])
    bounds: list[int] = offsets.tolist()
    for e, (start, stop) in enumerate(pairwise(bounds)):
        if start == stop:
            continue
        rows, of_expert, out = x[start:stop], None if bias is None else bias[e], y[start:stop]
        part = one_expert(weight, e)
        if part is None:  # bias and product are rounded together, as in every product
            assert whole is not None
            out.copy_(torch.nn.functional.linear(rows, whole[e].T if transposed else whole[e], of_expert))
        elif transposed:
            out.copy_(grad_input(rows, part, engine))
            if of_expert is not None:
                out += of_expert
        else:
            out.copy_(product("gemv_4bit" if stop - start == 1 else "gemm_4bit", rows, part, of_expert, engine))
    return y


def one_expert(weight: PackedWeight, e: int) -> PackedWeight | None:
    """Expert ``e`` of a weight [E, N, K] as a weight [N, K] on the same memory; None where a block straddles experts.

    Example:
        >>> from refq4.functional import quantize_4bit
        >>> packed, state = quantize_4bit(torch.ones(3, 8, 64), quant_type="nf4")
        >>> one_expert(state.packed_weight(packed), 2).packed.shape
        torch.Size([256])
    """
    shape, nested = weight.shape[1:], weight.nested
    numel = shape[0] * shape[1]
    if weight.shape[0] > 1 and (numel % weight.blocksize or numel % 2):  # a block, or a byte
        return None
    blocks = layout.block_count(numel, weight.blocksize)
    if nested is not None:
        if weight.shape[0] > 1 and blocks % nested.blocksize:
            return None
        count = layout.block_count(blocks, nested.blocksize)
        nested = Nested(nested.absmax[e * count : (e + 1) * count], *nested[1:])
    size = layout.packed_bytes(numel)
    packed, absmax = weight.packed[e * size : (e + 1) * size], weight.absmax[e * blocks : (e + 1) * blocks]
    return PackedWeight(packed, absmax, weight.code, weight.blocksize, shape, weight.quant_type, nested)


def _call(
    x: Tensor,
    shape: tuple[int, ...],
    blocksize: int,
    quant_type: str,
    nested: bool,
    layout_name: str = "canonical",
    transposed: bool = False,
) -> Call:
    experts, n, k = shape
    n, k = (k, n) if transposed else (n, k)
    device, grad, others = x.device.type, False, (experts, transposed)
    return Call(OP, device, x.dtype, x.shape[0], n, k, blocksize, quant_type, nested, layout_name, grad, *others)


def _check(x: Tensor, weight: PackedWeight | PreparedWeight, bias: Tensor | None, transposed: bool) -> int:
    """N, if the operands fit; they must, for a backend reads them by address."""
    shape = list(weight.shape)
    if len(shape) != 3:
        raise ValueError(f"a grouped product needs the weight of all experts [E, N, K], this one has shape {shape}")
    n, k = shape[:0:-1] if transposed else shape[1:]
    device = (weight.packed if isinstance(weight, PackedWeight) else weight.tensors[0]).device
    check_floats("x", x, ACTIVATION_DTYPES)
    if x.ndim != 2 or x.shape[1] != k:
        stored = "[E, K, N]" if transposed else "[E, N, K]"
        raise ValueError(f"x has shape {list(x.shape)}, the weight {stored} = {shape} needs [T, {k}]")
    check_device("x", x, device, "the weight")
    if bias is not None and (bias.shape != (shape[0], n) or bias.dtype != x.dtype or bias.device != device):
        raise ValueError(
            f"bias must be {dtype_name(x.dtype)} [E, N] = [{shape[0]}, {n}] on {device}, "
            f"got {dtype_name(bias.dtype)} {list(bias.shape)} on {bias.device}"
        )
    return n


def _checked_offsets(offsets: Tensor, experts: int, rows: int) -> Tensor:
    """int64 [E + 1] on the CPU, rising from 0 to T."""
    if offsets.shape != (experts + 1,) or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"offsets must be int64 [E + 1] = [{experts + 1}], got {dtype_name(offsets.dtype)} {list(offsets.shape)}"
        )
    offsets = offsets.to("cpu", torch.int64).resolve_neg().contiguous()
    bounds = offsets.tolist()  # in Python: the same with tensors takes five operations
    if bounds[0] != 0 or bounds[-1] != rows or bounds != sorted(bounds):
        raise ValueError(f"offsets must rise from 0 to the {rows} rows of x, got {bounds}")
    return offsets


# --- the ops and their gradient ---------------------------------------------------------------------------------------


_op = implement_on_weight(OP, at=1)(_grouped)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, tensors, *ctx.others, _, offsets, transposed, backend = inputs
    ctx.save_for_backward(offsets, *tensors)
    ctx.transposed, ctx.backend = transposed, backend


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    offsets, *tensors = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        weight = unflatten(tensors, *ctx.others, ctx.backend)
        grad_x = _op(grad, weight, None, offsets, not ctx.transposed, ctx.backend)
    return (grad_x, [None] * len(tensors), *[None] * 9)


torch.library.register_autograd(f"refq4::{OP}", _backward, setup_context=_setup_context, lib=library)
