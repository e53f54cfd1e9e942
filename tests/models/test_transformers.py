"""transformers models on refq4: quantised while they load, saved, loaded, exchanged with bitsandbytes, generating.

The models are made on the spot: a Llama and a GPT-2 of a few thousand weights, seeded. What crosses to bitsandbytes and
back goes through files, as it does for users.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peer_path import CANONICAL, PACKED, both_paths, packed_budget
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

import refq4
from refq4.codebooks import codebook_names
from refq4.integrations import transformers as integration
from refq4.integrations import versions
from refq4.integrations.transformers import Refq4Config
from refq4.internals import remedies
from refq4.testing import assert_same_bits
from refq4.testing.budget import Budget

VOCABULARY = 256
PROMPT = torch.tensor([[7, 30, 199, 4, 82, 11]])
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64, "bos_token_id": 1}

quant_types = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
nestings = pytest.mark.parametrize("nested", [pytest.param(False, id="plain"), pytest.param(True, id="nested")])
kinds = pytest.mark.parametrize("kind", ["llama", "tied llama"])
shards_and_paths = pytest.mark.parametrize(
    ("shard", "peer_path"),
    [
        pytest.param("50GB", CANONICAL, id="one file"),
        pytest.param("40KB", CANONICAL, id="sharded"),
        pytest.param("50GB", PACKED, id="one file, bitsandbytes in bf16"),
    ],
    indirect=["peer_path"],
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Full-precision models on disk, by name."""
    home = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    made = {
        "llama": LlamaForCausalLM(LlamaConfig(**LLAMA)),
        "tied llama": LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
        "tiny llama": LlamaForCausalLM(LlamaConfig(**LLAMA | {"num_hidden_layers": 1, "intermediate_size": 64})),
        "gpt2": GPT2LMHeadModel(GPT2Config(**GPT2, eos_token_id=None)),
    }
    for name, model in made.items():
        model.save_pretrained(home / name)
    return {name: home / name for name in made}


def settings(quant_type: str = "nf4", nested: bool = False, **others: object) -> dict[str, object]:
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": nested,
        **others,
    }


def load(path: Path, config: object = None, **kwargs: object) -> PreTrainedModel:
    if config is not None:  # transformers takes a None that is passed for "as if the checkpoint said nothing"
        kwargs["quantization_config"] = config
    model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    assert isinstance(model, PreTrainedModel)
    return model


def logits_of(model: PreTrainedModel, ids: Tensor = PROMPT) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def greedy(model: PreTrainedModel, tokens: int = 8) -> list[int]:
    return model.generate(PROMPT, max_new_tokens=tokens, do_sample=False)[0].tolist()


def layers_of(model: nn.Module, kind: type = refq4.nn.Linear4bit) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def entries(path: Path) -> dict[str, Tensor]:
    """All tensors of a saved model, out of one file or several."""
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in safetensors.torch.load_file(file).items()}


def assert_same_entries(a: Path, b: Path) -> None:
    left, right = entries(a), entries(b)
    assert left.keys() == right.keys()
    for key in left:
        assert_same_bits(left[key], right[key], key)


# --- quantising while loading -----------------------------------------------------------------------------------------


def test_the_linear_layers_of_a_model_are_quantised_while_it_loads_and_the_head_stays(models, capsys):
    model = load(
        models["llama"], Refq4Config(**settings(nested=True), bnb_4bit_compute_dtype="bfloat16", blocksize=128)
    )
    layers = layers_of(model)
    assert len(layers) == 2 * 7
    assert type(model.lm_head) is nn.Linear
    plain = load(models["llama"])
    for name, layer in layers.items():
        weight = layer.weight
        assert (weight.quant_type, weight.blocksize, weight.compress_statistics) == ("nf4", 128, True)
        assert layer.compute_dtype == torch.bfloat16
        source = plain.get_submodule(name).weight.detach()
        packed, state = refq4.functional.quantize_4bit(
            source, blocksize=128, compress_statistics=True, quant_type="nf4"
        )
        assert_same_bits(weight.data, packed, name)
        assert weight.quant_state == state
    assert "Loading weights" in capsys.readouterr().err  # the bar


def test_scales_that_were_searched_are_asked_for_in_the_config_and_saved_with_it(models, tmp_path):
    config = Refq4Config(**settings(nested=True), scales="search")
    model = load(models["llama"], config)
    plain = load(models["llama"])
    for name, layer in layers_of(model).items():
        source = plain.get_submodule(name).weight.detach()
        packed, state = refq4.functional.quantize_4bit(
            source, quant_type="nf4", compress_statistics=True, scales="search"
        )
        assert_same_bits(layer.weight.data, packed, name)
        assert layer.weight.quant_state == state
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["scales"] == "search"
    assert load(tmp_path, None).config.quantization_config.scales == "search"


