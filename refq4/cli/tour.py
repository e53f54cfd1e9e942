"""``refq4 tour``: real pretrained weights through every step, as tables."""

from __future__ import annotations

import argparse
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from . import options
from .console import print_json

if TYPE_CHECKING:
    from rich.table import Table

    from ..internals.verbatim import Console
    from ..tools.tour import TourReport

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
    from ..internals.verbatim import console
    from ..tools.tour import tour

    report = tour(arguments.path, arguments.backend)
    if arguments.json:
        print_json(report.to_dict())
    else:
        _print_tour(report, console())
    return 0


def _print_tour(report: TourReport, out: Console) -> None:
    from ..internals.verbatim import words

    out.print(
        words(
            (report.model, "bold"),
            f": {report.quantised / 1e6:.1f} M of {report.parameters / 1e6:.1f} M parameters are in "
            f"{len(report.formats[0].layers)} linear layers, now in 4 bits",
        )
    )
    out.print(_layer_table(report))
    out.print(_format_table(report))
    out.print("\none layer's forward, step by step, for one token:")
    out.print(report.explanation)


def _format_table(report: TourReport) -> Table:
    from rich.table import Table

    table = Table(title="the model", title_justify="left", title_style="bold")
    table.add_column("format")
    table.add_column("bits a weight", justify="right")
    table.add_column("mean error of a layer", justify="right")
    if report.sentences:
        table.add_column(f"mean cosine of {report.sentences} sentences", justify="right")
        table.add_column("worst", justify="right")
    for entry in report.formats:
        error = sum(layer.error for layer in entry.layers) / len(entry.layers)
        row = [entry.name, f"{entry.bits:.3f}", f"{error:.4f}"]
        if entry.mean_cosine is not None and entry.worst_cosine is not None:
            row += [f"{entry.mean_cosine:.4f}", f"{entry.worst_cosine:.4f}"]
        table.add_row(*row)
    return table


def _layer_table(report: TourReport) -> Table:
    from rich.table import Table

    table = Table(
        title="relative error of each layer's weight, |W - W4| / |W|", title_justify="left", title_style="bold"
    )
    table.add_column("layer", overflow="fold")
    table.add_column("[N, K]", justify="right")
    for entry in report.formats:
        table.add_column(entry.name, justify="right")
    columns = zip(*(layer.name.split(".") for layer in report.formats[0].layers), strict=False)
    common = ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, columns))
    if common:
        table.caption, table.caption_justify = f"names without their common {common}.", "left"
    for rows in zip(*(entry.layers for entry in report.formats), strict=True):
        name = rows[0].name.removeprefix(f"{common}.") if common else rows[0].name
        table.add_row(name, str(list(rows[0].shape)), *(f"{row.error:.4f}" for row in rows))
    return table
