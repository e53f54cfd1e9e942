"""Products for each expert in one launch: which tiles are made, and what the kernels compute in the emulator."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("refq4_cuda", reason="the package refq4_cuda is not installed: pip install -e .")
import cuda_cases as cases
from refq4_cuda.experts import expert, grouped_product, tiles_of
from refq4_cuda.geometry import CROSS_OVER
from refq4_cuda.launch import Launch, all_variants

from refq4.backend import PackedWeight
from refq4.internals.grouped import grouped_gemm_4bit, one_expert
from refq4.state import QuantState
from refq4.testing.budget import assert_same_bits, grouped_budget
from refq4.trace import trace

cases.require_nvrtc()
pytestmark = pytest.mark.reference_only("it names its kernels itself")

# (0, 3, 3, 4, 20) is experts of 3, 0, 1 and 16 rows
FEW, ONE, MANY, GAPS = (0, 1, 2, 3, 4), (0, 0, 1, 1, 1), (0, 3, 3, 4, 20), (0, 0, 27, 30, 30)
# n, k, blocksize: of the last two, experts are a whole number of nested blocks of 256
SIZES = ((33, 128, 64), (7, 64, 32), (40, 192, 64), (5, 96, 32), (2, 65, 65), (64, 256, 64), (16, 1024, 64))
DESIGN = list(
    cases.covering(
        {
            "bounds": (MANY, FEW, ONE, GAPS),
            "size": SIZES,
            "arch": (80, 75, 90, 120),
            "dtype": ("bfloat16", "float16", "float32"),
            "nested": (False, True),
            "bias": (True, False),
            "transposed": (False, True),
            "code": ("nf4", "fp4", "int4"),
            "multiprocessors": (132, 4),
        }
    )
)


def sentence(row: dict[str, Any]) -> str:
    n, k, blocksize = row["size"]
    extras = f"{' nested' * row['nested']}{' with bias' * row['bias']} on {row['multiprocessors']} multiprocessors"
    of = ", ".join(str(stop - first) for first, stop in pairwise(row["bounds"]))
    stored = " stored [E, K, N]" * row["transposed"]
    what = f"rows {of} N={n} K={k}{stored}, {row['dtype']} {row['code']} in blocks of {blocksize}"
    return f"{what}, sm_{row['arch']}{extras}"


def of_experts(
    bounds: Sequence[int], n: int, k: int, blocksize: int, dtype: str, nested: bool = False, name: str = "nf4"
) -> tuple[Tensor, Tensor, QuantState, Tensor]:
    """x [T, K], the packed weight of [E, N, K] and its state, bias [E, N]."""
    count = len(bounds) - 1
    given = cases.operands(bounds[-1], count * n, k, blocksize, dtype, nested, bias=True, name=name)
    assert given.bias is not None
    state = given.state.copy()
    state.shape = torch.Size((count, n, k))
    return given.x, given.packed, state, given.bias.view(count, n)


def straddles(n: int, k: int, blocksize: int, nested: bool) -> bool:
    """Blocks would straddle experts: such a weight reaches no backend."""
    return bool(n * k % blocksize) or (nested and bool(n * k // blocksize % 256))


def compute(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    bounds: Sequence[int],
    arch: int,
    multiprocessors: int = 132,
    transposed: bool = False,
) -> tuple[Tensor, Launch]:
    """The product in the emulator, and its one launch."""
    y = cases.poisoned((x.shape[0], weight.shape[2 if transposed else 1]), x.dtype)
    how = {"transposed": transposed}
    (one,) = grouped_product(x, weight, bias, torch.tensor(bounds), y, arch, multiprocessors, **how) or []
    cases.run([one], arch)
    return y, one


def check(row: dict[str, Any]) -> None:
    n, k, blocksize = row["size"]
    nested = row["nested"] and not straddles(n, k, blocksize, True)
    x, packed, state, bias = of_experts(row["bounds"], n, k, blocksize, row["dtype"], nested, row["code"])
    added = bias if row["bias"] else None
    if row["transposed"]:  # the same bytes, read as [E, K, N]
        state.shape = torch.Size((state.shape[0], k, n))
    weight, where = state.packed_weight(packed), (row["arch"], row["multiprocessors"], row["transposed"])
    y, one = compute(x, weight, added, row["bounds"], *where)
    assert one.variant in all_variants(row["arch"])
    grouped_budget(x, packed, state, list(row["bounds"]), added, row["transposed"]).check(y, "grouped product")


@pytest.mark.parametrize("row", DESIGN[::4], ids=sentence)
def test_each_row_times_its_own_experts_weight_keeps_the_error_budget(row):
    check(row)


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for i, row in enumerate(DESIGN) if i % 4], ids=sentence)
def test_each_row_times_its_own_experts_weight_keeps_the_error_budget_swept(row):
    check(row)


@pytest.mark.parametrize("m", [1, 70], ids="{} rows for one expert, the other way round".format)
def test_a_split_product_of_experts_stored_as_k_n_adds_up_the_sums_of_each_tile_apart(m):
    bounds = [0, m, m, m + 2]
    x, packed, state, bias = of_experts(bounds, 48, 1032, 64, "bfloat16")
    state.shape = torch.Size((3, 1032, 48))
    y, one = compute(x, state.packed_weight(packed), bias, bounds, 90, transposed=True)
    assert one.grid == (1, 8, len(tiles_of(bounds, 8 if m == 1 else 64)))
    grouped_budget(x, packed, state, bounds, bias, transposed=True).check(y, "grouped product")


@pytest.mark.parametrize("m", [1, 70], ids="{} rows for one expert".format)
def test_a_split_product_of_experts_adds_up_the_sums_of_each_tile_apart(m):
    bounds = [0, m, m, m + 2]
    x, packed, state, bias = of_experts(bounds, 33, 4096, 64, "bfloat16")
    y, one = compute(x, state.packed_weight(packed), bias, bounds, 90)
    assert one.grid[1] > 1
    assert one.grid[2] == len(tiles_of(bounds, 8 if m == 1 else 32))
    grouped_budget(x, packed, state, bounds, bias).check(y, "grouped product")


def test_only_experts_with_rows_are_read():
    bounds = [0, 0, 5, 5]
    x, packed, state, bias = of_experts(bounds, 16, 128, 64, "bfloat16")
    wanted, _ = compute(x, state.packed_weight(packed), bias, bounds, 90)
    weight = state.packed_weight(packed.clone())
    weight.packed.view(3, -1)[[0, 2]] = 0xAA
    weight.absmax.view(3, -1)[[0, 2]] = float("nan")
    assert_same_bits(compute(x, weight, bias, bounds, 90)[0], wanted)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_one_expert_of_the_weight_is_the_cores(nested):
    _, packed, state, _ = of_experts(MANY, 64, 256, 64, "bfloat16", nested)
    weight = state.packed_weight(packed)
    for e in range(4):
        got, wanted = expert(weight, e), one_expert(weight, e)
        assert wanted is not None
        assert tuple(got.shape) == tuple(wanted.shape)
        assert_same_bits(got.packed, wanted.packed)
        assert_same_bits(got.absmax, wanted.absmax)
        assert got.nested is None if wanted.nested is None else torch.equal(got.nested.absmax, wanted.nested.absmax)


def test_tokens_are_multiplied_at_a_time_as_costs_least():
    for rows, tokens in ((1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (100, 32)):
        x, packed, state, _ = of_experts([0, rows, 2 * rows], 64, 128, 64, "bfloat16")
        weight = state.packed_weight(packed)
        (one,) = grouped_product(x, weight, None, torch.tensor([0, rows, 2 * rows]), x[:, :64], 90, 132) or []
        assert f"TOKENS={tokens}" in one.variant.defines


def test_above_the_cross_over_and_for_more_tiles_than_a_grid_has_the_weight_is_decoded():
    def planned(rows: int, experts: int, dtype: str) -> list[Launch] | None:
        x, packed, state, _ = of_experts([0, 1], 16, 64, 64, dtype)
        weight = state.packed_weight(packed)._replace(shape=(experts, 16, 64))
        offsets = torch.arange(experts + 1) * rows
        return grouped_product(x.expand(rows * experts, -1), weight, None, offsets, x, 90, 132)

    limit = CROSS_OVER["ring"]
    assert planned(limit, 2, "bfloat16") is not None
    assert planned(limit + 1, 2, "bfloat16") is None
    assert planned(CROSS_OVER["vectorised"] + 1, 2, "float32") is None
    assert planned(1, 65535, "bfloat16") is not None
    assert planned(1, 65536, "bfloat16") is None
    assert planned(0, 3, "bfloat16") == []


@pytest.mark.parametrize(
    ("rows", "kernel"), [(2, "gemm_4bit_4_ring"), (CROSS_OVER["ring"] + 1, "dequantize + torch.matmul")]
)
def test_the_backend_takes_both_ways_and_the_trace_says_which(rows, kernel):
    bounds = [0, rows, 2 * rows]
    x, packed, state, bias = of_experts(bounds, 16, 64, 64, "bfloat16")
    with trace() as t:
        y = grouped_gemm_4bit(x, packed, state, torch.tensor(bounds), bias, backend="cuda-emulator")
    grouped_budget(x, packed, state, bounds, bias).check(y, "grouped product")
    assert [op.kernel for op in t.ops] == [f"{kernel} for each expert"]
