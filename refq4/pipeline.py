"""The forward pass of a 4-bit linear layer: seven steps, one function each.

The numbers are the ones used in the docs, the notebooks and the trace; the order is that of ``Linear4bit.forward``
in bitsandbytes 0.49.1.

    x [..., K] --------------------------------------------------------------.
                                                                              v
    weight --> 1 recover the --> 2 ask for the      3 bias --> 4 compute --> 5 cast --> 6 matmul_4bit --> 7 cast --> y
               quant state        backend's layout    dtype      dtype         both       |                 back
                                                                                          |-- gemv_4bit
                                                                                          '-- MatMul4Bit

A step takes values and gives back a value and a :class:`~refq4.trace.Decision`: what it chose and why. The decisions
are constants beside each step, so all that can happen is in plain sight. No step writes to the layer; the one thing
a forward remembers, the compute dtype inferred from the first input, is written by :func:`linear_4bit` itself.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from . import layout, registry
from .backend import Backend, Call, PackedWeight, PreparedWeight
from .internals.checks import ACTIVATION_DTYPES, check_features, check_floats, warn_caller
from .internals.lending import LentBytes
from .internals.ops import wants_grad
from .matmul import matmul_4bit
from .quantization import decode_scales, dequantize_4bit
from .state import QuantState
from .trace import Decision, current, show

if TYPE_CHECKING:
    from .nn import Embedding4bit, Linear4bit

__all__ = [
    "align_bias",
    "cast_back",
    "cast_operands",
    "choose_compute_dtype",
    "choose_layout",
    "embedding_4bit",
    "linear_4bit",
    "recover_quant_state",
]


def linear_4bit(layer: Linear4bit, x: Tensor) -> Tensor:
    """All seven steps: what ``Linear4bit.forward`` does.

    Args:
        layer: a quantised layer of weight [N, K].
        x: [..., K], fp32, fp16, bf16 or fp64.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError: x is no float tensor.
        ValueError: x's last dimension is not K.
        RuntimeError: the layer has not been quantised.

    Example:
        >>> import refq4
        >>> layer = refq4.nn.LinearNF4(64, 8).to("cpu")
        >>> linear_4bit(layer, torch.ones(2, 3, 64)).shape
        torch.Size([2, 3, 8])
    """
    check_floats("the input of a 4-bit layer", x, ACTIVATION_DTYPES)
    listener = current()
    with nullcontext() if listener is None else listener.call(f"{type(layer).__name__}.forward(x {show(x)})"):
        state, decision = recover_quant_state(layer)
        check_features(x, state.geometry()[0])
        if listener is not None:
            listener.step(1, "recover the quant state", decision, state)

        backend = registry.requested_backend(None)  # once: what another thread sets in the middle of a call comes later
        prepared, decision = choose_layout(layer, state, x, backend)
        if listener is not None:
            listener.step(2, "ask for the backend's layout", decision, prepared and prepared.layout)

        bias, decision = align_bias(layer.bias, x.dtype)
        if listener is not None:
            listener.step(3, "bias dtype", decision, bias)

        compute_dtype, decision = choose_compute_dtype(layer, x)
        if not torch.compiler.is_compiling() and layer.awaits_first_input:  # a graph that did this would recompile
            layer.compute_dtype, layer.compute_type_is_set, layer.awaits_first_input = compute_dtype, True, False
        if listener is not None:
            listener.step(4, "compute dtype", decision, compute_dtype or x.dtype)

        (a, bias), decision = cast_operands(x, bias, compute_dtype)
        if listener is not None:
            listener.step(5, "cast the operands", decision, a)

        stored = layer.weight if prepared is not None else stored_weight(layer)
        y = matmul_4bit(a, stored, state, bias=bias, backend=backend, prepared=prepared)  # tells the trace itself

        y, decision = cast_back(y, x.dtype)
        if listener is not None:
            listener.step(7, "cast back", decision, y)
        return y


# --- 1 --------------------------------------------------------------------------------------------------------------

STATE_ON_WEIGHT = Decision("kept", "the weight carries its quant state")
STATE_FROM_MODULE = Decision(
    "recovered", "the weight had lost its quant state (FSDP does that); the module kept a copy"
)


def recover_quant_state(layer: Linear4bit | Embedding4bit) -> tuple[QuantState, Decision]:
    """Step 1: find the quant state, on the weight or else on the module.

    A Params4bit carries its state as an attribute, which is gone once something rebuilds the parameter from its bytes
    (FSDP gathers shards that way). Mirrors ``fix_4bit_weight_quant_state_from_module``.

    Raises:
        RuntimeError: neither has one: the layer has not been quantised.

    Example:
        >>> import refq4
        >>> layer = refq4.nn.LinearNF4(64, 8).to("cpu")
        >>> state, decision = recover_quant_state(layer)
        >>> state.shape, decision.choice
        (torch.Size([8, 64]), 'kept')
    """
    state: QuantState | None = getattr(layer.weight, "quant_state", None)
    if state is not None:
        return state, STATE_ON_WEIGHT
    state = layer.quant_state
    if state is not None:
        return state, STATE_FROM_MODULE
    raise RuntimeError(
        f"this {type(layer).__name__} has not been quantised: call .to(device) on it (or on the model), which "
        f"quantises, or load a quantised state dict"
    )


# --- 2 --------------------------------------------------------------------------------------------------------------

LAYOUT_OWN = Decision("own layout", "inference, and the backend has a layout that suits it better")
LAYOUT_TRAINING = Decision("canonical", "the layer is in training mode")
LAYOUT_GRADIENT = Decision("canonical", "a gradient is wanted")
LAYOUT_COMPILING = Decision("canonical", "torch.compile is tracing, and the layer was not prepared before")
LAYOUT_OFFLOADED = Decision("canonical", "accelerate brings the weight for each call and takes it away again")
LAYOUT_NONE = Decision("canonical", "the backend computes on the stored layout")


class PreparedCache(NamedTuple):
    """A prepared weight, what it was made from, and who asked: stale as soon as one of these differs.

    ``asked`` holds the choice of backend, the registry's count of changes, and the dtype and number of tokens of the
    call: while these stay, the backend that answers stays, and need not be looked up again.
    """

    asked: tuple[object, ...]
    backend: str
    state: QuantState
    versions: tuple[object, ...]
    prepared: PreparedWeight | None


def choose_layout(
    layer: Linear4bit, state: QuantState, x: Tensor, backend: str | None = None
) -> tuple[PreparedWeight | None, Decision]:
    """Step 2: ask the backend whether it wants the weight in a layout of its own (a CPU backend repacks it, say).

    Only for inference, as in bitsandbytes: training decodes the canonical bytes in backward anyway. The weight lends
    its bytes to the prepared form (``refq4/internals/lending.py``): one copy, and state dicts stay canonical.
    The prepared form is dropped when weight, quant state or backend change, or when the stored bytes are wanted.

    Example:
        >>> import refq4
        >>> layer = refq4.nn.LinearNF4(64, 8).to("cpu").eval()
        >>> with refq4.use_backend("reference"):
        ...     prepared, decision = choose_layout(layer, layer.quant_state, torch.ones(1, 64))
        >>> prepared is None, decision.why
        (True, 'the backend computes on the stored layout')
    """
    if layer.training:
        return None, LAYOUT_TRAINING
    if wants_grad(x):
        return None, LAYOUT_GRADIENT
    if getattr(layer.__dict__.get("_hf_hook"), "offload", False):
        layer._prepared = None
        return None, LAYOUT_OFFLOADED
    if torch.compiler.is_compiling():
        cache = layer._prepared
        return (cache.prepared, LAYOUT_OWN) if cache and cache.prepared else (None, LAYOUT_COMPILING)
    requested = registry.requested_backend(backend)
    asked = (requested, registry.changes(), layer.compute_dtype or x.dtype, x.numel())
    versions = _versions(layer.weight, state.absmax)
    cache = layer._prepared
    # "is" for the state: comparing it would read tensors
    same = cache is not None and cache.state is state and cache.versions == versions
    if cache is None or not same or cache.asked != asked:
        found, _ = registry.resolve(_layout_call(layer, state, x), requested)
        if cache is not None and same and cache.backend == found.name:
            prepared = cache.prepared
        else:
            layer._prepared = None  # the old one goes before the new one comes: never three copies
            prepared = _prepare(layer.weight, state, found)
            versions = _versions(layer.weight, state.absmax)
        layer._prepared = cache = PreparedCache(asked, found.name, state, versions, prepared)
    return cache.prepared, LAYOUT_OWN if cache.prepared else LAYOUT_NONE


def _prepare(weight: Tensor, state: QuantState, backend: Backend) -> PreparedWeight | None:
    prepared = backend.prepare_weight(state.packed_weight(weight))
    if prepared is not None and isinstance(weight, LentBytes):
        dtype = weight.dtype
        weight.lend(lambda: layout.to_storage(backend.restore_weight(prepared).packed, dtype))
    return prepared


def stored_weight(layer: Linear4bit) -> Tensor:
    """Return the canonical bytes of a layer's weight, restored first if only the prepared form holds them."""
    weight = layer.weight
    if torch.compiler.is_compiling() or not isinstance(weight, LentBytes):
        return cast(Tensor, weight)
    if not weight.lent:
        return weight.stored()
    layer._prepared = None
    return weight.come_home()


