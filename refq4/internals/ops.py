"""The ops of the 4-bit layer as ``torch.ops.refq4.*``: one place where a call meets a backend.

Each op takes flat tensors and numbers (what the dispatcher understands), finds the backend named by its ``backend``
argument, and hands it the structured form (``refq4.backend``). The backend travels as a plain string, so that
``torch.compile`` and ``torch.export`` see through the op, backward keeps forward's choice, and a compiled function
can be told to use another one.

    functional.gemm ... -> torch.ops.refq4.gemm_4bit(A, packed, absmax, ..., backend="auto")
                             |  fake kernel     shapes only: compile, export
                             |  autograd        grad of A and bias; none for the frozen weight
                             |  vmap            a batch dimension is just more tokens
                             '- real kernel     registry.resolve(Call) -> backend.gemm_4bit

The weight's arguments (``_WEIGHT``) are those of PackedWeight, flattened. Each real kernel checks every operand
(``refq4/internals/checks.py``): a backend reads them by address.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from .. import layout, registry
from ..backend import Backend, Call, Nested, PackedWeight, PreparedWeight
from ..codebooks import code_from_values, get_codebook
from ..trace import OpRecord, current
from .checks import (
    check_blockwise,
    check_code,
    check_memory,
    check_prepared,
    check_product,
    check_quantisable,
    check_target,
    check_weight_memory,
    checked_weight,
)

__all__ = [
    "dequantize_4bit",
    "dequantize_blockwise",
    "matmul",
    "matmul_prepared",
    "quantize_4bit",
    "quantize_blockwise",
    "squared_error",
    "wants_grad",
]

# Library.define and impl: about 3 µs a call on the way through, torch.library.custom_op about 12.
_lib = torch.library.Library("refq4", "DEF")  # type: ignore[no-untyped-call]

_WEIGHT = (
    "Tensor packed, Tensor absmax, Tensor code, int blocksize, SymInt[] shape, str quant_type, "
    "Tensor? absmax2, Tensor? code2, Tensor? offset, int blocksize2"
)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def _define(schema: str, real: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.split("(", 1)[0]
    _lib.define(schema, tags=_TAGS)  # type: ignore[no-untyped-call]
    _lib.impl(name, real, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"refq4::{name}", fake, lib=_lib)


# --- the structured face: what functional.py and autograd.py call ---------------------------------------------------


def quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, allow_nonfinite: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """A [any shape] -> packed uint8 [ceil(numel/2)], absmax fp32 [blocks]."""
    packed, absmax = torch.ops.refq4.quantize_4bit.default(A, blocksize, quant_type, allow_nonfinite, backend)
    return packed, absmax


def dequantize_4bit(weight: PackedWeight, dtype: torch.dtype, backend: str) -> Tensor:
    """-> ``dtype`` [weight.shape]."""
    out: Tensor = torch.ops.refq4.dequantize_4bit.default(*_flatten(weight), dtype, backend)
    return out


def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int, backend: str) -> tuple[Tensor, Tensor]:
    """A [any shape], code fp32 [<= 256] -> codes uint8 [same shape], absmax fp32 [blocks]."""
    q, absmax = torch.ops.refq4.quantize_blockwise.default(A, code, blocksize, backend)
    return q, absmax


def dequantize_blockwise(
    q: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, backend: str
) -> Tensor:
    """Codes uint8 [any shape] -> ``dtype`` [same shape]."""
    out: Tensor = torch.ops.refq4.dequantize_blockwise.default(q, absmax, code, blocksize, dtype, backend)
    return out


def squared_error(weight: PackedWeight, exact: Tensor, backend: str) -> tuple[float, float] | None:
    """exact [weight.shape] -> ``(|exact - W4|², |exact|²)``, or None where the backend that decodes has no such thing.

    Two numbers for a report, which no graph takes part in: no op of torch's.
    """
    nested = weight.nested is not None
    call = _elementwise_call("dequantize_4bit", exact, exact.dtype, weight.blocksize, weight.quant_type, nested)
    if exact.shape != weight.shape:
        raise ValueError(f"W4 has shape {list(weight.shape)}, what it is compared with {list(exact.shape)}")
    found, _ = registry.resolve(call, backend)
    exact = exact.resolve_neg().contiguous()
    check_memory(exact=exact)
    check_weight_memory(weight)
    return found.squared_error(weight, exact)


def matmul(op: str, A: Tensor, weight: PackedWeight, bias: Tensor | None, backend: str) -> Tensor:
    """A [..., K] times the transpose of weight [N, K], plus bias [N] -> [..., N]; ``op`` is gemv_4bit or gemm_4bit.

    The way through torch's dispatcher costs as much as the product of a small layer. Where nothing there would act
    on the call (no gradient, compiler, transform or mode, an ordinary tensor), it goes straight to the backend.
    """
    if _nothing_intercepts(A, bias) and not (wants_grad(A) or wants_grad(bias)):
        return _product(op, A, weight, bias, backend)
    out: Tensor = getattr(torch.ops.refq4, op).default(A, *_flatten(weight), bias, backend)
    return out


def matmul_prepared(A: Tensor, weight: PreparedWeight, bias: Tensor | None) -> Tensor:
    """The same on a backend's own layout, by the backend that made it: gemv_4bit for one token, gemm_4bit for more."""
    if _nothing_intercepts(A, bias):
        return _product_prepared(A, weight, bias)
    out: Tensor = torch.ops.refq4.matmul_prepared.default(
        A, list(weight.tensors), weight.layout, weight.shape, weight.blocksize, weight.quant_type, bias, weight.backend
    )
    return out


