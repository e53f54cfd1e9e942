"""For tests: a registry of backends in which nothing is chosen, and that is put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .. import registry
from ..internals import discovery

__all__ = ["isolated_registry"]


@contextmanager
def isolated_registry() -> Iterator[None]:
    """No choice is in effect inside at first, and what is registered or chosen there is undone at the end."""
    entries, chosen = discovery.known_entries(), registry.choose(None)
    try:
        yield
    finally:
        discovery.restore_entries(entries)
        registry.choose(chosen)
