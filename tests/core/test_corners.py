"""Corners that no other test looks into.

The meta device serves as the second device that a machine without a GPU lacks: what is dropped on the way shows there
as a tensor on the CPU.
"""

from __future__ import annotations

import io
import itertools
import re
import sys
import time
import traceback
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loopback import SWAPPED, Loopback
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import refq4
import refq4.functional as F
from refq4 import matmul, pipeline, registry
from refq4.autograd import MatMul4Bit
from refq4.backend import Backend, PackedWeight, PreparedWeight
from refq4.codebooks import Codebook, get_codebook
from refq4.internals import codec, dispatch, schemas
from refq4.internals.blockwise import slice_state
from refq4.internals.checks import check_blockwise, warn_caller
from refq4.internals.dynamic_map import _dynamic_map_values
from refq4.nn import LinearNF4, Params4bit
from refq4.reference import ReferenceBackend
from refq4.tools.explain import _first_difference

pytestmark = pytest.mark.reference_only("it names its engine itself")

A = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
HALVES = (torch.float16, torch.bfloat16)


class Recorder(Loopback):
    """Notes from where it was called; runs only where it is named."""

    name = "recorder"
    priority = -1
    called_from: frozenset[str] = frozenset()

    def gemm_4bit(self, x: Any, weight: Any, bias: Any) -> torch.Tensor:
        self.called_from |= {frame.filename for frame in traceback.extract_stack()}
        return super().gemm_4bit(x, weight, bias)


@pytest.fixture(params=[False, True], ids=["canonical layout", "own layout"])
def recorder(request):
    with registry.isolated_registry():
        yield refq4.register_backend(Recorder(request.param))


@pytest.fixture
def layer() -> LinearNF4:
    torch.manual_seed(1)
    return LinearNF4(128, 8, compress_statistics=True).to("cpu").eval()


# --- the way to a backend ---------------------------------------------------------------------------------------------


class Ops(TorchDispatchMode):
    """Keeps the ops that the dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Nothing(TorchFunctionMode):
    """Stands in the way, and changes nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    """A tensor with a class of its own."""


def through_the_dispatcher(backend: Recorder) -> bool:
    return any(file.endswith("torch/_ops.py") for file in backend.called_from)


def test_an_ordinary_product_goes_straight_to_the_backend(recorder, layer):
    with torch.no_grad(), refq4.use_backend("recorder"):
        layer(A)
    assert not through_the_dispatcher(recorder)


@pytest.mark.parametrize("what", ["dispatch mode", "function mode", "profiler", "tracing", "vmap", "subclass"])
def test_whatever_acts_on_ops_sees_the_product_as_one_and_the_result_stays(recorder, layer, what):
    layer.requires_grad_(False)
    with torch.no_grad(), refq4.use_backend("recorder"):
        wanted = layer(A)
        product = torch.ops.refq4.matmul_prepared if recorder.own_layout else torch.ops.refq4.gemm_4bit
        if what == "dispatch mode":
            with Ops() as mode:
                got = layer(A)
            assert product.default in mode.seen
        elif what == "function mode":
            with Nothing():
                got = layer(A)
        elif what == "profiler":
            with torch.autograd.profiler.profile() as profile:
                got = layer(A)
            assert f"refq4::{product.__name__}" in {event.name for event in profile.function_events}
        elif what == "tracing":
            weight = layer.weight._form.prepared if recorder.own_layout else None
            packed = layer.quant_state.packed_weight(layer.weight.stored())

            def run(x: torch.Tensor) -> torch.Tensor:
                if weight is not None:
                    return dispatch.product("gemm_4bit", x, weight, layer.bias, "recorder")
                return dispatch.product("gemm_4bit", x, packed, layer.bias, "recorder")

            got = torch.jit.trace(run, A, check_trace=False)(A)
        elif what == "vmap":
            got = torch.vmap(layer)(A.view(2, 4, 128)).view(8, 8)
        else:
            got = layer(A.as_subclass(Subclass)).as_subclass(torch.Tensor)
    assert through_the_dispatcher(recorder)
    assert torch.equal(got, wanted)


