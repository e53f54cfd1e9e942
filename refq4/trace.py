"""What happened in this call, step by step, and why.

    with refq4.trace() as t:          every call inside is recorded
        layer(x)
    print(t)                          a table; in Jupyter, the last line of a cell shows it as HTML

A call asks :func:`recorder` for its ``step(number, value, decision)``, which returns the value, and records it while a
trace is active. Code under ``torch.compile`` is not traced (its graph has no steps); run the same layer eagerly to see
them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .internals.shown import Shown

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["CallRecord", "Decision", "OpRecord", "StepRecord", "Trace", "current", "recorder", "trace"]

STEPS = (
    "embedding rows",
    "recover the quant state",
    "ask for the backend's layout",
    "bias dtype",
    "compute dtype",
    "cast the operands",
    "dispatch to matmul_4bit",
    "cast back",
)
T = TypeVar("T")


class Decision(NamedTuple):
    """What a step chose, and why: constants, so that the list of all possible decisions can be read in the code.

    Example:
        >>> from refq4.pipeline import BIAS_NONE
        >>> BIAS_NONE.choice, BIAS_NONE.why
        ('none', 'the layer has no bias')
    """

    choice: str
    why: str


@dataclass
class OpRecord:
    """One op that a backend ran: its name, its call, the backend, and the backends that were not used, and why.

    Example:
        >>> import torch, refq4
        >>> with refq4.trace() as t:
        ...     _ = refq4.functional.quantize_nf4(torch.ones(64), backend="reference")
        >>> t.ops[0].op, t.ops[0].backend, t.ops[0].kernel
        ('quantize_4bit', 'reference', 'PyTorch')
    """

    op: str
    backend: str
    kernel: str
    call: str
    passed_over: list[tuple[str, str]]
    micros: float


@dataclass
class StepRecord:
    """One step of the pipeline.

    Example:
        >>> import torch, refq4
        >>> with refq4.trace() as t:
        ...     _ = refq4.nn.LinearNF4(64, 8, bias=False).to("cpu")(torch.ones(2, 64))
        >>> step = t.calls[0].steps[2]
        >>> step.number, step.name, step.choice, step.why
        (3, 'bias dtype', 'none', 'the layer has no bias')
    """

    number: int
    name: str
    choice: str
    why: str
    result: str
    micros: float
    ops: list[OpRecord] = field(default_factory=list)
    value: Tensor | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The step as plain data, without the tensor."""
        plain = {key: value for key, value in vars(self).items() if key != "value"}
        return plain | {"ops": [asdict(op) for op in self.ops]}


@dataclass
class CallRecord:
    """One call: its steps in order.

    Example:
        >>> import torch, refq4
        >>> with refq4.trace() as t:
        ...     _ = refq4.nn.LinearNF4(64, 8).to("cpu")(torch.ones(2, 64))
        >>> t.calls[0].title, len(t.calls[0].steps)
        ('LinearNF4.forward(x float32 [2, 64])', 7)
    """

    title: str
    steps: list[StepRecord] = field(default_factory=list)


