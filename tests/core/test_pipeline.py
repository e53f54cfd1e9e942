"""The seven steps: each decision is reached, and the numbers follow it."""

from __future__ import annotations

import copy
import re
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loopback import SWAPPED, Loopback, Recorder
from torch import nn

import refq4
import refq4.functional as F
from refq4 import matmul, pipeline
from refq4.backend import Backend, PackedWeight
from refq4.nn import LinearNF4
from refq4.testing import assert_same_bits, assert_within_budget
from refq4.testing.isolation import isolated_registry

A = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))


def layer_of(n: int = 8, k: int = 64, **settings) -> refq4.nn.Linear4bit:
    return refq4.nn.Linear4bit(k, n, quant_type="nf4", **settings).to("cpu").eval()


@pytest.fixture
def layer() -> LinearNF4:
    torch.manual_seed(1)
    return LinearNF4(128, 8, compress_statistics=True).to("cpu").eval()


def steps_of(layer: nn.Module, x: torch.Tensor) -> dict[int, str]:
    """Step number -> the decision taken, from the trace."""
    with refq4.trace() as t:
        layer(x)
    return {step.number: step.choice for step in t.calls[0].steps}


def why(layer: nn.Module, x: torch.Tensor, step: int) -> str:
    with refq4.trace() as t:
        layer(x)
    return t.calls[0].steps[step - 1].why


def dense(layer: refq4.nn.Linear4bit, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return F.dequantize_4bit(layer.weight, layer.quant_state).to(dtype)


# --- 1 ----------------------------------------------------------------------------------------------------------------


def test_step_1_keeps_the_state_on_the_weight():
    layer = layer_of()
    assert pipeline.recover_quant_state(layer) == (layer.weight.quant_state, pipeline.STATE_ON_WEIGHT)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_step_1_recovers_the_state_from_the_module_when_the_parameter_was_rebuilt_from_bytes(storage):
    layer, x = layer_of(quant_storage=storage), torch.randn(3, 64)
    wanted = layer(x)
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)  # what FSDP leaves behind
    assert steps_of(layer, x)[1] == "recovered"
    assert_same_bits(layer(x), wanted)
    assert "weight.absmax" in layer.state_dict()
    assert "packed" in repr(layer)
    bias, stored = layer.bias.detach().clone(), layer.weight.detach().clone()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):  # moving and casting the module: never the bytes
        for cast in (lambda dtype: layer.to("cpu", dtype), layer.type):
            cast(dtype)
            assert layer.bias.dtype == dtype
            assert_same_bits(layer.weight.detach(), stored)
    layer.bias.data = bias
    assert_same_bits(layer(x), wanted)


def test_step_1_says_how_to_quantise_a_layer_that_is_not():
    with pytest.raises(RuntimeError, match=r"this LinearNF4 has not been quantised: call \.to\(device\)"):
        refq4.nn.LinearNF4(64, 8)(torch.randn(1, 64))


# --- 2 ----------------------------------------------------------------------------------------------------------------


def test_step_2_prepares_the_backends_layout_once_for_inference():
    backend = refq4.register_backend(Loopback(own_layout=True))
    refq4.set_backend("loopback")
    layer, x = layer_of(), torch.randn(3, 64)
    wanted = F.matmul_4bit(x, layer.weight, layer.quant_state, bias=layer.bias, backend="reference")
    with torch.no_grad():
        assert steps_of(layer, x)[2] == "own layout"
        assert_same_bits(layer(x), wanted.detach())
        assert steps_of(layer, torch.randn(1, 64))[6] == "own layout"
    assert backend.seen["prepare_weight"] == 1
    assert backend.seen["prepared product"] == 3


@pytest.mark.parametrize("own_layout", [False, True], ids=["canonical layout", "own layout"])
def test_the_state_dict_is_bit_identical_before_and_after_inference(own_layout):
    refq4.register_backend(Loopback(own_layout=own_layout))
    layer = layer_of(quant_storage=torch.bfloat16)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with torch.no_grad():
        layer(torch.randn(3, 64))
        layer(torch.randn(1, 64, dtype=torch.bfloat16))
    after = layer.state_dict()
    assert list(before) == list(after)
    for key, value in before.items():
        assert_same_bits(after[key], value, key)


def test_step_2_stays_canonical_in_training_and_where_a_gradient_is_wanted():
    refq4.register_backend(Loopback(own_layout=True))
    layer, x = layer_of(), torch.randn(3, 64)
    assert why(layer.train(), x, 2) == "the layer is in training mode"
    assert why(layer.eval(), x.clone().requires_grad_(), 2) == "a gradient is wanted"