def test_a_gradient_wanted_for_the_bias_alone_takes_the_way_that_tracks_it():
    B, state = F.quantize_4bit(A, quant_type="nf4")
    bias = torch.zeros(8, requires_grad=True)

    class Foreign(Loopback):
        """What autograd can't look into, as a kernel in C is."""

        name = "foreign"

        def gemm_4bit(self, x: Any, weight: Any, bias: Any) -> torch.Tensor:
            return super().gemm_4bit(x, weight, bias).detach()

    with registry.isolated_registry():
        refq4.register_backend(Foreign())
        dispatch.product("gemm_4bit", A, state.packed_weight(B), bias, "foreign").sum().backward()
    assert torch.equal(bias.grad, torch.full((8,), 8.0))


def test_forward_mode_follows_the_bias_alone_and_vmap_keeps_the_backend(recorder):
    B, state = F.quantize_4bit(A, quant_type="nf4")
    bias, tangent = torch.randn(8), torch.randn(8)
    _, got = torch.func.jvp(lambda b: MatMul4Bit.apply(A, B, None, b, state), (bias,), (tangent,))
    assert torch.equal(got, tangent.expand(8, 8))
    with refq4.trace() as t:
        torch.func.vmap(lambda a: MatMul4Bit.apply(a, B, None, None, state, "recorder"))(A)
    assert {op.backend for op in t.ops} == {"recorder"}


def test_vmap_adds_a_bias_per_batch_entry_to_a_product_on_an_own_layout(layer):
    B, state = F.quantize_4bit(A, quant_type="nf4")
    x, bias = torch.randn(5, 2, 128), torch.randn(5, 8)
    with registry.isolated_registry(), torch.no_grad():
        prepared = refq4.register_backend(Recorder(own_layout=True)).prepare_weight(state.packed_weight(B))
        got = torch.vmap(lambda a, b: dispatch.product("gemm_4bit", a, prepared, b, "recorder"))(x, bias)
    wanted = torch.stack(
        [nn.functional.linear(a, F.dequantize_4bit(B, state), b) for a, b in zip(x, bias, strict=True)]
    )
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_reference_reads_no_layout_but_the_canonical():
    prepared = PreparedWeight("recorder", SWAPPED, (A,), (8, 128), 64, "nf4")
    with pytest.raises(refq4.BackendUnsupportedError, match="reads the canonical layout only, not 'nibbles swapped'"):
        ReferenceBackend().gemm_4bit(A, prepared, None)


def test_a_backend_is_asked_once_whether_it_is_available_and_need_not_describe_itself():
    asked = []

    class Quiet(ReferenceBackend):
        name, priority = "quiet", -1
        description = Backend.description

        def available(self) -> None:
            asked.append(self)

    with registry.isolated_registry():
        refq4.register_backend(Quiet())
        with refq4.use_backend("quiet"):
            for _ in range(3):
                F.quantize_4bit(A)
        assert registry.backend_info("quiet")["description"] == ""
    assert len(asked) == 1


