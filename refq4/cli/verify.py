"""``refq4 verify``: one backend held against another."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from . import options
from .console import show

__all__ = ["add"]


def add(commands: Any) -> None:
    """The subcommand."""
    command = commands.add_parser(
        "verify",
        help="one backend against another: where they differ, on which smallest input, by how much",
        description="Ask a backend about 1,700 cases of the 4-bit layer and compare. Exits with 1 on a difference.",
        epilog=options.examples(
            "python -m refq4 verify --backend cpu",
            "python -m refq4 verify --backend cpu --quick --check gemv_4bit",
            "python -m refq4 verify --import mine.py --backend mine",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--backend", required=True, help="the backend to verify")
    command.add_argument("--against", default="reference", help="the one whose answers count as right (%(default)s)")
    depth = command.add_mutually_exclusive_group()
    depth.add_argument("--quick", dest="depth", action="store_const", const="quick", help="about 400 cases")
    depth.add_argument("--deep", dest="depth", action="store_const", const="deep", help="about 7,000 cases")
    command.add_argument("--check", action="append", metavar="NAME", help="only this check (repeatable)")
    command.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE_OR_FILE.py",
        help="import this first; it calls refq4.register_backend (repeatable)",
    )
    options.add_json(command)
    command.set_defaults(run=_verify, depth="normal")


def _verify(arguments: argparse.Namespace) -> int:
    from ..testing import verify

    for source in arguments.imports:
        _import(source)
    checks = tuple(arguments.check) if arguments.check else None
    report = verify(arguments.backend, arguments.against, arguments.depth, checks)
    show(report, arguments)
    return 0 if report.agrees else 1


def _import(source: str) -> None:
    """Import what registers a backend: a module, looked for in the current directory, too, or a Python file."""
    from .. import registry

    before = registry.registered()
    try:
        if source.endswith(".py"):
            _import_file(Path(source))
        else:
            _on_path(Path.cwd())
            importlib.import_module(source)
    except Exception as error:
        raise ValueError(f"--import {source}: importing it failed: {type(error).__name__}: {error}") from error
    if registry.registered() == before:
        raise ValueError(
            f"--import {source}: it was imported, but registers no backend; it must call "
            f"refq4.register_backend(...) outside of functions and of 'if __name__ == \"__main__\"'"
        )


def _import_file(path: Path) -> None:
    _on_path(Path.cwd())
    _on_path(path.resolve().parent)  # for what stands next to it
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)


def _on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