_PLAIN = (Tensor, torch.nn.Parameter)


def _nothing_intercepts(A: Tensor, bias: Tensor | None) -> bool:
    return (
        type(A) is Tensor
        and (bias is None or type(bias) in _PLAIN)
        and not torch.compiler.is_compiling()
        and not A.is_neg()
        and (bias is None or not bias.is_neg())
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._functorch.maybe_current_level() is None
        and not torch._C._get_tracing_state()
        and not torch.autograd.profiler._is_profiler_enabled
    )


def wants_grad(tensor: Tensor | None) -> bool:
    """Whether a derivative of this operand may be wanted, in reverse or (jvp, jacfwd) in forward mode.

    Forward mode leaves no mark on its tensors that could be read, so inside it every operand counts as wanted.
    """
    if tensor is None:
        return False
    return (tensor.requires_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0


def _flatten(weight: PackedWeight) -> tuple[Any, ...]:
    nested = weight.nested
    second = (None, None, None, 0) if nested is None else (nested.absmax, nested.code, nested.offset, nested.blocksize)
    return (*weight[:6], *second)


def _unflatten(*flat: Any) -> PackedWeight:
    packed, absmax, code, blocksize, shape, quant_type, absmax2, code2, offset, blocksize2 = flat
    nested = None if absmax2 is None else Nested(absmax2, code2, offset, blocksize2)
    return PackedWeight(packed, absmax, code, blocksize, tuple(shape), quant_type, nested)


# --- real kernels ---------------------------------------------------------------------------------------------------


def _run(call: Call, requested: str, compute: Callable[[Backend], Any]) -> Any:
    """Find the backend, let it compute, tell the trace; an error in the middle says whose it was."""
    backend, passed_over = registry.resolve(call, requested)
    listener = current()
    start = time.perf_counter_ns() if listener is not None else 0
    try:
        result = compute(backend)
    except Exception as error:
        error.add_note(f"raised while backend {backend.name!r} ran {call}")
        raise
    if listener is not None:
        micros = (time.perf_counter_ns() - start) / 1e3
        listener.op(OpRecord(call.op, backend.name, backend.kernel(call), str(call), passed_over, micros))
    return result


def _elementwise_call(op: str, tensor: Tensor, dtype: torch.dtype, blocksize: int, code: str, nested: bool) -> Call:
    return Call(op, tensor.device.type, dtype, 1, 1, tensor.numel(), blocksize, code, nested)


def _quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, allow_nonfinite: bool, backend: str
) -> tuple[Tensor, Tensor]:
    check_quantisable(A, blocksize)
    A = A.contiguous()
    check_memory(A=A)
    call = _elementwise_call("quantize_4bit", A, A.dtype, blocksize, quant_type, False)
    code = get_codebook(quant_type).on(A.device)
    packed, absmax = _run(call, backend, lambda b: b.quantize_4bit(A, code, blocksize))
    if not allow_nonfinite:
        _refuse_nonfinite(absmax, blocksize)
    return packed, absmax


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


