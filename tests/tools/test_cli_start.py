"""The first second of the command line: what needs no torch does without it, and Ctrl-C while torch loads is quiet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from patience import BUSY, until

from refq4 import cli
from refq4.bench import command, peers
from refq4.cli import bench as bench_command
from refq4.cli import options
from refq4.codebooks import codebook_names
from refq4.functional import DEFAULT_BLOCKSIZE
from refq4.internals.scale_search import SCALES
from refq4.layout import STORAGE_DTYPES
from refq4.state import BLOCKSIZES, WEIGHT_DTYPES

SCRIPT = "import sys\nfrom refq4.cli import main\nsys.exit(main())\n"  # what pip installs as refq4


@pytest.fixture(params=["python -m refq4", "refq4"])
def started(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """Each of the two ways to call the command."""
    if request.param != "refq4":
        return [sys.executable, "-m", "refq4"]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "refq4").write_text(SCRIPT)
    return [sys.executable, str(tmp_path / "bin" / "refq4")]


def with_torch_like(tmp_path: Path, body: str) -> dict[str, str]:
    """An environment in which ``import torch`` runs this."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(body)
    paths = [str(tmp_path), str(Path(cli.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--help"], 0, "quantise a safetensors model directory"),
        (["--version"], 0, "refq4 "),
        (["quantize", "--help"], 0, "--quant-type"),
        (["bench", "--help"], 0, "onnxruntime"),
        (["complete", "bash"], 0, "--blocksize"),
        ([], 2, "COMMAND"),
        (["tuor"], 2, "invalid choice"),
        (["explain", "12"], 2, "a shape is NxK"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_completion_and_a_wrong_command_line_need_no_torch(started, arguments, code, says, tmp_path):
    without = with_torch_like(tmp_path, "raise ImportError('torch is imported')")
    done = subprocess.run([*started, *arguments], env=without, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("program", ["train.py", "package"])
def test_another_program_that_imports_refq4_keeps_its_own_help(program, tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("import refq4\n")
    (tmp_path / "package" / "__main__.py").write_text("print('its own')\n")
    (tmp_path / "train.py").write_text("import refq4\nprint('its own')\n")
    command = ["train.py"] if program == "train.py" else ["-m", "package"]
    done = subprocess.run([sys.executable, *command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("its own\n", "")


def test_ctrl_c_while_torch_loads_is_quiet(started, tmp_path):
    slow = with_torch_like(
        tmp_path, f"import pathlib, time\npathlib.Path({str(tmp_path / 'loading')!r}).touch()\ntime.sleep({BUSY})"
    )
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job ignores Ctrl-C
    process = subprocess.Popen(
        [*started, "info"],
        env=slow,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=heard,
    )
    until((tmp_path / "loading").exists, "torch's import")
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=BUSY)
    assert (process.returncode, out, error) == (cli.INTERRUPTED, b"", b"")


def test_what_the_help_offers_is_what_the_core_and_the_benchmark_offer():
    assert list(options.CODEBOOKS) == codebook_names()
    assert options.SCALES == SCALES
    assert (options.BLOCKSIZES, options.DEFAULT_BLOCKSIZE) == (BLOCKSIZES, DEFAULT_BLOCKSIZE)
    assert [options.dtype(name) for name in options.DTYPES] == list(WEIGHT_DTYPES)
    assert [options.dtype(name) for name in options.STORAGE] == list(STORAGE_DTYPES)
    assert options.dtype("bfloat16") is options.dtype("bf16") is torch.bfloat16
    assert tuple(command.SHAPES) == bench_command.DEVICES
    assert tuple(peers.DEVICE_DTYPES) == bench_command.DTYPES
    assert tuple(peer.name for peer in peers.PEERS) == bench_command.PEERS
    assert tuple(peer.name for peer in peers.GPU_PEERS) == bench_command.GPU_PEERS
