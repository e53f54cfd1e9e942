"""QLoRA with peft on refq4's layers: what trains, what it learns, merged and unmerged, next to bitsandbytes'."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import accelerate
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import refq4
from refq4.integrations.peft import LoraLinear4bit, merge_errors
from refq4.integrations.transformers import Refq4Config
from refq4.testing import assert_same_bits

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
TARGETS = ["q_proj", "v_proj", "up_proj"]
# peft calls what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
ROUNDED = "a merged weight is rounded to 4 bits again"


@pytest.fixture(scope="module")
def quantised(tmp_path_factory) -> Path:
    """A Llama in NF4 with double quantisation, saved."""
    home = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(home / "full")
    wanted = Refq4Config(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(home / "full", quantization_config=wanted).save_pretrained(home / "nf4")
    return home / "nf4"


def adapted(path: Path, config: object = None, checkpointing: str = "reentrant", **lora: object) -> PeftModel:
    """The model of a file with fresh adapters, as the QLoRA recipe has it."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config or Refq4Config())
    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=checkpointing != "none",
        gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"},
    )
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | lora
    return get_peft_model(model, LoraConfig(**settings))


def trained(model: PeftModel, steps: int = 10) -> list[float]:
    """The loss of each step, the model in eval mode again."""
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def adapters_of(model: nn.Module) -> dict[str, LoraLinear4bit]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear4bit)}


def base_bytes(model: nn.Module) -> dict[str, Tensor]:
    return {
        key: value.clone()
        for name, m in model.named_modules()
        if isinstance(m, refq4.nn.Linear4bit)
        for key, value in m.state_dict(prefix=f"{name}.").items()
    }


def assert_same_bytes(model: nn.Module, wanted: dict[str, Tensor]) -> None:
    got = base_bytes(model)
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert_same_bits(got[key], value, key)


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_qlora_run_follows_the_losses_of_bitsandbytes_and_changes_adapters_only(quantised, bnb):
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):  # transformers, whenever one is passed
        theirs = trained(adapted(quantised, BitsAndBytesConfig(load_in_4bit=True)))
    model = adapted(quantised)
    assert len(adapters_of(model)) == 6
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    before = base_bytes(model)
    ours = trained(model)
    assert ours[-1] < 0.9 * ours[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=0)
    assert_same_bytes(model, before)


def test_gradient_checkpointing_gives_the_same_gradients(quantised):
    gradients = {}
    for checkpointing in ("none", "reentrant", "not reentrant"):
        model = adapted(quantised, checkpointing=checkpointing).train()
        inner = model.base_model.model
        name = next(n for n in ("is_activation_checkpointing", "is_gradient_checkpointing") if hasattr(inner, n))
        assert getattr(inner, name) == (checkpointing != "none")  # the second: transformers before 5.23
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients[checkpointing] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in gradients["none"].items():
        torch.testing.assert_close(gradients["reentrant"][name], gradient)
        torch.testing.assert_close(gradients["not reentrant"][name], gradient)


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"lora_bias": True}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapted_layer_and_its_gradients_are_those_of_pefts_forward(dtype, settings):
    torch.manual_seed(0)
    layer = refq4.nn.LinearNF4(128, 96, compute_dtype=dtype).to("cpu")
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["0"], init_lora_weights=False, **settings)
    model = get_peft_model(nn.Sequential(layer), config)
    model.add_adapter("second", LoraConfig(r=8, target_modules=["0"], init_lora_weights=False))
    adapted_layer = model.base_model.model[0]
    x, grad_y = torch.randn(2, 5, 128, dtype=dtype), torch.randn(2, 5, 96, dtype=dtype)
    trainable = [p for p in adapted_layer.parameters() if p.dtype == torch.float32]

    def run(forward, active):
        adapted_layer.set_adapter(active)
        for parameter in trainable:
            parameter.requires_grad_(True)
        torch.manual_seed(1)  # of the dropout
        a = x.clone().requires_grad_()
        y = forward(adapted_layer, a)
        return y, *torch.autograd.grad(y, [a, *trainable], grad_y, allow_unused=True)

    for active in (["default"], ["default", "second"]):
        for got, wanted in zip(run(LoraLinear4bit.forward, active), run(Linear.forward, active), strict=True):
            assert (got is None) == (wanted is None)
            if got is not None:
                assert got.dtype == wanted.dtype
                largest = wanted.abs().max()  # of a sum's terms, whose order differs; bf16 may round to a neighbour
                within = 1e-5 if got.dtype == torch.float32 else 2.0**-8
                torch.testing.assert_close(got / largest, wanted / largest, rtol=0, atol=within)


