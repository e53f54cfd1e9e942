"""``refq4 bench``: a backend against what people use today, and against the machine's limits."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from . import imports, options

__all__ = ["add"]

# What refq4.bench measures, said again for a help without torch; tests/tools/test_cli.py compares.
DEVICES = ("cpu", "cuda")
DTYPES = ("bf16", "fp16", "fp32")
PEERS = (
    "refq4",
    "refq4 canonical",
    "bitsandbytes packed",
    "bitsandbytes plain",
    "torch bf16",
    "torch fp32",
    "torch int4",
    "onnxruntime",
    "openvino",
    "llama.cpp q4_0 int8",
)
GPU_PEERS = ("refq4", "bitsandbytes", "torch bf16", "dequantize + torch")


def add(commands: Any) -> None:
    """The subcommand."""
    command = commands.add_parser(
        "bench", help="measure a backend, compared with other libraries and the machine's limits"
    )
    command.add_argument("--device", choices=DEVICES, default="cpu", help="where the tensors are (%(default)s)")
    command.add_argument("--backend", help="the backend to measure (default: the one named like the device)")
    imports.add(command)
    command.add_argument("--shapes", nargs="+", type=options.shape, metavar="NxK", help="e.g. 4096x11008")
    command.add_argument("--m", nargs="+", type=options.tokens, help="tokens per call (1 to 512)")
    command.add_argument("--dtype", choices=DTYPES, default="bf16", help="dtype of the activations (%(default)s)")
    command.add_argument(
        "--threads",
        type=int,
        default=_threads(),
        help="threads (default: OMP_NUM_THREADS, else all cores)",
    )
    command.add_argument(
        "--rounds", type=int, default=30, help="passes over the layers at small M; never fewer than 15"
    )
    command.add_argument("--layers", type=int, default=8, help="least number of weights to use in turn (%(default)s)")
    command.add_argument(
        "--peers",
        nargs="+",
        choices=sorted({*PEERS, *GPU_PEERS}),
        metavar="NAME",
        help=f"what is measured: {', '.join(PEERS)}; on a GPU {', '.join(GPU_PEERS)}",
    )
    command.add_argument(
        "--ops",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also measure the other ops, on the first shape",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures here ('-': standard output)")
    command.add_argument("--png", type=Path, metavar="FILE", help="draw the picture here (needs matplotlib)")
    command.add_argument("--quick", action="store_true", help="the first shape, fewer M and rounds: about 20 s")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    imports.run(arguments.imports)
    from ..bench import bench

    return bench(arguments)


def _threads() -> int:
    """OMP_NUM_THREADS, which torch reads too; else all cores."""
    if (wanted := os.environ.get("OMP_NUM_THREADS", "")).isdigit() and int(wanted):
        return int(wanted)
    return _cores()


def _cores() -> int:
    """Those this process may use, where the system can tell (Linux)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
