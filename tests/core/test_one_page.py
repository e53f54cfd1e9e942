"""The whole layer on one page, which imports nothing of refq4, computes what refq4 computes: bit for bit."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import refq4
import refq4.functional as F
from refq4 import one_page
from refq4.codebooks import create_dynamic_map, get_codebook
from refq4.testing import assert_same_bits

pytestmark = pytest.mark.reference_only("the page is the reference's own arithmetic")
PAGE = Path(one_page.__file__)


@pytest.fixture(autouse=True)
def reference() -> Iterator[None]:
    with refq4.use_backend("reference"):
        yield


def test_its_codes_are_those_of_the_codebooks():
    assert_same_bits(one_page.nf4_code(), torch.tensor(get_codebook("nf4").values))
    assert_same_bits(one_page.dynamic_code(), create_dynamic_map())


WEIGHTS = {
    "normal": lambda n, k: torch.randn(n, k),
    "tiny": lambda n, k: torch.randn(n, k) * 1e-30,
    "one block of zeros": lambda n, k: torch.cat([torch.zeros(1, k), torch.randn(n - 1, k)]),
    "one outlier": lambda n, k: torch.randn(n, k).index_fill_(0, torch.tensor([1]), 1e4),
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize(("n", "k"), [(8, 64), (33, 192), (48, 512), (256, 320)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bytes_scales_decoded_weight_and_product_are_those_of_the_library(n, k, weights, dtype):
    weight, bias = weights(n, k), torch.randn(n)
    mine = one_page.Linear4bit(weight, bias.to(dtype))
    packed, state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert_same_bits(mine.packed, packed.view(-1))
    assert_same_bits(mine.q, state.absmax)
    assert_same_bits(mine.absmax2, state.state2.absmax)
    assert_same_bits(mine.offset, state.offset)
    assert_same_bits(mine.weight(), F.dequantize_4bit(packed, state))
    layer = refq4.nn.LinearNF4(k, n, compute_dtype=dtype)
    layer.load_state_dict({"weight": weight, "bias": bias})
    layer.to("cpu")
    for shape in ((1, k), (3, k), (2, 2, k)):
        x = torch.randn(shape).to(dtype)
        with torch.no_grad():
            assert_same_bits(mine(x), layer(x))


def test_it_fits_on_a_page_and_stands_alone():
    source = PAGE.read_text()
    assert len(source.splitlines()) < 90
    imported = {node.names[0].name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import)}
    imported |= {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert imported == {"torch", "torch.nn.functional", "statistics"}