def test_while_a_model_is_quantised_no_two_of_its_tensors_are_held_in_full_precision(models, monkeypatch):
    seen: list[weakref.ref[Tensor]] = []
    convert = integration.Quantise.convert

    def watched(self, input_dict, **kwargs):
        assert all(ref() is None for ref in seen), "an earlier layer's full-precision weight is still there"
        seen.extend(weakref.ref(value[0] if isinstance(value, list) else value) for value in input_dict.values())
        return convert(self, input_dict, **kwargs)

    monkeypatch.setattr(integration.Quantise, "convert", watched)
    load(models["llama"], Refq4Config(**settings()))
    assert len(seen) == 2 * 7


def test_modules_named_to_be_skipped_stay_and_are_named_in_the_saved_config(models, tmp_path):
    model = load(models["llama"], Refq4Config(**settings(), llm_int8_skip_modules=["lm_head", "k_proj", ".*mlp"]))
    assert {name.split(".")[-1] for name in layers_of(model)} == {"q_proj", "v_proj", "o_proj"}
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert layers_of(again).keys() == layers_of(model).keys()
    assert_same_bits(logits_of(again), logits_of(model))


def test_a_head_that_is_tied_to_the_embedding_stays_even_if_nothing_is_to_be_skipped(models):
    model = load(models["tied llama"], Refq4Config(**settings(), llm_int8_skip_modules=[]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head" in layers_of(load(models["llama"], Refq4Config(**settings(), llm_int8_skip_modules=[])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layers_have_the_dtypes_that_they_have_on_bitsandbytes(models, bnb, dtype):
    ours = load(models["gpt2"], Refq4Config(**settings()), dtype=dtype)
    theirs = load(models["gpt2"], BitsAndBytesConfig(**settings()), dtype=dtype)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (a.dtype, a.shape, a.requires_grad) == (b.dtype, b.shape, b.requires_grad), name
    layer = layers_of(ours)["transformer.h.0.attn.c_attn"]
    assert layer.weight.quant_state.dtype == dtype


def refuses(path: Path, caplog: pytest.LogCaptureFixture, config: object = None) -> str:
    """What transformers reports when it gives up: its own error points to the log."""
    with pytest.raises(RuntimeError, match="issues during automatic conversion of the weights"):
        load(path, config)
    return caplog.text


def test_a_weight_that_cannot_be_quantised_stops_the_loading_with_its_name(models, tmp_path, caplog):
    model = load(models["llama"])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    model.save_pretrained(tmp_path)
    report = refuses(tmp_path, caplog, Refq4Config(**settings()))
    assert "model.layers.1.mlp.up_proj.weight" in report
    assert "NaN" in report


def test_parameters_are_counted_by_weights_not_bytes(models):
    full, model = load(models["tied llama"]), load(models["tied llama"], Refq4Config(**settings()))
    assert model.num_parameters() == full.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == full.num_parameters(exclude_embeddings=True)
    model.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == 0
    assert model.get_memory_footprint() < 0.6 * full.get_memory_footprint()


# --- saved and loaded again -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "tied llama", "gpt2"])
@nestings
def test_a_saved_model_comes_back_with_the_same_bytes_and_saves_the_same_again(models, tmp_path, kind, nested):
    model = load(models[kind], Refq4Config(**settings(nested=nested), bnb_4bit_compute_dtype=torch.bfloat16))
    wanted = logits_of(model)
    model.save_pretrained(tmp_path / "first")
    again = load(tmp_path / "first")
    assert layers_of(again).keys() == layers_of(model).keys()
    assert isinstance(again.config.quantization_config, Refq4Config)
    assert_same_bits(logits_of(again), wanted)
    again.save_pretrained(tmp_path / "second")
    assert_same_entries(tmp_path / "first", tmp_path / "second")
    assert (tmp_path / "first/config.json").read_text() == (tmp_path / "second/config.json").read_text()


def test_a_model_saved_after_it_has_run_on_a_backends_own_layout_is_the_same(models, tmp_path):
    model = load(models["llama"], Refq4Config(**settings()))
    model.save_pretrained(tmp_path / "before")
    logits_of(model)
    model.save_pretrained(tmp_path / "after")
    assert_same_entries(tmp_path / "before", tmp_path / "after")


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_packed_bytes_stored_under_a_float_dtype_survive(models, tmp_path, storage):
    model = load(models["llama"], Refq4Config(**settings(), bnb_4bit_quant_storage=storage), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.float32)
    for name, layer in layers_of(again).items():
        assert layer.weight.dtype == getattr(torch, storage)
        assert_same_bits(layer.weight.data, model.get_submodule(name).weight.data, name)


@pytest.mark.parametrize("quant_type", sorted(set(codebook_names()) - {"nf4", "fp4"}))
def test_other_codebooks_round_trip_and_their_config_does_not_pass_for_bitsandbytes(models, tmp_path, quant_type):
    model = load(models["tiny llama"], Refq4Config(**settings(quant_type)))
    model.save_pretrained(tmp_path)
    assert_same_bits(logits_of(load(tmp_path)), logits_of(model))
    assert "load_in_4bit" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_dequantised_model_is_the_plain_architecture_with_the_decoded_weights(models, tmp_path, kind):
    model = load(models[kind], Refq4Config(**settings()))
    layers = layers_of(model)
    weights = {name: refq4.functional.dequantize_4bit(m.weight, m.quant_state) for name, m in layers.items()}
    plain = model.dequantize()
    assert not layers_of(plain)
    assert len(layers_of(plain, Conv1D)) == (4 if kind == "gpt2" else 0)
    plain.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert not hasattr(again.config, "quantization_config")
    for name, weight in weights.items():
        held = again.get_submodule(name).weight.detach()
        assert_same_bits(held.T.contiguous() if kind == "gpt2" else held, weight, name)


# --- damaged and contradictory checkpoints ----------------------------------------------------------------------------


@pytest.fixture
def saved(models, tmp_path) -> Path:
    load(models["tiny llama"], Refq4Config(**settings())).save_pretrained(tmp_path)
    return tmp_path


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def rewrite(path: Path, change) -> None:
    tensors = entries(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})


DAMAGE = {
    "a missing scale tensor": (lambda t: t.pop(f"{Q_PROJ}.absmax"), r"absmax: missing"),
    "no entries beside it": (
        lambda t: [t.pop(k) for k in list(t) if k.startswith(f"{Q_PROJ}.")],
        r"beside it are miss",
    ),
    "no packed weight": (lambda t: t.pop(Q_PROJ), rf"{Q_PROJ}: missing"),
    "a NaN scale": (lambda t: t[f"{Q_PROJ}.absmax"].fill_(torch.nan), r"q_proj\.weight\.absmax: .*nan"),
    "too few bytes": (lambda t: t.update({Q_PROJ: t[Q_PROJ][:-1].clone()}), rf"{Q_PROJ}.*packs into"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_refused_with_the_tensors_name(saved, caplog, damage):
    change, said = damage
    rewrite(saved, change)
    report = refuses(saved, caplog)
    assert re.search(said, report)
    assert Q_PROJ in report


def test_a_layer_that_the_config_skips_and_the_checkpoint_quantises_is_refused(saved, caplog):
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["q_proj"]
    (saved / "config.json").write_text(json.dumps(config))
    assert "llm_int8_skip_modules, given or in its config, names this Linear" in refuses(saved, caplog)


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


def assert_say_the_same(ours: PreTrainedModel, theirs: PreTrainedModel, peer_path: str, tokens: int = 8) -> None:
    """The same words and logits where the peer computes in fp32; its logits within their budget where it doesn't.

    On the packed path the words are not compared: two tokens may be nearer to each other than the peer's roundings.
    """
    said = greedy(theirs, tokens)
    ids = torch.tensor([said])
    if peer_path == CANONICAL:
        assert greedy(ours, tokens) == said
        torch.testing.assert_close(logits_of(ours, ids), logits_of(theirs, ids), rtol=0, atol=1e-5)
    else:
        got = logits_of(theirs, ids)
        states = [module.weight.quant_state for module in theirs.modules() if hasattr(module, "quant_state")]
        assert states
        assert all(state.packing_format_for_cpu for state in states)
        packed_budget(ours, lambda model: logits_of(model, ids)).check(got, "logits of bitsandbytes")


@kinds
@shards_and_paths
@quant_types
@nestings
def test_what_bitsandbytes_saves_loads_on_refq4_and_says_the_same(
    models, bnb, peer_path, tmp_path, kind, shard, quant_type, nested
):
    theirs = load(models[kind], BitsAndBytesConfig(**settings(quant_type, nested)))
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shard == "40KB"
    ours = load(tmp_path, Refq4Config())
    assert len(layers_of(ours)) == 2 * 7
    assert not layers_of(ours, bnb.nn.Linear4bit)
    ours.save_pretrained(tmp_path / "ours")
    assert_same_entries(tmp_path, tmp_path / "ours")
    assert_say_the_same(ours, theirs, peer_path)


@kinds
@shards_and_paths
@quant_types
@nestings
def test_what_refq4_saves_loads_on_bitsandbytes_and_says_the_same(
    models, bnb, peer_path, tmp_path, kind, shard, quant_type, nested
):
    ours = load(models[kind], Refq4Config(**settings(quant_type, nested)))
    ours.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shard == "40KB"
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):  # transformers, whenever one is passed
        theirs = load(tmp_path, BitsAndBytesConfig(load_in_4bit=True))
    assert len(layers_of(theirs, bnb.nn.Linear4bit)) == 2 * 7
    held = theirs.state_dict()
    for key, value in entries(tmp_path).items():
        assert_same_bits(held[key], value, key)
    assert_say_the_same(ours, theirs, peer_path)


def test_where_the_integration_is_not_imported_a_checkpoint_of_refq4_is_one_of_bitsandbytes(
    models, bnb, tmp_path, monkeypatch
):
    load(models["llama"], Refq4Config(**settings(nested=True))).save_pretrained(tmp_path)
    untouched = AutoHfQuantizer.merge_quantization_configs.__wrapped__
    monkeypatch.setattr(AutoHfQuantizer, "merge_quantization_configs", classmethod(untouched))
    assert len(layers_of(load(tmp_path), bnb.nn.Linear4bit)) == 2 * 7


@both_paths
def test_a_gpt2_goes_there_and_back(models, bnb, peer_path, tmp_path):
    ours = load(models["gpt2"], Refq4Config(**settings(nested=True)))
    ours.save_pretrained(tmp_path / "ours")
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        theirs = load(tmp_path / "ours", BitsAndBytesConfig(load_in_4bit=True))
    load(models["gpt2"], BitsAndBytesConfig(**settings(nested=True))).save_pretrained(tmp_path / "theirs")
    assert greedy(load(tmp_path / "theirs", Refq4Config())) == greedy(ours)
    assert_say_the_same(ours, theirs, peer_path)


def test_the_compute_dtype_is_the_users_and_the_rest_is_the_checkpoints(models, bnb, tmp_path):
    load(models["tiny llama"], BitsAndBytesConfig(**settings("nf4", True))).save_pretrained(tmp_path)
    plain = load(tmp_path, Refq4Config()).config.quantization_config
    assert (plain.bnb_4bit_quant_type, plain.bnb_4bit_use_double_quant) == ("nf4", True)
    assert plain.bnb_4bit_compute_dtype == torch.float32
    model = load(tmp_path, Refq4Config(bnb_4bit_compute_dtype="bfloat16"))
    assert {layer.compute_dtype for layer in layers_of(model).values()} == {torch.bfloat16}
    with pytest.warns(UserWarning, match="quantised already.*bnb_4bit_quant_type=nf4"):
        load(tmp_path, Refq4Config(bnb_4bit_quant_type="af4"))


def test_eight_bit_checkpoints_and_other_methods_are_refused():
    with pytest.raises(ValueError, match="quantised by bitsandbytes in 8 bits"):
        Refq4Config.for_checkpoint({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False})
    with pytest.raises(ValueError, match="quantised by gptq"):
        Refq4Config.for_checkpoint({"quant_method": "gptq", "bits": 4})


# --- generating, on every backend -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("peer_path")  # in fp32, as this test is about refq4's backends
@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda-emulator"])
def test_generating_says_what_bitsandbytes_says(models, bnb, tmp_path, backend):
    """The usual example of bitsandbytes in transformers, with only the config class changed."""
    if reason := refq4.backend_info(backend).get("reason"):
        pytest.skip(reason)

    def answer(config_class: type) -> tuple[PreTrainedModel, list[int]]:
        quantization_config = config_class(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        model = AutoModelForCausalLM.from_pretrained(models["tiny llama"], quantization_config=quantization_config)
        return model, model.generate(PROMPT, max_new_tokens=3, do_sample=False)[0].tolist()

    _, theirs = answer(BitsAndBytesConfig)
    with refq4.use_backend(backend), refq4.trace() as t:
        model, ours = answer(Refq4Config)
    ran = {op.backend for call in t.calls for step in call.steps for op in step.ops}
    assert ran == {backend}
    assert ours == theirs
    assert len(layers_of(model)) == 7


@pytest.mark.parametrize("backend", ["cpu", "cuda-emulator"])
def test_in_bf16_a_models_logits_err_no_more_than_the_budget_of_the_reference(models, backend):
    if reason := refq4.backend_info(backend).get("reason"):
        pytest.skip(reason)
    config = Refq4Config(**settings(nested=True), bnb_4bit_compute_dtype=torch.bfloat16)
    model = load(models["tiny llama"], config, dtype=torch.bfloat16)
    logits = {}
    for name in ("reference", backend):
        with refq4.use_backend(name):
            logits[name] = logits_of(model)
    exact = logits_of(model.dequantize(torch.float64).double())
    Budget.of(exact, logits["reference"], torch.bfloat16).check(logits[backend], f"logits on {backend}")


@pytest.mark.slow
def test_a_model_compiles_whole_and_once_for_all_numbers_of_tokens(models):
    model = load(models["tiny llama"], Refq4Config(**settings()))
    eager = copy.deepcopy(model)  # a layer that has run eagerly has its own layout, and would be compiled anew for it
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for tokens in (5, 6, 9):
            with torch._dynamo.config.patch(error_on_recompile=tokens != 5):
                ids = torch.randint(0, VOCABULARY, (2, tokens))
                got = compiled(ids, use_cache=False).logits
            torch.testing.assert_close(got, eager(ids, use_cache=False).logits)


# --- the config -----------------------------------------------------------------------------------------------------


def test_the_config_takes_every_field_of_bitsandbytes_own_and_gives_it_back():
    theirs = BitsAndBytesConfig(**settings("nf4", True), bnb_4bit_compute_dtype="bfloat16", llm_int8_skip_modules=["a"])
    ours = Refq4Config(**theirs.to_dict())
    for name in ("load_in_4bit", "load_in_8bit", *(n for n in vars(theirs) if n[0] != "_" and n != "quant_method")):
        assert getattr(ours, name) == getattr(theirs, name), name
    again = Refq4Config(**json.loads(ours.to_json_string(use_diff=False)))
    assert again.to_dict() == ours.to_dict()
    assert set(ours.to_diff_dict()) == {
        "bnb_4bit_quant_type",
        "bnb_4bit_compute_dtype",
        "bnb_4bit_use_double_quant",
        "llm_int8_skip_modules",
    }


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"load_in_8bit": True}, "load_in_8bit=True is about 8-bit layers"),
        ({"llm_int8_threshold": 5.0}, "about 8-bit layers"),
        ({"load_in_4bit": False}, "4-bit layers only"),
        ({"bnb_4bit_quant_typ": "nf4"}, "did you mean bnb_4bit_quant_type"),
        ({"colour": "blue"}, "no field 'colour': there are load_in_4bit"),
        ({"bnb_4bit_quant_type": "nf5"}, "nf5"),
        ({"bnb_4bit_compute_dtype": "nn"}, "is not a dtype of torch"),
        ({"bnb_4bit_quant_storage": "int8"}, "quant_storage must be one of"),
        ({"blocksize": 48}, "blocksize must be one of"),
        ({"scales": "best"}, "expected 'absmax' or 'search'"),
    ],
)
def test_the_config_refuses_what_no_layer_can_have(fields, said):
    with pytest.raises(ValueError, match=said):
        Refq4Config(**fields)


