"""Two tools for one call: explain shows how exact it is and how many bytes it moves, compare whether backends agree."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backend import BackendError
from ..internals.shown import Shown
from ..nn import Linear4bit
from ..pipeline import linear_4bit, recover_quant_state
from ..registry import automatic_backends, backend_info, use_backend
from ..trace import StepRecord, Trace, trace

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

__all__ = ["Comparison", "Explanation", "compare", "explain"]


# --- explain ----------------------------------------------------------------------------------------------------------


@dataclass
class Explanation(Shown):
    """One call of a layer: its trace, its error against the fp64 oracle, and the bytes that it must move.

    Attributes:
        trace: the seven steps.
        error: the largest absolute error of the output. The oracle multiplies the same 4-bit weight: this is the
            rounding of the kernel, and of the casts where the compute dtype is not the input's; not what 4 bits cost
            a model.
        reference_error: the same for the reference backend in the input's dtype.
        allowed: the smallest allowance of the error budget over the outputs, in the input's dtype.
        largest_output: the largest magnitude of an output, to set the errors beside.
        bytes_moved: bytes by operand, the weight as it is stored: "weight", "scales", "input", "bias", "output".
        flops: 2 * M * N * K.

    Example:
        >>> import torch, refq4
        >>> report = refq4.explain(refq4.nn.LinearNF4(64, 8).to("cpu"), torch.ones(1, 64))
        >>> report.error <= report.allowed, len(report.trace.calls[0].steps)
        (True, 7)
    """

    trace: Trace
    error: float
    reference_error: float
    allowed: float
    largest_output: float
    bytes_moved: dict[str, int]
    flops: int

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return vars(self) | {"trace": self.trace.to_dict(), "bytes_moved": dict(self.bytes_moved)}

    def _parts(self) -> Iterator[RenderableType]:
        yield self.trace
        total = sum(self.bytes_moved.values())
        parts = ", ".join(f"{name} {size:,}" for name, size in self.bytes_moved.items() if size)
        yield (
            f"largest absolute error against fp64: {self.error:.3g}, of outputs up to {self.largest_output:.3g} "
            f"(reference: {self.reference_error:.3g}; the error budget allows each output {self.allowed:.3g} or more)"
        )
        what = "this is the rounding of the kernel alone"
        if any(step.number == 5 and step.choice == "cast" for call in self.trace.calls for step in call.steps):
            what = "this is the rounding of kernel and casts; those of the reference and the budget have no casts"
        yield f"both sides use the same 4-bit weight: {what}"
        yield "what 4 bits cost a model: python -m refq4 eval, python -m refq4 tour"
        yield f"bytes to move, as stored: {total:,} ({parts})"
        yield f"flops: {self.flops:,}, {self.flops / max(total, 1):.2f} a byte"


def explain(layer: Linear4bit, x: Tensor) -> Explanation:
    """Run a layer and report its steps, its error against the fp64 oracle and the bytes that it moves.

    The call that is reported is the second one. The first may compile kernels, choose between them and rearrange the
    weight, which can take thousands of times as long. The layer then forgets it, so step 4 decides as in a first call.

    Args:
        layer: a quantised layer of weight [N, K].
        x: [..., K].

    Returns:
        An :class:`Explanation`; print it, or let Jupyter show it.

    Raises:
        What the layer's forward raises.

    Example:
        >>> import torch, refq4
        >>> report = refq4.explain(refq4.nn.LinearNF4(64, 8).to("cpu"), torch.randn(1, 64))
        >>> report.flops, report.bytes_moved["weight"]
        (1024, 256)
    """
    from ..testing.budget import error_budget  # here: the kit is a third of what importing refq4 would take

    _warm_up(layer, x)
    with torch.no_grad(), trace() as steps:
        y = layer(x)
    state, _ = recover_quant_state(layer)
    budget = error_budget(x, layer.weight, state, layer.bias)
    worst, reference = (_largest(result.double() - budget.oracle) for result in (y, budget.reference))
    weight = state.packed_weight(layer.weight)
    sizes = {
        "weight": weight.packed.numel(),
        "scales": state.nbytes(),
        "input": x.numel() * x.itemsize,
        "bias": 0 if layer.bias is None else layer.bias.numel() * layer.bias.itemsize,
        "output": y.numel() * y.itemsize,
    }
    allowed = float(budget.allowed.min()) if y.numel() else 0.0
    flops = 2 * y.numel() * layer.in_features
    return Explanation(steps, worst, reference, allowed, _largest(budget.oracle), sizes, flops)


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _warm_up(layer: Linear4bit, x: Tensor) -> None:
    """Run a layer without its hooks, and let it forget that it did: the next call still is its first one in step 4."""
    names = ("compute_dtype", "compute_type_is_set", "awaits_first_input")
    before = [getattr(layer, name) for name in names]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the next call warns
            linear_4bit(layer, x)
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(layer, name, value)


# --- compare ----------------------------------------------------------------------------------------------------------


@dataclass
class Comparison(Shown):
    """The same call on several backends, step by step.

    Attributes:
        backends: in the order of the comparison; the others are compared with the first.
        traces: backend -> its trace, with each step's tensor.
        results: backend -> the call's result.
        errors: backend -> why it could not run the call.
        first_difference: backend -> (call, step) of the first step whose bits differ from the first backend's.
        names: call -> the name of its layer, where a model was compared.

    Example:
        >>> import torch, refq4
        >>> layer = refq4.nn.LinearNF4(64, 8).to("cpu")
        >>> report = refq4.compare(layer, torch.ones(2, 64), backends=["reference", "reference"])
        >>> report.first_difference, report.largest_difference("reference")
        ({}, 0.0)
    """

    backends: list[str]
    traces: dict[str, Trace] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    first_difference: dict[str, tuple[int, int]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)

    def largest_difference(self, backend: str) -> float:
        """The largest absolute difference of a backend's result from the first backend's (inf if shapes differ)."""
        return _difference(self.results[self.backends[0]], self.results[backend])

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain data."""
        ran = [name for name in self.backends if name in self.results]
        return {
            "backends": self.backends,
            "errors": dict(self.errors),
            "names": {str(call): name for call, name in self.names.items()},
            "first_difference": {name: list(at) for name, at in self.first_difference.items()},
            "largest_difference": {name: self.largest_difference(name) for name in ran},
            "traces": {name: self.traces[name].to_dict() for name in ran},
        }

    def _parts(self) -> Iterator[RenderableType]:
        from rich.table import Table

        first, ran = self.backends[0], [name for name in self.backends if name in self.results]
        table = Table(title=f"compared with {first}", title_justify="left", title_style="bold")
        table.add_column("step", overflow="fold")
        for name in ran:
            table.add_column(name, overflow="fold")
        calls = self.traces[first].calls
        unfolded = {call for call, _ in self.first_difference.values()} if len(calls) > 1 else {0}
        for c, call in enumerate(calls):
            if len(calls) > 1:
                table.add_row(self.names.get(c, call.title), *[self._folded(name, c) for name in ran])
            if c not in unfolded:
                continue
            for s, step in enumerate(call.steps):
                table.add_row(f"{step.number} {step.name}", *[self._cell(name, c, s) for name in ran])
        yield table
        for name in ran[1:]:
            yield f"{name}: largest difference of the result {self.largest_difference(name):.3g}"
        for name, why in self.errors.items():
            yield f"{name}: could not run it: {why}"

    def _folded(self, backend: str, call: int) -> str:
        """One call on one backend, in a word or two: how far its steps are from the first backend's."""
        steps = zip(self.traces[self.backends[0]].calls[call].steps, range(7), strict=False)
        gaps = [_gap(step, _step(self.traces[backend], call, s)) for step, s in steps]
        return f"differs by {max(gaps):.3g}" if any(gaps) else "the same bits"

    def _cell(self, backend: str, call: int, step: int) -> Text:
        from ..internals.verbatim import words

        mine = _step(self.traces[backend], call, step)
        if mine is None:
            return words(("no such step", "bold"))
        ran = "".join(f" ({op.backend}: {op.kernel})" for op in mine.ops)
        if self.first_difference.get(backend) == (call, step):
            theirs = _step(self.traces[self.backends[0]], call, step)
            by = _difference(theirs.value, mine.value) if theirs is not None else math.inf
            return words((f"first difference, {by:.3g}", "bold red"), f": {mine.choice}{ran}")
        return words(f"{mine.choice}{ran}")


