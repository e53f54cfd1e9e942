"""Parameters in 4 bits that no linear layer holds: read, moved, copied, saved and loaded as a layer's weight is."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.utils.parametrize as P
from torch import nn
from torch.utils.checkpoint import checkpoint

import refq4
import refq4.functional as F
from refq4.nn import Params4bit
from refq4.nn.parametrize import (
    decode_parameter_4bit,
    packed_parameter,
    replace_parameter_4bit,
    replace_parameter_4bit_prequantized,
)

E, N, K = 4, 48, 32


class Experts(nn.Module):
    """Two fused weights, of which forward reads one expert."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(E, N, K, dtype=dtype))
        self.down_proj = nn.Parameter(torch.randn(E, K, N, dtype=dtype))
        self.act = nn.Linear(N, N, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x @ self.up_proj[1].T) @ self.down_proj[1].T


def in_4_bits(**settings: object) -> nn.Sequential:
    """A model in which experts lie one level down, as in real ones."""
    model = nn.Sequential(Experts())
    for name in ("up_proj", "down_proj"):
        replace_parameter_4bit(model[0], name, **settings)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_reading_gives_what_decoding_the_stored_bytes_gives(dtype):
    experts = Experts(dtype)
    packed, state = F.quantize_4bit(experts.up_proj.data, quant_type="fp4", blocksize=32, compress_statistics=True)
    replace_parameter_4bit(experts, "up_proj", compress_statistics=True, quant_type="fp4", blocksize=32)
    assert torch.equal(experts.up_proj, F.dequantize_4bit(packed, state))
    assert experts.up_proj.dtype == dtype
    assert not experts.up_proj.requires_grad
    weight = packed_parameter(experts, "up_proj")
    assert isinstance(weight, Params4bit)
    assert torch.equal(weight.stored(), packed)
    assert weight.quant_state is experts.parametrizations.up_proj[0].quant_state


def test_a_state_dict_has_the_keys_of_a_layer_and_goes_into_another_model():
    model, other = in_4_bits(compress_statistics=True), in_4_bits(quant_type="fp4")
    saved = model.state_dict()
    beside = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
    for name in ("0.up_proj", "0.down_proj"):
        assert {key for key in saved if key.startswith(name)} == {name, *(f"{name}.{part}" for part in beside)}
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    assert not any(other.load_state_dict(torch.load(file, weights_only=True)))
    assert torch.equal(other[0].up_proj, model[0].up_proj)
    assert other.state_dict().keys() == saved.keys()
    other[0].parametrizations.up_proj.original.data.zero_()
    assert not torch.equal(other[0].up_proj, model[0].up_proj), "what was loaded is a copy"


def test_full_precision_values_that_are_loaded_are_quantised_with_the_settings_there():
    model, full = in_4_bits(quant_type="fp4", blocksize=128), nn.Sequential(Experts())
    assert not any(model.load_state_dict(full.state_dict()))
    packed, state = F.quantize_4bit(full[0].up_proj.data, quant_type="fp4", blocksize=128)
    assert torch.equal(packed_parameter(model[0], "up_proj").stored(), packed)
    assert packed_parameter(model[0], "up_proj").quant_state == state


def test_a_model_on_the_meta_device_takes_a_packed_state_dict():
    model = in_4_bits()
    with torch.device("meta"):
        empty = nn.Sequential(Experts())
    for name in ("up_proj", "down_proj"):
        replace_parameter_4bit(empty[0], name)
    assert empty[0].up_proj.is_meta
    assert packed_parameter(empty[0], "up_proj") is None
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty[0].up_proj, model[0].up_proj)


def test_what_is_missing_or_wrong_is_told_under_the_parameter_s_own_name():
    model = in_4_bits()
    saved = model.state_dict()
    without = {key: value for key, value in saved.items() if not key.startswith("0.down_proj")}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0\.down_proj"'):
        model.load_state_dict(without)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.up_proj: a full-precision weight of shape"):
        model.load_state_dict(nn.Sequential(Experts()).state_dict() | {"0.up_proj": torch.ones(2, 2)})
    larger = nn.Module()
    larger.up_proj = nn.Parameter(torch.randn(E + 1, N, K))
    replace_parameter_4bit(larger, "up_proj")
    theirs = {f"0.{key}": value for key, value in larger.state_dict().items()}
    with pytest.raises(ValueError, match=r"0\.up_proj: the checkpoint holds .*needs shape \[4, 48, 32\]"):
        model.load_state_dict(theirs)


