"""peft's other methods on refq4's layers: what trains on bitsandbytes' trains here, merges, or says that it can't.

And the order of imports: peft before refq4, or after the model has been made.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import refq4
from refq4.integrations.peft import merge_errors
from refq4.integrations.transformers import Refq4Config
from refq4.testing import assert_same_bits

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
TARGETS = {"target_modules": ["q_proj", "v_proj", "up_proj"]}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*already has a `quantization_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),  # what peft says about methods that are new
    pytest.mark.filterwarnings("ignore:`.*(gradient_checkpointing|past_key_values).*` is deprecated:FutureWarning"),
]

# What trains on bitsandbytes' 4-bit layers with peft 0.21, with the settings that it needs.
MERGE = {
    "LORA": TARGETS,
    "BOFT": TARGETS | {"boft_block_size": 8},
    "MISS": TARGETS,
    "OFT": TARGETS | {"oft_block_size": 8},
    "SHIRA": TARGETS | {"r": 4},
    "VERA": TARGETS,
}
TRAIN = {
    "ADALORA": TARGETS | {"init_r": 4, "target_r": 2, "total_step": 20},
    "BEFT": TARGETS,
    "C3A": TARGETS | {"block_size": 8},
    "FOURIERFT": TARGETS | {"n_frequency": 20},
    "GRALORA": TARGETS | {"r": 4, "gralora_k": 2},
    "HIRA": TARGETS,
    "IA3": TARGETS | {"feedforward_modules": ["up_proj"]},
    "LILY": TARGETS,
    "PVERA": TARGETS,
    "RANDLORA": TARGETS,
    "ROAD": TARGETS | {"group_size": 8},
    "VBLORA": TARGETS | {"vector_length": 16, "num_vectors": 8},
    "WAVEFT": TARGETS | {"n_frequency": 20},
}
BESIDE = {  # no layer of 4 bits is changed
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
    "LN_TUNING": {},
    "P_TUNING": {"num_virtual_tokens": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2, 3]},
}
VARIANTS = {  # of LoRA
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "a bias": {"bias": "lora_only"},
}


@pytest.fixture(scope="module")
def quantised(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(home / "full")
    wanted = Refq4Config(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(home / "full", quantization_config=wanted).save_pretrained(home / "nf4")
    return home / "nf4"


def adapted(path: Path, config: object, method: str, settings: dict[str, object]) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(1)
    return get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[method](task_type="CAUSAL_LM", **settings))


def trained(model: PeftModel) -> list[float]:
    optimiser = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def bytes_of(model: nn.Module) -> dict[str, Tensor]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, refq4.nn.Linear4bit)}
    return {f"{name}.{key}": value.clone() for name, m in layers.items() for key, value in m.state_dict().items()}


@pytest.mark.parametrize("method", [*MERGE, *TRAIN, *BESIDE])
def test_what_trains_on_bitsandbytes_layers_trains_here_with_the_same_losses(quantised, bnb, method):
    settings = (MERGE | TRAIN | BESIDE)[method]
    theirs = trained(adapted(quantised, BitsAndBytesConfig(load_in_4bit=True), method, settings))
    model = adapted(quantised, Refq4Config(), method, settings)
    before = bytes_of(model)
    assert len(before) > 7
    ours = trained(model)
    assert ours[-1] < ours[0] or method == "PVERA", "it draws noise, so three steps may go up"
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=0)
    for key, value in bytes_of(model).items():
        assert_same_bits(value, before[key], key)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_lora_train_and_unmerge_to_the_very_bytes_without_bitsandbytes(quantised, variant, monkeypatch):
    if variant == "PiSSA":  # rewrites the weight, which no 4-bit layer of either library lets it
        with pytest.raises(TypeError, match="Please initialize PiSSA under float32, float16, or bfloat16"):
            adapted(quantised, Refq4Config(), "LORA", TARGETS | VARIANTS[variant])
        return
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(peft.tuners.lora.model, "is_bnb_available", lambda: False)
    monkeypatch.setattr(peft.tuners.lora.model, "is_bnb_4bit_available", lambda: False)
    model = adapted(quantised, Refq4Config(), "LORA", TARGETS | VARIANTS[variant])
    losses = trained(model)
    assert losses[-1] < losses[0]
    check_merge(model)


@pytest.mark.parametrize("method", MERGE)
def test_methods_that_peft_merges_into_quantised_weights_merge_and_unmerge_to_the_very_bytes(quantised, method):
    model = adapted(quantised, Refq4Config(), method, MERGE[method])
    trained(model)
    check_merge(model)


REFUSED = r"q_proj: \w+ adapters can't be merged into refq4's 4-bit layers|Cannot merge ia3 layers when .* 4-bit mode"


def check_merge(model: PeftModel) -> None:
    before, wanted = bytes_of(model), logits_of(model)
    with pytest.warns(UserWarning, match="a merged weight is rounded to 4 bits again"):
        model.merge_adapter()
    assert (logits_of(model) - wanted).norm() < 0.1 * wanted.norm()
    errors = merge_errors(model)
    assert len(errors) == 3
    assert all(0.01 < error < 0.12 for error in errors.values()), "at most as far as NF4 is off a weight that is normal"
    model.unmerge_adapter()
    for key, value in bytes_of(model).items():
        assert_same_bits(value, before[key], key)
    assert merge_errors(model) == {}


@pytest.mark.parametrize("method", TRAIN)
def test_merging_what_is_not_covered_is_refused_in_one_sentence_before_anything_is_changed(quantised, method):
    model = adapted(quantised, Refq4Config(), method, TRAIN[method])
    before = bytes_of(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=REFUSED):
            merge()
    for key, value in bytes_of(model).items():
        assert_same_bits(value, before[key], key)
    wanted = logits_of(model)
    model.base_model.model.dequantize()
    torch.testing.assert_close(logits_of(model), wanted)


PEFT_AFTERWARDS = """
import sys, torch
import refq4
{made}
assert "peft" not in sys.modules
from peft import LoraConfig, get_peft_model
model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
kinds = {{type(m).__name__ for name, m in model.named_modules() if name.endswith("q_proj")}}
assert kinds == {{"LoraLinear4bit"}}, kinds
import peft, importlib.machinery
assert type(peft.__loader__) is importlib.machinery.SourceFileLoader, "as if nothing had been there"
"""
MADE = {
    "from_pretrained": """
from transformers import AutoModelForCausalLM
from refq4.integrations.transformers import Refq4Config
model = AutoModelForCausalLM.from_pretrained({path!r})
""",
    "quantize_model": """
model = torch.nn.Sequential()
model.add_module("q_proj", torch.nn.Linear(64, 64))
refq4.quantize_model(model, progress=False)
""",
}


@pytest.mark.parametrize("made", MADE)
def test_peft_imported_after_the_model_is_made_knows_its_layers(quantised, made):
    program = PEFT_AFTERWARDS.format(made=MADE[made].format(path=str(quantised)))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
