"""The command line: ``python -m refq4 COMMAND``, also installed as ``refq4``.

tour     real pretrained weights through every step of the 4-bit layer
info     what this machine offers: each backend, and why it is or isn't available
verify   one backend against another: where they differ, on which smallest input, by how much
bench    a backend against what people use today, and against the machine's limits
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from itertools import takewhile
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import __version__, bench
from .backend import BackendError
from .codebooks import codebook_names, get_codebook
from .registry import ENVIRONMENT_VARIABLE, backend_info, get_backend, list_backends
from .testing import verify
from .tour import TourReport, tour

EXAMPLES = """\
examples:
  python -m refq4 tour                       the packaged sentence encoder in NF4, FP4 and double-quantised NF4
  python -m refq4 tour model.safetensors     the matrices of a file of yours
  python -m refq4 tour --backend reference   on one backend, strictly
  python -m refq4 info --json                for scripts
  python -m refq4 verify --backend cpu       does this backend compute the 4-bit layer?
  python -m refq4 bench --quick              how fast is it, next to bitsandbytes and torch?
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 it could not be done (one line on stderr says why), 2 usage."""
    parser = argparse.ArgumentParser(
        prog="refq4",
        description="The 4-bit linear layer of bitsandbytes, taken apart.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"refq4 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("tour", help="real pretrained weights through every step of the 4-bit layer")
    command.add_argument("path", nargs="?", help="a .safetensors file; by default the packaged sentence encoder")
    command.add_argument("--backend", help="run on this backend (default: the one in effect)")
    command.add_argument("--json", action="store_true", help="print the figures as JSON instead of tables")
    command.set_defaults(run=_tour)

    command = commands.add_parser(
        "info", help="what this machine offers, each backend and why it is or isn't available"
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    command.set_defaults(run=_info)

    command = commands.add_parser(
        "verify",
        help="one backend against another: where they differ, on which smallest input, by how much",
        description="Ask a backend about 1,700 cases of the 4-bit layer and compare. Exits with 1 on a difference.",
    )
    command.add_argument("--backend", required=True, help="the backend to verify")
    command.add_argument("--against", default="reference", help="the one whose answers count as right (%(default)s)")
    depth = command.add_mutually_exclusive_group()
    depth.add_argument("--quick", dest="depth", action="store_const", const="quick", help="about 400 cases")
    depth.add_argument("--deep", dest="depth", action="store_const", const="deep", help="about 7,000 cases")
    command.add_argument("--check", action="append", metavar="NAME", help="only this check (repeatable)")
    command.add_argument("--json", action="store_true", help="print the report as JSON instead of tables")
    command.set_defaults(run=_verify, depth="normal")

    command = commands.add_parser("bench", help="a backend against what people use today, and the machine's limits")
    bench.add_arguments(command)
    command.set_defaults(run=bench.bench)

    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (BackendError, FileNotFoundError, ValueError) as error:
        print(f"refq4 {arguments.command}: {error}", file=sys.stderr)
        return 1


# --- tour -------------------------------------------------------------------------------------------------------------


def _tour(arguments: argparse.Namespace) -> int:
    report = tour(arguments.path, arguments.backend)
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print_tour(report, _console())
    return 0


def _print_tour(report: TourReport, console: Console) -> None:
    console.print(
        f"[bold]{report.model}[/]: {report.quantised / 1e6:.1f} M of {report.parameters / 1e6:.1f} M parameters are in "
        f"{len(report.formats[0].layers)} linear layers, now in 4 bits"
    )
    console.print(_layer_table(report))
    console.print(_format_table(report))
    console.print("\none layer's forward, step by step, for one token:")
    console.print(report.explanation)


def _format_table(report: TourReport) -> Table:
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


def _console() -> Console:
    """Colours and width of the terminal; piped, plain and wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


# --- verify -----------------------------------------------------------------------------------------------------------


def _verify(arguments: argparse.Namespace) -> int:
    checks = tuple(arguments.check) if arguments.check else None
    report = verify(arguments.backend, arguments.against, arguments.depth, checks)
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _console().print(report)
    return 0 if report.agrees else 1


# --- info -------------------------------------------------------------------------------------------------------------


def _info(arguments: argparse.Namespace) -> int:
    info = _gather_info()
    if arguments.json:
        print(json.dumps(info, indent=2, default=str))
        return 0
    console = _console()
    for key, value in info["machine"].items():
        console.print(f"{key:<22} {value}")
    table = Table(title="backends, in the order auto asks them", title_justify="left", title_style="bold")
    for column in ("name", "available", "devices", "found in", "about"):
        table.add_column(column, overflow="fold")
    for backend in info["backends"]:
        available = "yes" if backend["available"] else f"no: {backend['reason']}"
        devices = ", ".join(backend.get("devices", []))
        table.add_row(backend["name"], available, devices, backend["found_in"], backend.get("description", ""))
    console.print(table)
    table = Table(title="codebooks", title_justify="left", title_style="bold")
    for column in ("name", "about"):
        table.add_column(column, overflow="fold")
    for name in codebook_names():
        table.add_row(name, get_codebook(name).description)
    console.print(table)
    return 0


def _gather_info() -> dict[str, Any]:
    machine = {
        "refq4": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "CUDA": torch.version.cuda or "torch is built without it",
        ENVIRONMENT_VARIABLE: os.environ.get(ENVIRONMENT_VARIABLE) or "not set",
    }
    backends = [backend_info(name) for name in list_backends()]
    try:
        machine["backend in effect"] = get_backend()
    except BackendError as error:
        machine["backend in effect"] = f"none: {error}"
    return {"machine": machine, "backends": backends, "codebooks": codebook_names()}
