"""Embeddings, heads, formats of single layers and the dtype of the rest: chosen in memory, in a config, and on disk."""

from __future__ import annotations

import copy
import json
from importlib.resources import files

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import refq4
from refq4 import cli
from refq4.checkpoint import dequantize_checkpoint, inspect_checkpoint, quantize_checkpoint
from refq4.functional import dequantize_4bit, quantize_4bit
from refq4.integrations.transformers import Refq4Config
from refq4.models.report import QuantizationReport
from refq4.nn import Embedding4bit, Linear4bit
from refq4.testing import assert_same_bits
from refq4.tools import tour


class Model(nn.Module):
    def __init__(self, tied: bool = False):
        super().__init__()
        self.embed, self.mlp = nn.Embedding(50, 128, padding_idx=3), nn.Linear(128, 128)
        self.norm, self.lm_head = nn.LayerNorm(128), nn.Linear(128, 50, bias=False)
        self.register_buffer("frequencies", torch.rand(4))
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        return self.lm_head(self.norm(self.mlp(self.embed(ids))))


def model(tied: bool = False) -> Model:
    torch.manual_seed(0)
    return Model(tied).eval().requires_grad_(False)


IDS = torch.tensor([[1, 2, 3, 49]])


def packed(weight, **settings):
    return quantize_4bit(weight, **{"quant_type": "nf4", "compress_statistics": True} | settings)


def test_tables_and_heads_stay_unless_they_are_asked_for():
    report = QuantizationReport()
    plain = refq4.quantize_model(model(), report=report, progress=False)
    assert type(plain.embed) is nn.Embedding
    assert type(plain.lm_head) is nn.Linear
    assert [layer.name for layer in report.layers] == ["mlp"]


def test_a_table_gets_the_bytes_of_quantize_4bit_with_plain_scales_and_keeps_its_settings():
    full, report = model(), QuantizationReport()
    small = refq4.quantize_model(copy.deepcopy(full), embeddings=True, scales="search", report=report, progress=False)
    wanted, state = packed(full.embed.weight, compress_statistics=False, scales="search")
    assert type(small.embed) is Embedding4bit
    assert_same_bits(small.embed.weight.data, wanted)
    assert small.embed.weight.quant_state == state
    assert (small.embed.padding_idx, small.embed.training) == (3, False)
    assert_same_bits(small.embed(IDS), dequantize_4bit(wanted, state)[IDS])
    assert [layer.name for layer in report.layers] == ["mlp", "embed"]
    assert report.other == sum(p.numel() for p in full.parameters()) - 50 * 128 - 128 * 128


def test_a_head_of_its_own_is_a_linear_layer_like_others():
    small = refq4.quantize_model(model(), head=True, progress=False)
    assert type(small.lm_head) is Linear4bit
    assert type(small.embed) is nn.Embedding


@pytest.mark.parametrize(
    ("chosen", "left"),
    [
        ({"embeddings": True}, {"embed": "shares its weight with lm_head, the output head: head=True takes both"}),
        ({"head": True}, {"lm_head": "shares its weight with embed"}),
    ],
    ids=["the table alone", "the head alone"],
)
def test_one_of_two_that_share_a_weight_stays_with_the_reason(chosen, left):
    report = QuantizationReport()
    small = refq4.quantize_model(model(tied=True), report=report, progress=False, **chosen)
    assert small.lm_head.weight is small.embed.weight
    assert not isinstance(small.embed, Embedding4bit)
    assert {name: why for name, why in report.left.items() if why.startswith("shares")} == left


def test_a_table_that_is_also_the_head_stays_canonical_and_no_look_up_restores_it():
    full = model(tied=True)
    small = refq4.quantize_model(copy.deepcopy(full), embeddings=True, head=True, progress=False)
    for one in (small, copy.deepcopy(small), small.to("cpu")):
        table, head = one.embed, one.lm_head
        assert table.weight is head.weight
        with torch.no_grad(), refq4.use_backend("cpu"):
            refq4.prepare(one)
            wanted = nn.functional.linear(
                one.norm(one.mlp(table(IDS))), dequantize_4bit(table.weight.stored(), table.weight.quant_state)
            )
            for _ in range(5):
                with refq4.trace() as t:
                    torch.testing.assert_close(one(IDS), wanted, atol=1e-4, rtol=1e-4)
                assert not table.weight.prepared
            assert t.calls[-1].steps[1].choice == "canonical"
            assert "others need the stored bytes: a look-up" in t.calls[-1].steps[1].why
            assert one.mlp.weight.prepared, "the others are laid out as the backend likes"


