"""quantize_model: which layers it takes, what it reports, and what it leaves as it was."""

from __future__ import annotations

import copy
import io
import json
import math
import sys
import weakref

import pytest
import torch
from loopback import Loopback
from torch import nn

import refq4
from refq4.models.report import QuantizationReport, layer_report, relative
from refq4.nn import Linear4bit
from refq4.testing import assert_same_bits


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(64, 64), nn.Linear(64, 32, bias=False)
        self.mlp = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))

    def forward(self, x):
        return self.mlp(self.q_proj(x)) + self.k_proj(x).repeat(1, 2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 64)
        self.layers = nn.ModuleList(Block() for _ in range(12))
        self.lm_head = nn.Linear(64, 20, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def quantised(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, {f"layers.{i}.{name}" for i in range(12) for name in ("q_proj", "k_proj", "mlp.0", "mlp.2")}),
        ({"include": "layers.1"}, {f"layers.1.{name}" for name in ("q_proj", "k_proj", "mlp.0", "mlp.2")}),
        ({"include": "layers.[01].?_proj"}, {f"layers.{i}.{n}_proj" for i in (0, 1) for n in "qk"}),
        ({"include": ("mlp", "lm_head"), "skip": ("mlp.2",)}, {*(f"layers.{i}.mlp.0" for i in range(12)), "lm_head"}),
        ({"include": iter(["k_proj"]), "skip": iter(["layers.1?"])}, {f"layers.{i}.k_proj" for i in range(10)}),
        ({"include": lambda name, layer: layer.in_features == 128}, {f"layers.{i}.mlp.2" for i in range(12)}),
        ({"skip": lambda name, layer: "layers" in name}, {"lm_head"}),
    ],
    ids=["all but the head", "a part", "a glob", "two and a skip", "iterators", "a predicate", "a predicate to skip"],
)
def test_rules_choose_layers(rules, expected):
    model = refq4.quantize_model(Model(), progress=False, **rules)
    assert set(quantised(model)) == expected
    assert model(torch.tensor([[1, 2]]).view(-1)).isfinite().all()


def test_a_layer_that_goes_by_two_names_stays_one_layer():
    model = nn.ModuleDict({"a": nn.Linear(64, 64)})
    model["b"] = model["a"]
    refq4.quantize_model(model, progress=False)
    assert isinstance(model["b"], Linear4bit)
    assert model["b"] is model["a"]


def test_what_shares_a_weight_or_is_a_subclass_is_left_alone_and_the_report_says_why():
    model = Model()
    model.lm_head.weight = model.embed.weight
    model.attention = nn.MultiheadAttention(64, 4)
    report = QuantizationReport()
    refq4.quantize_model(model, skip=(), report=report, progress=False)
    assert report.left["lm_head"] == "shares its weight with embed"
    assert "NonDynamicallyQuantizableLinear" in report.left["attention.out_proj"]
    assert model.lm_head.weight is model.embed.weight


def test_nothing_to_quantise_says_what_was_found_and_why_it_was_left():
    with pytest.raises(ValueError, match=r"no nn\.Linear to quantise in this Linear: itself \(skipped: the predicate"):
        refq4.quantize_model(nn.Linear(64, 64), skip=lambda name, layer: True, progress=False)
    with pytest.raises(ValueError, match=r"lm_head \(skipped: it matches 'lm_head'\)"):
        refq4.quantize_model(nn.ModuleDict({"lm_head": nn.Linear(64, 64)}), progress=False)


