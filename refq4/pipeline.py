"""The forward pass of a 4-bit linear layer: seven steps, one function each.

The numbers are the ones used in the docs, the notebooks and the trace; the order is that of ``Linear4bit.forward``
in bitsandbytes 0.49.1.

    weight --> 1 recover the quant state --> 2 ask for the backend's layout --------.
    bias ----> 3 bias dtype ---------------.                                        v
    x -------> 4 compute dtype -----------> 5 cast the operands ------------> 6 multiply --> 7 cast back --> y

A step takes values and returns a value and a :class:`~refq4.trace.Decision`: what it chose and why. The decisions are
constants beside each step, so a reader can see all of them. Three things are needed in more than one step, and each has
one function that decides it:

    the backend     step 2 resolves it, and passes it with the weight to step 6
    path and op     :func:`refq4.matmul.route`; step 2 needs the op to ask a backend, step 6 runs it. The path is
                    gemv_4bit, MatMul4Bit (it carries a gradient) or own layout; the op gemv_4bit or gemm_4bit
    the dtype       :func:`choose_compute_dtype`; step 2 must know it to ask a backend, step 4 gives it to step 5

Two things remain after a forward. The first input may set the layer's compute dtype: :func:`remember_first_input` alone
writes that to the layer. And a weight may stay in the backend's layout: ``refq4/internals/prepared.py`` keeps that with
the parameter. *Canonical* is the layout of a file, in which a parameter stores its bytes unless they are prepared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import registry
from .backend import PackedWeight
from .internals import dispatch
from .internals.blockwise import decode_scales
from .internals.checks import check_input, warn_caller
from .internals.dispatch import is_deferred, wants_grad
from .internals.holder import parameter
from .internals.prepared import MOST_RESTORES, Preparable, as_stored
from .matmul import BoundWeight, describe, multiply, under_autocast
from .registry import Resolved
from .state import QuantState
from .trace import Decision, recorder

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
    "remember_first_input",
]


def linear_4bit(layer: Linear4bit, x: Tensor) -> Tensor:
    """Check x, then run all seven steps: what ``Linear4bit.forward`` does.

    Args:
        layer: a quantised layer of weight [N, K].
        x: [..., K], fp32, fp16, bf16 or fp64.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError: x is not a float tensor.
        ValueError: x's last dimension is not K.
        RuntimeError: the layer has not been quantised.

    Example:
        >>> import refq4
        >>> layer = refq4.nn.LinearNF4(64, 8).to("cpu")
        >>> linear_4bit(layer, torch.ones(2, 3, 64)).shape
        torch.Size([2, 3, 8])
    """
    step = recorder(layer, x)
    check_input(x, n=layer.out_features, k=layer.in_features)
    state = step(1, *recover_quant_state(layer))
    weight = step(2, *choose_layout(layer, state, x))
    bias = step(3, *align_bias(parameter(layer, "bias"), x.dtype))
    dtype = step(4, *choose_compute_dtype(layer, x))
    if layer.awaits_first_input:  # after step 4, which says why
        remember_first_input(layer, x)
    A, bias = step(5, *cast_operands(x, bias, dtype))
    y = step(6, *multiply(A, weight, bias))
    return step(7, *cast_back(y, x.dtype))


# --- 1 --------------------------------------------------------------------------------------------------------------

STATE_ON_WEIGHT = Decision("kept", "the weight carries its quant state")
STATE_FROM_MODULE = Decision(
    "recovered", "the weight had lost its quant state (FSDP does that); the module kept a copy"
)


def recover_quant_state(layer: Linear4bit | Embedding4bit) -> tuple[QuantState, Decision]:
    """Step 1: find the quant state, on the weight or else on the module.

    A Params4bit has its state as an attribute, which is lost when other code rebuilds the parameter from its bytes
    (FSDP gathers shards in this way). Mirrors ``fix_4bit_weight_quant_state_from_module``.

    Raises:
        RuntimeError: neither has a state: the layer has not been quantised.

    Example:
        >>> import refq4
        >>> layer = refq4.nn.LinearNF4(64, 8).to("cpu")
        >>> state, decision = recover_quant_state(layer)
        >>> state.shape, decision.choice
        (torch.Size([8, 64]), 'kept')
    """
    state: QuantState | None = getattr(parameter(layer, "weight"), "quant_state", None)
    if state is not None:
        return state, STATE_ON_WEIGHT
    if layer.quant_state is not None:
        return layer.quant_state, STATE_FROM_MODULE
    raise RuntimeError(
        f"this {type(layer).__name__} has not been quantised: call .to(device) on it (or on the model), which "
        f"quantises, or load a quantised state dict"
    )


# --- 2 --------------------------------------------------------------------------------------------------------------

LAYOUT_OWN = Decision("own layout", "inference, and the backend has a layout that suits it better")
LAYOUT_TRAINING = Decision("canonical", "the layer is in training mode")
LAYOUT_GRADIENT = Decision("canonical", "a gradient is wanted")
LAYOUT_OFFLOADED = Decision("canonical", "accelerate loads the weight for each call and removes it again")
LAYOUT_REBUILT = Decision("canonical", "something else owns the weight's memory: it is not a Params4bit any more")
LAYOUT_IN_USE = Decision(
    "canonical",
    f"others need the stored bytes: a look-up, or they were restored {MOST_RESTORES} times; refq4.prepare(model) tries "
    f"the latter again",
)
LAYOUT_TRACED = Decision("canonical", "the call is being traced, or transformed, and its weight is not prepared")
LAYOUT_NOTHING = Decision("canonical", "there is nothing to multiply: no tokens, or no outputs")
LAYOUT_STORED = Decision("canonical", "the backend computes on the stored layout")


def choose_layout(layer: Linear4bit, state: QuantState, x: Tensor) -> tuple[BoundWeight, Decision]:
    """Step 2: ask the backend whether it needs the weight in its own layout (a CPU backend may rearrange it).

    Only for inference, as in bitsandbytes: training decodes the canonical bytes in backward anyway. The weight keeps
    the backend's layout instead of the stored bytes (``refq4/internals/prepared.py``): there is one copy, and state
    dicts stay canonical.

    The backend is resolved here, and nowhere later in the call. If a call is traced or transformed before it runs, or
    has nothing to multiply, the choice of backend is passed to the op instead, which resolves it if it runs.

    Returns:
        The weight bound to its path, op and backend; and whether its layout is the backend's own.

    Example:
        >>> import refq4
        >>> layer = refq4.nn.LinearNF4(64, 8).to("cpu").eval()
        >>> with refq4.use_backend("reference"):
        ...     weight, decision = choose_layout(layer, layer.quant_state, torch.ones(1, 64))
        >>> weight.route.op, weight.engine.backend.name, decision.why
        ('gemv_4bit', 'reference', 'the backend computes on the stored layout')
    """
    weight = parameter(layer, "weight")
    gradient = wants_grad(x)  # a bias gets its gradient whatever the weight's layout is
    dtype, _ = choose_compute_dtype(layer, x)
    stays = _must_stay(layer, weight, gradient)
    nothing = 0 in x.shape or layer.out_features == 0
    deferred = nothing or is_deferred()
    choice = registry.requested_backend(None) if deferred else registry.choice_in_effect()
    form = weight.form(state, deferred) if stays is None else None  # what a backend made of the weight as it is now
    if deferred and form is not None and form.choice != choice:
        form = None
    call, route = describe(x, state, dtype, gradient, own_layout=form is not None and form.prepared is not None)
    engine = choice if deferred else registry.resolve(call, choice)
    if stays is None and type(engine) is Resolved and (form is None or form.backend is not engine.backend):
        form = weight.prepare(state, engine.backend, choice)
        _, route = describe(x, state, dtype, gradient, own_layout=form.prepared is not None)  # the same op
    if form is not None and form.prepared is not None:  # in a form without, the backend reads the stored bytes
        return BoundWeight(form.prepared, route, engine), LAYOUT_OWN
    # of a prepared weight a call that is deferred takes a copy of the stored bytes
    packed = state.packed_weight(weight if deferred else as_stored(weight))
    why = LAYOUT_NOTHING if nothing else LAYOUT_TRACED if deferred else LAYOUT_STORED
    return BoundWeight(packed, route, engine), stays or why


def _must_stay(layer: Linear4bit, weight: Tensor, gradient: bool) -> Decision | None:
    """Why the weight stays as it is stored, whatever the backend says; None if it need not."""
    if layer.training:
        return LAYOUT_TRAINING
    if gradient:
        return LAYOUT_GRADIENT
    if not isinstance(weight, Preparable):
        return LAYOUT_REBUILT
    if "_hf_hook" in layer.__dict__ and getattr(layer._hf_hook, "offload", False):
        return LAYOUT_OFFLOADED
    return LAYOUT_IN_USE if weight._restores >= MOST_RESTORES else None


# --- 3 --------------------------------------------------------------------------------------------------------------

BIAS_NONE = Decision("none", "the layer has no bias")
BIAS_KEPT = Decision("kept", "the bias has the input's dtype")
BIAS_CAST = Decision("cast", "the bias has another dtype than the input: a cast copy is used, the parameter stays")


def align_bias(bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Decision]:
    """Step 3: the bias in the input's dtype.

    bitsandbytes 0.49.1 rewrites the parameter here (``bias.data = bias.data.to(x.dtype)``), so that after one call in a
    lower precision the stored bias stays rounded. Here the rounding is the same and the parameter does not change.

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

