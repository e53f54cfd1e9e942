"""Where a call meets a backend: every operand is checked, the backend found, and the trace told.

    matmul.py, autograd.py --> product(op, A, weight, bias, backend), grad_input(grad, weight, backend)
                                 |  as a rule          straight to the backend
                                 '- where something stands between (a compiler, a transform, a wanted gradient)
                                      torch.ops.refq4.<op> --> its kernel, below: the same function

    functional.py, blockwise.py --> quantize_4bit, dequantize_4bit, quantize_blockwise, dequantize_blockwise
                                      torch.ops.refq4.<op> --> its kernel, which is the body

A backend reads its operands by address, so what reaches one is checked here (``refq4/internals/checks.py``). The
argument ``backend`` is a choice ("auto", a name), which ``run_op`` then resolves, or what ``registry.resolve`` found
for the whole call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import registry
from ..backend import Call, PackedWeight
from ..codebooks import code_from_values, get_codebook
from ..registry import Resolved, run_op
from .checks import (
    PLAIN,
    check_blockwise,
    check_code,
    check_memory,
    check_operand,
    check_product,
    check_quantisable,
    check_scales,
    check_target,
    check_weight_memory,
    checked_weight,
)
from .schemas import Weight, implement, implement_on_weight

GRAD_INPUT = "grad_input_4bit"

# --- the product ----------------------------------------------------------------------------------------------------


def product(op: str, A: Tensor, weight: Weight, bias: Tensor | None, backend: str | Resolved) -> Tensor:
    """A [..., K] times the transpose of weight [N, K], plus bias [N] -> [..., N]; ``op`` is gemv_4bit or gemm_4bit.

    The way through torch's dispatcher costs as much as the product of a small layer. Where nothing there would act on
    the call, it goes straight to the backend.
    """
    if _nothing_intercepts(A, bias, backend) and (
        type(weight) is not PackedWeight or not (wants_grad(A) or wants_grad(bias))
    ):
        return _product(op, A, weight, bias, backend)
    return _PRODUCTS[op](A, weight, bias, backend)


def grad_input(grad: Tensor, weight: Weight, backend: str | Resolved) -> Tensor:
    """The gradient of a product's input: grad [..., N] times weight [N, K] -> [..., K].

    An op, so that a compiler keeps its result's rounding: fused with what follows, bf16 would be computed in fp32.
    """
    if isinstance(weight, PackedWeight) and _nothing_intercepts(grad, None, backend) and not wants_grad(grad):
        return _grad_input(grad, weight, backend)
    return _op_of_grad_input(grad, weight, backend)  # type: ignore[arg-type]


def is_deferred() -> bool:
    """Whether a call now is traced, or transformed before it runs: then nothing is resolved and nothing prepared."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state()
    )


def _nothing_intercepts(A: Tensor, bias: Tensor | None, backend: str | Resolved) -> bool:
    return (
        type(A) is Tensor
        and (bias is None or type(bias) in PLAIN)
        and (type(backend) is Resolved or not is_deferred())  # resolved is only what is not deferred
        and not A.is_neg()
        and (bias is None or not bias.is_neg())
        and not torch._C._len_torch_function_stack()
        and not torch.autograd.profiler._is_profiler_enabled
    )


