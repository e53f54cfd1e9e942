"""Activations times a 4-bit weight: which path, and then down it.

matmul_4bit --- choose_path ---+-- gemv_4bit            one token, or a weight in a backend's own layout
                               +-- MatMul4Bit           everything else; differentiable (refq4/autograd.py)
                               '-- dequantize + linear  deprecated: a weight quantised as [K, N]
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd import MatMul4Bit
from .backend import PreparedWeight
from .internals import ops
from .internals.checks import ACTIVATION_DTYPES, check_bias, check_features, check_floats, warn_caller, write_into
from .internals.ops import wants_grad
from .registry import requested_backend
from .state import QuantState
from .trace import Decision, current

PREPARED = Decision("gemv_4bit", "the weight is in the backend's own layout, whose kernels take any number of tokens")
ONE_TOKEN = Decision("gemv_4bit", "a single token, no gradient of it wanted, and K is a multiple of the blocksize")
SEVERAL_TOKENS = Decision("MatMul4Bit", "more than one token")
WANTS_GRADIENT = Decision("MatMul4Bit", "a single token, but its gradient is wanted")
STRADDLING = Decision("MatMul4Bit", "a single token, but K is no multiple of the blocksize: blocks straddle rows")
NOTHING = Decision("MatMul4Bit", "nothing to multiply: no tokens, or K = 0")
FROM_K_BY_N = Decision("dequantize + linear", "deprecated: the weight was quantised as [K, N], not as [N, K]")


def choose_path(A: Tensor, quant_state: QuantState, prepared: bool = False) -> Decision:
    """The path that :func:`matmul_4bit` takes for these operands, and why. Mirrors the ifs of bitsandbytes' own.

    Args:
        A: [..., K].
        quant_state: of the weight.
        prepared: whether the weight is in a backend's own layout.

    Example:
        >>> from refq4.functional import quantize_4bit
        >>> _, state = quantize_4bit(torch.randn(8, 64), quant_type="nf4")
        >>> choose_path(torch.randn(1, 64), state).choice, choose_path(torch.randn(2, 64), state).choice
        ('gemv_4bit', 'MatMul4Bit')
    """
    if prepared:
        return PREPARED
    (n, k), blocksize = quant_state.geometry()
    if A.shape[-1] != k and A.shape[-1] == n:
        return FROM_K_BY_N
    if A.numel() == 0:
        return NOTHING
    if A.numel() != A.shape[-1]:
        return SEVERAL_TOKENS
    if wants_grad(A):
        return WANTS_GRADIENT
    if k % blocksize:
        return STRADDLING
    return ONE_TOKEN


def matmul_4bit(
    A: Tensor,
    B: Tensor,
    quant_state: QuantState,
    out: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
    prepared: PreparedWeight | None = None,
) -> Tensor:
    """Activations times a 4-bit weight: step 6 of the pipeline. Mirrors ``bitsandbytes.matmul_4bit``.

    Args:
        A: [..., K], fp32, fp16, bf16; or fp64, which takes the exact path of the reference backend.
        B: the packed weight of a tensor [N, K], as ``quantize_4bit`` gave it or its ``.t()``: what is [N, K] is said
            by ``quant_state.shape``, not by B.
        quant_state: the QuantState of B.
        out: [..., N], written instead of a new tensor; not together with a wanted gradient.
        bias: [N], any float dtype; cast to A's.
        backend: overrides the backend in effect for this call.
        prepared: the weight in a backend's own layout (step 2); then B is not read.

    Returns:
        [..., N] in A's dtype (under autocast: in autocast's dtype, as ``torch.nn.functional.linear``).

    Raises:
        ValueError: K does not fit the weight, or another size is off.
        TypeError: A is no float tensor.

    Warns:
        DeprecationWarning: the weight was quantised as [K, N].

    Example:
        >>> from refq4.functional import quantize_4bit
        >>> W = torch.randn(8, 64)
        >>> B, state = quantize_4bit(W, quant_type="nf4")
        >>> matmul_4bit(torch.randn(2, 3, 64), B, state).shape
        torch.Size([2, 3, 8])
    """
    # What A must be on a prepared weight, the op checks: twice would cost as much as a small product.
    n, k = shape = _check_matmul(A, quant_state) if prepared is None else torch.Size(prepared.shape)
    if bias is not None:  # it may be added after the product, where its gradient is wanted
        check_bias(bias, k if A.dim() and A.shape[-1] == n != k else n, shape)
    if prepared is not None and wants_grad(A):
        raise ValueError("a weight in a backend's own layout has no gradient: leave prepared= out where one is wanted")
    listener = current()
    A, bias = _autocast(A, bias)
    if prepared is None and (A.dim() == 0 or A.shape[-1] != n):
        check_features(A, shape)
    decision = choose_path(A, quant_state, prepared is not None)
    if out is not None and (wants_grad(A) or wants_grad(bias)):
        raise ValueError("out= can't be combined with a wanted gradient; call under torch.no_grad() or drop out=")
    result = _run_path(decision, A, B, quant_state, bias, backend, prepared)
    result = write_into("out", out, result)
    if listener is not None:
        listener.step(6, "dispatch to matmul_4bit", decision, result)
    return result


def _run_path(
    decision: Decision,
    A: Tensor,
    B: Tensor,
    state: QuantState,
    bias: Tensor | None,
    backend: str | None,
    prepared: PreparedWeight | None,
) -> Tensor:
    if decision is PREPARED or decision is ONE_TOKEN:
        # The bias is fused unless its gradient is wanted: then torch adds it, and differentiates that.
        fused, added = (None, bias) if wants_grad(bias) else (bias, None)
        if prepared is not None:  # by the backend that made it
            result = ops.matmul_prepared(A, prepared, fused)
        else:
            result = ops.matmul("gemv_4bit", A, state.packed_weight(B), fused, requested_backend(backend))
        return result if added is None else result + added
    chosen = requested_backend(backend)
    if decision is FROM_K_BY_N:
        return _matmul_k_by_n(A, B, state, bias, chosen)
    if decision is STRADDLING and not torch.compiler.is_compiling():
        warn_caller(
            f"in_features {A.shape[-1]} is no multiple of the blocksize {state.blocksize}, so a single token takes the "
            f"slower MatMul4Bit path instead of gemv_4bit"
        )
    if torch.compiler.is_compiling():  # the op carries the same gradient, and Dynamo sees through it
        return ops.matmul("gemm_4bit", A, state.packed_weight(B), bias, chosen)
    differentiable: Tensor = MatMul4Bit.apply(A, B, None, bias, state, chosen)  # type: ignore[no-untyped-call]
    return differentiable


def _matmul_k_by_n(A: Tensor, B: Tensor, state: QuantState, bias: Tensor | None, backend: str) -> Tensor:
    if not torch.compiler.is_compiling():
        warn_caller(
            f"the weight was quantised from a [K, N] tensor: quant_state.shape is {list(state.geometry()[0])}, and A "
            f"has K = {A.shape[-1]}. Quantise it as [N, K] = [out_features, in_features]; this will become an error.",
            DeprecationWarning,
        )
    weight = ops.dequantize_4bit(state.packed_weight(B), A.dtype, backend)
    return torch.nn.functional.linear(A, weight.t(), bias)


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """A [..., K] times a packed weight [N, K], without autograd. Mirrors ``bitsandbytes.functional.gemv_4bit``.

    Args:
        A: one token is what it is made for; more run as a GEMM.
        B: the packed weight.
        out: [..., N] in A's dtype, written instead of a new tensor.
        transposed_A, transposed_B: have no effect (kept for the signature).
        state: the QuantState of B.
        backend: overrides the backend in effect for this call.

    Raises:
        ValueError: no ``state``, or sizes that don't fit.

    Example:
        >>> from refq4.functional import quantize_4bit
        >>> B, state = quantize_4bit(torch.randn(8, 64), quant_type="nf4")
        >>> gemv_4bit(torch.randn(1, 64), B, state=state).shape
        torch.Size([1, 8])
    """
    if state is None:
        raise ValueError("gemv_4bit needs state=, the QuantState that quantize_4bit returned with the weight")
    check_features(A, _check_matmul(A, state))
    op = "gemv_4bit" if A.numel() == A.shape[-1] else "gemm_4bit"
    with torch.no_grad():
        return write_into("out", out, ops.matmul(op, A, state.packed_weight(B), None, requested_backend(backend)))


def _check_matmul(A: Tensor, state: QuantState) -> torch.Size:
    """[N, K] of the weight, or an error; the rest is checked with what is computed (refq4/internals/ops.py)."""
    if not isinstance(state, QuantState):
        raise TypeError(f"quant_state must be the QuantState that quantize_4bit returned, got {state!r}")
    shape, _ = state.geometry()
    if len(shape) != 2:
        raise ValueError(f"a product wants a weight of two dimensions [N, K], this one has shape {list(shape)}")
    check_floats("A", A, ACTIVATION_DTYPES)
    if A.device != state.absmax.device:
        raise ValueError(
            f"A is on {A.device}, the weight's quant_state on {state.absmax.device}: move one (layer.to(device))"
        )
    return shape


def _autocast(A: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Operands in autocast's dtype where it is on (fp64 is left alone, as by torch), bias in A's dtype."""
    kind = A.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and A.dtype != torch.float64:
        A = A.to(torch.get_autocast_dtype(kind))
    if bias is not None and bias.dtype != A.dtype:
        bias = bias.to(A.dtype)
    return A, bias
