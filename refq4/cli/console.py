"""What the commands share: where they print to."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console

__all__ = ["console", "print_json", "show"]

_PIPED_WIDTH = 120


def console() -> Console:
    """Colours and width of the terminal (rich respects NO_COLOR); piped, plain and wide enough for the tables."""
    terminal = _Console()
    return terminal if terminal.is_terminal else _Console(width=_PIPED_WIDTH)


def print_json(value: Any) -> None:
    """Plain data on standard output."""
    print(json.dumps(value, indent=2, default=str))


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # rich calls this where it caught the error, and would exit with 1 by itself


def show(report: Any, arguments: argparse.Namespace) -> None:
    """A report as JSON where ``--json`` was given, else as it shows itself."""
    if arguments.json:
        print_json(report.to_dict())
    else:
        console().print(report)
