"""A mixture of experts in 4 bits: a decoded token and a prompt, beside bf16 experts and the machine's read limit.

python scripts/bench/experts_bench.py               128 experts of 768 x 2048, 8 active, as in Qwen3-30B-A3B
python scripts/bench/experts_bench.py --json FILE   the figures as JSON, too

One layer's experts: [2 * 768, 2048] for gate and up, [2048, 768] for down, random weights in NF4. A token takes 8 of
them, drawn anew for each call; of 128 experts they are rarely in the cache. "bf16" is torch's grouped product on the
decoded weights. The limit is the time in which the active experts' bytes can be read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from refq4.bench.measure import interleaved, machine
from refq4.functional import dequantize_4bit, quantize_4bit
from refq4.internals import verbatim
from refq4.internals.grouped import grouped_gemm_4bit
from refq4.params import Params4bit
from refq4.registry import check_usable
from refq4.state import QuantState


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"experts": 128, "active": 8, "hidden": 2048, "inner": 768, "prompt": 256, "rounds": 41}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="(%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    asked = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    report = measured(asked)
    verbatim.console().print(table(report))
    if asked.json:
        Path(asked.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measured(asked: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of the two products of a layer, in turn, for one token and for a prompt."""
    torch.manual_seed(0)
    cpu = check_usable("cpu")
    assert cpu is not None
    shapes = {"up": (2 * asked.inner, asked.hidden), "down": (asked.hidden, asked.inner)}
    stored = {name: quantise(asked.experts, *shape) for name, shape in shapes.items()}
    plain = {name: dequantize_4bit(weight, state).transpose(1, 2) for name, (weight, state) in stored.items()}

    def in_4_bits(name: str, x: Tensor, offsets: Tensor) -> Tensor:
        return grouped_gemm_4bit(x, *stored[name], offsets, backend="cpu")

    def in_bf16(name: str, x: Tensor, offsets: Tensor) -> Tensor:
        return torch.nn.functional.grouped_mm(x, plain[name], offs=offsets[1:].int())

    report: dict[str, Any] = machine(cpu) | {"shape": vars(asked)}
    numbers = asked.active * sum(n * k for n, k in shapes.values())
    with torch.inference_mode():
        for label, tokens in (("a decoded token", 1), (f"a prompt of {asked.prompt}", asked.prompt)):
            calls = [routed(tokens, asked) for _ in range(16)]
            runs = {"refq4": partial(take, in_4_bits, calls), "bf16": partial(take, in_bf16, calls)}
            rounds = asked.rounds if tokens == 1 else 5
            report[label] = {who: 1e3 * s for who, s in interleaved(runs, rounds, len(calls), 1).items()}
    report["read_gb_s"] = cpu.limits()["read_gb_s"]  # type: ignore[attr-defined]
    report["a decoded token"]["limit"] = numbers * (0.5 + 4 / 64) / report["read_gb_s"] / 1e6
    return report


def quantise(experts: int, n: int, k: int) -> tuple[Params4bit, QuantState]:
    packed, state = quantize_4bit(torch.randn(experts, n, k, dtype=torch.bfloat16), quant_type="nf4")
    return Params4bit(packed, quant_state=state, bnb_quantized=True), state


def routed(tokens: int, asked: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The rows of x, sorted by expert, and where each expert's begin."""
    chosen = torch.stack([torch.randperm(asked.experts)[: asked.active] for _ in range(tokens)]).flatten()
    counts = torch.bincount(chosen, minlength=asked.experts)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return torch.randn(tokens * asked.active, asked.hidden, dtype=torch.bfloat16), offsets


def take(run: Any, calls: list[tuple[Tensor, Tensor]], i: int) -> Tensor:
    return layer(run, *calls[i])


def layer(run: Any, x: Tensor, offsets: Tensor) -> Tensor:
    gate, up = run("up", x, offsets).chunk(2, dim=-1)
    return run("down", torch.nn.functional.silu(gate) * up, offsets)


def table(report: dict[str, Any]) -> Table:
    title = (
        f"{report['shape']['experts']} experts, {report['shape']['active']} active, NF4; {report['processor']}, "
        f"{report['tier']}, {report['threads']} threads, reads {report['read_gb_s']:.1f} GB/s"
    )
    shown = Table(title=title, title_justify="left")
    for column in ("milliseconds", "refq4", "bf16", "bf16 / refq4", "read limit", "refq4 / limit"):
        shown.add_column(column, justify="left" if column == "milliseconds" else "right")
    for name, row in report.items():
        if isinstance(row, dict) and "refq4" in row:
            limit = [f"{row['limit']:.2f}", f"{row['refq4'] / row['limit']:.2f}"] if "limit" in row else ["", ""]
            shown.add_row(
                name, f"{row['refq4']:.2f}", f"{row['bf16']:.2f}", f"{row['bf16'] / row['refq4']:.2f}", *limit
            )
    return shown


if __name__ == "__main__":
    sys.exit(main())