def compare(fn: Callable[..., Any], *args: Any, backends: Iterable[str] | None = None) -> Comparison:
    """Run the same call on several backends and mark the first step that differs.

    Args:
        fn: a layer, a model, or any function that ends in refq4 calls; called as ``fn(*args)`` under each backend.
        backends: names; by default "reference" and every available one that "auto" may use. The others are compared
            with the first.

    Returns:
        A :class:`Comparison`; a backend that can't run the call is listed with its reason.

    Raises:
        UnknownBackendError: a name is unknown.
        ValueError: the first backend can't run the call.

    Example:
        >>> import torch, refq4
        >>> layer = refq4.nn.LinearNF4(64, 8).to("cpu").eval()
        >>> refq4.compare(layer, torch.randn(3, 64), backends=["reference", "auto"]).backends
        ['reference', 'auto']
    """
    if backends is None:
        others = [name for name in automatic_backends() if name != "reference" and backend_info(name)["available"]]
        backends = ["reference", *others]
    comparison = Comparison(list(backends))
    for name in comparison.backends:
        try:
            with torch.no_grad(), use_backend(name), trace(keep_values=True) as steps, _named(fn, steps, comparison):
                comparison.results[name] = fn(*args)
            comparison.traces[name] = steps
        except BackendError as error:
            if isinstance(error, ValueError):  # an unknown name is the caller's mistake
                raise
            comparison.errors[name] = str(error)
    first = comparison.backends[0]
    if first in comparison.errors:
        raise ValueError(f"backend {first!r}, which the others are held to, can't run this: {comparison.errors[first]}")
    for name in comparison.results:
        at = _first_difference(comparison.traces[first], comparison.traces[name])
        if at is not None:
            comparison.first_difference[name] = at
    return comparison


