"""``refq4 complete SHELL``: a script that completes commands, options and files in a shell."""

from __future__ import annotations

import argparse
from typing import Any

from ..internals import remedies
from . import options

__all__ = ["add"]


def add(commands: Any, parser: argparse.ArgumentParser) -> None:
    """The subcommand; ``parser`` is the whole command line."""
    command = commands.add_parser(
        "complete",
        help="print a shell script that completes commands, options and files",
        description="Print a completion script for the installed command, refq4.",
        epilog=options.examples(
            'eval "$(refq4 complete bash)"                       in ~/.bashrc',
            'refq4 complete zsh > "${fpath[1]}/_refq4"           once, for zsh',
        ),
    )
    command.add_argument("shell", choices=["bash", "zsh", "tcsh"])

    def run(arguments: argparse.Namespace) -> int:
        try:
            import shtab
        except ModuleNotFoundError:
            raise ValueError(
                f"completion is written by shtab, which is not installed: {remedies.install('cli')}"
            ) from None
        print(shtab.complete(parser, arguments.shell))
        return 0

    command.set_defaults(run=run)
