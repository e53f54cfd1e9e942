"""A checkpoint that refq4 quantised on disk is the one that quantising while loading gives, and loads everywhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from moe_models import FAMILIES, made, share_in_4_bits
from safetensors.torch import load_file, save_file

import refq4
from refq4.checkpoint import inspect_checkpoint, quantize_checkpoint
from refq4.checkpoint.architecture import ask_transformers
from refq4.checkpoint.convert import _check_share
from refq4.checkpoint.selection import OTHER, Output, Selection
from refq4.checkpoint.tensors import Entry
from refq4.integrations.transformers import Refq4Config
from refq4.models.patterns import HEAD
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
    "albert, all of its layers one": (
        transformers.AlbertForMaskedLM,
        transformers.AlbertConfig(**SMALL, embedding_size=64, max_position_embeddings=32),
    ),
    "vit, renamed": (
        transformers.ViTForImageClassification,
        transformers.ViTConfig(**SMALL, image_size=16, patch_size=8),
    ),
    "clip, renamed": (
        transformers.CLIPModel,
        transformers.CLIPConfig(
            text_config={**SMALL, "projection_dim": 64, "max_position_embeddings": 32},
            vision_config={**SMALL, "projection_dim": 64, "image_size": 16, "patch_size": 8},
            projection_dim=64,
        ),
    ),
    "llava, renamed": (
        transformers.LlavaForConditionalGeneration,
        transformers.LlavaConfig(
            vision_config={**SMALL, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8},
            text_config={**SMALL, "model_type": "llama", "num_key_value_heads": 1},
            image_token_index=90,
        ),
    ),
    "gemma 3 with vision, renamed": (
        transformers.Gemma3ForConditionalGeneration,
        transformers.Gemma3Config(
            text_config={**SMALL, "num_key_value_heads": 1, "head_dim": 32, "sliding_window": 16},
            vision_config={**SMALL, "image_size": 16, "patch_size": 8},
            image_token_index=90,
            boi_token_index=91,
            eoi_token_index=92,
            mm_tokens_per_image=4,
        ),
    ),
    "nomic bert, whose qkv is taken apart": (
        transformers.NomicBertForMaskedLM,
        transformers.NomicBertConfig(**SMALL, max_position_embeddings=32),
    ),
    "dinov2, whose SwiGLU is taken apart": (
        transformers.Dinov2Model,
        transformers.Dinov2Config(**SMALL, image_size=16, patch_size=8, use_swiglu_ffn=True),
    ),
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
    assert layers[0] == layers[1]
    assert len(layers[0]) == len(report.layers)


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
    assert ask_transformers(model, {}) is None
    report = quantize_checkpoint(model, tmp_path / "out", progress=False)
    assert report.guessed
    assert len(report.layers) == 7


NOMIC = "nomic bert, whose qkv is taken apart"


@pytest.mark.parametrize("skip", ["attn.Wqkv", "self_attn.q_proj"], ids=["its name in the file", "a name in the model"])
def test_a_tensor_that_becomes_several_layers_is_skipped_by_any_of_its_names_and_whole(tmp_path, skip):
    model = save(tmp_path, NOMIC)
    kind, _ = ARCHITECTURES[NOMIC]
    quantize_checkpoint(model, tmp_path / "out", skip=[skip], progress=False)
    again = load(kind, tmp_path / "out", quantization_config=Refq4Config())
    config = Refq4Config(bnb_4bit_quant_type="nf4", llm_int8_skip_modules=[f".*{skip}", "cls"])
    loaded = load(kind, model, quantization_config=config)
    for each in (again, loaded):
        attention = each.nomic_bert.layers[0].self_attn
        assert {type(attention.q_proj), type(attention.k_proj), type(attention.v_proj)} == {torch.nn.Linear}
        assert type(attention.o_proj) is Linear4bit


def test_each_piece_of_a_tensor_gets_the_bits_that_quantising_it_alone_gives(tmp_path):
    model = save(tmp_path, NOMIC)
    quantize_checkpoint(model, tmp_path / "out", progress=False)
    source, written = (load_file(path / "model.safetensors") for path in (model, tmp_path / "out"))
    whole = source["nomic_bert.encoder.layers.0.attn.Wqkv.weight"]
    for name, piece in zip("qkv", whole.chunk(3), strict=True):
        packed, _ = refq4.functional.quantize_4bit(piece, quant_type="nf4", compress_statistics=True)
        assert_same_bits(written[f"nomic_bert.encoder.layers.0.self_attn.{name}_proj.weight"], packed)


def test_a_result_that_would_not_load_is_not_kept(tmp_path, monkeypatch):
    model = save(tmp_path, NOMIC)
    monkeypatch.setattr("refq4.integrations.fates.Route.name_in_file", lambda self, parameter: f"nowhere.{parameter}")
    with pytest.raises(ValueError, match=r"would not load, so it is not kept: .*k_proj\.weight: missing: "):
        quantize_checkpoint(model, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def lose_a_bias(tensors):
    del tensors["vit.encoder.layer.0.output.dense.bias"]


def lose_a_weight(tensors):
    key = "vit.encoder.layer.0.output.dense.weight"
    for name in [name for name in tensors if name.startswith(key)]:
        del tensors[name]


def add_a_weight(tensors):
    for name in [name for name in tensors if ".output.dense.weight" in name]:
        tensors[name.replace("layer.0.output", "layer.7.output")] = tensors[name].clone()


@pytest.mark.parametrize(
    ("spoil", "key", "what"),
    [
        (lose_a_bias, "vit.layers.0.mlp.fc2.bias", "missing"),
        (lose_a_weight, "vit.layers.0.mlp.fc2.weight", "missing"),
        (add_a_weight, "vit.encoder.layer.7.output.dense.weight", "no layer of this name"),
    ],
    ids=["a bias is missing", "a weight is missing", "a weight too many"],
)
def test_inspect_finds_what_the_model_would_miss_or_has_no_place_for(tmp_path, spoil, key, what):
    quantize_checkpoint(save(tmp_path, "vit, renamed"), tmp_path / "out", progress=False)
    assert inspect_checkpoint(tmp_path / "out").problems == []
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    spoil(tensors)
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    (problem,) = inspect_checkpoint(tmp_path / "out").problems
    assert problem.key == key
    assert what in problem.what


def test_a_damaged_weight_is_named_as_the_model_and_the_file_name_it(tmp_path, caplog):
    quantize_checkpoint(save(tmp_path, "vit, renamed"), tmp_path / "out", progress=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    del tensors["vit.encoder.layer.0.output.dense.weight.absmax"]
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError):
        load(ARCHITECTURES["vit, renamed"][0], tmp_path / "out", quantization_config=Refq4Config())
    said = r"absmax: missing.* \(in the file: vit\.encoder\.layer\.0\.output\.dense\.weight\)"
    assert re.search(said, caplog.text)


def test_a_model_most_of_which_would_stay_is_refused():
    selection = Selection({"up.weight": [Output(Entry("up.weight", "F32", (8, 64), 0, 2048), quantise=True)]})
    selection.could, selection.left = 8 * 64, {}
    _check_share(selection, Path("model"))
    selection.could, selection.left = 100 * 64, {"norm": OTHER, "lm_head": HEAD, "mixer": "read as a matrix"}
    with pytest.raises(ValueError, match=r"only 8% of the 6,400 weights .* \(mixer: read as a matrix\).*--include"):
        _check_share(selection, Path("model"))


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_on_disk_become_what_quantising_while_loading_saves(family, tmp_path):
    made(family).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    quantize_checkpoint(tmp_path / "model", tmp_path / "streamed", progress=False)
    config = Refq4Config(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    kind = type(made(family))
    load(kind, tmp_path / "model", quantization_config=config).save_pretrained(tmp_path / "saved")
    wanted, got = (load_file(tmp_path / where / "model.safetensors") for where in ("saved", "streamed"))
    assert wanted.keys() == got.keys()
    for key, value in wanted.items():
        assert_same_bits(got[key].to(value.dtype), value)
    assert any(".experts." in key and ".quant_state." in key for key in got) or "experts" not in " ".join(got)
    again = load(kind, tmp_path / "streamed", quantization_config=Refq4Config())
    assert share_in_4_bits(again) >= 0.95