def test_step_2_prepares_again_when_backend_state_or_bytes_change():
    first = refq4.register_backend(Loopback(own_layout=True))

    class Second(Loopback):
        name = "second"

    second = refq4.register_backend(Second(own_layout=True))
    layer, x = layer_of(), torch.randn(3, 64)
    with torch.no_grad():
        for name in ("loopback", "second", "reference", "loopback"):
            with refq4.use_backend(name):
                assert_within_budget(layer(x), x, layer.weight, layer.quant_state, layer.bias, name)
        assert (first.seen["prepare_weight"], second.seen["prepare_weight"]) == (2, 1)
        refq4.set_backend("loopback")
        layer(x)
        assert first.seen["prepare_weight"] == 2
        layer.weight.bitwise_xor_(1)  # other codes in the same memory
        assert_within_budget(layer(x), x, layer.weight, layer.quant_state, layer.bias, "bytes changed")
        layer.weight.quant_state.absmax[0] += 1
        assert_within_budget(layer(x), x, layer.weight, layer.quant_state, layer.bias, "scale changed")
        layer.load_state_dict(layer_of().state_dict())
        assert_within_budget(layer(x), x, layer.weight, layer.quant_state, layer.bias, "loaded")


def test_a_copy_does_not_carry_the_prepared_layout():
    refq4.register_backend(Loopback(own_layout=True))
    refq4.set_backend("loopback")
    layer, x = layer_of(), torch.randn(3, 64)
    with torch.no_grad():
        layer(x)
        assert layer.weight._form.prepared.layout == SWAPPED
        twin = copy.deepcopy(layer)
        assert twin.weight._form is None
        assert_same_bits(twin(x), layer(x))


@pytest.mark.reference_only("it names its engine itself")
def test_another_compute_dtype_asks_the_backend_again():
    with isolated_registry():
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


@pytest.mark.reference_only("it names its engine itself")
def test_a_weight_that_accelerate_brings_for_each_call_gets_no_own_layout(layer):
    with isolated_registry():
        refq4.register_backend(Recorder(own_layout=True))
        with torch.no_grad(), refq4.use_backend("recorder"):
            wanted = layer(A)
            assert layer.weight.prepared
            layer._hf_hook = SimpleNamespace(offload=True)
            assert torch.equal(layer(A), wanted)
            assert not layer.weight.prepared
            weight, decision = pipeline.choose_layout(layer, layer.quant_state, A)
        assert (type(weight.weight), decision) == (PackedWeight, pipeline.LAYOUT_OFFLOADED)


def test_switching_the_backend_between_two_calls_keeps_the_result():
    own = refq4.register_backend(Loopback(own_layout=True))
    layer, x = refq4.nn.LinearNF4(64, 8).to("cpu").eval(), torch.randn(3, 64)
    with torch.no_grad():
        results = []
        for name in ("reference", "loopback", "reference", "loopback"):
            refq4.set_backend(name)
            results.append(layer(x))
    assert own.seen["prepared product"] == 2
    for result in results[1:]:
        assert_same_bits(result, results[0])


# --- 3 ----------------------------------------------------------------------------------------------------------------


def test_step_3_casts_a_copy_of_the_bias_and_leaves_the_parameter_alone():
    layer = layer_of()
    bias = layer.bias.detach().clone()
    assert steps_of(layer, torch.randn(3, 64))[3] == "kept"
    assert steps_of(layer, torch.randn(3, 64).bfloat16())[3] == "cast"
    assert_same_bits(layer.bias.detach(), bias)
    assert steps_of(layer_of(bias=False), torch.randn(3, 64))[3] == "none"


def test_step_3_rounds_the_bias_to_the_input_dtype_as_bitsandbytes_does():
    layer = layer_of(compute_dtype=torch.float32)
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    assert_same_bits(layer(x)[0], layer.bias.bfloat16().detach().clone(), "x = 0 leaves the bias")


# --- 4 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_4_infers_the_compute_dtype_from_the_first_input_and_keeps_it(dtype):
    layer = layer_of()
    assert steps_of(layer, torch.randn(2, 64, dtype=dtype))[4] == "inferred"
    assert layer.compute_dtype == dtype
    assert steps_of(layer, torch.randn(2, 64, dtype=torch.float32))[4] == "as set"
    assert layer.compute_dtype == dtype


