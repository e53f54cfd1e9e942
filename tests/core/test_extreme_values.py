"""NaN, infinity, zero, overflow: refused with the place or kept where they are, and never silently wrong elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import refq4
import refq4.functional as F
from refq4 import layout
from refq4.codebooks import codebook_names, get_codebook
from refq4.testing import assert_same_bits

NESTED = pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "double quantisation"])
A = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))


def packed():
    return F.quantize_4bit(torch.randn(8, 64), quant_type="nf4")


def nan_at(*index: int, value: float = float("nan"), n: int = 8, k: int = 64) -> torch.Tensor:
    weight = torch.randn(n, k)
    weight[index] = value
    return weight


@NESTED
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_infinity_in_a_weight_are_refused_with_the_place(value, nested):
    weight = nan_at(3, 5, value=value)
    with pytest.raises(
        ValueError, match=r"has a NaN or an infinity: 1 of 8 blocks of 64 .* block 3 \(elements 192 to 255"
    ):
        F.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    with pytest.raises(ValueError, match="NaN or an infinity"):
        refq4.nn.Params4bit(weight, compress_statistics=nested).to("cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_allowed_nan_and_infinity_spoil_their_block_and_no_other(value, name):
    weight = nan_at(3, 5, value=value)
    decoded = F.dequantize_4bit(*F.quantize_4bit(weight, quant_type=name, allow_nonfinite=True))
    clean = weight.clone()
    clean[3] = 0
    rest = F.dequantize_4bit(*F.quantize_4bit(clean, quant_type=name))
    keep = [row for row in range(8) if row != 3]
    assert_same_bits(decoded[keep], rest[keep])
    assert not decoded[3].isfinite().all()


@pytest.mark.parametrize("name", codebook_names())
def test_an_allowed_nan_stores_the_code_of_the_lowest_value_and_its_neighbours_that_of_zero(name):
    book = get_codebook(name)
    for value in (float("nan"), float("inf")):
        weight = nan_at(0, 5, value=value, n=1)
        B, _ = F.quantize_4bit(weight, quant_type=name, allow_nonfinite=True)
        codes = layout.unpack(B.view(-1), 64).tolist()
        assert codes.pop(5) == book.order[0]
        assert set(codes) == {book.on("cpu").zero_code()}


def test_allowed_nan_with_double_quantisation_spoils_everything_and_says_so():
    with pytest.warns(UserWarning, match="every element will decode to NaN"):
        B, state = F.quantize_4bit(nan_at(3, 5), quant_type="nf4", compress_statistics=True, allow_nonfinite=True)
    assert F.dequantize_4bit(B, state).isnan().all()


@pytest.mark.reference_only("what it checks is the same for every backend")
def test_only_what_is_not_finite_draws_the_warning_about_its_mean():
    F.quantize_4bit(A, compress_statistics=True, allow_nonfinite=True)
    with pytest.warns(UserWarning, match="its mean scale does too"):
        F.quantize_4bit(A * torch.inf, compress_statistics=True, allow_nonfinite=True)


@pytest.mark.parametrize("tokens", [1, 3])
def test_nan_in_an_activation_stays_in_its_token(tokens):
    B, state = packed()
    x = torch.randn(tokens, 64)
    x[0, 7] = float("nan")
    y = F.matmul_4bit(x, B, state)
    assert y[0].isnan().all()
    assert y[1:].isfinite().all()


@NESTED
@pytest.mark.parametrize("name", ["nf4", "fp4", "e2m1", "int4", "af4"])
def test_an_all_zero_block_decodes_to_zero(name, nested):
    weight = torch.randn(8, 64)
    weight[2] = 0
    weight[3] = -0.0
    B, state = F.quantize_4bit(weight, quant_type=name, compress_statistics=nested)
    decoded = F.dequantize_4bit(B, state)
    assert (decoded[2:4] == 0).all()
    assert (decoded[4:] != 0).any(dim=1).all()
    assert (
        F.dequantize_4bit(*F.quantize_4bit(torch.zeros(8, 64), quant_type=name, compress_statistics=nested)) == 0
    ).all()


@pytest.mark.parametrize("tiny", [2.0**-149, 2.0**-130, 2.0**-128], ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_a_block_whose_reciprocal_overflows_decodes_to_zero(tiny, name):
    B, state = F.quantize_4bit(torch.full((1, 64), -tiny), quant_type=name)
    assert float(state.absmax) == tiny
    assert (F.dequantize_4bit(B, state) == 0).all()


def test_the_smallest_block_with_a_finite_reciprocal_decodes_to_itself():
    weight = torch.full((1, 64), 2.0**-126)
    assert_same_bits(F.dequantize_4bit(*F.quantize_4bit(weight, quant_type="nf4")), weight)


@pytest.mark.reference_only("an engine whose weights stay fp32 has no overflow there")
def test_fp16_overflow_is_what_a_plain_fp16_linear_gives():
    weight = torch.full((4, 64), 60000.0, dtype=torch.bfloat16)
    weight[1] = 1e6  # beyond fp16 altogether
    B, state = F.quantize_4bit(weight, quant_type="nf4")
    x = torch.ones(2, 64, dtype=torch.float16)
    x[1] = 0
    y = F.matmul_4bit(x, B, state)
    state.dtype = torch.float32
    wanted = nn.functional.linear(x, F.dequantize_4bit(B, state).half())
    assert_same_bits(y.isnan(), wanted.isnan())
    assert_same_bits(y.isinf(), wanted.isinf())
    assert y[0].isinf().all()
    assert y[1, 1].isnan()


def test_the_largest_fp32_weights_quantise():
    huge = torch.finfo(torch.float32).max
    weight = torch.tensor([[huge, -huge, huge / 2, 0.0] * 16])
    decoded = F.dequantize_4bit(*F.quantize_4bit(weight, quant_type="nf4"))
    assert_same_bits(decoded[0, :2], weight[0, :2])
    assert decoded.isfinite().all()
