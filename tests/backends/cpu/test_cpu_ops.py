"""The CPU backend against the reference, tier by tier: bit for bit where that is promised, within the budget elsewhere.

The budget (refq4's rule for products): measured against an fp64 oracle made from the dequantised weight, a backend
may err by at most twice what the reference errs in the same dtypes, plus one unit in the last place of the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from refq4.backend import BackendUnsupportedError, Call, Nested, PackedWeight
from refq4.codebooks import Code, code_from_values, codebook_names, create_dynamic_map, get_codebook
from refq4.reference import ReferenceBackend

pytest.importorskip("refq4_cpu", reason="the package refq4_cpu is not installed")
import cpu_tiers
from refq4_cpu import CpuBackend, build
from refq4_cpu.kernels import PRODUCT_KERNELS, TILES, ProductKernel, grad_input_kernel

REFERENCE = ReferenceBackend()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
if (reason := CpuBackend().available()) is not None:
    pytest.skip(f"the CPU backend is not available: {reason}", allow_module_level=True)


@pytest.fixture(params=cpu_tiers.TIERS)
def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CpuBackend:
    return backend_of(request.param, request, monkeypatch)


def backend_of(tier: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CpuBackend:
    """A backend that computes on that tier, emulated where the processor lacks it."""
    as_here = cpu_tiers.require(tier, request)
    for name, value in cpu_tiers.environment(tier).items():
        monkeypatch.setenv(name, value)
    backend = CpuBackend()
    assert backend.library().tier == as_here
    return backend


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit for bit, except that any NaN equals any other."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert torch.equal(got.isnan(), expected.isnan())
    integer = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[got.element_size()]
    there = ~expected.isnan()
    assert torch.equal(got[there].view(integer), expected[there].view(integer))


def random_weight(
    n: int, k: int, blocksize: int = 64, name: str = "nf4", nested: bool = False, seed: int = 0
) -> PackedWeight:
    W = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05
    code = get_codebook(name).on("cpu")
    packed, absmax = REFERENCE.quantize_4bit(W, code, blocksize)
    weight = PackedWeight(packed, absmax, code.values, blocksize, (n, k), name)
    if not nested:
        return weight
    offset, dynamic = absmax.mean(), code_from_values(create_dynamic_map())
    q, absmax2 = REFERENCE.quantize_blockwise(absmax - offset, dynamic, 256)
    return weight._replace(absmax=q, nested=Nested(absmax2, dynamic.values, offset, 256))


@dataclass(frozen=True)
class Budget:
    """See the head of this file."""

    exact: torch.Tensor
    allowed: torch.Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> Budget:
        exact = x.double() @ REFERENCE.dequantize_4bit(weight, torch.float32).double().T
        if bias is not None:
            exact = exact + bias.double()
        allowed = 2 * (REFERENCE.gemm_4bit(x, weight, bias).double() - exact).abs().max()
        return cls(exact, allowed + torch.finfo(x.dtype).eps * exact.abs().max(), x.dtype)

    def check(self, y: torch.Tensor) -> None:
        """Fails closed: a NaN on either side fails."""
        error = (y.double() - self.exact).abs().max()
        assert y.dtype == self.dtype
        assert y.shape == self.exact.shape
        assert error <= self.allowed, f"error {error:.3e}, allowed {self.allowed:.3e}"


def assert_within_budget(y: torch.Tensor, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> None:
    Budget.of(x, weight, bias).check(y)


# --- bit for bit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", codebook_names())
def test_every_codebook_quantises_and_dequantises_to_the_references_bits(
    cpu: CpuBackend, name: str, dtype: torch.dtype
) -> None:
    code = get_codebook(name).on("cpu")
    A = (torch.randn(37, 161, generator=torch.Generator().manual_seed(1)) * 0.1).to(dtype)
    packed, absmax = cpu.quantize_4bit(A, code, 64)
    expected = REFERENCE.quantize_4bit(A, code, 64)
    assert torch.equal(packed, expected[0])
    assert_same_bits(absmax, expected[1])
    weight = PackedWeight(packed, absmax, code.values, 64, tuple(A.shape), name)
    for out in DTYPES:
        assert_same_bits(cpu.dequantize_4bit(weight, out), REFERENCE.dequantize_4bit(weight, out))


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 1024, 4096, 48, 7])
@pytest.mark.parametrize("numel", [1, 2, 31, 33, 64, 4097, 20_001])
def test_tails_and_odd_lengths_match_bit_for_bit(cpu: CpuBackend, blocksize: int, numel: int) -> None:
    A = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    code = get_codebook("fp4").on("cpu")
    packed, absmax = cpu.quantize_4bit(A, code, blocksize)
    expected = REFERENCE.quantize_4bit(A, code, blocksize)
    assert torch.equal(packed, expected[0])
    assert_same_bits(absmax, expected[1])
    weight = PackedWeight(packed, absmax, code.values, blocksize, (numel,), "fp4")
    for out in DTYPES:
        assert_same_bits(cpu.dequantize_4bit(weight, out), REFERENCE.dequantize_4bit(weight, out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("numel", "blocksize"), [(4096, 64), (1000, 32), (333, 48), (65, 7)])
def test_scales_that_are_given_are_taken_and_returned(
    cpu: CpuBackend, numel: int, blocksize: int, dtype: torch.dtype
) -> None:
    A, code = torch.randn(numel).to(dtype), get_codebook("nf4").on("cpu")
    _, measured = REFERENCE.quantize_4bit(A, code, blocksize)
    given = measured * torch.linspace(0.5, 1.5, measured.numel())
    given[0] = 0
    packed, absmax = cpu.quantize_4bit(A, code, blocksize, given)
    wanted, _ = REFERENCE.quantize_4bit(A, code, blocksize, given)
    assert_same_bits(packed, wanted)
    assert_same_bits(absmax, given)
    assert not torch.equal(packed, REFERENCE.quantize_4bit(A, code, blocksize)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_subnormals_infinities_and_nans_match_bit_for_bit(cpu: CpuBackend, dtype: torch.dtype) -> None:
    rows = [torch.full((64,), v) for v in (0.0, -0.0, 1e-45, 3e-39, 1e-38, 6e-8, float("inf"), float("nan"), 3e38)]
    mixed = torch.linspace(-1, 1, 64)
    specials = []
    for v in (float("nan"), float("inf"), float("-inf"), 1e-42):
        row = mixed.clone()
        row[17] = v
        specials.append(row)
    A = torch.stack([*rows, *specials, mixed * 1e-40, mixed * 1e-38, mixed]).to(dtype)
    for name in ("nf4", "fp4"):
        code = get_codebook(name).on("cpu")
        packed, absmax = cpu.quantize_4bit(A, code, 64)
        expected = REFERENCE.quantize_4bit(A, code, 64)
        assert_same_bits(absmax, expected[1])
        assert torch.equal(packed, expected[0])
        weight = PackedWeight(packed, absmax, code.values, 64, tuple(A.shape), name)
        for out in DTYPES:
            assert_same_bits(cpu.dequantize_4bit(weight, out), REFERENCE.dequantize_4bit(weight, out))


def test_values_at_and_beside_every_threshold_fall_on_the_references_side(cpu: CpuBackend) -> None:
    for name in codebook_names():
        code = get_codebook(name).on("cpu")
        t = code.thresholds
        near = torch.cat([t, torch.nextafter(t, t + 1), torch.nextafter(t, t - 1), torch.tensor([0.0, -0.0, 1.0])])
        A = torch.cat([near, torch.ones(64 - near.numel() % 64)])
        assert torch.equal(cpu.quantize_4bit(A, code, 64)[0], REFERENCE.quantize_4bit(A, code, 64)[0]), name


def test_eight_bit_values_at_and_beside_every_threshold_fall_on_the_references_side(cpu: CpuBackend) -> None:
    code = code_from_values(create_dynamic_map())
    for c in (code, Code(code.values[:100], code.thresholds[:99], code.order[:100])):
        t = c.thresholds
        near = torch.cat([t, torch.nextafter(t, t + 1), torch.nextafter(t, t - 1)])
        rows = torch.cat([near, torch.zeros(-near.numel() % 63)]).view(-1, 63)
        A = torch.cat([rows, torch.ones(rows.shape[0], 1)], dim=1)  # a 1 in each block of 64: nothing is scaled
        assert torch.equal(cpu.quantize_blockwise(A, c, 64)[0], REFERENCE.quantize_blockwise(A, c, 64)[0])


@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_the_eight_bit_stage_matches_bit_for_bit(cpu: CpuBackend, blocksize: int) -> None:
    code = code_from_values(create_dynamic_map())
    short = Code(code.values[:100], code.thresholds[:99], code.order[:100])
    A = torch.randn(3, 1111, generator=torch.Generator().manual_seed(2))
    for c in (code, short):
        got, expected = cpu.quantize_blockwise(A, c, blocksize), REFERENCE.quantize_blockwise(A, c, blocksize)
        assert torch.equal(got[0], expected[0])
        assert_same_bits(got[1], expected[1])
    q, absmax = REFERENCE.quantize_blockwise(A, code, blocksize)
    for out in DTYPES:
        assert_same_bits(
            cpu.dequantize_blockwise(q, absmax, code.values, blocksize, out),
            REFERENCE.dequantize_blockwise(q, absmax, code.values, blocksize, out),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_doubly_quantised_weight_dequantises_to_the_references_bits(cpu: CpuBackend, dtype: torch.dtype) -> None:
    weight = random_weight(67, 192, nested=True)
    assert_same_bits(cpu.dequantize_4bit(weight, dtype), REFERENCE.dequantize_4bit(weight, dtype))


def test_large_results_written_past_the_caches_match_bit_for_bit(cpu: CpuBackend) -> None:
    weight = random_weight(1500, 2048)
    for dtype in DTYPES:
        assert_same_bits(cpu.dequantize_4bit(weight, dtype), REFERENCE.dequantize_4bit(weight, dtype))


def test_every_bf16_and_fp16_number_is_read_as_the_reference_reads_it(cpu: CpuBackend) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    code = get_codebook("nf4").on("cpu")
    for dtype in (torch.bfloat16, torch.float16):
        A = bits.view(dtype)
        got, expected = cpu.quantize_4bit(A, code, 32), REFERENCE.quantize_4bit(A, code, 32)
        assert torch.equal(got[0], expected[0])
        assert_same_bits(got[1], expected[1])


# --- the tile layout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize(("n", "k", "blocksize"), [(16, 64, 64), (33, 128, 32), (7, 4096, 4096), (130, 512, 256)])
def test_tiles_restore_to_the_same_bytes(cpu: CpuBackend, n: int, k: int, blocksize: int, nested: bool) -> None:
    weight = random_weight(n, k, blocksize, nested=nested)
    prepared = cpu.prepare_weight(weight)
    if cpu.library().tier.name == "c":
        assert prepared is None
        return
    assert prepared is not None
    back = cpu.restore_weight(prepared)
    assert torch.equal(back.packed, weight.packed)
    assert torch.equal(back.absmax, weight.absmax)
    assert back._replace(packed=weight.packed, absmax=weight.absmax, nested=None) == weight._replace(nested=None)
    if nested:
        assert back.nested is not None
        assert weight.nested is not None
        assert back.nested.blocksize == weight.nested.blocksize
        assert all(a is b for a, b in zip(back.nested[:3], weight.nested[:3], strict=True))


@pytest.mark.parametrize(("n", "k", "blocksize"), [(16, 96, 64), (16, 65, 32), (16, 48, 48)])
def test_rows_that_blocks_straddle_stay_canonical(cpu: CpuBackend, n: int, k: int, blocksize: int) -> None:
    assert cpu.prepare_weight(random_weight(n, k, blocksize)) is None


# --- products -----------------------------------------------------------------------------------------------------

SHAPES = [(64, 64, 64), (100, 128, 32), (33, 256, 256), (129, 1024, 64), (5, 4096, 4096), (1, 32, 32), (17, 8192, 128)]
SHAPES += [(1040, 64, 64)]  # so narrow that an item of work holds more panels than the widest kernel takes at once


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize(("n", "k", "blocksize"), SHAPES)
def test_products_keep_the_error_budget(
    cpu: CpuBackend, n: int, k: int, blocksize: int, nested: bool, dtype: torch.dtype
) -> None:
    weight, bias, products = products_of(n, k, blocksize, nested, dtype)
    prepared = cpu.prepare_weight(weight)
    for x, with_bias, without in products:
        op = cpu.gemv_4bit if len(x) == 1 else cpu.gemm_4bit
        with_bias.check(op(x, weight, bias))
        without.check(op(x, weight, None))
        if prepared is not None:
            with_bias.check(op(x, prepared, bias))


@cache  # what the tiers are held to is the same for all, and takes longer than most of them
def products_of(
    n: int, k: int, blocksize: int, nested: bool, dtype: torch.dtype
) -> tuple[PackedWeight, torch.Tensor, list[tuple[torch.Tensor, Budget, Budget]]]:
    """A weight, a bias, and for several numbers of tokens x with its budgets, with the bias and without."""
    weight = random_weight(n, k, blocksize, nested=nested)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    products = []
    for m in (1, 2, 3, 5, 8, 9, 31):
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        products.append((x, Budget.of(x, weight, bias), Budget.of(x, weight, None)))
    return weight, bias, products


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k", "blocksize"), [(7, 77, 64), (16, 96, 64), (3, 1, 32), (9, 131, 4096), (6, 100, 48)])
def test_blocks_that_straddle_rows_and_odd_rows_keep_the_error_budget(
    cpu: CpuBackend, n: int, k: int, blocksize: int, dtype: torch.dtype
) -> None:
    for nested in (False, True):
        weight = random_weight(n, k, blocksize, nested=nested)
        for m in (1, 4):
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
            assert_within_budget(cpu.gemm_4bit(x, weight, None), x, weight, None)


@pytest.mark.parametrize("name", codebook_names())
def test_every_codebook_multiplies_within_the_budget(cpu: CpuBackend, name: str) -> None:
    weight = random_weight(48, 256, name=name)
    for dtype in DTYPES:
        for m in (1, 6):
            x = torch.randn(m, 256, generator=torch.Generator().manual_seed(m)).to(dtype)
            for w in (weight, cpu.prepare_weight(weight)):
                if w is not None:
                    assert_within_budget(cpu.gemm_4bit(x, w, None), x, weight, None)


def tier_with(kernel: ProductKernel) -> str:
    """The smallest tier that has the kernel."""
    return min(
        (name for name in build.TIERS if kernel.feature in build.TIERS[name]), key=lambda name: len(build.TIERS[name])
    )


@pytest.mark.parametrize("kernel", PRODUCT_KERNELS, ids=lambda kernel: kernel.name)
def test_every_rung_serves_when_it_is_named_and_keeps_the_budget(
    kernel: ProductKernel, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = kernel.name
    monkeypatch.setenv("REFQ4_CPU_KERNEL", name)
    backend, weight, ran = backend_of(tier_with(kernel), request, monkeypatch), random_weight(80, 512), 0
    for dtype in DTYPES:
        for m in (1, 7, 200):  # the last is more than one chunk of tokens
            call = Call("gemm_4bit", "cpu", dtype, m, 80, 512, 64, "nf4")
            x = torch.randn(m, 512, generator=torch.Generator().manual_seed(m)).to(dtype)
            if (reason := backend.can_run(call)) is not None:
                assert name in reason
                with pytest.raises(BackendUnsupportedError, match=name):
                    backend.gemm_4bit(x, weight, None)
                continue
            assert backend.kernel(call).removesuffix(" (emulated)") == name
            assert_within_budget(backend.gemm_4bit(x, weight, None), x, weight, None)
            ran += 1
    assert ran > 0


def test_a_kernel_of_one_token_serves_experts_of_one_row_and_is_refused_for_more(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = next(kernel for kernel in PRODUCT_KERNELS if kernel.most_tokens == 1)
    monkeypatch.setenv("REFQ4_CPU_KERNEL", kernel.name)
    backend, weight = backend_of(tier_with(kernel), request, monkeypatch), random_weight(48, 512)
    experts, x = weight._replace(shape=(3, 16, 512)), torch.randn(2, 512).to(torch.bfloat16)
    y = backend.grouped_gemm_4bit(x, experts, None, torch.tensor([0, 1, 1, 2]), False)
    whole = torch.cat([backend.gemv_4bit(row[None], weight, None) for row in x])
    assert torch.equal(y, torch.stack([whole[0, :16], whole[1, 32:]]))
    with pytest.raises(BackendUnsupportedError, match=f"{kernel.name} takes at most 1 token\\(s\\), not 2"):
        backend.grouped_gemm_4bit(x, experts, None, torch.tensor([0, 0, 2, 2]), False)


@pytest.mark.parametrize("kernel", PRODUCT_KERNELS, ids=lambda kernel: kernel.name)
def test_one_kernel_gives_a_token_the_same_bits_alone_and_in_a_batch(
    kernel: ProductKernel, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which kernel serves which M is calibrated, so the promise is each kernel's."""
    monkeypatch.setenv("REFQ4_CPU_KERNEL", kernel.name)
    backend, weight = backend_of(tier_with(kernel), request, monkeypatch), random_weight(100, 1024)
    features = backend.library().tier.features
    tiles = backend.prepare_weight(weight)
    for dtype in DTYPES:
        x = torch.randn(15, 1024).to(dtype)  # no kernel but those of one token takes fewer
        for w, layout in ((weight, "canonical"), (tiles, TILES)):
            if w is None or kernel.refuses(features, dtype, len(x), 1024, 64, layout) is not None:
                continue
            together = backend.gemm_4bit(x, w, None)
            assert torch.equal(torch.cat([backend.gemm_4bit(row[None], w, None) for row in x]), together)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_input_is_multiplied_chunk_by_chunk_with_the_same_bits(cpu: CpuBackend, dtype: torch.dtype) -> None:
    n, k, m = 16, 8192, 260  # two chunks of 130 tokens: a copy of 256 tokens' x has 8 MB
    weight, bias = random_weight(n, k), torch.randn(n).to(dtype)
    x, grad = torch.randn(m, k).to(dtype), torch.randn(m, k).to(dtype)
    for w, layout in ((weight, "canonical"), (cpu.prepare_weight(weight), TILES)):
        if w is not None:
            kernel = cpu._kernel_for(dtype, m, k, 64, layout)
            short = [cpu._product(part, w, bias, kernel) for part in x.split(100)]
            assert_same_bits(cpu._product(x, w, bias, kernel), torch.cat(short))
    across = random_weight(k, 64)
    assert_same_bits(
        cpu.grad_input_4bit(grad, across), torch.cat([cpu.grad_input_4bit(part, across) for part in grad.split(100)])
    )


