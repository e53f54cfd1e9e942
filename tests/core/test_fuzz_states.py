"""State dicts changed at random: what is valid is read, saved and decoded alike, anything else is a ValueError.

The quick form of scripts/checks/fuzz_states.py, with hypothesis making the choices where it can shrink them. The
reader is also spoilt on purpose, so that it is known that the fuzzer finds such things.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refq4.internals import remedies, statedict

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "checks"))
import fuzz_states
from state_mutations import BASES, as_python, mutate
from state_oracle import WrongAnswerError, check, check_layer, expected

pytestmark = pytest.mark.reference_only("what a file holds is read without a backend")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("limit_memory", "limit_time"):  # they would hold for the tests that follow
        monkeypatch.setattr(fuzz_states, limit, lambda: None)
    monkeypatch.setattr(fuzz_states.torch, "set_num_threads", lambda n: None)


def states(first: int, count: int) -> Iterator[dict]:
    return (mutate(random.Random(f"tests {number}")) for number in range(first, first + count))


def test_what_was_saved_is_accepted():
    for base in BASES:
        assert check(dict(base))


@given(st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_whatever_a_file_holds_it_is_read_right_or_refused_with_a_value_error(rng):
    check(mutate(rng))


def test_thousands_of_states_are_read_right_or_refused_with_a_value_error():
    verdicts = [check(entries) for entries in states(0, 2000)]
    assert 400 < sum(verdicts) < 1600, "both kinds are well represented"


def test_a_layer_takes_what_is_valid_and_of_its_shape_and_otherwise_stays_as_it_was():
    verdicts = [check_layer(entries) for entries in states(5000, 500)]
    assert 10 < sum(verdicts) < 250, "both kinds are there"


@pytest.mark.parametrize("flips", [1, 2])
def test_no_flipped_bit_in_the_json_is_read_as_another_state_than_it_spells(flips):
    (base,) = [base for base in BASES if len(base) == 5 and "quant_state.bitsandbytes__nf4" in base][:1]
    rng = random.Random(flips)
    for bit in range(8 * len(base["quant_state.bitsandbytes__nf4"])):
        raw = base["quant_state.bitsandbytes__nf4"].clone()
        for at in (bit, rng.randrange(8 * len(raw)))[:flips]:
            raw[at // 8] ^= 1 << at % 8
        check(base | {"quant_state.bitsandbytes__nf4": raw})


FAULTS = {
    "a key twice in the JSON": ("_once_each", dict),
    "any tensor is a row": ("_is_row", lambda value, dtype, numel: isinstance(value, torch.Tensor)),
    "views stay views": ("_plain", lambda value: value.requires_grad_(False) if value.is_leaf else value),
    "an offset of any number": ("Reader._offset", lambda self, name: float(self.items[name])),
    "any word or number": ("Reader._one_of", lambda self, name, allowed, hint="": self.items[name]),
    "entries of several weights": ("Reader._same_prefix", lambda self, key, prefix: None),
    "what a view claims": ("_check_holds", lambda key, value: None),
    "what is on meta": ("Reader._check_devices", lambda self, device, packed: None),
    "any field": ("Reader._check_fields", lambda self, wanted: None),
    "a shape unchecked": ("Reader._shape", lambda self: torch.Size(self.items["shape"])),
    "no code is refused": ("Reader._code", lambda self, name, *known: self.items[name]),
    "scales unchecked": ("Reader._scales", lambda self, name, dtype, numel: self.items[name]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reader_that_is_spoilt_on_purpose_is_found_out(fault, monkeypatch):
    name, instead = FAULTS[fault]
    owner = statedict.Reader if name.startswith("Reader.") else statedict
    monkeypatch.setattr(owner, name.removeprefix("Reader."), instead)
    with pytest.raises(WrongAnswerError):
        check_all(states(0, 4000))


def check_all(tried: Iterable[dict]) -> None:
    for entries in tried:
        check(entries)


# --- the command ------------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fuzz_states.py", *arguments])
    return fuzz_states.main()


def test_the_command_counts_what_it_saw(monkeypatch, capsys):
    assert command(monkeypatch, "--count", "60", "--seed", "3") == 0
    assert command(monkeypatch, "--seconds", "0.05", "--layer") == 0
    assert capsys.readouterr().out.startswith("60 states: ")


def test_a_failure_is_shown_as_python_that_makes_it_again_and_the_command_fails(monkeypatch, capsys):
    monkeypatch.setattr(statedict.Reader, "_offset", lambda self, name: -1.0)
    assert command(monkeypatch, "--count", "500") == 1
    shown = capsys.readouterr().out
    assert "FAILED" in shown
    number = shown.partition("--only ")[2].split()[0]
    assert command(monkeypatch, "--only", number) == 1
    assert capsys.readouterr().out.startswith("import torch\nfrom refq4 import QuantState\nQuantState.from_dict({")


def test_shown_states_are_those_that_were_tried():
    seen = set()
    for entries in states(0, 150):
        source = as_python(entries)
        if any(text in source for text in ("nan", "inf", "array(", "strides")) or len(source) > 20_000:
            continue  # equal to nothing, or not shown in full
        made = {}
        exec(source.replace("QuantState.from_dict(", "made = (").replace("from refq4 import QuantState", ""), made)
        assert repr(made["made"]) == repr(entries)
        seen.add(expected(entries) is None)
    assert seen == {True, False}


def test_atheris_where_it_is_missing_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "atheris", None)
    assert command(monkeypatch, "--atheris") == 2
    assert remedies.install("fuzz") in capsys.readouterr().err
