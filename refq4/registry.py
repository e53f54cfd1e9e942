"""Finding backends, choosing one, saying why.

The choice goes through five places; the first that says something wins:

    backend="cpu" on the call  >  with use_backend("cpu")  >  set_backend("cpu")  >  REFQ4_BACKEND=cpu  >  "auto"

A backend chosen by name is strict: what it can't do raises. "auto" asks each available backend in order of priority
whether it can run the call and takes the first that can; the reference stands last and can run everything. "auto"
never asks a backend of negative priority, which is chosen by name only. Availability is checked when it is needed and
not before: listing backends, or a call on the CPU, starts no driver of another device.

Backends are found through the entry-point group ``refq4.backends`` (and :func:`register_backend`). One that fails
to import is listed with its error and disturbs nothing else.
"""

from __future__ import annotations

import difflib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ContextDecorator, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

import torch

from .backend import (
    OPS,
    Backend,
    BackendUnavailableError,
    BackendUnsupportedError,
    Call,
    UnknownBackendError,
)
from .internals import remedies

__all__ = [
    "automatic_backends",
    "backend_info",
    "get_backend",
    "list_backends",
    "register_backend",
    "requested_backend",
    "resolve",
    "set_backend",
    "use_backend",
]

ENTRY_POINT_GROUP = "refq4.backends"
ENVIRONMENT_VARIABLE = "REFQ4_BACKEND"
AUTO = "auto"


@dataclass
class _Entry:
    """What the registry knows of one backend: where it came from, and the instance or the reason there is none."""

    name: str
    found_in: str
    entry_point: EntryPoint | None = None
    backend: Backend | None = None
    problem: str | None = None
    checked: bool = field(default=False)

    @property
    def only_by_name(self) -> bool:
        """Whether "auto" leaves it alone."""
        return self.backend is not None and self.backend.priority < 0

    def awaits(self, backend: Backend) -> bool:
        """Whether this is what the entry point would make, from a module that also registers it when imported."""
        if self.backend is not None or self.problem is not None or self.entry_point is None:
            return False
        named: Any = sys.modules.get(self.entry_point.module)
        for part in self.entry_point.attr.split("."):
            named = getattr(named, part, None)
        return named is type(backend)

    def imported(self) -> Backend | None:
        """The instance, not yet asked whether it is available; None (with ``problem`` set) if importing it failed."""
        if self.backend is None and self.problem is None and self.entry_point is not None:
            try:
                kind = self.entry_point.load()
                self.backend = self.backend or kind()  # the module may have registered its own instance meanwhile
            except Exception as error:
                self.problem = f"importing it failed: {type(error).__name__}: {error}"
        return self.backend

    def load(self) -> Backend | None:
        """The instance, imported and asked for availability once; None (with ``problem`` set) if that failed."""
        if self.checked:
            return None if self.problem else self.backend
        if self.imported() is not None:
            assert self.backend is not None
            try:
                self.problem = self.backend.available()
            except Exception as error:
                self.problem = f"asking whether it is available failed: {type(error).__name__}: {error}"
        self.checked = True
        return None if self.problem else self.backend


_lock = threading.RLock()
_entries: dict[str, _Entry] | None = None
_ordered: list[_Entry] | None = None  # _by_priority, until the registry changes
_chosen: str | None = None  # set_backend
_scoped: ContextVar[str | None] = ContextVar("refq4_backend", default=None)  # use_backend
# Dynamo can't trace ContextVar.get, so the choice in effect is mirrored here and read only while compiling.
_while_compiling: str = AUTO


def _registry() -> dict[str, _Entry]:
    global _entries
    with _lock:
        if _entries is None:
            _entries = {
                point.name: _Entry(point.name, f"entry point {point.value}", entry_point=point)
                for point in entry_points(group=ENTRY_POINT_GROUP)
            }
        return _entries


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
    global _chosen
    check_usable(name)
    _chosen = name
    _mirror()


class use_backend(ContextDecorator):  # noqa: N801  (reads as a verb: with use_backend("cpu"), @use_backend("cpu"))
    """Choose the backend for a ``with`` block or a decorated function.

    It holds for this thread or asyncio task only: a new thread starts without it. The choice can be nested. One limit:
    a graph that another thread compiles during the block may be compiled for this choice (``backend=`` is exact).

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
    """The name of the choice in effect here: a backend's name or "auto".

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
    name = os.environ[ENVIRONMENT_VARIABLE]
    if not name or name == AUTO:
        return AUTO
    try:
        check_usable(name)
    except (UnknownBackendError, BackendUnavailableError) as error:
        raise type(error)(f"the environment variable {ENVIRONMENT_VARIABLE}={name!r}: {error}") from None
    return name


