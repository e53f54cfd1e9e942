"""The conformance tests, for any backend: ``pytest --pyargs refq4.testing --backend mine``.

Each curated case of the catalogue is a test of its own, named after what it asks; ``--deep`` asks come from
``python -m refq4 verify``. Where hypothesis is installed, it looks for further cases and shrinks what it finds.
"""

from __future__ import annotations

import contextlib

import pytest

from ..backend import BackendUnsupportedError
from .cases import Case, catalogue
from .conformance import CHECKS, check

CASES = catalogue(tuple(CHECKS), "quick")


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case)[5:-1].replace("'", "").replace(", ", " "))
def test_answers_as_the_reference_does(case: Case, backend_name: str) -> None:
    answers_right(case, backend_name)


@pytest.mark.parametrize("name", CHECKS)
def test_answers_as_the_reference_does_on_cases_that_hypothesis_draws(name: str, backend_name: str) -> None:
    hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed: pip install hypothesis")
    from .strategies import cases

    def property_(case: Case) -> None:
        with contextlib.suppress(BackendUnsupportedError):  # hypothesis goes on with the cases it can run
            answers_right(case, backend_name)

    settings = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
    settings(hypothesis.given(cases(name))(property_))()


def answers_right(case: Case, backend: str) -> None:
    """Raise on a difference, and on a refusal with the backend's words; an optional part may be absent."""
    outcome = check(case, backend)
    if outcome.status == "refused":
        raise BackendUnsupportedError(outcome.message)
    if outcome.status == "differs":
        raise AssertionError(str(outcome))
