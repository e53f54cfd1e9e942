"""The error budget, in one place: oracle, unit in the last place, and comparisons that raise.

    oracle      x @ W.t() + bias in fp64, W the fp32 dequantised weight: what an exact backend would give
    reference   the pure-PyTorch backend in the caller's dtypes: what a plain backend gives
    allowed     2 * max |reference - oracle| + ulp(oracle, output dtype), per element

Twice, because a backend may round its scales elsewhere; a unit in the last place, because every result is rounded to
the output dtype once. The maximum is over all outputs of the reference, and over 128 draws of those few outputs whose
terms are largest. One output may be nearly exact by chance; and torch adds in many partial sums, which errs less than
the plain loop over k that a first kernel has. A draw is the same product, rounded anew:

    fp32      sum over k of x[k] * w[k], one term after the other: k upwards, k downwards, then k shuffled
    16 bits   sum of x[k] * (s * w[k] in 16 bits), divided by s, for an s between 1 and 2: no order changes the
              rounding of the weight, which is nearly all of the error

Where the reference itself gives NaN or an infinity (fp16 overflow, say), the backend must give the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..internals import dispatch
from ..internals.grouped import one_expert
from ..state import QuantState

DRAWS, ROWS = 128, (4, 4)  # draws, and of how many rows of x and of the weight

__all__ = [
    "Budget",
    "assert_same_bits",
    "assert_within_budget",
    "error_budget",
    "grouped_budget",
    "oracle",
    "product_budget",
    "ulp",
]


@dataclass(frozen=True)
class Budget:
    """The right value of a product, and the error that it may have.

    Attributes:
        oracle: fp64 [..., N].
        reference: the reference's result, in the output dtype.
        allowed: fp64 [..., N], the largest error per element.

    Example:
        >>> budget = Budget.of(torch.ones(2).double(), torch.ones(2), torch.float32)
        >>> budget.check(torch.ones(2), "product")
        >>> budget.check(torch.tensor([1.0, 1.1]), "product")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        AssertionError: product: 1 of 2 elements are off; at [1]: got 1.100000023841858, exact 1.0, ...
    """

    oracle: Tensor
    reference: Tensor
    allowed: Tensor

    @classmethod
    def of(cls, exact: Tensor, reference: Tensor, dtype: torch.dtype, drawn: float = 0.0) -> Budget:
        """The rule at the top of the file, for any quantity that has an exact value.

        Args:
            exact: fp64, any shape.
            reference: the same, as the reference computes it.
            dtype: the coarsest dtype that the result is rounded to.
            drawn: an error that the same has when it is computed plainly in another way.
        """
        return cls(exact, reference, 2 * max(_largest_error(reference, exact), drawn) + ulp(exact, dtype))

    def check(self, got: Tensor, what: str) -> None:
        """Raise an AssertionError unless ``got`` has the reference's dtype and shape, and errs no more than allowed."""
        like = self.reference
        if got.shape != like.shape or got.dtype != like.dtype:
            raise AssertionError(f"{what}: expected {like.dtype} {list(like.shape)}, got {got.dtype} {list(got.shape)}")
        wrong = self._strange(got) | (like.isfinite() & ~((got.double() - self.oracle).abs() <= self.allowed))
        if bool(wrong.any()):
            at = tuple(wrong.nonzero()[0].tolist())
            error = abs(got[at].double() - self.oracle[at]).item()
            raise AssertionError(
                f"{what}: {int(wrong.sum())} of {got.numel()} elements are off; at {list(at)}: got {got[at].item()!r}, "
                f"exact {self.oracle[at].item()!r}, reference {like[at].item()!r}; error {error:.3g}, "
                f"allowed {self.allowed[at].item():.3g}"
            )

    def _strange(self, got: Tensor) -> Tensor:
        """Where the reference is no finite number, the result must be the same NaN or infinity."""
        like = self.reference
        return ~torch.eq(got.isnan(), like.isnan()) | (~like.isfinite() & ~got.isnan() & (got != like))


def _largest_error(got: Tensor, exact: Tensor) -> float:
    error = (got.double() - exact)[got.isfinite()].abs()
    return float(error.max()) if error.numel() else 0.0


