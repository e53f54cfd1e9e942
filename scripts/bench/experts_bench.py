"""A mixture of experts in 4 bits: a decoded token and a prompt, beside bf16 experts and the machine's read limit.

python scripts/bench/experts_bench.py               128 experts of 768 x 2048, 8 active, as in Qwen3-30B-A3B
python scripts/bench/experts_bench.py --json FILE   the figures as JSON, too

A Qwen3-MoE of a few layers with random weights, and the same in NF4. What is timed is the experts of one layer, as
transformers calls them: routed rows, gate and up, the activation, down, the weighted sum. A token takes 8 of the 128,
so they are rarely in a cache. It is timed three times:

    in a model         both models decode tokens in turn: norms, attention and router stand between two layers' experts
    in turn with bf16  one call of refq4, one of bf16: each finds the caches full of the other's weights
    in a row           nothing between two calls of refq4

"bf16" is torch's grouped product. The limit is the time in which the active experts' bytes can be read.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

import refq4
from refq4.bench.measure import interleaved, machine
from refq4.internals import verbatim
from refq4.registry import check_usable

IN_A_MODEL, IN_TURN, IN_A_ROW = "a token, in a model", "a token, in turn with bf16", "a token, in a row"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"experts": 128, "active": 8, "hidden": 2048, "inner": 768, "heads": 32, "layers": 3}
    for name, value in (sizes | {"prompt": 256, "rounds": 41}).items():
        parser.add_argument(f"--{name}", type=int, default=value, help="(%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    report = measured(asked)
    verbatim.console().print(table(report))
    if asked.json:
        Path(asked.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measured(asked: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of one layer's experts, for one token and for a prompt."""
    torch.manual_seed(0)
    cpu = check_usable("cpu")
    assert cpu is not None
    refq4.set_backend("cpu")
    plain = model_of(asked)
    packed = refq4.quantize_model(copy.deepcopy(plain), compute_dtype=torch.bfloat16, progress=False)
    models = {"refq4": packed, "bf16": plain}
    numbers = 3 * asked.active * asked.hidden * asked.inner
    report: dict[str, Any] = machine(cpu) | {"shape": vars(asked)}
    with torch.inference_mode():
        calls = [routed(1, asked) for _ in range(16)]
        runs = {name: partial(call_experts, experts_of(model), calls) for name, model in models.items()}
        report[IN_TURN] = milliseconds(interleaved(runs, asked.rounds, len(calls), 1))
        report[IN_A_ROW] = milliseconds(interleaved({"refq4": runs["refq4"]}, asked.rounds, len(calls), 1))
        calls[:] = [routed(asked.prompt, asked) for _ in range(2)]
        report[f"a prompt of {asked.prompt}"] = milliseconds(interleaved(runs, 5, len(calls), 1))
        report[IN_A_MODEL] = while_decoding(models, asked.rounds)
    report["read_gb_s"] = cpu.limits()["read_gb_s"]  # type: ignore[attr-defined]
    report["limit"] = numbers * (0.5 + 4 / 64) / report["read_gb_s"] / 1e6
    return report


def model_of(asked: argparse.Namespace) -> Any:
    config = Qwen3MoeConfig(
        hidden_size=asked.hidden, moe_intermediate_size=asked.inner, intermediate_size=asked.inner,
        num_experts=asked.experts, num_experts_per_tok=asked.active, num_hidden_layers=asked.layers,
        num_attention_heads=asked.heads, num_key_value_heads=-(-asked.heads // 8), head_dim=128, vocab_size=1024,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not drawn
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1) if "norm" in name else parameter.data.normal_(0, 0.02)
    return model


def experts_of(model: Any) -> list[Any]:
    return [layer.mlp.experts for layer in model.model.layers]


def routed(tokens: int, asked: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """What a router gives the experts: hidden states, the experts of each token, their weights."""
    chosen = torch.stack([torch.randperm(asked.experts)[: asked.active] for _ in range(tokens)])
    weights = torch.rand(tokens, asked.active).softmax(-1)
    return torch.randn(tokens, asked.hidden, dtype=torch.bfloat16), chosen, weights.to(torch.bfloat16)


def call_experts(layers: list[Any], calls: list[tuple[Tensor, ...]], i: int) -> Tensor:
    called: Tensor = layers[i % len(layers)](*calls[i])
    return called


def milliseconds(seconds: dict[str, float]) -> dict[str, float]:
    return {name: 1e3 * s for name, s in seconds.items()}


def while_decoding(models: dict[str, Any], rounds: int) -> dict[str, float]:
    """Median milliseconds of a layer's experts while the models decode one token after the other, in turn."""
    times: dict[str, list[float]] = {name: [] for name in models}
    caches = {name: DynamicCache(config=model.config) for name, model in models.items()}
    for name, model in models.items():
        for experts in experts_of(model):
            experts.forward = timed(experts.forward, times[name])
        model(torch.randint(0, 1024, (1, 32)), past_key_values=caches[name])
        times[name].clear()
    for _ in range(rounds):
        for name, model in models.items():
            model(torch.randint(0, 1024, (1, 1)), past_key_values=caches[name])
    return {name: 1e3 * statistics.median(t) for name, t in times.items()}


def timed(function: Callable[..., Tensor], times: list[float]) -> Callable[..., Tensor]:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        times.append(time.perf_counter() - start)
        return result

    return run


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
            ours, theirs, limit = row["refq4"], row.get("bf16"), report["limit"]
            beside = ["", ""] if theirs is None else [f"{theirs:.2f}", f"{theirs / ours:.2f}"]
            token = [f"{limit:.2f}", f"{ours / limit:.2f}"] if name.startswith("a token") else ["", ""]
            shown.add_row(name, f"{ours:.2f}", *beside, *token)
    return shown


if __name__ == "__main__":
    sys.exit(main())
