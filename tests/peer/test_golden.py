"""refq4 against what bitsandbytes gave on another day: the golden files, made by ``scripts/peer/make_golden.py``.

0.50.2 for formats, nested states and layers; 0.49.1, the version whose steps refq4 follows, for layers and for what a
first forward decides and says. bitsandbytes itself is not imported here.
"""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

import refq4
import refq4.functional as F
from refq4 import codebooks, nn
from refq4.state import BLOCKSIZES
from refq4.testing import assert_same_bits, assert_within_budget

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, None: None}


@cache
def golden(name: str) -> dict[str, Tensor]:
    return safetensors.torch.load_file(GOLDEN / f"{name}.safetensors")


def under(name: str, prefix: str) -> dict[str, Tensor]:
    """The entries of a golden file below a prefix, without it."""
    found = {key.removeprefix(prefix): value for key, value in golden(name).items() if key.startswith(prefix)}
    assert found, f"{name}.safetensors has nothing below {prefix!r}"
    return found


def cases(name: str, last: str) -> list[str]:
    return sorted(key.removesuffix(last) for key in golden(name) if key.endswith(last))


def test_golden_files_are_all_there_and_small():
    files = sorted(path.name for path in GOLDEN.iterdir())
    assert files == [
        "behaviour_0_49_1.json",
        "layers_0_49_1.safetensors",
        "layers_0_50_2.safetensors",
        "nested.safetensors",
        "quantized.safetensors",
        "tables.safetensors",
    ]
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) < 1_000_000


# --- formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nf4", "fp4", "af4"])
def test_code_table_is_the_published_one_to_the_last_bit(name):
    assert_same_bits(F.get_4bit_type(name), golden("tables")[name], name)


def test_nf4_is_derived_from_normal_quantiles_to_the_last_bit():
    assert_same_bits(codebooks.create_normal_map(), golden("tables")["nf4"])


@pytest.mark.parametrize("case", [k for k in cases("tables", "") if k.startswith("dynamic")])
def test_dynamic_map_is_the_published_one_to_the_last_bit(case):
    _, kind, exponent_bits, total_bits = case.split("/")
    mine = codebooks.create_dynamic_map(kind == "signed", int(exponent_bits), int(total_bits))
    assert_same_bits(mine, golden("tables")[case])


def test_golden_tensors_cover_every_dtype_type_and_blocksize():
    wanted = {f"{d}/{q}/{b}" for d in ("float32", "float16", "bfloat16") for q in ("nf4", "fp4") for b in BLOCKSIZES}
    assert wanted < set(cases("quantized", "/packed"))


@pytest.mark.parametrize("case", cases("quantized", "/packed"))
def test_quantising_gives_the_golden_bytes_and_scales(case):
    name, quant_type, blocksize = case.rsplit("/", 2)
    tensors = golden("quantized")
    packed, state = F.quantize_4bit(tensors[f"{name}/x"], blocksize=int(blocksize), quant_type=quant_type)
    assert_same_bits(packed, tensors[f"{case}/packed"], "packed")
    if not name.endswith("thresholds"):  # there it is 1
        assert_same_bits(state.absmax, tensors[f"{case}/absmax"], "absmax")


@pytest.mark.parametrize("case", cases("quantized", "/decoded"))
def test_golden_bytes_decode_to_the_golden_values(case):
    _, quant_type, blocksize = case.rsplit("/", 2)
    tensors = golden("quantized")
    wanted = tensors[f"{case}/decoded"]
    state = F.QuantState(
        tensors[f"{case}/absmax"], wanted.shape, F.get_4bit_type(quant_type), int(blocksize), quant_type, wanted.dtype
    )
    assert_same_bits(F.dequantize_4bit(tensors[f"{case}/packed"], state), wanted)


