"""Mixtures of experts in files that others wrote: packed by expert, not packed at all, damaged, cut in pieces."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from moe_models import made
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import refq4
import refq4.functional as F
from refq4.integrations.transformers import Refq4Config
from refq4.nn.parametrize import PackedParameter, packed_parameter
from refq4.testing import assert_same_bits

PROMPT = torch.tensor([[1, 5, 9, 200, 31, 7]])


def packed(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PackedParameter)]


def packed_by_expert(family: str, folder: Path, nested: bool = False, skip: str = " ", **settings: Any) -> Path:
    """A directory as transformers 4 and bitsandbytes wrote it: each expert a linear layer, each weight packed alone."""
    made(family, **settings).save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors: dict[str, Tensor] = {}
    for key, value in safetensors.torch.load_file(file).items():
        tensors[key] = value
        if value.dim() == 2 and (".experts." in key or "proj" in key) and skip not in key:
            tensors[key], state = F.quantize_4bit(value, quant_type="nf4", compress_statistics=nested)
            tensors |= {f"{key}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=Refq4Config())


def refusal(path: Path, caplog: pytest.LogCaptureFixture) -> str:
    """What transformers reports when it gives up: its own error points to the log."""
    with pytest.raises(RuntimeError, match="issues during automatic conversion of the weights"):
        load(path)
    return caplog.text


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_experts_that_were_packed_one_by_one_become_one_parameter_of_the_same_values(family, nested, tmp_path):
    model = load(packed_by_expert(family, tmp_path, nested))
    assert len(packed(model)) == 4
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    experts = model.model.layers[0].mlp.experts
    up, down = ("w3", "w2") if family == "Mixtral" else ("up_proj", "down_proj")
    (prefix,) = {
        key.partition("3." + down)[0] for key in tensors if "layers.0" in key and key.endswith(f"3.{down}.weight")
    }

    def decoded(name: str) -> Tensor:
        entries = {k: v for k, v in tensors.items() if k.startswith(f"{prefix}3.{name}.weight.")}
        return F.dequantize_4bit(tensors[f"{prefix}3.{name}.weight"], F.QuantState.from_dict(entries))

    assert_same_bits(experts.down_proj[3], decoded(down))
    assert_same_bits(experts.gate_up_proj[3, -len(decoded(up)) :], decoded(up))
    assert not packed_parameter(experts, "down_proj").quant_state.nested
    again = tmp_path / "again"
    model.save_pretrained(again)
    assert_same_bits(load(again)(PROMPT).logits, model(PROMPT).logits)


def test_what_bitsandbytes_saves_today_has_its_experts_in_16_bits_and_keeps_them(tmp_path):
    made("Mixtral").save_pretrained(tmp_path / "full")
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "full", quantization_config=BitsAndBytesConfig(**settings), device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "theirs")
    model = load(tmp_path / "theirs")
    assert packed(model) == []
    want = made("Mixtral").model.layers[0].mlp.experts.gate_up_proj
    assert_same_bits(model.model.layers[0].mlp.experts.gate_up_proj.detach(), want.detach())
    model.save_pretrained(tmp_path / "ours")
    keys = safetensors.torch.load_file(tmp_path / "ours" / "model.safetensors").keys()
    assert keys == safetensors.torch.load_file(tmp_path / "theirs" / "model.safetensors").keys()
    assert_same_bits(load(tmp_path / "ours")(PROMPT).logits, model(PROMPT).logits)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"skip": "experts.2.w1"}, "some are packed and some are not, or entries are missing"),
        (
            {"hidden_size": 36, "intermediate_size": 20, "head_dim": 16},
            "an expert of shape .* ends within a block of 64",
        ),
    ],
    ids=["one in full precision", "blocks that straddle experts"],
)
def test_packed_experts_that_can_t_be_put_together_say_why(settings, reason, tmp_path, caplog):
    assert re.search(reason, refusal(packed_by_expert("Mixtral", tmp_path, **settings), caplog))


def test_a_damaged_expert_weight_is_refused_by_name(tmp_path, caplog):
    made("Qwen3Moe").save_pretrained(tmp_path / "full")
    settings = Refq4Config(bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=settings)
    model.save_pretrained(tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.layers.1.mlp.experts.down_proj.absmax"] = torch.ones(3)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    told = refusal(tmp_path / "packed", caplog)
    assert "model.layers.1.mlp.experts.down_proj.absmax: expected a float32 tensor of 1024" in told


def test_experts_of_a_base_model_reload_under_its_head(tmp_path):
    made("Qwen3Moe").save_pretrained(tmp_path / "full")
    settings = Refq4Config(bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=settings)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert_same_bits(load(tmp_path / "sharded")(PROMPT).logits, model(PROMPT).logits)
    model.model.save_pretrained(tmp_path / "base")
    base = type(model.model).from_pretrained(tmp_path / "base")
    assert len(packed(base)) == 4
    assert_same_bits(base(PROMPT).last_hidden_state, model.model(PROMPT).last_hidden_state)


@pytest.mark.parametrize("skip", [("lm_head",), ("lm_head", "layers.0.mlp.experts", "q_proj")], ids=["all", "some"])
@pytest.mark.parametrize("family", ["Mixtral", "Phimoe"])
def test_a_model_that_was_quantised_in_memory_is_saved_and_reloads(family, skip, tmp_path):
    model = made(family)
    refq4.quantize_model(model, skip=skip, progress=False)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert packed(again) == packed(model) != []
    assert_same_bits(again(PROMPT).logits, model(PROMPT).logits)
