"""The grouped product of a mixture of experts: every row times its own expert's weight, on every backend and path."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import refq4
from refq4.backend import Backend
from refq4.codebooks import get_codebook
from refq4.functional import dequantize_4bit, quantize_4bit
from refq4.internals.grouped import grouped_gemm_4bit
from refq4.params import Params4bit
from refq4.reference import ReferenceBackend
from refq4.state import QuantState
from refq4.testing.isolation import isolated_registry

BACKENDS = ["reference", "cpu"]
OFFSETS = [0, 3, 3, 4, 9]
E, N, K = len(OFFSETS) - 1, 48, 192


def experts(shape: tuple[int, ...] = (E, N, K), blocksize: int = 64, nested: bool = False) -> tuple[Tensor, QuantState]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    return quantize_4bit(weight, quant_type="nf4", blocksize=blocksize, compress_statistics=nested)


def rows(k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(OFFSETS[-1], k, generator=torch.Generator().manual_seed(5)).to(dtype)


def plain(x: Tensor, decoded: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """The same in fp64, expert by expert."""
    parts = []
    for e, (start, stop) in enumerate(pairwise(OFFSETS)):
        weight = decoded[e].double()
        y = x[start:stop].double() @ (weight if transposed else weight.T)
        parts.append(y if bias is None else y + bias[e].double())
    return torch.cat(parts)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    unit = 4 * torch.finfo(got.dtype).eps if got.dtype == torch.float32 else torch.finfo(got.dtype).eps  # a sum of K
    assert got.isfinite().all()
    error = (got.double() - wanted).abs().max() / wanted.abs().max()
    assert error <= 4 * unit, f"{error} is more than {4 * unit}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("transposed", [False, True], ids=["stored [E, N, K]", "stored [E, K, N]"])
@pytest.mark.parametrize(
    ("shape", "blocksize", "nested"),
    [
        ((E, N, K), 64, False),
        ((E, N, K), 64, True),  # 144 blocks an expert: nested blocks of 256 straddle experts
        ((E, 64, 256), 64, True),  # 256 of them: they don't
        ((E, N, 96), 64, False),  # blocks straddle rows
        ((E, 5, 33), 64, False),  # and experts
        ((E, 7, 64), 32, False),
        ((E, 40, 128), 4096, False),
    ],
    ids=lambda value: str(value),
)
def test_each_row_is_multiplied_by_its_own_expert(
    backend: str, dtype: torch.dtype, transposed: bool, shape: tuple[int, ...], blocksize: int, nested: bool
) -> None:
    packed, state = experts(shape, blocksize, nested)
    n, k = shape[:0:-1] if transposed else shape[1:]
    decoded = dequantize_4bit(packed, state).to(dtype)
    x, bias = rows(k, dtype), torch.randn(E, n).to(dtype)
    for given in (None, bias):
        y = grouped_gemm_4bit(x, packed, state, torch.tensor(OFFSETS), given, transposed=transposed, backend=backend)
        assert y.dtype == dtype
        assert_close(y, plain(x, decoded, given, transposed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transposed", [False, True], ids=["stored [E, N, K]", "stored [E, K, N]"])
def test_the_gradients_are_those_of_the_decoded_experts(backend: str, transposed: bool) -> None:
    packed, state = experts()
    n, k = (K, N) if transposed else (N, K)
    decoded = dequantize_4bit(packed, state)
    x = rows(k).requires_grad_()
    bias = torch.randn(E, n, requires_grad=True)
    y = grouped_gemm_4bit(x, packed, state, torch.tensor(OFFSETS), bias, transposed=transposed, backend=backend)
    upstream = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, bias], upstream)
    wanted = torch.autograd.grad(plain(x, decoded, bias, transposed), [x, bias], upstream.double())
    for got, want in zip(grads, wanted, strict=True):
        assert_close(got, want.double())


def test_the_gradient_has_a_gradient() -> None:
    packed, state = experts((E, 5, 32), 32)
    x = torch.randn(OFFSETS[-1], 32, dtype=torch.float64, requires_grad=True)
    run = lambda x: grouped_gemm_4bit(x, packed, state, torch.tensor(OFFSETS), backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_experts_prepared_for_the_cpu_give_the_same_and_their_bytes_come_back(dtype: torch.dtype) -> None:
    packed, state = experts()
    weight = Params4bit(packed.clone(), quant_state=state, bnb_quantized=True)
    x, offsets = rows(K, dtype), torch.tensor(OFFSETS)
    with torch.no_grad():
        y = grouped_gemm_4bit(x, weight, state, offsets, backend="cpu")
        assert weight.prepared
        assert_close(y, plain(x, dequantize_4bit(packed, state).to(dtype), None, False))
    assert torch.equal(weight.stored(), packed)
    assert weight.prepared, "reading a copy of the bytes does not restore them"
    assert torch.equal(torch.cat([weight]), packed)
    assert not weight.prepared


def test_operands_with_the_negative_bit_are_negated_before_prepared_experts_read_them() -> None:
    packed, state = experts()
    weight = Params4bit(packed.clone(), quant_state=state, bnb_quantized=True)
    x, offsets, bias, negated = rows(K), torch.tensor(OFFSETS), torch.randn(E, N), torch._neg_view
    with torch.no_grad():
        wanted = grouped_gemm_4bit(x, weight, state, offsets, bias, backend="cpu")
        lazy = negated(-x), weight, state, negated(-offsets), negated(-bias)
        assert torch.equal(grouped_gemm_4bit(*lazy, backend="cpu"), wanted)


def test_a_compiled_call_takes_the_prepared_experts_and_gives_the_same() -> None:
    packed, state = experts()
    weight = Params4bit(packed.clone(), quant_state=state, bnb_quantized=True)
    x, offsets = rows(K), torch.tensor(OFFSETS)
    with torch.no_grad(), refq4.use_backend("cpu"):
        eager = grouped_gemm_4bit(x, weight, state, offsets)
        assert weight.prepared
        compiled = torch.compile(lambda x, o: grouped_gemm_4bit(x, weight, state, o), fullgraph=True, backend="eager")
        assert torch.equal(compiled(x, offsets), eager)
        assert weight.prepared


def test_every_op_passes_opcheck() -> None:
    packed, state = experts()
    flat = refq4.internals.schemas.flatten(state.packed_weight(packed))
    args = (rows(K).requires_grad_(), *flat, None, torch.tensor(OFFSETS), False, "reference")
    torch.library.opcheck(torch.ops.refq4.grouped_gemm_4bit.default, args)


class OnlyGemm(ReferenceBackend):
    """A backend that knows nothing of experts, and notes what it is asked."""

    name = "only-gemm"

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def gemm_4bit(self, x: Tensor, weight: object, bias: Tensor | None) -> Tensor:
        self.tokens.append(x.shape[0])
        return super().gemm_4bit(x, weight, bias)  # type: ignore[arg-type]


def test_a_backend_without_a_grouped_product_is_asked_for_one_product_an_expert() -> None:
    packed, state = experts()
    backend = OnlyGemm()
    with isolated_registry():
        refq4.register_backend(backend)
        with refq4.trace() as t:
            y = grouped_gemm_4bit(rows(K), packed, state, torch.tensor(OFFSETS), backend="only-gemm")
    assert backend.tokens == [3, 1, 5]  # the expert without rows is left out
    assert {op.backend for op in t.ops} == {"only-gemm"}
    assert_close(y, plain(rows(K), dequantize_4bit(packed, state), None, False))


def test_a_backend_without_any_product_says_so() -> None:
    packed, state = experts()
    with isolated_registry():
        refq4.register_backend(type("Empty", (Backend,), {"name": "empty"})())
        with pytest.raises(refq4.BackendUnsupportedError, match=r"4 experts.*it has no gemm_4bit"):
            grouped_gemm_4bit(rows(K), packed, state, torch.tensor(OFFSETS), backend="empty")


def test_experts_of_which_one_begins_in_the_middle_of_a_byte_are_decoded_as_one() -> None:
    weight = torch.randn(E, 3, 65, generator=torch.Generator().manual_seed(6))  # 195 codes each, in blocks of 65
    code = get_codebook("nf4").on("cpu")
    packed, absmax = ReferenceBackend().quantize_4bit(weight, code, 65)
    state = QuantState(absmax, weight.shape, code.values, 65, "nf4", torch.float32)
    y = grouped_gemm_4bit(rows(65), packed, state, torch.tensor(OFFSETS))
    assert_close(y, plain(rows(65), dequantize_4bit(packed, state), None, False))


@pytest.mark.parametrize("transposed", [False, True], ids=["stored [E, N, K]", "stored [E, K, N]"])
def test_a_bias_is_rounded_together_with_the_product_where_blocks_straddle_experts(transposed: bool) -> None:
    packed, state = experts((E, 5, 5))
    x, decoded = rows(5, torch.bfloat16), dequantize_4bit(packed, state).bfloat16()
    bias = -plain(x, decoded, None, transposed)[[0, 0, 3, 4]].bfloat16()  # of a row of each expert
    got = grouped_gemm_4bit(x, packed, state, torch.tensor(OFFSETS), bias, transposed=transposed, backend="reference")
    exact = plain(x, decoded, bias, transposed)
    assert float(((got.double() - exact).abs() / exact.abs()).max()) < 2**-7


def test_no_rows_give_no_rows() -> None:
    packed, state = experts()
    y = grouped_gemm_4bit(torch.empty(0, K), packed, state, torch.zeros(E + 1, dtype=torch.int64), torch.ones(E, N))
    assert y.shape == (0, N)


WRONG = {
    "offsets that don't end at T": ({"offsets": [0, 3, 3, 4, 8]}, "rise from 0 to the 9 rows"),
    "offsets that end beyond T": ({"offsets": [0, 3, 3, 4, 10]}, "rise from 0 to the 9 rows"),
    "offsets that don't begin at 0": ({"offsets": [1, 3, 3, 4, 9]}, "rise from 0 to the 9 rows"),
    "offsets that fall": ({"offsets": [0, 5, 3, 4, 9]}, "rise from 0 to the 9 rows"),
    "one offset an expert": ({"offsets": [3, 3, 4, 9]}, r"offsets must be int64 \[E \+ 1\] = \[5\]"),
    "N features instead of K": ({"k": N}, r"needs \[T, 192\]"),
    "K + 1 features": ({"k": K + 1}, r"needs \[T, 192\]"),
    "a bias of K": ({"bias": torch.ones(E, K)}, r"\[E, N\] = \[4, 48\]"),
    "a bias of one expert": ({"bias": torch.ones(N)}, r"\[E, N\] = \[4, 48\]"),
    "a bias of another dtype": ({"bias": torch.ones(E, N).half()}, "bias must be float32"),
    "K features for experts stored as [E, K, N]": ({"transposed": True}, r"needs \[T, 48\]"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_operands_that_do_not_fit_are_refused(wrong: str, backend: str) -> None:
    changes, message = WRONG[wrong]
    packed, state = experts()
    x, offsets = rows(changes.get("k", K)), torch.tensor(changes.get("offsets", OFFSETS))
    with pytest.raises(ValueError, match=message):
        grouped_gemm_4bit(
            x, packed, state, offsets, changes.get("bias"), transposed="transposed" in changes, backend=backend
        )


def test_the_weight_of_one_layer_is_refused() -> None:
    packed, state = quantize_4bit(torch.randn(N, K), quant_type="nf4")
    with pytest.raises(ValueError, match="all experts"):
        grouped_gemm_4bit(rows(K), packed, state, torch.tensor(OFFSETS))
