"""A weight of more than 2**31 elements: quantised, decoded and multiplied, and looked at on both sides of the boundary.

An index that is a 32-bit number somewhere shows here and nowhere else. What lies around element 2**31 is compared with
the same rows worked on alone, where every index is small. A minute for the CPU backend, many for the reference, 12 GB
at the peak:

    pytest -m slow tests/core/test_large_weights.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import refq4
import refq4.functional as F
from refq4.internals.blockwise import slice_state
from refq4.testing import assert_same_bits, assert_within_budget

N, K = 32_740, 65_600  # 2**31 lies inside a row, which is no power of two: the 32,737th, at its 2,049th element
FIRST = 32_730  # of the rows that are compared
NEEDED = 14 << 30

pytestmark = [pytest.mark.slow, pytest.mark.reference_only("it names its backends itself")]


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if (reason := refq4.backend_info(request.param)["reason"]) is not None:
        pytest.skip(reason)
    if (free := available_memory()) < NEEDED:
        pytest.skip(f"it takes {NEEDED >> 30} GiB of free memory, {free >> 30} are there: run it on a larger machine")
    with refq4.use_backend(request.param):
        yield request.param


def available_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        pytest.skip("free memory is read from /proc/meminfo; run this on Linux")
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def test_both_sides_of_element_two_to_the_31_are_what_the_rows_alone_give(backend: str) -> None:
    assert FIRST * K < 2**31 < N * K
    weight, generator = torch.empty(N, K, dtype=torch.bfloat16), torch.Generator().manual_seed(31)
    for rows in weight.split(1024):
        rows.normal_(generator=generator)
    tail = weight[FIRST:].clone()
    packed, state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    del weight

    alone, alone_state = F.quantize_4bit(tail, quant_type="nf4")
    packed_tail = packed[FIRST * K // 2 :]
    assert_same_bits(packed_tail, alone, "packed bytes")

    tail_state = slice_state(state, FIRST * K, N * K)
    assert tail_state is not None
    assert tail_state.state2 is None, "it begins inside a nested block: its scales are decoded ones"
    off = (tail_state.absmax - alone_state.absmax).abs().max()
    assert off <= 0.02 * alone_state.absmax.max(), "scales, as far as 8 bits go"

    decoded = F.dequantize_4bit(packed, state)
    assert_same_bits(decoded[FIRST:], F.dequantize_4bit(packed_tail, tail_state), "decoded")
    del decoded

    for tokens in (1, 3):
        x = torch.randn(tokens, K, generator=generator).bfloat16()
        y = F.matmul_4bit(x, packed, state)
        assert_within_budget(y[:, FIRST:], x, packed_tail, tail_state)
    if backend == "cpu":  # the layer multiplies from the backend's own layout
        layer = refq4.nn.LinearNF4(K, N, bias=False, device="meta").eval()
        stats = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        layer.weight = refq4.nn.Params4bit.from_prequantized(packed, stats, module=layer)
        with torch.no_grad():
            y = layer(x)
        assert layer.weight.prepared
        assert_within_budget(y[:, FIRST:], x, packed_tail, tail_state)
