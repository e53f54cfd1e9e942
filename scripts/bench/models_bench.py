"""transformers models on refq4 and on bitsandbytes, in turn, on this machine's CPU: generating, and QLoRA steps.

python scripts/bench/models_bench.py generate               a Llama of 440 M random weights: prompt, then tokens
python scripts/bench/models_bench.py qlora                  losses, time, memory of training steps with peft's adapters
python scripts/bench/models_bench.py qlora-deep             the same where 86 % of the weights are in 4 bits, 512 tokens
python scripts/bench/models_bench.py generate --json FILE   the figures as JSON ('-': standard output, tables to stderr)

Both read the same 4-bit checkpoint, made by refq4. Times are medians of rounds in which each takes its turn; memory is
the peak of a process that has one of them only, while it trains.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from refq4_cpu import CpuBackend
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, StoppingCriteria

import refq4
from refq4.bench.peers import hub_kernel
from refq4.integrations.transformers import Refq4Config
from refq4.internals import verbatim

ENGINES = {"refq4": Refq4Config, "bitsandbytes": BitsAndBytesConfig}
SHAPES = {
    "generate": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 6, "num_attention_heads": 16},
    "qlora": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "num_attention_heads": 8},
}
SHAPES["qlora-deep"] = SHAPES["qlora"] | {"num_hidden_layers": 8, "vocab_size": 8000}
HUB = "bitsandbytes' kernel from the hub"
HEAD = "its head in 4 bits, too"
READING = "reading refq4's 4-bit layers once takes, ms"
RANK = 8  # of the adapters: a product in which it is a size is theirs
ADAPTERS = "products of the adapters"
TIMED = 4  # steps
TRAINING = {"qlora": (2, 64), "qlora-deep": (2, 256)}  # sequences, tokens
FORWARD, GRADIENT = "4-bit layers, forward", "4-bit layers, gradient"
# An op -> whose time it is. What has no line here is "the rest".
SHARES = {
    "refq4.gemm_4bit": FORWARD,
    "refq4.grad_input_4bit": GRADIENT,
    "bitsandbytes.gemm_4bit": FORWARD,
    "bitsandbytes.dequantize_4bit": GRADIENT,
    "aten.mm": "products of the head",
    "aten._scaled_dot_product_flash_attention_for_cpu": "attention",
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": "attention",
    "aten.clone": "casts and copies",
    "aten.copy_": "casts and copies",
    "aten._to_copy": "casts and copies",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5, help="turns that each takes (%(default)s)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (%(default)s)")
    parser.add_argument("--tokens", type=int, default=9, help="tokens generated in each turn (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="training steps (%(default)s)")
    parser.add_argument("--small", action="store_true", help="a model of a few thousand weights, to try the program")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--memory-of", nargs=2, metavar=("ENGINE", "PATH"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if asked.memory_of:
        print(json.dumps(peak_memory(*asked.memory_of, asked.what, asked.steps)))
        return 0
    with checkpoint(asked) as (path, parameters):
        report = machine() | {"parameters": parameters} | (generate if asked.what == "generate" else qlora)(path, asked)
    verbatim.console(stderr=asked.json == "-").print(table(report))
    if asked.json == "-":
        print(json.dumps(report, indent=1))
    elif asked.json:
        Path(asked.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


# --- generating -------------------------------------------------------------------------------------------------------


def generate(path: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of the prompt and of a token after it, by engine."""
    models = {name: load(name, path).eval() for name in ENGINES}
    models[HEAD] = refq4.quantize_model(
        load("refq4", path).eval(), head=True, compute_dtype=torch.bfloat16, progress=False
    )
    ids = torch.randint(0, 1000, (1, asked.prompt), generator=torch.Generator().manual_seed(0))
    within = {name: InLayers(model) for name, model in models.items()}
    times: list[dict[str, list[float]]] = [{name: [] for name in models} for _ in range(4)]
    prompt, token, in_prompt, in_token = times
    said = {}
    for turn in range(asked.rounds + 1):
        for name, model in models.items():
            clock = Clock(within[name])
            said[name] = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=asked.tokens,
                min_new_tokens=asked.tokens,
                do_sample=False,
                stopping_criteria=[clock],
            )[0, asked.prompt :].tolist()
            if turn:  # the first one is where layouts are made and caches filled
                prompt[name].append(clock.ms[0])
                token[name] += clock.ms[1:]
                in_prompt[name].append(clock.within[0])
                in_token[name] += clock.within[1:]
    both, report = [said[name] for name in ENGINES], {}
    for what, spans in ((f"prompt of {asked.prompt} tokens", prompt), ("a token after it", token)):
        ms = medians(spans)
        report[f"{what}, ms"] = {name: ms[name] for name in ENGINES}
        report[f"{what}, refq4 with {HEAD}, ms"] = report[f"{what}, ms"] | {"refq4": ms[HEAD]}
    for what, spans in ((f"prompt of {asked.prompt}", in_prompt), ("a token", in_token)):
        report[f"{what}, within 4-bit layers, ms"] = medians({name: spans[name] for name in ENGINES})
    same = sum(a == b for a, b in zip(*both, strict=True)) / asked.tokens
    reading = within["refq4"].bytes / CpuBackend().limits()["read_gb_s"] / 1e6
    return report | {READING: reading, "tokens that are the same": same}


