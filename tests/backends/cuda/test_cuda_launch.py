"""Which kernel serves which product, how it is cut up, and what its rounded table holds: planning, without running."""

from __future__ import annotations

import gc
import weakref
from itertools import product

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("refq4_cuda", reason="the package refq4_cuda is not installed: pip install -e .")
from refq4_cuda import launch, operands
from refq4_cuda.bindings import CudaError, nvrtc_bindings
from refq4_cuda.geometry import ARCHITECTURES, CROSS_OVER, RUNGS, Limits, Shape, Variant, plan, published

from refq4 import layout
from refq4.backend import Nested, PackedWeight
from refq4.codebooks import codebook_names, get_codebook
from refq4.layout import block_count, packed_bytes
from refq4.reference import ReferenceBackend

pytestmark = pytest.mark.reference_only("it plans launches and runs none")

H200 = 132
# Kilobytes that a CTA may have, of the CUDA C++ Programming Guide; written down here a second time.
SHARED_MEMORY = {
    75: 64, 80: 163, 86: 99, 87: 163, 88: 99, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99,
}  # fmt: skip


def shape(m: int = 1, n: int = 4096, k: int = 4096, dtype: str = "BF16", blocksize: int = 64, nested: int = 0) -> Shape:
    return Shape(dtype, m, n, k, blocksize, nested, aligned=True)


def served_by(wanted: Shape, arch: int = 90, limits: Limits | None = None) -> str:
    made = plan(wanted, arch, H200, limits=limits)
    return made.variant.entry if made else "torch"


def tokens_of(variant: Variant) -> int:
    return next((int(d.removeprefix("TOKENS=")) for d in variant.defines if d.startswith("TOKENS=")), 1)


def row_tiles_of(variant: Variant) -> int:
    return next(int(d.removeprefix("ROW_TILES=")) for d in variant.defines if d.startswith("ROW_TILES="))


