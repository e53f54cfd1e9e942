"""LoRA on fused experts in 4 bits: what peft calls target_parameters, and the layers beside them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from moe_models import made
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import refq4
from refq4.integrations.peft import merge_errors
from refq4.models.quantize_model import quantize_model
from refq4.nn.parametrize import PackedParameter, decode_parameter_4bit, packed_parameter
from refq4.testing import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")  # peft's

PROMPT = torch.tensor([[1, 5, 9, 200, 31, 7]])
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
families = pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])  # [E, N, K] and [E, K, N] with biases


def adapted(model: nn.Module, parameters: list[str] = EXPERTS, **settings: Any) -> PeftModel:
    """A model with random adapters, always the same ones."""
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **settings}
    return get_peft_model(model, LoraConfig(target_parameters=parameters, **settings)).eval()


def packed_and_decoded(family: str) -> tuple[nn.Module, nn.Module]:
    packed = made(family)
    quantize_model(packed, include="experts", progress=False)
    decoded = copy.deepcopy(packed)
    for layer in decoded.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            decode_parameter_4bit(layer.mlp.experts, name)
    decoded.set_experts_implementation("grouped_mm")
    return packed, decoded


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


@families
@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[1:]], ids=["both weights", "one of them"])
def test_adapters_on_packed_experts_compute_and_learn_what_they_do_on_decoded_ones(family, parameters):
    packed, decoded = (adapted(model, parameters) for model in packed_and_decoded(family))
    results = []
    for model in (packed, decoded):
        logits = model(PROMPT).logits
        logits.square().mean().backward()
        results.append((logits.detach(), {name: p.grad for name, p in adapters(model).items()}))
    (got, grads), (want, wanted) = results
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert grads.keys() == wanted.keys()
    assert any("experts" in name for name in grads)
    for name, grad in grads.items():
        assert bool(grad.abs().sum() > 0), name
        torch.testing.assert_close(grad, wanted[name], atol=1e-3 * float(wanted[name].abs().max()), rtol=1e-3)
    assert all(p.grad is None for name, p in packed.named_parameters() if "lora_" not in name)


@families
def test_nothing_of_an_adapter_stays_behind_after_a_call(family):
    base, _ = packed_and_decoded(family)
    want = base.requires_grad_(False)(PROMPT).logits  # as peft will have it: a bias with a gradient is added by torch
    model = adapted(base)
    first, second = model(PROMPT).logits, model(PROMPT).logits
    assert_same_bits(first, second)
    assert not torch.allclose(first, want, atol=0.01)
    assert {len(held) for held in model.modules() if isinstance(held, PackedParameter)} == {1}
    with model.disable_adapter():
        assert_same_bits(model(PROMPT).logits, want)
    assert_same_bits(model.unload()(PROMPT).logits, want)


def test_an_experts_forward_of_transformers_reads_the_adapter_too():
    model, _ = packed_and_decoded("Qwen3Moe")
    model = adapted(model)
    want = model(PROMPT).logits
    model.base_model.model.set_experts_implementation("eager")
    torch.testing.assert_close(model(PROMPT).logits, want, atol=1e-4, rtol=1e-4)


@families
def test_merging_rounds_to_4_bits_and_unmerging_brings_the_bytes_back(family):
    base, _ = packed_and_decoded(family)
    before = {name: value.clone() for name, value in base.state_dict().items() if "experts" in name}
    model = adapted(base, target_modules=[], lora_alpha=64)
    plain = packed_and_decoded(family)[0](PROMPT).logits
    with_adapter = model(PROMPT).logits
    with pytest.warns(UserWarning, match="rounded to 4 bits again"):
        model.merge_adapter()
    merged = model(PROMPT).logits
    assert (merged - with_adapter).norm() < 0.5 * (plain - with_adapter).norm()
    errors = merge_errors(model)
    assert len(errors) == 4
    assert all(0.01 < error < 0.2 for error in errors.values())
    model.unmerge_adapter()
    after = base.state_dict()
    for name, value in before.items():
        place = name.replace(".mlp.experts.", ".mlp.experts.base_layer.base_layer.")
        assert_same_bits(after[place if place in after else name], value)
    assert_same_bits(model(PROMPT).logits, with_adapter)


def test_merge_and_unload_gives_a_model_in_4_bits(tmp_path):
    model = adapted(packed_and_decoded("Qwen3Moe")[0])
    want = model(PROMPT).logits
    with pytest.warns(UserWarning, match="rounded to 4 bits again"):
        whole = model.merge_and_unload()
    assert packed_parameter(whole.model.layers[0].mlp.experts, "down_proj") is not None
    assert not adapters(whole)
    assert torch.nn.functional.cosine_similarity(whole(PROMPT).logits.flatten(), want.flatten(), dim=0) > 0.9


def test_an_adapter_that_was_saved_reloads_on_packed_experts_and_a_second_one_joins(tmp_path):
    model = adapted(packed_and_decoded("Qwen3Moe")[0])
    want = model(PROMPT).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(packed_and_decoded("Qwen3Moe")[0], tmp_path)
    assert again.peft_config["default"].target_parameters == set(EXPERTS)
    assert_same_bits(again(PROMPT).logits, want)
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    assert_same_bits(again(PROMPT).logits, want)


def test_training_goes_on_in_4_bits():
    base = made("Qwen3Moe")
    refq4.quantize_model(base, progress=False)
    model = adapted(base, init_lora_weights=True).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=PROMPT, labels=PROMPT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
