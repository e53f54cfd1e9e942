"""Parametrised parameters cross to bitsandbytes 0.50.2 and back: the same keys, the same bytes, the same values."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from torch import nn

import refq4.nn.parametrize as ours
from refq4.testing import assert_same_bits

SHAPE = (4, 64, 128)  # whole blocks in each expert


@pytest.fixture
def theirs(bnb: ModuleType) -> ModuleType:
    return importlib.import_module(f"{bnb.__name__}.nn.parametrize")


def experts() -> nn.Module:
    module = nn.Module()
    draw = torch.Generator().manual_seed(3)
    module.down_proj = nn.Parameter(torch.randn(SHAPE, generator=draw))
    return nn.ModuleDict({"experts": module})


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_state_dict_of_either_is_that_of_the_other(theirs, quant_type, nested):
    mine, peer = experts(), experts()
    ours.replace_parameter_4bit(mine["experts"], "down_proj", nested, quant_type, 64)
    theirs.replace_parameter_4bit(peer["experts"], "down_proj", nested, quant_type, 64)
    saved, wanted = mine.state_dict(), peer.state_dict()
    assert saved.keys() == wanted.keys()
    assert_same_bits(saved["experts.down_proj.quant_map"], wanted["experts.down_proj.quant_map"])
    if quant_type == "nf4":  # the two disagree on FP4 by a rule: docs/differences.md
        assert_same_bits(saved["experts.down_proj"], wanted["experts.down_proj"])
    other = experts()
    ours.replace_parameter_4bit(other["experts"], "down_proj")
    assert not any(other.load_state_dict(wanted))
    assert torch.equal(other["experts"].down_proj, peer["experts"].down_proj)  # FP4 has a -0.0 there, 0.0 here

    back = nn.Module()
    back.down_proj = nn.Parameter(saved["experts.down_proj"], requires_grad=False)
    entries = {k.removeprefix("experts.down_proj."): v for k, v in saved.items() if k != "experts.down_proj"}
    theirs.replace_parameter_4bit_prequantized(back, "down_proj", entries, torch.device("cpu"))
    torch.testing.assert_close(back.down_proj, mine["experts"].down_proj, atol=1e-6, rtol=1e-6)