def _layout_call(layer: Linear4bit, state: QuantState, x: Tensor) -> Call:
    (n, k), blocksize = state.geometry()
    tokens = x.numel() // k if k else 0
    op = "gemv_4bit" if tokens == 1 else "gemm_4bit"
    dtype = layer.compute_dtype or x.dtype
    return Call(op, x.device.type, dtype, tokens, n, k, blocksize, state.quant_type or "custom", state.nested)


def _versions(*tensors: Tensor) -> tuple[object, ...]:
    """What changes when a tensor's memory or contents do."""
    with torch._C.DisableTorchFunctionSubclass():  # a Params4bit would take its detour for each of these
        return tuple((t.data_ptr(), _version(t)) for t in tensors)


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # a tensor made in inference mode counts no changes
        return 0


# --- 3 --------------------------------------------------------------------------------------------------------------

BIAS_NONE = Decision("none", "the layer has no bias")
BIAS_KEPT = Decision("kept", "the bias has the input's dtype")
BIAS_CAST = Decision("cast", "the bias has another dtype than the input: a cast copy is used, the parameter stays")


def align_bias(bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Decision]:
    """Step 3: the bias in the input's dtype.

    bitsandbytes rewrites the parameter at this point (``bias.data = bias.data.to(x.dtype)``), so that one call in a
    lower precision coarsens the stored bias for good. Here the rounding is the same and the parameter is not touched.

    Example:
        >>> bias, decision = align_bias(torch.ones(8), torch.bfloat16)
        >>> bias.dtype, decision.choice
        (torch.bfloat16, 'cast')
    """
    if bias is None:
        return None, BIAS_NONE
    if bias.dtype == dtype:
        return bias, BIAS_KEPT
    return bias.to(dtype), BIAS_CAST


