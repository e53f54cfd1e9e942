"""What each check asks of a backend, and what counts as the same. Compare with ``refq4/backend.py``, the contract.

    check                  the question                                                            same means
    ---------------------  ----------------------------------------------------------------------  --------------
    quantize_4bit          packed bytes and absmax of a tensor                                     bit for bit
    dequantize_4bit        packed bytes decoded, plain or nested scales                            bit for bit
    quantize_blockwise     8-bit codes and absmax                                                  bit for bit
    dequantize_blockwise   8-bit codes decoded                                                     bit for bit
    gemv_4bit, gemm_4bit   x @ W.t() + bias on the canonical layout                                error budget
    own layout             prepare_weight, restore_weight; products on the prepared weight         bits; budget
    forward                Linear4bit: every step's decision, the result, nothing changed          equal; budget
    backward               grad of activations and bias                                            error budget
    state dict             quantise, infer, save, load, infer again                                bit for bit
    embedding              rows of Embedding4bit                                                   bit for bit

Each check runs on the backend by name (strictly), and asserts from the trace that this backend computed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import nn
from ..backend import BackendUnsupportedError
from ..codebooks import create_dynamic_map
from ..functional import dequantize_4bit, quantize_4bit
from ..internals import codec, dispatch
from ..matmul import describe, matmul_4bit
from ..registry import check_usable, use_backend
from ..state import QuantState
from ..trace import Trace, trace
from .budget import Budget, assert_same_bits, error_budget, ulp
from .cases import Case
from .diagnose import diagnose_product, diagnose_quantised

__all__ = ["CHECKS", "Check", "Outcome", "check"]


@dataclass
class Outcome:
    """What came of one case on one backend.

    Attributes:
        case: the question.
        status: "same", "differs", "refused" (the backend said it can't), or "no such thing" (an optional part it
            does not have).
        message: what differs and where, or the backend's reason.
        hint: the bug that would give exactly these numbers, where one is known.
        error: for products, the largest error as a fraction of what is allowed.
        ulps: for products, each element's error in units in the last place, int64 [5]: up to 1/2, 1, 2, 8, more.

    Example:
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


ULP_EDGES = (0.5, 1.0, 2.0, 8.0)


def check(case: Case, backend: str, against: str = "reference") -> Outcome:
    """Ask one question of one backend. Never raises for a wrong answer: the outcome says what was wrong.

    Args:
        case: from :func:`refq4.testing.catalogue`, or your own.
        backend: a registered name.
        against: the backend whose answer counts as right, and whose error gives the budget.

    Raises:
        UnknownBackendError, BackendUnavailableError: either name can't be used here.
        ValueError: no such check.

    Example:
        >>> check(Case("gemv_4bit", k=65, dtype="bfloat16"), "reference").status
        'same'
    """
    question = CHECKS.get(case.check)
    if question is None:
        raise ValueError(f"unknown check {case.check!r}; known: {', '.join(CHECKS)}")
    engines = [check_usable(name) for name in (backend, against)]
    devices = engines[0].devices if engines[0] is not None else ("cpu",)
    outcome = Outcome(case)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd K or fp16 input is meant here
            question.ask(_Asked(case, outcome, backend, against, "cpu" if "cpu" in devices else devices[0]))
    except _NoSuchThing as nothing:
        outcome.status, outcome.message = "no such thing", str(nothing)
    except BackendUnsupportedError as refusal:
        outcome.status, outcome.message = "refused", str(refusal)
    except AssertionError as difference:
        outcome.status, outcome.message = "differs", str(difference)
        outcome.hint = getattr(difference, "hint", "")
    except Exception as error:
        outcome.status, outcome.message = "differs", f"raised {type(error).__name__}: {error}"
    return outcome