class InLayers:
    """The seconds that a model spends in its 4-bit layers (without the head), called in turn as it calls them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seconds, self.bytes = 0.0, 0
        for name, layer in model.named_modules():
            if isinstance(layer, (refq4.nn.Linear4bit, bitsandbytes.nn.Linear4bit)) and "head" not in name:
                layer.forward = self.timed(layer.forward)  # type: ignore[method-assign]
                self.bytes += layer.in_features * layer.out_features * 9 // 16  # a code of 4 bits, 4 bytes for 64

    def timed(self, forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x: torch.Tensor) -> torch.Tensor:
            start = time.perf_counter()
            y = forward(x)
            self.seconds += time.perf_counter() - start
            return y

        return run


class Clock(StoppingCriteria):
    """Never stops; notes the milliseconds between the tokens, and those of them in 4-bit layers."""

    def __init__(self, layers: InLayers) -> None:
        self.ms: list[float] = []
        self.within: list[float] = []
        self._layers = layers
        self._last, layers.seconds = time.perf_counter(), 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        now = time.perf_counter()
        self.ms.append(1e3 * (now - self._last))
        self.within.append(1e3 * self._layers.seconds)
        self._last, self._layers.seconds = now, 0.0
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


# --- training ---------------------------------------------------------------------------------------------------------


def qlora(path: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Losses, milliseconds of a step, and peak memory, by engine."""
    runs = {name: training(name, path, TRAINING[asked.what]) for name in ENGINES}
    losses: dict[str, list[float]] = {name: [] for name in runs}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(asked.steps):
        for name, run in runs.items():
            start = time.perf_counter()
            losses[name].append(next(run))
            if step:
                times[name].append(1e3 * (time.perf_counter() - start))
    shares = where_the_time_goes(runs["refq4"], statistics.median(times["refq4"]))
    theirs = milliseconds_by_share(runs["bitsandbytes"])
    shares["for comparison: the 4-bit layers of bitsandbytes"] = theirs[FORWARD] + theirs[GRADIENT]
    apart = max(abs(a - b) / b for a, b in zip(*losses.values(), strict=True))
    del runs
    gc.collect()
    memory = {}
    for name in ENGINES:
        command = [sys.executable, __file__, asked.what, "--steps", "3", "--memory-of", name, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        memory[name] = json.loads(done.stdout)
    return {
        "a training step, ms": medians(times),
        "peak memory while training, MB": memory,
        "a step of refq4, ms of each": shares,
        "losses": losses,
        "largest relative distance of the losses": apart,
    }


def where_the_time_goes(run: Iterator[float], step: float) -> dict[str, float]:
    """Milliseconds of one step by :data:`SHARES`, and what its 4-bit products would take at the machine's peak.

    The rest is what remains of ``step``, the milliseconds that one takes when nobody looks at its ops.
    """
    with FlopCounterMode(display=False) as counter:
        next(run)
    operations = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op).startswith("refq4."))
    shares = milliseconds_by_share(run)
    shares["the rest: sums, norms, loss, optimiser, Python"] = step - sum(shares.values())
    found = CpuBackend().limits()
    peak = found["dot_gflop_s"] or found["fma_gflop_s"] or math.nan
    return shares | {"for comparison: the 4-bit products at the machine's peak": operations / peak / 1e6}


