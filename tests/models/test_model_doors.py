"""The ways in and out of a transformers model: what is quantised in memory, skipped, offloaded, read as a matrix."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

import refq4
from refq4.checkpoint import quantize_checkpoint
from refq4.integrations.transformers import Refq4Config
from refq4.models import linears
from refq4.nn import Linear4bit
from refq4.testing import assert_same_bits

IDS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
LLAMA = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
FALCON = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
GPT2 = {"vocab_size": 64, "n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 64, "bos_token_id": 1}
MAMBA = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "state_size": 8, "time_step_rank": 64}
RWKV = {
    "vocab_size": 64,
    "hidden_size": 64,
    "attention_hidden_size": 64,
    "num_hidden_layers": 2,
    "rescale_every": 1,
    "intermediate_size": 128,
}
T5 = {
    "vocab_size": 64,
    "d_model": 64,
    "d_kv": 32,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
MAKE: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "tied llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**FALCON)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**MAMBA)),
    "rwkv": lambda: RwkvForCausalLM(RwkvConfig(**RWKV)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fast path is not available.*"),
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"),  # peft's call
]


def made(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MAKE[kind]().eval()


def load(path: Path, **settings: object) -> PreTrainedModel:
    kind = AutoModelForSeq2SeqLM if "T5" in (path / "config.json").read_text() else AutoModelForCausalLM
    return kind.from_pretrained(path, **settings).eval()


def logits_of(model: nn.Module) -> Tensor:
    more = {"decoder_input_ids": IDS} if isinstance(model, T5ForConditionalGeneration) else {}
    with torch.no_grad():
        return model(IDS, **more).logits


def packed(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, refq4.nn.Linear4bit)}


# --- quantised in memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in MAKE if kind != "gpt2"])  # it has no nn.Linear but its head
def test_a_model_quantised_in_memory_saves_its_config_and_comes_back_as_it_was(kind, tmp_path):
    model = refq4.quantize_model(made(kind), compute_dtype=torch.float32, progress=False)
    model.save_pretrained(tmp_path)
    wanted = logits_of(model)  # RWKV changes its weights in its first call
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (stored["quant_method"], stored["bnb_4bit_quant_type"]) == ("refq4", "nf4")
    again = load(tmp_path)
    assert packed(again) == packed(model)
    assert_same_bits(logits_of(again), wanted)
    assert model.num_parameters() == again.num_parameters()
    decoded = model.dequantize()
    assert not packed(decoded)


def test_what_quantize_model_was_told_to_skip_or_take_is_what_comes_back(tmp_path):
    model = made("llama")
    refq4.quantize_model(model, include=["mlp", "lm_head"], skip=["layers.0"], quant_type="fp4", progress=False)
    assert packed(model) == {"lm_head", *(f"model.layers.1.mlp.{part}_proj" for part in ("up", "gate", "down"))}
    model.save_pretrained(tmp_path)
    assert packed(load(tmp_path)) == packed(model)


def test_a_model_of_torch_or_of_another_method_is_not_told_anything():
    plain = refq4.quantize_model(nn.Sequential(nn.Linear(64, 64)), progress=False)
    assert not hasattr(plain, "hf_quantizer")
    model = made("llama")
    model.hf_quantizer = theirs = object()
    assert refq4.quantize_model(model, progress=False).hf_quantizer is theirs


# --- linear, and not only called --------------------------------------------------------------------------------------


def by_command(full: Path, out: Path) -> PreTrainedModel:
    quantize_checkpoint(full, out, progress=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*already has a `quantization_config`.*")
        return load(out, quantization_config=Refq4Config())


DOORS: dict[str, Callable[[Path, Path], PreTrainedModel]] = {
    "from_pretrained": lambda full, out: load(full, quantization_config=Refq4Config(bnb_4bit_quant_type="nf4")),
    "quantize_model": lambda full, out: refq4.quantize_model(load(full), compute_dtype=torch.float32, progress=False),
    "refq4 quantize": lambda full, out: by_command(full, out),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("kind", "left", "taken"),
    [
        ("mamba", ("mixer.dt_proj",), ("mixer.in_proj", "mixer.x_proj", "mixer.out_proj")),
        ("rwkv", ("attention.output", "feed_forward.value"), ("attention.value", "feed_forward.key")),
        ("falcon", (), ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_4h_to_h")),
    ],
    ids=["Mamba", "RWKV", "Falcon"],
)
def test_a_layer_that_its_owner_reads_as_a_matrix_stays_and_falcons_own_class_is_taken(
    kind, left, taken, door, tmp_path
):
    full = made(kind)
    full.save_pretrained(tmp_path / "full")
    model = DOORS[door](tmp_path / "full", tmp_path / "out")
    for names, there in ((taken, True), (left, False)):
        for name in names:
            assert any(layer.endswith(name) for layer in packed(model)) is there, name
    off = logits_of(model)
    assert torch.nn.functional.cosine_similarity(off.flatten(), logits_of(full).flatten(), dim=0) > 0.95
    model.save_pretrained(tmp_path / "saved")
    assert packed(load(tmp_path / "saved")) == packed(model)


def test_the_classes_that_read_a_weight_are_those_of_the_installed_transformers():
    """Each owner in the table exists, and its code names the layer's weight (RWKV's is named by the model's)."""
    import transformers

    sources = {}
    for name in ("conditional_detr", "detr", "deberta", "falcon_mamba", "jamba", "mamba", "maskformer", "mobilebert"):
        sources[name] = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    for name in ("rwkv", "wavlm"):
        sources[name] = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    for name in [
        "axk2",
        "deepseek_v32",
        "dots3_note",
        "glm5_next",
        "glm_moe_dsa",
        "hy_v4",
        "hy_v4_vl",
        "kosmos2_5",
        "longt5",
        "mistral_large4",
    ]:
        sources[name] = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    for name in ["nllb_moe", "pocket_tts", "seamless_m4t", "seamless_m4t_v2", "switch_transformers"]:
        sources[name] = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    for owner, children in (linears._READ | linears._CAST_TO).items():
        (module,) = [module for module in sources.values() if hasattr(module, owner)]
        source = inspect.getsource(module)
        for child in children:
            assert f".{child}.weight" in source, f"{owner} of transformers {transformers.__version__}"