# --- 4 --------------------------------------------------------------------------------------------------------------

COMPUTE_SET = Decision("as set", "the layer's compute dtype was set or has been inferred from an earlier input")
COMPUTE_FIRST_INPUT = Decision("inferred", "none was set: that of the first input, float32 or bfloat16, is safe")
COMPUTE_AS_INPUT = Decision("as the input", "none was set, and a float16 (or float64) input is computed as it comes")


def choose_compute_dtype(layer: Linear4bit, x: Tensor) -> tuple[torch.dtype | None, Decision]:
    """Step 4: the dtype in which the product is computed; None means each input's own.

    Mirrors ``Linear4bit.set_compute_type``: inferred from the first input if the user did not set it. fp16 input on a
    layer that computes in fp32, or whose compute dtype nobody chose, gets a warning if it is the first input.

    Example:
        >>> import refq4
        >>> layer = refq4.nn.LinearNF4(64, 8).to("cpu")
        >>> dtype, decision = choose_compute_dtype(layer, torch.ones(1, 64, dtype=torch.bfloat16))
        >>> dtype, decision.choice
        (torch.bfloat16, 'inferred')
    """
    fp16_on_fp32 = x.dtype == torch.float16 and layer.compute_dtype in (None, torch.float32)
    if fp16_on_fp32 and layer.awaits_first_input and not torch.compiler.is_compiling():
        _warn_fp16(layer.compute_dtype, single_token=x.numel() == x.shape[-1])
    if layer.compute_type_is_set:
        return layer.compute_dtype, COMPUTE_SET
    if x.dtype in (torch.float32, torch.bfloat16):
        return x.dtype, COMPUTE_FIRST_INPUT
    return layer.compute_dtype, COMPUTE_AS_INPUT