COMPUTE_SET = Decision("as set", "the user set the layer's compute dtype, or an earlier input settled it")
COMPUTE_FIRST_INPUT = Decision("inferred", "none was set: that of the first input, float32 or bfloat16, is safe")
COMPUTE_AS_INPUT = Decision("as the input", "none was set; the first input was float16 or float64, so none is inferred")
COMPUTE_AUTOCAST = Decision("autocast", "torch.autocast is on, and its dtype comes before the layer's")
INFERRED = (torch.float32, torch.bfloat16)  # float16 is not: its range is narrow


def choose_compute_dtype(layer: Linear4bit, x: Tensor) -> tuple[torch.dtype, Decision]:
    """Step 4: the dtype in which the product is computed.

    Mirrors ``Linear4bit.set_compute_type``: inferred from the first input if the user did not set it.

    Example:
        >>> import refq4
        >>> layer = refq4.nn.LinearNF4(64, 8).to("cpu")
        >>> dtype, decision = choose_compute_dtype(layer, torch.ones(1, 64, dtype=torch.bfloat16))
        >>> dtype, decision.choice
        (torch.bfloat16, 'inferred')
    """
    if layer.compute_type_is_set:
        dtype, decision = layer.compute_dtype, COMPUTE_SET if layer.compute_dtype else COMPUTE_AS_INPUT
    elif x.dtype in INFERRED:
        dtype, decision = x.dtype, COMPUTE_FIRST_INPUT
    else:
        dtype, decision = layer.compute_dtype, COMPUTE_AS_INPUT
    dtype = dtype or x.dtype  # None: each input in its own
    autocast = under_autocast(x, dtype)
    return (dtype, decision) if autocast is dtype else (autocast, COMPUTE_AUTOCAST)


