"""QuantState: its two dict forms, equality, moving, and what it says of itself."""

from __future__ import annotations

import copy

import pytest
import torch

import refq4.functional as F
from refq4.functional import QuantState


def quantised(nested: bool = True, n: int = 10, k: int = 100) -> tuple[torch.Tensor, QuantState]:
    generator = torch.Generator().manual_seed(1)
    return F.quantize_4bit(torch.randn(n, k, generator=generator), quant_type="nf4", compress_statistics=nested)


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
