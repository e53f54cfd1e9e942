"""The error budget, in one place: oracle, unit in the last place, and comparisons that raise.

    oracle      x @ W.t() + bias in fp64, W the fp32 dequantised weight: what an exact backend would give
    reference   the pure-PyTorch backend in the caller's dtypes: what a plain backend gives
    allowed     2 * max |reference - oracle| + ulp(oracle, output dtype), per element

Twice, because a backend may round its scales elsewhere; a unit in the last place, because every result is rounded to
the output dtype once. The maximum is over all outputs and, where few of them differ, over eight draws: one output may
be nearly exact by chance, so the same product is rounded anew, and the largest error counts. A draw takes another order
of the sum and, in 16 bits, other roundings of the weight, which no order changes:

    another order    sum over k of x[k] * w[k], k shuffled
    other roundings  sum of x[k] * (s * w[k] in 16 bits), divided by s, for an s between 1 and 2

Where the reference itself gives NaN or an infinity (fp16 overflow, say), the backend must give the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..internals import codec, dispatch
from ..internals.grouped import one_expert
from ..state import QuantState

FEW, DRAWS = 1024, 8

__all__ = ["Budget", "assert_same_bits", "assert_within_budget", "error_budget", "grouped_budget", "oracle", "ulp"]


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
    def of(cls, exact: Tensor, reference: Tensor, dtype: torch.dtype) -> Budget:
        """The rule at the top of the file, for any quantity that has an exact value.

        Args:
            exact: fp64, any shape.
            reference: the same, as the reference computes it.
            dtype: the coarsest dtype that the result is rounded to.
        """
        error = (reference.double() - exact)[reference.isfinite()].abs()
        worst = float(error.max()) if error.numel() else 0.0
        return cls(exact, reference, 2 * worst + ulp(exact, dtype))

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
    return codec.dequantize_4bit(state.packed_weight(B), torch.float32, backend)


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
        return _loosest(exact, reference, x, _decoded(B, state, backend), cast)


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
    weights = [codec.dequantize_4bit(each, torch.float32, backend) for each in alone if each is not None]
    if not weights:
        weights = list(codec.dequantize_4bit(packed, torch.float32, backend))
    parts: list[Budget] = []
    for e, (start, stop) in enumerate(pairwise(offsets)):
        rows, weight = x[start:stop], weights[e].t() if transposed else weights[e]
        added = None if bias is None else bias[e]
        exact = torch.nn.functional.linear(rows.double(), weight.double(), None if added is None else added.double())
        reference = torch.nn.functional.linear(rows, weight.to(x.dtype), added)
        parts.append(_loosest(exact, reference, rows, weight, added))
    return Budget(*(torch.cat([getattr(part, name) for part in parts]) for name in ("oracle", "reference", "allowed")))


def _loosest(exact: Tensor, reference: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Budget:
    """The budget of a product with the fp32 weight, or where few outputs differ the largest of several draws."""
    budget = Budget.of(exact, reference, x.dtype)
    alike = bool((x == x.reshape(-1, x.shape[-1])[:1]).all())  # rows that are all the same have the same outputs
    if 0 < (weight.shape[0] if alike else reference.numel()) < FEW and reference.numel():
        budget = max([budget, *_other_draws(x, weight, bias, exact)], key=lambda b: float(b.allowed.max()))
    return Budget(exact, reference, budget.allowed)


def _other_draws(x: Tensor, weight: Tensor, bias: Tensor | None, exact: Tensor) -> Iterator[Budget]:
    """The same product with its terms in another order and its weights rounded anew: only the roundings differ."""
    generator = torch.Generator().manual_seed(0)
    half = x.dtype in (torch.bfloat16, torch.float16)
    for draw in range(1, DRAWS):
        order = torch.randperm(x.shape[-1], generator=generator).to(x.device)
        scale = 1 + draw / DRAWS if half else 1.0
        rounded = (weight[:, order] * scale).to(x.dtype)
        if half:  # as a backend does: sums and bias in fp32, and one rounding of the result
            again = torch.nn.functional.linear(x[..., order].float(), rounded.float()) / scale
            again = (again if bias is None else again + bias.float()).to(x.dtype)
        else:
            again = torch.nn.functional.linear(x[..., order], rounded, bias)
        yield Budget.of(exact, again, x.dtype)


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
