"""State dicts changed at random: what is valid is read, saved and decoded alike, anything else is a ValueError.

    pytest tests/core/test_fuzz_states.py            thousands of states, and those that hypothesis looks for
    pytest -m slow tests/core/test_fuzz_states.py    a million, and 200,000 into a layer: five minutes

What is tried: tests/support/state_mutations.py; which of it is valid: tests/support/state_oracle.py. Besides an answer
that the oracle does not give, these are failures: any error but a ValueError, a state that saves, loads or decodes to
something else, ten seconds of computing without an answer, and an allocation that takes the process past 1 GiB more
than it had: no state here holds more than a few kilobytes, so code that allocates that trusts a file's word. A failure
is shown as Python that makes the state again.

The reader is also spoilt on purpose, so that it is known that such faults are found.
"""

from __future__ import annotations

import random
import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from state_mutations import BASES, as_python, mutate
from state_oracle import Entries, WrongAnswerError, check, check_layer, expected

from refq4.internals import statedict

pytestmark = pytest.mark.reference_only("what a file holds is read without a backend")

ALLOWANCE = 1 << 30
PATIENCE = 10  # seconds of computing: one that waits for its turn is not stuck


@pytest.fixture(autouse=True)
def limits() -> Iterator[None]:
    """While a test runs, this process gets ALLOWANCE more memory, and an error beyond."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ALLOWANCE, memory[1]))
    before = signal.signal(signal.SIGPROF, _give_up)
    yield
    signal.signal(signal.SIGPROF, before)
    resource.setrlimit(resource.RLIMIT_AS, memory)


def _give_up(*_: Any) -> NoReturn:
    raise WrongAnswerError(f"no answer in {PATIENCE} s")


def verdicts(tried: Iterable[Entries], ask: Callable[[Entries], bool] = check) -> list[bool]:
    """Which of the states were accepted, all of them rightly."""
    return [check_in_time(entries, ask) for entries in tried]


def check_in_time(entries: Entries, ask: Callable[[Entries], bool] = check) -> bool:
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    try:
        return ask(entries)
    except WrongAnswerError as wrong:
        raise WrongAnswerError(f"{wrong}\n{as_python(entries)}") from wrong
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def states(first: int, count: int) -> Iterator[Entries]:
    return (mutate(random.Random(f"tests {number}")) for number in range(first, first + count))


def test_what_was_saved_is_accepted():
    assert all(verdicts(dict(base) for base in BASES))


@given(st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_whatever_a_file_holds_it_is_read_right_or_refused_with_a_value_error(rng):
    check_in_time(mutate(rng))


def test_thousands_of_states_are_read_right_or_refused_with_a_value_error():
    assert 400 < sum(verdicts(states(0, 2000))) < 1600, "both kinds are well represented"


def test_a_layer_takes_what_is_valid_and_of_its_shape_and_otherwise_stays_as_it_was():
    assert 10 < sum(verdicts(states(5000, 500), check_layer)) < 250, "both kinds are there"


@pytest.mark.slow
@pytest.mark.parametrize(("count", "ask"), [(1_000_000, check), (200_000, check_layer)], ids=["states", "into a layer"])
def test_a_million_states_are_read_right_or_refused_with_a_value_error(count, ask):
    assert any(verdicts(states(10_000, count), ask))


@pytest.mark.parametrize("flips", [1, 2])
def test_no_flipped_bit_in_the_json_is_read_as_another_state_than_it_spells(flips):
    (base,) = [base for base in BASES if len(base) == 5 and "quant_state.bitsandbytes__nf4" in base][:1]
    rng = random.Random(flips)
    for bit in range(8 * len(base["quant_state.bitsandbytes__nf4"])):
        raw = base["quant_state.bitsandbytes__nf4"].clone()
        for at in (bit, rng.randrange(8 * len(raw)))[:flips]:
            raw[at // 8] ^= 1 << at % 8
        check_in_time(base | {"quant_state.bitsandbytes__nf4": raw})


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
    with pytest.raises(WrongAnswerError, match=r"(?s)import torch\nfrom refq4 import QuantState\nQuantState.from_dict"):
        verdicts(states(0, 4000))


def test_a_reader_that_does_not_end_or_takes_all_memory_is_found_out(monkeypatch):
    monkeypatch.setattr(statedict.Reader, "_offset", lambda self, name: torch.zeros(4 * ALLOWANCE, dtype=torch.uint8))
    with pytest.raises(WrongAnswerError, match=r"another error than a ValueError: RuntimeError: .*allocate"):
        verdicts(states(0, 4000))
    monkeypatch.setattr(statedict.Reader, "_offset", endless)
    monkeypatch.setattr(f"{__name__}.PATIENCE", 0.2)
    with pytest.raises(WrongAnswerError, match=r"no answer in 0.2 s"):
        verdicts(states(0, 4000))


def endless(self: statedict.Reader, name: str) -> NoReturn:
    while True:
        pass


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
