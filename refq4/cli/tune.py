"""``refq4 tune``: let a backend measure what it would otherwise only expect of this machine."""

from __future__ import annotations

import argparse
from typing import Any

from . import options

__all__ = ["add"]


def add(commands: Any) -> None:
    """The subcommand."""
    command = commands.add_parser(
        "tune", help="let a backend measure on this machine which kernel to use, and store the result"
    )
    command.add_argument("--backend", default="cuda", help="the backend (%(default)s)")
    command.add_argument(
        "--shapes",
        nargs="+",
        type=options.shape,
        metavar="NxK",
        help="shapes of weights to measure, e.g. those of your model: 4096x11008",
    )
    command.add_argument("--m", nargs="+", type=options.tokens, metavar="M", help="numbers of tokens to measure at")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from ..backend import BackendUnsupportedError
    from ..registry import AUTO, check_usable

    engine = check_usable(arguments.backend)
    measure = getattr(engine, "tune", None)
    if measure is None:
        name = "the backend" if arguments.backend == AUTO else f"backend {arguments.backend!r}"
        raise BackendUnsupportedError(f"{name} has nothing to tune: name one that has, as --backend cuda")
    for line in measure(arguments.shapes or (), sorted(arguments.m or ())):
        print(line, flush=True)
    return 0