def _dequantize_4bit(*args: Any) -> Tensor:
    *flat, dtype, backend = args
    weight = checked_weight(*flat)
    check_weight_memory(weight)
    check_target(dtype)
    numel = torch.Size(weight.shape).numel()
    call = Call(
        "dequantize_4bit",
        weight.packed.device.type,
        dtype,
        1,
        1,
        numel,
        weight.blocksize,
        weight.quant_type,
        weight.nested is not None,
    )
    result: Tensor = _run(call, backend, lambda b: b.dequantize_4bit(weight, dtype))
    return result


def _quantize_blockwise(A: Tensor, code: Tensor, blocksize: int, backend: str) -> tuple[Tensor, Tensor]:
    check_quantisable(A, blocksize)
    check_code(code, A.device)
    A = A.contiguous()
    check_memory(A=A, code=code)
    call = _elementwise_call("quantize_blockwise", A, A.dtype, blocksize, f"{code.numel()} values", False)
    rule = code_from_values(code)
    q, absmax = _run(call, backend, lambda b: b.quantize_blockwise(A, rule, blocksize))
    return q, absmax


def _dequantize_blockwise(
    q: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, backend: str
) -> Tensor:
    q, absmax, code = q.contiguous(), absmax.contiguous(), code.contiguous()
    check_memory(codes=q, absmax=absmax, code=code)
    check_blockwise(q, absmax, code, blocksize)
    check_target(dtype)
    call = _elementwise_call("dequantize_blockwise", q, dtype, blocksize, f"{code.numel()} values", False)
    result: Tensor = _run(
        call,
        backend,
        lambda b: b.dequantize_blockwise(q, absmax, code, blocksize, dtype),
    )
    return result


def _matmul(op: str) -> Callable[..., Tensor]:
    def real(A: Tensor, *args: Any) -> Tensor:
        *flat, bias, backend = args
        return _product(op, A, checked_weight(*flat), bias, backend)

    return real


def _product(op: str, A: Tensor, weight: PackedWeight, bias: Tensor | None, backend: str) -> Tensor:
    check_product(A, weight.shape, bias, weight.packed.device)
    n, k = weight.shape
    if A.numel() == 0 or n == 0:
        return _nothing_to_sum(A, n, bias)
    x, bias = _rows(A, k), bias if bias is None else bias.contiguous()
    check_memory(A=x, bias=bias)
    check_weight_memory(weight)
    if op == "gemv_4bit" and x.shape[0] != 1:
        raise ValueError(f"gemv_4bit takes one token, A {list(A.shape)} has {x.shape[0]}: use gemm_4bit")
    nested = weight.nested is not None
    call = Call(op, A.device.type, A.dtype, x.shape[0], n, k, weight.blocksize, weight.quant_type, nested)
    return _as_rows_of(A, _run(call, backend, lambda b: getattr(b, op)(x, weight, bias)))


def _matmul_prepared(
    A: Tensor,
    tensors: list[Tensor],
    layout_name: str,
    shape: list[int],
    blocksize: int,
    quant_type: str,
    bias: Tensor | None,
    backend: str,
) -> Tensor:
    n, k = check_prepared(tensors, layout_name, shape, blocksize)
    prepared = PreparedWeight(backend, layout_name, tuple(tensors), (n, k), blocksize, quant_type)
    return _product_prepared(A, prepared, bias)