HOOKS = {
    "forward": lambda B, hook: B.register_forward_hook(hook),
    "before forward": lambda B, hook: B.register_forward_pre_hook(hook),
    "backward": lambda B, hook: B.register_full_backward_hook(hook),
    "before backward": lambda B, hook: B.register_full_backward_pre_hook(hook),
    "of all modules": lambda B, hook: nn.modules.module.register_module_forward_hook(hook),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_on_a_matrix_of_an_adapter_runs(kind):
    model = get_peft_model(nn.Sequential(refq4.nn.LinearNF4(64, 8).to("cpu")), LoraConfig(target_modules=["0"]))
    seen, B = [], model.base_model.model[0].lora_B["default"]
    handle = HOOKS[kind](B, lambda module, *_: seen.append(module))
    try:
        model(torch.ones(2, 64, requires_grad=True)).sum().backward()
    finally:
        handle.remove()
    assert seen.count(B) == 1


def test_an_adapter_that_accelerate_loads_for_each_call_adds_what_it_did():
    layer = refq4.nn.LinearNF4(64, 8).to("cpu")
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], init_lora_weights=False))
    x = torch.randn(2, 64)
    with torch.no_grad():
        wanted = model(x)
        for matrix in ("lora_A", "lora_B"):
            accelerate.cpu_offload(getattr(model.base_model.model[0], matrix), execution_device="cpu")
        assert next(model.base_model.model[0].lora_B.parameters()).is_meta
        torch.testing.assert_close(model(x), wanted)


def test_an_adapter_is_saved_and_loaded_on_its_own(quantised, tmp_path):
    model = adapted(quantised)
    trained(model, steps=2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(quantised), tmp_path)
    assert len(adapters_of(again)) == 6
    torch.testing.assert_close(logits_of(again), logits_of(model))


