"""A checkpoint that refq4 quantised on disk is the one that quantising while loading gives, and loads everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from refq4.checkpoint import quantize_checkpoint
from refq4.checkpoint import selection as selecting
from refq4.checkpoint.architecture import ask_transformers
from refq4.checkpoint.tensors import SafetensorsReader
from refq4.integrations.transformers import Refq4Config
from refq4.nn import Linear4bit
from refq4.testing import assert_same_bits

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
}
ARCHITECTURES = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SMALL, num_key_value_heads=1)),
    "llama with a tied head": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=True),
    ),
    "a classifier": (transformers.LlamaForSequenceClassification, transformers.LlamaConfig(**SMALL, pad_token_id=0)),
    "gpt2, stored transposed": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=2, n_positions=32),
    ),
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig(**SMALL, max_position_embeddings=32)),
    "t5, part of it in fp32": (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(vocab_size=96, d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2),
    ),
}


def save(tmp_path: Path, name: str, dtype: torch.dtype = torch.bfloat16, **settings: object) -> Path:
    torch.manual_seed(0)
    kind, config = ARCHITECTURES[name]
    kind(config).to(dtype).save_pretrained(tmp_path / "model", **settings)
    return tmp_path / "model"


def load(kind, path: Path, **settings: object):
    return kind.from_pretrained(path, dtype=torch.bfloat16, **settings)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_result_is_what_quantising_while_loading_saves(name, tmp_path):
    model = save(tmp_path, name)
    kind, _ = ARCHITECTURES[name]
    report = quantize_checkpoint(model, tmp_path / "streamed", progress=False)
    assert not report.guessed
    config = Refq4Config(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    loaded = load(kind, model, quantization_config=config)
    loaded.save_pretrained(tmp_path / "saved")
    wanted, got = (load_file(tmp_path / where / "model.safetensors") for where in ("saved", "streamed"))
    assert wanted.keys() == got.keys()
    for key, value in wanted.items():
        assert_same_bits(got[key].to(value.dtype), value)  # T5's fp32 part is cast while loading
    again = load(kind, tmp_path / "streamed", quantization_config=Refq4Config())
    layers = [{n for n, m in model.named_modules() if isinstance(m, Linear4bit)} for model in (loaded, again)]
    assert layers[0] == layers[1] == {layer.name for layer in report.layers}


def test_it_loads_through_bitsandbytes_and_gives_the_same_logits(tmp_path, bnb):
    model = save(tmp_path, "llama with a tied head", max_shard_size="30KB")
    quantize_checkpoint(model, tmp_path / "out", compress_statistics=False, progress=False)
    assert len(json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]) > 20
    kind, ids = transformers.LlamaForCausalLM, torch.arange(8)[None]
    theirs = load(kind, tmp_path / "out")
    assert type(theirs.model.layers[0].mlp.up_proj) is bnb.nn.Linear4bit
    ours = load(kind, tmp_path / "out", quantization_config=Refq4Config())
    assert type(ours.model.layers[0].mlp.up_proj) is Linear4bit
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=2e-2, rtol=2e-2)
    assert ours.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16, "as the weights were"


def test_patterns_reach_the_loader_through_the_config(tmp_path):
    model = save(tmp_path, "llama")
    quantize_checkpoint(model, tmp_path / "out", include=["mlp", "lm_head"], skip=["down_proj"], progress=False)
    loaded = load(transformers.LlamaForCausalLM, tmp_path / "out", quantization_config=Refq4Config())
    assert {name for name, module in loaded.named_modules() if isinstance(module, Linear4bit)} == {
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "lm_head",
    }


def test_names_without_the_base_models_prefix_are_found(tmp_path):
    model = save(tmp_path, "gpt2, stored transposed")
    tensors = load_file(model / "model.safetensors")
    bare = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, model / "model.safetensors", {"format": "pt"})
    quantize_checkpoint(model, tmp_path / "out", progress=False)
    loaded = load(transformers.GPT2LMHeadModel, tmp_path / "out", quantization_config=Refq4Config())
    layer = loaded.transformer.h[0].attn.c_attn
    assert (type(layer), layer.weight.quant_state.shape) == (Linear4bit, torch.Size([192, 64]))


@pytest.mark.parametrize("config", [{"architectures": ["NoSuchModel"], "model_type": "llama"}, {"model_type": "new"}])
def test_an_architecture_that_transformers_lacks_is_read_by_names(tmp_path, config):
    model = save(tmp_path, "llama")
    (model / "config.json").write_text(json.dumps(config))
    assert ask_transformers(model) is None
    report = quantize_checkpoint(model, tmp_path / "out", progress=False)
    assert report.guessed
    assert len(report.layers) == 7


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("model_type", selecting.NAMES_SUFFICE)
def test_where_names_are_said_to_suffice_transformers_says_the_same(model_type, tied, tmp_path, monkeypatch):
    small = {**SMALL, "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": tied}
    config = transformers.AutoConfig.for_model(model_type, **small)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with SafetensorsReader(tmp_path / "model.safetensors") as reader:
        by_names = selecting.select(reader.entries, tmp_path, (), ())
        monkeypatch.setattr(selecting, "NAMES_SUFFICE", ())
        asked = selecting.select(reader.entries, tmp_path, (), ())
    assert not by_names.guessed
    assert not asked.guessed
    assert by_names.chosen == asked.chosen
    assert len(asked.chosen) == 7
    assert set(asked.skip_modules) <= set(by_names.skip_modules) <= {"lm_head", "model.embed_tokens"}
