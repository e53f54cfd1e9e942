"""Everything that needs a GPU, in one command: is the CUDA backend right there, clean, and how fast?

    python scripts/checks/gpu_check.py                     on a machine with a GPU and refq4 installed: about 20 minutes
    python scripts/checks/gpu_check.py --list              what would be run, one command a line
    python scripts/checks/gpu_check.py --only verify       one step (repeatable)

    tests       what only a GPU can show: graphs, reduce-overhead, streams, threads, devices, large shapes
    memcheck, racecheck      the quick catalogue under compute-sanitizer, which looks at refq4's kernels alone
    tune        the cross-over to decoding, by number of tokens, for five shapes: crossovers.json
    bench       against bitsandbytes and cuBLAS: cuda.json, and cuda-speedups.png
    verify      the catalogue of the differential kit, the deep one
    initcheck, synccheck

What a step prints goes to the terminal. The figures go to where the docs read them, or to ``--out``; in ``gpu-check``
beside them are the cross-overs and, written anew after each step, ``report.json``, which keeps the steps of earlier
runs. A step that takes longer than it may is ended. The exit status is the number of steps that did not pass.
``--rehearse`` takes the emulator for the GPU and asks little of each step; CI does that.

Without a registry, on a machine that has torch and is lent for a few minutes, bring wheels and let the system end it:

    pip wheel --no-deps -w gpu . && pip download --no-deps --only-binary=:all: --python-version 3.12 -d gpu \
        'cuda-bindings<14' cuda-pathfinder bitsandbytes==0.50.2 filelock platformdirs tqdm packaging rich \
        markdown-it-py mdurl pygments pytest pluggy iniconfig hypothesis sortedcontainers numpy safetensors shtab \
        matplotlib contourpy cycler fonttools kiwisolver pillow pyparsing python-dateutil six          here
    pip install --no-index --no-deps --target site gpu/*.whl                                            there
    PYTHONPATH=site timeout -k 5 540 python scripts/checks/gpu_check.py --out "$OUT" --only tests --only bench
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refq4_cuda.crossover import tuned_file
from refq4_cuda.launch import all_variants

import refq4

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "benchmarks"
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass(frozen=True)
class Step:
    """A command, the seconds that it may take, and what it wants of the environment."""

    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)


def main(arguments: list[str] | None = None) -> int:
    """Run the steps; returns how many did not pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--only", action="append", metavar="STEP", help="only this step (repeatable)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where figures go (%(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="the emulator in place of the GPU, little of each step")
    options = parser.parse_args(arguments)
    steps = all_steps(options.out.absolute(), options.rehearse)
    if unknown := set(options.only or ()) - set(steps):
        parser.error(f"there is no step {min(unknown)!r}; there are {', '.join(steps)}")
    wanted = {name: step for name, step in steps.items() if not options.only or name in options.only}
    if options.list:
        for step in wanted.values():
            print(shlex.join([*(f"{k}={v}" for k, v in step.environment.items()), *step.command]))
        return 0
    if options.rehearse:
        os.environ["REFQ4_CUDA_EMULATOR_ARCH"] = "90"
    machine = refq4.backend_info("cuda-emulator" if options.rehearse else "cuda")
    if not machine["available"]:
        print(f"gpu_check: {machine['reason']}", file=sys.stderr)
        return 1
    return run_all(wanted, options.out.absolute(), machine)


# --- the steps --------------------------------------------------------------------------------------------------------


def all_steps(out: Path, rehearse: bool) -> dict[str, Step]:
    """Name to step, in the order of running."""
    python = [sys.executable, "-m"]
    backend, depth = ("cuda-emulator", ["--quick", "--check", "gemv_4bit"]) if rehearse else ("cuda", ["--deep"])
    verify = [*python, "refq4", "verify", "--backend", backend]
    tests = [*python, "pytest", "-q", "-p", "no:cacheprovider", "tests/backends/cuda/test_cuda_gpu.py"]
    tests += [] if rehearse else ["--require-backends", "cuda"]
    size = ["--shapes", "32x128", "--m", "1", "16"] if rehearse else []
    figures = ["--json", str(out / "cuda.json"), "--png", str(out / "cuda-speedups.png")]
    bench = [*python, "refq4", "bench", "--device", "cuda", "--backend", backend, *figures]
    peers = ["--peers", "refq4", "torch bf16", "dequantize + torch"]
    bench += [*size, *peers, "--layers", "1", "--no-ops"] if rehearse else []
    sanitized = [*verify, "--quick", *(depth[1:] if rehearse else [])]
    # Without torch's cache of memory, what lies beyond a tensor is nobody's; -lineinfo gives a report its line.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "REFQ4_CUDA_FLAGS": "-lineinfo"}
    under = {tool: Step([*sanitizer(tool), *sanitized], 110, alone) for tool in SANITIZER_TOOLS}
    return {
        "tests": Step(tests, 170),
        "memcheck": under["memcheck"],
        "racecheck": under["racecheck"],
        "tune": Step([*python, "refq4", "tune", "--backend", backend, *size], 150),
        "bench": Step(bench, 140),
        "verify": Step([*verify, *depth], 220),
        "initcheck": under["initcheck"],
        "synccheck": under["synccheck"],
    }


def sanitizer(tool: str) -> list[str]:
    """compute-sanitizer for refq4's own kernels: torch's would take it most of the time."""
    entries = {variant.entry for arch in (75, 90) for variant in all_variants(arch)}
    kernels = [word for name in sorted(entries) for word in ("--kernel-regex", f"kns={name}")]
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *kernels]


# --- running them -----------------------------------------------------------------------------------------------------


def run_all(steps: dict[str, Step], out: Path, machine: dict[str, Any]) -> int:
    """Run the steps, leaving the report after each; how many did not pass."""
    beside = out / "gpu-check"
    beside.mkdir(parents=True, exist_ok=True)
    report = beside / "report.json"
    earlier = json.loads(report.read_text())["steps"] if report.is_file() else {}
    about = {key: machine[key] for key in ("gpus", "driver", "architecture", "nvrtc") if key in machine}
    about = {"date": datetime.date.today().isoformat(), **about}
    outcomes: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        print(f"--- {name}: {shlex.join(step.command)}", flush=True)
        start = time.monotonic()
        outcome = run(step)
        print(f"--- {name}: {outcome}", flush=True)
        taken = {"seconds": round(time.monotonic() - start, 1), "command": shlex.join(step.command)}
        outcomes[name] = {"outcome": outcome, **taken}
        report.write_text(json.dumps({**about, "steps": earlier | outcomes}, indent=1) + "\n")
        if name == "tune" and tuned_file().is_file():  # the emulator measures, and keeps nothing
            shutil.copy(tuned_file(), beside)
    return sum(outcome["outcome"] != "passed" for outcome in outcomes.values())


def run(step: Step) -> str:
    """Run a step; what came of it."""
    try:
        process = subprocess.Popen(step.command, cwd=ROOT, env=os.environ | step.environment, start_new_session=True)
    except FileNotFoundError:
        return f"not run: there is no {step.command[0]}; it comes with the CUDA toolkit (its bin must be in PATH)"
    try:
        status = process.wait(step.seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what it has started
        process.wait()
        return f"ended after {step.seconds:.0f} seconds"
    return "passed" if status == 0 else f"failed with status {status}"


if __name__ == "__main__":
    sys.exit(main())