def milliseconds_by_share(run: Iterator[float]) -> dict[str, float]:
    """The ops of one step by :data:`SHARES`: of those with the same sizes the median, times their number.

    A median, because the system takes the processor away now and then, for longer than most ops last.
    """
    with Stopwatch() as watch:
        for _ in range(TIMED):
            next(run)
    shares = dict.fromkeys([*SHARES.values(), ADAPTERS], 0.0)
    for (op, dtype, sizes), ms in watch.calls.items():
        share = SHARES.get(op)
        if op == "aten.mm" and any(RANK in size for size in sizes):
            share = ADAPTERS
        elif op == "aten.mm" and dtype == torch.bfloat16:  # of a weight that was decoded; the head is in fp32
            share = GRADIENT
        if share is not None:
            shares[share] += statistics.median(ms) * len(ms) / TIMED
    return shares


class Stopwatch(TorchDispatchMode):
    """The milliseconds of each op that torch runs in this mode, by its name, first dtype and sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[str, torch.dtype | None, Any], list[float]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        result = op(*args, **(kwargs or {}))
        ms = 1e3 * (time.perf_counter() - start)
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        kind = str(op.overloadpacket), tensors[0].dtype if tensors else None, tuple(t.shape for t in tensors)
        self.calls.setdefault(kind, []).append(ms)
        return result


def training(engine: str, path: Path, shape: tuple[int, int]) -> Iterator[float]:
    """The loss of one step after the other, on the same few sequences; the recipe of QLoRA."""
    torch.manual_seed(0)
    model = prepare_model_for_kbit_training(load(engine, path), gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    ids = torch.randint(0, 1000, shape, generator=torch.Generator().manual_seed(0))
    while True:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        yield loss.item()


def peak_memory(engine: str, path: str, what: str, steps: int) -> float:
    """MB that this process holds at most while it takes a few training steps, after a first one."""
    run = training(engine, Path(path), TRAINING[what])
    next(run)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for _ in range(steps):
        next(run)
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


# --- models and reports -----------------------------------------------------------------------------------------------


@contextmanager
def checkpoint(asked: argparse.Namespace) -> Iterator[tuple[Path, int]]:
    """A Llama of random weights in NF4 with bf16 around it, on disk; and how many weights it has."""
    shape = SHAPES[asked.what]
    if asked.small:
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        torch.manual_seed(0)
        config = LlamaConfig(**{"vocab_size": 1000 if asked.small else 32000, **shape}, eos_token_id=None)
        full = LlamaForCausalLM(config).to(torch.bfloat16)
        full.save_pretrained(home / "full")
        parameters = full.num_parameters()
        del full
        model = AutoModelForCausalLM.from_pretrained(
            home / "full", quantization_config=config_of("refq4"), dtype=torch.bfloat16
        )
        model.save_pretrained(home / "nf4")
        del model
        gc.collect()
        yield home / "nf4", parameters


def config_of(engine: str) -> Any:
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    return ENGINES[engine](load_in_4bit=True, **settings)


def load(engine: str, path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config_of(engine), dtype=torch.bfloat16)


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(t) for name, t in times.items()}


def machine() -> dict[str, Any]:
    cpu = refq4.backend_info("cpu")
    versions = {name: sys.modules[name].__version__ for name in ("torch", "transformers", "peft", "bitsandbytes")}
    about = {"processor": cpu.get("processor"), "tier": cpu.get("tier"), "threads": torch.get_num_threads()}
    return about | versions | {HUB: hub_kernel()}


def table(report: dict[str, Any]) -> Table:
    shown = Table(
        title=f"Llama of {report['parameters'] / 1e6:.0f} M random weights, NF4, bf16; {report['processor']}, "
        f"{report['tier']}, {report['threads']} threads; bitsandbytes {report['bitsandbytes']}, "
        f"its kernel from the hub {report[HUB]}",
        title_justify="left",
    )
    for column in ("", *ENGINES, "bitsandbytes / refq4"):
        shown.add_column(column, justify="right" if column else "left")
    for name, value in report.items():
        if isinstance(value, dict) and set(value) == set(ENGINES) and name != "losses":
            ours, theirs = (value[engine] for engine in ENGINES)
            shown.add_row(name, f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}")
    for name in (READING, "tokens that are the same", "largest relative distance of the losses"):
        if name in report:
            shown.add_row(name, f"{report[name]:.2g}", "", "")
    for name, ms in report.get("a step of refq4, ms of each", {}).items():
        shown.add_row(name, f"{ms:.1f}", "", "")
    if "losses" in report:
        first_last = [f"{run[0]:.3f} -> {run[-1]:.3f}" for run in report["losses"].values()]
        shown.add_row("first and last loss", *first_last, "")
    return shown


if __name__ == "__main__":
    sys.exit(main())
