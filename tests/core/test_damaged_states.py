"""What is said of a state dict that is damaged: a ValueError that names the key, and nothing is changed or allocated.

Each line of ``DAMAGE`` is one thing that a file can hold and must not. Thousands more: ``test_fuzz_states.py``.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

import refq4
import refq4.functional as F
from refq4 import codebooks
from refq4.codebooks import Codebook, register_codebook
from refq4.functional import QuantState
from refq4.internals.statedict import json_to_tensor
from refq4.nn import LinearNF4, Params4bit
from refq4.testing import assert_same_bits

JSON = "quant_state.bitsandbytes__nf4"
DROP = object()


def quantised(nested: bool = True, n: int = 10, k: int = 100) -> tuple[torch.Tensor, QuantState]:
    generator = torch.Generator().manual_seed(1)
    return F.quantize_4bit(torch.randn(n, k, generator=generator), quant_type="nf4", compress_statistics=nested)


def saved(nested: bool = True) -> dict[str, Any]:
    return quantised(nested)[1].as_dict(packed=True)


def with_json(changes: dict[str, Any], nested: bool = True) -> dict[str, Any]:
    items = saved(nested)
    fields = json.loads(bytes(items[JSON].tolist())) | changes
    fields = {key: value for key, value in fields.items() if value is not DROP}
    return items | {JSON: json_to_tensor(fields)}


def with_text(text: str | bytes) -> dict[str, Any]:
    raw = text if isinstance(text, bytes) else text.encode()
    return replaced(JSON, torch.tensor(list(raw), dtype=torch.uint8))


def json_text(nested: bool = True) -> str:
    return bytes(saved(nested)[JSON].tolist()).decode()


def replaced(key: str, value: Any, nested: bool = True) -> dict[str, Any]:
    return saved(nested) | {key: value}


def changed(key: str, index: int, value: float, nested: bool = True) -> dict[str, Any]:
    tensor = saved(nested)[key].clone()
    tensor[index] = value
    return replaced(key, tensor, nested)


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in saved().items() if key not in keys}


def changed_device(key: str) -> dict[str, Any]:
    return replaced(key, saved()[key].to("meta"))


DAMAGE = {
    "nothing there": ({}, "neither a 'quant_state.bitsandbytes__<type>' entry nor a 'quant_type'"),
    "no scales": (without("absmax"), "absmax: missing; found"),
    "no code": (without("quant_map"), "quant_map: missing"),
    "half of the nesting": (without("nested_absmax"), "nested_absmax: missing"),
    "an unknown entry": (saved() | {"extra": torch.ones(1)}, "extra: not part of a quantisation state"),
    "two states": (
        saved() | {"quant_state.bitsandbytes__fp4": saved()[JSON]},
        "'quant_type' is there twice, also as quant_state.bitsandbytes__",
    ),
    "an entry twice": (saved() | {"a.absmax": saved()["absmax"]}, "a.absmax: 'absmax' is there twice, also as absmax"),
    "json twice": (saved() | {"blocksize": 64}, "'blocksize' is there twice, also as quant_state"),
    "json that is no tensor": (replaced(JSON, "{}"), f"{JSON}: expected JSON in a uint8 tensor .*got str"),
    "json of another dtype": (replaced(JSON, torch.zeros(3)), r"got float32 \[3\]"),
    "json that is none": (
        replaced(JSON, torch.tensor([1, 2], dtype=torch.uint8)),
        "expected UTF-8 JSON, got JSONDecodeError",
    ),
    "json that is no utf-8": (replaced(JSON, torch.tensor([255], dtype=torch.uint8)), "got UnicodeDecodeError"),
    "json nested to the ground": (with_text("[" * 60_000), "got RecursionError"),
    "json without end": (with_text("[" * 100_000), "expected JSON of at most 65536 bytes, got 100000"),
    "json that stops": (with_text(json_text()[:-1]), "expected UTF-8 JSON, got JSONDecodeError"),
    "a json key twice": (
        with_text(json_text().replace('"dtype"', '"blocksize": 64, "dtype"')),
        "got ValueError: a key is there twice",
    ),
    "a json number of ten thousand digits": (
        with_text(json_text().replace("64,", "6" * 10_000 + ",")),
        "expected UTF-8 JSON, got ValueError: Exceeds the limit",
    ),
    "json of strided bytes, cut short": (replaced(JSON, saved()[JSON][::2]), "got JSONDecodeError"),
    "json that is sparse": (replaced(JSON, saved()[JSON].to_sparse()), "got sparse_coo uint8"),
    "json in a field that is a tensor's": (with_json({"absmax": [1, 2]}), "absmax: 'absmax' is there twice"),
    "json field that would break a terminal": (
        with_json({"\x1b[2J\ud800": 1}),
        r"nf4 \\x1b\[2J\\ud800': not part of a quantisation state",
    ),
    "json that is a list": (
        replaced(JSON, torch.tensor(list(b"[]"), dtype=torch.uint8)),
        "expected a JSON object, got list",
    ),
    "another type than the key": (with_json({"quant_type": "fp4"}), "the key says 'nf4', the quant_type in it 'fp4'"),
    "an unknown type": (
        {k.replace("nf4", "nf5"): v for k, v in with_json({"quant_type": "nf5"}).items()},
        r"quant_type: expected one of \[.*'nf4'.*\] .*got 'nf5'",
    ),
    "a type beside the json": ({"quant_type": 4, **saved()}, "'quant_type' is there twice"),
    "a type that is a list": (
        with_json({"quant_type": ["nf4"]}),
        r"the key says 'nf4', the quant_type in it \['nf4'\]",
    ),
    "a type that only begins like the key's": (
        {k.replace("nf4", "nf4.x"): v for k, v in with_json({"quant_type": "nf4"}).items()},
        "the key says 'nf4.x', the quant_type in it 'nf4'",
    ),
    "the entries of two weights": (
        {f"{'a' if 'map' in key else 'b'}.weight.{key}": value for key, value in saved().items()},
        "belongs to 'a.weight', entries before it to 'b.weight'",
    ),
    "a key that is no text": (saved() | {7: torch.ones(1)}, "7: keys are text, this one is an int"),
    "a list": (list(saved()), "expected a dict of the weight's entries, got list"),
    "no blocksize": (with_json({"blocksize": DROP}), "blocksize: missing"),
    "a blocksize that is no power of two": (with_json({"blocksize": 65}), r"blocksize: expected one of \[32, .*got 65"),
    "a blocksize that is no number": (with_json({"blocksize": "64"}), "blocksize: expected one of .*got '64'"),
    "a blocksize that is a truth value": (with_json({"blocksize": True}), "got True"),
    "another blocksize": (
        with_json({"blocksize": 128}),
        r"absmax: expected a uint8 tensor of 8 for shape \[10, 100\] .*128, got uint8 \[16\]",
    ),
    "a blocksize of zero": (with_json({"blocksize": 0}), "blocksize: expected one of .*got 0"),
    "a blocksize that is a fraction": (with_json({"blocksize": 64.0}), "blocksize: expected one of .*got 64.0"),
    "a blocksize that is negative": (with_json({"blocksize": -64}), "blocksize: expected one of .*got -64"),
    "a blocksize too long to print": (
        quantised()[1].as_dict() | {"blocksize": 10**5000},
        "blocksize: expected one of .*got an int too long to show",
    ),
    "a wrong nested blocksize": (with_json({"nested_blocksize": 100}), r"nested_blocksize: expected one of \[256\]"),
    "a nested blocksize that gives as many nested blocks": (
        with_json({"nested_blocksize": 512}),
        r"nested_blocksize: expected one of \[256\]; allow_other_nested_blocksize=True .*got 512",
    ),
    "a dtype that is none": (
        with_json({"dtype": "float8"}),
        r"dtype: expected one of \['float32', 'float16', 'bfloat16'\], got 'float8'",
    ),
    "a dtype that is an attribute of torch": (with_json({"dtype": "nn"}), "dtype: expected one of .*got 'nn'"),
    "a nested dtype that is none": (with_json({"nested_dtype": None}), "nested_dtype: expected one of .*got None"),
    "a nested dtype that scales never have": (
        with_json({"nested_dtype": "bfloat16"}),
        r"nested_dtype: expected one of \['float32'\], got 'bfloat16'",
    ),
    "a negative shape": (
        with_json({"shape": [-10, -100]}),
        r"shape: expected a list of at most 8 whole numbers .*got \[-10, -100\]",
    ),
    "a fractional shape": (with_json({"shape": [10.0, 100]}), "shape: expected a list of at most 8 whole numbers"),
    "a shape that is a number": (with_json({"shape": 1000}), "shape: expected a list of at most 8 whole numbers"),
    "a shape that is nothing": (
        with_json({"shape": None}),
        "shape: expected a list of at most 8 whole numbers .*got None",
    ),
    "a shape of truth values": (with_json({"shape": [True, True]}), r"shape: expected .*got \[True, True\]"),
    "a shape beyond 64 bits": (with_json({"shape": [0, 2**63]}), "shape: expected a list of at most 8 whole numbers"),
    "a shape that overflows to nothing": (with_json({"shape": [2**32, 2**32]}), "product of at most"),
    "a shape of nine dimensions": (with_json({"shape": [1] * 8 + [1000]}), "at most 8 whole numbers"),
    "a shape inside shapes": (with_json({"shape": [[[[[[[[10, 100]]]]]]]]}), r"got \[\[\[\[\[\[\[\.\.\.\]"),
    "an enormous shape": (with_json({"shape": [2**40, 2**40]}), "product of at most"),
    "another shape": (
        with_json({"shape": [10, 1000]}),
        r"absmax: expected a uint8 tensor of 157 for shape \[10, 1000\]",
    ),
    "an infinite offset": (
        with_json({"nested_offset": float("inf")}),
        "nested_offset: expected a finite fp32 number that is not negative, got inf",
    ),
    "a NaN offset": (
        with_json({"nested_offset": float("nan")}),
        "nested_offset: expected a finite fp32 number that is not negative, got nan",
    ),
    "an offset out of fp32": (with_json({"nested_offset": 1e39}), "nested_offset: expected a finite fp32 number"),
    "a negative offset": (with_json({"nested_offset": -0.5}), "that is not negative, got -0.5"),
    "an offset that is a truth value": (with_json({"nested_offset": True}), "nested_offset: expected .*got True"),
    "an offset that is text": (
        with_json({"nested_offset": "1"}),
        "nested_offset: expected a finite fp32 number that is not negative, got '1'",
    ),
    "scales of another dtype": (
        replaced("absmax", torch.zeros(16)),
        r"absmax: expected a uint8 tensor of 16 .*got float32 \[16\]",
    ),
    "scales in two dimensions": (replaced("absmax", torch.zeros(4, 4, dtype=torch.uint8)), r"got uint8 \[4, 4\]"),
    "scales that are complex": (replaced("absmax", torch.zeros(16).cfloat(), False), r"got complex64 \[16\]"),
    "scales that are sparse": (replaced("absmax", torch.ones(16).to_sparse(), False), "got sparse_coo float32"),
    "scales that only claim to be there": (
        with_json({"shape": [2**40, 64]}, False) | {"absmax": torch.ones(1).expand(2**40)},
        r"absmax: float32 \[1099511627776\] claims 4398046511104 bytes, and there are 4",
    ),
    "scales on meta, the rest not": (replaced("absmax", torch.zeros(16, device="meta"), False), "absmax: is on meta"),
    "scales that are a list": (replaced("absmax", [1.0]), r"absmax: expected a uint8 tensor of 16 .*got \[1.0\]"),
    "a NaN scale": (
        changed("absmax", 3, float("nan"), False),
        "absmax: scales are finite and not negative, got nan at 3",
    ),
    "an infinite scale": (changed("absmax", 15, float("inf"), False), "got inf at 15"),
    "a negative scale": (changed("absmax", 0, -1.0, False), "got -1.0 at 0"),
    "a NaN in the scales' scales": (changed("nested_absmax", 0, float("nan")), "nested_absmax: scales are finite"),
    "too many of the scales' scales": (
        replaced("nested_absmax", torch.ones(2)),
        "nested_absmax: expected a float32 tensor of 1",
    ),
    "a code of 8": (
        replaced("quant_map", torch.zeros(8)),
        r"quant_map: expected a float32 tensor of 16, got float32 \[8\]",
    ),
    "a code on meta, the rest not": (changed_device("quant_map"), "quant_map: is on meta"),
    "a code that only claims to be there": (
        replaced("quant_map", torch.zeros(1).expand(16)),
        r"quant_map: float32 \[16\] claims 64 bytes, and there are 4",
    ),
    "a code of half precision": (
        replaced("quant_map", torch.zeros(16).half()),
        "quant_map: expected a float32 tensor of 16",
    ),
    "a NaN in the code": (changed("quant_map", 2, float("nan")), "quant_map: expected 16 finite values"),
    "another code": (
        changed("quant_map", 2, 0.5),
        "quant_map: entry 2 is 0.5, the published table has -0.52507.*allow_other_code",
    ),
    "another nested code": (changed("nested_quant_map", 9, 0.5), "nested_quant_map: entry 9 is 0.5"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_refused_by_key_with_both_values(damage):
    items, says = DAMAGE[damage]
    before = copy.copy(items)
    with pytest.raises(ValueError, match=says):
        QuantState.from_dict(items)
    assert list(items) == list(before)
    assert isinstance(items, list) or all(items[key] is before[key] for key in before)


def test_the_unpacked_form_is_checked_the_same_way():
    items = quantised()[1].as_dict() | {"quant_type": 4}
    with pytest.raises(ValueError, match=r"quant_type: expected one of .*got 4"):
        QuantState.from_dict(items)


@pytest.mark.parametrize(
    ("packed", "says"),
    [
        (torch.zeros(499, 1, dtype=torch.uint8), r"weight: shape \[10, 100\] packs into 500 uint8 elements .*got 499"),
        (torch.zeros(500, 1, dtype=torch.bfloat16), "packs into 250 bfloat16 elements"),
        (torch.zeros(500, 1, dtype=torch.int32), "a packed weight is stored as uint8, bfloat16, float16, float32, got"),
    ],
    ids=["a byte short", "twice as long", "another dtype"],
)
def test_a_packed_weight_that_does_not_fit_the_state_is_refused(packed, says):
    with pytest.raises(ValueError, match=says):
        QuantState.from_dict(saved(), packed=packed)


def test_another_code_is_taken_from_the_file_on_request():
    items = changed("quant_map", 2, 0.5)
    assert float(QuantState.from_dict(items, allow_other_code=True).code[2]) == 0.5


def test_a_state_on_meta_is_read_without_its_values():
    items = {key: value if key == JSON else value.to("meta") for key, value in saved().items()}
    assert QuantState.from_dict(items).code.is_meta
    with pytest.raises(ValueError, match="expected JSON in a uint8 tensor"):
        QuantState.from_dict(items | {JSON: items[JSON].to("meta")})


# --- what is not damage -----------------------------------------------------------------------------------------------


def test_scales_in_blocks_of_another_size_are_taken_on_request():
    items = with_json({"nested_blocksize": 512})
    state = QuantState.from_dict(items, allow_other_nested_blocksize=True)
    assert state.state2.blocksize == 512
    assert_same_bits(F.dequantize_4bit(quantised()[0], state), F.dequantize_4bit(*quantised()))


def test_the_map_of_old_cpu_builds_is_taken_as_it_is():
    items = changed("nested_quant_map", 0, -1.0)
    assert float(QuantState.from_dict(items).state2.code[0]) == -1.0


@pytest.mark.parametrize("name", ["two__underscores", "dunder__"])
def test_a_codebook_of_any_name_comes_back_from_its_key(name, monkeypatch):
    monkeypatch.setattr(codebooks, "_BOOKS", dict(codebooks._BOOKS))
    register_codebook(Codebook(name, [(2 * i - 15) / 15 for i in range(16)]))
    _, state = F.quantize_4bit(torch.randn(64), quant_type=name)
    assert QuantState.from_dict(state.as_dict(packed=True)) == state


def negated(t: torch.Tensor) -> torch.Tensor:
    """The same numbers as a view of their negatives."""
    return torch.complex(t * 0, -t).conj().imag if t.is_floating_point() else t


@pytest.mark.parametrize(
    "view",
    [lambda t: torch.stack([t, torch.full_like(t, 3)], 1)[:, 0], negated],
    ids=["every second element", "a lazy negation"],
)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_tensors_that_are_views_decode_to_what_their_copies_do(view, backend):
    if (reason := refq4.backend_info(backend)["reason"]) is not None:
        pytest.skip(reason)
    packed, state = quantised(False)
    items = state.as_dict(packed=True)
    views = items | {key: view(items[key]) for key in ("absmax", "quant_map")}
    assert not (views["absmax"].is_contiguous() and not views["absmax"].is_neg())
    read = QuantState.from_dict(views, packed=packed)
    assert_same_bits(F.dequantize_4bit(packed, read, backend=backend), F.dequantize_4bit(packed, state))


# --- the packed weight, and the layer ---------------------------------------------------------------------------------

PACKED = {
    "a list": ([1, 2, 3], "weight: expected the packed weight as a dense tensor, got list"),
    "sparse": (torch.zeros(500, 1, dtype=torch.uint8).to_sparse(), "got sparse_coo uint8"),
    "a number too few": (torch.zeros(499, 1, dtype=torch.uint8), r"weight: shape \[10, 100\] packs into 500"),
    "of another dtype": (torch.zeros(500, 1, dtype=torch.int8), "weight: a packed weight is stored as uint8"),
    "complex": (torch.zeros(500, 1, dtype=torch.complex64), "weight: a packed weight is stored as uint8"),
    "a claim": (torch.zeros(1, 1, dtype=torch.uint8).expand(500, 1), "weight: .* claims 500 bytes, and there are 1"),
    "on meta": (torch.zeros(500, 1, dtype=torch.uint8, device="meta"), "weight: is on meta"),
}


@pytest.mark.parametrize("damage", PACKED)
def test_a_packed_weight_that_is_none_is_refused_by_the_layer_which_stays_as_it_was(damage):
    packed, says = PACKED[damage]
    assert_refused({"weight": packed} | {f"weight.{key}": value for key, value in saved().items()}, says)


def assert_refused(state_dict: dict[str, Any], says: str) -> None:
    layer = LinearNF4(100, 10, bias=False).to("cpu")
    weight, before = layer.weight, layer.state_dict()
    with pytest.raises(ValueError, match=says):
        layer.load_state_dict(state_dict)
    assert layer.weight is weight
    assert layer.quant_state is weight.quant_state
    for key, value in layer.state_dict().items():
        assert_same_bits(value, before[key], key)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_layer_refuses_a_damaged_state_by_key_and_stays_as_it_was(damage):
    items, _ = DAMAGE[damage]
    if not items or type(items) is list or 7 in items:
        return  # no state at all is torch's missing key; keys that are no text don't get past torch
    entries = {f"weight.{key}": value for key, value in items.items()}
    assert_refused({"weight": quantised()[0]} | entries, "|".join((*saved(), *(f"weight.{key}" for key in items))))


def test_a_transposed_shape_is_refused_by_the_layer_which_stays_as_it_was():
    entries = {f"weight.{key}": value for key, value in with_json({"shape": [100, 10]}).items()}
    says = r"weight: the checkpoint holds QuantState\(nf4 \[100, 10\].*this LinearNF4 needs shape \[10, 100\]"
    assert_refused({"weight": quantised()[0]} | entries, says)
    layer = LinearNF4(100, 10, bias=False).to("cpu")
    with pytest.raises(ValueError, match=says):
        Params4bit.from_prequantized(quantised()[0], entries, module=layer)
    assert layer.quant_state is layer.weight.quant_state


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (torch.full((10, 100), float("nan")), "weight: the tensor to quantise has a NaN or an infinity"),
        (torch.ones(10, 100, dtype=torch.int64), "weight: A must be a tensor of float32"),
        (
            torch.ones(10, 100).to_sparse(),
            r"weight: A must be a dense tensor, got a sparse_coo one; call \.to_dense\(\)",
        ),
    ],
    ids=["NaN", "integers", "sparse"],
)
def test_a_full_precision_weight_that_cannot_be_quantised_is_named(weight, says):
    assert_refused({"weight": weight}, says)


@pytest.mark.parametrize("weight", [[1.0], torch.ones(100, 10)], ids=["a list", "transposed"])
def test_a_full_precision_weight_of_another_size_is_torchs_error_with_the_key(weight):
    layer = LinearNF4(100, 10, bias=False).to("cpu")
    with pytest.raises(RuntimeError, match="size mismatch for weight: a full-precision weight of shape"):
        layer.load_state_dict({"weight": weight})


def test_another_code_can_be_loaded_into_a_layer_on_request():
    layer, entries = LinearNF4(100, 10, bias=False), changed("quant_map", 2, 0.5)
    weight = Params4bit.from_prequantized(quantised()[0], entries, module=layer, allow_other_code=True)
    assert float(weight.quant_state.code[2]) == 0.5
    assert layer.quant_state is weight.quant_state
    odd = with_json({"nested_blocksize": 512})
    weight = Params4bit.from_prequantized(quantised()[0], odd, module=layer, allow_other_nested_blocksize=True)
    assert weight.quant_state.state2.blocksize == 512


# --- which key is named, and how --------------------------------------------------------------------------------------


@pytest.fixture
def layer() -> LinearNF4:
    torch.manual_seed(1)
    return LinearNF4(128, 8, compress_statistics=True).to("cpu").eval()


@pytest.mark.reference_only("what it checks is the same for every backend")
def test_what_is_on_meta_alone_is_refused_by_its_name(layer):
    saved = layer.state_dict()
    packed = saved.pop("weight")
    stats = {key: value for key, value in saved.items() if key.startswith("weight.")}
    with pytest.raises(ValueError, match=r"^weight: is on meta"):
        F.QuantState.from_dict(stats, packed=packed.to("meta"))
    with pytest.raises(ValueError, match=r"^of\.a\.weight: is on meta"):
        F.QuantState.from_dict({f"of.a.{key}": value for key, value in stats.items()}, packed=packed.to("meta"))
    all_there = {key: value if "bitsandbytes" in key else value.to("meta") for key, value in stats.items()}
    with pytest.raises(ValueError, match=r"is on meta"):
        F.QuantState.from_dict(all_there, device="cpu", packed=packed.to("meta"))
    F.QuantState.from_dict(stats, device="meta", packed=packed.to("meta"))


@pytest.mark.reference_only("what it checks is the same for every backend")
def test_entries_that_claim_more_than_they_hold_are_refused_by_their_names(layer):
    stats = {key: value for key, value in layer.state_dict().items() if key.startswith("weight.")}
    keys = ("weight.absmax", "weight.nested_absmax", "weight.quant_map", "weight.nested_quant_map")
    for key in (*keys, "weight.quant_state.bitsandbytes__nf4"):
        with pytest.raises(ValueError, match=rf"^{key}: .*claims \d+ bytes, and there are"):
            F.QuantState.from_dict(stats | {key: _claiming(stats[key])})
    with pytest.raises(ValueError, match=r"^some\.weight: shape \[8, 128\] packs into"):
        layer.quant_state.check_packed(torch.zeros(3, dtype=torch.uint8), "some.weight")
    with pytest.raises(ValueError, match=r"^weight: shape \[8, 128\] packs into"):
        layer.quant_state.check_packed(torch.zeros(3, dtype=torch.uint8))


def _claiming(like: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor whose storage was taken away."""
    tensor = like.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.reference_only("what it checks is the same for every backend")
