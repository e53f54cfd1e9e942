"""``refq4 quantize MODEL_DIR OUT_DIR``: a checkpoint on disk in 4 bits, in bounded memory."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from . import options
from .console import show

__all__ = ["add", "terminating_as_interrupting"]

_DESCRIPTION = """\
Quantise the linear layers of a safetensors checkpoint, tensor by tensor; the model may be larger than the memory.
OUT_DIR gets the same files in bitsandbytes' 4-bit format, which transformers loads (with bitsandbytes, or with
refq4.integrations.transformers). OUT_DIR appears when all of it is written; Ctrl-C leaves nothing behind.

If transformers is installed and knows the architecture, the command quantises the layers that transformers would
quantise. Otherwise it quantises all matrices named *.weight, except embeddings and output layers. PATTERN is a glob for
one or more parts of the dotted name: 'mlp', 'layers.[0-3].*_proj'.
"""


def add(commands: Any) -> None:
    """The subcommand."""
    command = commands.add_parser(
        "quantize",
        help="quantise a safetensors model directory, in bounded memory",
        description=_DESCRIPTION,
        epilog=options.examples(
            "python -m refq4 quantize Llama-3-8B Llama-3-8B-nf4",
            "python -m refq4 quantize Llama-3-8B Llama-3-8B-nf4 --dry-run",
            "python -m refq4 quantize model model-fp4 --quant-type fp4 --no-nested --skip down_proj",
            "python -m refq4 quantize model model-nf4 --scales search --set 'mlp=blocksize:128'",
            "python -m refq4 quantize model model-small --embeddings --head --dtype fp16",
            "python -m refq4 quantize model model-nf4 --force --json > report.json",
        ),
    )
    options.add_places(command, "*.safetensors and config.json")
    options.add_format(command)
    command.add_argument(
        "--scales",
        choices=options.SCALES,
        default="absmax",
        help="search: use the scale with the smallest error for each block; slower, same format (%(default)s)",
    )
    command.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help="quantise only these layers, also output layers (repeatable)",
    )
    command.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="PATTERN",
        help="keep these layers in full precision (repeatable)",
    )
    command.add_argument(
        "--embeddings", action="store_true", help="also quantise the tables; only refq4 loads such a file"
    )
    command.add_argument(
        "--head", action="store_true", help="also quantise the output layers, unless they share their weight"
    )
    command.add_argument("--dtype", choices=options.SHORT_DTYPES, help="dtype of all other floats (default: unchanged)")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATTERN=SETTING:VALUE",
        help="another format for these layers: 'mlp=blocksize:128,scales:search' (repeatable)",
    )
    command.add_argument("--no-errors", action="store_true", help="don't measure each layer's error: faster")
    command.add_argument("--dry-run", action="store_true", help="write nothing; print what would be done, with sizes")
    command.add_argument("-q", "--quiet", action="store_true", help="print only errors (and --json)")
    options.add_backend(command)
    options.add_json(command)
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from ..checkpoint import quantize_checkpoint
    from ..models.formats import parse_formats

    with terminating_as_interrupting():
        report = quantize_checkpoint(
            arguments.model_dir,
            arguments.out_dir,
            quant_type=arguments.quant_type,
            compress_statistics=arguments.nested,
            compute_dtype=arguments.compute_dtype and options.dtype(arguments.compute_dtype),
            quant_storage=options.dtype(arguments.storage),
            blocksize=arguments.blocksize,
            scales=arguments.scales,
            include=arguments.include,
            skip=arguments.skip,
            embeddings=arguments.embeddings,
            head=arguments.head,
            dtype=arguments.dtype and options.dtype(arguments.dtype),
            formats=parse_formats(arguments.set),
            backend=arguments.backend,
            measure=not arguments.no_errors,
            force=arguments.force,
            progress=not arguments.quiet,
            dry_run=arguments.dry_run,
        )
    if arguments.json or not arguments.quiet:
        show(report, arguments)
    return 0


@contextmanager
def terminating_as_interrupting() -> Iterator[None]:
    """SIGTERM (a batch system's end of time) tidies up as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread, where signals are someone else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
