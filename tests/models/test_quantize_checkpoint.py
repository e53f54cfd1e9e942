"""quantize_checkpoint: the bits of quantize_model, in transformers' places, in bounded memory, whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import refq4
from refq4.checkpoint import places, quantize_checkpoint, weights
from refq4.checkpoint.ahead import read_ahead
from refq4.checkpoint.selection import Output, Selection
from refq4.checkpoint.tensors import SafetensorsReader
from refq4.models.report import QuantizationReport
from refq4.testing import assert_same_bits


def model_tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(50, 64, dtype=dtype),
        "model.layers.0.mlp.up.weight": torch.randn(192, 64, dtype=dtype),
        "model.layers.0.mlp.down.weight": torch.randn(64, 192, dtype=dtype),
        "model.layers.1.mlp.up.weight": torch.randn(191, 63, dtype=dtype),  # odd, and blocks straddle rows
        "model.layers.1.mlp.up.bias": torch.randn(191, dtype=dtype),
        "model.norm.weight": torch.ones(64, dtype=torch.float32),
        "model.steps": torch.arange(5),
        "lm_head.weight": torch.randn(50, 64, dtype=dtype),
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    save_file(model_tensors(), tmp_path / "model" / "model.safetensors", {"format": "pt", "by": "me"})
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    (tmp_path / "sharded").mkdir()
    tensors = model_tensors(torch.float32)
    halves = [dict(list(tensors.items())[:3]), dict(list(tensors.items())[3:])]
    weight_map = {}
    for i, half in enumerate(halves, 1):
        name = f"model-{i:05}-of-00002.safetensors"
        save_file(half, tmp_path / "sharded" / name)
        weight_map |= dict.fromkeys(half, name)
    index = {"metadata": {"total_size": 1, "total_parameters": 7}, "weight_map": weight_map}
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path / "sharded"


def left_behind(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path.name.startswith((out.name, f".{out.name}")))


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [2**14, 2**24], ids=["many pieces", "one piece"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"compress_statistics": False, "quant_storage": torch.bfloat16},
        {"quant_type": "fp4", "blocksize": 32, "quant_storage": torch.float32},
        {"scales": "search"},
    ],
    ids=["nf4 nested", "nf4 in bf16 storage", "fp4 nested in blocks of 32", "nf4 with scales that were searched"],
)
def test_a_file_holds_the_bits_that_quantize_4bit_gives(model, tmp_path, settings, piece, monkeypatch):
    monkeypatch.setattr(weights, "PIECE", piece)
    tensors = model_tensors()
    tensors["model.layers.0.mlp.up.weight"] = torch.randn(1024, 64)  # four pieces of the small kind, and fp32
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    report = quantize_checkpoint(model, tmp_path / "out", progress=False, **settings)
    written = load_file(tmp_path / "out" / "model.safetensors")
    chosen = [f"model.layers.{name}.weight" for name in ("0.mlp.up", "0.mlp.down", "1.mlp.up")]
    assert {f"{layer.name}.weight" for layer in report.layers} == set(chosen)
    settings = {"quant_type": "nf4", "compress_statistics": True} | settings
    for key, tensor in tensors.items():
        if key not in chosen:
            assert_same_bits(written.pop(key), tensor)
            continue
        packed, state = refq4.functional.quantize_4bit(tensor, **settings)
        assert_same_bits(written.pop(key), packed)
        for name, value in state.as_dict(packed=True).items():
            assert_same_bits(written.pop(f"{key}.{name}"), value)
        entry = next(layer for layer in report.layers if f"{layer.name}.weight" == key)
        decoded = refq4.functional.dequantize_4bit(packed, state)
        wanted = (tensor.float() - decoded.float()).norm() / tensor.float().norm()
        assert entry.error == pytest.approx(float(wanted), rel=1e-4)
        assert entry.shape == tuple(tensor.shape)
    assert not written


def test_files_keep_their_names_and_the_index_leads_to_every_key(sharded, tmp_path):
    report = quantize_checkpoint(sharded, tmp_path / "out", progress=False)
    index = json.loads((tmp_path / "out" / places.INDEX).read_text())
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    there = {name: load_file(tmp_path / "out" / name) for name in report.files}
    assert {(key, name) for name, tensors in there.items() for key in tensors} == set(index["weight_map"].items())
    total = sum(tensor.nbytes for tensors in there.values() for tensor in tensors.values())
    assert index["metadata"] == {"total_size": total, "total_parameters": 7}
    assert report.bytes_after == sum((tmp_path / "out" / name).stat().st_size for name in report.files)


def test_every_tensor_is_aligned_and_the_files_own_strings_are_kept(model, tmp_path):
    quantize_checkpoint(model, tmp_path / "out", progress=False)
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    assert header.pop("__metadata__") == {"format": "pt", "by": "me"}
    bytes_an_element = {"F32": 4, "BF16": 2, "I64": 8, "U8": 1}
    for item in header.values():
        assert (8 + size + item["data_offsets"][0]) % bytes_an_element[item["dtype"]] == 0
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(header)


def test_on_the_backend_that_is_named(model, tmp_path):
    with pytest.raises(refq4.UnknownBackendError, match="Did you mean 'reference'"):
        quantize_checkpoint(model, tmp_path / "out", backend="refrence", progress=False)
    quantize_checkpoint(model, tmp_path / "out", backend="reference", progress=False)
    quantize_checkpoint(model, tmp_path / "auto", progress=False)
    read = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "auto")]
    assert read[0] == read[1]


# --- which tensors, where nobody can be asked -------------------------------------------------------------------------


def test_patterns_choose_among_the_matrices(model, tmp_path):
    report = quantize_checkpoint(model, tmp_path / "a", include=["layers.0", "lm_head"], skip=["down"], progress=False)
    assert {layer.name for layer in report.layers} == {"model.layers.0.mlp.up", "lm_head"}
    assert report.left["model.layers.0.mlp.down"] == "skipped: it matches 'down'"
    assert report.left["model.layers.1.mlp.up"] == "not among those to include"
    assert report.left["model.embed_tokens"] == "an embedding"
    with pytest.raises(ValueError, match="the pattern 'layrs' matches none of the 5 matrices"):
        quantize_checkpoint(model, tmp_path / "b", skip=["layrs"], progress=False)
    assert "chosen by their names" in str(report)


def test_without_transformers_the_names_decide_and_the_config_says_what_was_left(model, tmp_path, monkeypatch):
    (model / "config.json").write_text(json.dumps({"architectures": ["NewForCausalLM"], "dtype": "bfloat16"}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    report = quantize_checkpoint(model, tmp_path / "out", progress=False)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["llm_int8_skip_modules"] == ["lm_head", "model.embed_tokens"]
    assert (written["quant_method"], written["bnb_4bit_compute_dtype"]) == ("bitsandbytes", "bfloat16")
    assert report.guessed
    assert len(report.layers) == 3


def test_a_model_that_is_mostly_experts_is_refused_unless_the_layers_are_named(model, tmp_path):
    save_file(
        {"mlp.experts.0.up.weight": torch.ones(64, 64), "mlp.gate.weight": torch.ones(8, 64)},
        model / "model.safetensors",
    )
    with pytest.raises(ValueError, match=r"only 11% of the 4,608 weights .* \(mlp\.experts\.0\.up: experts that"):
        quantize_checkpoint(model, tmp_path / "out", progress=False)
    assert left_behind(tmp_path / "out") == []
    report = quantize_checkpoint(model, tmp_path / "out", include=["*"], progress=False)
    assert [layer.name for layer in report.layers] == ["mlp.gate"]
    assert report.left == {"mlp.experts.0.up": "experts that transformers holds in one tensor"}


def test_a_name_that_transformers_would_also_read_as_another_is_written_as_an_anchored_expression(
    model, tmp_path, monkeypatch
):
    save_file({"up.weight": torch.ones(64, 64), "mlp.up.weight": torch.ones(64, 64)}, model / "model.safetensors")
    (model / "config.json").write_text("{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    quantize_checkpoint(model, tmp_path / "out", include=["mlp"], progress=False)
    skip = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert skip == ["^up$", "lm_head"]


# --- whole or not at all ----------------------------------------------------------------------------------------------


def test_other_files_are_copied_and_weights_in_other_formats_are_not(model, tmp_path):
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text("{}")
    (model / ".cache").mkdir()
    (model / ".cache" / "secret").write_text("")
    (model / "pytorch_model.bin").write_bytes(b"")
    report = quantize_checkpoint(model, tmp_path / "out", progress=False)
    files = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert files == ["1_Pooling/config.json", "model.safetensors", "tokenizer.json"]
    assert report.left_out == ["pytorch_model.bin"]
    assert "pytorch_model.bin" in str(report)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")], ids=["Ctrl-C", "an error"])
def test_an_interrupt_leaves_nothing_behind(sharded, tmp_path, error, monkeypatch):
    calls = []

    def copy_then_stop(self, *arguments):
        calls.append(arguments)
        if len(calls) == 3:  # in the second file: the first is written
            raise error
        return copy(self, *arguments)

    copy = weights.Converter._copy
    monkeypatch.setattr(weights.Converter, "_copy", copy_then_stop)
    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        quantize_checkpoint(sharded, tmp_path / "out", progress=False)
    assert len(calls) == 3
    assert left_behind(tmp_path / "out") == []
    assert not reading_threads()


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("refq4 reads ahead")]


def interrupted(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_an_existing_model_is_replaced_only_by_force_and_only_by_a_whole_one(model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    quantize_checkpoint(model, out, progress=False)
    (out / "notes.txt").write_text("old")
    with pytest.raises(FileExistsError, match="--force"):
        quantize_checkpoint(model, out, progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(places, "copy_others", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(model, out, force=True, progress=False)
    assert (out / "notes.txt").read_text() == "old"
    quantize_checkpoint(model, out, quant_type="fp4", force=True, progress=False)
    assert not (out / "notes.txt").exists()
    assert any(key.endswith("__fp4") for key in load_file(out / "model.safetensors"))
    assert left_behind(out) == ["out"]


def test_what_is_there_comes_back_where_it_cant_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    replace = places.os.replace

    def refuse_new(source, target):
        if Path(source).name == "new":
            raise OSError("no")
        replace(source, target)

    (tmp_path / "new").mkdir()
    monkeypatch.setattr(places.os, "replace", refuse_new)
    with pytest.raises(OSError, match="no"):
        places.move_into_place(tmp_path / "new", tmp_path / "out")
    assert (tmp_path / "out" / "old").exists()
    assert left_behind(tmp_path / "out") == ["out"]


def test_force_replaces_models_only(model, tmp_path):
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.tex").write_text("")
    (tmp_path / "file").write_text("")
    for name, says in {"documents": "holds no model", "file": "is not a directory"}.items():
        with pytest.raises(FileExistsError, match=says):
            quantize_checkpoint(model, tmp_path / name, force=True, progress=False)
    (tmp_path / "empty").mkdir()
    quantize_checkpoint(model, tmp_path / "empty", force=True, progress=False)
    assert (tmp_path / "empty" / "model.safetensors").exists()


# --- reading ahead ----------------------------------------------------------------------------------------------------


def test_one_item_is_read_ahead_and_no_more():
    taken = []
    items = (taken.append(i) or i for i in range(9))
    with closing(read_ahead(items)) as ahead:
        assert next(ahead) == 0
        assert next(ahead) == 1
    assert taken == [0, 1, 2], "2 was on its way, and closing waited for it"
    assert not reading_threads()
    assert list(read_ahead(iter(range(9)))) == list(range(9))
    assert list(read_ahead(iter([None, 0]))) == [None, 0], "an item may be anything"


def test_an_error_of_the_reading_thread_comes_out_where_its_item_is_asked_for():
    def two_then_error():
        yield from (1, 2)
        raise ValueError("ends too early")

    ahead = read_ahead(two_then_error())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ValueError, match="ends too early"):
        next(ahead)
    assert not reading_threads()


def test_a_piece_stays_while_the_next_one_is_read(model, monkeypatch):
    monkeypatch.setattr(weights, "PIECE", 2**14)
    save_file({"up.weight": torch.randn(512, 64), "kept": torch.randn(64, 512)}, model / "model.safetensors")
    settings = weights.Settings("nf4", True, torch.uint8, 64, measure=True)
    for chosen in ({"up.weight"}, set()):
        with SafetensorsReader(model / "model.safetensors") as reader:
            outputs = {key: [Output(entry, key in chosen)] for key, entry in reader.entries.items()}
            selection = Selection(outputs)
            before = None
            for piece in weights.Converter(settings, selection, QuantizationReport(), print)._reads(reader):
                if before is not None:
                    assert_same_bits(*before)
                before = piece, piece.clone()


# --- what can't be done -----------------------------------------------------------------------------------------------


def test_places_that_make_no_sense_are_refused(model, tmp_path):
    for out in (model, model / "out", tmp_path):
        with pytest.raises(ValueError, match="must not lie in one another"):
            quantize_checkpoint(model, out, force=True)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        quantize_checkpoint(model, tmp_path / "no" / "out")
    with pytest.raises(FileNotFoundError, match="no such directory"):
        quantize_checkpoint(tmp_path / "nothing", tmp_path / "out")


def leave_only_an_index(model: Path, weight_map: object) -> None:
    (model / "model.safetensors").rename(model / "other.safetensors")
    (model / places.INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (lambda m: (m / "model.safetensors").write_bytes(b"abc"), ValueError, "can't be read as safetensors"),
        (lambda m: (m / "config.json").write_text("{"), ValueError, "config.json is not JSON"),
        (lambda m: (m / "config.json").write_text("[]"), ValueError, "holds a JSON list"),
        (
            lambda m: (m / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}'),
            ValueError,
            "quantised already, says its config.json: by gptq",
        ),
        (lambda m: leave_only_an_index(m, {"a": "b.safetensors"}), FileNotFoundError, "names b.safetensors, not there"),
        (
            lambda m: leave_only_an_index(m, {"a": "../b.safetensors"}),
            ValueError,
            "outside its directory: '../b.safetensors'",
        ),
        (lambda m: leave_only_an_index(m, {"a": 3}), ValueError, "no weight_map from keys to files"),
        (
            lambda m: (m / "model.safetensors").rename(m / "model.bin"),
            FileNotFoundError,
            r"it holds model\.bin: save the model as safetensors first",
        ),
        (
            lambda m: save_file({"norm.weight": torch.ones(4)}, m / "model.safetensors"),
            ValueError,
            "no matrix of floats",
        ),
        (
            lambda m: save_file({"a.weight": torch.tensor([[1.0, float("nan")]])}, m / "model.safetensors"),
            ValueError,
            "a.weight, from element 0 .*NaN",
        ),
        (
            lambda m: [
                save_file({"a.weight": torch.ones(4, 4)}, m / "x.safetensors"),
                (m / "model.safetensors").rename(m / "y.safetensors"),
                save_file({"a.weight": torch.ones(4, 4)}, m / "z.safetensors"),
            ],
            ValueError,
            "a.weight is in z.safetensors and in another file, too",
        ),
    ],
    ids=[
        "no safetensors",
        "no JSON",
        "another JSON",
        "quantised",
        "file missing",
        "file outside",
        "no index",
        "another format",
        "no matrix",
        "NaN",
        "a key twice",
    ],
)
def test_what_cant_be_quantised_is_said_and_nothing_is_written(model, tmp_path, spoil, error, says):
    spoil(model)
    with pytest.raises(error, match=says):
        quantize_checkpoint(model, tmp_path / "out", progress=False)
    assert left_behind(tmp_path / "out") == []


def test_a_quantised_file_without_a_config_is_recognised(model, tmp_path):
    quantize_checkpoint(model, tmp_path / "once", progress=False)
    with pytest.raises(ValueError, match=r"quantised already: it holds .*bitsandbytes__nf4"):
        quantize_checkpoint(tmp_path / "once", tmp_path / "twice", progress=False)


def test_too_little_disk_is_said_before_anything_is_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr(places.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10_000})())
    with pytest.raises(ValueError, match=r"the result takes 0\.00 GB and .* has 0\.00 GB free"):
        quantize_checkpoint(model, tmp_path / "out", progress=False)


def test_a_file_that_shrinks_meanwhile_is_an_error(model, tmp_path):
    from refq4.checkpoint.tensors import SafetensorsReader

    with SafetensorsReader(model / "model.safetensors") as reader:
        with open(model / "model.safetensors", "r+b") as file:
            file.truncate(5000)
        with pytest.raises(ValueError, match="bytes too early"):
            reader.tensor("lm_head.weight")


# --- memory -----------------------------------------------------------------------------------------------------------

PROBE = """
import resource, sys, torch
from refq4.checkpoint import quantize_checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.set_num_threads(1)
quantize_checkpoint(sys.argv[1], sys.argv[2] + "-small", progress=False)  # what loads on first use is loaded
start = peak()
quantize_checkpoint(sys.argv[3], sys.argv[2], progress=False)
print(peak() - start)
"""


def sparse_model(directory: Path, shapes: dict[str, list[int]]) -> Path:
    """A file of bf16 zeros that takes no disk: holes where the data is."""
    directory.mkdir()
    header, end = {}, 0
    for key, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return directory


def test_a_model_goes_through_in_pieces(tmp_path):
    """500 MB in two tensors, through a few times the 16 MB of a piece."""
    if not sys.platform.startswith("linux"):
        pytest.skip("peak memory is read from getrusage in Linux's units; run this on Linux")
    small = sparse_model(tmp_path / "small", {"up.weight": [64, 64]})
    large = sparse_model(tmp_path / "large", {"up.weight": [8192, 6 * 1024], "embed.weight": [200_000, 1024]})
    done = subprocess.run([sys.executable, "-c", PROBE, small, tmp_path / "out", large], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (large / "model.safetensors").stat().st_size > 500e6
    assert int(done.stdout) < 220e6