def _product_prepared(A: Tensor, weight: PreparedWeight, bias: Tensor | None) -> Tensor:
    check_product(A, weight.shape, bias, weight.tensors[0].device)
    n, k = weight.shape
    if A.numel() == 0 or n == 0:
        return _nothing_to_sum(A, n, bias)
    x, bias = _rows(A, k), bias if bias is None else bias.contiguous()
    check_memory(A=x, bias=bias)
    op = "gemv_4bit" if x.shape[0] == 1 else "gemm_4bit"
    call = Call(op, A.device.type, A.dtype, x.shape[0], n, k, weight.blocksize, weight.quant_type, layout=weight.layout)
    return _as_rows_of(A, _run(call, weight.backend, lambda b: getattr(b, op)(x, weight, bias)))


def _rows(A: Tensor, k: int) -> Tensor:
    """A [..., K] as contiguous rows [M, K]."""
    return (A if A.dim() == 2 else A.reshape(-1, k)).contiguous()


def _as_rows_of(A: Tensor, y: Tensor) -> Tensor:
    """The product y [M, N] as [..., N] of A [..., K]: a tensor of its own, not a view.

    autograd forbids writing in place to a view that a custom Function returned, and ``ReLU(inplace=True)`` or
    ``y += 1`` after a layer do that.
    """
    if A.dim() == 2:
        return y
    fresh: Tensor = torch.ops.aten._unsafe_view.default(y, (*A.shape[:-1], y.shape[-1]))
    return fresh


def _nothing_to_sum(A: Tensor, n: int, bias: Tensor | None) -> Tensor:
    """No tokens, no outputs, or K = 0: an empty result, or the bias. Backends never see such a call."""
    y = A.new_zeros((*A.shape[:-1], n))
    return y if bias is None else y + bias


# --- fakes: shapes and dtypes, nothing else -------------------------------------------------------------------------


def _fake_quantize_4bit(A: Tensor, blocksize: int, *_: Any) -> tuple[Tensor, Tensor]:
    packed = A.new_empty(layout.packed_bytes(A.numel()), dtype=torch.uint8)
    return packed, A.new_empty(layout.block_count(A.numel(), blocksize), dtype=torch.float32)


def _fake_dequantize_4bit(packed: Tensor, *args: Any) -> Tensor:
    shape, dtype = args[3], args[-2]
    return packed.new_empty(shape, dtype=dtype)


def _fake_quantize_blockwise(A: Tensor, code: Tensor, blocksize: int, backend: str) -> tuple[Tensor, Tensor]:
    blocks = layout.block_count(A.numel(), blocksize)
    return A.new_empty(A.shape, dtype=torch.uint8), A.new_empty(blocks, dtype=torch.float32)


def _fake_dequantize_blockwise(
    q: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, backend: str
) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype)


def _fake_matmul(A: Tensor, *args: Any) -> Tensor:
    shape = args[4]
    return A.new_empty((*A.shape[:-1], shape[0]))


def _fake_matmul_prepared(A: Tensor, tensors: list[Tensor], layout_name: str, shape: list[int], *_: Any) -> Tensor:
    return A.new_empty((*A.shape[:-1], shape[0]))


_define(
    "quantize_4bit(Tensor A, int blocksize, str quant_type, bool allow_nonfinite, str backend) -> (Tensor, Tensor)",
    _quantize_4bit,
    _fake_quantize_4bit,
)
_define(f"dequantize_4bit({_WEIGHT}, ScalarType dtype, str backend) -> Tensor", _dequantize_4bit, _fake_dequantize_4bit)
_define(
    "quantize_blockwise(Tensor A, Tensor code, int blocksize, str backend) -> (Tensor, Tensor)",
    _quantize_blockwise,
    _fake_quantize_blockwise,
)
_define(
    "dequantize_blockwise(Tensor q, Tensor absmax, Tensor code, int blocksize, ScalarType dtype, str backend) "
    "-> Tensor",
    _dequantize_blockwise,
    _fake_dequantize_blockwise,
)
for _op in ("gemv_4bit", "gemm_4bit"):
    _define(f"{_op}(Tensor A, {_WEIGHT}, Tensor? bias, str backend) -> Tensor", _matmul(_op), _fake_matmul)
_define(
    "matmul_prepared(Tensor A, Tensor[] tensors, str layout, SymInt[] shape, int blocksize, str quant_type, "
    "Tensor? bias, str backend) -> Tensor",
    _matmul_prepared,
    _fake_matmul_prepared,
)