class _ExplainedError(AssertionError):
    """A difference with the bug that would give it."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class _NoSuchThing(Exception):  # noqa: N818  (no error: an optional part is absent)
    """The backend does not have the optional part that a check is about."""


@dataclass
class _Asked:
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
        try:
            budget.check(got, what)
        except AssertionError as difference:
            raise _ExplainedError(str(difference), hint()) from None
        finite = budget.reference.isfinite()
        error = (got.double() - budget.oracle).abs()[finite]
        if error.numel():
            self.outcome.error = max(self.outcome.error, float((error / budget.allowed[finite]).max()))
            units = error / ulp(budget.oracle[finite], got.dtype)
            self.outcome.ulps += torch.bincount(
                torch.bucketize(units.cpu(), torch.tensor(ULP_EDGES, dtype=torch.float64)), minlength=5
            )

    def ran_here(self, t: Trace) -> None:
        """Every op of the trace was computed by the backend that was named."""
        ran = {op.backend for op in t.ops}
        if ran != {self.backend}:
            raise AssertionError(f"asked {self.backend!r}, but {sorted(ran) or 'nobody'} computed")


# --- one op -----------------------------------------------------------------------------------------------------------


def _quantize_4bit(asked: _Asked) -> None:
    case = asked.case
    allowed = case.weights == "not finite"
    wanted = codec.quantize_4bit(asked.W, case.blocksize, case.code, allowed, asked.against)
    with trace() as t:
        got = codec.quantize_4bit(asked.W, case.blocksize, case.code, allowed, asked.backend)
    asked.ran_here(t)
    assert_same_bits(_one_nan(got[1]), _one_nan(wanted[1]), "absmax")
    try:
        assert_same_bits(got[0], wanted[0], "packed bytes")
    except AssertionError as difference:
        where, hint = diagnose_quantised(got[0], wanted[0], asked.W, wanted[1], case)
        raise _ExplainedError(f"{difference}{where}", hint) from None


def _dequantize_4bit(asked: _Asked) -> None:
    B, state = asked.quantised()
    weight = state.packed_weight(B)
    wanted = codec.dequantize_4bit(weight, asked.case.torch_dtype, asked.against)
    with trace() as t:
        got = codec.dequantize_4bit(weight, asked.case.torch_dtype, asked.backend)
    asked.ran_here(t)
    assert_same_bits(_one_nan(got), _one_nan(wanted), "decoded weight")


def _quantize_blockwise(asked: _Asked) -> None:
    code = create_dynamic_map().to(asked.device)
    wanted = codec.quantize_blockwise(asked.W, code, asked.case.blocksize, asked.against)
    with trace() as t:
        got = codec.quantize_blockwise(asked.W, code, asked.case.blocksize, asked.backend)
    asked.ran_here(t)
    assert_same_bits(_one_nan(got[1]), _one_nan(wanted[1]), "absmax")
    assert_same_bits(got[0], wanted[0], "8-bit codes")


def _dequantize_blockwise(asked: _Asked) -> None:
    case, code = asked.case, create_dynamic_map().to(asked.device)
    q, absmax = codec.quantize_blockwise(asked.W, code, case.blocksize, asked.against)
    wanted = codec.dequantize_blockwise(q, absmax, code, case.blocksize, case.torch_dtype, asked.against)
    with trace() as t:
        got = codec.dequantize_blockwise(q, absmax, code, case.blocksize, case.torch_dtype, asked.backend)
    asked.ran_here(t)
    assert_same_bits(_one_nan(got), _one_nan(wanted), "decoded values")


def _product(asked: _Asked) -> None:
    case = asked.case
    B, state = asked.quantised()
    with trace() as t:
        got = dispatch.product(case.check, asked.x, state.packed_weight(B), asked.bias, asked.backend)
    asked.ran_here(t)
    budget = error_budget(asked.x, B, state, asked.bias, backend=asked.against)
    asked.product_within(budget, got, "product", lambda: diagnose_product(got, asked.x, B, state, asked.bias))


def _own_layout(asked: _Asked) -> None:
    B, state = asked.quantised()
    engine = check_usable(asked.backend)
    weight = state.packed_weight(B)
    prepared = engine.prepare_weight(weight) if engine is not None else None
    if engine is None or prepared is None:
        raise _NoSuchThing("it reads this weight in the canonical layout")
    with trace() as t:
        op = describe(asked.x, state, asked.x.dtype, gradient=False, own_layout=True)[1].op
        got = dispatch.product(op, asked.x, prepared, asked.bias, prepared.backend)
    asked.ran_here(t)
    budget = error_budget(asked.x, B, state, asked.bias, backend=asked.against)
    hint = lambda: diagnose_product(got, asked.x, B, state, asked.bias)  # noqa: E731
    asked.product_within(budget, got, "product on the prepared weight", hint)
    restored = engine.restore_weight(prepared)
    assert_same_bits(restored.packed, weight.packed, "packed bytes after prepare and restore")
    assert_same_bits(restored.absmax, weight.absmax, "absmax after prepare and restore")
    assert_same_bits(restored.code, weight.code, "code after prepare and restore")


# --- the pipeline -----------------------------------------------------------------------------------------------------


def _forward(asked: _Asked) -> None:
    layer = _layer(asked, asked.against)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    x = asked.x.clone()
    with torch.no_grad():
        with trace() as expected, use_backend(asked.against):
            reference = layer(asked.x)
        with trace() as t, use_backend(asked.backend):
            got = layer(asked.x)
    asked.ran_here(t)
    _same_decisions(t, expected)
    budget = error_budget(asked.x, layer.weight.stored(), layer.weight.quant_state, layer.bias, backend=asked.against)
    assert_same_bits(reference, budget.reference, "the judge's layer and its product")
    hint = lambda: diagnose_product(got, asked.x, layer.weight.stored(), layer.weight.quant_state, layer.bias)  # noqa: E731
    asked.product_within(budget, got, "layer's output", hint)
    assert_same_bits(asked.x.contiguous(), x.contiguous(), "the caller's activations afterwards")
    for key, value in layer.state_dict().items():
        assert_same_bits(_one_nan(value), _one_nan(before[key]), f"state dict entry {key!r} after inference")


def _same_decisions(got: Trace, expected: Trace) -> None:
    """Steps 2 (the layout) and 6 (the path, which follows from the layout) are the backend's; the others are not."""
    for mine, theirs in zip(got.calls[0].steps, expected.calls[0].steps, strict=True):
        if mine.number not in (2, 6) and mine.choice != theirs.choice:
            raise AssertionError(f"step {mine.number} ({mine.name}) chose {mine.choice!r}, wanted {theirs.choice!r}")