def test_the_blocked_rung_for_bf16_pairs_gives_the_bits_of_the_one_before(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the choice between them, made by the number of tokens, shows in no result."""
    cpu = backend_of("avx512_bf16", request, monkeypatch)
    rung = {kernel.name: kernel for kernel in PRODUCT_KERNELS}
    for n, k, blocksize, m in ((129, 96, 32, 13), (3, 4096, 4096, 7), (257, 640, 128, 70), (65, 64, 64, 514)):
        weight, bias = random_weight(n, k, blocksize, nested=True), torch.randn(n).to(torch.bfloat16)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(torch.bfloat16)
        tiles = cpu.prepare_weight(weight)
        assert tiles is not None
        expected = cpu._product(x, tiles, bias, rung["gemm_4bit_4_avx512_bf16"])
        for stored in (tiles, weight):
            assert_same_bits(cpu._product(x, stored, bias, rung["gemm_4bit_5_avx512_bf16_blocked"]), expected)


GRADIENTS = [(64, 64, 64), (129, 96, 32), (257, 640, 128), (1, 4096, 4096), (3, 130, 64), (7, 77, 64), (300, 100, 48)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k", "blocksize"), GRADIENTS)
def test_the_gradient_keeps_the_error_budget(
    cpu: CpuBackend, n: int, k: int, blocksize: int, dtype: torch.dtype
) -> None:
    """With an odd number of rows, half a strip of columns, more tokens than a chunk, and blocks that straddle rows."""
    for nested, m in ((False, 1), (True, 7), (False, 515)):
        weight = random_weight(n, k, blocksize, nested=nested)
        grad = torch.randn(m, n, generator=torch.Generator().manual_seed(m)).to(dtype)
        W = REFERENCE.dequantize_4bit(weight, torch.float32).double()
        rounded = REFERENCE.dequantize_4bit(weight, dtype)
        exact = grad.double() @ W
        plain = (grad.float() @ rounded.float()).to(dtype)
        allowed = 2 * (plain.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
        error = (cpu.grad_input_4bit(grad, weight).double() - exact).abs().max()
        assert error <= allowed, f"M={m}: error {error:.3e}, allowed {allowed:.3e}"


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_gradient_through_a_weight_that_bf16_can_not_hold_is_infinite_and_no_nan(cpu: CpuBackend, n: int) -> None:
    W = torch.ones(n, 64)
    W[-1, 5] = 3.4e38
    packed, absmax = REFERENCE.quantize_4bit(W, get_codebook("nf4").on("cpu"), 64)
    weight = PackedWeight(packed, absmax, get_codebook("nf4").on("cpu").values, 64, (n, 64), "nf4")
    got = cpu.grad_input_4bit(torch.ones(1, n).bfloat16(), weight)
    wanted = REFERENCE.dequantize_4bit(weight, torch.bfloat16).sum(0, keepdim=True)
    assert torch.equal(got.isinf(), wanted.isinf())
    assert not got.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_no_rows_is_empty(cpu: CpuBackend, dtype: torch.dtype) -> None:
    assert cpu.grad_input_4bit(torch.zeros(0, 96, dtype=dtype), random_weight(96, 128)).shape == (0, 128)


@pytest.mark.parametrize("scale", [2e5, 1.3e-7], ids=["large values", "small values"])
def test_a_code_of_any_size_is_multiplied_within_the_budget(cpu: CpuBackend, scale: float) -> None:
    values = scale * (torch.arange(16) - 7.5)
    packed = torch.randint(0, 256, (16 * 64 // 2,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    weight = PackedWeight(packed, torch.ones(16), values, 64, (16, 64), "own")
    for m in (1, 2, 19):
        x = torch.randn(m, 64, generator=torch.Generator().manual_seed(m)).bfloat16()
        assert_within_budget(cpu.gemm_4bit(x, weight, None), x, weight, None)


def test_tiny_activations_keep_their_size_where_subnormals_are_flushed(cpu: CpuBackend) -> None:
    weight = random_weight(16, 64)
    x = (1e-35 * torch.randn(2, 64, generator=torch.Generator().manual_seed(0))).bfloat16()
    torch.set_flush_denormal(True)
    try:
        got = [cpu.gemm_4bit(each, weight, None) for each in (x, x[:1])]
    finally:
        torch.set_flush_denormal(False)
    assert max(float(each.abs().max()) for each in got) < 1e-30


def test_the_gradient_in_bf16_has_a_kernel_of_its_own_where_rows_are_whole_blocks() -> None:
    with_pairs, without = ("c", "avx2", "avx512", "avx512_bf16"), ("c", "avx2", "avx512")
    assert grad_input_kernel(with_pairs, torch.bfloat16, 128, 64) == "grad_input_4bit_2_avx512_bf16"
    assert grad_input_kernel(without, torch.bfloat16, 128, 64) == "grad_input_4bit_1_blocked"
    assert grad_input_kernel(with_pairs, torch.bfloat16, 130, 64) == "grad_input_4bit_1_blocked"
    assert grad_input_kernel(with_pairs, torch.float16, 128, 64) == "grad_input_4bit_1_blocked"


@pytest.mark.parametrize("kernel", [kn for kn in PRODUCT_KERNELS if torch.float32 in kn.dtypes], ids=lambda kn: kn.name)
def test_the_mean_error_of_a_long_sum_in_fp32_stays_below_a_third_of_what_bitsandbytes_allows(
    kernel: ProductKernel, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operands of bitsandbytes' test_gemv_4bit, "fc2" of dim 1024, and its measure: the mean error / sqrt(dim).

    It allows 2.4e-8, measured against torch's own fp32 product, which by itself is 2.7e-8 off on some processors. Here
    the measure is taken against fp64. In one chain, the parts of 4096 elements add up to 1.05e-8 (plain C: 1.4e-8), in
    subtotals to 0.7e-8; rounding the exact result gives 0.1e-8.
    """
    backend, dim = backend_of(tier_with(kernel), request, monkeypatch), 1024
    random, errors = torch.Generator().manual_seed(0), []
    for _ in range(2):
        W = torch.randn(128, 4 * dim, generator=random) / dim**0.5
        x = torch.randn(8, 4 * dim, generator=random)
        code = get_codebook("nf4").on("cpu")
        packed, absmax = REFERENCE.quantize_4bit(W, code, 64)
        weight = PackedWeight(packed, absmax, code.values, 64, tuple(W.shape), "nf4")
        exact = x.double() @ REFERENCE.dequantize_4bit(weight, torch.float32).double().T
        rows = x.split(1 if kernel.most_tokens == 1 else 8)
        y = torch.cat([backend._product(row, weight, None, kernel) for row in rows])
        errors.append((y.double() - exact).abs().mean() / dim**0.5)
    assert sum(errors) / len(errors) < 0.8e-8


def test_the_mean_error_of_a_long_gradient_in_fp32_stays_below_0_9e_8(cpu: CpuBackend) -> None:
    """The measure of the test above, for sums over N = 4096. Taken in two levels, tiles and total, it is 1.05e-8."""
    weight = random_weight(4096, 128)
    grad = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0))
    exact = grad.double() @ REFERENCE.dequantize_4bit(weight, torch.float32).double()
    error = (cpu.grad_input_4bit(grad, weight).double() - exact).abs().mean() / 0.05 / 1024
    assert error < 0.9e-8