# --- double quantisation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_golden_nested_state_decodes_to_the_golden_values(dtype):
    tensors = under("nested", f"{dtype}/")
    state = F.QuantState.from_dict(under("nested", f"{dtype}/state/"), packed=tensors["packed"])
    assert state.nested
    assert_same_bits(F.dequantize_4bit(tensors["packed"], state), tensors["decoded"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_quantising_twice_gives_the_golden_state_but_for_nearer_nested_bytes(dtype):
    tensors, wanted = under("nested", f"{dtype}/"), under("nested", f"{dtype}/state/")
    packed, state = F.quantize_4bit(tensors["x"], blocksize=32, quant_type="nf4", compress_statistics=True)
    assert_same_bits(packed, tensors["packed"], "packed")
    mine = state.as_dict(packed=True)
    assert mine.keys() == wanted.keys()
    steps = (mine.pop("absmax").int() - wanted["absmax"].int()).abs()
    assert int(steps.max()) <= 3
    for key, value in mine.items():  # the offset is in the JSON
        assert_same_bits(value, wanted[key], key)


# --- layers ---------------------------------------------------------------------------------------------------------

LAYERS = [(f"layers_{v}", case) for v in ("0_50_2", "0_49_1") for case in cases(f"layers_{v}", "/float32/y")]
layer_cases = pytest.mark.parametrize(
    ("file", "case"), [pytest.param(f, c, id=f"{c}, {f.removeprefix('layers_').replace('_', '.')}") for f, c in LAYERS]
)
compute_dtypes = pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])


def load(file: str, case: str, compute_dtype: torch.dtype | None) -> nn.Linear4bit:
    saved = under(file, f"{case}/state_dict/")
    n, k = saved["bias"].numel(), golden(file)["x/float32"].shape[1]
    layer = nn.Linear4bit(k, n, compute_dtype=compute_dtype)
    layer.load_state_dict(saved, strict=True)
    return layer


def test_golden_layers_cover_every_type_nesting_and_storage():
    storages = ("uint8", "float32", "float16", "bfloat16")
    wanted = {f"{q} {n} {s}" for q in ("nf4", "fp4") for n in ("plain", "nested") for s in storages}
    assert {case for file, case in LAYERS if file == "layers_0_50_2"} == wanted
    assert {case for file, case in LAYERS if file == "layers_0_49_1"} == {c for c in wanted if c.endswith("uint8")}


@layer_cases
def test_golden_layer_loads_and_saves_unchanged(file, case):
    saved, again = under(file, f"{case}/state_dict/"), load(file, case, None).state_dict()
    assert sorted(saved) == sorted(again)
    for key, value in saved.items():
        assert_same_bits(again[key], value, key)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_nested_checkpoint_of_the_old_cpu_build_keeps_its_own_smallest_entry(quant_type):
    """0.49.1 on a CPU wrote -1 over the first entry of the dynamic map, while quantising: such checkpoints exist."""
    case = f"{quant_type} nested uint8"
    table = under("layers_0_49_1", f"{case}/state_dict/")["weight.nested_quant_map"]
    assert table[0] == -1.0
    assert_same_bits(table[1:], codebooks.create_dynamic_map()[1:])
    assert_same_bits(load("layers_0_49_1", case, None).weight.quant_state.state2.code, table)


@layer_cases
@compute_dtypes
def test_golden_layer_and_refq4_compute_the_same_within_the_budget(file, case, dtype):
    layer, wanted = load(file, case, DTYPES[dtype]), under(file, f"{case}/{dtype}/")
    x = golden(file)[f"x/{dtype}"]
    operands = x, layer.weight.data, layer.weight.quant_state, layer.bias.detach().to(x.dtype)
    assert_within_budget(layer.eval()(x).detach(), *operands, what="refq4, inference")
    assert_within_budget(layer.train()(x.clone().requires_grad_()).detach(), *operands, what="refq4, training")
    assert_within_budget(wanted["y"], *operands, what="the golden output")