def _warn_fp16(compute_dtype: torch.dtype | None, single_token: bool) -> None:
    if compute_dtype is None:
        too = "" if single_token else ", in training too"
        text = (
            f"compute_dtype is not set, so this float16 input is computed in float16{too}, which overflows above "
            "65,504. Pass compute_dtype=torch.bfloat16 or torch.float32 to the layer, or torch.float16 to keep it."
        )
    else:
        what = "inference will be slow" if single_token else "inference and training will be slow"
        text = f"Linear4bit got float16 input but computes in float32: {what}. Set compute_dtype=torch.float16."
    warn_caller(text)


# --- 5 --------------------------------------------------------------------------------------------------------------

CAST_NOTHING = Decision("nothing", "the input has the compute dtype")
CAST_INPUT = Decision("cast", "the input and the bias go to the compute dtype")

Operands = tuple[Tensor, Tensor | None]


def cast_operands(x: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> tuple[Operands, Decision]:
    """Step 5: input and bias in the compute dtype (None: as they are).

    Example:
        >>> (x, bias), decision = cast_operands(torch.ones(1, 64), None, torch.bfloat16)
        >>> x.dtype, bias, decision.choice
        (torch.bfloat16, None, 'cast')
    """
    if dtype is None or x.dtype == dtype:
        return (x, bias), CAST_NOTHING
    return (x.to(dtype), None if bias is None else bias.to(dtype)), CAST_INPUT


# --- 6 is matmul_4bit (refq4/matmul.py); 7 --------------------------------------------------------------------------

BACK_NOTHING = Decision("nothing", "the result has the input's dtype")
BACK_CAST = Decision("cast", "the result goes back to the input's dtype")


def cast_back(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Decision]:
    """Step 7: the result in the dtype the caller came with.

    Example:
        >>> y, decision = cast_back(torch.ones(1, 8, dtype=torch.bfloat16), torch.float32)
        >>> y.dtype, decision.choice
        (torch.float32, 'cast')
    """
    return (y, BACK_NOTHING) if y.dtype == dtype else (y.to(dtype), BACK_CAST)


# --- the embedding --------------------------------------------------------------------------------------------------

ROWS_ONLY = Decision("rows", "the rows are whole blocks: only those asked for are decoded")
WHOLE_TABLE = Decision("whole table", "rows and blocks do not line up: the whole table is decoded first")


def embedding_4bit(layer: Embedding4bit, ids: Tensor) -> Tensor:
    """Rows of a 4-bit table: what ``Embedding4bit.forward`` does.

    Args:
        layer: a quantised embedding of weight [V, D].
        ids: integers of any shape, below V.

    Returns:
        [*ids.shape, D] in the layer's dtype.

    Example:
        >>> import refq4
        >>> table = refq4.nn.EmbeddingNF4(10, 64).to("cpu")
        >>> embedding_4bit(table, torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 64])
    """
    state, _ = recover_quant_state(layer)
    (_, dim), blocksize = state.geometry()
    whole_blocks = dim % blocksize == 0
    listener = current()
    if whole_blocks:
        rows = _decode_rows(state.packed_weight(layer.weight), state, ids)
    else:
        rows = torch.nn.functional.embedding(ids, dequantize_4bit(layer.weight, state))
    rows = rows.to(layer.dtype)
    if listener is not None:
        listener.step(0, "embedding rows", ROWS_ONLY if whole_blocks else WHOLE_TABLE, rows)
    return rows


def _decode_rows(weight: PackedWeight, state: QuantState, ids: Tensor) -> Tensor:
    """Gather the packed bytes and scales of the rows, then decode the small tensor they make."""
    table, dim = weight.shape
    picked = state.copy()
    picked.shape = torch.Size((*ids.shape, dim))
    picked.offset = picked.state2 = None
    picked.absmax = torch.nn.functional.embedding(
        ids, decode_scales(state).view(table, dim // state.geometry()[1])
    ).reshape(-1)
    packed = torch.nn.functional.embedding(ids, weight.packed.view(table, dim // 2)).reshape(-1)
    return dequantize_4bit(packed, picked)