def test_a_layer_that_stays_because_its_owner_reads_it_says_so_in_the_report():
    report = refq4.models.report.QuantizationReport()
    refq4.quantize_model(made("mamba"), report=report, progress=False)
    (why,) = {why for name, why in report.left.items() if name.endswith("dt_proj")}
    assert why == "its weight is read as a matrix by the MambaMixer around it"


def test_replacing_no_layer_at_all_is_said(tmp_path):
    made("llama").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no layer of this LlamaForCausalLM is in 4 bits"):
        load(tmp_path, quantization_config=Refq4Config(llm_int8_skip_modules=["model", "lm_head"]))


# --- what is skipped --------------------------------------------------------------------------------------------------


def test_a_name_to_skip_that_matches_nothing_is_said_with_the_nearest(tmp_path):
    made("llama").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="'lm_haed' is not a module of this LlamaForCausalLM; did you mean lm_head"):
        load(tmp_path, quantization_config=Refq4Config(llm_int8_skip_modules=["lm_haed", "lm_head"]))
    with pytest.warns(UserWarning, match="skip: 'q_prog' matches no module of this LlamaForCausalLM; did you mean q_p"):
        refq4.quantize_model(made("llama"), skip=["q_prog", "lm_head"], progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refq4.quantize_model(nn.Sequential(nn.Linear(64, 64)), progress=False)  # the default is no one's mistake


def test_modules_to_skip_of_a_quantised_checkpoint_are_honoured_where_they_are_plain_and_refused_where_not(
    tmp_path, caplog
):
    refq4.quantize_model(made("llama"), skip=["lm_head", "layers.1"], progress=False).save_pretrained(tmp_path)
    wanted = packed(load(tmp_path))
    fitting = Refq4Config(llm_int8_skip_modules=["model.layers.1"])
    assert packed(load(tmp_path, quantization_config=fitting)) == wanted
    with pytest.raises(RuntimeError, match="We encountered some issues during automatic conversion"):
        load(tmp_path, quantization_config=Refq4Config(llm_int8_skip_modules=["q_proj"]))
    assert "layers.0.self_attn.q_proj.weight: quantised in the checkpoint, but llm_int8_skip_modules" in caplog.text


# --- memory that does not suffice -------------------------------------------------------------------------------------


def test_a_device_map_that_comes_to_spill_to_disk_while_quantising_is_refused_before_a_weight_is_read(tmp_path):
    made("llama").save_pretrained(tmp_path)
    config = Refq4Config(bnb_4bit_quant_type="nf4")
    given = copy.deepcopy(config)
    with pytest.raises(ValueError, match="quantise it without this device_map, save_pretrained it, and load that"):
        load(
            tmp_path,
            quantization_config=config,
            device_map="auto",
            max_memory={"cpu": 60_000},
            offload_folder=tmp_path / "disk",
        )
    assert config.to_dict() == given.to_dict()
    assert not (tmp_path / "disk").exists()


# --- what packed bytes are not ----------------------------------------------------------------------------------------


def test_a_head_in_4_bits_is_not_resized_and_a_plain_one_is(tmp_path):
    made("llama").save_pretrained(tmp_path)
    plain = load(tmp_path, quantization_config=Refq4Config())
    plain.resize_token_embeddings(72)
    assert plain.lm_head.out_features == 72
    model = load(tmp_path, quantization_config=Refq4Config(llm_int8_skip_modules=[]))
    before = logits_of(model)
    with pytest.raises(ValueError, match="the output layer of this LlamaForCausalLM is in 4 bits, and packed bytes"):
        model.resize_token_embeddings(72)
    model.resize_token_embeddings(64)  # as it is
    assert model.get_input_embeddings().num_embeddings == 64
    assert_same_bits(logits_of(model), before)


def test_a_4_bit_layer_is_no_module_to_save_and_a_plain_one_is(tmp_path):
    from peft import LoraConfig, get_peft_model

    made("llama").save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=Refq4Config())
    with pytest.raises(ValueError, match=r"modules_to_save: Linear4bit\(in_features=64, out_features=128, .* is in 4"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["up_proj"]))
    model = load(tmp_path, quantization_config=Refq4Config())
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    tuned(IDS).logits.sum().backward()
    assert any("lm_head" in name and p.grad is not None for name, p in tuned.named_parameters())


