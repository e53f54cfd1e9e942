"""The differential kit: does a backend compute the 4-bit layer, and if not, where, on what, and by how much?

    from refq4.testing import verify
    print(verify("mine"))                        # or: python -m refq4 verify --backend mine
                                                 # or: pytest --pyargs refq4.testing --backend mine

A backend that no package registers but a file ``mine.py``: register it and call ``verify`` in a script, or
``python -m refq4 verify --import mine.py --backend mine``, or ``pytest -p mine ...`` with the file on the PYTHONPATH.

The pieces, in reading order: ``cases`` (what is asked, as data), ``conformance`` (the checks by name, and what counts
as the same), ``ask_ops`` and ``ask_layers`` (how each thing is asked), ``budget`` (the tolerance, in one place),
``diagnose`` (from wrong numbers to the likely bug), ``verification`` (ask everything, shrink what fails, report).
``isolation`` undoes what a test registers or chooses.

What "the same" means: bits and bytes bit for bit; a product may err, against an fp64 oracle built from the
dequantised weight, by at most twice what the reference errs there, plus one unit in the last place of the output.
"""

from .asked import Outcome
from .budget import Budget, assert_same_bits, assert_within_budget, error_budget, oracle, ulp
from .cases import Case, catalogue
from .conformance import CHECKS, check
from .verification import CheckReport, Failure, Report, shrink, verify

__all__ = [
    "CHECKS",
    "Budget",
    "Case",
    "CheckReport",
    "Failure",
    "Outcome",
    "Report",
    "assert_same_bits",
    "assert_within_budget",
    "catalogue",
    "check",
    "error_budget",
    "oracle",
    "shrink",
    "ulp",
    "verify",
]
