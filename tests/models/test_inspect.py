"""inspect_checkpoint: what a file holds, its histograms against the tensors, and each kind of damage by its key."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from refq4.checkpoint import inspect_checkpoint, places, quantize_checkpoint
from refq4.checkpoint.inspection import bars
from refq4.internals.blockwise import decode_scales
from refq4.layout import unpack
from refq4.nn import Linear4bit


def layer(nested: bool, **settings: object) -> Linear4bit:
    torch.manual_seed(0)
    return Linear4bit(63, 9, quant_type="nf4", compress_statistics=nested, **settings).to("cpu")


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    tensors = {f"up.{key}": value for key, value in layer(nested=True).state_dict().items()}
    return tensors | {"norm.weight": torch.ones(9), "ids": torch.arange(3), "half": torch.ones(2, dtype=torch.float16)}


def test_counts_of_codes_and_scales_are_those_of_the_tensors(tmp_path):
    for nested, storage in ((False, torch.float32), (True, torch.uint8)):
        module = layer(nested, quant_storage=storage)
        save_file(module.state_dict(), tmp_path / "x.safetensors")
        contents = inspect_checkpoint(tmp_path / "x.safetensors")
        weight = next(tensor for tensor in contents.tensors if tensor.key == "weight")
        codes = unpack(module.weight.data.view(torch.uint8).flatten(), 63 * 9)
        assert weight.codes == torch.bincount(codes.int(), minlength=16).tolist()
        scales = decode_scales(module.quant_state)
        assert weight.scale_range == (float(scales.min()), float(scales.max()))
        assert sum(weight.scales) == scales.numel()
        assert weight.scales[0] >= 1 <= weight.scales[-1]
        assert weight.format == ("nf4, double quantisation" if nested else "nf4")
        assert (weight.shape, contents.problems) == ((9, 63), [])


def test_the_formats_and_block_sizes_are_counted_above_the_table(tmp_path):
    layers = {"up": layer(True), "down": layer(True), "head": layer(False, blocksize=128)}
    state = {f"{name}.{key}": value for name, module in layers.items() for key, value in module.state_dict().items()}
    state |= {f"layers.{i}.o_proj.weight": torch.ones(2, 3) for i in range(2)} | {"norm.weight": torch.ones(3)}
    save_file(state, tmp_path / "x.safetensors")
    contents = inspect_checkpoint(tmp_path / "x.safetensors")
    lines = str(contents).splitlines()
    above = {line.strip() for line in lines[: next(i for i, line in enumerate(lines) if "absmax" in line)]}
    assert {"2 in nf4, double quantisation, blocks of 64", "1 in nf4, blocks of 128"} <= above
    assert "not in 4 bits: 2 layers.*.o_proj.weight" in above
    bits = [tensor.bits for tensor in contents.tensors if tensor.quantised]
    assert f"{sum(bits) / 3:.3f} bits per 4-bit weight" in above, "three weights of one size"


def test_torch_files_say_the_same_as_safetensors_files(state, tmp_path):
    save_file(state, tmp_path / "x.safetensors")
    torch.save({"model": state, "step": 3}, tmp_path / "x.pt")
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    wanted, nested, old = (inspect_checkpoint(tmp_path / name) for name in ("x.safetensors", "x.pt", "old.bin"))
    by_key = {tensor.key: tensor for tensor in wanted.tensors}
    assert by_key.keys() == {"up.weight", "up.bias", "norm.weight", "ids", "half"}
    assert {tensor.key: tensor for tensor in old.tensors} == by_key
    assert {tensor.key.removeprefix("model."): vars(tensor) | {"key": ""} for tensor in nested.tensors} == {
        key: vars(tensor) | {"key": ""} for key, tensor in by_key.items()
    }
    assert by_key["ids"].format == "int64"


def test_a_directory_is_one_whole_though_a_weight_and_its_scales_are_in_two_files(state, tmp_path):
    halves = [{k: v for k, v in state.items() if ("absmax" in k) is there} for there in (True, False)]
    for i, half in enumerate(halves):
        save_file(half, tmp_path / f"{i}.safetensors")
    assert inspect_checkpoint(tmp_path).problems == []
    (problem,) = inspect_checkpoint(tmp_path / "1.safetensors").problems
    assert problem.key == "up.weight"
    assert "absmax" in problem.what


JSON = "up.weight.quant_state.bitsandbytes__nf4"


def change_json(state: dict[str, torch.Tensor], **fields: object) -> None:
    value = json.loads(bytes(state[JSON].tolist())) | fields
    state[JSON] = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("spoil", "key", "says"),
    [
        (lambda s: s.pop("up.weight"), "up.weight", "no packed weight"),
        (lambda s: s.pop("up.weight.absmax"), "up.weight", "absmax: missing"),
        (lambda s: s.update({"up.weight": s["up.weight"][:-1].clone()}), "up.weight", r"packs into 284 .* got 283"),
        (lambda s: change_json(s, shape=[9, 64]), "up.weight", r"shape \[9, 64\]"),
        (lambda s: change_json(s, blocksize=63), "up.weight", "expected one of"),
        (lambda s: s["up.weight.quant_map"].__setitem__(3, 0.5), "up.weight", "quant_map: entry 3 is 0.5"),
        (lambda s: s["up.weight.nested_absmax"].__setitem__(0, -1.0), "up.weight", "not negative"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("up.weight.")], "up.weight", "without the entries"),
        (lambda s: s["norm.weight"].__setitem__(2, float("nan")), "norm.weight", "holds 1 NaN"),
    ],
    ids=["no weight", "no absmax", "cut", "shape", "blocksize", "code", "scale", "no state", "NaN"],
)
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_what_is_wrong_is_said_by_key_and_the_rest_is_still_shown(state, tmp_path, spoil, key, says, kind):
    spoil(state)
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pt")
    save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    contents = inspect_checkpoint(path)
    assert [problem.key for problem in contents.problems] == [key]
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(contents.problems[0].what)
    assert {"up.bias", "ids"} <= {tensor.key for tensor in contents.tensors}
    text = str(contents)
    assert f"wrong  {key}" in text
    assert "1 wrong" in text


class Code:
    def __reduce__(self):
        return (print, ("this must not be printed",))


def test_a_file_that_cant_be_read_at_all_is_an_error_and_no_code_in_it_runs(tmp_path, capsys):
    torch.save({"w": Code()}, tmp_path / "evil.pt")
    (tmp_path / "bad.bin").write_bytes(b"PK nothing")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678{}")
    torch.save({"a": 1}, tmp_path / "none.pt")
    garbage = {"garbage.bin": b"\x93\x1f" * 50, "text.pt": b"hello", "frame.pt": b"\x80\x02X\xff", "zip.pt": b"PK"}
    for name, data in garbage.items():
        (tmp_path / name).write_bytes(data)
    damaged = r"can't be read as torch's format: it is damaged, or no file that torch.save wrote$"
    for name, says in dict.fromkeys([*garbage, "bad.bin", "empty.pt"], damaged).items():
        with pytest.raises(ValueError, match=says):
            inspect_checkpoint(tmp_path / name)
    for name, says in {
        "evil.pt": "it holds print, and to make one would run code from the file.*save the tensors alone",
        "bad.safetensors": "can't be read as safetensors",
        "none.pt": "holds no tensor",
    }.items():
        with pytest.raises(ValueError, match=says):
            inspect_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        inspect_checkpoint(tmp_path / "gone.safetensors")
    assert capsys.readouterr().out == ""


def test_beside_a_single_file_an_index_left_over_counts_for_nothing_as_in_transformers(tmp_path):
    config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / places.INDEX).write_text(json.dumps(index))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    shapes = {tensor.key: tensor.shape for tensor in inspect_checkpoint(tmp_path).tensors}
    assert shapes == {key: tuple(value.shape) for key, value in model.state_dict().items()}


def test_the_table_is_short_where_there_is_much_and_a_pattern_chooses(tmp_path):
    save_file({f"layers.{i}.weight": torch.ones(4, 4) for i in range(50)}, tmp_path / "x.safetensors")
    assert "and 10 more: --limit, --match, --json" in str(inspect_checkpoint(tmp_path / "x.safetensors"))
    chosen = inspect_checkpoint(tmp_path / "x.safetensors", match="layers.1?")
    assert {tensor.key for tensor in chosen.tensors} == {f"layers.{i}.weight" for i in range(10, 20)}
    assert "nothing is wrong" in chosen.text()
    assert "layers.10" in chosen._repr_html_()


def test_a_histogram_shows_what_is_rare_and_leaves_blank_what_is_not_there():
    assert bars([1000, 1, 0, 500]) == "█▁ ▄"
    assert bars([0, 0]) == "  "


def test_what_quantize_checkpoint_writes_is_sound(tmp_path):
    (tmp_path / "model").mkdir()
    tensors = {"up.weight": torch.randn(65, 63), "norm.weight": torch.ones(3)}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    report = quantize_checkpoint(tmp_path / "model", tmp_path / "out", progress=False)
    contents = inspect_checkpoint(tmp_path / "out")
    assert contents.problems == []
    weight = next(tensor for tensor in contents.tensors if tensor.quantised)
    assert weight.bits == pytest.approx(report.layers[0].bits)
    assert json.loads(json.dumps(contents.to_dict(), allow_nan=False))["tensors"][0]["key"]
    assert load_file(tmp_path / "out" / "model.safetensors").keys() > {"up.weight", "norm.weight"}
