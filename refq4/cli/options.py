"""Options that several commands have, each under one name with one meaning."""

from __future__ import annotations

import argparse
from contextlib import suppress

import torch

from ..codebooks import codebook_names
from ..functional import DEFAULT_BLOCKSIZE
from ..layout import STORAGE_DTYPES
from ..state import BLOCKSIZES, WEIGHT_DTYPES

__all__ = ["DTYPES", "SHORT_DTYPES", "STORAGE", "add_backend", "add_format", "add_json", "examples", "files"]


DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES}
SHORT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STORAGE = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGE_DTYPES}


def add_backend(command: argparse.ArgumentParser) -> None:
    """``--backend``."""
    command.add_argument("--backend", help="run on this backend, strictly (default: the one in effect)")


def add_json(command: argparse.ArgumentParser) -> None:
    """``--json``."""
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")


def add_format(command: argparse.ArgumentParser) -> None:
    """How weights are quantised: ``--quant-type``, ``--blocksize``, ``--nested``, ``--storage``, and for what dtype."""
    command.add_argument("--quant-type", choices=codebook_names(), default="nf4", help="the codebook (%(default)s)")
    command.add_argument(
        "--blocksize", type=int, choices=BLOCKSIZES, default=DEFAULT_BLOCKSIZE, help="weights to a scale (%(default)s)"
    )
    command.add_argument(
        "--nested",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="double quantisation: the scales in 8 bits (on)",
    )
    command.add_argument(
        "--storage", choices=STORAGE, default="uint8", help="dtype the packed bytes are stored under (%(default)s)"
    )
    command.add_argument("--compute-dtype", choices=DTYPES, help="dtype of the products (default: that of the weights)")


def examples(*lines: str) -> str:
    """The epilog of a command's help."""
    return "\n".join(["examples:", *(f"  {line}" for line in lines)])


def files(action: argparse.Action, directories: bool = False) -> None:
    """Let the shell complete an argument with names of files or directories."""
    with suppress(ModuleNotFoundError):  # `refq4 complete` says what to install
        import shtab

        action.complete = shtab.DIRECTORY if directories else shtab.FILE  # type: ignore[attr-defined]
