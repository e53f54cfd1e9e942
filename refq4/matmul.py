"""Activations times a 4-bit weight: the choice of path, op and backend, and the product.

    route ---+-- own layout     the weight is in a layout of the backend's own                  (inference only)
             +-- gemv_4bit      one token, no gradient of it wanted, whole blocks in a row
             '-- MatMul4Bit     everything else; differentiable (refq4/autograd.py)

The *path* follows the conditions of bitsandbytes 0.49.1, which calls the first of these gemv_4bit as well. The *op*
that a backend runs depends on the number of tokens alone: gemv_4bit for one, gemm_4bit for more. Only :func:`route`
decides both. The *kernel* is the backend's choice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import registry
from .autograd import differentiable
from .backend import Call, PackedWeight, PreparedWeight
from .internals import dispatch
from .internals.checks import check_bias, check_operand, warn_caller, write_into
from .internals.dispatch import is_deferred, wants_grad
from .registry import Resolved
from .state import QuantState
from .trace import Decision, recorder

__all__ = ["BoundWeight", "Route", "choose_path", "gemv_4bit", "matmul_4bit", "multiply", "route"]

OWN_LAYOUT = Decision(
    "own layout", "the weight is in the backend's own layout, whose kernels take any number of tokens"
)
ONE_TOKEN = Decision("gemv_4bit", "a single token, no gradient of it wanted, and K is a multiple of the blocksize")
SEVERAL_TOKENS = Decision("MatMul4Bit", "more than one token")
WANTS_GRADIENT = Decision("MatMul4Bit", "a single token, but its gradient is wanted")
STRADDLING = Decision("MatMul4Bit", "a single token, but K is not a multiple of the blocksize: blocks straddle rows")
NOTHING = Decision("MatMul4Bit", "nothing to multiply: no tokens, or K = 0")
FROM_K_BY_N = Decision("dequantize + linear", "deprecated: the weight was quantised as [K, N], not as [N, K]")


class Route(NamedTuple):
    """The path of a product, and the op that a backend runs on it."""

    path: Decision
    op: str


_OWN = {op: Route(OWN_LAYOUT, op) for op in ("gemv_4bit", "gemm_4bit")}  # to make one takes two calls in each forward


def route(tokens: int, k: int, blocksize: int, gradient: bool, own_layout: bool) -> Route:
    """Decide path and op. Mirrors the conditions in ``bitsandbytes.matmul_4bit``.

    Args:
        tokens: M.
        k: in_features.
        blocksize: of the weight.
        gradient: whether the gradient of the input is wanted.
        own_layout: whether the weight is in a layout of the backend's own.

    Example:
        >>> route(1, 64, 64, gradient=False, own_layout=False).path.choice
        'gemv_4bit'
        >>> route(12, 64, 64, gradient=False, own_layout=True).op
        'gemm_4bit'
    """
    op = "gemv_4bit" if tokens == 1 else "gemm_4bit"
    if own_layout:
        return _OWN[op]
    if tokens == 0 or k == 0:
        return Route(NOTHING, op)
    if tokens > 1:
        return Route(SEVERAL_TOKENS, op)
    if gradient:
        return Route(WANTS_GRADIENT, op)
    if k % blocksize:
        return Route(STRADDLING, op)
    return Route(ONE_TOKEN, op)


class BoundWeight(NamedTuple):
    """A weight with all that is decided about its product: what a backend gets, by which route, and which backend.

    Attributes:
        weight: [N, K], as it is stored or in the backend's own layout.
        route: path and op.
        engine: what ``registry.resolve`` found. While a call is traced or transformed, and where there is nothing to
            multiply, the choice of one: the op resolves it when it runs.
    """

    weight: PackedWeight | PreparedWeight
    route: Route
    engine: Resolved | str

    def __repr__(self) -> str:
        kind = self.weight.layout if isinstance(self.weight, PreparedWeight) else "canonical"
        return f"{kind}, for {self.engine if isinstance(self.engine, str) else self.engine.backend.name}"


def describe(
    x: Tensor, state: QuantState, dtype: torch.dtype, gradient: bool, own_layout: bool = False
) -> tuple[Call, Route]:
    """The call that a product of x [..., K], computed in ``dtype``, is to a backend, and its route."""
    # what a form was made of has been checked
    geometry: Any = (state.shape, state.blocksize) if own_layout else state.geometry()
    (n, k), blocksize = geometry
    tokens = x.numel() // k if k else x.shape[:-1].numel()  # the first of these may be a symbol
    chosen = route(tokens, k, blocksize, gradient, own_layout)
    name, nested = state.quant_type or "custom", state.state2 is not None
    device = "cpu" if x.is_cpu else x.device.type  # to name a device takes as long as to decide the route
    return Call(chosen.op, device, dtype, tokens, n, k, blocksize, name, nested, "canonical", gradient), chosen


def multiply(A: Tensor, weight: BoundWeight, bias: Tensor | None) -> tuple[Tensor, Decision]:
    """Step 6: A [..., K] times the transpose of weight [N, K], plus bias [N] -> [..., N].

    Example:
        >>> import refq4
        >>> from refq4.pipeline import choose_layout
        >>> layer, x = refq4.nn.LinearNF4(64, 8).to("cpu"), torch.ones(3, 64)
        >>> weight, _ = choose_layout(layer, layer.quant_state, x)
        >>> y, decision = multiply(x, weight, None)
        >>> y.shape, decision.choice
        (torch.Size([3, 8]), 'MatMul4Bit')
    """
    stored, (path, op), engine = weight
    if path is STRADDLING and not torch.compiler.is_compiling():
        warn_caller(
            f"in_features {A.shape[-1]} is not a multiple of the blocksize {stored.blocksize}: blocks straddle rows, "
            f"which no fast kernel reads; one token takes MatMul4Bit, not gemv_4bit. Choose a blocksize that divides it"
        )
    if path.choice == "MatMul4Bit":
        return differentiable(op, A, stored, bias, engine), path
    if bias is None or not wants_grad(bias):
        return dispatch.product(op, A, stored, bias, engine), path
    # torch adds a bias whose gradient is wanted, and differentiates that; it would stretch one of another size
    return dispatch.product(op, A, stored, None, engine) + check_bias(bias, stored.shape[0], stored.shape), path


# --- the functions that bitsandbytes has ----------------------------------------------------------------------------


def choose_path(A: Tensor, quant_state: QuantState, prepared: bool = False) -> Decision:
    """Return the path that :func:`matmul_4bit` takes for these operands, and why.

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
    (n, k), blocksize = quant_state.geometry()
    if A.shape[-1] != k and A.shape[-1] == n and not prepared:
        return FROM_K_BY_N
    return route(A.shape[:-1].numel(), k, blocksize, wants_grad(A), prepared).path


