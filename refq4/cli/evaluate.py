"""``refq4 eval DIR``: loss and perplexity of a model on a text, what 4 bits cost it, and which layers did it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import options
from .console import show

__all__ = ["add"]

_DESCRIPTION = """\
Run a text through a causal language model on disk, 4-bit or not, and print loss (in nats per token) and perplexity.
--against names the same model in full precision: then print also the KL divergence and the agreement of the two models
and, for each 4-bit layer, how large the error of its output is and how much the predictions would change if only this
layer were in 4 bits. Only one model is in memory at a time.
"""


def add(commands: Any) -> None:
    """The subcommand."""
    command = commands.add_parser(
        "eval",
        help="measure loss, perplexity, KL, and the damage of each layer, on a text",
        description=_DESCRIPTION,
        epilog=options.examples(
            "python -m refq4 eval model-nf4 --text book.txt",
            "python -m refq4 eval model-nf4 --against model --text book.txt --context 256 --picture layers.png",
            "python -m refq4 eval model-nf4 --against model --tokens ids.txt --json > report.json",
        ),
    )
    options.files(command.add_argument("model_dir", metavar="DIR", help="a model directory of transformers"), True)
    options.files(
        command.add_argument("--against", metavar="DIR", help="the same model in full precision"), directories=True
    )
    given = command.add_mutually_exclusive_group(required=True)
    options.files(given.add_argument("--text", metavar="FILE", help="a text, split by the tokenizer in DIR"))
    options.files(given.add_argument("--tokens", metavar="FILE", help="token ids as text, one sequence in each line"))
    command.add_argument(
        "--context", type=int, metavar="N", help="tokens in a sequence of --text (512, or the model's limit if smaller)"
    )
    command.add_argument(
        "--lines", action="store_true", help="each line of --text is a sequence (otherwise sequences cross lines)"
    )
    command.add_argument("--sequences", type=int, metavar="N", help="only the first N sequences")
    command.add_argument(
        "--draws",
        type=int,
        default=4,
        metavar="N",
        help="backward passes for each sequence, to estimate the cost of each layer; 0: none (%(default)s)",
    )
    options.files(command.add_argument("--picture", metavar="FILE", help="also draw the layers (needs matplotlib)"))
    options.add_backend(command)
    options.add_json(command)
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from ..registry import requested_backend, use_backend
    from ..tools.evaluate_files import evaluate_directories, read_text, read_tokens

    model, against = Path(arguments.model_dir), arguments.against
    if arguments.draws < 0 or (arguments.sequences is not None and arguments.sequences < 1):
        raise ValueError("--draws must be 0 or more, --sequences 1 or more")
    if arguments.lines and arguments.text is None:
        raise ValueError("--lines goes with --text: a file of --tokens has one sequence in each line anyway")
    if arguments.tokens is not None:
        sequences = read_tokens(Path(arguments.tokens))
    else:
        sequences = read_text(Path(arguments.text), model, arguments.context, arguments.lines)
    with use_backend(requested_backend(arguments.backend)):
        report = evaluate_directories(
            model, sequences[: arguments.sequences], None if against is None else Path(against), arguments.draws
        )
    show(report, arguments)
    if arguments.picture is not None:
        from ..tools.evaluate_picture import draw_layers

        draw_layers(report.to_dict(), Path(arguments.picture))
    return 0
