"""``refq4 inspect PATH``: what a weight file holds, and what is wrong with it."""

from __future__ import annotations

import argparse
from typing import Any

from . import options
from .console import show

__all__ = ["add"]

_DESCRIPTION = """\
List the contents of a .safetensors file, a model directory, or a file of torch.save (.pt, .pth, .bin; no code in it is
run). Check each 4-bit weight as loading does. Exit with 1 if something is wrong.
"""


def add(commands: Any) -> None:
    """The subcommand."""
    command = commands.add_parser(
        "inspect",
        help="list the keys, bits and histograms of a weight file, and what is wrong with it",
        description=_DESCRIPTION,
        epilog=options.examples(
            "python -m refq4 inspect model-nf4",
            "python -m refq4 inspect adapter.pt --match 'layers.0'",
            "python -m refq4 inspect model.safetensors --json | jq .problems",
        ),
    )
    options.files(command.add_argument("path", metavar="PATH", help="a weight file, or a directory of them"))
    command.add_argument("--match", metavar="PATTERN", help="only tensors whose name matches: 'layers.0', '*_proj'")
    command.add_argument("--limit", type=_count, default=40, metavar="N", help="rows of the table (%(default)s)")
    options.add_json(command)
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from ..checkpoint import inspect_checkpoint

    contents = inspect_checkpoint(arguments.path, arguments.match)
    contents.limit = arguments.limit
    show(contents, arguments)
    return 1 if contents.problems else 0


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"a number of rows is wanted, got {text!r}")
    return int(text)