def test_on_the_meta_device_the_layers_wait_for_their_weights():
    with torch.device("meta"):
        model = Model()
    report = QuantizationReport()
    refq4.quantize_model(model, report=report, progress=False)
    assert model.layers[0].q_proj.weight.is_meta
    assert report.layers == []


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_the_report_gives_the_bits_and_the_error_that_a_decoding_shows(nested):
    torch.manual_seed(0)
    model, report = Model(), QuantizationReport()
    before = copy.deepcopy(model)
    refq4.quantize_model(model, compress_statistics=nested, report=report, progress=False)
    assert [layer.name for layer in report.layers] == quantised(model)
    for entry in report.layers:
        wanted, layer = before.get_submodule(entry.name).weight.detach(), model.get_submodule(entry.name)
        decoded = refq4.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
        assert entry.error == pytest.approx(float((wanted - decoded).norm() / wanted.norm()), rel=1e-4)
        scales = sum(v.nbytes for k, v in layer.state_dict().items() if k.startswith("weight.") and "bits" not in k)
        stored = layer.weight.numel() + scales + (4 if nested else 0)  # the offset is in the JSON
        assert entry.bits == pytest.approx(8 * stored / wanted.numel())
    assert report.quantised + report.other == sum(p.numel() for p in before.parameters())
    assert report.bits == pytest.approx(
        sum(layer.bits * layer.numel for layer in report.layers) / sum(layer.numel for layer in report.layers)
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_error_of_a_large_weight_is_summed_over_pieces(backend):
    torch.manual_seed(0)
    weight = torch.randn(2059, 2053)  # odd, blocks straddle rows, a little over what is decoded at once
    for storage in (torch.uint8, torch.float32):
        packed, state = refq4.functional.quantize_4bit(
            weight, quant_type="fp4", compress_statistics=True, quant_storage=storage
        )
        wanted = (weight - refq4.functional.dequantize_4bit(packed, state)).norm() / weight.norm()
        with refq4.use_backend(backend):
            assert layer_report("w", weight, packed, state).error == pytest.approx(float(wanted), rel=1e-5)
    assert state.shape == weight.shape, "the caller's state is only read"


def test_the_worst_layers_come_first_and_are_shown():
    model, report = Model(), QuantizationReport()
    with torch.no_grad():
        model.layers[7].mlp[2].weight[:, ::64] *= 20.0  # an outlier takes the scale of its block
    refq4.quantize_model(model, report=report, progress=False)
    assert report.worst(1)[0].name == "layers.7.mlp.2"
    text = str(report)
    assert "the 10 layers with the largest error" in text
    assert "layers.7.mlp.2" in text
    assert "left alone (skipped: it matches 'lm_head'): lm_head" in text
    assert "<pre" in report._repr_html_()
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["layers"][0]["shape"] == [64, 64]
    assert plain["left"] == {"lm_head": "skipped: it matches 'lm_head'"}


def test_a_report_of_nothing_is_valid_json_and_prints():
    report = QuantizationReport()
    assert math.isnan(report.bits)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["bits"] is None
    assert "0 layers" in str(report)


def test_a_weight_of_zeros_has_no_error():
    weight = torch.zeros(4, 64)
    assert layer_report("w", weight, *refq4.functional.quantize_4bit(weight)).error == 0
    assert relative(1.0, 0.0) == math.inf


def test_quantising_with_a_report_gives_the_same_bits_as_without():
    torch.manual_seed(0)
    model = Model()
    a = refq4.quantize_model(copy.deepcopy(model), progress=False).state_dict()
    b = refq4.quantize_model(model, report=QuantizationReport(), progress=False).state_dict()
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert_same_bits(value, b[key])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.reference_only("what it checks is the same for every backend")
@pytest.mark.parametrize("progress", [True, False])
def test_a_bar_counts_layers_on_a_terminal_unless_it_is_not_wanted(monkeypatch, progress):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    refq4.quantize_model(nn.Sequential(nn.Linear(64, 64)), quant_type="nf4", progress=progress)
    assert ("quantising to nf4" in screen.getvalue() and "layer" in screen.getvalue()) is progress
    assert bool(screen.getvalue()) is progress


def test_an_interrupt_while_a_model_is_quantised_leaves_it_usable():
    class Interrupted(Loopback):
        def quantize_4bit(self, *args):
            quantised = super().quantize_4bit(*args)
            if self.seen["quantize_4bit"] == 2:  # Ctrl-C while the second layer is under way
                raise KeyboardInterrupt
            return quantised

    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    before = copy.deepcopy(model)
    refq4.register_backend(Interrupted())
    try:
        with refq4.use_backend("loopback"), pytest.raises(KeyboardInterrupt):
            refq4.quantize_model(model, progress=False)
    finally:
        refq4.unregister_backend("loopback")
    assert [type(layer).__name__ for layer in model] == ["Linear4bit", "Linear", "Linear"]
    for layer, untouched in zip(model[1:], before[1:], strict=True):
        assert_same_bits(layer.weight.detach(), untouched.weight.detach())
    x = torch.randn(2, 64)
    assert model(x).isfinite().all()
    refq4.quantize_model(model, progress=False)  # again: what was left
    whole = refq4.quantize_model(before, progress=False)
    assert_same_bits(model(x), whole(x))


def test_each_full_precision_weight_goes_before_the_next_layer_is_quantised(monkeypatch):
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    before, alive, quantise = [weakref.ref(layer) for layer in model], [], Linear4bit.from_linear

    def watched(linear, **settings):
        alive.append(sum(layer() is not None for layer in before))
        return quantise(linear, **settings)

    monkeypatch.setattr(Linear4bit, "from_linear", watched)
    refq4.quantize_model(model, progress=False)
    assert alive == [4, 3, 2, 1]