def matmul_4bit(
    A: Tensor,
    B: Tensor,
    quant_state: QuantState,
    out: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Activations times a 4-bit weight. Mirrors ``bitsandbytes.matmul_4bit``.

    Args:
        A: [..., K], fp32, fp16, bf16; or fp64, which takes the exact path of the reference backend.
        B: the packed weight of a tensor [N, K], as ``quantize_4bit`` returned it or its ``.t()``: [N, K] comes from
            ``quant_state.shape``, not from B.
        quant_state: the QuantState of B.
        out: [..., N], written instead of a new tensor; not together with a gradient.
        bias: [N], any float dtype; cast to A's.
        backend: overrides the backend in effect for this call.

    Returns:
        [..., N] in A's dtype (under autocast: in autocast's dtype, as ``torch.nn.functional.linear``).

    Raises:
        ValueError: K does not fit the weight, or another size is wrong.
        TypeError: A is not a float tensor.

    Warns:
        DeprecationWarning: the weight was quantised as [K, N].

    Example:
        >>> from refq4.functional import quantize_4bit
        >>> W = torch.randn(8, 64)
        >>> B, state = quantize_4bit(W, quant_type="nf4")
        >>> matmul_4bit(torch.randn(2, 3, 64), B, state).shape
        torch.Size([2, 3, 8])
    """
    shape = _shape_of(quant_state)
    k_by_n = isinstance(A, Tensor) and A.shape[-1:] == shape[:1] != shape[1:]
    check_operand("A", A, 0 if k_by_n else 1, shape, quant_state.absmax.device)
    if bias is not None:  # it may be added after the product, where its gradient is wanted
        check_bias(bias, shape[1 if k_by_n else 0], shape)
    step = recorder("matmul_4bit", A)
    dtype = under_autocast(A, A.dtype)
    A, bias = A.to(dtype), None if bias is None else bias.to(dtype)
    if out is not None and (wants_grad(A) or wants_grad(bias)):
        raise ValueError("out= can't be combined with a wanted gradient; call under torch.no_grad() or drop out=")
    choice = registry.requested_backend(backend)
    if k_by_n:
        result = step(6, _matmul_k_by_n(A, B, quant_state, bias, choice), FROM_K_BY_N)
    else:
        result = step(6, *multiply(A, _bind(A, B, quant_state, choice), bias))
    return write_into("out", out, result)


def _bind(A: Tensor, B: Tensor, state: QuantState, choice: str) -> BoundWeight:
    call, chosen = describe(A, state, A.dtype, wants_grad(A))
    unresolved = is_deferred() or 0 in A.shape or call.n == 0
    return BoundWeight(state.packed_weight(B), chosen, choice if unresolved else registry.resolve(call, choice))


def under_autocast(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Autocast's dtype where that is on, else ``dtype``, in which the product of x was to be computed.

    fp64 is left alone, as by torch.
    """
    kind = "cpu" if x.is_cpu else x.device.type  # as in describe
    if dtype != torch.float64 and kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return dtype


def _matmul_k_by_n(A: Tensor, B: Tensor, state: QuantState, bias: Tensor | None, backend: str) -> Tensor:
    if not torch.compiler.is_compiling():
        warn_caller(
            f"the weight was quantised from a [K, N] tensor: quant_state.shape is {list(state.geometry()[0])}, and A "
            f"has K = {A.shape[-1]}. Quantise it as [N, K] = [out_features, in_features]; this will become an error.",
            DeprecationWarning,
        )
    weight = dispatch.dequantize_4bit(state.packed_weight(B), A.dtype, backend)
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
        A: meant for one token; several tokens run as a GEMM.
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
    check_operand("A", A, 1, _shape_of(state), state.absmax.device)
    with torch.no_grad():
        weight = _bind(A, B, state, registry.requested_backend(backend))
        return write_into("out", out, dispatch.product(weight.route.op, A, weight.weight, None, weight.engine))


def _shape_of(state: QuantState) -> torch.Size:
    if not isinstance(state, QuantState):
        raise TypeError(f"quant_state must be the QuantState that quantize_4bit returned, got {state!r}")
    return state.geometry()[0]
