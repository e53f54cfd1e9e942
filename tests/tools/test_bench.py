"""The benchmark measures what it says, on small shapes; how fast anything is, no test asserts."""

from __future__ import annotations

import json
import time

import pytest
import torch

from refq4 import cli
from refq4.bench import gpu
from refq4.bench.measure import interleaved
from refq4.bench.plot import speedups
from refq4.bench.show import _figure, gpu_ops_table, gpu_table, weight_bytes
from refq4.cli.bench import _cores
from refq4.internals.verbatim import Console
from refq4.registry import check_usable
from refq4.testing.isolation import isolated_registry

pytestmark = pytest.mark.reference_only("it names its backends itself")


def test_rounds_are_interleaved_and_every_layer_gets_its_turn():
    calls: list[tuple[str, int]] = []
    runs = {name: lambda i, name=name: calls.append((name, i)) for name in ("a", "b")}
    assert set(interleaved(runs, 2, layers=2)) == {"a", "b"}
    assert calls == [("a", 0), ("a", 1), ("b", 0), ("b", 1)] * 3


def test_bytes_of_a_weight_are_its_codes_and_scales():
    assert weight_bytes(64, 128) == 64 * 128 / 2 + 4 * 64 * 2


@pytest.mark.parametrize(
    ("value", "decimals", "shown"), [(463.4, 0, "463"), (0.0041, 0, "0.0041"), (0.012, 2, "0.012"), (1.5, 2, "1.50")]
)
def test_a_small_figure_keeps_two_digits(value, decimals, shown):
    assert _figure(value, decimals) == shown


