"""For tests: a registry of backends in which nothing is chosen, and that is put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .. import registry
from ..internals import discovery

__all__ = ["isolated_registry", "know"]


@contextmanager
def isolated_registry() -> Iterator[None]:
    """No choice is in effect inside at first, and what is registered or chosen there is undone at the end."""
    before, chosen = dict(discovery.entries), registry.choose(None)
    try:
        yield
    finally:
        know(before)
        registry.choose(chosen)


def know(backends: dict[str, discovery.Entry]) -> None:
    """Let these be the backends that are known, and no others."""
    discovery.entries.clear()
    discovery.entries.update(backends)
    discovery._ordered = None