def _mirror() -> None:
    global _while_compiling
    _while_compiling = _scoped.get() or _chosen or os.environ.get(ENVIRONMENT_VARIABLE) or AUTO


_mirror()


class Resolved(NamedTuple):
    """The backend that runs a call, and who was passed over for it with the reason."""

    backend: Backend
    passed_over: Sequence[tuple[str, str]] = ()


def resolve(call: Call, requested: str) -> Resolved:
    """Find the backend that runs a call.

    Raises:
        UnknownBackendError, BackendUnavailableError: as :func:`set_backend`.
        BackendUnsupportedError: the backend asked for by name can't run this call.
    """
    if requested != AUTO:
        found = _ready[requested] if requested in _ready else _make_ready(requested)
        reason = found.backend.can_run(call)
        if reason is not None:
            raise BackendUnsupportedError(
                f"backend {requested!r} can't run {call}: {reason}. "
                f'What would work: backend="auto" or "reference", which take every call.'
            )
        return found
    passed_over: list[tuple[str, str]] = []
    for entry in _by_priority():
        if entry.only_by_name:
            continue
        backend, reason = _for_call(entry, call)
        if backend is not None and reason is None:
            return Resolved(backend, passed_over)
        passed_over.append((entry.name, str(reason)))
    if not _registry():
        raise BackendUnavailableError(_not_installed())
    raise BackendUnsupportedError(f"no backend can run {call}: " + "; ".join(f"{n}: {r}" for n, r in passed_over))


_ready: dict[str, Resolved] = {}  # the backends that were named and can work, until the registry changes


def _make_ready(name: str) -> Resolved:
    backend = check_usable(name)
    assert backend is not None
    _ready[name] = Resolved(backend)
    return _ready[name]


def _for_call(entry: _Entry, call: Call) -> tuple[Backend | None, str | None]:
    """The backend and why it can't run the call; the device first, since asking for availability may start a driver."""
    backend = entry.imported()
    if backend is not None and (reason := backend.wrong_device(call)) is not None:
        return backend, reason
    backend = entry.load()
    return backend, entry.problem if backend is None else backend.can_run(call)