def oracle(x: Tensor, B: Tensor, state: QuantState, bias: Tensor | None = None, backend: str = "reference") -> Tensor:
    """The exact product: fp64 [..., N], from the fp32 dequantised weight [N, K], as ``backend`` decodes it.

    Example:
        >>> from refq4.functional import quantize_4bit
        >>> B, state = quantize_4bit(torch.eye(2, 32), quant_type="nf4", blocksize=32)
        >>> oracle(torch.ones(32), B, state)
        tensor([1., 1.], dtype=torch.float64)
    """
    weight = _decoded(B, state, backend).double()
    return torch.nn.functional.linear(x.double(), weight, None if bias is None else bias.double())


def _decoded(B: Tensor, state: QuantState, backend: str) -> Tensor:
    """The weight in fp32, whatever dtype it had before it was quantised."""
    return dispatch.dequantize_4bit(state.packed_weight(B), torch.float32, backend)


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring ``dtype`` numbers at each value (fp64 in, fp64 out).

    Example:
        >>> ulp(torch.tensor([1.0, 3.0]).double(), torch.bfloat16).tolist()
        [0.0078125, 0.015625]
    """
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp(min=info.smallest_normal))
    return torch.ldexp(torch.full_like(values, info.eps), exponent - 1)


def error_budget(
    x: Tensor, B: Tensor, state: QuantState, bias: Tensor | None = None, backend: str = "reference"
) -> Budget:
    """The budget for one product of x [..., K] with the packed weight B of shape [N, K]; see the top of the file.

    ``backend`` names the backend that decodes the weight for the oracle, and whose error gives the allowance.

    Example:
        >>> from refq4.functional import quantize_4bit
        >>> B, state = quantize_4bit(torch.eye(2, 32), quant_type="nf4", blocksize=32)
        >>> error_budget(torch.ones(1, 32), B, state).allowed  # the reference is exact here: one unit is left
        tensor([[1.1921e-07, 1.1921e-07]], dtype=torch.float64)
    """
    with torch.no_grad():
        exact = oracle(x, B, state, bias, backend)
        cast = None if bias is None else bias.to(x.dtype)
        reference = dispatch.product("gemm_4bit", x, state.packed_weight(B), cast, backend)
        return product_budget(exact, reference, x, _decoded(B, state, backend), bias)


def grouped_budget(
    x: Tensor,
    B: Tensor,
    state: QuantState,
    offsets: list[int],
    bias: Tensor | None = None,
    transposed: bool = False,
    backend: str = "reference",
) -> Budget:
    """The budget for a grouped product: that of each expert's rows [.., K] with its own weight.

    Args:
        x: [T, K], sorted by expert.
        B: the packed bytes of a weight of ``state.shape`` [E, N, K], or [E, K, N] if ``transposed``.
        offsets: E + 1 of them; see ``Backend.grouped_gemm_4bit``.
        bias: [E, N].
        backend: decodes the weight.

    Example:
        >>> from refq4.functional import quantize_4bit
        >>> B, state = quantize_4bit(torch.eye(2, 32).repeat(3, 1, 1), quant_type="nf4", blocksize=32)
        >>> grouped_budget(torch.ones(4, 32), B, state, [0, 1, 1, 4]).oracle.shape
        torch.Size([4, 2])
    """
    packed = state.packed_weight(B)
    # one by one where blocks allow it, as the product decodes them: an engine may decode a taller weight otherwise
    alone = [one_expert(packed, e) for e in range(len(offsets) - 1)]
    weights = [dispatch.dequantize_4bit(each, torch.float32, backend) for each in alone if each is not None]
    if not weights:
        weights = list(dispatch.dequantize_4bit(packed, torch.float32, backend))
    parts: list[Budget] = []
    for e, (start, stop) in enumerate(pairwise(offsets)):
        rows, weight = x[start:stop], weights[e].t() if transposed else weights[e]
        added = None if bias is None else bias[e]
        exact = torch.nn.functional.linear(rows.double(), weight.double(), None if added is None else added.double())
        reference = torch.nn.functional.linear(rows, weight.to(x.dtype), added)
        parts.append(product_budget(exact, reference, rows, weight, added))
    return Budget(*(torch.cat([getattr(part, name) for part in parts]) for name in ("oracle", "reference", "allowed")))


def product_budget(exact: Tensor, reference: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Budget:
    """The budget of a product of x [..., K] with a weight that is decoded already, errors of the draws included.

    Args:
        exact: fp64 [..., N].
        reference: [..., N], in the dtype of ``x``.
        x: [..., K].
        weight: fp32 [N, K].
        bias: [N].

    Example:
        >>> x, weight = torch.ones(1, 3), torch.tensor([[1.0, 1e-8, -1.0]])
        >>> product_budget(x.double() @ weight.double().t(), torch.zeros(1, 1), x, weight).allowed > 2e-8
        tensor([[True]])
    """
    return Budget.of(exact, reference, x.dtype, _drawn(x, weight, bias) if reference.numel() else 0.0)


def _drawn(x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """The largest error of all draws; the bias is added last, as the contract has it."""
    x = x.reshape(-1, x.shape[-1])
    sizes = (x.float().abs() @ weight.abs().t()).nan_to_num()
    rows, chosen = (sizes.amax(1 - i).topk(min(ROWS[i], sizes.shape[i])).indices for i in (0, 1))
    x, weight = x[rows], weight[chosen]
    bias = x.new_zeros(len(chosen)) if bias is None else bias[chosen]
    anew = _rounded_anew if x.dtype in (torch.bfloat16, torch.float16) else _in_turn
    results = (anew(x, weight) + bias.to(x.dtype).float()).to(x.dtype)  # one rounding, as a backend does
    return _largest_error(results, torch.nn.functional.linear(x.double(), weight.double(), bias.double()))


def _in_turn(x: Tensor, weight: Tensor) -> Tensor:
    """fp32 [DRAWS, M, N]: one term after the other, each draw in an order of its own."""
    generator, upwards = torch.Generator().manual_seed(0), torch.arange(x.shape[-1])
    shuffled = [torch.randperm(len(upwards), generator=generator) for _ in range(DRAWS - 2)]
    orders = torch.stack([upwards, upwards.flip(0), *shuffled], dim=1).to(x.device)
    terms = (x.float()[:, None] * weight).movedim(-1, 0)
    total = terms.new_zeros(DRAWS, len(x), len(weight))
    for each in terms[orders]:
        total += each
    return total


def _rounded_anew(x: Tensor, weight: Tensor) -> Tensor:
    """fp32 [DRAWS, M, N]: sums of weights that are rounded to 16 bits, each draw at a scale of its own."""
    scales = 1 + torch.arange(1, DRAWS + 1, device=x.device)[:, None, None] / (DRAWS + 1)
    return x.float() @ (weight * scales).to(x.dtype).float().mT / scales


def assert_within_budget(
    got: Tensor, x: Tensor, B: Tensor, state: QuantState, bias: Tensor | None = None, what: str = "product"
) -> None:
    """Raise an AssertionError unless ``got`` is x times the packed weight within the error budget.

    Example:
        >>> from refq4.functional import matmul_4bit, quantize_4bit
        >>> B, state = quantize_4bit(torch.randn(4, 64), quant_type="nf4")
        >>> x = torch.randn(3, 64)
        >>> assert_within_budget(matmul_4bit(x, B, state), x, B, state)
        >>> assert_within_budget(matmul_4bit(x, B, state) + 1, x, B, state)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        AssertionError: product: 12 of 12 elements are off...
    """
    error_budget(x, B, state, bias).check(got, what)


def assert_same_bits(got: Tensor, wanted: Tensor, what: str = "tensor") -> None:
    """Raise an AssertionError unless two tensors have the same dtype, shape and bits (NaN payloads and -0 included).

    Example:
        >>> assert_same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
        Traceback (most recent call last):
            ...
        AssertionError: tensor: 1 of 1 elements differ; at [0]: got 0.0, expected -0.0
    """
    if got.dtype != wanted.dtype or got.shape != wanted.shape:
        raise AssertionError(f"{what}: expected {wanted.dtype} {list(wanted.shape)}, got {got.dtype} {list(got.shape)}")
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.itemsize]
    differs = got.contiguous().view(integer) != wanted.contiguous().view(integer)
    if bool(differs.any()):
        at = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(differs.sum())} of {got.numel()} elements differ; at {list(at)}: got {got[at].item()!r}, "
            f"expected {wanted[at].item()!r}"
        )
