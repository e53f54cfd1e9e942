"""What the commands share: how they print."""

from __future__ import annotations

import argparse
import json
from typing import Any

__all__ = ["print_json", "show"]


def print_json(value: Any) -> None:
    """Plain data on standard output."""
    print(json.dumps(value, indent=2, default=str))


def show(report: Any, arguments: argparse.Namespace) -> None:
    """A report as JSON where ``--json`` was given, else as it shows itself."""
    if arguments.json:
        print_json(report.to_dict())
    else:
        from ..internals.verbatim import console

        console().print(report)