def test_the_core_does_not_import_transformers_and_says_so_where_it_is_missing():
    code = """
import sys, refq4
assert "transformers" not in sys.modules
sys.modules["transformers"] = None
import refq4.integrations.transformers
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert remedies.install("transformers") in done.stderr


# --- versions -------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]


def test_pyproject_the_page_and_the_check_at_import_name_the_same_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pinned = [name for name in extras["transformers"] + extras["diffusers"] if not name.startswith("refq4[")]
    assert {f"{name}>={oldest},<{before}" for name, (oldest, before) in versions.TRIED.items()} < set(pinned)
    page = (ROOT / "docs/how-to/transformers.md").read_text()
    assert set(re.findall(r"`(\w+>=[^`]+)`", page)) == set(pinned)


@pytest.mark.parametrize("library", versions.TRIED)
def test_an_older_library_is_refused_and_a_newer_one_warned_of(monkeypatch, library):
    oldest, before = versions.TRIED[library]
    first, second = (int(part) for part in oldest.split("."))

    def found(version: str) -> None:
        monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == library else "0")
        versions.check(library, "transformers")

    for inside in (oldest, f"{oldest}.0", f"{oldest}.7"):
        found(inside)
    for older in (f"{first}.{second - 1}.99", f"{first - 1}.99" if first else "0.1.dev0", "0.1"):
        with pytest.raises(
            ImportError, match=f"tried with {library} {oldest} and newer, before {before}; this is {older}"
        ):
            found(older)
    for newer in (before, f"{first + 1}", f"{before}.dev0"):
        with pytest.warns(UserWarning, match=f"tried with {library} .*; this is {newer}, and may or may not work"):
            found(newer)