@contextmanager
def _named(fn: Callable[..., Any], steps: Trace, comparison: Comparison) -> Iterator[None]:
    """While a model runs, note which layer each call of the trace belongs to."""
    handles = []
    for name, module in fn.named_modules() if isinstance(fn, torch.nn.Module) else ():
        if isinstance(module, Linear4bit) and name:

            def note(*_: Any, name: str = name) -> None:
                comparison.names[len(steps.calls)] = name

            handles.append(module.register_forward_pre_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gap(wanted: StepRecord, got: StepRecord | None) -> float:
    return math.inf if got is None else _difference(wanted.value, got.value)


def _first_difference(wanted: Trace, got: Trace) -> tuple[int, int] | None:
    for c, call in enumerate(wanted.calls):
        for s, step in enumerate(call.steps):
            if _gap(step, _step(got, c, s)) != 0:
                return c, s
    return None


def _step(steps: Trace, call: int, step: int) -> StepRecord | None:
    if call >= len(steps.calls) or step >= len(steps.calls[call].steps):
        return None
    return steps.calls[call].steps[step]


def _difference(wanted: Any, got: Any) -> float:
    """The largest absolute difference of two tensors; 0 where both are none, inf where they can't be subtracted."""
    if not isinstance(wanted, Tensor) or not isinstance(got, Tensor):
        return 0.0 if type(wanted) is type(got) else math.inf
    if wanted.shape != got.shape or wanted.dtype != got.dtype:
        return math.inf
    same = (wanted == got) | (wanted.isnan() & got.isnan())
    gap = (wanted.double() - got.double()).abs().masked_fill(same, 0.0).nan_to_num(nan=math.inf)
    return float(gap.max()) if gap.numel() else 0.0