# --- what ops promise before they run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_every_op_says_on_meta_what_shapes_and_dtypes_it_will_give(dtype, layer):
    B, state = F.quantize_4bit(A, quant_type="nf4")
    weight, x = state.packed_weight(B), A.to(dtype).view(2, 4, 128)
    q, scales = codec.quantize_blockwise(x, F.create_dynamic_map(), 64, "reference")
    with registry.isolated_registry(), torch.no_grad():
        prepared = refq4.register_backend(Recorder(own_layout=True)).prepare_weight(weight)
        own = ([*prepared.tensors], SWAPPED, [8, 128], 64, "nf4")
        calls = [
            (torch.ops.refq4.quantize_4bit, (x, 64, "nf4", False, "reference")),
            (torch.ops.refq4.quantize_blockwise, (x, F.create_dynamic_map(), 64, "reference")),
            (torch.ops.refq4.dequantize_blockwise, (q, scales, F.create_dynamic_map(), 64, dtype, "reference")),
            (torch.ops.refq4.dequantize_4bit, (*schemas.flatten(weight), dtype, "reference")),
            (torch.ops.refq4.gemm_4bit, (x, *schemas.flatten(weight), None, "reference")),
            (torch.ops.refq4.gemv_4bit, (x[:1, :1], *schemas.flatten(weight), None, "reference")),
            (torch.ops.refq4.matmul_prepared, (x, *own, None, "gemm_4bit", "recorder")),
            (torch.ops.refq4.restore_weight, (*own, "recorder")),
            (torch.ops.refq4.grad_input_4bit, (x[..., :8], *schemas.flatten(weight), "reference")),
        ]  # fmt: skip
        for op, args in calls:
            on_meta = tree_map_only(torch.Tensor, lambda t: t.to("meta"), args)
            promised, given = (tree_leaves(op(*of)) for of in (on_meta, args))
            assert all(tensor.is_meta for tensor in promised)
            assert [(t.shape, t.dtype) for t in promised] == [(t.shape, t.dtype) for t in given], op


def test_the_gradient_in_half_precision_is_rounded_once_where_torch_has_no_fast_product(monkeypatch):
    monkeypatch.setattr(dispatch, "_SLOW_ON_CPU", HALVES)
    B, state = F.quantize_4bit(A, quant_type="nf4")
    for dtype in HALVES:
        grad_y = torch.randn(4, 8).to(dtype)
        grad = dispatch.grad_input(grad_y, state.packed_weight(B), "reference")
        assert torch.equal(grad, (grad_y.float() @ F.dequantize_4bit(B, state).to(dtype).float()).to(dtype))


def test_the_reference_decodes_eight_bits_where_the_codes_are():
    q, absmax = torch.zeros(64, dtype=torch.uint8, device="meta"), torch.ones(1, device="meta")
    code = torch.ones(256, device="meta")
    assert ReferenceBackend().dequantize_blockwise(q, absmax, code, 64, torch.float32).is_meta


def test_what_is_made_on_meta_is_there_with_its_tables():
    packed, state = F.quantize_4bit(A.to("meta"), quant_type="nf4")
    assert all(t.is_meta for t in (packed, state.absmax, state.code))
    assert F.get_4bit_type("nf4", device="meta").is_meta


def test_tables_are_single_precision_whatever_the_default_is():
    before, single = torch.get_default_dtype(), _dynamic_map_values(True, 7, 8)
    torch.set_default_dtype(torch.float64)
    try:
        assert F.create_dynamic_map(True, 3, 8).dtype == F.get_4bit_type("nf4").dtype == torch.float32
        assert _dynamic_map_values(True, 7, 8) == single
    finally:
        torch.set_default_dtype(before)


def test_what_is_not_said_is_plain_scales_a_shape_of_torch_and_the_lowest_priority():
    for quantize in (F.quantize_4bit, F.quantize_nf4, F.quantize_fp4):
        assert not quantize(A)[1].nested
    assert isinstance(F.QuantState(torch.ones(16), shape=[8, 128]).shape, torch.Size)
    assert Backend.priority == 1


def test_only_what_is_not_finite_draws_the_warning_about_its_mean():
    F.quantize_4bit(A, compress_statistics=True, allow_nonfinite=True)
    with pytest.warns(UserWarning, match="its mean scale does too"):
        F.quantize_4bit(A * torch.inf, compress_statistics=True, allow_nonfinite=True)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_a_weight_in_full_precision_takes_every_cast():
    weight = Params4bit(A.clone(), quant_type="nf4")
    casts = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32, "double": torch.float64}
    for name, dtype in casts.items():
        cast = getattr(weight, name)()
        assert (cast.dtype, cast.bnb_quantized, cast.quant_state) == (dtype, False, None)


def test_a_weight_made_with_the_settings_of_another_knows_its_layer(layer):
    again = Params4bit(layer.weight.stored(), **layer.weight.__dict__)
    assert again.module is layer
    assert again.quant_state is layer.quant_state


