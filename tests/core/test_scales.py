"""Scales that a search finds: less error in the same bytes, whatever backend assigns; clear words for wrong input."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from loopback import Loopback
from torch import nn

import refq4
import refq4.functional as F
from refq4 import registry
from refq4.codebooks import codebook_names
from refq4.testing import assert_same_bits
from refq4.testing.isolation import isolated_registry
from refq4.tools.tour import packaged_matrices


def squared_errors(A, blocksize=64, weights=None, **settings):
    """One for each block, short ones too."""
    B, state = F.quantize_4bit(A, blocksize=blocksize, **settings)
    off = (F.dequantize_4bit(B, state).double() - A.double()).square()
    off = (off if weights is None else off * weights).flatten()
    return torch.nn.functional.pad(off, (0, -off.numel() % blocksize)).view(-1, blocksize).sum(1)


@pytest.mark.parametrize("name", codebook_names())
@pytest.mark.parametrize("shape", [(64, 128), (31, 65), (7,)], ids=str)
def test_no_block_gets_worse_and_the_sum_gets_clearly_better(name, shape):
    A = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before, after = (squared_errors(A, quant_type=name, scales=scales) for scales in ("absmax", "search"))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < (0.92 if len(shape) > 1 else 1) * before.sum()


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_six_candidates_come_close_to_the_best_of_a_fine_grid(name, dtype):
    A = torch.randn(100, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = squared_errors(A, quant_type=name, scales="search").sum()
    book = refq4.get_codebook(name).on("cpu")
    largest = A.float().abs().amax(1, keepdim=True)
    best = torch.full((100,), torch.inf, dtype=torch.float64)
    for factor in torch.linspace(0.6, 1.2, 200):
        scaled = (A.float() / (factor * largest)).clamp(-1, 1)
        values = book.values[book.order.long()[torch.bucketize(scaled, book.thresholds)]]
        error = (values * factor * largest - A.float()).double().square().sum(1)
        best = torch.minimum(best, error)
    assert found < 1.02 * best.sum()


def test_the_sentence_encoders_matrices_lose_an_eighth_of_their_squared_error():
    for name in ("nf4", "fp4"):
        errors = {"absmax": 0.0, "search": 0.0}
        for weight in packaged_matrices().values():
            for scales in errors:
                settings = {"quant_type": name, "compress_statistics": True, "scales": scales}
                errors[scales] += float(squared_errors(weight, **settings).sum())
        assert errors["search"] < 0.88 * errors["absmax"], errors
    assert len(packaged_matrices()) == 36


def test_an_importance_moves_the_error_to_the_columns_that_count_less():
    A = torch.randn(64, 100, generator=torch.Generator().manual_seed(3))  # blocks straddle rows
    importance = torch.logspace(-3, 3, 100)
    settings = {"quant_type": "nf4", "weights": importance.double()}
    plain, weighted = (squared_errors(A, scales="search", importance=i, **settings) for i in (None, importance))
    assert (weighted <= squared_errors(A, scales="absmax", **settings) * (1 + 1e-5)).all()
    assert weighted.sum() < 0.8 * plain.sum()
    assert_same_bits(  # only ratios count
        *(
            F.quantize_4bit(A, quant_type="nf4", scales="search", importance=i)[0]
            for i in (importance, 1e30 * importance)
        )
    )
    assert_same_bits(
        *(F.quantize_4bit(A, quant_type="nf4", scales="search", importance=i)[0] for i in (None, torch.ones(100)))
    )


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-25, 1e18, 3e38], ids=str)
def test_blocks_of_zeros_and_of_the_smallest_and_largest_numbers_stay_finite(value):
    A = torch.cat([value * torch.linspace(-1, 1, 64), torch.zeros(64), torch.randn(64)])
    B, state = F.quantize_4bit(A, quant_type="nf4", scales="search")
    decoded = F.dequantize_4bit(B, state)
    assert decoded.isfinite().all()
    assert (decoded[64:128] == 0).all()
    assert (decoded[:64] - A[:64]).abs().max() <= max(0.2 * value, 1e-38)


def test_a_block_that_is_not_finite_keeps_its_scale_and_spoils_no_other():
    A = torch.randn(3, 64)
    A[1, 5] = torch.nan
    B, state = F.quantize_4bit(A, quant_type="nf4", scales="search", allow_nonfinite=True)
    decoded = F.dequantize_4bit(B, state)
    assert decoded[1].isnan().all()
    alone = F.dequantize_4bit(*F.quantize_4bit(A[::2].contiguous(), quant_type="nf4", scales="search"))
    assert_same_bits(decoded[::2].contiguous(), alone)
    with pytest.raises(ValueError, match="has a NaN or an infinity"):
        F.quantize_4bit(A, quant_type="nf4", scales="search")


@pytest.mark.parametrize("backend", ["cpu", "cuda-emulator"])
def test_every_backend_finds_the_references_bytes(backend):
    if not (info := registry.backend_info(backend))["available"]:
        pytest.skip(info["reason"])
    A = torch.randn(9, 200, generator=torch.Generator().manual_seed(4)).bfloat16()
    settings = {"quant_type": "nf4", "blocksize": 32, "scales": "search", "compress_statistics": True}
    with refq4.trace() as t:
        got, state = F.quantize_4bit(A, **settings, backend=backend)
    wanted, expected = F.quantize_4bit(A, **settings, backend="reference")
    assert {op.backend for op in t.ops} == {backend}
    assert_same_bits(got, wanted)
    assert state == expected


def test_a_backend_that_takes_no_scales_goes_on_working_and_the_trace_says_who_assigned():
    with isolated_registry():
        loopback = refq4.register_backend(Loopback())
        A = torch.randn(4, 64)
        with refq4.trace() as t:
            B, state = F.quantize_4bit(A, quant_type="nf4", scales="search", backend="loopback")
        assert loopback.seen["quantize_4bit"] == 1, "the absmax is the backend's"
        assert loopback.seen["dequantize_4bit"] > 1
        stood_in = [op for op in t.ops if op.backend == "reference"]
        assert stood_in
        assert stood_in[0].passed_over == [("loopback", "its quantize_4bit takes no absmax")]
        wanted, expected = F.quantize_4bit(A, quant_type="nf4", scales="search", backend="reference")
        assert_same_bits(B, wanted)
        assert state == expected


def test_a_layer_searches_when_it_is_quantised_and_its_copies_remember(tmp_path):
    weight = torch.randn(8, 64)
    layer = refq4.nn.LinearNF4(64, 8, scales="search")
    layer.weight.data.copy_(weight)
    copied = copy.deepcopy(layer)
    torch.save(layer, tmp_path / "layer.pt")
    pickled = torch.load(tmp_path / "layer.pt", weights_only=False)
    wanted, state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True, scales="search")
    assert not torch.equal(wanted, F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)[0])
    for one in (
        layer,
        copied,
        pickled,
        refq4.nn.Linear4bit.from_linear(linear_of(weight), scales="search", quant_type="nf4"),
    ):
        one.to("cpu")
        assert_same_bits(one.weight.data, wanted)
        assert one.quant_state == state
    model = refq4.quantize_model(nn.Sequential(linear_of(weight)), scales="search", progress=False)
    assert_same_bits(model[0].weight.data, wanted)


def linear_of(weight):
    linear = nn.Linear(*weight.shape[::-1], bias=False)
    linear.weight = nn.Parameter(weight.clone())
    return linear


def test_nothing_that_was_given_is_changed():
    A, importance = torch.randn(4, 64), torch.rand(64)
    given = A.clone(), importance.clone()
    F.quantize_4bit(A, quant_type="nf4", scales="search", importance=importance)
    assert_same_bits(A, given[0])
    assert_same_bits(importance, given[1])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"scales": "best"}, "scales='best': expected 'absmax' or 'search'"),
        ({"importance": torch.ones(64)}, 'pass scales="search" with it'),
        ({"scales": "search", "importance": torch.ones(4)}, "for each of the 64 columns"),
        ({"scales": "search", "importance": torch.ones(64).long()}, "one float for each"),
        ({"scales": "search", "importance": -torch.ones(64)}, "finite and not negative"),
        ({"scales": "search", "importance": torch.full((64,), torch.nan)}, "finite and not negative"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_settings_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        F.quantize_4bit(torch.randn(4, 64), **settings)


@pytest.mark.slow
def test_on_cpu_a_search_takes_less_than_forty_times_as_long_as_the_absmax():
    A = 0.02 * torch.randn(4096, 4096)

    def seconds(scales):
        start = time.process_time()  # what other programs do meanwhile does not count
        F.quantize_4bit(A, quant_type="nf4", scales=scales, backend="cpu")
        return time.process_time() - start

    times = {scales: min(seconds(scales) for _ in range(5)) for scales in ("absmax", "search")}
    assert times["search"] < 40 * times["absmax"], times
