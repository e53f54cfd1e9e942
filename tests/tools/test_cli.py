"""The command line, as a user runs it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from refq4 import cli
from refq4.internals import remedies
from refq4.testing.isolation import isolated_registry
from refq4.tools import tour

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "measure-the-cost.md"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "refq4", *arguments], capture_output=True, text=True, env=os.environ | environment
    )


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(10, 64),
        "model.layers.0.up.weight": torch.randn(128, 64),
        "model.layers.0.down.weight": torch.randn(64, 128, dtype=torch.bfloat16),
        "model.norm.weight": torch.ones(64),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_the_tour_of_the_packaged_model_gives_the_figures_of_its_page():
    if importlib.util.find_spec(tour.MODEL_PACKAGE) is None:
        pytest.skip("the packaged sentence encoder is not installed: pip install -e '.[tour]'")
    done = run("tour", "--json", REFQ4_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["sentences"], report["quantised"]) == (64, 10_616_832)
    printed = printed_rows_of_the_tour()
    assert list(printed) == [entry["name"] for entry in report["formats"]]
    for entry in report["formats"]:
        errors = [layer["error"] for layer in entry["layers"]]
        measured = [sum(errors) / len(errors), entry["mean_cosine"], entry["worst_cosine"]]
        bits, *others = printed[entry["name"]]
        assert round(entry["bits"], 3) == bits, entry["name"]
        assert measured == pytest.approx(others, abs=1.01e-4), entry["name"]  # a unit in the last digit printed
    assert [len(entry["layers"]) for entry in report["formats"]] == [36, 36, 36]
    assert [step["number"] for step in report["explanation"]["trace"]["calls"][0]["steps"]] == [1, 2, 3, 4, 5, 6, 7]


def printed_rows_of_the_tour() -> dict[str, list[float]]:
    """Bits a weight, mean error of a layer, mean and worst cosine, by format."""
    rows = re.findall(r"^\| ([\w+ ]+) \|((?: \d\.\d{3,4} \|){4})$", PAGE.read_text(), re.MULTILINE)
    return {name: [float(cell) for cell in cells.split("|")[:-1]] for name, cells in rows}


def test_the_page_on_numerics_says_of_the_tour_what_its_own_page_says():
    nf4, fp4, _ = printed_rows_of_the_tour().values()
    said = (
        f"{nf4[1]:.3f} for NF4 and {fp4[1]:.3f} for FP4, and {nf4[2]:.3f} and {fp4[2]:.3f} for the mean cosine between"
    )
    assert said in " ".join((PAGE.parents[1] / "explanation" / "numerics.md").read_text().split())


def test_the_tour_of_a_safetensors_file_prints_bits_errors_and_a_trace(checkpoint):
    done = run("tour", str(checkpoint))
    assert done.returncode == 0, done.stderr
    for text in ("0.0 M of 0.0 M parameters are in 2 linear layers", "down", "NF4 + double quantisation", "cast back"):
        assert text in done.stdout
    assert "embed_tokens" not in done.stdout
    assert "\x1b" not in done.stdout, "no colours when piped"


def test_the_tour_runs_on_a_named_backend_strictly(checkpoint, capsys):
    assert cli.main(["tour", str(checkpoint), "--backend", "reference", "--json"]) == 0
    ops = json.loads(capsys.readouterr().out)["explanation"]["trace"]["ops"]
    assert {op["backend"] for op in ops} == {"reference"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tour", "/no/such.safetensors"], "refq4 tour: no such file: /no/such.safetensors"),
        (["tour", "--backend", "refrence"], "Did you mean 'reference'"),
    ],
    ids=["no such file", "no such backend"],
)
def test_what_cant_be_done_is_one_line_on_stderr_and_exit_code_1(arguments, says, capsys):
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err
    assert captured.err.count("\n") == 1


def test_a_file_without_matrices_is_refused(tmp_path, capsys):
    save_file({"norm": torch.ones(64)}, tmp_path / "empty.safetensors")
    assert cli.main(["tour", str(tmp_path / "empty.safetensors")]) == 1
    assert "nothing to quantise" in capsys.readouterr().err


def test_a_damaged_file_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "bad.safetensors").write_bytes(b"not a safetensors file")
    assert cli.main(["tour", str(tmp_path / "bad.safetensors")]) == 1
    assert "bad.safetensors" in capsys.readouterr().err


def test_without_the_model_package_the_tour_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(tour, "MODEL_PACKAGE", "no_such_package")
    assert cli.main(["tour"]) == 1
    assert remedies.install("tour") in capsys.readouterr().err


def test_info_tells_each_backend_and_why_it_is_or_isnt_available(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "REFQ4_BACKEND", "reference", "priority", "nf4", "normal distribution"):
        assert word in text
    assert cli.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    backends = {backend["name"]: backend for backend in info["backends"]}
    assert backends["reference"]["available"] is True
    for name in ("cuda", "cuda-emulator"):  # available or not, listed; and if not, with a sentence
        assert backends[name]["available"] is (backends[name]["reason"] is None)
        assert backends[name]["reason"] is None or ": " in backends[name]["reason"]
    order = list(backends)
    assert order.index("cuda-emulator") > order.index("reference"), "auto never takes it: after the reference"


def test_info_works_with_a_wrong_environment_variable():
    done = run("info", "--json", REFQ4_BACKEND="nope")
    assert done.returncode == 0, done.stderr
    assert "unknown backend 'nope'" in json.loads(done.stdout)["machine"]["backend in effect"]


def test_help_has_examples_and_a_wrong_command_is_a_usage_error(capsys):
    done = run("tuor")
    assert done.returncode == 2
    assert "usage: " in done.stderr
    done = run("explain")
    assert done.returncode == 2
    assert done.stderr.endswith("arguments are required: NxK\nexample: python -m refq4 explain 4096x11008\n")
    for arguments, status, says in (["--help"], 0, "python -m refq4 tour"), (["--version"], 0, "refq4 "), ([], 2, ""):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == status
        assert says in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, which would be measured for minutes")
def test_tune_says_why_there_is_nothing_to_measure():
    from refq4 import backend_info

    for name, wanted in (
        ("cuda", f"backend 'cuda' is not available: {backend_info('cuda')['reason']}"),
        ("reference", "backend 'reference' has nothing to tune: name one that has, as --backend cuda"),
    ):
        done = run("tune", "--backend", name, "--shapes", "32x128", "--m", "8", "16")
        assert (done.returncode, done.stdout, done.stderr) == (1, "", f"refq4 tune: {wanted}\n")


def test_tune_hands_shapes_and_rising_numbers_of_tokens_on_and_prints_what_it_is_told(capsys):
    import refq4

    class Tunable(refq4.backend.Backend):
        name = "tunable"

        def tune(self, shapes, tokens):
            yield f"{shapes} {tokens}"
            yield "kept"

    with isolated_registry():
        refq4.register_backend(Tunable())
        assert cli.main(["tune", "--backend", "tunable", "--shapes", "32x128", "--m", "16", "8"]) == 0
        assert cli.main(["tune", "--backend", "tunable"]) == 0
    assert capsys.readouterr().out == "[(32, 128)] [8, 16]\nkept\n() []\nkept\n"