def _backward(asked: _Asked) -> None:
    B, state = asked.quantised()
    g = torch.randn(asked.case.m, asked.case.n, generator=torch.Generator().manual_seed(asked.case.seed + 1))
    g = g.to(asked.case.torch_dtype).to(asked.device)
    wanted = _gradients(asked, B, state, g, asked.against)
    with trace() as t:
        got = _gradients(asked, B, state, g, asked.backend)
    asked.ran_here(t)
    plain = state.copy()
    plain.dtype = torch.float32
    exact = [g.double() @ dequantize_4bit(B, plain, backend=asked.against).double(), g.double().sum(0)]
    for name, mine, theirs, true in zip(("grad_A", "grad_bias"), got, wanted, exact, strict=False):
        asked.product_within(Budget.of(true, theirs, theirs.dtype), mine, name, str)


def _gradients(asked: _Asked, B: Tensor, state: QuantState, g: Tensor, backend: str) -> list[Tensor]:
    x = asked.x.detach().clone().requires_grad_()
    bias = None if asked.bias is None else asked.bias.clone().requires_grad_()
    matmul_4bit(x, B, state, bias=bias, backend=backend).backward(g)  # type: ignore[no-untyped-call]
    return [t.grad for t in (x, bias) if t is not None and t.grad is not None]


