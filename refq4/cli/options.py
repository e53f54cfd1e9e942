"""Options that several commands have, each under one name with one meaning."""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = [
    "DTYPES",
    "SHORT_DTYPES",
    "add_backend",
    "add_format",
    "add_json",
    "add_places",
    "dtype",
    "examples",
    "files",
    "shape",
    "tokens",
]

# What the core offers, said again for a help without torch; tests/tools/test_cli.py compares.
CODEBOOKS = ("af4", "e2m1", "fp4", "int4", "iq4nl", "nf4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DEFAULT_BLOCKSIZE = 64
SCALES = ("absmax", "search")
DTYPES = ("float32", "float16", "bfloat16")
SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
STORAGE = ("uint8", "bfloat16", "float16", "float32")


def dtype(name: str) -> torch.dtype:
    """The dtype of a name above."""
    import torch

    found: torch.dtype = getattr(torch, SHORT_DTYPES.get(name, name))
    return found


def shape(text: str) -> tuple[int, int]:
    """NxK of the command line."""
    n, _, k = text.partition("x")
    if not (n.isdigit() and k.isdigit() and int(n) and int(k)):
        raise argparse.ArgumentTypeError(f"a shape is NxK, for example 4096x11008, got {text!r}")
    return int(n), int(k)


def tokens(text: str) -> int:
    """A number of tokens on the command line; none at all is no call, and libraries that are measured divide by it."""
    if not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"at least one token is wanted, got {text!r}")
    return int(text)


def add_backend(command: argparse.ArgumentParser) -> None:
    """``--backend``."""
    command.add_argument("--backend", help="use only this backend (default: the one in effect)")


def add_places(command: argparse.ArgumentParser, held: str) -> None:
    """``MODEL_DIR OUT_DIR`` and ``--force``."""
    model = command.add_argument("model_dir", metavar="MODEL_DIR", help=f"a directory with {held}")
    out = command.add_argument("out_dir", metavar="OUT_DIR", help="the directory to make; its parent must exist")
    for action in (model, out):
        files(action, directories=True)
    command.add_argument("--force", action="store_true", help="replace OUT_DIR, if it is a model directory")


def add_json(command: argparse.ArgumentParser) -> None:
    """``--json``."""
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")


def add_format(command: argparse.ArgumentParser, compute_dtype: str = "that of the weights") -> None:
    """How weights are quantised: ``--quant-type``, ``--blocksize``, ``--nested``, ``--storage``, and for what dtype."""
    command.add_argument("--quant-type", choices=CODEBOOKS, default="nf4", help="the codebook (%(default)s)")
    command.add_argument(
        "--blocksize",
        type=int,
        choices=BLOCKSIZES,
        default=DEFAULT_BLOCKSIZE,
        help="weights that share a scale (%(default)s)",
    )
    command.add_argument(
        "--nested",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="double quantisation: store the scales in 8 bits (on)",
    )
    command.add_argument(
        "--storage",
        choices=STORAGE,
        default="uint8",
        help="dtype under which the packed bytes are stored (%(default)s)",
    )
    command.add_argument("--compute-dtype", choices=DTYPES, help=f"dtype of the products (default: {compute_dtype})")


def examples(*lines: str) -> str:
    """The epilog of a command's help."""
    return "\n".join(["examples:", *(f"  {line}" for line in lines)])


def files(action: argparse.Action, directories: bool = False) -> None:
    """Let the shell complete an argument with names of files or directories."""
    with suppress(ModuleNotFoundError):  # `refq4 complete` says what to install
        import shtab

        action.complete = shtab.DIRECTORY if directories else shtab.FILE  # type: ignore[attr-defined]
