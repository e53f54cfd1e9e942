"""The command line for files: quantize, inspect, explain; and what holds for all commands, in a terminal or piped."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from functools import partial
from pathlib import Path

import pytest
import torch
from patience import BUSY, until
from safetensors.torch import load_file, save_file

import refq4
from refq4 import cli
from refq4.checkpoint import places

COMMAND = [sys.executable, "-m", "refq4"]


@pytest.fixture(autouse=True, scope="module")
def nothing_left_to_compile() -> None:
    """The first use of the CPU kernels compiles them and says so on stderr, which tests here read."""
    refq4.backend_info("cpu")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    (tmp_path / "model").mkdir()
    tensors = {
        "up.weight": torch.randn(64, 64),
        "down.weight": torch.randn(32, 64),
        "lm_head.weight": torch.ones(8, 64),
    }
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    return tmp_path / "model"


def in_a_terminal(program: str, *arguments: object) -> str:
    """Everything that a Python program writes to a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    command = [sys.executable, "-c", program, *map(str, arguments)]
    settings = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS")}
    process = subprocess.Popen(
        command, stdout=theirs, stderr=theirs, stdin=theirs, env=settings | {"TERM": "xterm-256color"}
    )
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # Linux's way of saying that the other end is closed
        while piece := os.read(ours, 65536):
            text += piece
    os.close(ours)
    assert process.wait() == 0, text.decode()
    return text.decode()


# --- quantize and inspect ---------------------------------------------------------------------------------------------


def test_quantize_then_inspect(model, tmp_path, capsys):
    assert cli.main(["quantize", str(model), str(tmp_path / "out"), "--skip", "down", "--no-nested"]) == 0
    text = capsys.readouterr().out
    assert "1 layers" in text
    assert "left alone (skipped: it matches 'down'): down" in text
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert re.search(r"up\.weight +│ nf4 +│ +\[64, 64\] +│ +4\.62 ", text), text
    assert "nothing is wrong" in text