def _state_dict(asked: _Asked) -> None:
    with trace() as t:
        layer = _layer(asked, asked.backend)
    asked.ran_here(t)
    wanted = _layer(asked, asked.against).state_dict()
    with torch.no_grad(), use_backend(asked.backend):
        first = layer(asked.x)
        saved = {key: value.clone() for key, value in layer.state_dict().items()}
        for key, value in wanted.items():
            assert_same_bits(_one_nan(saved[key]), _one_nan(value), f"state dict entry {key!r}")
        loaded = _empty_layer(asked).to(asked.device)
        loaded.load_state_dict(saved)
        assert_same_bits(_one_nan(loaded(asked.x)), _one_nan(first), "output of the reloaded layer")


def _embedding(asked: _Asked) -> None:
    case = asked.case
    table = nn.Embedding4bit(case.n, case.k, quant_type=case.code, quant_storage=getattr(torch, case.storage))
    table.weight.blocksize = case.blocksize
    table.weight.data = asked.W.cpu()
    with use_backend(asked.against):
        table.to(asked.device)
        ids = torch.arange(case.n, device=asked.device).flip(0)
        wanted = table(ids)
    with trace() as t, use_backend(asked.backend):
        got = table(ids)
    asked.ran_here(t)
    assert_same_bits(_one_nan(got), _one_nan(wanted), "rows")


def _empty_layer(asked: _Asked) -> nn.Linear4bit:
    case = asked.case
    layer = nn.Linear4bit(
        case.k,
        case.n,
        bias=case.bias,
        compute_dtype=case.torch_dtype,
        compress_statistics=case.nested,
        quant_type=case.code,
        quant_storage=getattr(torch, case.storage),
    )
    layer.weight.blocksize = case.blocksize
    return layer.eval()


def _layer(asked: _Asked, backend: str) -> nn.Linear4bit:
    layer = _empty_layer(asked)
    layer.weight.data = asked.W.cpu()
    if asked.bias is not None:
        layer.bias.data = asked.bias.cpu()
    with use_backend(backend):
        return layer.to(asked.device)


def _one_nan(values: Tensor) -> Tensor:
    """Replace every NaN by one bit pattern: which of the many comes out of arithmetic is not specified."""
    return (
        torch.where(values.isnan(), torch.full_like(values, float("nan")), values)
        if values.is_floating_point()
        else values
    )


@dataclass(frozen=True)
class Check:
    """A question: the function that asks it, the fields of a case it does not look at, and what it sums.

    ``sums`` says that products are formed, whose numbers must not leave the dtype's range; ``layers`` that a layer
    quantises the weight, which refuses NaN and infinities.
    """

    ask: Callable[[_Asked], None]
    ignores: tuple[str, ...] = ()
    sums: bool = False
    layers: bool = False


_NO_PRODUCT = ("m", "bias", "activations")

CHECKS = {
    "quantize_4bit": Check(_quantize_4bit, (*_NO_PRODUCT, "nested", "storage")),
    "dequantize_4bit": Check(_dequantize_4bit, (*_NO_PRODUCT, "storage")),
    "quantize_blockwise": Check(_quantize_blockwise, (*_NO_PRODUCT, "code", "nested", "storage")),
    "dequantize_blockwise": Check(_dequantize_blockwise, (*_NO_PRODUCT, "code", "nested", "storage")),
    "gemv_4bit": Check(_product, ("m", "storage"), sums=True),
    "gemm_4bit": Check(_product, ("storage",), sums=True),
    "own layout": Check(_own_layout, ("storage",), sums=True),
    "forward": Check(_forward, sums=True, layers=True),
    "backward": Check(_backward, ("storage",), sums=True),
    "state dict": Check(_state_dict, sums=True, layers=True),
    "embedding": Check(_embedding, (*_NO_PRODUCT, "nested"), layers=True),
}
"""What can be asked, by name: ``Case.check``, ``verify(checks=...)`` and ``--check`` take these names.

Example:
    >>> list(CHECKS)[:2]
    ['quantize_4bit', 'dequantize_4bit']
"""
