"""``refq4 verify``: one backend held against another."""

from __future__ import annotations

import argparse
from typing import Any

from . import imports, options
from .console import show

__all__ = ["add"]


def add(commands: Any) -> None:
    """The subcommand."""
    command = commands.add_parser(
        "verify",
        help="compare a backend with another one: where they differ, by how much, on which smallest input",
        description="Run 1,700 test cases on a backend and compare the results. Exit with 1 on a difference.",
        epilog=options.examples(
            "python -m refq4 verify --backend cpu",
            "python -m refq4 verify --backend cpu --quick --check gemv_4bit",
            "python -m refq4 verify --import mine.py --backend mine",
        ),
    )
    command.add_argument("--backend", required=True, help="the backend to verify")
    command.add_argument("--against", default="reference", help="the backend to compare with (%(default)s)")
    depth = command.add_mutually_exclusive_group()
    depth.add_argument("--quick", dest="depth", action="store_const", const="quick", help="about 400 cases")
    depth.add_argument("--deep", dest="depth", action="store_const", const="deep", help="about 7,000 cases")
    command.add_argument("--check", action="append", metavar="NAME", help="only this check (repeatable)")
    imports.add(command)
    options.add_json(command)
    command.set_defaults(run=_verify, depth="normal")


def _verify(arguments: argparse.Namespace) -> int:
    from ..testing import verify

    imports.run(arguments.imports)
    checks = tuple(arguments.check) if arguments.check else None
    report = verify(arguments.backend, arguments.against, arguments.depth, checks)
    show(report, arguments)
    return 0 if report.agrees else 1