def test_the_rest_is_cast_and_buffers_are_not():
    small = refq4.quantize_model(model(), embeddings=True, dtype=torch.bfloat16, progress=False)
    dtypes = {name: p.dtype for name, p in small.named_parameters() if not isinstance(p, refq4.nn.Params4bit)}
    assert set(dtypes.values()) == {torch.bfloat16}
    assert {"norm.weight", "mlp.bias", "lm_head.weight"} <= dtypes.keys()
    assert small.frequencies.dtype == torch.float32
    assert small.embed(IDS).dtype == torch.bfloat16
    assert small(IDS).dtype == torch.bfloat16


def test_formats_differ_by_layer_and_the_later_pattern_holds():
    formats = {"mlp": {"blocksize": 128, "quant_type": "fp4"}, "m*": {"quant_type": "nf4"}, "embed": {"blocksize": 32}}
    full = model()
    small = refq4.quantize_model(copy.deepcopy(full), embeddings=True, formats=formats, progress=False)
    wanted, state = packed(full.mlp.weight, blocksize=128)
    assert_same_bits(small.mlp.weight.data, wanted)
    assert small.mlp.weight.quant_state == state
    assert small.embed.weight.quant_state.blocksize == 32
    assert small.embed(IDS).shape == (1, 4, 128)