def check_usable(name: str) -> Backend | None:
    """The backend of that name, ready to use (None for "auto"); raises what :func:`set_backend` documents."""
    if name == AUTO:
        return None
    entries = _entries or _registry()
    entry = entries.get(name) if type(name) is str else None
    if entry is None:
        if not entries:
            raise UnknownBackendError(f"unknown backend {name!r}: {_not_installed()}")
        near = difflib.get_close_matches(str(name), [*entries, AUTO], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join([*sorted(entries), AUTO])
        raise UnknownBackendError(f"unknown backend {name!r}.{hint} Known: {known}. {_HOW_KNOWN}")
    backend = entry.load()
    if backend is None:
        raise BackendUnavailableError(f"backend {name!r} is not available: {entry.problem}")
    return backend


def _not_installed() -> str:
    return (
        "no backends are registered, because refq4 itself is not installed (they are found through its metadata). "
        f"Run: {remedies.install()}"
    )


_HOW_KNOWN = (
    f"A backend becomes known by refq4.register_backend(...) in the script or by an entry point in the group "
    f"{ENTRY_POINT_GROUP!r}; for one that a file registers: refq4 verify --import file.py, pytest -p module"
)


def is_installed(name: str) -> bool:
    """Whether every process finds this backend by itself: through an entry point."""
    entry = _registry().get(name)
    return entry is not None and entry.entry_point is not None


def _by_priority() -> list[_Entry]:
    """All entries, highest priority first; one that failed to load goes by name, where its reason is still told."""
    global _ordered
    if _ordered is None:
        for entry in list(_registry().values()):  # a module may register further backends when it is imported
            entry.imported()
        _ordered = sorted(_registry().values(), key=lambda e: (-(e.backend.priority if e.backend else 1), e.name))
    return _ordered


# --- finding --------------------------------------------------------------------------------------------------------


def register_backend(backend: Backend, *, replace: bool = False) -> Backend:
    """Make a backend known that is not installed as an entry point (one written in a notebook, say).

    Args:
        backend: an instance of a :class:`refq4.backend.Backend` subclass with a ``name``.
        replace: allow taking over a name that is registered.

    Returns:
        The backend, so that a definition can be wrapped.

    Raises:
        TypeError: not a Backend instance.
        ValueError: no usable name, or the name is taken and ``replace`` is not set. (The class that an entry point of
            that name stands for may register itself when its module is imported: it is the same backend.)

    Example:
        >>> import refq4
        >>> from refq4.reference import ReferenceBackend
        >>> class Mine(ReferenceBackend):
        ...     name = "mine"
        >>> _ = refq4.register_backend(Mine(), replace=True)
        >>> "mine" in refq4.list_backends()
        True
        >>> refq4.unregister_backend("mine")
    """
    global _ordered
    if not isinstance(backend, Backend):
        raise TypeError(f"register_backend wants an instance of refq4.backend.Backend, got {backend!r}")
    if not backend.name or backend.name == AUTO:
        raise ValueError(f"a backend needs a name other than {AUTO!r}, got {backend.name!r}")
    with _lock:
        known = _registry().get(backend.name)
        if known is not None and not replace:
            if not known.awaits(backend):
                raise ValueError(_taken(known))
            known.backend = backend
        else:
            where = f"{type(backend).__module__}.{type(backend).__qualname__}"
            _registry()[backend.name] = _Entry(backend.name, f"register_backend({where})", backend=backend)
        _ordered = None
        _ready.clear()
    return backend


def _taken(known: _Entry) -> str:
    if known.entry_point is None:
        return f"backend {known.name!r} is registered already; pass replace=True to replace it"
    return (
        f"backend {known.name!r} is registered already, by the {known.found_in}; drop one of the two (an entry point "
        f"needs no register_backend), or pass replace=True to replace it"
    )


def unregister_backend(name: str) -> None:
    """Forget a backend. Raises UnknownBackendError if there is none of that name.

    Example:
        >>> import refq4
        >>> _ = refq4.register_backend(type("Mine", (Backend,), {"name": "mine"})())
        >>> refq4.unregister_backend("mine")
        >>> "mine" in refq4.list_backends()
        False
    """
    global _ordered
    with _lock:
        if _registry().pop(name, None) is None:
            raise UnknownBackendError(f"unknown backend {name!r}; known: {', '.join(sorted(_registry()))}")
        _ordered = None
        _ready.clear()


def list_backends() -> list[str]:
    """The names of all backends, available or not, the one "auto" tries first at the front.

    Those that "auto" never takes (negative priority) come last, after the reference.

    Example:
        >>> import refq4
        >>> "reference" in refq4.list_backends()
        True
    """
    return [entry.name for entry in _by_priority()]


def registered() -> list[tuple[str, Backend | None]]:
    """Every name with the backend that stands for it, if that has been imported: what registering one changes."""
    return [(entry.name, entry.backend) for entry in _registry().values()]


def automatic_backends() -> list[str]:
    """Of those, the ones that "auto" may take, available or not: what "all backends" means where each costs time."""
    return [entry.name for entry in _by_priority() if not entry.only_by_name]


def backend_info(name: str) -> dict[str, Any]:
    """What is known of one backend.

    Returns:
        A dict: ``name``, ``available`` (bool), ``reason`` (None, or why not and the remedy), ``found_in``,
        ``priority``, ``devices``, ``ops`` (those it implements), ``description``, and what the backend adds (tiers,
        versions).

    Raises:
        UnknownBackendError: no such backend.

    Example:
        >>> import refq4
        >>> refq4.backend_info("reference")["available"]
        True
    """
    if name not in _registry():
        check_usable(name)  # raises with the nearest names
    entry = _registry()[name]
    backend = entry.load() or entry.backend
    info: dict[str, Any] = {
        "name": name,
        "available": entry.problem is None,
        "reason": entry.problem,
        "found_in": entry.found_in,
    }
    if backend is not None:
        info |= {
            "priority": backend.priority,
            "devices": list(backend.devices),
            "ops": [op for op in OPS if getattr(type(backend), op) is not getattr(Backend, op)],
            "description": backend.description,
        }
        if entry.problem is None:
            info |= backend.info()
    return info


@contextmanager
def isolated_registry() -> Iterator[None]:
    """For tests: no choice is in effect inside at first, and what is registered or chosen is undone at the end."""
    global _entries, _chosen, _ordered
    with _lock:
        saved = dict(_registry()), _chosen
        _chosen = None
    _mirror()
    try:
        yield
    finally:
        with _lock:
            (_entries, _chosen), _ordered = saved, None
            _ready.clear()
        _mirror()
