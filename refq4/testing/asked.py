"""One question in progress: the case's operands, what came of it, and how answers are compared.

The functions that ask are in ``ask_ops.py`` (one op at a time) and ``ask_layers.py`` (whole layers);
``conformance.py`` lists them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import TypeVar

import torch
from torch import Tensor

from ..functional import quantize_4bit
from ..state import QuantState
from ..trace import Trace, trace
from .budget import Budget, ulp
from .cases import Case

__all__ = ["ULP_EDGES", "Asked", "ExplainedError", "NoSuchThing", "Outcome", "one_nan"]


@dataclass
class Outcome:
    """What came of one case on one backend.

    Attributes:
        case: the question.
        status: "same", "differs", "refused" (the backend said it can't), or "no such thing" (an optional part it
            does not have).
        message: what differs and where, or the backend's reason.
        hint: the bug that would give exactly these numbers, where one is known, or that it is a matter of rounding.
        error: for products, the largest error as a fraction of what is allowed (above 1: it fails).
        ulps: for products, each element's error in units in the last place, int64 [5]: up to 1/2, 1, 2, 8, more.

    Example:
        >>> from refq4.testing import check
        >>> print(check(Case("gemm_4bit", n=7), "reference"))
        Case('gemm_4bit', n=7): same
    """

    case: Case
    status: str = "same"
    message: str = ""
    hint: str = ""
    error: float = 0.0
    ulps: Tensor = field(default_factory=lambda: torch.zeros(5, dtype=torch.int64))

    def __str__(self) -> str:
        return "\n".join(line for line in (f"{self.case!r}: {self.status}", self.message, self.hint) if line)


Answer = TypeVar("Answer")
ULP_EDGES = (0.5, 1.0, 2.0, 8.0)


class ExplainedError(AssertionError):
    """A difference with the bug that would give it."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class NoSuchThing(Exception):  # noqa: N818  (no error: an optional part is absent)
    """The backend does not have the optional part that a check is about."""


@dataclass
class Asked:
    """One question in progress: what a check function needs."""

    case: Case
    outcome: Outcome
    backend: str
    against: str
    device: str

    def __post_init__(self) -> None:
        self.W, self.x, self.bias = self.case.operands(self.device)

    def quantised(self) -> tuple[Tensor, QuantState]:
        """The case's weight, quantised by the judge: the backend under test is asked one thing at a time."""
        allowed = self.case.weights == "not finite"
        return quantize_4bit(self.W, **self.case.settings(), allow_nonfinite=allowed, backend=self.against)

    def product_within(self, budget: Budget, got: Tensor, what: str, hint: Callable[[], str]) -> None:
        """Compare a product with its budget and keep the figures."""
        self._measure(budget, got)
        try:
            budget.check(got, what)
        except AssertionError as difference:
            raise ExplainedError(str(difference), hint()) from None

    def _measure(self, budget: Budget, got: Tensor) -> None:
        """Take a product's errors into the outcome, also those of a product that is about to fail."""
        if got.shape != budget.oracle.shape:
            self.outcome.error = inf
            return
        finite = budget.reference.isfinite()
        error = (got.double() - budget.oracle).abs()[finite].nan_to_num(nan=inf)
        if error.numel():
            self.outcome.error = max(self.outcome.error, float((error / budget.allowed[finite]).max()))
            units = error / ulp(budget.oracle[finite], budget.reference.dtype)
            self.outcome.ulps += torch.bincount(
                torch.bucketize(units.cpu(), torch.tensor(ULP_EDGES, dtype=torch.float64)), minlength=5
            )

    def both(self, ask: Callable[[str], Answer]) -> tuple[Answer, Answer]:
        """What the backend under test answers, and what the judge does; ``ask`` takes the name of a backend."""
        with self.answering():
            got = ask(self.backend)
        return got, ask(self.against)

    @contextmanager
    def answering(self) -> Iterator[Trace]:
        """Trace what the backend is asked inside; every op must be computed by the backend that was named."""
        with trace() as t:
            yield t
        ran = {op.backend for op in t.ops}
        if ran != {self.backend}:
            raise AssertionError(f"asked {self.backend!r}, but {sorted(ran) or 'nobody'} computed")


def one_nan(values: Tensor) -> Tensor:
    """Replace every NaN by one bit pattern: which of the many comes out of arithmetic is not specified."""
    return (
        torch.where(values.isnan(), torch.full_like(values, float("nan")), values)
        if values.is_floating_point()
        else values
    )