@pytest.mark.parametrize(
    "kernel", [kn for kn in PRODUCT_KERNELS if torch.bfloat16 in kn.dtypes], ids=lambda kn: kn.name
)
def test_activations_that_are_all_positive_do_not_add_up_what_rounding_the_code_to_bf16_costs(
    kernel: ProductKernel, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a ReLU, K = 4096. The reference rounds each weight, a kernel all weights of a code alike (bf16_table.h).

    With the factor at which the code's errors are smallest, whatever their mean, it is 5.6 times the reference's error.
    """
    backend = backend_of(tier_with(kernel), request, monkeypatch)
    weight = random_weight(64, 4096)
    x = torch.randn(2, 4096, generator=torch.Generator().manual_seed(1)).relu().bfloat16()
    exact = x.double() @ REFERENCE.dequantize_4bit(weight, torch.float32).double().T
    y = torch.cat([backend._product(row, weight, None, kernel) for row in x.split(1)])
    ours, reference = ((each.double() - exact).abs().mean() for each in (y, REFERENCE.gemm_4bit(x, weight, None)))
    assert ours <= 3 * reference


@pytest.mark.parametrize("name", ["gemm_4bit_3_neon_fhm", "gemv_4bit_3_neon_fhm"])
def test_tokens_that_fp16_cannot_hold_lose_nothing_and_change_no_neighbours_bits(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those kernels multiply bf16 activations as fp16, by a power of two: see kernels/halves_neon.h."""
    kernel = next(kernel for kernel in PRODUCT_KERNELS if kernel.name == name)
    backend = backend_of("neon_fhm", request, monkeypatch)
    W = torch.randn(20, 256, generator=torch.Generator().manual_seed(0))
    W[:, 7] = 0
    code = get_codebook("nf4").on("cpu")
    packed, absmax = REFERENCE.quantize_4bit(W, code, 64)
    weight = PackedWeight(packed, absmax, code.values, 64, (20, 256), "nf4")
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(1))
    x[1] *= 2.0**-100  # fits by itself, not beside the others
    x[2] *= 2.0**90
    x[3, 7] = 2.0**100  # times a weight of 0: what is 2**100 times smaller is all of the result
    x[4, 0], x[5, 9] = float("nan"), float("inf")
    x = x.bfloat16()
    alone = [backend._product(token[None], weight, None, kernel) for token in x]
    for token, y in zip(x[:4], alone, strict=False):
        assert_within_budget(y, token[None], weight, None)
    expected = REFERENCE.gemm_4bit(x[4:], weight, None)
    assert torch.equal(torch.cat(alone[4:]).isnan(), expected.isnan())
    assert torch.equal(torch.cat(alone[4:]).isinf(), expected.isinf())
    if kernel.most_tokens != 1:
        together = backend._product(x, weight, None, kernel)
        assert torch.equal(together.view(torch.int16), torch.cat(alone).view(torch.int16))


