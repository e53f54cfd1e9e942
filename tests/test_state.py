"""QuantState, and what is said of a damaged one."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import refq4.functional as F
from refq4.functional import QuantState
from refq4.state import _json_to_tensor

JSON = "quant_state.bitsandbytes__nf4"


def quantised(nested: bool = True, n: int = 10, k: int = 100) -> tuple[torch.Tensor, QuantState]:
    generator = torch.Generator().manual_seed(1)
    return F.quantize_4bit(torch.randn(n, k, generator=generator), quant_type="nf4", compress_statistics=nested)


def saved(nested: bool = True) -> dict:
    return quantised(nested)[1].as_dict(packed=True)


def with_json(changes: dict, nested: bool = True) -> dict:
    items = saved(nested)
    fields = json.loads(bytes(items[JSON].tolist()))
    fields |= {key: value for key, value in changes.items() if value is not DROP}
    for key, value in changes.items():
        if value is DROP:
            del fields[key]
    return items | {JSON: _json_to_tensor(fields)}


DROP = object()


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("packed", [False, True], ids=["as python values", "as tensors"])
def test_both_dict_forms_come_back_equal_and_are_only_read(nested, packed):
    _, state = quantised(nested)
    items = state.as_dict(packed=packed)
    before = dict(items)
    assert QuantState.from_dict(items) == state
    assert items.keys() == before.keys()
    assert all(items[key] is before[key] for key in items)


def test_prefixes_are_stripped_and_the_state_goes_to_the_device_asked_for():
    _, state = quantised()
    items = {f"model.fc.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    assert QuantState.from_dict(items) == state
    assert QuantState.from_dict(items, "meta").state2.absmax.is_meta


def test_the_list_form_of_old_bitsandbytes():
    _, plain = quantised(False)
    _, nested = quantised(True)
    absmax, shape, dtype, blocksize, second, quant_type = plain
    assert (absmax is plain.absmax, shape, dtype, blocksize, second, quant_type) == (
        True, (10, 100), torch.float32, 64, None, "nf4",
    )  # fmt: skip
    assert nested[4][0] is nested.offset
    assert nested[4][1] is nested.state2
    assert nested[-1] == "nf4"
    assert nested[1:3] == [torch.Size([10, 100]), torch.float32]
    with pytest.raises(IndexError):
        plain[6]


def test_equality_is_exact_and_never_raises():
    _, state = quantised()
    assert state == copy.deepcopy(state)
    for change in (
        lambda s: s.absmax.bitwise_xor_(1),
        lambda s: setattr(s, "absmax", s.absmax[:-1]),
        lambda s: setattr(s, "absmax", s.absmax.float()),
        lambda s: setattr(s, "absmax", None),
        lambda s: setattr(s, "shape", torch.Size([100, 10])),
        lambda s: setattr(s, "blocksize", 128),
        lambda s: setattr(s, "dtype", torch.float16),
        lambda s: setattr(s, "quant_type", "fp4"),
        lambda s: setattr(s, "offset", s.offset + 1e-3),
        lambda s: setattr(s, "state2", None),
        lambda s: s.state2.absmax.mul_(2),
        lambda s: s.code.neg_(),
        lambda s: s.to("meta"),
        lambda s: setattr(s, "extra", 1),
    ):
        other = copy.deepcopy(state)
        change(other)
        assert (state == other) is False
        assert (other == state) is False
    assert (state == "state") is False
    assert (state == None) is False  # noqa: E711
    meta = copy.deepcopy(state).to("meta")
    assert meta == meta
    assert (meta == copy.deepcopy(meta)) is False, "what can't be read can't be called equal"


def test_to_moves_in_place_and_returns_itself_and_a_copy_shares_the_tensors():
    _, state = quantised()
    twin = state.copy()
    assert twin == state
    assert twin.state2 is not state.state2
    assert twin.state2.absmax is state.state2.absmax
    assert state.to(None) is state
    assert state.to("meta") is state
    assert state.offset.is_meta
    assert not twin.absmax.is_meta


def test_nbytes_counts_every_tensor():
    _, plain = quantised(False)
    _, nested = quantised(True)
    assert plain.nbytes() == 16 * 4 + 16 * 4
    assert nested.nbytes() == 16 + 16 * 4 + 4 + 256 * 4 + 4


def test_an_8_bit_state_says_what_it_is_when_taken_for_a_4_bit_one():
    _, state = F.quantize_blockwise(torch.randn(100))
    assert "8-bit" in repr(state)
    with pytest.raises(ValueError, match="only the state of a 4-bit tensor has a state-dict form"):
        state.as_dict()
    with pytest.raises(ValueError, match="belongs to an 8-bit blockwise tensor"):
        state.packed_weight(torch.zeros(50, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="belongs to an 8-bit blockwise tensor"):
        F.matmul_4bit(torch.randn(2, 100), torch.zeros(50, 1, dtype=torch.uint8), state)


def test_a_state_built_by_hand_with_parts_missing_says_which():
    B, state = quantised()
    broken = state.copy()
    broken.offset = None
    with pytest.raises(ValueError, match="nested but lacks the offset"):
        broken.packed_weight(B)
    broken = state.copy()
    broken.code = None
    with pytest.raises(ValueError, match="has no code"):
        broken.packed_weight(B)


# --- damage -----------------------------------------------------------------------------------------------------------

NAN = torch.tensor(float("nan"))


def replaced(key: str, value, nested: bool = True) -> dict:
    return saved(nested) | {key: value}


def changed(key: str, index: int, value: float, nested: bool = True) -> dict:
    tensor = saved(nested)[key].clone()
    tensor[index] = value
    return replaced(key, tensor, nested)


def without(*keys: str) -> dict:
    return {key: value for key, value in saved().items() if key not in keys}


DAMAGE = {
    "nothing there": ({}, "neither a 'quant_state.bitsandbytes__<type>' entry nor a 'quant_type'"),
    "no scales": (without("absmax"), "absmax: missing; found"),
    "no code": (without("quant_map"), "quant_map: missing"),
    "half of the nesting": (without("nested_absmax"), "nested_absmax: missing"),
    "an unknown entry": (saved() | {"extra": torch.ones(1)}, "extra: not part of a quantisation state"),
    "two states": (
        saved() | {"quant_state.bitsandbytes__fp4": saved()[JSON]},
        "one quant_state entry expected, found 2",
    ),
    "an entry twice": (saved() | {"a.absmax": saved()["absmax"]}, "a.absmax: 'absmax' is there twice, also as absmax"),
    "json twice": (saved() | {"blocksize": 64}, "'blocksize' is there twice, also as blocksize"),
    "json that is no tensor": (replaced(JSON, "{}"), f"{JSON}: wanted JSON in a uint8 tensor .*got str"),
    "json of another dtype": (replaced(JSON, torch.zeros(3)), r"got float32 \[3\]"),
    "json that is none": (
        replaced(JSON, torch.tensor([1, 2], dtype=torch.uint8)),
        "wanted UTF-8 JSON, got JSONDecodeError",
    ),
    "json that is no utf-8": (replaced(JSON, torch.tensor([255], dtype=torch.uint8)), "got UnicodeDecodeError"),
    "json nested to the ground": (
        replaced(JSON, torch.tensor(list(b"[" * 100_000), dtype=torch.uint8)),
        "got RecursionError",
    ),
    "json that is a list": (
        replaced(JSON, torch.tensor(list(b"[]"), dtype=torch.uint8)),
        "wanted a JSON object, got list",
    ),
    "another type than the key": (with_json({"quant_type": "fp4"}), "the key says 'nf4', the quant_type in it 'fp4'"),
    "an unknown type": (
        {k.replace("nf4", "nf5"): v for k, v in with_json({"quant_type": "nf5"}).items()},
        r"quant_type: wanted one of \[.*'nf4'.*\] .*got 'nf5'",
    ),
    "a type that is no string": ({"quant_type": 4, **saved()} | {}, "'quant_type' is there twice"),
    "no blocksize": (with_json({"blocksize": DROP}), "blocksize: missing"),
    "a blocksize that is no power of two": (with_json({"blocksize": 65}), r"blocksize: wanted one of \[32, .*got 65"),
    "a blocksize that is no number": (with_json({"blocksize": "64"}), "blocksize: wanted one of .*got '64'"),
    "a blocksize that is a truth value": (with_json({"blocksize": True}), "got True"),
    "another blocksize": (
        with_json({"blocksize": 128}),
        r"absmax: wanted a uint8 tensor of 8 for shape \[10, 100\] .*128, got uint8 \[16\]",
    ),
    "a wrong nested blocksize": (with_json({"nested_blocksize": 100}), "nested_blocksize: wanted one of"),
    "a dtype that is none": (
        with_json({"dtype": "float8"}),
        r"dtype: wanted one of \['float32', 'float16', 'bfloat16'\], got 'float8'",
    ),
    "a dtype that is an attribute of torch": (with_json({"dtype": "nn"}), "dtype: wanted one of .*got 'nn'"),
    "a nested dtype that is none": (with_json({"nested_dtype": None}), "nested_dtype: wanted one of .*got None"),
    "a negative shape": (
        with_json({"shape": [-10, -100]}),
        r"shape: wanted a list of whole numbers .*got \[-10, -100\]",
    ),
    "a fractional shape": (with_json({"shape": [10.0, 100]}), "shape: wanted a list of whole numbers"),
    "a shape that is a number": (with_json({"shape": 1000}), "shape: wanted a list of whole numbers"),
    "a shape that is nothing": (with_json({"shape": None}), "shape: wanted a list of whole numbers .*got None"),
    "an enormous shape": (with_json({"shape": [2**40, 2**40]}), "product of at most"),
    "another shape": (with_json({"shape": [10, 1000]}), r"absmax: wanted a uint8 tensor of 157 for shape \[10, 1000\]"),
    "an infinite offset": (
        with_json({"nested_offset": float("inf")}),
        "nested_offset: wanted a finite fp32 number, got inf",
    ),
    "a NaN offset": (with_json({"nested_offset": float("nan")}), "nested_offset: wanted a finite fp32 number, got nan"),
    "an offset out of fp32": (with_json({"nested_offset": 1e39}), "nested_offset: wanted a finite fp32 number"),
    "an offset that is text": (
        with_json({"nested_offset": "1"}),
        "nested_offset: wanted a finite fp32 number, got '1'",
    ),
    "scales of another dtype": (
        replaced("absmax", torch.zeros(16)),
        r"absmax: wanted a uint8 tensor of 16 .*got float32 \[16\]",
    ),
    "scales in two dimensions": (replaced("absmax", torch.zeros(4, 4, dtype=torch.uint8)), r"got uint8 \[4, 4\]"),
    "scales that are a list": (replaced("absmax", [1.0]), r"absmax: wanted a uint8 tensor of 16 .*got \[1.0\]"),
    "a NaN scale": (
        changed("absmax", 3, float("nan"), False),
        "absmax: scales are finite and not negative, got nan at 3",
    ),
    "an infinite scale": (changed("absmax", 15, float("inf"), False), "got inf at 15"),
    "a negative scale": (changed("absmax", 0, -1.0, False), "got -1.0 at 0"),
    "a NaN in the scales' scales": (changed("nested_absmax", 0, float("nan")), "nested_absmax: scales are finite"),
    "too many of the scales' scales": (
        replaced("nested_absmax", torch.ones(2)),
        "nested_absmax: wanted a float32 tensor of 1",
    ),
    "a code of 8": (
        replaced("quant_map", torch.zeros(8)),
        r"quant_map: wanted a float32 tensor of 16, got float32 \[8\]",
    ),
    "a code of half precision": (
        replaced("quant_map", torch.zeros(16).half()),
        "quant_map: wanted a float32 tensor of 16",
    ),
    "a NaN in the code": (changed("quant_map", 2, float("nan")), "quant_map: wanted 16 finite values"),
    "another code": (
        changed("quant_map", 2, 0.5),
        "quant_map: entry 2 is 0.5, the published table has -0.52507.*allow_other_code",
    ),
    "another nested code": (changed("nested_quant_map", 9, 0.5), "nested_quant_map: entry 9 is 0.5"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_refused_by_key_with_both_values(damage):
    items, says = DAMAGE[damage]
    before = dict(items)
    with pytest.raises(ValueError, match=says):
        QuantState.from_dict(items)
    assert items == before or all(items[k] is before[k] for k in before)


def test_the_unpacked_form_is_checked_the_same_way():
    items = quantised()[1].as_dict() | {"quant_type": 4}
    with pytest.raises(ValueError, match=r"quant_type: wanted one of .*got 4"):
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
    with pytest.raises(ValueError, match="wanted JSON in a uint8 tensor"):
        QuantState.from_dict(items | {JSON: items[JSON].to("meta")})


# --- fuzz -------------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
tensors = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    st.lists(st.integers(0, 20), max_size=3),
    st.sampled_from([torch.uint8, torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
fields = st.sampled_from([
    "quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset",
])  # fmt: skip
keys = st.sampled_from([*saved(), "extra", "x.absmax", "quant_type", ""])


@given(
    nested=st.booleans(),
    json_changes=st.dictionaries(fields, json_values | st.just(DROP), max_size=3),
    entries=st.dictionaries(keys, tensors | json_values | st.just(DROP), max_size=3),
)
@settings(max_examples=300)
def test_whatever_a_file_holds_only_a_value_error_comes_out(nested, json_changes, entries):
    known = json.loads(bytes(saved(nested)[JSON].tolist()))
    items = with_json({k: v for k, v in json_changes.items() if v is not DROP or k in known}, nested)
    for key, value in entries.items():
        items.pop(key, None) if value is DROP else items.update({key: value})
    try:
        state = QuantState.from_dict(items)
    except ValueError:
        return
    assert state.absmax.numel() == -(-state.shape.numel() // state.blocksize)
    assert torch.isfinite(
        F.dequantize_4bit(torch.zeros(-(-state.shape.numel() // 2), 1, dtype=torch.uint8), state)
    ).all()


@given(noise=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=8))
@settings(max_examples=300)
def test_flipped_bytes_in_the_json_give_a_value_error_or_a_state_that_fits(noise):
    items = saved()
    raw = items[JSON].clone()
    for at, byte in noise:
        raw[at % raw.numel()] = byte
    try:
        state = QuantState.from_dict(items | {JSON: raw})
    except ValueError:
        return
    assert state.absmax.numel() == -(-state.shape.numel() // state.blocksize)
