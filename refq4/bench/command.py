"""The run of ``python -m refq4 bench``, from the first measurement to the files."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from ..internals.verbatim import Console, console
from ..registry import check_usable, use_backend
from . import gpu
from .measure import limits, machine, ops, products
from .peers import DEVICE_DTYPES, GPU_PEERS, PEERS, Peer
from .show import describe, ops_table, product_table

__all__ = ["bench"]

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)

SHAPES = {
    "cpu": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "cuda": ((4096, 4096), (8192, 8192), (28672, 8192)),
}


def bench(asked: argparse.Namespace) -> int:
    """Measure, print tables, write what was asked for; returns the exit status."""
    peers = GPU_PEERS if asked.device == "cuda" else PEERS
    asked.backend = asked.backend or asked.device
    asked.shapes = asked.shapes or SHAPES[asked.device]
    asked.peers = list(dict.fromkeys(["refq4", *(asked.peers or [p.name for p in peers if p.usual])]))
    if unknown := [name for name in asked.peers if name not in [p.name for p in peers]]:
        raise ValueError(f"--peers {unknown[0]!r}: on {asked.device} there are {_names(peers)}")
    if asked.quick:
        asked.shapes, asked.m, asked.rounds = asked.shapes[:1], asked.m or [1, 4, 16, 128], 15
    asked.m = asked.m or TOKENS
    logging.disable(logging.WARNING)  # peers announce missing extras on import
    threads = torch.get_num_threads()
    torch.set_num_threads(asked.threads)
    try:
        with use_backend(asked.backend):
            report = _measured(asked, console(stderr=asked.json == Path("-"), piped_width=160))
    finally:
        torch.set_num_threads(threads)
        logging.disable(logging.NOTSET)
    if asked.json is not None:
        text = json.dumps(report, indent=1) + "\n"
        sys.stdout.write(text) if asked.json == Path("-") else asked.json.write_text(text)
    if asked.png is not None:
        from .plot import roofline, speedups

        (speedups if asked.device == "cuda" else roofline)(report, asked.png)
    return 0


def _measured(asked: argparse.Namespace, console: Console) -> dict[str, Any]:
    backend = check_usable(asked.backend)
    if backend is None:
        raise ValueError("--backend auto: name the backend to time")
    if asked.device == "cuda":
        return gpu.measured(backend, asked, console)
    report: dict[str, Any] = {"machine": machine(backend), "limits": limits(backend), "products": []}
    console.print(describe(report))
    for n, k in asked.shapes:
        report["products"] += products(
            backend, n, k, asked.m, DEVICE_DTYPES[asked.dtype], asked.rounds, asked.peers, asked.layers
        )
        console.print(product_table(report["products"], n, k, report["limits"]))
    if asked.ops:
        n, k = asked.shapes[0]
        report["ops"], report["ops left out"] = ops(backend, asked.rounds, n, k)
        console.print(ops_table(report["ops"], n, k, report["ops left out"]))
    return report


def _names(peers: tuple[Peer, ...]) -> str:
    return ", ".join(peer.name for peer in peers)
