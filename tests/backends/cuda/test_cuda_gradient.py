"""Products with the weight the other way round: which kernel serves them, and what it computes in the emulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("refq4_cuda", reason="the package refq4_cuda is not installed: pip install -e .")
import cuda_cases as cases
from refq4_cuda import launch
from refq4_cuda.geometry import ARCHITECTURES, Shape, choose, published
from refq4_cuda.gradient import CROSS_OVER, RUNGS, plan, refuses

from refq4.internals.dispatch import grad_input
from refq4.testing.budget import Budget, assert_same_bits
from refq4.trace import trace

cases.require_nvrtc()
pytestmark = pytest.mark.reference_only("it names its kernels itself")

# n (columns), k (rows, which are summed up), blocksize: what the tensor cores serve
ALIGNED = ((128, 64, 64), (16, 8, 16), (48, 200, 64), (144, 1032, 32), (272, 584, 128), (64, 4096, 64), (256, 72, 4096))
DESIGN = list(
    cases.covering(
        {
            "m": (1, 5, 8, 9, 33, 64, 70, 130),
            "size": (*ALIGNED, (1, 33, 64), (65, 7, 64), (130, 65, 48), (33, 100, 7)),
            "arch": (80, 75, 90, 120),
            "dtype": ("bfloat16", "float16", "float32"),
            "nested": (False, True),
            "code": ("nf4", "fp4", "int4"),
            "multiprocessors": (132, 4),
        }
    )
)


def sentence(row: dict[str, Any]) -> str:
    n, k, blocksize = row["size"]
    what = f"M={row['m']} N={n} K={k}, {row['dtype']} {row['code']} in blocks of {blocksize}{' nested' * row['nested']}"
    return f"{what}, sm_{row['arch']} on {row['multiprocessors']} multiprocessors"


def check(
    m: int,
    size: tuple[int, int, int],
    arch: int,
    dtype: str,
    nested: bool = False,
    code: str = "nf4",
    multiprocessors: int = 132,
    rung: str | None = None,
    seed: int | None = None,
) -> tuple[launch.Launch, torch.Tensor]:
    """The product within the error budget, by the best kernel at any M; what was launched, and the product."""
    n, k, blocksize = size
    packed, state = cases.quantised(k, n, blocksize, code, nested)
    weight, kind = state.packed_weight(packed), getattr(torch, dtype)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(kind)
    y = cases.poisoned((m, n), kind)
    shape = launch.shape_of(weight, kind, m, True, transposed=True)
    rung = choose(rung, RUNGS, refuses, shape, arch, published(arch))
    (one,) = launch.product(x, weight, None, y, arch, multiprocessors, rung, transposed=True) or []
    cases.run([one], arch, seed)
    decoded = cases.REFERENCE.dequantize_4bit(weight, torch.float32)
    Budget.of(x.double() @ decoded.double(), x @ decoded.to(kind), kind).check(y, "product")
    return one, y


@pytest.mark.parametrize("row", DESIGN[::6], ids=sentence)
def test_products_the_other_way_round_keep_the_error_budget(row):
    assert check(**row)[0].variant in launch.all_variants(row["arch"])


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for i, row in enumerate(DESIGN) if i % 6], ids=sentence)
def test_products_the_other_way_round_keep_the_error_budget_swept(row):
    assert check(**row)[0].variant in launch.all_variants(row["arch"])


@pytest.mark.parametrize("m", [1, 40], ids="{} tokens".format)
def test_where_columns_are_few_the_terms_of_a_sum_are_split_over_ctas(m):
    one, _ = check(m, (48, 4104, 64), 90, "bfloat16", nested=True)
    assert one.grid[:2] == (1, 8)


@pytest.mark.parametrize("rung", RUNGS)
def test_no_order_of_the_warps_changes_a_bit_of_the_gradient(rung):
    results = [check(33, (144, 200, 64), 80, "float16", rung=rung, seed=seed)[1] for seed in (None, 1, 2)]
    for y in results[1:]:
        assert_same_bits(y, results[0])


def test_rows_past_the_end_of_the_sum_add_nothing_whatever_is_stored():
    """The last step of 64 has 8 rows; with the last one infinite, 0 times it would be NaN."""
    packed, state = cases.quantised(72, 128, 128)
    weight = state.packed_weight(packed)
    weight = weight._replace(absmax=weight.absmax.index_fill(0, torch.tensor([71]), float("inf")))
    x, y = torch.ones(4, 72).bfloat16(), cases.poisoned((4, 128), torch.bfloat16)
    cases.run(launch.product(x, weight, None, y, 80, 132, transposed=True) or [], 80)
    wanted = x @ cases.REFERENCE.dequantize_4bit(weight, torch.bfloat16)
    assert wanted.isinf().any()
    cases.assert_same_numbers(y, wanted)


def shape(m: int = 1, n: int = 4096, k: int = 4096, dtype: str = "BF16", blocksize: int = 64, nested: int = 0) -> Shape:
    return Shape(dtype, m, n, k, blocksize, nested, aligned=True)


@pytest.mark.parametrize(
    ("wanted", "arch", "kernel"),
    [
        (shape(), 90, "transposed_tensor_core"),
        (shape(nested=256), 120, "transposed_tensor_core"),
        (shape(m=CROSS_OVER["tensor_core"]), 90, "transposed_tensor_core"),
        (shape(m=CROSS_OVER["tensor_core"] + 1), 90, None),
        (shape(dtype="FP16"), 75, "transposed_tensor_core"),
        (shape(), 75, "transposed_tiled"),
        (shape(dtype="FP32", m=CROSS_OVER["tiled"]), 90, "transposed_tiled"),
        (shape(dtype="FP32", m=CROSS_OVER["tiled"] + 1), 90, None),
        (shape(n=4104), 90, "transposed_tiled"),
        (shape(k=4100), 90, "transposed_tiled"),
        (shape(k=1 << 26), 90, "transposed_tiled"),
        (shape(blocksize=48), 90, "transposed_tiled"),
        (shape(nested=3), 90, "transposed_tiled"),
        (shape()._replace(aligned=False), 90, "transposed_tiled"),
    ],
    ids=str,
)
def test_the_upper_kernel_that_serves_a_shape_is_taken(wanted: Shape, arch: int, kernel: str | None) -> None:
    made = plan(wanted, arch, 132)
    assert (made and made.variant.entry) == kernel


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_plan_covers_all_columns_and_tokens_with_a_kernel_that_is_compiled(arch: int) -> None:
    for rung in RUNGS:
        for m in (1, 9, 33, 128, 500):
            for n in (16, 4096, 11008):
                made = plan(shape(m, n, 512, "FP16"), arch, 132, rung)
                assert made is not None
                assert made.variant in launch.all_variants(arch)
                tokens = int(made.variant.defines[0].removeprefix("TOKENS="))
                columns, ctas = (64, made.grid[0] * made.grid[1]) if rung == "tiled" else (128, made.grid[0])
                assert columns * tokens * ctas >= m * n
                assert made.splits <= 512 // 64


def test_a_rung_that_does_not_serve_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="no rung is called 'ring'; there are tensor_core, tiled"):
        plan(shape(), 90, 132, "ring")
    with pytest.raises(ValueError, match=r"'tensor_core' does not serve .* needs N to be a multiple of 16 and K of 8"):
        plan(shape(n=40), 90, 132, "tensor_core")


@pytest.mark.parametrize(
    ("m", "kernel"), [(3, "grad_input_4bit_2_tensor_core"), (193, "dequantize + torch.matmul")], ids=str
)
def test_the_backend_takes_both_ways_to_the_gradient_and_the_trace_says_which(m: int, kernel: str) -> None:
    packed, state = cases.quantised(24, 64, 64)
    grad = torch.randn(m, 24, generator=torch.Generator().manual_seed(m)).bfloat16()
    with trace() as t:
        got = grad_input(grad, state.packed_weight(packed), "cuda-emulator")
    assert [op.kernel for op in t.ops][:1] == [kernel]
    decoded = cases.REFERENCE.dequantize_4bit(state.packed_weight(packed), torch.float32)
    exact = grad.double() @ decoded.double()
    Budget.of(exact, grad @ decoded.bfloat16(), torch.bfloat16).check(got, "gradient")
