"""``--import``: a backend that is not installed, registered by a module or a file of its author's."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = ["add", "run"]


def add(command: argparse.ArgumentParser) -> None:
    """Give the subcommand the option."""
    command.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE_OR_FILE.py",
        help="import this first; it calls refq4.register_backend (repeatable)",
    )


def run(sources: Iterable[str]) -> None:
    """Import each of them.

    Raises:
        ValueError: one can't be imported, or registers no backend.
    """
    for source in sources:
        _import(source)


def _import(source: str) -> None:
    """Import what registers a backend: a module, looked for in the current directory, too, or a Python file."""
    before = _registered()
    try:
        if source.endswith(".py"):
            _import_file(Path(source))
        else:
            _on_path(Path.cwd())
            importlib.import_module(source)
    except Exception as error:
        raise ValueError(f"--import {source}: importing it failed: {type(error).__name__}: {error}") from error
    if _registered() == before:
        raise ValueError(
            f"--import {source}: it was imported, but registers no backend; it must call "
            f"refq4.register_backend(...) outside of functions and of 'if __name__ == \"__main__\"'"
        )


def _registered() -> dict[str, object]:
    from ..internals.discovery import entries

    return {name: entry.backend for name, entry in entries.items()}


def _import_file(path: Path) -> None:
    _on_path(Path.cwd())
    _on_path(path.resolve().parent)  # for what stands next to it
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)


def _on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
