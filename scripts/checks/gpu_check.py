"""Everything that needs a GPU, in one command: is the CUDA backend right there, clean, and how fast?

    python scripts/checks/gpu_check.py                  all of it, about twenty minutes; figures go into docs/benchmarks
    python scripts/checks/gpu_check.py --list           what would be run, one command a line
    python scripts/checks/gpu_check.py --only verify    one step (repeatable)

    tests       what only a GPU can show: graphs, streams, threads, several devices, large shapes
    verify      the catalogue of the differential kit, the deep one
    memcheck, racecheck, initcheck, synccheck    the quick catalogue under compute-sanitizer
    bench       against bitsandbytes and cuBLAS: cuda.json, cuda.png

Needs: pip install -e '.[test,bench,cuda]' on top of a torch with CUDA; compute-sanitizer comes with the CUDA toolkit.
The outcome of every step goes to gpu-check.json; the exit status is the number of steps that did not pass.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "benchmarks"
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass(frozen=True)
class Step:
    """A command, and what it wants of the environment."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def main() -> int:
    """Run the steps; returns how many did not pass."""
    steps = all_steps()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--only", action="append", choices=steps, help="only this step (repeatable)")
    options = parser.parse_args()
    if options.list:
        for step in steps.values():
            print(shlex.join([*(f"{k}={v}" for k, v in step.environment.items()), *step.command]))
        return 0
    import refq4  # here, for listing needs no torch

    info = refq4.backend_info("cuda")
    if not info["available"]:
        print(f"gpu_check: {info['reason']}", file=sys.stderr)
        return 1
    outcomes = {name: run(name, steps[name]) for name in options.only or steps}
    about = {key: info[key] for key in ("gpus", "driver", "nvrtc")}
    report = {"date": datetime.date.today().isoformat(), **about, "steps": outcomes}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "gpu-check.json").write_text(json.dumps(report, indent=1) + "\n")
    return sum(outcome["outcome"] != "passed" for outcome in outcomes.values())


def all_steps() -> dict[str, Step]:
    """Name to step, in the order of running."""
    python, sanitizer = [sys.executable, "-m"], shutil.which("compute-sanitizer") or "compute-sanitizer"
    verify = [*python, "refq4", "verify", "--backend", "cuda"]
    steps = {
        "tests": Step([*python, "pytest", "-q", "tests/backends/cuda/test_cuda_gpu.py", "--require-backends", "cuda"]),
        "verify": Step([*verify, "--deep"]),
    }
    for tool in SANITIZER_TOOLS:
        # Without torch's cache of memory, what lies beyond a tensor is nobody's; -lineinfo gives a report its line.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "REFQ4_CUDA_FLAGS": "-lineinfo"}
        steps[tool] = Step([sanitizer, "--tool", tool, "--error-exitcode", "9", *verify, "--quick"], environment)
    files = ["--json", str(RESULTS / "cuda.json"), "--png", str(RESULTS / "cuda.png")]
    steps["bench"] = Step([*python, "refq4", "bench", "--device", "cuda", *files])
    return steps


def run(name: str, step: Step) -> dict[str, Any]:
    """Run a step, with its output on the terminal; what came of it."""
    print(f"--- {name}: {shlex.join(step.command)}", flush=True)
    start = time.perf_counter()
    try:
        status = subprocess.run(step.command, cwd=ROOT, env=os.environ | step.environment, check=False).returncode
        outcome = "passed" if status == 0 else f"failed with status {status}"
    except FileNotFoundError:
        outcome = f"not run: there is no {step.command[0]}; it comes with the CUDA toolkit (its bin must be in PATH)"
    print(f"--- {name}: {outcome}", flush=True)
    return {"outcome": outcome, "seconds": round(time.perf_counter() - start, 1), "command": shlex.join(step.command)}


if __name__ == "__main__":
    sys.exit(main())
