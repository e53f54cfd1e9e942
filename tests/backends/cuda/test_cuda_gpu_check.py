"""The command for the day a GPU is lent: what it would run, that it keeps its time, and a rehearsal on the emulator."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from patience import BUSY

import refq4

pytest.importorskip("refq4_cuda", reason="the package refq4_cuda is not installed: pip install -e .")

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts" / "checks" / "gpu_check.py"
sys.path.insert(0, str(SCRIPT.parent))
import gpu_check  # noqa: E402  (a script, found by its folder)

pytestmark = pytest.mark.reference_only("it names its backends itself")


def gpu_check_run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=BUSY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: run scripts/checks/gpu_check.py itself")
def test_it_lists_its_steps_and_says_why_it_cannot_run_here(tmp_path):
    listed = gpu_check_run("--list").stdout
    for step in ("cuda/test_cuda_gpu.py", "verify --backend cuda --deep", "racecheck", "bench --device cuda", "tune"):
        assert step in listed
    refused = gpu_check_run("--out", str(tmp_path))
    assert (refused.returncode, refused.stderr) == (1, f"gpu_check: {refq4.backend_info('cuda')['reason']}\n")
    unknown = gpu_check_run("--only", "tests", "--only", "tetss")
    assert (unknown.returncode, "no step 'tetss'; there are tests, memcheck" in unknown.stderr) == (2, True)


def test_the_sanitizer_looks_at_every_kernel_of_ours_and_at_no_other():
    sources = "".join(file.read_text() for file in (ROOT / "backends/cuda/refq4_cuda/kernels").glob("*.cu"))
    entries = set(re.findall(r"^KERNEL(?:_RESIDENT)?\((\w+)", sources, re.MULTILINE))
    words = gpu_check.sanitizer("racecheck")
    assert words[1:5] == ["--tool", "racecheck", "--error-exitcode", "9"]
    assert [w for w in words[5:] if w != "--kernel-regex"] == [f"kns={name}" for name in sorted(entries)]


def test_the_wheels_to_bring_are_those_that_refq4_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {Requirement(one).name for one in project["dependencies"]} - {"torch"}
    assert needed | {"bitsandbytes==0.50.2", "pytest", "hypothesis", "matplotlib"} <= set(gpu_check.__doc__.split())
    assert "bitsandbytes==0.50.2" in project["optional-dependencies"]["bench"]


def test_a_step_ends_in_time_with_what_it_has_started():
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    start = time.monotonic()
    assert gpu_check.run(gpu_check.Step([sys.executable, "-c", child], 3.0)) == "ended after 3 seconds"
    assert time.monotonic() - start < 60
    missing = gpu_check.run(gpu_check.Step(["no-such-program"], 60))
    assert missing.startswith("not run: there is no no-such-program; it comes with the CUDA toolkit")


def test_the_report_so_far_is_there_after_each_step_and_keeps_those_of_earlier_runs(tmp_path):
    look = "import json, sys; steps = json.load(open('gpu-check/report.json'))['steps']; "
    look += "sys.exit(0 if steps['first']['outcome'] == 'failed with status 3' else 4)"
    first = gpu_check.Step([sys.executable, "-c", "raise SystemExit(3)"], 60)
    second = gpu_check.Step([sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {look}"], 60)
    machine = {"architecture": "sm_90", "reason": None}
    assert gpu_check.run_all({"first": first, "second": second}, tmp_path, machine) == 1
    assert gpu_check.run_all({"third": gpu_check.Step([sys.executable, "-c", ""], 60)}, tmp_path, machine) == 0
    report = json.loads((tmp_path / "gpu-check" / "report.json").read_text())
    assert {name: step["outcome"] for name, step in report["steps"].items()} == {
        "first": "failed with status 3",
        "second": "passed",
        "third": "passed",
    }
    assert report["architecture"] == "sm_90"


STEPS = [
    pytest.param(["bench"], id="bench"),
    pytest.param(
        ["tests", "memcheck", "racecheck", "tune", "bench", "verify", "initcheck", "synccheck"],
        id="all",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("steps", STEPS)
def test_a_rehearsal_on_the_emulator_gives_the_figures_of_the_docs(tmp_path, steps, monkeypatch):
    docs, programs = tmp_path / "docs" / "benchmarks", tmp_path / "bin"
    programs.mkdir()
    stand_in = programs / "compute-sanitizer"  # checks nothing: drops its own options and runs the rest
    stand_in.write_text('#!/bin/sh\nwhile [ "$1" != "${1#-}" ]; do shift 2; done\nexec "$@"\n')
    stand_in.chmod(0o755)
    chosen = [word for step in steps for word in ("--only", step)]
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    done = gpu_check_run("--rehearse", "--out", str(docs), *chosen, PATH=path)
    report = json.loads((docs / "gpu-check" / "report.json").read_text())
    assert {name: step["outcome"] for name, step in report["steps"].items()} == dict.fromkeys(steps, "passed"), (
        done.stdout
    )
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "docs"))
    import figures
    import places

    monkeypatch.setattr(places, "ROOT", tmp_path)
    page = figures.benchmarks("benchmarks.md")
    assert "## cuda" in page
    assert "32 x 128" in page
    assert all(f"plain: {peer}" in page for peer in ("refq4", "torch bf16", "dequantize + torch"))
    assert "(benchmarks/cuda-speedups.png)" in page
    assert (docs / "cuda-speedups.png").read_bytes().startswith(b"\x89PNG")
