"""``refq4 tour``: real pretrained weights through every step, as tables."""

from __future__ import annotations

import argparse
from typing import Any

from . import options
from .console import show

__all__ = ["add"]


def add(commands: Any) -> None:
    """The subcommand."""
    command = commands.add_parser(
        "tour",
        help="run real pretrained weights through every step of the 4-bit layer",
        description="Quantise a model in three formats and show the error of each layer, the effect on the model, and "
        "one call step by step.",
        epilog=options.examples(
            "python -m refq4 tour                       the packaged sentence encoder",
            "python -m refq4 tour model.safetensors     the matrices of your own file",
            "python -m refq4 tour --backend reference   on one backend only",
        ),
    )
    path = command.add_argument("path", nargs="?", help="a .safetensors file; by default the packaged sentence encoder")
    options.files(path)
    options.add_backend(command)
    options.add_json(command)
    command.set_defaults(run=_tour)


def _tour(arguments: argparse.Namespace) -> int:
    from ..tools.tour import tour

    show(tour(arguments.path, arguments.backend), arguments)
    return 0
