"""The conformance tests, for any backend: ``pytest --pyargs refq4.testing --backend mine``.

Each curated case of the catalogue is a test of its own, named after what it asks. ``python -m refq4 verify --deep``
asks 7,000, and shrinks what it finds.
"""

from __future__ import annotations

import pytest

from ..backend import BackendUnsupportedError
from .cases import Case, catalogue
from .conformance import CHECKS, check

CASES = catalogue(tuple(CHECKS), "quick")


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case)[5:-1].replace("'", "").replace(", ", " "))
def test_answers_as_the_reference_does(case: Case, backend_name: str) -> None:
    """Fail on a difference; a refusal skips, with the backend's words; an optional part may be absent."""
    outcome = check(case, backend_name)
    if outcome.status == "refused":
        raise BackendUnsupportedError(outcome.message)
    if outcome.status == "differs":
        raise AssertionError(str(outcome))