def test_an_input_cast_to_the_dtype_of_packed_bytes_is_refused_with_the_dtype_to_take():
    layer = refq4.nn.LinearNF4(64, 64).to("cpu")
    with pytest.raises(TypeError, match="a packed weight's dtype is that of its bytes; cast to the layer's comp"):
        layer(torch.ones(2, 64).to(layer.weight.dtype))


def test_accelerate_loads_packed_files_whole_and_says_so_where_it_would_load_them_in_parts(tmp_path):
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    saved = refq4.quantize_model(made("llama"), compute_dtype=torch.float32, progress=False)
    saved.save_pretrained(tmp_path)
    torch.manual_seed(1)
    other = refq4.quantize_model(MAKE["llama"]().eval(), compute_dtype=torch.float32, progress=False)
    assert_same_bits(logits_of(load_checkpoint_and_dispatch(other, tmp_path)), logits_of(saved))
    with pytest.raises(AttributeError, match="a packed weight is loaded whole, with what stands beside it, and not"):
        load_checkpoint_and_dispatch(other, tmp_path, device_map={"": "cpu"})
    with init_empty_weights():
        empty = MAKE["llama"]()
    refq4.quantize_model(empty, progress=False)
    with pytest.raises(
        ValueError, match=r"this Linear4bit needs a weight of shape \[64, 128\], got \[4096, 1\]; packed"
    ):
        load_checkpoint_and_dispatch(empty, tmp_path, device_map={"": "cpu"})
    assert not hasattr(nn.Parameter(torch.ones(1)), "_parameters")


def test_gpt2s_own_linear_layers_are_quantised_in_memory_saved_and_given_back(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=None
    )
    model, ids = transformers.GPT2LMHeadModel(config).eval(), torch.arange(8)[None]
    refq4.quantize_model(model, progress=False)
    assert sum(isinstance(module, Linear4bit) for module in model.modules()) == 4
    wanted = model(ids).logits
    model.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=Refq4Config())
    assert torch.equal(again(ids).logits, wanted)
    model.dequantize()
    assert type(model.transformer.h[0].attn.c_attn) is Conv1D
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-4)
