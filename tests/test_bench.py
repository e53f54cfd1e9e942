"""The benchmark measures what it says, on small shapes; how fast anything is, no test asserts."""

from __future__ import annotations

import json

import pytest
import torch

from refq4 import cli
from refq4.bench.measure import interleaved
from refq4.bench.show import weight_bytes

pytestmark = pytest.mark.reference_only("it names its backends itself")


def test_rounds_are_interleaved_and_every_layer_gets_its_turn():
    calls: list[tuple[str, int]] = []
    runs = {name: lambda i, name=name: calls.append((name, i)) for name in ("a", "b")}
    assert set(interleaved(runs, 2, layers=2)) == {"a", "b"}
    assert calls == [("a", 0), ("a", 1), ("b", 0), ("b", 1)] * 3


def test_bytes_of_a_weight_are_its_codes_and_scales():
    assert weight_bytes(64, 128) == 64 * 128 / 2 + 4 * 64 * 2


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_command_measures_prints_and_writes(backend, tmp_path, capsys):
    files = ["--json", str(tmp_path / "figures.json"), "--png", str(tmp_path / "roofline.png")]
    sizes = ["--shapes", "96x128", "--m", "1", "3", "--rounds", "15", "--layers", "2", "--no-ops", "--threads", "1"]
    peers = ["--peers", "refq4", "refq4 canonical", "torch bf16", "torch fp32"]
    threads = torch.get_num_threads()
    assert cli.main(["bench", "--backend", backend, *sizes, *peers, *files]) == 0
    assert torch.get_num_threads() == threads
    report = json.loads((tmp_path / "figures.json").read_text())
    assert [row["m"] for row in report["products"]] == [1, 3]
    assert set(report["products"][0]["ms"]) == set(peers[1:])
    assert all(ms > 0 for row in report["products"] for ms in row["ms"].values())
    assert report["machine"]["backend"] == backend
    assert (report["limits"] != {}) == (backend == "cpu")
    assert "torch bf16 ms (x)" in capsys.readouterr().out
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_a_peer_that_is_not_installed_is_named_with_the_reason(capsys):
    sizes = ["--shapes", "64x64", "--m", "1", "--rounds", "15", "--layers", "1", "--no-ops"]
    assert cli.main(["bench", *sizes, "--peers", "refq4", "onnxruntime"]) == 0
    out = capsys.readouterr().out
    assert "onnxruntime: ModuleNotFoundError" in out or "onnxruntime ms (x)" in out


def test_the_other_ops_are_measured_too(bnb, capsys):
    sizes = [
        "--shapes",
        "64x64",
        "--m",
        "1",
        "--rounds",
        "15",
        "--layers",
        "1",
        "--peers",
        "refq4",
        "bitsandbytes packed",
    ]
    assert cli.main(["bench", *sizes, "--quick"]) == 0
    out = capsys.readouterr().out
    for op in ("quantise fp32", "dequantise to bfloat16", "rearrange", "a layer of 64 x 64, one token"):
        assert op in out


@pytest.mark.parametrize("shape", ["64", "64x", "ax64"])
def test_a_shape_that_is_none_is_a_usage_error(shape, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--shapes", shape])
    assert stop.value.code == 2
    assert "a shape is NxK" in capsys.readouterr().err
