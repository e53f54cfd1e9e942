"""Mixtures of experts in 4 bits: which parameters, through which doors, and that the experts compute what they decode.

Models of transformers, made on the spot (tests/support/moe_models.py); one test is about a model of no library.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from moe_models import FAMILIES, made, share_in_4_bits
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import refq4
from refq4.integrations.experts import packed_experts_forward
from refq4.integrations.transformers import Refq4Config
from refq4.models.experts import expert_names, expert_weights, routers
from refq4.models.report import QuantizationReport
from refq4.nn import Linear4bit
from refq4.nn.parametrize import PackedParameter, packed_parameter
from refq4.testing import assert_same_bits

PROMPT = torch.tensor([[1, 5, 9, 200, 31, 7]])
NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
# Plain storage, transposed with biases, other names in files, a first layer without experts.
TRIED = ("Qwen3Moe", "Mixtral", "GptOss", "GraniteMoe", "DeepseekV3", "JetMoe")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Full-precision models on disk, by family."""
    home, found = tmp_path_factory.mktemp("moe"), {}

    def path(family: str) -> Path:
        if family not in found:
            found[family] = home / family
            made(family).save_pretrained(found[family])
        return found[family]

    return path


def load(path: Path, **settings: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=Refq4Config(**{**NF4, **settings}))


def packed(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PackedParameter)]


def same_state(a: nn.Module, b: nn.Module) -> None:
    """The state dicts have the same keys and the same bits."""
    mine, theirs = a.state_dict(), b.state_dict()
    assert mine.keys() == theirs.keys()
    for key in mine:
        assert_same_bits(mine[key], theirs[key])


# --- which ------------------------------------------------------------------------------------------------------------


def test_fused_experts_are_known_by_shape_name_and_class():
    class ParallelExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(4, 8, 8)), nn.Parameter(torch.ones(4, 8, 8))

    class Other(nn.Module):
        def __init__(self, **shapes):
            super().__init__()
            for name, shape in shapes.items():
                setattr(self, name, nn.Parameter(torch.ones(shape)))

    class DbrxExpertGLU(Other):
        pass

    assert expert_names(ParallelExperts()) == ["weight"]
    assert expert_names(Other(w1=(4, 8, 16), w2=(4, 16, 8), w3=(4, 8, 16), scale=(4,))) == ["w1", "w2", "w3"]
    assert expert_names(DbrxExpertGLU(w1=(32, 8), v1=(32, 8), w2=(32, 8))) == ["w1", "v1", "w2"]
    assert expert_names(Other(weight=(4, 8, 8), pos_embed=(4, 8, 8))) == [], (
        "any weight of three dimensions may be this"
    )
    assert expert_names(Other(gate_up_proj=(4, 8, 16), down_proj=(3, 16, 8))) == [], "not one number of experts"
    assert expert_names(Other(gate_up_proj=(4, 1, 16))) == [], "a vector for each expert is no matrix"


@pytest.mark.parametrize("family", FAMILIES)
def test_of_the_linear_and_expert_weights_95_percent_are_in_4_bits(family, saved):
    full = made(family)
    model = load(saved(family))
    assert share_in_4_bits(full) == 0
    assert share_in_4_bits(model) >= 0.95
    assert len(packed(model)) == len(list(expert_weights(full))) > 0
    assert not [name for name in routers(full) if isinstance(model.get_submodule(name), Linear4bit)]
    y, exact = model(PROMPT).logits, full(PROMPT).logits
    assert torch.nn.functional.cosine_similarity(y.flatten(), exact.flatten(), dim=0) > 0.85


@pytest.mark.parametrize(("family", "router"), [("Phimoe", "mlp.router"), ("HunYuanMoEV1", "gate.wg")])
def test_a_router_that_is_a_linear_layer_stays_in_full_precision_through_all_doors(family, router, saved, tmp_path):
    in_memory, report = made(family), QuantizationReport()
    refq4.quantize_model(in_memory, report=report, progress=False)
    assert {name for name, why in report.left.items() if why == "it chooses experts"} == routers(in_memory) != set()
    loaded = load(saved(family))
    for model in (in_memory, loaded):
        linear = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
        assert linear
        assert not [name for name in linear if name.endswith(router)]
    loaded.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    left = stored["llm_int8_skip_modules"] or []
    of_its_own_class = type(made(family).get_submodule(min(routers(made(family))))) is not nn.Linear
    assert of_its_own_class or any(name.endswith(router) for name in left), "bitsandbytes must leave it alone, too"
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    same_state(loaded, reloaded)
    assert_same_bits(reloaded(PROMPT).logits, loaded(PROMPT).logits)


