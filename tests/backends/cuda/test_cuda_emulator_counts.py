"""What a product costs beside its loop, counted in the emulator: prologue, table, and the sums' way out.

A multiprocessor of a smaller GPU that has a quarter of the rows does what one of an H200 does with 4096 x 4096.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("refq4_cuda", reason="the package refq4_cuda is not installed: pip install -e .")
import cuda_cases as cases
from refq4_cuda import emulator, launch
from refq4_cuda.arguments import ProductArguments
from refq4_cuda.operands import table_factor

from refq4.testing.budget import assert_same_bits

cases.require_nvrtc()
pytestmark = pytest.mark.reference_only("it names its kernels itself")

K = 4096
# tokens: at most so many instructions outside the loop for each one in it; the loop before sums went in fragment order
BARS = {16: (0.32, 9_895_936), 32: (0.45, 11_206_656), 64: (0.31, 18_055_168)}


@pytest.mark.parametrize("n", [512, pytest.param(1024, marks=pytest.mark.slow)], ids="N={}".format)
@pytest.mark.parametrize("m", BARS, ids="{} tokens".format)
def test_a_product_spends_its_instructions_in_the_loop(m: int, n: int) -> None:
    once, twice = (instructions(m, n, k) for k in (K, 2 * K))
    loop = twice - once
    share, longest = BARS[m]
    assert (once - loop) / loop <= share
    assert loop <= longest * n / 512


def instructions(m: int, n: int, k: int) -> int:
    """Of an H200's share of 4096 rows: K is split as it is there."""
    given = cases.operands(m, n, k, 64, "bfloat16")
    y = cases.poisoned((m, n), torch.bfloat16)
    weight, multiprocessors = given.state.packed_weight(given.packed), -(-132 * n // 4096)
    (one,) = launch.product(given.x, weight, None, y, 90, multiprocessors) or []
    assert one.grid[1] > 1
    return emulator.run(cases.ptx_of(one.variant, 90), one, checks=False).instructions


@pytest.mark.parametrize("m", [5, 16, 31, 64, 100], ids="{} tokens".format)
def test_the_last_cta_adds_the_others_sums_in_their_order_and_writes_each_where_it_belongs(m: int) -> None:
    n = 514  # five tiles of rows and a tail
    given = cases.operands(m, n, K, 64, "bfloat16", bias=True)
    y = cases.poisoned((m, n), torch.bfloat16)
    weight = given.state.packed_weight(given.packed)
    (one,) = launch.product(given.x, weight, given.bias, y, 90, 132) or []
    splits, macros = one.grid[1], dict(part.split("=") for part in one.variant.defines if "=" in part)
    assert splits >= 2
    cases.run([one], 90)
    row_warps = ProductArguments.from_buffer_copy(one.arguments).row_warps
    tokens, row_tiles = int(macros["TOKENS"]), int(macros["ROW_TILES"])
    partial, back = one.buffers[-3], 1 / table_factor("nf4", torch.bfloat16)
    # [group of rows, group of tokens, split, row warp, row tile, token tile, high, odd, g, t]
    groups = -(-m // tokens)
    shares = partial.view(-1, groups, splits, row_warps, row_tiles, tokens // 8, 2, 2, 8, 4)
    total = torch.zeros_like(shares[:, :, 0])
    for split in range(splits):
        total += shares[:, :, split]
    # rows: row group, row warp, row tile, high, g; tokens: token group, token tile, t, odd
    placed = total.permute(1, 4, 8, 6, 0, 2, 3, 5, 7).reshape(groups * tokens, -1)[:m, :n]
    assert given.bias is not None
    assert_same_bits(y, (placed * torch.tensor(back, dtype=torch.float32) + given.bias.float()).bfloat16())
