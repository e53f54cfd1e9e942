"""The command for the day a GPU is lent: what it would run, that it keeps its time, and a rehearsal on the emulator."""

from __future__ import annotations

import json
import os
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
from refq4_cuda.launch import all_variants

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
    entries = {variant.entry for arch in (75, 90) for variant in all_variants(arch)}
    assert set(gpu_check.kernel_names()) == entries
    words = gpu_check.sanitizer("racecheck")
    assert words[1:5] == ["--tool", "racecheck", "--error-exitcode", "9"]
    assert [w for w in words[5:] if w != "--kernel-regex"] == [f"kns={name}" for name in sorted(entries)]


def test_two_calls_of_ten_minutes_hold_all_steps_and_what_is_carried_is_what_they_need():
    steps = gpu_check.all_steps(Path("out"), Path("wheels"), rehearse=False)
    for part in (1, 2):
        assert sum(step.seconds for step in steps.values() if step.part in (0, part)) <= 600
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    carried = {Requirement(one).name: Requirement(one) for one in gpu_check.CARRIED}
    needed = {Requirement(one).name for one in project["dependencies"]} - {"torch"}
    assert needed | {"bitsandbytes", "pytest", "hypothesis", "cuda-bindings"} <= set(carried)
    assert str(carried["bitsandbytes"]) in project["optional-dependencies"]["bench"]


def test_a_step_ends_in_time_with_what_it_has_started_and_its_output_stays(tmp_path):
    (tmp_path / "cache").mkdir()
    child = "import subprocess, sys, time; print('begun', flush=True); "
    child += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    start = time.monotonic()
    ended = gpu_check.run("long", gpu_check.Step([sys.executable, "-c", child], 600, 1), tmp_path, 3.0, True)
    assert ended["outcome"] == "ended after 3 seconds"
    assert time.monotonic() - start < 60
    assert (tmp_path / "long.log").read_text() == "begun\n"
    left_out = gpu_check.run("late", gpu_check.Step([sys.executable, "-c", ""], 600, 1), tmp_path, 1.0, True)
    assert left_out["outcome"] == "not run: no time is left"
    missing = gpu_check.run("none", gpu_check.Step(["no-such-program"], 600, 1), tmp_path, 60, True)
    assert missing["outcome"].startswith("not run: there is no no-such-program; it comes with the CUDA toolkit")


def test_the_report_so_far_is_there_after_each_step(tmp_path):
    look = "import json, sys; steps = json.load(open('gpu-check.json'))['steps']; "
    look += "sys.exit(0 if steps['first']['outcome'] == 'failed with status 3' else 4)"
    steps = {
        "first": gpu_check.Step([sys.executable, "-c", "raise SystemExit(3)"], 60, 1),
        "second": gpu_check.Step([sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {look}"], 60, 1),
    }
    assert gpu_check.run_all(steps, tmp_path, 600, rehearse=True) == 1
    report = json.loads((tmp_path / "gpu-check.json").read_text())
    assert {name: step["outcome"] for name, step in report["steps"].items()} == {
        "first": "failed with status 3",
        "second": "passed",
    }
    assert report["architecture"] == "sm_90"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="builds the wheel: pip install -e '.[test]'")
    folder = tmp_path_factory.mktemp("wheels")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    done = subprocess.run([*build, str(ROOT)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip can't build the wheel here: {done.stderr.strip()[-300:]}")
    return folder


STEPS = [
    pytest.param(["bench"], id="bench"),
    pytest.param(
        ["tests", "memcheck", "racecheck", "tune", "bench", "verify", "initcheck", "synccheck"],
        id="all",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("steps", STEPS)
def test_a_rehearsal_on_the_emulator_goes_from_the_carried_wheel_to_the_figures_of_the_docs(
    tmp_path, wheels, steps, monkeypatch
):
    out, docs, programs = tmp_path / "out", tmp_path / "docs" / "benchmarks", tmp_path / "bin"
    programs.mkdir()
    stand_in = programs / "compute-sanitizer"  # checks nothing: drops its own options and runs the rest
    stand_in.write_text('#!/bin/sh\nwhile [ "$1" != "${1#-}" ]; do shift 2; done\nexec "$@"\n')
    stand_in.chmod(0o755)
    chosen = [word for step in steps for word in ("--only", step)]
    there = ["--rehearse", "--wheels", str(wheels), "--out", str(out), "--seconds", str(BUSY)]
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    done = gpu_check_run(*there, *chosen, PATH=path)
    report = json.loads((out / "gpu-check.json").read_text())
    assert {name: step["outcome"] for name, step in report["steps"].items()} == dict.fromkeys(
        ["install", *steps], "passed"
    ), done.stdout
    assert (out / "site" / "refq4_cuda" / "driver.py").is_file()
    collected = gpu_check_run("--collect", str(out), "--into", str(docs))
    assert collected.returncode == 0, collected.stderr
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "docs"))
    import figures
    import places

    monkeypatch.setattr(places, "ROOT", tmp_path)
    page = figures.benchmarks("benchmarks.md")
    assert "## cuda" in page
    assert "32 x 128" in page
    assert all(f"plain: {peer}" in page for peer in ("refq4", "torch bf16", "dequantize + torch"))
    assert "(benchmarks/cuda-speedups.png)" in page
    assert (tmp_path / "docs" / "benchmarks" / "cuda-speedups.png").read_bytes().startswith(b"\x89PNG")
    kept = tmp_path / "docs" / "benchmarks" / "gpu-check" / "report.json"
    assert json.loads(kept.read_text())["steps"].keys() == report["steps"].keys()