class Trace(Shown):
    """The calls recorded inside a ``with trace():`` block. Prints as a table, and is shown as HTML in Jupyter.

    Attributes:
        calls: the calls in order.
        ops: the ops in order: those of the calls, and those that ran outside of any.

    Example:
        >>> import torch, refq4
        >>> with refq4.trace() as t:
        ...     _ = refq4.nn.LinearNF4(64, 8).to("cpu")(torch.ones(1, 64))
        >>> [step.choice for step in t.calls[0].steps][:3]
        ['kept', 'canonical', 'kept']
        >>> print(t.text(width=80).splitlines()[0].strip())
        LinearNF4.forward(x float32 [1, 64])
    """

    def __init__(self, keep_values: bool = False) -> None:
        self.calls: list[CallRecord] = []
        self.ops: list[OpRecord] = []
        self._keep_values = keep_values

    def begin(self, title: str) -> Step:
        """A call begins: give what records its steps, each with the ops that a backend has run since the one before."""
        call = CallRecord(title)
        self.calls.append(call)
        told, mark = len(self.ops), time.perf_counter_ns()

        def step(number: int, value: T, decision: Decision) -> T:
            nonlocal told, mark
            micros = (time.perf_counter_ns() - mark) / 1e3
            tensor = value[0] if isinstance(value, tuple) else value
            kept = tensor.detach().clone() if self._keep_values and isinstance(tensor, Tensor) else None
            name, ops = STEPS[number], self.ops[told:]
            call.steps.append(StepRecord(number, name, decision.choice, decision.why, show(value), micros, ops, kept))
            told, mark = len(self.ops), time.perf_counter_ns()
            return value

        return step

    def to_dict(self) -> dict[str, Any]:
        """The trace as plain data: ``{"calls": [{"title": ..., "steps": [...]}], "ops": [...]}``."""
        calls = [{"title": call.title, "steps": [step.to_dict() for step in call.steps]} for call in self.calls]
        return {"calls": calls, "ops": [asdict(op) for op in self.ops]}

    def _parts(self) -> Iterator[RenderableType]:
        """One table per call."""
        from rich.table import Table

        for call in self.calls:
            table = Table(title=call.title, title_justify="left", title_style="bold", show_lines=True)
            for column in ("step", "decision", "because", "gives"):
                table.add_column(column, overflow="fold")
            table.add_column("µs", justify="right")
            for step in call.steps:
                label = f"{step.number} {step.name}" if step.number else step.name
                table.add_row(label, step.choice, step.why, step.result, f"{step.micros:.0f}")
                for op in step.ops:
                    over = "".join(f"\n  passed over {name}: {why}" for name, why in op.passed_over)
                    table.add_row("", f"→ {op.op}", f"{op.backend}: {op.kernel}{over}", op.call, f"{op.micros:.0f}")
            yield table
        if not self.calls:
            yield "(no call was recorded: compiled code is not traced)"


class trace:  # noqa: N801  (reads as a verb: with trace() as t)
    """Record every refq4 call of this thread inside the ``with`` block.

    Args:
        keep_values: keep a copy of each step's tensor (``compare`` uses it).

    Example:
        >>> import torch, refq4
        >>> layer = refq4.nn.LinearNF4(64, 8).to("cpu")
        >>> with refq4.trace() as t:
        ...     _ = layer(torch.randn(1, 64))
        >>> [step.number for step in t.calls[0].steps]
        [1, 2, 3, 4, 5, 6, 7]
        >>> t.calls[0].steps[5].choice
        'gemv_4bit'
    """

    def __init__(self, keep_values: bool = False) -> None:
        self._keep_values = keep_values

    def __enter__(self) -> Trace:
        global _listeners
        recorder = Trace(self._keep_values)
        self._token = _recorder.set(recorder)
        with _lock:
            _listeners += 1
        return recorder

    def __exit__(self, *exc: object) -> None:
        global _listeners
        with _lock:
            _listeners -= 1
        _recorder.reset(self._token)


_recorder: ContextVar[Trace | None] = ContextVar("refq4_trace", default=None)
_listeners = 0  # in all threads
_lock = threading.Lock()


def current() -> Trace | None:
    """Return the active trace of this thread, or None. Without a trace this is one comparison.

    Example:
        >>> current() is None
        True
        >>> with trace() as t:
        ...     current() is t
        True
    """
    if _listeners == 0 or torch.compiler.is_compiling():
        return None
    return _recorder.get()


class Step(Protocol):
    """``step(number, value, decision)``: records one step of a call, and gives its value back."""

    def __call__(self, number: int, value: T, decision: Decision, /) -> T: ...


def recorder(call: object, x: Tensor) -> Step:
    """Return the function that records the steps of one call; without a trace it only returns their values.

    Args:
        call: the layer that is called, or the name of the function.
        x: its input.

    Example:
        >>> from refq4.pipeline import BIAS_NONE
        >>> step = recorder("linear", torch.ones(2, 64))
        >>> step(3, None, BIAS_NONE) is None
        True
    """
    listener = current()
    if listener is None:
        return _hand_on
    name = call if isinstance(call, str) else f"{type(call).__name__}.forward"
    return listener.begin(f"{name}(x {show(x)})")


def _hand_on(number: int, value: T, decision: Decision) -> T:
    return value


def show(value: object) -> str:
    """A tensor as dtype and shape, anything else as itself, short."""
    if type(value) is tuple:
        return ", ".join(show(part) for part in value if part is not None)
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return "-" if value is None else repr(value)
