"""A model of Llama 2 7B's shape, from bf16 files to twenty tokens: time and peak memory, beside bitsandbytes.

python scripts/bench/seven_billion.py DIR              18 GB of disk, 24 GiB of memory, some minutes
python scripts/bench/seven_billion.py DIR --layers 9   the same with 4.2 GB of bf16 in place of 13.5
python scripts/bench/seven_billion.py DIR --json FILE  the figures as JSON, too
python scripts/bench/seven_billion.py DIR --small      a model of a few thousand weights, to try the program

    write      random weights as bf16 safetensors, a file a layer (a real model's numbers take the same time)
    quantise   refq4 quantize: files in, 4-bit files out
    generate   from_pretrained, a prompt of 16 tokens, 20 more; by refq4 and by bitsandbytes, from the same 4-bit files

Each step is a process of its own, whose peak memory the system tells when it has ended. What is in DIR already is used.
torch is imported by those processes, not here: Linux counts what a process held when it started another one as that
one's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROMPT, TOKENS = 16, 20
LAYERS = 32
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
ENGINES = ("refq4", "bitsandbytes")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the model is written")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the model (%(default)s)")
    parser.add_argument("--small", action="store_true", help="a model of a few thousand weights, to try the program")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--step", choices=("write", *ENGINES), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.step == "write":
        write(asked.directory / "bf16", SMALL if asked.small else {"num_hidden_layers": asked.layers})
    elif asked.step:
        print(json.dumps(generate(asked.step, asked.directory / "nf4")))
    else:
        report = run(asked)
        show(report)
        if asked.json:
            Path(asked.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def run(asked: argparse.Namespace) -> dict[str, Any]:
    """All steps, each as {"seconds", "peak_gb"} and what it says itself."""
    home, mine = asked.directory, [sys.executable, __file__, str(asked.directory), "--layers", str(asked.layers)]
    mine += ["--small"] * asked.small
    home.mkdir(parents=True, exist_ok=True)
    size = 18 * (asked.layers + 2) / (LAYERS + 2)  # the tables are as large as two layers or so
    if not asked.small and shutil.disk_usage(home).free < 1e9 * size and not (home / "nf4").is_dir():
        raise SystemExit(f"the model takes {size:.0f} GB, and {home} has less; name a directory on a larger disk")
    steps: dict[str, list[str]] = {}
    if not (home / "bf16").is_dir():
        steps["write"] = [*mine, "--step", "write"]
    if not (home / "nf4").is_dir():
        command = [sys.executable, "-m", "refq4", "quantize", str(home / "bf16"), str(home / "nf4"), "--no-errors"]
        steps["quantise"] = [*command, "--compute-dtype", "bfloat16"]
    for engine in ENGINES:
        steps[f"generate with {engine}"] = [*mine, "--step", engine]
    report: dict[str, Any] = {}
    for name, command in steps.items():
        print(f"{name} ...", file=sys.stderr)
        report[name] = measured(command)
    for name in ("bf16", "nf4"):
        report[f"GB in {name}"] = sum(file.stat().st_size for file in (home / name).iterdir()) / 1e9
    return report


def measured(command: list[str]) -> dict[str, Any]:
    """Run a step; its seconds, its peak memory, and what it prints as JSON."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    found: dict[str, Any] = json.loads(said) if said.startswith("{") else {}
    return {"seconds": time.perf_counter() - start, "peak_gb": usage.ru_maxrss * 1024 / 1e9} | found


def write(out: Path, sizes: dict[str, int]) -> None:
    """The bf16 model: one file a layer, so that no more than one is in memory."""
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes, eos_token_id=None, dtype="bfloat16")  # the defaults are 7B's
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        files.setdefault(f"layer-{name.split('.')[2]}" if ".layers." in name else "rest", []).append(name)
    partial = out.with_name("bf16.partial")
    partial.mkdir(exist_ok=True)
    for file, names in tqdm(files.items(), desc="writing random weights"):
        tensors = {name: torch.randn(shapes[name], dtype=torch.bfloat16).mul_(0.02) for name in names}
        save_file(tensors, partial / f"{file}.safetensors", {"format": "pt"})
    index = {name: f"{file}.safetensors" for file, names in files.items() for name in names}
    (partial / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.save_pretrained(partial)
    partial.rename(out)


def generate(engine: str, path: Path) -> dict[str, Any]:
    """Seconds to load, for the prompt, and for a token after it."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, StoppingCriteria, logging

    logging.disable_progress_bar()
    times: list[float] = []

    class Clock(StoppingCriteria):
        """Never stops; notes when each token is there."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    kind: Any = BitsAndBytesConfig
    if engine == "refq4":
        from refq4.integrations.transformers import Refq4Config

        kind = Refq4Config
    config = kind(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.bfloat16).eval()
    loaded = time.perf_counter()
    ids = torch.randint(0, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "stopping_criteria": [Clock()]}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return {
        "load_s": loaded - start,
        "prompt_s": times[0] - loaded,  # its first call makes the layouts, too
        "tokens_per_s": (TOKENS - 1) / (times[-1] - times[0]),
        "first_tokens": out[0, PROMPT : PROMPT + 5].tolist(),
        "threads": torch.get_num_threads(),
    }


def show(report: dict[str, Any]) -> None:
    from rich.table import Table

    import refq4
    from refq4.internals import verbatim

    cpu = refq4.backend_info("cpu")
    sizes = f"{report['GB in bf16']:.2f} GB of bf16 became {report['GB in nf4']:.2f} GB"
    table = Table(title=f"{sizes}; {cpu.get('processor')}, {cpu.get('tier')}", title_justify="left")
    for column in ("", "seconds", "peak memory, GB", "to load, s", "prompt of 16, s", "tokens a second"):
        table.add_column(column, justify="right" if column else "left")
    for name, step in report.items():
        if isinstance(step, dict):
            own = [f"{step[key]:.2f}" if key in step else "" for key in ("load_s", "prompt_s", "tokens_per_s")]
            table.add_row(name, f"{step['seconds']:.1f}", f"{step['peak_gb']:.2f}", *own)
    verbatim.console().print(table)


if __name__ == "__main__":
    sys.exit(main())