@pytest.mark.parametrize("length", [200, 201])
def test_a_key_is_shown_whole_up_to_200_characters(layer, length):
    stats = {key: value for key, value in layer.state_dict().items() if key.startswith("weight.")}
    key = "k" * (length - len(".absmax"))
    spoilt = {f"{key}{name.removeprefix('weight')}": value for name, value in stats.items()}
    spoilt[f"{key}.absmax"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"absmax|kkk") as error:
        F.QuantState.from_dict(spoilt)
    assert (f"{key}.absmax" in str(error.value)) is (length == 200)


# --- states put together by hand, or unpickled: nothing read them, so whoever uses them looks ------------------------

BY_HAND = {
    "a scale too few": (
        lambda s: setattr(s, "absmax", s.absmax[:-1]),
        "needs 16 uint8 elements in absmax, it has uint8",
    ),
    "scales of another dtype": (lambda s: setattr(s, "absmax", s.absmax.float()), "it has float32"),
    "no nested scale": (lambda s: setattr(s.state2, "absmax", s.state2.absmax[:0]), "1 float32 elements in state2.abs"),
    "half a nested code": (lambda s: setattr(s.state2, "code", s.state2.code[:128]), "256 float32 elements in state2"),
    "two offsets": (lambda s: setattr(s, "offset", torch.zeros(2)), "needs 1 float32 elements in offset"),
    "half a code": (lambda s: setattr(s, "code", s.code[:8]), "needs 16 float32 elements in code"),
}


@pytest.mark.parametrize("fault", BY_HAND)
def test_a_state_that_a_backend_would_read_past_is_refused_where_it_is_used(fault):
    spoil, says = BY_HAND[fault]
    packed, state = quantised()
    spoil(state)
    for use in (lambda: F.dequantize_4bit(packed, state), lambda: F.matmul_4bit(torch.ones(2, 100), packed, state)):
        with pytest.raises(ValueError, match=says):
            use()


def test_codes_without_an_entry_are_refused():
    q = torch.tensor([0, 16, 17], dtype=torch.uint8)
    with pytest.raises(ValueError, match="code has 17 entries, and the largest of the codes to decode is 17"):
        F.dequantize_blockwise(q, absmax=torch.ones(1), code=torch.linspace(-1, 1, 17))
    with pytest.raises(ValueError, match=r"code must be fp32 \[2 to 256\], got float16 \[256\]"):
        F.dequantize_blockwise(q, absmax=torch.ones(1), code=torch.zeros(256).half())
