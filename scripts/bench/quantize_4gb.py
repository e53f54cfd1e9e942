"""How much memory and time ``refq4 quantize`` takes for a model of 4 GB, next to loading it through bitsandbytes.

    python scripts/bench/quantize_4gb.py                  makes the model in a temporary directory, deletes it; minutes
    python scripts/bench/quantize_4gb.py --layers 2       a smaller one
    python scripts/bench/quantize_4gb.py --only refq4     without the peer

Each runs in a process of its own, whose largest resident memory and wall time are printed as JSON. The model is a Llama
in bf16 with random weights, in several files. Bitsandbytes is run as people use it: ``from_pretrained`` with a
``BitsAndBytesConfig``, on the CPU. Needs 4.2 GB of disk for the model and 1.2 GB for the result; the peer, 8 GB of
memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# torch is imported by the processes that are measured and by the one that makes the model, not here: Linux counts what
# a process held when it started another one as that one's memory.
HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 11008, 32000
ALL_LAYERS = 9  # 4.17 GB with the tables
BITSANDBYTES = """
import sys, torch, transformers
config = transformers.BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
)
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config, dtype="auto")
"""


def main() -> None:
    """Make the model, run what was asked for, print the figures."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--layers", type=int, default=ALL_LAYERS, help="of the model (%(default)s)")
    options.add_argument("--only", choices=("refq4", "bitsandbytes"), help="run one of the two")
    options.add_argument("--no-errors", action="store_true", help="don't measure each layer's error")
    options.add_argument("--directory", help="where to put the model (default: the system's temporary directory)")
    options.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.make:
        make_model(asked.make, asked.layers)
        return
    with tempfile.TemporaryDirectory(dir=asked.directory) as directory:
        model, out = Path(directory) / "model", Path(directory) / "out"
        make = [sys.executable, __file__, "--make", str(model), "--layers", str(asked.layers)]
        subprocess.run(make, check=True)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        quantize = ["-m", "refq4", "quantize", str(model), str(out), *(["--no-errors"] if asked.no_errors else [])]
        commands = {"refq4": quantize, "bitsandbytes": ["-c", BITSANDBYTES, str(model)]}
        report: dict[str, object] = {"model_gb": round(size / 1e9, 2), "cores": os.cpu_count()}
        for name, command in commands.items():
            if asked.only in (None, name):
                report[name] = run([sys.executable, *command])
    print(json.dumps(report, indent=1))


def make_model(directory: Path, layers: int) -> None:
    """Write the model: a file for the tables, then one for every two layers."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    noise = torch.randn(2**24, dtype=torch.float32).mul_(0.02).to(torch.bfloat16)

    def matrix(n: int, k: int) -> Tensor:
        return noise.repeat(-(-n * k // noise.numel()))[: n * k].view(n, k)

    parts: list[dict[str, Tensor]] = [{}]
    parts[0] |= {f"{name}.weight": matrix(VOCABULARY, HIDDEN) for name in ("model.embed_tokens", "lm_head")}
    parts[0]["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    weight_map, size, parts_count = {}, 0, 1 + -(-layers // 2)
    for i in range(parts_count):
        tensors = parts[0] if i == 0 else {}
        for layer in range(2 * i - 2, min(2 * i, layers)) if i else ():
            tensors |= layer_tensors(f"model.layers.{layer}", matrix)
        name = f"model-{i + 1:05}-of-{parts_count:05}.safetensors"
        save_file(tensors, directory / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        size += (directory / name).stat().st_size
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))


def layer_tensors(prefix: str, matrix: Callable[[int, int], Tensor]) -> dict[str, Tensor]:
    """One layer of a Llama."""
    import torch

    attention = {f"{prefix}.self_attn.{name}_proj.weight": matrix(HIDDEN, HIDDEN) for name in "qkvo"}
    mlp = {
        f"{prefix}.mlp.gate_proj.weight": matrix(INTERMEDIATE, HIDDEN),
        f"{prefix}.mlp.up_proj.weight": matrix(INTERMEDIATE, HIDDEN),
        f"{prefix}.mlp.down_proj.weight": matrix(HIDDEN, INTERMEDIATE),
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    return attention | mlp | {f"{prefix}.{name}.weight": torch.ones(HIDDEN, dtype=torch.bfloat16) for name in norms}


def run(command: list[str]) -> dict[str, float]:
    """Wall time and the largest resident memory of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)[:200]} ended with {os.waitstatus_to_exitcode(status)}")
    return {"seconds": round(time.perf_counter() - start, 1), "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2)}


if __name__ == "__main__":
    main()