def test_from_saved_entries_to_meta_everything_is_on_meta(layer):
    saved = layer.state_dict()
    stats = {key: value for key, value in saved.items() if key.startswith("weight.")}
    state = F.QuantState.from_dict(stats, device="meta")
    weight = Params4bit.from_prequantized(saved["weight"], stats, device="meta")
    for tensors in (state, weight.quant_state):
        held = (tensors.absmax, tensors.code, tensors.offset, tensors.state2.absmax, tensors.state2.code)
        assert all(t.is_meta for t in held)
    assert weight.is_meta
    assert weight.data.is_meta
    assert weight.quant_storage == weight.dtype == torch.uint8
    assert Params4bit.from_prequantized(saved["weight"].to("meta"), stats, device="meta").is_meta
    on_meta = F.QuantState.from_dict({k: v if "bitsandbytes" in k else v.to("meta") for k, v in stats.items()})
    assert on_meta.offset.is_meta


def test_what_is_on_meta_alone_is_refused_by_its_name(layer):
    saved = layer.state_dict()
    packed = saved.pop("weight")
    stats = {key: value for key, value in saved.items() if key.startswith("weight.")}
    with pytest.raises(ValueError, match=r"^weight: is on meta"):
        F.QuantState.from_dict(stats, packed=packed.to("meta"))
    with pytest.raises(ValueError, match=r"^of\.a\.weight: is on meta"):
        F.QuantState.from_dict({f"of.a.{key}": value for key, value in stats.items()}, packed=packed.to("meta"))
    all_there = {key: value if "bitsandbytes" in key else value.to("meta") for key, value in stats.items()}
    with pytest.raises(ValueError, match=r"is on meta"):
        F.QuantState.from_dict(all_there, device="cpu", packed=packed.to("meta"))
    F.QuantState.from_dict(stats, device="meta", packed=packed.to("meta"))


def test_entries_that_claim_more_than_they_hold_are_refused_by_their_names(layer):
    stats = {key: value for key, value in layer.state_dict().items() if key.startswith("weight.")}
    for key in ("weight.absmax", "weight.nested_absmax", "weight.quant_map", "weight.nested_quant_map"):
        with pytest.raises(ValueError, match=rf"^{key}: .*claims \d+ bytes, and there are"):
            F.QuantState.from_dict(stats | {key: _claiming(stats[key])})
    with pytest.raises(ValueError, match=r"^some\.weight: shape \[8, 128\] packs into"):
        layer.quant_state.check_packed(torch.zeros(3, dtype=torch.uint8), "some.weight")
    with pytest.raises(ValueError, match=r"^weight: shape \[8, 128\] packs into"):
        layer.quant_state.check_packed(torch.zeros(3, dtype=torch.uint8))