def test_each_option_of_quantize_reaches_the_file(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # transformers takes seconds to import
    options = ["--quant-type", "fp4", "--blocksize", "32", "--storage", "bfloat16", "--nested", "--no-errors", "--json"]
    (model / "config.json").write_text("{}")
    chosen = ["--include", "down", "--compute-dtype", "float16", "--backend", "reference"]
    assert cli.main(["quantize", str(model), str(tmp_path / "out"), *options, *chosen]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(layer["name"], layer["error"]) for layer in report["layers"]] == [("down", None)]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["down.weight"].dtype == torch.bfloat16
    stored = json.loads(bytes(tensors["down.weight.quant_state.bitsandbytes__fp4"].tolist()))
    assert stored["blocksize"] == 32
    assert "nested_offset" in stored
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (written["bnb_4bit_compute_dtype"], written["bnb_4bit_quant_storage"]) == ("float16", "bfloat16")


@pytest.mark.parametrize("nested", ["--nested", "--no-nested"])
def test_a_dry_run_tells_sizes_that_come_true_and_writes_nothing(model, tmp_path, nested, capsys):
    command = ["quantize", str(model), str(tmp_path / "out"), nested]
    assert cli.main([*command, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"up +│ +\[64, 64\] .*not measured", text), text
    assert "left alone (the output layer, or tied to an embedding): lm_head" in text
    assert "MB would become" in text
    assert cli.main([*command, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is written, nor begun"
    assert cli.main([*command, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    for key in ("files", "left", "quantised", "other", "bytes_before"):
        assert planned[key] == done[key]
    assert planned["bits"] == pytest.approx(done["bits"], rel=1e-2)
    header = 3000  # of the file, and what each weight says of itself
    assert done["bytes_after"] - header < planned["bytes_after"] <= done["bytes_after"]
    assert (planned["dry_run"], done["dry_run"]) == (True, False)


def test_a_dry_run_refuses_what_would_be_refused(model, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert cli.main(["quantize", str(model), str(tmp_path / "out"), "--dry-run"]) == 1
    assert "exists" in capsys.readouterr().err


def test_quiet_prints_errors_and_json_and_nothing_else(model, tmp_path, capsys):
    command = ["quantize", str(model), str(tmp_path / "out"), "--quiet"]
    assert cli.main(command) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.main(command) == 1
    assert "--force" in capsys.readouterr().err
    assert cli.main([*command, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantised"]


def test_an_output_that_exists_is_one_line_on_stderr_and_force_replaces_it(model, tmp_path, capsys):
    command = ["quantize", str(model), str(tmp_path / "out")]
    assert cli.main(command) == 0
    capsys.readouterr()
    assert cli.main(command) == 1
    captured = capsys.readouterr()
    assert "--force" in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert cli.main([*command, "--force"]) == 0


def test_ctrl_c_in_the_middle_leaves_nothing(tmp_path):
    (tmp_path / "model").mkdir()
    header = {"up.weight": {"dtype": "BF16", "shape": [2**16, 2**16], "data_offsets": [0, 2**33]}}
    text = json.dumps(header).encode()
    with open(tmp_path / "model" / "model.safetensors", "wb") as file:  # 8 GB of holes: some time goes by
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2**33)
    command = [*COMMAND, "quantize", tmp_path / "model", tmp_path / "out"]
    # What a shell starts in the background ignores Ctrl-C, and so do its children: this one is to hear it.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard)

    def writing() -> bool:
        assert process.poll() is None, process.stderr.read()
        return any(file.stat().st_blocks for file in tmp_path.glob(".out.partial-*/*"))

    until(writing, "the first bytes of the output")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=BUSY)
    assert (process.returncode, error.strip()) == (cli.INTERRUPTED, "refq4 quantize: interrupted")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_sigterm_tidies_up_as_ctrl_c_does(model, tmp_path, monkeypatch, capsys):
    def end_of_time(*arguments):
        assert list(tmp_path.glob(".out.partial-*"))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(places, "copy_others", end_of_time)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["quantize", str(model), str(tmp_path / "out")]) == cli.INTERRUPTED
    assert "interrupted" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_damaged_file_is_shown_and_is_exit_code_1(model, tmp_path, capsys):
    assert cli.main(["quantize", str(model), str(tmp_path / "out")]) == 0
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    tensors["up.weight.quant_map"][0] = -2
    save_file(tensors, path)
    capsys.readouterr()
    assert cli.main(["inspect", str(path), "--json", "--match", "up"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [problem["key"] for problem in report["problems"]] == ["up.weight"]
    assert cli.main(["inspect", str(path), "--limit", "1"]) == 1
    assert "and 1 more" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-1])
    assert cli.main(["inspect", str(path)]) == 1
    assert "can't be read as safetensors" in capsys.readouterr().err


# --- explain ----------------------------------------------------------------------------------------------------------


def test_explain_takes_a_shape_and_shows_seven_steps(capsys):
    command = [
        "explain",
        "48x100",
        "--tokens",
        "3",
        "--dtype",
        "bfloat16",
        "--bias",
        "--backend",
        "reference",
        "--json",
    ]
    assert cli.main([*command, "--quant-type", "fp4", "--no-nested", "--compute-dtype", "float32"]) == 0
    report = json.loads(capsys.readouterr().out)
    steps = report["trace"]["calls"][0]["steps"]
    assert [step["number"] for step in steps] == [1, 2, 3, 4, 5, 6, 7]
    assert "fp4 [48, 100]" in steps[0]["result"]
    assert steps[-1]["result"] == "bfloat16 [3, 48]"
    assert {op["backend"] for op in report["trace"]["ops"]} == {"reference"}
    assert report["flops"] == 2 * 3 * 48 * 100
    assert report["error"] <= report["reference_error"]
    assert cli.main(["explain", "48x100"]) == 0
    captured = capsys.readouterr()
    assert "largest absolute error against fp64" in captured.out
    assert "MatMul4Bit" in captured.out, "K = 100 is not a multiple of the blocksize"
    assert captured.err == "", "what a warning would say stands in the steps"


def test_explain_is_the_same_each_time_it_is_asked(capsys):
    errors = []
    for seed in ("1", "1", "2"):
        assert cli.main(["explain", "16x64", "--seed", seed, "--json"]) == 0
        errors.append(json.loads(capsys.readouterr().out)["error"])
    assert errors[0] == errors[1] != errors[2]


@pytest.mark.parametrize(
    "arguments",
    [["explain", "0x3"], ["explain", "12"], ["inspect", "x", "--limit", "few"], ["quantize", "x"], ["complete", "dos"]],
    ids=lambda arguments: " ".join(arguments),
)
def test_a_wrong_command_line_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["explain 8x64 --tokens 0", "bench --m 1 0", "bench --m -3", "tune --m 0"])
def test_a_call_without_tokens_is_refused(line, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(line.split())
    assert stop.value.code == 2
    assert "at least one token" in capsys.readouterr().err


# --- all commands -----------------------------------------------------------------------------------------------------


def test_every_command_has_help_with_an_example_and_json_where_it_reports(capsys):
    commands = next(iter(cli.parser()._subparsers._group_actions)).choices
    assert set(commands) == {
        "tour",
        "info",
        "explain",
        "quantize",
        "dequantize",
        "eval",
        "inspect",
        "verify",
        "bench",
        "tune",
        "run",
        "complete",
    }
    for name, command in commands.items():
        text = command.format_help()
        assert name in ("complete", "run", "tune") or "--json" in text
        assert "refq4 " + name in text


IN_A_TERMINAL = """
import os, sys
from refq4 import cli
from refq4.checkpoint import places
model, out = sys.argv[1:]
cli.main(["quantize", model, out])
print("=== no colour")
os.environ["NO_COLOR"] = "1"
cli.main(["inspect", out])
"""


def test_a_terminal_gets_progress_and_colours_but_none_with_no_color(model, tmp_path):
    coloured, plain = in_a_terminal(IN_A_TERMINAL, model, tmp_path / "out").split("=== no colour")
    colour = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|9[0-7])[;m]")
    assert "quantising to nf4" in coloured
    assert colour.search(coloured)
    assert "nothing is wrong" in plain
    assert not colour.search(plain)


def test_piped_there_is_neither_progress_nor_colour(model, tmp_path, capsys):
    assert cli.main(["quantize", str(model), str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "\x1b" not in captured.out
    assert "\r" not in captured.out


def test_a_reader_that_has_seen_enough_is_no_error(model):
    pipe = f"{sys.executable} -m refq4 inspect {model} | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {pipe}"], capture_output=True, text=True)
    assert done.returncode in (0, 141)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "offers"),
    [
        (["qu"], {"quantize"}),
        (["explain", "4x4", "--back"], {"--backend"}),
        (["quantize", "--quant-type", "n"], {"nf4"}),
        (["i"], {"info", "inspect"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bash_completes_commands_options_and_choices(words, offers, tmp_path, capsys):
    if shutil.which("bash") is None:
        pytest.skip("there is no bash to complete in: install it")
    assert cli.main(["complete", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    line = ["refq4", *words]
    ask = f"""
    source {tmp_path / "script"}
    COMP_WORDS=({" ".join(line)}); COMP_CWORD={len(line) - 1}; COMP_LINE="{" ".join(line)}"; COMP_POINT=${{#COMP_LINE}}
    $(complete -p refq4 | sed -E 's/.*-F ([^ ]+).*/\\1/')
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
    assert {word.strip() for word in done.stdout.splitlines()} == offers, done.stderr


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_get_a_script_that_knows_every_command(shell, capsys):
    assert cli.main(["complete", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in ("quantize", "inspect", "--quant-type", "explain"))