@pytest.mark.parametrize(
    ("wanted", "arch", "kernel"),
    [
        (shape(), 90, "gemm_ring"),
        (shape(m=256), 90, "gemm_ring"),
        (shape(m=257), 90, "torch"),
        (shape(m=129), 100, "torch"),
        (shape(m=512), 80, "gemm_ring"),
        (shape(m=513), 80, "torch"),
        (shape(nested=256), 120, "gemm_ring"),
        (shape(nested=3), 90, "gemv_naive"),
        (shape(blocksize=32), 90, "gemm_tensor_core"),
        (shape(blocksize=100, k=4000), 90, "gemv_naive"),
        (shape(k=96), 90, "gemv_naive"),
        (shape(k=96, blocksize=32), 90, "gemm_tensor_core"),
        (shape(k=4095), 90, "gemv_naive"),
        (shape(m=17, k=4095), 90, "torch"),
        (shape(dtype="FP32"), 90, "gemv_vectorised"),
        (shape(dtype="FP32", m=17), 90, "torch"),
        (shape(dtype="BF16"), 75, "gemv_vectorised"),
        (shape(dtype="FP16"), 75, "gemm_tensor_core"),
        (shape(k=1 << 26, n=8), 90, "gemm_tensor_core"),
    ],
    ids=str,
)
def test_the_uppermost_kernel_that_serves_a_shape_is_taken(wanted: Shape, arch: int, kernel: str) -> None:
    assert served_by(wanted, arch) == kernel


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rung", RUNGS)
def test_a_plan_covers_all_rows_and_tokens_with_a_kernel_that_is_compiled(arch: int, rung: str) -> None:
    if rung == "ring" and arch < 80:
        with pytest.raises(ValueError, match=r"needs cp\.async, which sm_75 lacks"):
            plan(shape(dtype="FP16"), arch, H200, rung)
        return
    for m, n in product((1, 3, 8, 9, 33, 128, 129), (1, 33, 4096, 28672)):
        made = plan(shape(m, n, 8192, "FP16"), arch, H200, rung)
        assert made is not None
        assert made.variant in launch.all_variants(arch)
        groups = -(-m // tokens_of(made.variant))
        if rung == "ring":  # token groups of one tile of rows stand side by side along x
            assert made.grid[0] % groups == 0
            assert made.grid[0] // groups * made.row_warps * 16 * row_tiles_of(made.variant) >= n
        else:
            assert made.grid[0] * (16 if rung == "tensor_core" else 8) >= n
            assert made.grid[1] >= groups
        assert made.shared <= SHARED_MEMORY[arch] << 10


def test_every_architecture_that_the_compiler_knows_is_planned_for() -> None:
    try:
        known = nvrtc_bindings().nvrtcGetSupportedArchs()[1]
    except CudaError as error:
        pytest.skip(str(error))
    assert set(known) <= set(ARCHITECTURES)
    assert {arch: published(arch).cta for arch in ARCHITECTURES} == {a: kb << 10 for a, kb in SHARED_MEMORY.items()}


@pytest.mark.parametrize("m", [1, 16, 32, 64, 128])
@pytest.mark.parametrize("kilobytes", [227, 163, 99, 68, 67, 48, 31])
def test_a_plan_asks_for_no_more_than_the_device_tells_whatever_its_architecture(kilobytes: int, m: int) -> None:
    limits = Limits(kilobytes << 10, (kilobytes + 1) << 10)
    made = plan(shape(m), 90, H200, None, limits)
    if kilobytes < 32:
        assert made is None if m > 16 else made is not None
        assert made is None or made.variant.entry == "gemv_vectorised"
        return
    assert made is not None
    assert made.shared <= limits.cta
    assert made.variant.entry == ("gemm_ring" if kilobytes >= 68 else "gemm_tensor_core")
    if kilobytes < 68:
        with pytest.raises(
            ValueError, match=r"'ring' does not .* needs 69632 bytes of shared memory in a CTA, and the"
        ):
            plan(shape(m), 90, H200, "ring", limits)
    few = limits._replace(registers=32768)
    with pytest.raises(ValueError, match="needs 65536 registers in a CTA, and the device has 32768"):
        plan(shape(m), 90, H200, "ring", few)
    assert served_by(shape(m), limits=few) == "gemm_tensor_core"


def test_k_is_split_where_rows_alone_would_leave_multiprocessors_idle() -> None:
    few, many = plan(shape(n=2048, k=8192), 90, H200), plan(shape(n=28672, k=8192), 90, H200)
    assert few is not None
    assert many is not None
    assert few.splits > 1
    assert few.grid[0] * few.splits >= 0.75 * H200
    assert few.sums == few.grid[0] * few.splits * few.row_warps * 32 * 8
    assert many.splits == 1
    assert many.sums == 0


def test_split_or_not_every_warp_has_something_to_do() -> None:
    for k in (64, 128, 512, 4096, 16384):
        for m in (1, 8, 16, 32, 64):
            made = plan(shape(m=m, n=256, k=k), 90, H200)
            assert made is not None
            if made.splits > 1:
                step = 64 * 4 // row_tiles_of(made.variant)
                assert k >= made.splits * 8 // made.row_warps * step


@pytest.mark.parametrize("m", [1, 3, 8, 16, 32, 64])
@pytest.mark.parametrize("multiprocessors", [108, H200, 148])
def test_a_small_weight_is_cut_up_until_three_quarters_of_the_multiprocessors_have_work(multiprocessors, m) -> None:
    made = plan(shape(m=m, n=1024), 90, multiprocessors)
    assert made is not None
    assert made.grid[0] * made.splits >= 0.75 * multiprocessors


def test_an_unknown_rung_and_one_that_does_not_serve_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="no rung is called 'best'; there are ring, tensor_core, vectorised, naive"):
        plan(shape(), 90, H200, "best")
    with pytest.raises(ValueError, match="'ring' does not serve this product: it needs blocks of 64 or more, not 32"):
        plan(shape(blocksize=32), 90, H200, "ring")
    with pytest.raises(ValueError, match="has no tensor cores for FP32 on sm_90"):
        plan(shape(dtype="FP32"), 90, H200, "tensor_core")


def test_every_rung_has_a_cross_over() -> None:
    assert set(CROSS_OVER) == set(RUNGS)


# --- from tensors to launches ---------------------------------------------------------------------------------------


