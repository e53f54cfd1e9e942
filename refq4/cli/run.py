"""``refq4 run``: a program that nobody wants to edit, on refq4's 4-bit layers."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import os
import runpy
import shlex
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from . import options

__all__ = ["add"]


def add(commands: Any) -> None:
    """The subcommand."""
    command = commands.add_parser(
        "run",
        help="run another program in which transformers knows refq4",
        description="Run a Python program in which transformers knows refq4's checkpoints and Refq4Config, as if the "
        "program imported refq4.integrations.transformers itself. The program is a file, a module, or a command that "
        "a Python package installs; its exit code is the command's. A process that the program starts itself, as "
        "torchrun does, gets only the backend: run refq4 run in that process instead.",
        epilog=options.examples(
            "python -m refq4 run -- lm_eval --model hf --model_args pretrained=model-nf4 --tasks hellaswag",
            "python -m refq4 run --bitsandbytes --backend cpu -- train.py --load_in_4bit",
        ),
    )
    command.add_argument("--backend", metavar="NAME", help="set this backend first, as refq4.set_backend does")
    command.add_argument(
        "--bitsandbytes",
        action="store_true",
        help="also use refq4 for BitsAndBytesConfig(load_in_4bit=True) and for 4-bit checkpoints of bitsandbytes",
    )
    command.add_argument("program", metavar="-- PROGRAM", help="a file, a module or an installed command")
    command.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="arguments of the program")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    program = _found(arguments.program)
    import refq4
    from refq4.integrations.later import connect, serve_bitsandbytes

    if arguments.backend is not None:
        refq4.set_backend(arguments.backend)
        os.environ["REFQ4_BACKEND"] = arguments.backend  # for the processes that the program starts
    connect("transformers")
    if arguments.bitsandbytes:
        serve_bitsandbytes()
    connect("diffusers")
    sys.argv = [arguments.program, *arguments.arguments]
    try:
        program()  # how it exits is its own: SystemExit goes through
    except Exception:  # an error of the program's is no word of refq4's
        traceback.print_exc()
        return 1
    return 0


def _found(program: str) -> Callable[[], Any]:
    """What runs the program, which sees itself as it would when started without refq4."""
    path = Path(program)
    if path.suffix == ".py" or path.is_file():
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {program}")
        sys.path.insert(0, str(path.resolve().parent))
        return lambda: runpy.run_path(program, run_name="__main__")
    commands = {point.name: point for point in entry_points(group="console_scripts")}
    if program in commands:
        return lambda: sys.exit(commands[program].load()())
    sys.path.insert(0, os.getcwd())
    if program.replace(".", "").isidentifier() and _is_module(program):
        return lambda: runpy.run_module(program, run_name="__main__", alter_sys=True)
    near = difflib.get_close_matches(program, [*commands, *sys.stdlib_module_names], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"{shlex.quote(program)} is not a file, a module or a command that a Python package installs here{hint}"
    )


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False
