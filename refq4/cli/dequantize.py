"""``refq4 dequantize MODEL_DIR OUT_DIR``: a 4-bit checkpoint on disk as plain safetensors, in bounded memory."""

from __future__ import annotations

import argparse
from typing import Any

from . import options
from .console import show
from .quantize import terminating_as_interrupting

__all__ = ["add"]

_DESCRIPTION = """\
Decode the 4-bit weights of a safetensors checkpoint that refq4 or bitsandbytes quantised, piece by piece. Use it to
merge adapters, or for tools that read plain safetensors. OUT_DIR gets the same files with matrices of floats, and a
config.json without a quantization_config. The floats are those that the 4-bit layers compute with; the original
weights are not restored. OUT_DIR appears when all of it is written; Ctrl-C leaves nothing behind.
"""


def add(commands: Any) -> None:
    """The subcommand."""
    command = commands.add_parser(
        "dequantize",
        help="decode a 4-bit model directory into plain safetensors, in bounded memory",
        description=_DESCRIPTION,
        epilog=options.examples(
            "python -m refq4 dequantize model-nf4 model-plain",
            "python -m refq4 dequantize model-nf4 model-bf16 --dtype bf16 --force",
        ),
    )
    options.add_places(command, "4-bit *.safetensors")
    command.add_argument(
        "--dtype",
        choices=options.SHORT_DTYPES,
        help="dtype of all floats (default: that of each weight before it was quantised)",
    )
    options.add_backend(command)
    options.add_json(command)
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from ..checkpoint import dequantize_checkpoint

    with terminating_as_interrupting():
        report = dequantize_checkpoint(
            arguments.model_dir,
            arguments.out_dir,
            dtype=arguments.dtype and options.dtype(arguments.dtype),
            backend=arguments.backend,
            force=arguments.force,
        )
    show(report, arguments)
    return 0