def test_any_thread_count_gives_the_same_bits(cpu: CpuBackend) -> None:
    weight = random_weight(300, 1024)
    x = torch.randn(19, 1024).bfloat16()
    for w in (weight, cpu.prepare_weight(weight)):
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            if w is not None:
                results.append(cpu.gemm_4bit(x, w, None))
        assert all(torch.equal(results[0], r) for r in results)


def test_callers_at_the_same_time_do_not_share_scratch_memory(cpu: CpuBackend) -> None:
    weight = random_weight(256, 512)
    several = [torch.randn(m, 256, generator=torch.Generator().manual_seed(m)).bfloat16() for m in (40, 70, 130, 200)]
    alone = [cpu.grad_input_4bit(grad, weight) for grad in several]
    with ThreadPoolExecutor(4) as callers:
        for _ in range(10):
            together = callers.map(lambda grad: cpu.grad_input_4bit(grad, weight), several)
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_strided_activations_are_made_contiguous(cpu: CpuBackend) -> None:
    weight = random_weight(40, 128)
    x = torch.randn(128, 5).T
    assert not x.is_contiguous()
    assert torch.equal(cpu.gemm_4bit(x, weight, None), cpu.gemm_4bit(x.contiguous(), weight, None))


def test_infinite_and_nan_activations_come_out_as_the_reference_has_them(cpu: CpuBackend) -> None:
    weight = random_weight(40, 128)
    for dtype in DTYPES:
        x = torch.randn(3, 128).to(dtype)
        x[1, 5], x[2, 7] = float("nan"), float("inf")
        expected = REFERENCE.gemm_4bit(x, weight, None)
        for w in (weight, cpu.prepare_weight(weight)):
            if w is not None:
                y = cpu.gemm_4bit(x, w, None)
                assert torch.equal(y.isnan(), expected.isnan())
                assert torch.equal(y.isposinf(), expected.isposinf())


def test_no_tokens_give_no_rows(cpu: CpuBackend) -> None:
    assert cpu.gemm_4bit(torch.empty(0, 128), random_weight(40, 128), None).shape == (0, 40)


def test_what_it_does_not_take_is_refused_with_the_reason() -> None:
    call = Call("gemm_4bit", "cpu", torch.float64, 4, 40, 128, 64, "nf4")
    assert CpuBackend().can_run(call) == "it does not compute in torch.float64"
    assert "not on" not in (CpuBackend().can_run(call) or "")
    call = Call("gemm_4bit", "cuda", torch.float32, 4, 40, 128, 64, "nf4")
    assert CpuBackend().can_run(call) == "it computes on cpu, and the tensors are on cuda"


def test_it_imports_nothing_of_refq4_but_the_contract() -> None:
    import ast

    allowed = {"refq4.backend", "refq4.internals.buildcache", "refq4.codebooks", "refq4.layout"}
    for path in sorted(build.kernel_directory().parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.append(node.module or "")
            assert {m for m in modules if m.split(".")[0].startswith("refq4")} <= allowed, path.name