@layer_cases
@compute_dtypes
def test_golden_gradients_equal_refq4s_within_the_budget(file, case, dtype):
    layer, wanted = load(file, case, DTYPES[dtype]).train(), under(file, f"{case}/{dtype}/")
    x, grad_y = golden(file)[f"x/{dtype}"].clone().requires_grad_(), golden(file)[f"grad_y/{dtype}"]
    layer(x).backward(grad_y)
    state = layer.weight.quant_state.copy()
    state.dtype = torch.float32
    weight = F.dequantize_4bit(layer.weight.data, state).double()
    # rounding W and rounding the sum take half an eps each; the second eps is for the order of the summation
    exact = grad_y.double() @ weight
    allowed = 2 * torch.finfo(x.dtype).eps * (grad_y.double().abs() @ weight.abs())
    for name, grad in {"refq4": x.grad, "golden": wanted["grad_x"]}.items():
        assert grad.dtype == x.dtype, name
        error = (grad.double() - exact).abs()
        assert bool((error <= allowed).all()), f"{name}: worst error {(error / allowed).max():.3g} of the allowed"
    bias_grad = layer.bias.grad
    exact_bias = grad_y.double().sum(0)
    allowed_bias = 2 * torch.finfo(x.dtype).eps * grad_y.double().abs().sum(0)
    for name, grad in {"refq4": bias_grad, "golden": wanted["grad_bias"]}.items():
        error = (grad.double() - exact_bias).abs()
        assert bool((error <= allowed_bias).all()), f"{name}: worst error {(error / allowed_bias).max():.3g}"


# --- what a first forward decides and says (0.49.1) -------------------------------------------------------------------

BEHAVIOUR = json.loads((GOLDEN / "behaviour_0_49_1.json").read_text())


def first_forward_id(case: dict) -> str:
    given = case["compute_dtype_given"] or "nothing"
    return f"{case['tokens']} tokens of {case['input_dtype']}, {given} set"


FIRST_FORWARDS = [c for c in BEHAVIOUR if c.get("quantized")]


@pytest.mark.parametrize("case", [pytest.param(c, id=first_forward_id(c)) for c in FIRST_FORWARDS])
def test_first_forward_decides_and_warns_as_0_49_1(case):
    given = DTYPES[case["compute_dtype_given"]]
    layer = nn.LinearNF4(64, 8, compute_dtype=given).to("cpu").train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = layer(torch.ones(case["tokens"], 64, dtype=DTYPES[case["input_dtype"]]))
    assert layer.compute_dtype == DTYPES[case["compute_dtype_after"]]
    assert y.dtype == DTYPES[case["output_dtype"]]
    said = [{"category": w.category.__name__, "mentions_training": "training" in str(w.message)} for w in caught]
    if given is torch.float32 and case["input_dtype"] == "float16":
        # an intended difference: refq4 warns here, 0.49.1 only if compute_type_is_set was cleared by hand
        assert case["warnings"] == []
        assert said == [{"category": "UserWarning", "mentions_training": case["tokens"] > 1}]
    else:
        assert said == case["warnings"]


def test_first_forwards_cover_every_dtype_with_one_token_and_several():
    assert len({first_forward_id(case) for case in FIRST_FORWARDS}) == 4 * 3 * 2
    assert sum(bool(case["warnings"]) for case in FIRST_FORWARDS) == 2


def test_a_layer_that_was_not_quantised_is_an_error_as_in_0_49_1_but_one_that_says_so():
    (case,) = (c for c in BEHAVIOUR if c.get("quantized") is False)
    assert case["error"] == "AssertionError"
    with pytest.raises(RuntimeError, match=r"has not been quantised: call \.to\(device\)"):
        nn.Linear4bit(64, 8)(torch.ones(1, 64))


def dispatch_id(case: dict) -> str:
    extras = ", gradient wanted" * case["requires_grad"] + ", own layout" * case["in_own_layout"]
    return f"{case['shape']} to {case['dispatch']}{extras}"


@pytest.mark.parametrize("case", [pytest.param(c, id=dispatch_id(c)) for c in BEHAVIOUR if "dispatch" in c])
def test_dispatch_is_that_of_0_49_1_on_a_gpu(case):
    k = case["shape"][-1]
    packed, state = F.quantize_4bit(torch.ones(8, k), blocksize=case["blocksize"], quant_type="nf4")
    x = torch.ones(case["shape"], requires_grad=case["requires_grad"])
    chosen = F.choose_path(x, state, prepared=case["in_own_layout"]).choice
    if case["in_own_layout"]:  # bitsandbytes calls this path gemv_4bit, whatever the number of tokens
        assert (chosen, case["dispatch"]) == ("own layout", "gemv_4bit")
        return  # no backend with a layout of its own is at hand here
    assert chosen == case["dispatch"]
    with refq4.trace() as t, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refq4.matmul_4bit(x, packed, state)
    assert [step.choice for call in t.calls for step in call.steps] == [case["dispatch"]]
    assert len(caught) == case["warnings"]