@pytest.mark.parametrize(("value", "threads"), [("3", 3), ("0", _cores()), ("", _cores())])
def test_the_number_of_threads_is_that_of_openmp_where_it_is_set(value, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert cli.parser().parse_args(["bench"]).threads == threads


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


def test_a_backend_in_a_file_can_be_timed(tmp_path, capsys):
    file = tmp_path / "timed_in_a_file.py"
    file.write_text(
        "import refq4\nfrom refq4.reference import ReferenceBackend\n\n\n"
        "class Mine(ReferenceBackend):\n    name = 'in a file'\n\n\nrefq4.register_backend(Mine())\n"
    )
    sizes = ["--shapes", "64x64", "--m", "1", "--rounds", "15", "--layers", "1", "--no-ops", "--peers", "torch bf16"]
    with isolated_registry():
        assert cli.main(["bench", "--import", str(file), "--backend", "in a file", *sizes]) == 0
    out = capsys.readouterr().out
    assert "in a file" in out
    assert "torch bf16 ms (x)" in out


def test_a_backend_with_two_ops_is_timed_in_what_it_has(tmp_path, capsys):
    file = tmp_path / "with_two_ops.py"
    file.write_text(
        "import refq4\nfrom refq4.backend import Backend\nfrom refq4.reference import ReferenceBackend as R\n\n\n"
        "class Two(Backend):\n    name = 'two ops'\n    dequantize_4bit = R.dequantize_4bit\n"
        "    dequantize_blockwise = R.dequantize_blockwise\n    gemv_4bit = R.gemm_4bit\n\n\n"
        "refq4.register_backend(Two())\n"
    )
    sizes = ["--shapes", "64x64", "--layers", "1", "--peers", "torch bf16", "--quick"]
    with isolated_registry():
        assert cli.main(["bench", "--import", str(file), "--backend", "two ops", *sizes, "--m", "1"]) == 0
        out = capsys.readouterr().out
        assert cli.main(["bench", "--backend", "two ops", *sizes, "--m", "4", "1", "2"]) == 0
        some = capsys.readouterr().out
        assert cli.main(["bench", "--backend", "two ops", *sizes, "--m", "2"]) == 1
    for shown in ("refq4 ms", "dequantise to bfloat16", "one token"):
        assert shown in out
    assert "quantise fp32" not in out
    for op in ("quantise: the backend has no quantize_4bit", "rearrange: the backend has no prepare_weight"):
        assert f"left out, {op}" in out
    assert "left out, dequantise" not in out
    for shown in ("refq4 ms", "left out, M = 4: ", "left out, M = 2: ", "limits: backend 'two ops' has no limits()"):
        assert shown in some
    assert "no gemm_4bit" in capsys.readouterr().err


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
    for op in (
        "ops on 64 x 64",
        "quantise fp32",
        "dequantise to bfloat16",
        "into memory at hand",
        "rearrange",
        "a layer of 64 x 64, one token",
    ):
        assert op in out


@pytest.mark.parametrize("shape", ["64", "64x", "ax64"])
def test_a_shape_that_is_none_is_a_usage_error(shape, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--shapes", shape])
    assert stop.value.code == 2
    assert "a shape is NxK" in capsys.readouterr().err


# --- on a GPU: the same code on CPU tensors, with a clock on the wall for the events of a device ----------------------


def wall_clock(run):
    def once() -> float:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    return once


TIMERS = {"plain": wall_clock, "graph": wall_clock}
GPU_PEERS = ["refq4", "torch bf16", "dequantize + torch"]


def printed(table) -> str:
    console = Console(width=300)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_gpus_rows_hold_every_peer_by_every_timer_and_show_as_table_and_picture(tmp_path):
    reference = check_usable("reference")
    rows = gpu.products(reference, 64, 128, [1, 3], torch.bfloat16, 2, GPU_PEERS, 2, "cpu", TIMERS)
    assert [(row["m"], row["layers"]) for row in rows] == [(1, 2), (3, 2)]
    for row in rows:
        assert {timer: set(ms) for timer, ms in row["ms"].items()} == {"plain": set(GPU_PEERS), "graph": set(GPU_PEERS)}
        assert all(ms > 0 for times in row["ms"].values() for ms in times.values())
    text = printed(gpu_table(rows, 64, 128, {"copy_gb_s": 10.0}))
    for heading in ("graph: refq4 µs", "plain: dequantize + torch µs", "of a copy's", "2 weights in turn"):
        assert heading in text
    report = {"machine": {"gpu": "none"}, "products": rows}
    speedups(report, tmp_path / "speedups.png")
    assert (tmp_path / "speedups.png").read_bytes().startswith(b"\x89PNG")
    del rows[0]["ms"]["plain"]["torch bf16"]
    with pytest.raises(ValueError, match="add it to --peers"):
        speedups(report, tmp_path / "none.png")


def test_the_gpus_ops_tell_the_bytes_that_must_move():
    rows = gpu.ops(check_usable("reference"), 2, 64, 64, "cpu", TIMERS)
    assert rows["copy bf16"]["bytes"] == 2 * 2 * 64 * 64
    assert rows["quantise bf16"]["bytes"] == rows["dequantise to bf16"]["bytes"] == 64 * 64 * 2 + weight_bytes(64, 64)
    assert "dequantise to bf16" in printed(gpu_ops_table(rows, {"copy_gb_s": 10.0}))


def test_the_weights_that_take_turns_are_larger_than_the_cache():
    for n, k in ((4096, 4096), (28672, 8192)):
        layers = gpu.layers_to_rotate(n, k, 50 << 20)
        assert (layers - 1) * n * k / 2 < 3 * (50 << 20) <= layers * n * k / 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_command_says_what_is_missing(capsys):
    assert cli.main(["bench", "--device", "cuda"]) == 1
    assert "backend 'cuda' is not available: " in capsys.readouterr().err


@pytest.mark.parametrize(("device", "peer"), [("cuda", "torch int4"), ("cpu", "dequantize + torch")])
def test_a_peer_of_the_other_device_is_refused_with_those_there_are(device, peer, capsys):
    assert cli.main(["bench", "--device", device, "--peers", peer]) == 1
    assert f"--peers {peer!r}: on {device} there are refq4, " in capsys.readouterr().err