def remember_first_input(layer: Linear4bit, x: Tensor) -> None:
    """Set the layer's compute dtype from its first input; a forward writes nothing else to the layer.

    A layer waits for its first input whether or not the user set a compute dtype: fp16 input on a layer that computes
    in fp32, or whose compute dtype nobody set, gets a warning once. Only where none was set, it is inferred.

    Example:
        >>> import refq4
        >>> layer = refq4.nn.LinearNF4(64, 8).to("cpu")
        >>> remember_first_input(layer, torch.ones(1, 64, dtype=torch.bfloat16))
        >>> layer.compute_dtype
        torch.bfloat16
    """
    if torch.compiler.is_compiling():  # a graph that did this would recompile
        return
    if x.dtype == torch.float16 and layer.compute_dtype in (None, torch.float32):
        _warn_fp16(layer.compute_dtype, single_token=x.numel() == x.shape[-1])
    if not layer.compute_type_is_set and x.dtype in INFERRED:
        layer.compute_dtype = x.dtype
    layer.compute_type_is_set, layer.awaits_first_input = True, False


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

CAST_NOTHING = Decision("nothing", "the input has the compute dtype, and the bias has the input's")
CAST_INPUT = Decision("cast", "the input and the bias go to the compute dtype")

Operands = tuple[Tensor, Tensor | None]


def cast_operands(x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Operands, Decision]:
    """Step 5: input and bias in the dtype of the product.

    Example:
        >>> (x, bias), decision = cast_operands(torch.ones(1, 64), None, torch.bfloat16)
        >>> x.dtype, bias, decision.choice
        (torch.bfloat16, None, 'cast')
    """
    if x.dtype == dtype:
        return (x, bias), CAST_NOTHING
    return (x.to(dtype), None if bias is None else bias.to(dtype)), CAST_INPUT


# --- 6: multiply, in refq4/matmul.py --------------------------------------------------------------------------------

# --- 7 --------------------------------------------------------------------------------------------------------------

BACK_NOTHING = Decision("nothing", "the result has the input's dtype")
BACK_CAST = Decision("cast", "the result goes back to the input's dtype")


def cast_back(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Decision]:
    """Step 7: cast the result to the dtype of the caller's input.

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
    step = recorder(layer, ids)
    state, _ = recover_quant_state(layer)
    table = state.packed_weight(as_stored(layer.weight, looked_up=True))
    whole_blocks = table.shape[1] % table.blocksize == 0
    wanted = _rows(table, state, ids) if whole_blocks else table
    rows = dispatch.dequantize_4bit(wanted, state.dtype or torch.float32, registry.requested_backend(None))
    if not whole_blocks:
        rows = torch.nn.functional.embedding(ids, rows)
    return step(0, rows.to(layer.dtype), ROWS_ONLY if whole_blocks else WHOLE_TABLE)  # no step of a linear layer


def _rows(table: PackedWeight, state: QuantState, ids: Tensor) -> PackedWeight:
    """Gather the packed bytes and scales of the rows: the small tensor they make."""
    (count, dim), gather = table.shape, torch.nn.functional.embedding
    packed = gather(ids, table.packed.view(count, dim // 2)).reshape(-1)
    absmax = gather(ids, decode_scales(state).view(count, dim // table.blocksize)).reshape(-1)
    return PackedWeight(packed, absmax, table.code, table.blocksize, (*ids.shape, dim), table.quant_type)
