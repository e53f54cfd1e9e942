"""dequantize_checkpoint: the values that 4-bit layers compute with, as a plain model, in pieces: all or nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from refq4 import cli
from refq4.checkpoint import dequantize, dequantize_checkpoint, places, quantize_checkpoint
from refq4.functional import dequantize_4bit, quantize_4bit
from refq4.testing import assert_same_bits

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def model_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "embed.weight": torch.randn(50, 64),
        "up.weight": torch.randn(1024, 64).bfloat16(),
        "down.weight": torch.randn(191, 63).half(),  # odd, and blocks straddle rows
        "down.bias": torch.randn(191).half(),
        "steps": torch.arange(5),
    }


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return model_tensors()


@pytest.fixture
def model(tmp_path, tensors) -> Path:
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt", "by": "me"})
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    return tmp_path / "model"


def quantised(model: Path, out: Path, **settings: object) -> Path:
    quantize_checkpoint(model, out, progress=False, **settings)
    return out


def decoded(tensor: torch.Tensor, dtype: torch.dtype | None, **settings: object) -> torch.Tensor:
    packed, state = quantize_4bit(tensor, **{"quant_type": "nf4", "compress_statistics": True} | settings)
    state.dtype = dtype or state.dtype
    return dequantize_4bit(packed, state)


@pytest.mark.parametrize("dtype", [None, *DTYPES.values()], ids=str)
@pytest.mark.parametrize(
    "settings",
    [{}, {"compress_statistics": False, "quant_storage": torch.float32, "quant_type": "fp4"}],
    ids=["nf4 nested", "fp4 in fp32 storage"],
)
@pytest.mark.parametrize("piece", [2**14, 2**23], ids=["many pieces", "one piece"])
def test_each_weight_is_what_dequantize_4bit_gives(model, tensors, tmp_path, settings, dtype, piece, monkeypatch):
    monkeypatch.setattr(dequantize, "PIECE", piece)
    packed = quantised(model, tmp_path / "nf4", **settings)
    report = dequantize_checkpoint(packed, tmp_path / "out", dtype=dtype, progress=False)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for key in ("up", "down"):
        wanted = decoded(tensors[f"{key}.weight"], dtype, **settings)
        assert_same_bits(written[f"{key}.weight"], wanted, key)
        assert report.layers[key] == str(wanted.dtype).removeprefix("torch.")
    for key in ("embed.weight", "down.bias"):
        assert_same_bits(written[key], tensors[key].to(dtype), key)
    assert_same_bits(written["steps"], tensors["steps"])
    assert report.layers.keys() == {"up", "down"}
    assert report.bytes_after == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_a_weight_whose_scales_are_in_another_file_is_decoded(model, tensors, tmp_path):
    packed = quantised(model, tmp_path / "nf4")
    parts = load_file(packed / "model.safetensors")
    (packed / "model.safetensors").unlink()
    names = {True: "model-00001-of-00002.safetensors", False: "model-00002-of-00002.safetensors"}
    weight_map = {key: names["absmax" in key or key == "down.weight"] for key in parts}
    for name in names.values():
        save_file({key: value for key, value in parts.items() if weight_map[key] == name}, packed / name)
    (packed / places.INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    dequantize_checkpoint(packed, tmp_path / "out", progress=False)
    index = json.loads((tmp_path / "out" / places.INDEX).read_text())
    assert index["weight_map"] == {key: name for key, name in weight_map.items() if key in tensors}
    written = {key: load_file(tmp_path / "out" / name)[key] for key, name in index["weight_map"].items()}
    assert_same_bits(written["up.weight"], decoded(tensors["up.weight"], None))
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in written.values())


SMALL = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
ARCHITECTURES = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SMALL, intermediate_size=128)),
    "gpt2, stored transposed": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=2, n_positions=32),
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_loads_the_result_as_a_plain_model_near_the_original(name, tmp_path):
    torch.manual_seed(0)
    kind, config = ARCHITECTURES[name]
    original = kind(config).eval()
    original.save_pretrained(tmp_path / "model")
    quantised(tmp_path / "model", tmp_path / "nf4")
    dequantize_checkpoint(tmp_path / "nf4", tmp_path / "out", progress=False)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    loaded = kind.from_pretrained(tmp_path / "out").eval()
    assert not hasattr(loaded.config, "quantization_config")
    layers = [module for module in loaded.modules() if type(module).__name__ in ("Linear", "Conv1D")]
    assert layers
    changed = 0
    for key, value in original.state_dict().items():
        other = loaded.state_dict()[key]
        assert (value - other).norm() < 0.12 * value.norm() + 1e-6, key
        changed += not torch.equal(value, other)
    assert changed >= 4


def test_the_dtype_goes_into_the_config(tmp_path):
    kind, config = ARCHITECTURES["llama"]
    kind(config).save_pretrained(tmp_path / "model")
    quantised(tmp_path / "model", tmp_path / "nf4")
    assert cli.main(["dequantize", str(tmp_path / "nf4"), str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    loaded = kind.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_what_bitsandbytes_saved_is_decoded_to_its_values(tmp_path, bnb, tensors):
    layer = bnb.nn.Linear4bit(64, 1024, bias=False, quant_type="nf4", compress_statistics=False)
    layer.load_state_dict({"weight": tensors["up.weight"].float()})
    layer = layer.to("cpu")
    saved = {f"up.{key}": value for key, value in layer.state_dict().items()}
    (tmp_path / "theirs").mkdir()
    save_file(saved, tmp_path / "theirs" / "model.safetensors")
    dequantize_checkpoint(tmp_path / "theirs", tmp_path / "out", progress=False)
    wanted = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert_same_bits(load_file(tmp_path / "out" / "model.safetensors")["up.weight"], wanted)


# --- whole or not at all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")], ids=["Ctrl-C", "an error"])
def test_an_interrupt_leaves_nothing_behind(model, tmp_path, error, monkeypatch):
    packed = quantised(model, tmp_path / "nf4")

    def stop(*arguments: object) -> None:
        assert list(tmp_path.glob(".out.partial-*/model.safetensors")), "it had begun"
        raise error

    monkeypatch.setattr(dequantize, "dequantize_4bit", stop)
    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        dequantize_checkpoint(packed, tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "nf4"]


def test_an_existing_model_is_replaced_only_by_force(model, tmp_path, capsys):
    packed = quantised(model, tmp_path / "nf4")
    command = ["dequantize", str(packed), str(tmp_path / "out")]
    assert cli.main(command) == 0
    assert "2 layers out of 4 bits" in capsys.readouterr().out
    assert cli.main(command) == 1
    assert "--force" in capsys.readouterr().err
    assert cli.main([*command, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == {"up": "bfloat16", "down": "float16"}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda packed: None, "must not lie in one another"),
        (lambda packed: save_file(model_tensors(), packed / "model.safetensors"), "no tensor in it is a 4-bit weight"),
        (
            lambda packed: (packed / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}'),
            "was quantised by gptq",
        ),
        (
            lambda packed: (packed / "config.json").write_text(
                '{"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": true}}'
            ),
            "in 8 bits",
        ),
        (lambda packed: without(packed, "up.weight"), "the packed weight is missing"),
        (lambda packed: without(packed, "up.weight.quant_map"), "quant_map: missing"),
    ],
    ids=["out inside model", "nothing in 4 bits", "another method", "8 bits", "no packed weight", "no code"],
)
def test_what_cant_be_decoded_is_said_and_nothing_is_written(model, tmp_path, spoil, says):
    packed = quantised(model, tmp_path / "nf4")
    spoil(packed)
    out = packed / "out" if "one another" in says else tmp_path / "out"
    with pytest.raises(ValueError, match=says):
        dequantize_checkpoint(packed, out, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "nf4"]


def without(packed: Path, key: str) -> None:
    parts = load_file(packed / "model.safetensors")
    del parts[key]
    save_file(parts, packed / "model.safetensors")


def test_a_dtype_that_no_weight_has_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dtype must be"):
        dequantize_checkpoint(tmp_path, tmp_path / "out", dtype=torch.float64)


def test_too_little_disk_is_said_before_anything_is_written(model, tmp_path, monkeypatch):
    packed = quantised(model, tmp_path / "nf4")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"the result takes .* GB and .* has"):
        dequantize_checkpoint(packed, tmp_path / "out", progress=False)


PROBE = """
import resource, sys, torch
from refq4.checkpoint import dequantize_checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.set_num_threads(1)
dequantize_checkpoint(sys.argv[1], sys.argv[2] + "-small", progress=False)  # what loads on first use is loaded
start = peak()
dequantize_checkpoint(sys.argv[3], sys.argv[2], progress=False)
print(peak() - start)
"""


def test_a_model_goes_through_in_pieces(tmp_path):
    """A weight of 200 MB in fp32 and a table of 100 MB, through a few times the 32 MB of a piece."""
    if not sys.platform.startswith("linux"):
        pytest.skip("peak memory is read from getrusage in Linux's units; run this on Linux")
    for name, rows in (("small", 64), ("large", 50_000)):
        (tmp_path / name).mkdir()
        zeros = {"up.weight": torch.zeros(rows, 1024), "embed.weight": torch.zeros(rows // 2, 1024)}
        save_file(zeros, tmp_path / name / "model.safetensors")
        quantised(tmp_path / name, tmp_path / f"{name}-nf4", include=["up"], measure=False)
    arguments = [tmp_path / "small-nf4", tmp_path / "out", tmp_path / "large-nf4"]
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 300e6
    assert int(done.stdout) < 150e6