# --- doors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TRIED)
def test_from_pretrained_and_quantize_model_give_the_same_bytes_and_both_reload(family, saved, tmp_path):
    in_memory, loaded = made(family), load(saved(family))
    refq4.quantize_model(in_memory, progress=False)
    same_state(in_memory, loaded)
    loaded.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    same_state(loaded, reloaded)
    want = loaded(PROMPT).logits
    assert_same_bits(reloaded(PROMPT).logits, want)
    assert_same_bits(in_memory(PROMPT).logits, want)
    generated = [m.generate(PROMPT, max_new_tokens=5, do_sample=False) for m in (loaded, reloaded)]
    assert torch.equal(*generated)


def test_a_file_holds_experts_as_bitsandbytes_writes_a_parametrised_parameter(saved, tmp_path):
    load(saved("Qwen3Moe")).save_pretrained(tmp_path)
    keys = safetensors.torch.load_file(tmp_path / "model.safetensors").keys()
    beside = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
    own = {"model.layers.0.mlp.experts.down_proj", *(f"model.layers.0.mlp.experts.down_proj.{n}" for n in beside)}
    assert {key for key in keys if ".0.mlp.experts.down" in key} == own
    full = made("Qwen3Moe")
    refq4.quantize_model(full, progress=False)
    assert not any(full.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors")))


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_dequantize_gives_a_model_of_transformers_alone(family, saved, tmp_path):
    model = load(saved(family))
    want = model(PROMPT).logits
    plain = model.dequantize()
    assert packed(plain) == []
    assert plain.config._experts_implementation == "grouped_mm"
    torch.testing.assert_close(plain(PROMPT).logits, want, atol=1e-5, rtol=1e-5)
    plain.save_pretrained(tmp_path)
    keys = safetensors.torch.load_file(tmp_path / "model.safetensors").keys()
    assert keys == safetensors.torch.load_file(saved(family) / "model.safetensors").keys()


def test_the_rules_of_quantize_model_name_expert_weights_and_the_report_lists_them():
    model, report = made("Qwen3Moe"), QuantizationReport()
    refq4.quantize_model(model, skip=("lm_head", "layers.0.mlp.experts.down_proj", "layers.1.mlp"), report=report)
    assert packed(model) == ["model.layers.0.mlp.experts.parametrizations.gate_up_proj"]
    experts = {layer.name: layer.shape for layer in report.layers if "experts" in layer.name}
    assert experts == {"model.layers.0.mlp.experts.gate_up_proj": (8, 128, 128)}
    assert report.left["model.layers.1.mlp.experts.down_proj"] == "skipped: it matches 'layers.1.mlp'"
    refq4.quantize_model(model, include="experts", progress=False)
    assert len(packed(model)) == 4
    assert report.quantised + report.other == sum(p.numel() for p in made("Qwen3Moe").parameters())


@pytest.mark.parametrize("pattern", ["experts", "model.layers.0.mlp.experts", "model.layers.0.mlp.experts.down_proj"])
def test_skipped_modules_name_experts_too_and_the_model_reloads(pattern, saved, tmp_path):
    model = load(saved("Mixtral"), llm_int8_skip_modules=["lm_head", pattern])
    left = [name for name, _, _ in expert_weights(model)]
    assert left == [name for name, _, _ in expert_weights(made("Mixtral")) if pattern in name]
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    same_state(model, reloaded)
    assert_same_bits(reloaded(PROMPT).logits, model(PROMPT).logits)


def test_experts_that_are_to_stay_on_disk_are_refused(saved, tmp_path):
    load(saved("Qwen3Moe")).save_pretrained(tmp_path / "packed")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj: experts in 4 bits can't be offloaded"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map=places, offload_folder=tmp_path / "disk")


# --- what they compute ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [family for family in TRIED if family != "JetMoe"])
def test_packed_experts_compute_what_their_decoded_weights_do(family):
    model = made(family)
    refq4.quantize_model(model, include="experts", progress=False)
    decoded = copy.deepcopy(model)
    decoded.set_experts_implementation("eager")
    assert model.config._experts_implementation == "refq4"
    embedded = model.get_input_embeddings()(PROMPT).detach()
    grads = []
    for each in (model, decoded):
        x = embedded.clone().requires_grad_()
        logits = each(inputs_embeds=x).logits
        grads.append((logits.detach(), *torch.autograd.grad(logits.square().sum(), x)))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=2e-4 * float(want.abs().max()), rtol=0)


def experts_of(family: str) -> nn.Module:
    """The experts of one layer, packed."""
    model = made(family)
    refq4.quantize_model(model, include="experts", progress=False)
    return next(module for module in model.modules() if "Experts" in type(module).__name__)


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_experts_that_live_elsewhere_count_nothing(family):
    experts, x = experts_of(family), torch.randn(3, 128)
    chosen = torch.tensor([[0, 1], [2, 3], [3, 0]])
    elsewhere = torch.tensor([[0, 99], [99, 3], [3, 0]])
    weights = torch.full((3, 2), 0.5)
    want = packed_experts_forward(experts, x, chosen, weights * (elsewhere < 99))
    experts._is_expert_parallel = True
    torch.testing.assert_close(packed_experts_forward(experts, x, elsewhere, weights), want, atol=1e-5, rtol=1e-5)