@pytest.mark.parametrize(
    ("formats", "says"),
    [
        ({"nlp": {"blocksize": 128}}, "'nlp' matches none of the 1 layers"),
        ({"mlp": {"blocksize": 100}}, r"formats\['mlp'\]: blocksize must be one of"),
        ({"mlp": {"block_size": 64}}, "no setting 'block_size': did you mean 'blocksize'"),
        ({"mlp": {"quant_type": "nf5"}}, "did you mean"),
        ({"mlp": {"compress_statistics": 1}}, "compress_statistics is true or false"),
        ({"mlp": {"scales": "best"}}, "expected 'absmax' or 'search'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_formats_that_make_no_sense_are_refused_before_anything_changes(formats, says):
    full = model()
    with pytest.raises(ValueError, match=says):
        refq4.quantize_model(full, formats=formats, progress=False)
    assert type(full.mlp) is nn.Linear


class Scaled(nn.Embedding):
    pass


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (Scaled(10, 64), "a Scaled, whose owner uses it in ways of its own"),
        (nn.Embedding(10, 64, max_norm=1.0), "its look-ups change the table"),
    ],
    ids=["a subclass", "max_norm"],
)
def test_tables_that_are_more_than_tables_stay_with_the_reason(table, why):
    report = QuantizationReport()
    small = refq4.quantize_model(
        nn.Sequential(table, nn.Linear(64, 64)), embeddings=True, report=report, progress=False
    )
    assert small[0] is table
    assert report.left["0"].startswith(why)


def test_a_model_with_4_bit_tables_is_saved_and_loaded(tmp_path):
    small = refq4.quantize_model(model(), embeddings=True, head=True, dtype=torch.bfloat16, progress=False)
    torch.save(small.state_dict(), tmp_path / "small.pt")
    again = refq4.quantize_model(model().bfloat16(), embeddings=True, head=True, progress=False)
    again.load_state_dict(torch.load(tmp_path / "small.pt"))
    assert_same_bits(again(IDS), small(IDS))


# --- on disk, and while transformers loads ----------------------------------------------------------------------------

SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
LLAMA = transformers.LlamaConfig(**SMALL, num_hidden_layers=2)
TIED = transformers.LlamaConfig(**SMALL, num_hidden_layers=1, tie_word_embeddings=True)
FORMATS = {"mlp": {"blocksize": 128}, "layers.1.mlp": {"scales": "search"}}


@pytest.fixture
def directory(tmp_path):
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(LLAMA).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(path, config):
    return transformers.LlamaForCausalLM.from_pretrained(path, quantization_config=config, dtype="auto")


def test_a_checkpoint_and_the_config_choose_the_same_and_loading_gives_the_same_bits(directory, tmp_path):
    report = quantize_checkpoint(
        directory, tmp_path / "disk", embeddings=True, head=True, formats=FORMATS, progress=False
    )
    assert len(report.layers) == 2 * 7 + 2
    assert report.left == {}
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = Refq4Config(**settings, embeddings=True, head=True, formats=FORMATS)
    loaded = load(directory, config)
    assert type(loaded.model.embed_tokens) is Embedding4bit
    assert type(loaded.lm_head) is Linear4bit
    loaded.save_pretrained(tmp_path / "saved")
    wanted, got = (load_file(tmp_path / where / "model.safetensors") for where in ("saved", "disk"))
    assert wanted.keys() == got.keys()
    for key, value in wanted.items():
        assert_same_bits(got[key], value, key)
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert (stored["embeddings"], stored["head"], stored["formats"]) == (True, True, FORMATS)
    for where in ("saved", "disk"):  # without naming a config: bitsandbytes has no tables that can be loaded
        again = load(tmp_path / where, None)
        with torch.no_grad():
            assert_same_bits(again(IDS).logits, loaded(IDS).logits)
    up = again.model.layers[1].mlp.up_proj
    exact = transformers.LlamaForCausalLM.from_pretrained(directory).model.layers[1].mlp.up_proj.weight
    assert_same_bits(up.weight.data, packed(exact.detach(), blocksize=128, scales="search")[0])


def test_formats_alone_leave_a_file_that_bitsandbytes_loads(directory, tmp_path, bnb):
    quantize_checkpoint(directory, tmp_path / "out", formats={"mlp": {"blocksize": 128}}, progress=False)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    layer = theirs.model.layers[0].mlp.up_proj
    assert (type(layer), layer.weight.quant_state.blocksize) == (bnb.nn.Linear4bit, 128)


def test_the_dtype_of_the_rest_reaches_the_file_and_the_config(directory, tmp_path):
    quantize_checkpoint(directory, tmp_path / "out", dtype=torch.float16, progress=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.norm.weight"].dtype == tensors["lm_head.weight"].dtype == torch.float16
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["quantization_config"]["bnb_4bit_compute_dtype"]) == ("float16", "float16")
    assert load(tmp_path / "out", Refq4Config()).lm_head.weight.dtype == torch.float16
    with pytest.raises(ValueError, match="dtype must be"):
        quantize_checkpoint(directory, tmp_path / "other", dtype=torch.float64, progress=False)


def test_a_table_that_is_tied_to_the_head_stays_on_disk_with_the_reason(tmp_path):
    transformers.LlamaForCausalLM(TIED).save_pretrained(tmp_path / "model")
    report = quantize_checkpoint(tmp_path / "model", tmp_path / "out", embeddings=True, head=True, progress=False)
    assert report.left["model.embed_tokens"].startswith("shares its weight")
    loaded = load(tmp_path / "out", Refq4Config())
    assert type(loaded.model.embed_tokens) is nn.Embedding
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_without_an_architecture_tables_are_refused(tmp_path, directory):
    (directory / "config.json").unlink()
    with pytest.raises(ValueError, match="is asked of transformers"):
        quantize_checkpoint(directory, tmp_path / "out", embeddings=True, progress=False)


def test_the_options_of_the_command_reach_the_file(directory, tmp_path, capsys):
    options = ["--embeddings", "--head", "--dtype", "bf16", "--set", "mlp=blocksize:128", "--skip", "q_proj"]
    assert cli.main(["quantize", str(directory), str(tmp_path / "out"), *options]) == 0
    contents = inspect_checkpoint(tmp_path / "out")
    formats = {tensor.key: tensor for tensor in contents.tensors}
    assert formats["model.embed_tokens.weight"].format == "nf4"
    assert formats["lm_head.weight"].format == "nf4, double quantisation"
    assert formats["model.norm.weight"].format == formats["model.layers.0.self_attn.q_proj.weight"].format == "bfloat16"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight.absmax"].numel() == 64
    assert cli.main(["quantize", str(directory), str(tmp_path / "bad"), "--set", "mlp:128"]) == 1
    assert "expected PATTERN=SETTING:VALUE" in capsys.readouterr().err
    dequantize_checkpoint(tmp_path / "out", tmp_path / "plain", progress=False)
    assert type(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain").lm_head) is nn.Linear


@pytest.mark.parametrize("tied", [False, True], ids=["of its own", "tied"])
def test_a_model_of_transformers_with_4_bit_tables_and_heads_made_in_memory_comes_back_as_it_was(tied, tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_hidden_layers=1, tie_word_embeddings=tied)
    settings = {"embeddings": True, "head": True, "formats": {"mlp": {"blocksize": 128}}, "scales": "search"}
    small = refq4.quantize_model(transformers.LlamaForCausalLM(config).eval(), progress=False, **settings)
    small.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {key: stored[key] for key in settings} == settings
    assert "load_in_4bit" not in stored, "bitsandbytes has no tables that can be loaded"
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert (type(again.model.embed_tokens), type(again.lm_head)) == (Embedding4bit, Linear4bit)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    with torch.no_grad():
        assert_same_bits(again(IDS).logits, small(IDS).logits)
        refq4.prepare(again)
        with refq4.use_backend("cpu"):
            torch.testing.assert_close(again(IDS).logits, small(IDS).logits, atol=1e-4, rtol=1e-4)
        assert not (tied and again.lm_head.weight.prepared)
    plain = again.dequantize()
    assert (type(plain.model.embed_tokens), type(plain.lm_head)) == (nn.Embedding, nn.Linear)
    with pytest.raises(ValueError, match="is in 4 bits, and packed bytes get no new rows"):
        small.resize_token_embeddings(100)


MIXTRAL = transformers.MixtralConfig(**SMALL, num_hidden_layers=1, num_local_experts=2, num_key_value_heads=2)


def test_experts_have_formats_of_their_own_from_a_config_and_on_disk(tmp_path):
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(MIXTRAL).save_pretrained(tmp_path / "model")
    formats = {"experts": {"blocksize": 128, "compress_statistics": False}}
    quantize_checkpoint(tmp_path / "model", tmp_path / "disk", formats=formats, progress=False)
    config = Refq4Config(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, formats=formats)
    loaded = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config)
    loaded.save_pretrained(tmp_path / "loaded")
    wanted, got = (load_file(tmp_path / where / "model.safetensors") for where in ("loaded", "disk"))
    assert wanted["model.layers.0.block_sparse_moe.experts.down_proj.absmax"].shape == (2 * 64 * 128 // 128,)
    assert wanted.keys() == got.keys()
    for key, value in wanted.items():
        assert_same_bits(got[key], value, key)


def test_the_names_of_skipped_experts_are_saved(tmp_path):
    mixture = refq4.quantize_model(
        transformers.MixtralForCausalLM(MIXTRAL), skip=["down_proj", "lm_head"], progress=False
    )
    assert "model.layers.0.mlp.experts.down_proj" in mixture.config.quantization_config.llm_int8_skip_modules
    mixture.save_pretrained(tmp_path)
    again = transformers.MixtralForCausalLM.from_pretrained(tmp_path)
    experts = again.model.layers[0].mlp.experts
    assert experts.down_proj.shape == (2, 64, 128)
    with torch.no_grad():
        assert_same_bits(again(IDS).logits, mixture(IDS).logits)


def test_formats_in_a_config_that_match_no_layer_are_refused(directory):
    with pytest.raises(ValueError, match="'nlp' matches none of the 14 layers"):
        load(directory, Refq4Config(formats={"nlp": {"blocksize": 128}}))


def test_the_sentence_encoders_file_is_below_14_megabytes_and_its_embeddings_stay_near(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    full = tour._packaged_model()
    quantize_checkpoint(
        full,
        tmp_path / "small",
        scales="search",
        embeddings=True,
        dtype=torch.float16,
        quant_storage=torch.float16,  # sentence_transformers takes the dtype of the first parameter for the model's
        progress=False,
    )
    size = (tmp_path / "small" / "model.safetensors").stat().st_size
    sentences = files("refq4").joinpath("data/sentences.txt").read_text().splitlines()
    embedded = [
        tour._embed(sentence_transformers.SentenceTransformer(str(path), device="cpu").eval(), sentences).float()
        for path in (full, tmp_path / "small")
    ]
    cosine = nn.functional.cosine_similarity(*embedded, dim=1)
    print(f"{size / 1e6:.2f} MB, mean cosine {cosine.mean():.4f}, worst {cosine.min():.4f}")
    assert size < 14e6
    assert cosine.mean() > 0.96
