"""accelerate on refq4's layers: empty models, and weights that wait on the CPU or on disk until they are called for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import refq4
from refq4.integrations.transformers import Refq4Config
from refq4.pipeline import LAYOUT_OFFLOADED
from refq4.testing import assert_same_bits

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    return nn.Sequential(refq4.nn.LinearNF4(64, 128), nn.ReLU(), refq4.nn.LinearFP4(128, 8)).eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


def test_a_model_made_empty_waits_for_its_state_dict():
    source = network().to("cpu")
    with accelerate.init_empty_weights():
        empty = network()
    assert all(p.is_meta for p in empty.parameters())
    assert empty[0].weight.module is empty[0]
    empty.load_state_dict(source.state_dict(), assign=True)
    assert_same_bits(output(empty), output(source))


def test_a_layer_emptied_onto_the_cpu_waits_for_its_state_dict():
    source, empty = network().to("cpu"), network().to("meta")
    empty.to_empty(device="cpu")
    empty.load_state_dict(source.state_dict())
    assert_same_bits(output(empty), output(source))


OFFLOADS: dict[str, Callable[[nn.Module, Path], object]] = {
    "cpu": lambda model, _: accelerate.cpu_offload(model, execution_device="cpu"),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device="cpu"),
    "a device map": lambda model, folder: accelerate.dispatch_model(
        model, {"0": "cpu", "1": "cpu", "2": "disk"}, main_device="cpu", offload_dir=folder
    ),
}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS.keys())
@pytest.mark.parametrize("ran_before", [False, True], ids=["fresh", "prepared before"])
def test_offloaded_weights_come_for_each_call_and_go_again(tmp_path, offload, ran_before):
    model = network().to("cpu")
    wanted = output(model) if ran_before else output(network_like(model))
    offload(model, tmp_path)
    for _ in range(2):
        torch.testing.assert_close(output(model), wanted)
        assert model[2].weight.is_meta
    assert not model[2].weight.prepared, "a prepared copy would keep in memory what was to be offloaded"
    with refq4.trace() as t:
        output(model)
    assert [step.why for step in t.calls[-1].steps if step.number == 2] == [LAYOUT_OFFLOADED.why]


def network_like(model: nn.Module) -> nn.Module:
    twin = network().to("cpu")
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(home / "full")
    config = Refq4Config(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(home / "full", quantization_config=config)
    model.save_pretrained(home / "quantised")
    return home / "full", home / "quantised"


ON_CPU = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
DISK = dict.fromkeys(ON_CPU, "cpu") | {"model.layers.1": "disk"}


def test_a_quantised_model_loads_with_a_part_on_disk_and_is_saved_from_there(saved, tmp_path):
    _, path = saved
    ids = torch.tensor([[3, 1, 4]])
    whole = AutoModelForCausalLM.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, device_map=DISK, offload_folder=tmp_path / "weights")
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    with torch.no_grad():
        for _ in range(2):
            assert_same_bits(model(ids).logits, whole(ids).logits)
    with pytest.warns(UserWarning, match="save a model with offloaded modules"):
        model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    for key, value in whole.state_dict().items():
        assert_same_bits(again[key], value, key)


def test_quantising_with_a_part_on_disk_is_refused_with_the_way_to_do_it(saved, tmp_path):
    path, _ = saved
    with pytest.raises(ValueError, match="quantise it without this device_map, save_pretrained it, and load that"):
        AutoModelForCausalLM.from_pretrained(
            path, quantization_config=Refq4Config(), device_map=DISK, offload_folder=tmp_path
        )
