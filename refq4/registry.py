"""Choose a backend, find the one that runs a call, say why, and let it run.

A backend can be chosen in five places; the first that is set is used:

    backend="cpu" on the call  >  with use_backend("cpu")  >  set_backend("cpu")  >  REFQ4_BACKEND=cpu  >  "auto"

A backend chosen by name is strict: a call that it can't run raises an error. "auto" asks each available backend in
order of priority whether it can run the call, and uses the first that can; the reference is last and can run every
call. "auto" never uses a backend of negative priority. Availability is checked only when it is needed: listing
backends, or a call on the CPU, starts no driver of another device.

Backends are found through the entry-point group ``refq4.backends`` (and :func:`register_backend`). One that fails
to import is listed with its error, and the others work. That part is in ``refq4/internals/discovery.py``; its
public names are imported from here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ContextDecorator
from contextvars import ContextVar
from typing import Any

import torch

from .backend import BackendUnavailableError, BackendUnsupportedError, Call, UnknownBackendError
from .internals.discovery import (
    AUTO,
    Resolved,
    automatic_backends,
    backend_info,
    by_priority,
    check_usable,
    entries,
    find,
    list_backends,
    not_installed,
    register_backend,
    unregister_backend,
)
from .trace import OpRecord, current

__all__ = [
    "AUTO",
    "ENVIRONMENT_VARIABLE",
    "Resolved",
    "automatic_backends",
    "backend_info",
    "check_usable",
    "get_backend",
    "list_backends",
    "register_backend",
    "requested_backend",
    "resolve",
    "run_op",
    "set_backend",
    "unregister_backend",
    "use_backend",
]

ENVIRONMENT_VARIABLE = "REFQ4_BACKEND"

_chosen: str | None = None  # set_backend
_scoped: ContextVar[str | None] = ContextVar("refq4_backend", default=None)  # use_backend
# Dynamo can't trace ContextVar.get, so the choice in effect is mirrored here and read only while compiling.
_while_compiling: str = AUTO


# --- choosing -------------------------------------------------------------------------------------------------------


def set_backend(name: str) -> None:
    """Choose the backend for the whole process.

    Args:
        name: a name from :func:`list_backends`, or "auto".

    Raises:
        UnknownBackendError: no such backend; the message suggests the nearest name.
        BackendUnavailableError: it can't work on this machine; the message says why and what to do.

    Example:
        >>> import refq4
        >>> refq4.set_backend("reference")
        >>> refq4.get_backend()
        'reference'
        >>> refq4.set_backend("auto")
    """
    check_usable(name)
    choose(name)


def choose(name: str | None) -> str | None:
    """Take that choice for the process without a look at it, or none; returns the one before."""
    global _chosen
    before, _chosen = _chosen, name
    _mirror()
    return before


class use_backend(ContextDecorator):  # noqa: N801  (reads as a verb: with use_backend("cpu"), @use_backend("cpu"))
    """Choose the backend for a ``with`` block or a decorated function.

    The choice is valid for this thread or asyncio task only: a new thread starts without it. It can be nested.
    One limit: a graph that another thread compiles in the block may get this choice (``backend=`` is exact).

    Args:
        name: as for :func:`set_backend`, and the same errors.

    Example:
        >>> import refq4
        >>> with refq4.use_backend("reference"):
        ...     refq4.get_backend()
        'reference'
    """

    def __init__(self, name: str) -> None:
        check_usable(name)
        self.name = name
        self._tokens: list[Any] = []

    def __enter__(self) -> use_backend:
        self._tokens.append(_scoped.set(self.name))
        _mirror()
        return self

    def __exit__(self, *exc: object) -> None:
        _scoped.reset(self._tokens.pop())
        _mirror()

    def _recreate_cm(self) -> use_backend:
        return use_backend(self.name)


def get_backend() -> str:
    """Return the choice in effect here: a backend's name or "auto".

    Raises:
        UnknownBackendError, BackendUnavailableError: ``REFQ4_BACKEND`` is in effect and names one that can't be used.

    Example:
        >>> import refq4
        >>> with refq4.use_backend("reference"):
        ...     refq4.get_backend()
        'reference'
    """
    return requested_backend(None)


def requested_backend(backend: str | None) -> str:
    """The choice for one call: ``backend`` if given, else the one in effect."""
    if backend is not None:
        return backend
    return _while_compiling if torch.compiler.is_compiling() else choice_in_effect()


def choice_in_effect() -> str:
    """The choice that holds here: of the block, of the process, of the environment, or "auto"."""
    scoped = _scoped.get()
    if scoped is not None:
        return scoped
    return _chosen if _chosen is not None else _from_environment()


def _from_environment() -> str:
    if ENVIRONMENT_VARIABLE not in os.environ:  # asked in every call: get() would raise and catch two errors first
        return AUTO
    name = os.environ[ENVIRONMENT_VARIABLE] or AUTO
    try:
        check_usable(name)
    except (UnknownBackendError, BackendUnavailableError) as error:
        raise type(error)(f"the environment variable {ENVIRONMENT_VARIABLE}={name!r}: {error}") from None
    return name


def _mirror() -> None:
    global _while_compiling
    _while_compiling = _scoped.get() or _chosen or os.environ.get(ENVIRONMENT_VARIABLE) or AUTO


_mirror()


def resolve(call: Call, requested: str) -> Resolved:
    """Find the backend that runs a call.

    Raises:
        UnknownBackendError, BackendUnavailableError: as :func:`set_backend`.
        BackendUnsupportedError: the backend asked for by name can't run this call.
    """
    if requested != AUTO:
        entry = entries[requested] if requested in entries else find(requested)
        found = entry.ready or entry.usable()
        reason = found.backend.can_run(call)
        if reason is not None:
            raise BackendUnsupportedError(
                f"backend {requested!r} can't run {call}: {reason}. "
                f'What would work: backend="auto" or "reference", which take every call.'
            )
        return found
    passed_over: list[tuple[str, str]] = []
    for entry in by_priority():
        if entry.only_by_name:
            continue
        reason = entry.refusal(call)
        if reason is None and entry.backend is not None:
            return Resolved(entry.backend, passed_over)
        passed_over.append((entry.name, str(reason)))
    if not entries:
        raise BackendUnavailableError(not_installed())
    raise BackendUnsupportedError(f"no backend can run {call}: " + "; ".join(f"{n}: {r}" for n, r in passed_over))


def run_op(describe: Callable[[], Call], backend: str | Resolved, op: str, *operands: Any) -> Any:
    """Let the backend compute, and tell the trace; an error in the middle says whose it was.

    The operands have been checked: refq4/internals/dispatch.py.
    """
    found = resolve(describe(), backend) if isinstance(backend, str) else backend
    listener = current()
    start = time.perf_counter_ns() if listener is not None else 0
    try:
        result = getattr(found.backend, op)(*operands)
    except Exception as error:
        error.add_note(f"raised while backend {found.backend.name!r} ran {describe()}")
        raise
    if listener is not None:
        micros, call = (time.perf_counter_ns() - start) / 1e3, describe()
        name, kernel = found.backend.name, found.backend.kernel(call)
        listener.ops.append(OpRecord(call.op, name, kernel, str(call), list(found.passed_over), micros))
    return result