def test_layers_of_gpt2_are_adapted_the_way_they_lie(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = adapted(tmp_path, Refq4Config(), target_modules=["c_attn"], fan_in_fan_out=True)
    losses = trained(model, steps=3)
    assert losses[-1] < losses[0]
    wanted = logits_of(model)
    with pytest.warns(UserWarning, match=ROUNDED):
        model.merge_adapter()
    assert (logits_of(model) - wanted).norm() < 0.2 * wanted.norm()


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(quantised) -> PeftModel:
    model = adapted(quantised)
    trained(model)
    return model


def merged_weight(module: LoraLinear4bit, names: tuple[str, ...] = ("default",)) -> Tensor:
    layer = module.get_base_layer()
    decoded = refq4.functional.dequantize_4bit(layer.weight, layer.quant_state)
    return decoded + sum(module.get_delta_weight(name) for name in names)


def test_a_merged_weight_is_the_sum_rounded_once_and_its_error_is_measured(tuned):
    model = copy.deepcopy(tuned)
    exact = {name: merged_weight(module).detach() for name, module in adapters_of(model).items()}
    assert merge_errors(model) == {}
    with pytest.warns(UserWarning, match=ROUNDED):
        model.merge_adapter()
    errors = merge_errors(model)
    assert errors.keys() == exact.keys()
    for name, weight in exact.items():
        layer = adapters_of(model)[name].get_base_layer()
        packed, state = refq4.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        assert_same_bits(layer.weight.stored(), packed, name)
        assert layer.quant_state == state
        off = (refq4.functional.dequantize_4bit(packed, state) - weight).norm() / weight.norm()
        assert errors[name] == pytest.approx(off.item(), rel=1e-4)
        assert 0.05 < errors[name] < 0.12, "as far as NF4 is off any weight that looks normal"


def test_unmerging_gives_back_the_very_bytes(tuned):
    model = copy.deepcopy(tuned)
    before, wanted = base_bytes(model), logits_of(model)
    with pytest.warns(UserWarning, match=ROUNDED):
        model.merge_adapter()
    assert (logits_of(model) - wanted).norm() > 0.001 * wanted.norm()
    model.unmerge_adapter()
    assert_same_bytes(model, before)
    assert_same_bits(logits_of(model), wanted)
    assert merge_errors(model) == {}
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_a_second_adapter_is_merged_without_rounding_the_first_twice(tuned):
    model = copy.deepcopy(tuned)
    model.add_adapter("second", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    before = base_bytes(model)
    both = {name: merged_weight(m, ("default", "second")).detach() for name, m in adapters_of(model).items()}
    with pytest.warns(UserWarning, match=ROUNDED):
        model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match=ROUNDED), pytest.warns(UserWarning, match="Already following adapters"):
        model.merge_adapter(["second"])
    for name, weight in both.items():
        layer = adapters_of(model)[name].get_base_layer()
        packed, _ = refq4.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        assert (layer.weight.stored() != packed).float().mean() < 0.001, "but for the order of a sum"
    model.unmerge_adapter()
    assert_same_bytes(model, before)


def test_a_merged_model_is_unloaded_saved_and_loaded_without_peft(tuned, tmp_path):
    model = copy.deepcopy(tuned)
    with pytest.warns(UserWarning, match=ROUNDED):
        plain = model.merge_and_unload()
    assert not adapters_of(plain)
    plain.save_pretrained(tmp_path)
    assert_same_bits(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(plain))


def test_merged_into_full_precision_nothing_of_an_adapter_is_lost(quantised, tuned, tmp_path):
    tuned.save_pretrained(tmp_path)
    decoded = AutoModelForCausalLM.from_pretrained(quantised).dequantize()
    model = PeftModel.from_pretrained(decoded, tmp_path).merge_and_unload()
    torch.testing.assert_close(logits_of(model), logits_of(tuned))


def test_a_model_dequantised_under_its_adapters_merges_in_full_precision(tuned):
    model = copy.deepcopy(tuned)
    wanted = logits_of(model)
    model.base_model.model.dequantize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter()
    torch.testing.assert_close(logits_of(model), wanted)
    model.unmerge_adapter()
    torch.testing.assert_close(logits_of(model), wanted)


def test_a_bias_is_merged_and_comes_back():
    torch.manual_seed(0)
    net = nn.Sequential(refq4.nn.LinearNF4(64, 16).to("cpu"))
    config = LoraConfig(target_modules=["0"], lora_bias=True, init_lora_weights=False, lora_alpha=16)
    model = get_peft_model(net, config).eval()
    (module,) = adapters_of(model).values()
    bias, x = module.base_layer.bias.detach().clone(), torch.randn(4, 64)
    wanted = model(x)
    with pytest.warns(UserWarning, match=ROUNDED):
        model.merge_adapter()
    torch.testing.assert_close(module.base_layer.bias, bias + module.lora_B["default"].bias * module.scaling["default"])
    assert (model(x) - wanted).norm() < 0.2 * wanted.norm()
    model.unmerge_adapter()
    assert_same_bits(module.base_layer.bias.detach(), bias)
    with pytest.warns(UserWarning, match="has no bias"):
        bare = get_peft_model(nn.Sequential(refq4.nn.LinearNF4(64, 16, bias=False).to("cpu")), config)
    with pytest.raises(ValueError, match="without a bias can't be merged"):
        bare.merge_adapter()


def test_a_broken_adapter_is_refused_and_nothing_is_changed(tuned):
    model = copy.deepcopy(tuned)
    broken = next(iter(adapters_of(model).values()))
    broken.lora_B["default"].weight.data[0, 0] = torch.inf
    before = base_bytes(model)
    with pytest.raises(ValueError, match="NaN or infinity"):
        broken.merge()
    assert_same_bytes(model, before)
    assert not broken.merged


def test_dora_trains_merges_alone_and_is_refused_beside_another(quantised, bnb):
    model = adapted(quantised, use_dora=True)
    losses = trained(model, steps=3)
    assert losses[-1] < losses[0]
    before, wanted = base_bytes(model), logits_of(model)
    with pytest.warns(UserWarning, match=ROUNDED):
        model.merge_adapter()
    assert (logits_of(model) - wanted).norm() < 0.2 * wanted.norm()
    model.unmerge_adapter()
    assert_same_bytes(model, before)
    model.add_adapter("second", LoraConfig(r=2, target_modules=TARGETS))
    with pytest.raises(ValueError, match="merged alone or not at all"):
        model.merge_adapter(["default", "second"])


def test_the_class_for_other_layers_is_pefts_own():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
    assert not adapters_of(model)
    model.merge_adapter()
    config = LoraConfig(target_modules=["0"])

    class Mine(LoraLinear4bit):
        pass

    config._register_custom_module({refq4.nn.Linear4bit: Mine})
    model = get_peft_model(nn.Sequential(refq4.nn.LinearNF4(64, 8).to("cpu")), config)
    assert type(model.base_model.model[0]) is Mine


def test_adalora_which_adds_to_a_layers_result_in_place_trains(quantised):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(quantised, quantization_config=Refq4Config())
    before = copy.deepcopy(model.state_dict())
    model = get_peft_model(
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False),
        AdaLoraConfig(init_r=4, target_r=2, total_step=20, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(16):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    after = {name.replace(".base_layer", ""): value for name, value in model.base_model.model.state_dict().items()}
    for name, value in before.items():
        if "weight." in name or value.dtype == torch.uint8:
            assert_same_bits(after[name], value, name)
