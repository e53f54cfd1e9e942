"""Everything that needs a GPU, in one command: is the CUDA backend right there, clean, and how fast?

    python scripts/checks/gpu_check.py                     on a machine with a GPU and refq4 installed: about 20 minutes
    python scripts/checks/gpu_check.py --list              what would be run, one command a line
    python scripts/checks/gpu_check.py --only verify       one step (repeatable)

On a machine that is lent for two calls of ten minutes, without a registry and with nothing kept in between:

    python scripts/checks/gpu_check.py --carry gpu         here: the wheels that it needs, refq4's own among them
    python scripts/checks/gpu_check.py --wheels gpu --part 1 --seconds 540 --out "$OUT"      there
    python scripts/checks/gpu_check.py --wheels gpu --part 2 --seconds 540 --out "$OUT"      there, once more
    python scripts/checks/gpu_check.py --collect FOLDER    here, for what came back of each: into docs/benchmarks

    1   install     the wheels, into a folder beside the results
        tests       what only a GPU can show: graphs, reduce-overhead, streams, threads, devices, large shapes
        memcheck, racecheck      the quick catalogue under compute-sanitizer, which looks at refq4's kernels alone
        tune        the cross-over to decoding, by number of tokens, for five shapes: crossovers.json
    2   install
        bench       against bitsandbytes and cuBLAS: cuda.json; --collect draws it, as cuda-speedups.png
        verify      the catalogue of the differential kit, the deep one
        initcheck, synccheck

After each step, its output and the report so far (gpu-check.json) are in the folder of results. A step that takes
longer than it may, or than what is left of ``--seconds``, is ended. The exit status is the number of steps that did
not pass. ``--rehearse`` takes the emulator for the GPU and asks little of each step; CI does that.
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
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "benchmarks"
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# What the tests and the peers import beside torch and what comes with it; a GPU machine has no registry to ask.
CARRIED = (
    *("cuda-bindings<14", "cuda-pathfinder", "bitsandbytes==0.50.2", "filelock", "platformdirs", "tqdm", "packaging"),
    *("rich", "markdown-it-py", "mdurl", "pygments", "pytest", "pluggy", "iniconfig", "hypothesis", "sortedcontainers"),
    *("numpy", "safetensors", "shtab"),
)


@dataclass(frozen=True)
class Step:
    """A command, what it wants of the environment, the seconds that it may take, and the call in which it is run."""

    command: list[str]
    seconds: float
    part: int
    environment: dict[str, str] = field(default_factory=dict)


def main(arguments: list[str] | None = None) -> int:
    """Run the steps; returns how many did not pass."""
    options = _parser().parse_args(arguments)
    if options.carry:
        return carry(options.carry, options.python)
    if options.collect:
        return collect(options.collect, options.into)
    out = (options.out or Path(tempfile.gettempdir(), "refq4-gpu-check")).absolute()
    steps = all_steps(out, options.wheels, options.rehearse)
    if unknown := set(options.only or ()) - set(steps):
        print(f"gpu_check: there is no step {min(unknown)!r}; there are {', '.join(steps)}", file=sys.stderr)
        return 2
    if options.list:
        for step in steps.values():
            print(shlex.join([*(f"{k}={v}" for k, v in step.environment.items()), *step.command]))
        return 0
    wanted = [name for name, step in steps.items() if _is_wanted(name, step, options)]
    failed = run_all({name: steps[name] for name in wanted}, out, options.seconds, options.rehearse)
    if options.out is None and (out / "gpu-check.json").is_file():
        collect(out, options.into)
    return failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--only", action="append", metavar="STEP", help="only this step (repeatable)")
    parser.add_argument("--part", type=int, choices=(1, 2), help="only the steps of the first or second call")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end within so many seconds")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where results go (default: a temporary folder, and figures at once into the docs)",
    )
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install these first, without a registry")
    parser.add_argument("--rehearse", action="store_true", help="the emulator in place of the GPU, little of each step")
    parser.add_argument("--carry", type=Path, metavar="DIR", help="build and fetch the wheels, and end")
    parser.add_argument("--python", default="3.12", help="that of the machine with the GPU, for --carry (%(default)s)")
    parser.add_argument("--collect", type=Path, metavar="DIR", help="take figures from there into the docs, and end")
    parser.add_argument("--into", type=Path, default=RESULTS, metavar="DIR", help="where --collect puts them")
    return parser


def _is_wanted(name: str, step: Step, options: argparse.Namespace) -> bool:
    if name == "install":
        return True
    return (not options.only or name in options.only) and options.part in (None, step.part)


# --- the steps --------------------------------------------------------------------------------------------------------


def all_steps(out: Path, wheels: Path | None, rehearse: bool) -> dict[str, Step]:
    """Name to step, in the order of running."""
    python = [sys.executable, "-m"]
    backend, depth = ("cuda-emulator", ["--quick", "--check", "gemv_4bit"]) if rehearse else ("cuda", ["--deep"])
    verify = [*python, "refq4", "verify", "--backend", backend]
    tests = [*python, "pytest", "-q", "-p", "no:cacheprovider", "tests/backends/cuda/test_cuda_gpu.py"]
    tests += [] if rehearse else ["--require-backends", "cuda"]
    size = ["--shapes", "32x128", "--m", "1", "16"] if rehearse else []
    bench = [*python, "refq4", "bench", "--device", "cuda", "--backend", backend, "--json", str(out / "cuda.json")]
    peers = ["--peers", "refq4", "torch bf16", "dequantize + torch"]
    bench += [*size, *peers, "--layers", "1", "--no-ops"] if rehearse else []
    sanitized = [*verify, "--quick", *(depth[1:] if rehearse else [])]
    # Without torch's cache of memory, what lies beyond a tensor is nobody's; -lineinfo gives a report its line.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "REFQ4_CUDA_FLAGS": "-lineinfo"}
    steps = {} if wheels is None else {"install": Step(unpack(wheels, out), 60, 0)}
    steps["tests"] = Step(tests, 170, 1)
    for tool in SANITIZER_TOOLS[:2]:
        steps[tool] = Step([*sanitizer(tool), *sanitized], 110, 1, alone)
    steps["tune"] = Step([*python, "refq4", "tune", "--backend", backend, *size], 150, 1)
    steps["bench"] = Step(bench, 140, 2)
    steps["verify"] = Step([*verify, *depth], 220, 2)
    for tool in SANITIZER_TOOLS[2:]:
        steps[tool] = Step([*sanitizer(tool), *sanitized], 90, 2, alone)
    return steps


def unpack(wheels: Path, out: Path) -> list[str]:
    """The command that unpacks all wheels into a folder, asking nobody."""
    found = sorted(map(str, wheels.glob("*.whl")))
    where = ["--target", str(out / "site"), "--upgrade"]
    return [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", *where, *found]


def sanitizer(tool: str) -> list[str]:
    """compute-sanitizer for refq4's own kernels: torch's would take it most of the time."""
    program = shutil.which("compute-sanitizer") or "compute-sanitizer"
    kernels = [word for name in kernel_names() for word in ("--kernel-regex", f"kns={name}")]
    return [program, "--tool", tool, "--error-exitcode", "9", *kernels]


def kernel_names() -> list[str]:
    """What the entry points in ``kernels/`` are called."""
    folder, names = ROOT / "backends" / "cuda" / "refq4_cuda" / "kernels", set()
    for file in folder.glob("*.cu"):
        for part in file.read_text().split("KERNEL")[1:]:
            inside = part.partition("(")[2]
            if part.startswith(("(", "_RESIDENT(")):
                names.add(inside.partition(")")[0].partition(",")[0].strip())
    return sorted(names)


# --- running them -----------------------------------------------------------------------------------------------------


def run_all(steps: dict[str, Step], out: Path, seconds: float, rehearse: bool) -> int:
    """Run the steps within so many seconds, leaving the report after each; how many did not pass."""
    until, outcomes = time.monotonic() + seconds, {}
    out.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] | None = None
    for name, step in steps.items():
        if name != "install" and about is None:
            about = _about(out, rehearse)
            if "reason" in about:
                print(f"gpu_check: {about['reason']}", file=sys.stderr)
                return 1
        outcomes[name] = run(name, step, out, until - time.monotonic(), rehearse)
        report = {"date": datetime.date.today().isoformat(), **(about or {}), "steps": outcomes}
        (out / "gpu-check.json").write_text(json.dumps(report, indent=1) + "\n")
        _gather(out)
    return sum(outcome["outcome"] != "passed" for outcome in outcomes.values())


def run(name: str, step: Step, out: Path, left: float, rehearse: bool) -> dict[str, Any]:
    """Run a step, its output into a file and to the terminal; what came of it."""
    print(f"--- {name}: {shlex.join(step.command)}", flush=True)
    start, limit = time.monotonic(), min(step.seconds, left)
    outcome = "not run: no time is left" if limit < 2 else None
    if outcome is None:
        log = out / f"{name}.log"
        try:
            with log.open("w") as written:
                process = subprocess.Popen(
                    step.command, cwd=ROOT, env=_environment(out, rehearse) | step.environment,
                    stdout=written, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
                outcome = _outcome(process, limit)
        except FileNotFoundError:
            outcome = (
                f"not run: there is no {step.command[0]}; it comes with the CUDA toolkit (its bin must be in PATH)"
            )
        print("".join(log.read_text(errors="replace").splitlines(keepends=True)[-15:]), end="", flush=True)
    print(f"--- {name}: {outcome}", flush=True)
    return {"outcome": outcome, "seconds": round(time.monotonic() - start, 1), "command": shlex.join(step.command)}


def _outcome(process: subprocess.Popen[bytes], limit: float) -> str:
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what it has started
        process.wait()
        return f"ended after {limit:.0f} seconds"
    return "passed" if status == 0 else f"failed with status {status}"


def _environment(out: Path, rehearse: bool) -> dict[str, str]:
    """Of a step: what was installed beside the results is found first, and kernels are kept there."""
    site, cache = out / "site", out / "cache"
    cache.mkdir(mode=0o700, exist_ok=True)
    found = os.environ | {"REFQ4_CACHE_DIR": str(cache)} | ({"REFQ4_CUDA_EMULATOR_ARCH": "90"} if rehearse else {})
    if site.is_dir():
        found["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return found


def _about(out: Path, rehearse: bool) -> dict[str, Any]:
    """GPUs, driver and NVRTC, or the reason why there is nothing to run on; asked where the steps are run."""
    name, code = "cuda-emulator" if rehearse else "cuda", "import json, sys, refq4"
    code += "; print(json.dumps(refq4.backend_info(sys.argv[1]), default=str))"
    asked = subprocess.run(
        [sys.executable, "-c", code, name], cwd=out, env=_environment(out, rehearse), capture_output=True, text=True
    )
    if asked.returncode:
        return {"reason": f"refq4 can't be imported: {asked.stderr.strip().splitlines()[-1]}"}
    info: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    if not info["available"]:
        return {"reason": info["reason"]}
    return {key: info[key] for key in ("gpus", "driver", "architecture", "nvrtc") if key in info}


def _gather(out: Path) -> None:
    """What ``tune`` has kept, beside the rest."""
    tuned = out / "cache" / "cuda" / "crossovers.json"
    if tuned.is_file():
        shutil.copy(tuned, out / "crossovers.json")


# --- before and after -------------------------------------------------------------------------------------------------


def carry(folder: Path, python: str) -> int:
    """Build refq4's wheel and fetch those that go with it."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    fetch = [*pip, "download", "-q", "--no-deps", "--only-binary=:all:", "--python-version", python, "-d", str(folder)]
    return subprocess.run(build).returncode or subprocess.run([*fetch, *CARRIED]).returncode


def collect(folder: Path, into: Path) -> int:
    """Take figures to where the docs read them, and draw the picture; the rest goes into a folder beside them."""
    beside = into / "gpu-check"
    beside.mkdir(parents=True, exist_ok=True)
    report = json.loads((folder / "gpu-check.json").read_text())
    kept = beside / "report.json"  # the two calls' steps in one
    before = json.loads(kept.read_text())["steps"] if kept.is_file() else {}
    kept.write_text(json.dumps(report | {"steps": before | report["steps"]}, indent=1) + "\n")
    if (folder / "crossovers.json").is_file():
        shutil.copy(folder / "crossovers.json", beside)
    if (folder / "cuda.json").is_file():
        from refq4.bench.plot import speedups

        shutil.copy(folder / "cuda.json", into)
        speedups(json.loads((into / "cuda.json").read_text()), into / "cuda-speedups.png")
    print(f"gpu_check: what there was in {folder} is in {into}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