def test_moving_keeps_the_bytes_and_a_cast_changes_what_reading_gives():
    model = in_4_bits(compress_statistics=True)
    before, weight = model.state_dict(), model[0].parametrizations.up_proj.original
    model.to(torch.bfloat16)
    assert model[0].up_proj.dtype == model[0].act.weight.dtype == torch.bfloat16
    assert model[0].parametrizations.up_proj.original is weight
    assert torch.equal(model.state_dict()["0.up_proj"], before["0.up_proj"])
    assert model(torch.randn(3, K, dtype=torch.bfloat16)).dtype == torch.bfloat16
    model.to("meta")
    assert model[0].up_proj.is_meta
    assert weight.quant_state.absmax.is_meta or packed_parameter(model[0], "up_proj").quant_state.absmax.is_meta
    model.to_empty(device="cpu")
    model.load_state_dict(before)
    assert torch.equal(model.state_dict()["0.up_proj"], before["0.up_proj"])


def test_a_copy_has_bytes_state_and_hooks_of_its_own():
    model = in_4_bits()
    twin, was = copy.deepcopy(model), model[0].up_proj
    held = twin[0].parametrizations.up_proj
    assert held.original.module is held
    assert held[0].quant_state is held.original.quant_state is not packed_parameter(model[0], "up_proj").quant_state
    decode_parameter_4bit(twin[0], "up_proj")
    decode_parameter_4bit(twin[0], "down_proj")
    assert type(twin[0]) is Experts
    assert not twin[0]._forward_hooks
    assert not twin[0]._load_state_dict_pre_hooks
    assert torch.equal(twin[0].up_proj, was)
    assert len(model[0]._forward_hooks) == 2
    assert torch.equal(model[0].up_proj, was)


def test_decoding_refuses_what_is_not_in_4_bits_or_carries_more():
    model = in_4_bits()
    with pytest.raises(ValueError, match="weight of this Linear is not in 4 bits"):
        decode_parameter_4bit(model[0].act, "weight")
    P.register_parametrization(model[0], "up_proj", nn.Identity())
    assert packed_parameter(model[0], "up_proj") is None
    with pytest.raises(ValueError, match=r"up_proj of this .*Experts carries Identity on top"):
        decode_parameter_4bit(model[0], "up_proj")


def test_packed_bytes_and_their_state_become_a_parameter_that_decodes():
    experts = Experts()
    packed, state = F.quantize_4bit(experts.up_proj.data, quant_type="nf4", compress_statistics=True)
    experts.up_proj = nn.Parameter(packed, requires_grad=False)
    entries = state.as_dict(packed=True)
    replace_parameter_4bit_prequantized(experts, "up_proj", entries, torch.device("cpu"))
    assert torch.equal(experts.up_proj, F.dequantize_4bit(packed, state))
    assert entries.keys() == state.as_dict(packed=True).keys(), "the caller's dict is only read"
    with pytest.raises(ValueError, match=r"shape \[4, 48, 32\] packs into"):
        replace_parameter_4bit_prequantized(experts, "down_proj", entries, "cpu")
    with pytest.raises(TypeError, match=r"Parameter 'up_proj' is not an instance of nn\.Parameter"):
        replace_parameter_4bit(experts, "up_proj")


def test_gradients_pass_through_to_what_comes_in():
    model = in_4_bits()
    x = torch.randn(3, K, requires_grad=True)
    model(x).sum().backward()
    (want,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(x.grad, want)
    assert bool(x.grad.abs().sum() > 0)
    assert model[0].parametrizations.up_proj.original.grad is None


def test_one_forward_pass_decodes_once_and_keeps_nothing_even_after_an_error():
    class Greedy(Experts):
        def forward(self, x):
            assert self.up_proj is self.up_proj
            if x is None:
                raise RuntimeError("in the middle")
            return x @ self.up_proj[0].T

    experts = Greedy()
    replace_parameter_4bit(experts, "up_proj")
    experts(torch.randn(2, K))
    with pytest.raises(RuntimeError, match="in the middle"):
        experts(None)
    assert (P._cache_enabled, P._cache) == (0, {})
    for _ in range(2):
        x = torch.randn(2, K, requires_grad=True)
        checkpoint(experts, x, use_reentrant=False).sum().backward()
    assert (P._cache_enabled, P._cache) == (0, {})


def test_it_compiles_whole():
    model = in_4_bits()
    x = torch.randn(3, K)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    assert (P._cache_enabled, P._cache) == (0, {})


def test_a_weight_whose_blocks_straddle_experts_reads_as_the_flat_tensor_decodes():
    module = nn.Module()
    module.w = nn.Parameter(torch.randn(3, 5, 7))
    packed, state = F.quantize_4bit(module.w.data, quant_type="nf4")
    replace_parameter_4bit(module, "w")
    assert torch.equal(module.w, refq4.functional.dequantize_4bit(packed, state))