def _claiming(like: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor whose storage was taken away."""
    tensor = like.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("length", [200, 201])
def test_a_key_is_shown_whole_up_to_200_characters(layer, length):
    stats = {key: value for key, value in layer.state_dict().items() if key.startswith("weight.")}
    key = "k" * (length - len(".absmax"))
    spoilt = {f"{key}{name.removeprefix('weight')}": value for name, value in stats.items()}
    spoilt[f"{key}.absmax"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"absmax|kkk") as error:
        F.QuantState.from_dict(spoilt)
    assert (f"{key}.absmax" in str(error.value)) is (length == 200)


def test_what_ops_read_of_a_weight_is_a_plain_tensor(layer):
    assert type(layer.weight.readable()) is torch.Tensor


def test_preparing_in_inference_mode_leaves_an_ordinary_parameter():
    with registry.isolated_registry():
        refq4.register_backend(Recorder(own_layout=True))
        layer = LinearNF4(256, 64).to("cpu").eval()
        with torch.inference_mode(), refq4.use_backend("recorder"):
            layer(torch.ones(3, 256))
        assert layer.weight.prepared
        with torch._C.DisableTorchFunctionSubclass():
            assert not layer.weight.data.is_inference()


def test_another_compute_dtype_asks_the_backend_again():
    with registry.isolated_registry():
        asked = []

        class Choosy(Recorder):
            def can_run(self, call: Any) -> None:
                asked.append(call.dtype)

        refq4.register_backend(Choosy(own_layout=True))
        layer = LinearNF4(256, 64, compute_dtype=torch.bfloat16).to("cpu").eval()
        with torch.no_grad(), refq4.use_backend("recorder"):
            layer(torch.ones(3, 256))
            layer.compute_dtype = torch.float32
            asked.clear()
            layer(torch.ones(3, 256))
        assert asked == [torch.float32]


def test_a_prepared_weight_is_restored_where_it_is_read_by_keyword():
    with registry.isolated_registry():
        refq4.register_backend(Recorder(own_layout=True))
        layer = LinearNF4(256, 64).to("cpu").eval()
        wanted = layer.weight.stored().clone()
        with torch.no_grad(), refq4.use_backend("recorder"):
            layer(torch.ones(3, 256))
        assert layer.weight.prepared
        assert torch.equal(torch.clone(input=layer.weight), wanted)


def test_a_weight_of_nothing_is_empty():
    assert Params4bit().numel() == 0


def test_new_data_for_a_prepared_weight_has_no_old_form():
    with registry.isolated_registry():
        refq4.register_backend(Recorder(own_layout=True))
        layer = LinearNF4(256, 64).to("cpu").eval()
        with torch.no_grad(), refq4.use_backend("recorder"):
            x = torch.ones(3, 256)
            before = layer(x)
            assert layer.weight.prepared
            layer.weight.data = torch.zeros(8192, 1, dtype=torch.uint8)
            assert not layer.weight.prepared
            assert not layer.weight.stored().any()
            assert not torch.equal(layer(x), before)


def test_a_weight_that_accelerate_brings_for_each_call_gets_no_own_layout(layer):
    with registry.isolated_registry():
        refq4.register_backend(Recorder(own_layout=True))
        with torch.no_grad(), refq4.use_backend("recorder"):
            wanted = layer(A)
            assert layer.weight.prepared
            layer._hf_hook = SimpleNamespace(offload=True)
            assert torch.equal(layer(A), wanted)
            assert not layer.weight.prepared
            weight, decision = pipeline.choose_layout(layer, layer.quant_state, A)
        assert (type(weight.weight), decision) == (PackedWeight, pipeline.LAYOUT_OFFLOADED)


# --- modules ----------------------------------------------------------------------------------------------------------


def test_a_weight_rebuilt_in_full_precision_is_cast_like_any_other():
    layer = LinearNF4(64, 8)
    layer.weight = nn.Parameter(torch.randn(8, 64))
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16


def test_emptied_on_its_own_device_a_layer_keeps_its_state_and_from_meta_it_waits_for_one(layer):
    assert layer.to_empty(device="cpu").quant_state is not None
    on_meta = LinearNF4(128, 8).to("cpu").to("meta")
    assert on_meta.quant_state.absmax.is_meta
    assert on_meta.to_empty(device="meta").quant_state.absmax.is_meta
    assert on_meta.to_empty(device="cpu").quant_state is None


def test_saved_tensors_are_plain_and_detached_unless_variables_are_asked_for(layer):
    assert all(type(value) is torch.Tensor for value in layer.state_dict().values())
    assert not any(value.requires_grad for value in layer.state_dict().values())
    assert layer.state_dict(keep_vars=True)["bias"] is layer.bias
    assert layer.state_dict(keep_vars=True)["weight"] is layer.weight


def test_what_is_saved_is_the_state_of_the_weight_that_is_there(layer):
    other = Params4bit(2 * A, quant_type="nf4").to("cpu")
    layer.weight = other
    assert layer.quant_state is not other.quant_state
    entries = layer.state_dict()
    assert F.QuantState.from_dict({k: v for k, v in entries.items() if "weight." in k}) == other.quant_state


def test_the_stand_in_for_a_sharded_weight_has_every_public_name_and_no_other(layer):
    stand_in = getattr(layer, layer._fqn_modifiers()["weight"])
    assert stand_in.quant_state.absmax is stand_in
    assert not hasattr(stand_in, "__len__")
    assert not hasattr(stand_in, "_private")


# --- functions --------------------------------------------------------------------------------------------------------


def test_a_wrong_tensor_to_fill_is_named():
    q, state = F.quantize_blockwise(A, blocksize=64)
    for name, call in {
        "absmax": lambda wrong: F.quantize_blockwise(A, absmax=wrong, blocksize=64),
        "out": lambda wrong: F.quantize_blockwise(A, out=wrong, blocksize=64),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name}= must be"):
            call(torch.zeros(3))
    with pytest.raises(ValueError, match=r"^out= must be"):
        F.dequantize_blockwise(q, state, out=torch.zeros(3))
    B, state = F.quantize_4bit(A, quant_type="nf4")
    with pytest.raises(TypeError, match=r"^A "):
        F.matmul_4bit(torch.ones(3, 128, dtype=torch.int32), B, state)
    with pytest.raises(TypeError, match=r"^A "):
        F.gemv_4bit(torch.ones(1, 128, dtype=torch.int32), B, state=state)


def test_what_is_missing_to_decode_is_said():
    B, state = F.quantize_4bit(A, quant_type="nf4")
    for absmax, out in ((state.absmax, None), (None, torch.empty(8, 128)), (None, None)):
        with pytest.raises(ValueError, match="absmax"):
            F.dequantize_4bit(B, None, absmax, out)
    q, blockwise = F.quantize_blockwise(A, blocksize=64)
    for name in ("code", "blocksize"):
        lacking = blockwise.copy()
        setattr(lacking, name, None)
        with pytest.raises(ValueError, match="has no code or no blocksize"):
            F.dequantize_blockwise(q, lacking)


def test_a_scalar_and_an_empty_tensor_have_no_pieces():
    for shape in ((), (4, 0), (0, 4)):
        _, state = F.quantize_4bit(torch.ones(shape), quant_type="nf4")
        piece = slice_state(state, 0, state.shape.numel())
        assert piece is None if shape != (0, 4) else piece.shape == (0, 4), shape
    _, state = F.quantize_4bit(A, blocksize=32, quant_type="nf4")
    assert slice_state(state, 64, 256) is slice_state(state, 0, 64) is None  # whole blocks, half a row


def test_a_code_of_256_entries_decodes_every_byte_and_one_of_255_is_asked():
    q = torch.full((4,), 255, dtype=torch.uint8)
    check_blockwise(q, torch.zeros(1), torch.zeros(256), 32)
    for codes, device in ((q[:0], "cpu"), (q, "meta")):  # nothing to look at
        absmax = torch.zeros(-(-codes.numel() // 32), device=device)
        check_blockwise(codes.to(device), absmax, torch.zeros(16, device=device), 32)
    with pytest.raises(ValueError, match="code has 255 entries, and the largest of the codes to decode is 255"):
        check_blockwise(q, torch.zeros(1), torch.zeros(255), 32)


def test_a_warning_points_at_the_first_line_outside_the_package():
    with pytest.warns(UserWarning, match="mind") as caught:
        warn_caller("mind")
    assert caught[0].filename == __file__


def test_values_beyond_fp32_are_infinite_in_their_own_direction_and_no_codebook():
    for value in (1e39, -1e39):
        book = [value if i == (15 if value > 0 else 0) else (i - 7) / 8 for i in range(16)]
        with pytest.raises(ValueError, match="-inf" if value < 0 else r"[^-]inf|finite"):
            Codebook("far", book)
    assert get_codebook("int4").encode([1e39, -1e39]) == get_codebook("int4").encode([1.0, -1.0])


def test_operands_are_cast_both_and_rows_are_decoded_from_flat_bytes():
    (x, bias), decision = pipeline.cast_operands(torch.ones(1, 64), torch.ones(8), torch.bfloat16)
    assert (x.dtype, bias.dtype, decision) == (torch.bfloat16, torch.bfloat16, pipeline.CAST_INPUT)


@pytest.mark.parametrize("module", [pipeline, matmul], ids=lambda module: module.__name__)
def test_every_decision_says_what_and_why(module):
    decisions = {name: thing for name, thing in vars(module).items() if isinstance(thing, pipeline.Decision)}
    assert decisions
    for name, decision in decisions.items():
        assert re.fullmatch(r"\w.*", decision.choice), name
        assert re.fullmatch(r"\w.{10,}", decision.why), name


# --- what people are shown --------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("progress", [True, False])
def test_a_bar_counts_layers_on_a_terminal_unless_it_is_not_wanted(monkeypatch, progress):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    refq4.quantize_model(nn.Sequential(nn.Linear(64, 64)), quant_type="nf4", progress=progress)
    assert ("quantising to nf4" in screen.getvalue() and "layer" in screen.getvalue()) is progress
    assert bool(screen.getvalue()) is progress


def test_steps_and_ops_take_the_time_between_two_looks_at_the_clock(monkeypatch, layer):
    ticks = itertools.count(0, 3_000_000)
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(ticks))
    with torch.no_grad(), refq4.use_backend("reference"), refq4.trace() as t:
        layer(A)
    (call,) = t.calls
    assert [op.micros for op in t.ops] == [3000.0]
    # each step ends with a look and one for the next; the product looks twice more
    assert [step.micros for step in call.steps] == [3000.0] * 5 + [9000.0] + [3000.0]


def test_steps_without_a_number_are_shown_without_one():
    table = refq4.nn.EmbeddingNF4(10, 64).to("cpu")
    with refq4.trace() as t:
        table(torch.tensor([1]))
    assert "embedding rows" in t.text()
    assert "0 embedding rows" not in t.text()
    assert sys.modules["refq4.trace"]._listeners == 0  # or every call from now on would look for one


def test_a_comparison_names_each_backend_once_and_tells_all_it_knows(layer):
    with registry.isolated_registry():
        refq4.register_backend(Recorder())
        report = refq4.compare(layer, A)
        assert len(set(report.backends)) == len(report.backends)
        assert report.backends[0] == "reference"
        told = refq4.compare(layer, A, backends=["reference", "recorder"]).to_dict()
        shown = refq4.compare(layer, A, backends=["reference", "recorder"]).text(width=200)
    assert told.keys() == {"backends", "errors", "first_difference", "largest_difference", "traces"}
    assert "(recorder: loopback g" in shown
    assert refq4.compare(lambda: "same", backends=["reference"]).largest_difference("reference") == 0


def test_a_trace_that_ends_early_differs_where_it_ends(layer):
    with torch.no_grad(), refq4.use_backend("reference"), refq4.trace(keep_values=True) as whole:
        layer(A)
    with torch.no_grad(), refq4.use_backend("reference"), refq4.trace(keep_values=True) as part:
        layer(A)
    assert _first_difference(whole, part) is None
    del part.calls[0].steps[3:]
    assert _first_difference(whole, part) == (0, 3)


def test_a_backend_with_fewer_steps_or_calls_differs_where_they_end(layer):
    table = refq4.nn.EmbeddingNF4(10, 64).to("cpu")

    def fewer_steps(x: torch.Tensor) -> torch.Tensor:
        if registry.get_backend() != "reference":
            table(torch.tensor([1]))
            return x
        with torch.no_grad():
            layer(x)
        return x

    def fewer_calls(x: torch.Tensor) -> torch.Tensor:
        layer(x)
        if registry.get_backend() == "reference":
            layer(x)
        return x

    with registry.isolated_registry():
        refq4.register_backend(Recorder())
        names = ["reference", "recorder"]
        assert refq4.compare(fewer_calls, A, backends=names).first_difference == {"recorder": (1, 0)}
        assert refq4.compare(fewer_steps, A, backends=names).first_difference["recorder"][0] == 0
