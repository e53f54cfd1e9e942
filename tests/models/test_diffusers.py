"""One model of a diffusers pipeline in 4 bits, on a CPU: quantised while it loads, saved, loaded again, decoded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import refq4
from refq4.integrations.diffusers import Refq4Config
from refq4.testing import assert_same_bits

UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (64, 128),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unet")
    torch.manual_seed(0)
    UNet2DConditionModel(**UNET).save_pretrained(path)
    return path


def load(path: Path, **others: object) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(path, **others)


def sample(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noise, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 64, generator=generator)
    with torch.no_grad():
        given: Tensor = model(noise.to(model.dtype), 3, text.to(model.dtype)).sample
    return given


def linears(model: nn.Module, kind: type) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) is kind}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_linear_layers_are_quantised_as_the_function_does_it_and_come_back_from_disk(plain, tmp_path, dtype):
    full = load(plain, torch_dtype=dtype)
    ours = load(plain, torch_dtype=dtype, quantization_config=Refq4Config(**NF4, bnb_4bit_quant_storage=dtype))
    assert linears(ours, refq4.nn.Linear4bit) == linears(full, nn.Linear) != set()
    for name in linears(ours, refq4.nn.Linear4bit):
        want, _ = refq4.functional.quantize_4bit(
            full.get_submodule(name).weight.data, quant_type="nf4", compress_statistics=True, quant_storage=dtype
        )
        assert_same_bits(ours.get_submodule(name).weight.stored(), want, name)
    difference = (sample(ours) - sample(full)).norm() / sample(full).norm()
    assert 0 < difference < 0.15
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "refq4"
    again = load(tmp_path, torch_dtype=dtype)
    assert linears(again, refq4.nn.Linear4bit) == linears(full, nn.Linear)
    assert_same_bits(sample(again), sample(ours))


@pytest.mark.parametrize("shard", ["10KB", "30KB", "60KB"])
def test_what_belongs_to_a_weight_may_lie_in_another_file(plain, tmp_path, shard):
    ours = load(plain, quantization_config=Refq4Config(**NF4))
    ours.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_bits(sample(load(tmp_path)), sample(ours))


def test_what_is_skipped_stays_and_is_written_down(plain, tmp_path):
    ours = load(plain, quantization_config=Refq4Config(**NF4, llm_int8_skip_modules=["time_embedding", "to_k"]))
    assert {name.split(".")[-1] for name in linears(ours, nn.Linear)} == {"linear_1", "linear_2", "to_k"}
    ours.save_pretrained(tmp_path)
    assert linears(load(tmp_path), nn.Linear) == linears(ours, nn.Linear)


def test_decoding_gives_a_model_that_diffusers_alone_loads(plain, tmp_path):
    ours = load(plain, quantization_config=Refq4Config(**NF4))
    want = sample(ours)
    decoded = ours.dequantize()
    assert not linears(decoded, refq4.nn.Linear4bit)
    torch.testing.assert_close(sample(decoded), want, atol=1e-5, rtol=1e-5)
    decoded.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_same_bits(sample(load(tmp_path)), sample(decoded))


def test_it_runs_on_the_backend_that_is_chosen(plain):
    ours = load(plain, quantization_config=Refq4Config(**NF4))
    with refq4.use_backend("cpu"), refq4.trace() as seen:
        sample(ours)
    assert {op.backend for op in seen.ops} == {"cpu"}


def test_a_layer_that_is_not_as_the_checkpoint_says_is_named(plain, tmp_path):
    load(plain, quantization_config=Refq4Config(**NF4)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 128}))
    with pytest.raises(ValueError, match=r"attn2\.to_k\.weight: .*shape"):
        load(tmp_path)
    with pytest.raises(ValueError, match="stay on disk"):
        load(plain, quantization_config=Refq4Config(**NF4), device_map={"": "disk"}, offload_folder=tmp_path / "away")


def test_a_name_that_matches_nothing_and_a_model_without_linear_layers_are_said(plain):
    with pytest.raises(ValueError, match="mlp"):
        load(plain, quantization_config=Refq4Config(**NF4, formats={"mlp": {"blocksize": 128}}))
    everything = [name for name, _ in load(plain).named_children()]
    with pytest.warns(UserWarning, match="no layer of this UNet2DConditionModel is in 4 bits"):
        load(plain, quantization_config=Refq4Config(**NF4, llm_int8_skip_modules=everything))