# --- autograd and vmap for the products -----------------------------------------------------------------------------


def matmul_backward(
    grad_output: Tensor, weight: PackedWeight, backend: str, needs_A: bool, bias_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``A @ W.t() + bias``: grad_A [..., K] = grad_output [..., N] @ W, grad_bias [N] = its sum.

    W is decoded again instead of being kept: that is what makes training on a 4-bit weight cheap in memory. It is
    decoded to grad_output's dtype with a single rounding. On processors on which torch takes tens of times as long for
    a product in half precision, the rounded numbers are multiplied as fp32. The sum runs over all leading dimensions in
    bias's dtype.

    Returns:
        (grad_A or None, grad_bias or None).
    """
    grad_A = grad_bias = None
    if bias_dtype is not None:
        leading = tuple(range(grad_output.dim() - 1))
        grad_bias = grad_output.sum(leading, dtype=bias_dtype) if leading else grad_output.to(bias_dtype)
    if needs_A:
        dtype = grad_output.dtype
        within = torch.float32 if _slow_on_cpu(grad_output) else dtype
        grad_A = (grad_output.to(within) @ dequantize_4bit(weight, dtype, backend).to(within)).to(dtype)
    return grad_A, grad_bias


def _slow_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in _SLOW_ON_CPU


def _dtypes_without_cpu_products() -> tuple[torch.dtype, ...]:
    """The half precisions that oneDNN can't multiply here; what torch does instead is a plain loop."""
    # Other processors than x86 have products of their own, or none.
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return ()
    fast = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return tuple(dtype for dtype, supported in fast.items() if not supported)


_SLOW_ON_CPU = _dtypes_without_cpu_products()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *flat, bias, backend = inputs
    ctx.save_for_backward(*[t for t in flat if isinstance(t, Tensor)])
    ctx.flat = [None if isinstance(t, Tensor) else t for t in flat]
    ctx.tensor_at = [i for i, t in enumerate(flat) if isinstance(t, Tensor)]
    needs_bias = ctx.needs_input_grad[1 + len(flat)]  # from the front: torch appends an argument of its own
    ctx.bias_dtype = bias.dtype if needs_bias else None
    ctx.backend = backend


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    flat = list(ctx.flat)
    for i, tensor in zip(ctx.tensor_at, ctx.saved_tensors, strict=True):
        flat[i] = tensor
    needs_A = ctx.needs_input_grad[0]
    grad_A, grad_bias = matmul_backward(grad_output, _unflatten(*flat), ctx.backend, needs_A, ctx.bias_dtype)
    return (grad_A, *[None] * len(flat), grad_bias, None)


def _vmap(run: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """A batch dimension is more tokens; ``run`` is an op whose arguments are A, the weight's, bias and backend."""

    def batched(info: Any, in_dims: tuple[int | None, ...], A: Tensor, *args: Any) -> tuple[Tensor, int]:
        *flat, bias, backend = args
        _, *flat_dims, bias_dim, _ = in_dims
        if any(d is not None for d in tree_leaves(flat_dims)):
            raise NotImplementedError("vmap over quantised weights: loop over them instead, each has its own scales")
        A = A.movedim(in_dims[0], 0) if in_dims[0] is not None else A.unsqueeze(0).expand(info.batch_size, *A.shape)
        if bias_dim is None:
            return run(A, *flat, bias, backend), 0
        bias = bias.movedim(bias_dim, 0)
        return run(A, *flat, None, backend) + bias.view(-1, *[1] * (A.dim() - 2), bias.shape[-1]), 0

    return batched


for _op in ("gemv_4bit", "gemm_4bit"):
    torch.library.register_autograd(f"refq4::{_op}", _backward, setup_context=_setup_context, lib=_lib)
    # one token per batch entry is several tokens in all
    torch.library.register_vmap(f"refq4::{_op}", _vmap(torch.ops.refq4.gemm_4bit.default), lib=_lib)
torch.library.register_vmap("refq4::matmul_prepared", _vmap(torch.ops.refq4.matmul_prepared.default), lib=_lib)