@pytest.mark.parametrize(("tokens", "too"), [(1, ""), (2, ", in training too")])
def test_step_4_computes_fp16_as_it_comes_when_nothing_was_set_and_warns_once(tokens, too):
    layer = layer_of()
    with pytest.warns(
        UserWarning, match=rf"computed in float16{too}, which overflows above 65,504. Pass compute_dtype="
    ):
        y = layer(torch.randn(tokens, 64, dtype=torch.float16))
    assert (y.dtype, layer.compute_dtype) == (torch.float16, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert steps_of(layer, torch.randn(tokens, 64, dtype=torch.bfloat16))[4] == "as the input"
        assert layer.compute_dtype is None, "only the first input is asked"
        assert steps_of(layer, torch.randn(tokens, 64, dtype=torch.float16))[4] == "as the input"


@pytest.mark.parametrize(
    ("tokens", "wording"), [(1, "computes in float32: inference will"), (2, "inference and training")]
)
def test_step_4_warns_of_fp16_input_under_fp32_compute(tokens, wording):
    layer = layer_of(compute_dtype=torch.float32)
    with pytest.warns(UserWarning, match=wording):
        layer(torch.randn(tokens, 64, dtype=torch.float16))
    layer(torch.randn(tokens, 64, dtype=torch.float16))  # once


def test_step_4_does_not_warn_of_fp16_input_under_fp16_compute():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer_of(compute_dtype=torch.float16)(torch.randn(1, 64, dtype=torch.float16))


@pytest.mark.reference_only("it compares bits with torch's own linear")
def test_computing_in_fp32_stays_fp32_for_a_half_precision_weight():
    layer = refq4.nn.Linear4bit(64, 8, quant_type="nf4", compress_statistics=False).to(torch.bfloat16).to("cpu")
    x = torch.randn(3, 64)
    exact = copy.deepcopy(layer.quant_state)
    exact.dtype = torch.float32
    weight = F.dequantize_4bit(layer.weight, exact)
    assert not torch.equal(weight, weight.bfloat16().float()), (
        "the decoded weight must not fit bf16 for this to mean much"
    )
    assert_same_bits(layer(x).detach(), nn.functional.linear(x, weight, layer.bias.float()).detach())


# --- 5 and 7 ----------------------------------------------------------------------------------------------------------


@pytest.mark.reference_only("it compares bits with torch's own linear")
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.filterwarnings("ignore:Linear4bit got float16")
def test_steps_5_and_7_compute_in_the_compute_dtype_and_answer_in_the_inputs(x_dtype, compute):
    layer = layer_of(compute_dtype=compute)
    x = torch.randn(3, 64, dtype=x_dtype)
    y = layer(x)
    assert y.dtype == x_dtype
    plain = nn.functional.linear(x.to(compute), dense(layer, compute), layer.bias.to(x_dtype).to(compute)).to(x_dtype)
    assert_same_bits(y.detach(), plain.detach())
    expected = ("nothing", "nothing") if x_dtype == compute else ("cast", "cast")
    chosen = steps_of(layer, x)
    assert (chosen[5], chosen[7]) == expected


@pytest.mark.reference_only("what it checks is the same for every backend")
def test_operands_are_cast_both_and_rows_are_decoded_from_flat_bytes():
    (x, bias), decision = pipeline.cast_operands(torch.ones(1, 64), torch.ones(8), torch.bfloat16)
    assert (x.dtype, bias.dtype, decision) == (torch.bfloat16, torch.bfloat16, pipeline.CAST_INPUT)


# --- 6 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.reference_only("a layout of the backend's own has one path")
def test_step_6_takes_gemv_for_one_token_and_matmul4bit_for_the_rest():
    layer, x = layer_of(), torch.randn(1, 64)
    assert steps_of(layer, x)[6] == "gemv_4bit"
    assert steps_of(layer, x[0])[6] == "gemv_4bit"
    assert steps_of(layer, x.view(1, 1, 64))[6] == "gemv_4bit"
    assert steps_of(layer, torch.randn(2, 64))[6] == "MatMul4Bit"
    assert steps_of(layer, x.clone().requires_grad_())[6] == "MatMul4Bit"
    with torch.no_grad():
        assert steps_of(layer, x.clone().requires_grad_())[6] == "gemv_4bit"
    assert steps_of(layer, torch.randn(0, 64))[6] == "MatMul4Bit"


def test_step_6_warns_when_blocks_straddle_rows_and_takes_the_slower_path():
    layer = layer_of(k=96)
    with pytest.warns(UserWarning, match="in_features 96 is not a multiple of the blocksize 64"):
        assert steps_of(layer, torch.randn(1, 96))[6] == "MatMul4Bit"


@pytest.mark.parametrize(("n", "k", "tokens"), [(8, 64, 0), (8, 0, 2), (0, 64, 2), (8, 0, 1)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_product_without_tokens_features_or_outputs_is_what_torch_says(n, k, tokens):
    linear = nn.Linear(k, n)
    layer = refq4.nn.Linear4bit.from_linear(linear)
    x = torch.randn(tokens, k)
    assert_same_bits(layer(x).detach(), linear(x).detach())


def test_the_path_is_a_decision_with_a_reason():
    _, state = F.quantize_4bit(torch.randn(8, 64), quant_type="nf4")
    assert F.choose_path(torch.randn(1, 64), state) is matmul.ONE_TOKEN
    assert F.choose_path(torch.randn(1, 64), state, prepared=True) is matmul.OWN_LAYOUT
    assert F.choose_path(torch.randn(4, 1, 64), state) is matmul.SEVERAL_TOKENS
    assert F.choose_path(torch.randn(8), state) is matmul.FROM_K_BY_N
    assert "single token" in matmul.ONE_TOKEN.why


def test_the_bias_gets_its_gradient_on_the_gemv_path_too():
    layer, x = layer_of(), torch.randn(1, 64)
    assert steps_of(layer, x)[6] in ("gemv_4bit", "own layout")
    layer(x).sum().backward()
    assert_same_bits(layer.bias.grad, torch.ones(8))


@pytest.mark.parametrize("orientation", ["column", "row"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_packed_weight_works_as_column_and_as_its_transpose(orientation, tokens):
    weight = torch.randn(16, 64)
    B, state = F.quantize_4bit(weight, quant_type="nf4")
    x = torch.randn(tokens, 64)
    assert_within_budget(F.matmul_4bit(x, B if orientation == "column" else B.t(), state), x, B, state)


def test_a_weight_quantised_as_k_by_n_is_computed_and_deprecated():
    weight = torch.randn(64, 8)
    B, state = F.quantize_4bit(weight, quant_type="nf4")
    x, bias = torch.randn(3, 64), torch.randn(8)
    with pytest.warns(DeprecationWarning, match=r"quantised from a \[K, N\] tensor: quant_state.shape is \[64, 8\]"):
        y = F.matmul_4bit(x, B, state, bias=bias)
    assert_same_bits(y, nn.functional.linear(x, F.dequantize_4bit(B, state).t(), bias))


def test_out_is_written_and_refused_with_a_gradient():
    B, state = F.quantize_4bit(torch.randn(8, 64), quant_type="nf4")
    x, out = torch.randn(3, 64), torch.empty(3, 8)
    assert F.matmul_4bit(x, B, state, out=out) is out
    assert_within_budget(out, x, B, state)
    with pytest.raises(ValueError, match="out= can't be combined with a wanted gradient"):
        F.matmul_4bit(x.requires_grad_(), B, state, out=out)
    with pytest.raises(ValueError, match=r"out= must be float32 \[3, 8\]"):
        F.matmul_4bit(x.detach(), B, state, out=torch.empty(3, 9))


# --- the embedding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32], ids=str)
def test_an_embedding_decodes_the_rows_it_is_asked_for(storage):
    table = refq4.nn.Embedding4bit(50, 128, quant_type="nf4", quant_storage=storage).to("cpu")
    ids = torch.tensor([[3, 3], [49, 0]])
    with refq4.trace() as t:
        rows = table(ids)
    assert t.calls[0].steps[0].choice == "rows"
    assert_same_bits(rows, F.dequantize_4bit(table.weight, table.quant_state)[ids])


def test_an_embedding_whose_rows_are_not_whole_blocks_decodes_the_table_and_warned_of_it():
    with pytest.warns(UserWarning, match="embedding_dim 96 is not a multiple of the blocksize 64"):
        table = refq4.nn.EmbeddingFP4(50, 96)
    table.to("cpu")
    ids = torch.tensor([3, 49])
    with refq4.trace() as t:
        rows = table(ids)
    assert t.calls[0].steps[0].choice == "whole table"
    assert_same_bits(rows, F.dequantize_4bit(table.weight, table.quant_state)[ids])


def test_an_embedding_is_saved_and_loaded():
    table = refq4.nn.EmbeddingNF4(50, 64).to("cpu")
    other = refq4.nn.EmbeddingNF4(50, 64)
    other.load_state_dict(table.state_dict())
    ids = torch.arange(50)
    assert_same_bits(other(ids), table(ids))


# --- all decisions ----------------------------------------------------------------------------------------------------


@pytest.mark.reference_only("what it checks is the same for every backend")
@pytest.mark.parametrize("module", [pipeline, matmul], ids=lambda module: module.__name__)
def test_every_decision_says_what_and_why(module):
    decisions = {name: thing for name, thing in vars(module).items() if isinstance(thing, pipeline.Decision)}
    assert decisions
    for name, decision in decisions.items():
        assert re.fullmatch(r"\w.*", decision.choice), name
        assert re.fullmatch(r"\w.{10,}", decision.why), name


# --- a choice of backend is made once ---------------------------------------------------------------------------------


class Switches(Loopback):
    """Chooses another backend for the process as soon as it is asked, as another thread might at that moment."""

    def can_run(self, call):
        refq4.set_backend("reference")
        return super().can_run(call)

    def wrong_device(self, call):
        refq4.set_backend("reference")
        return super().wrong_device(call)


@pytest.mark.parametrize("own_layout", [False, True], ids=["stored bytes", "own layout"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_choice_that_changes_in_the_middle_of_a_call_is_for_the_next_one(tokens, own_layout):
    refq4.register_backend(Switches(own_layout))
    layer, x = layer_of().eval(), torch.randn(tokens, 64)
    refq4.set_backend("loopback")
    with torch.no_grad(), refq4.trace() as t:
        layer(x)
        layer(x)
    assert [[op.backend for op in call.steps[5].ops] for call in t.calls] == [["loopback"], ["reference"]]


def test_exactly_one_question_is_asked_of_a_backend_in_a_forward():
    backend, asked, layer = refq4.register_backend(Loopback(own_layout=True)), [], layer_of()
    backend.can_run = lambda call: asked.append((call.op, call.m, call.grad))
    refq4.set_backend("loopback")
    layer(torch.randn(1, 64))
    layer(torch.randn(1, 64))
    layer(torch.randn(3, 64))
    layer(torch.randn(3, 64, requires_grad=True)).sum().backward()
    layer.train()(torch.randn(1, 64))
    assert asked == [
        ("gemv_4bit", 1, False),
        ("gemv_4bit", 1, False),
        ("gemm_4bit", 3, False),
        ("gemm_4bit", 3, True),
        ("gemv_4bit", 1, False),
    ]


@pytest.mark.parametrize("own_layout", [False, True], ids=["stored bytes", "own layout"])
def test_one_function_decides_path_and_op_for_the_trace_the_call_and_the_kernel(own_layout, monkeypatch):
    backend, asked = refq4.register_backend(Loopback(own_layout)), []
    backend.can_run = lambda call: asked.append(call.op)
    refq4.set_backend("loopback")
    layer, x = layer_of(), torch.randn(1, 64)
    flipped = matmul.Route(matmul.SEVERAL_TOKENS, "gemm_4bit")
    for way, op in ((matmul.route, "gemv_4bit"), (lambda *_: flipped, "gemm_4bit")):
        monkeypatch.setattr(matmul, "route", way)
        asked.clear()
        backend.seen.clear()
        with torch.no_grad(), refq4.trace() as t:
            layer(x)
        step = t.calls[0].steps[5]
        assert step.choice == way(1, 64, 64, False, own_layout).path.choice
        assert (asked, [o.op for o in step.ops]) == ([op], [op])
        assert backend.seen[op] == 1


def test_a_backend_that_cannot_serve_backward_refuses_in_forward_and_auto_passes_it_over():
    class Forward(Backend):
        """Multiplies and decodes nothing."""

        name, priority = "forward", 60

        def gemm_4bit(self, x, weight, bias):
            return refq4.reference.ReferenceBackend().gemm_4bit(x, weight, bias)

    refq4.register_backend(Forward())
    layer, x = layer_of(), torch.randn(3, 64)
    with refq4.use_backend("forward"):
        layer(x)
        with pytest.raises(refq4.BackendUnsupportedError, match="it has no dequantize_4bit, which the gradient needs"):
            layer(x.requires_grad_())
    with refq4.use_backend("auto"), refq4.trace() as t:
        layer(x)
    (op,) = t.calls[0].steps[5].ops
    assert op.backend != "forward"
    assert ("forward", "it has no dequantize_4bit, which the gradient needs") in op.passed_over


def test_autocast_is_part_of_steps_4_and_5():
    layer, x = layer_of(compute_dtype=torch.float32), torch.randn(3, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), refq4.trace() as t:
        assert layer(x).dtype == torch.float32
    steps = t.calls[0].steps
    assert (steps[3].choice, steps[3].result) == ("autocast", "bfloat16")
    assert (steps[4].choice, steps[6].choice) == ("cast", "cast")
    assert "bfloat16" in steps[5].ops[0].call