def wants_grad(tensor: Tensor | None) -> bool:
    """Whether a derivative of this operand may be wanted, in reverse or (jvp, jacfwd) in forward mode.

    Forward mode leaves no mark on its tensors that could be read, so inside it every operand counts as wanted.
    """
    if tensor is None:
        return False
    return (tensor.requires_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0


def _product(op: str, A: Tensor, weight: Weight, bias: Tensor | None, backend: str | Resolved) -> Tensor:
    first = weight.packed if type(weight) is PackedWeight else weight.tensors[0]  # type: ignore[union-attr]
    check_product(A, weight.shape, bias, first.device)
    n, k = weight.shape
    if 0 in A.shape or n == 0:
        return _nothing_to_sum(A, n, bias)
    x = check_memory("A", A if A.ndim == 2 else A.reshape(-1, k))
    if bias is not None:
        bias = check_memory("bias", bias)
    if type(weight) is PackedWeight:
        check_weight_memory(weight)
    m = x.shape[0]
    if op == "gemv_4bit" and m != 1:
        raise ValueError(f"gemv_4bit takes one token, A {list(A.shape)} has {m}: use gemm_4bit")

    def call() -> Call:
        kind = (weight.nested is not None,) if isinstance(weight, PackedWeight) else (False, weight.layout)
        return Call(op, A.device.type, A.dtype, m, n, k, weight.blocksize, weight.quant_type, *kind)

    return _as_rows_of(A, run_op(call, backend, op, x, weight, bias), (m, n))


def _as_rows_of(A: Tensor, y: Tensor, wanted: tuple[int, int]) -> Tensor:
    """The product y, ``wanted`` in [M, N], as [..., N] of A [..., K]: a tensor of its own, not a view.

    autograd forbids writing in place to a view that a custom Function returned, and ``ReLU(inplace=True)`` or
    ``y += 1`` after a layer do that. A backend may return a part of what it allocated.
    """
    if y.shape != wanted:
        raise ValueError(f"the backend gave {list(y.shape)} for {list(wanted)}: refq4 verify finds the input")
    fresh = y if y._base is None else y.clone()
    if A.ndim == 2 or (A.ndim == 3 and A.shape[0] == 1):
        return fresh if A.ndim == 2 else fresh.unsqueeze_(0)
    return fresh.contiguous().resize_(*A.shape[:-1], wanted[1])


def _nothing_to_sum(A: Tensor, n: int, bias: Tensor | None) -> Tensor:
    """No tokens, no outputs, or K = 0: an empty result, or the bias. Backends never see such a call."""
    y = A.new_zeros((*A.shape[:-1], n))
    return y if bias is None else y + bias


def _grad_input(grad: Tensor, weight: PackedWeight, backend: str | Resolved) -> Tensor:
    """The backend's own product, or W decoded and multiplied.

    W is decoded again instead of being kept: that is what makes training on a 4-bit weight cheap in memory. It is
    decoded to grad's dtype with a single rounding. On processors on which torch takes tens of times as long for a
    product in half precision, the rounded numbers are multiplied as fp32.
    """
    check_operand("grad", grad, 0, weight.shape, weight.packed.device)
    n, k = weight.shape
    dtype, device, nested = grad.dtype, grad.device.type, weight.nested is not None
    rows = grad.numel() // n if n else 0
    call = Call(GRAD_INPUT, device, dtype, rows, n, k, weight.blocksize, weight.quant_type, nested)
    found = registry.resolve(call, backend) if isinstance(backend, str) else backend
    if rows and k and found.backend.has(GRAD_INPUT) and found.backend.can_run(call) is None:
        grad_y = check_memory("grad", grad.reshape(-1, n))
        check_weight_memory(weight)
        return _as_rows_of(grad, run_op(lambda: call, found, GRAD_INPUT, grad_y, weight), (rows, k))
    within = torch.float32 if device == "cpu" and dtype in _SLOW_ON_CPU else dtype
    return (grad.to(within) @ decode(weight, dtype, found).to(within)).to(dtype)


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


_PRODUCTS = {op: implement_on_weight(op, at=1)(partial(_product, op)) for op in ("gemv_4bit", "gemm_4bit")}
_op_of_grad_input = implement_on_weight(GRAD_INPUT, at=1, check=checked_weight)(_grad_input)


@implement_on_weight("restore_weight", at=0)
def _op_of_restore(weight: Weight, name: str) -> Tensor:
    backend = registry.check_usable(name)
    if isinstance(weight, PackedWeight) or backend is None:
        raise ValueError('restore_weight needs a prepared weight and the name of its backend, which "auto" is not')
    return backend.restore_weight(weight).packed


# --- quantising and decoding ----------------------------------------------------------------------------------------


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