def weight(n: int, k: int, blocksize: int = 64, nested: bool = False) -> PackedWeight:
    blocks = block_count(n * k, blocksize)
    level = Nested(torch.ones(block_count(blocks, 256)), torch.ones(256), torch.tensor(0.0), 256) if nested else None
    absmax = torch.zeros(blocks, dtype=torch.uint8) if nested else torch.ones(blocks)
    packed = torch.zeros(packed_bytes(n * k), dtype=torch.uint8)
    return PackedWeight(packed, absmax, get_codebook("nf4").on("cpu").values, blocksize, (n, k), "nf4", level)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_every_address_in_the_arguments_belongs_to_a_buffer(nested: bool) -> None:
    x, bias, y = torch.zeros(3, 512, dtype=torch.bfloat16), torch.zeros(40).bfloat16(), torch.zeros(3, 40).bfloat16()
    (made,) = launch.product(x, weight(40, 512, nested=nested), bias, y, 90, H200) or []
    addresses = {t.data_ptr() for t in made.buffers}
    words = {int.from_bytes(made.arguments[i : i + 8], "little") for i in range(0, len(made.arguments), 8)}
    assert addresses <= words
    assert {x.data_ptr(), bias.data_ptr(), y.data_ptr()} <= addresses


def test_a_view_that_begins_at_an_odd_address_goes_to_the_kernel_that_does_not_mind() -> None:
    x, y = torch.zeros(1, 513, dtype=torch.bfloat16)[:, 1:], torch.zeros(1, 40).bfloat16()
    (made,) = launch.product(x, weight(40, 512), None, y, 90, H200) or []
    assert made.variant.entry == "gemv_naive"


def test_nothing_is_launched_for_nothing() -> None:
    none = torch.zeros(0, 512).bfloat16()
    assert launch.product(none, weight(40, 512), None, torch.zeros(0, 40).bfloat16(), 90, H200) == []
    code = get_codebook("nf4").on("cpu")
    assert launch.quantize(torch.zeros(0), code, 64, True, torch.zeros(0).byte(), torch.zeros(0), 90) == []
    assert launch.dequantize_4bit(weight(0, 64), torch.zeros(0), 90) == []


# --- the rounded code, and what a launch leaves behind ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", codebook_names())
def test_the_code_rounded_at_its_factor_errs_no_more_than_rounding_the_code_itself(
    name: str, dtype: torch.dtype
) -> None:
    code, factor = get_codebook(name).on("cpu").values, operands.table_factor(name, dtype)
    assert 1 <= factor < 2
    rounded = (code * factor).to(dtype).double() / factor
    error = (rounded - code.double()).square().sum()
    plain = (code.to(dtype).double() - code.double()).square().sum()
    assert float(error) <= float(plain) + 1e-12
    if name in ("fp4", "e2m1", "int4"):
        assert float(error) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", codebook_names())
def test_what_rounding_the_code_costs_cancels_over_the_codes_of_a_normal_weight(name: str, dtype: torch.dtype) -> None:
    """Or it would add up where activations are all positive: with the smallest errors alone it is 1.3e-4 for NF4."""
    code, factor = get_codebook(name).on("cpu"), operands.table_factor(name, dtype)
    W = torch.randn(1024, 64, generator=torch.Generator().manual_seed(0))
    packed, _ = ReferenceBackend().quantize_4bit(W, code, 64)
    codes = layout.unpack(packed, W.numel()).long()
    error = (code.values * factor).to(dtype).double() / factor - code.values.double()
    assert abs(float(error[codes].mean())) < 5e-5


def test_a_code_of_no_registered_name_is_rounded_as_it_is() -> None:
    assert operands.table_factor("one of my own", torch.bfloat16) == 1.0


class Allocator(TorchDispatchMode):
    """Lists what was allocated while it is on: as the pool of a CUDA graph does, which needs all of it back."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.made += [weakref.ref(t) for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        return out

    def alive(self) -> int:
        gc.collect()
        return sum(ref() is not None for ref in self.made)


@pytest.mark.parametrize("m", [1, 8, 64])
def test_of_what_a_launch_allocates_nothing_is_kept(m: int) -> None:
    made = weight(512, 4096)._replace(code=get_codebook("nf4").on("cpu").values.clone())
    x, y = torch.zeros(m, 4096).bfloat16(), torch.zeros(m, 512).bfloat16()
    with Allocator() as allocator:
        launches = launch.product(x, made, None, y, 90, H200) or []
        again = launch.product(x, made, None, y, 90, H200) or []
        assert allocator.made, "K is split, so there is room for sums"
        rooms = [
            {t.data_ptr() for t in one.buffers} - {t.data_ptr() for t in (x, y, *made[:3])} for one in launches + again
        ]
        assert not rooms[0] & rooms[1], "two launches may run at the same time, on two streams or in two graphs"
        del launches, again
        assert allocator.alive() == 0