def test_one_weight_in_full_precision_sends_the_layer_back_to_transformers():
    model = made("Qwen3Moe")
    refq4.quantize_model(model, include="gate_up_proj", progress=False)
    experts = model.model.layers[0].mlp.experts
    x, chosen, weights = torch.randn(3, 128), torch.tensor([[0, 1], [2, 3], [3, 0]]), torch.full((3, 2), 0.5)
    got = packed_experts_forward(experts, x, chosen, weights)
    experts.config._experts_implementation = "eager"
    torch.testing.assert_close(got, experts(x, chosen, weights))


def test_an_implementation_that_the_user_chose_stays():
    model = made("Qwen3Moe")
    model.set_experts_implementation("eager")
    refq4.quantize_model(model, progress=False)
    assert model.config._experts_implementation == "eager"
    assert model(PROMPT).logits.isfinite().all()


def test_packed_experts_are_laid_out_for_inference_alone():
    model = made("Qwen3Moe")
    refq4.quantize_model(model, include="experts", progress=False)
    weight = model.model.layers[0].mlp.experts.parametrizations.down_proj.original
    stored = weight.stored().clone()
    with refq4.use_backend("cpu"), torch.no_grad():
        want = model(PROMPT).logits
        assert weight.prepared
        assert_same_bits(model.state_dict()["model.layers.0.mlp.experts.down_proj"], stored)
        assert weight.prepared, "saving leaves the layout"
        assert_same_bits(copy.deepcopy(model)(PROMPT).logits, want)
        assert refq4.restore(model) == 4
        assert not weight.prepared
        model.train()
        torch.testing.assert_close(model(PROMPT).logits, want, atol=1e-5, rtol=1e-5)
        assert not weight.prepared
    assert_same_bits(weight.stored(), stored)


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_packed_experts_can_be_laid_out_before_the_first_call(family):
    model = made(family)
    refq4.quantize_model(model, include="experts", progress=False)
    weight = model.model.layers[0].mlp.experts.parametrizations.down_proj.original
    model.eval()
    with refq4.use_backend("cpu"), torch.no_grad():
        stored_transposed = family == "GptOss"
        assert refq4.prepare(model) == (0 if stored_transposed else 4)
        assert weight.prepared != stored_transposed
        before = weight._form
        assert model(PROMPT).logits.isfinite().all()
        assert weight._form is before, "the first call makes no other"
        model.set_experts_implementation("eager")
        refq4.restore(model)
        assert refq4.prepare(model) == 0, "what decodes them would restore them at each call"
        model.set_experts_implementation("refq4")
        for layer in model.model.layers:  # as FSDP rebuilds parameters
            for held in layer.mlp.experts.parametrizations.values():
                held.original = nn.Parameter(held.original.stored(), requires_grad=False)
        assert refq4.prepare(model) == 0, "what something else made stays as it is"


def test_experts_of_a_model_of_no_library_are_decoded_when_they_are_read():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(32, 4)
            self.experts = nn.Module()
            self.experts.w1 = nn.Parameter(torch.randn(4, 48, 32))
            self.experts.w2 = nn.Parameter(torch.randn(4, 32, 48))

        def forward(self, x: Tensor) -> Tensor:
            weights = self.router(x).softmax(-1)
            each = torch.einsum("mk,enk->men", x, self.experts.w1).relu()
            return torch.einsum("me,men,ekn->mk", weights, each, self.experts.w2)

    layer = Layer()
    refq4.quantize_model(layer, progress=False)
    assert packed(layer) == ["experts.parametrizations.w1", "experts.parametrizations.w2"]
    assert type(layer.router) is nn.Linear
    assert layer(torch.randn(3, 32)).shape == (3, 32)


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_a_compiled_block_gives_the_same_in_one_graph(family):
    model = made(family)
    refq4.quantize_model(model, progress=False)
    block = model.model.layers[0].mlp
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for x in (torch.randn(1, 3, 128), torch.randn(1, 3, 128, requires_grad=True)):
        for got, want in zip(compiled(x), block(x), strict=True):
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_experts_whose_blocks_straddle_them_still_compute():
    model = made("Qwen3Moe", hidden_size=36, moe_intermediate_size=12)
    refq4.quantize_model(model, include="experts", progress=False)
    decoded = copy.deepcopy(model)
    decoded.set_experts_implementation("eager")
    assert 36 * 12 % packed_parameter(model.model.layers[0].mlp.experts, "down_proj").blocksize
    torch.testing.assert_close(model(PROMPT).logits, decoded(PROMPT).logits, atol=1e-4, rtol=1e-4)
