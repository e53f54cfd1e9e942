"""Which backends there are: found through entry points or registered by hand, listed, looked up by name.

    entry point "refq4.backends" ----------+
    entry point "refq4.backends.by_name" --+--> an Entry by name --- imported ---> asked whether it is available (once)
    register_backend(...) -----------------+

What stands in the second group "auto" never takes, so nothing imports it before somebody names it. Any other entry is
imported when somebody lists the backends or wants to run a call. Each is asked whether it is available when it is
needed. One that fails at either keeps the reason, which is what its name then gives. Which of them runs a call is
chosen in ``refq4/registry.py``, through which all public names here are imported.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

from ..backend import OPS, OPTIONAL, Backend, BackendUnavailableError, Call, UnknownBackendError
from . import remedies

ENTRY_POINT_GROUP = "refq4.backends"
BY_NAME_GROUP = f"{ENTRY_POINT_GROUP}.by_name"
AUTO = "auto"


class Resolved(NamedTuple):
    """The backend that runs a call, and who was passed over for it with the reason."""

    backend: Backend
    passed_over: Sequence[tuple[str, str]] = ()


@dataclass
class Entry:
    """What the registry knows of one backend: where it came from, and the instance or the reason there is none."""

    name: str
    found_in: str
    entry_point: EntryPoint | None = None
    backend: Backend | None = None
    problem: str | None = None
    ready: Resolved | None = None  # once it has been found available

    @property
    def only_by_name(self) -> bool:
        """Whether "auto" leaves it alone."""
        if self.entry_point is not None and self.entry_point.group == BY_NAME_GROUP:
            return True
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
                made = self.backend or kind()  # the module may have registered its own instance meanwhile
                if not isinstance(made, Backend):
                    raise TypeError(f"{self.entry_point.value} makes {made!r}, which is no refq4.backend.Backend")
                self.backend = made
            except Exception as error:
                self.problem = f"importing it failed: {type(error).__name__}: {error}"
        return self.backend

    def load(self) -> Resolved | None:
        """The instance, imported and asked for availability once; None (with ``problem`` set) if that failed."""
        if self.ready is None and self.problem is None and (backend := self.imported()) is not None:
            try:
                self.problem = backend.available()
            except Exception as error:
                self.problem = f"asking whether it is available failed: {type(error).__name__}: {error}"
            self.ready = None if self.problem else Resolved(backend)
        return self.ready

    def usable(self) -> Resolved:
        """The instance, ready to use; BackendUnavailableError if it can't work here."""
        found = self.load()
        if found is None:
            raise BackendUnavailableError(f"backend {self.name!r} is not available: {self.problem}")
        return found

    def refusal(self, call: Call) -> str | None:
        """Why it can't run the call; the device first, since asking for availability may start a driver."""
        backend = self.imported()
        if backend is not None and (reason := backend.wrong_device(call)) is not None:
            return reason
        found = self.load()
        return self.problem if found is None else found.backend.can_run(call)


def installed() -> dict[str, Entry]:
    """The backends of the packages that are installed, by name; none is imported yet."""
    return {
        point.name: Entry(point.name, f"entry point {point.value}", entry_point=point)
        for group in (ENTRY_POINT_GROUP, BY_NAME_GROUP)
        for point in entry_points(group=group)
    }


entries = installed()  # and those that are registered by hand
_ordered: list[Entry] | None = None  # by_priority, until the registry changes


def check_usable(name: str) -> Backend | None:
    """The backend of that name, ready to use (None for "auto"); raises what :func:`set_backend` documents."""
    return None if name == AUTO else find(name).usable().backend


def find(name: str) -> Entry:
    """The entry of that name; UnknownBackendError if there is none."""
    if type(name) is str and name in entries:
        return entries[name]
    if not entries:
        raise UnknownBackendError(f"unknown backend {name!r}: {not_installed()}")
    known = [each for each in (*sorted(entries), AUTO) if each != name]  # "auto" has no entry
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UnknownBackendError(f"unknown backend {name!r}.{hint} Known: {', '.join(known)}. {_HOW_KNOWN}")


def not_installed() -> str:
    """Why no backend is known at all, and what to do."""
    return (
        "no backends are registered, because refq4 itself is not installed (they are found through its metadata). "
        f"Run: {remedies.install()}"
    )


_HOW_KNOWN = (
    f"A backend becomes known by refq4.register_backend(...) in the script or by an entry point in the group "
    f"{ENTRY_POINT_GROUP!r}; for one that a file registers: refq4 verify --import file.py, pytest -p module"
)


# --- registering ----------------------------------------------------------------------------------------------------


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
        raise TypeError(f"register_backend needs an instance of refq4.backend.Backend, got {backend!r}")
    if not backend.name or backend.name == AUTO:
        raise ValueError(f"a backend needs a name other than {AUTO!r}, got {backend.name!r}")
    known = entries.get(backend.name)
    if known is not None and not replace:
        if not known.awaits(backend):
            raise ValueError(_taken(known))
        known.backend = backend
    else:
        where = f"{type(backend).__module__}.{type(backend).__qualname__}"
        entries[backend.name] = Entry(backend.name, f"register_backend({where})", backend=backend)
    _ordered = None
    return backend


def _taken(known: Entry) -> str:
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
    del entries[find(name).name]
    _ordered = None


# --- listing --------------------------------------------------------------------------------------------------------


def is_installed(name: str) -> bool:
    """Whether every process finds this backend by itself: through an entry point."""
    entry = entries.get(name)
    return entry is not None and entry.entry_point is not None


def by_priority() -> list[Entry]:
    """All entries, highest priority first; one that failed to load goes by name, where its reason is still told."""
    global _ordered
    if _ordered is None:
        for entry in list(entries.values()):  # a module may register further backends when it is imported
            if not entry.only_by_name:
                entry.imported()
        _ordered = sorted(entries.values(), key=_rank)
    return _ordered


def _rank(entry: Entry) -> tuple[bool, int, str]:
    return entry.only_by_name, -(entry.backend.priority if entry.backend else 1), entry.name


def list_backends() -> list[str]:
    """The names of all backends, available or not, the one "auto" tries first at the front.

    Those that "auto" never takes (negative priority) come last, after the reference.

    Example:
        >>> import refq4
        >>> "reference" in refq4.list_backends()
        True
    """
    return [entry.name for entry in by_priority()]


def automatic_backends() -> list[str]:
    """Of those, the ones that "auto" may take, available or not: what "all backends" means where each costs time."""
    return [entry.name for entry in by_priority() if not entry.only_by_name]


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
    entry = find(name)
    entry.load()
    backend = entry.backend
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
            "ops": [op for op in (*OPS, *OPTIONAL) if backend.has(op)],
            "description": backend.description,
        }
        if entry.problem is None:
            info |= backend.info()
    return info
