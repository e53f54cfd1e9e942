"""``refq4 info``: what this machine offers."""

from __future__ import annotations

import argparse
import os
import platform
from typing import Any

from .. import __version__
from . import imports, options
from .console import print_json

__all__ = ["add"]


def add(commands: Any) -> None:
    """The subcommand."""
    command = commands.add_parser("info", help="list the backends of this machine, and why each is or isn't available")
    imports.add(command)
    options.add_json(command)
    command.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> int:
    from rich.table import Table

    from ..codebooks import codebook_names, get_codebook
    from ..internals.verbatim import console

    imports.run(arguments.imports)
    info = _gather_info()
    if arguments.json:
        print_json(info)
        return 0
    out = console()
    for key, value in info["machine"].items():
        out.print(f"{key:<22} {value}")
    table = Table(
        title="backends; auto tries them in this order, never one below 0",
        title_justify="left",
        title_style="bold",
    )
    for column in ("name", "priority", "available", "devices", "found in", "about"):
        table.add_column(column, overflow="fold")
    for backend in info["backends"]:
        available = "yes" if backend["available"] else f"no: {backend['reason']}"
        devices = ", ".join(backend.get("devices", []))
        priority, about = str(backend.get("priority", "")), backend.get("description", "")
        table.add_row(backend["name"], priority, available, devices, backend["found_in"], about)
    out.print(table)
    table = Table(title="codebooks", title_justify="left", title_style="bold")
    for column in ("name", "about"):
        table.add_column(column, overflow="fold")
    for name in codebook_names():
        table.add_row(name, get_codebook(name).description)
    out.print(table)
    return 0


def _gather_info() -> dict[str, Any]:
    import torch

    from ..backend import BackendError
    from ..codebooks import codebook_names
    from ..registry import ENVIRONMENT_VARIABLE, backend_info, get_backend, list_backends

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
