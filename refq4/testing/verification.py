"""Run the whole catalogue of test cases on a backend, and report where it differs, by how much, on which input."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..internals.discovery import check_usable, is_installed
from ..internals.shown import Shown
from .asked import Outcome
from .cases import Case, catalogue, simpler
from .conformance import CHECKS, check

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["CheckReport", "Failure", "Report", "shrink", "verify"]

SHRINK_TRIES = 400


@dataclass
class Failure:
    """A difference: the case in which it was found, the smallest case that still fails, and what is wrong there.

    ``hint`` names a bug that would give the same numbers (on the smallest input, many bugs would).

    Example:
        >>> case = Case("gemv_4bit", k=1)
        >>> print(Failure(case, case, "", "", "reference", "reference").snippet())
        from refq4.testing import Case, check
        print(check(Case('gemv_4bit', k=1), backend='reference'))
    """

    met: Case
    smallest: Case
    message: str
    hint: str
    backend: str
    against: str

    def snippet(self) -> str:
        """Python that shows it again; its first line says what must be registered before, if that is so."""
        own = ", ".join(repr(name) for name in (self.backend, self.against) if not is_installed(name))
        first = f"# first import or run what calls refq4.register_backend for {own}\n" if own else ""
        versus = "" if self.against == "reference" else f", against={self.against!r}"
        return (
            f"{first}from refq4.testing import Case, check\n"
            f"print(check({self.smallest!r}, backend={self.backend!r}{versus}))"
        )


@dataclass
class CheckReport:
    """The outcomes of one check.

    Attributes:
        same, differs: cases.
        known: cases that differ as the backend says it does, by the name of the difference.
        refused: cases that the backend can't run, by its reason.
        absent: cases about an optional part that it does not have.
        error: for products, the largest error as a fraction of what is allowed (above 1: a case differs), and
            ``worst`` the case.
        ulps: int64 [5], elements that err by up to 1/2, 1, 2, 8 and more units in the last place.

    Example:
        >>> (of_one_check,) = verify("reference", depth="quick", checks=("gemv_4bit",), progress=False).checks
        >>> of_one_check.name, of_one_check.same
        ('gemv_4bit', 40)
    """

    name: str
    same: int = 0
    differs: int = 0
    known: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    absent: int = 0
    error: float = 0.0
    worst: Case | None = None
    ulps: Tensor = field(default_factory=lambda: torch.zeros(5, dtype=torch.int64))

    @property
    def cases(self) -> int:
        """Cases that were answered or refused."""
        return self.same + self.differs + self.known.total() + self.refused.total()

    def count(self, outcome: Outcome, known: str | None) -> None:
        """Take one outcome into the figures."""
        if outcome.status == "same":
            self.same += 1
        elif outcome.status == "refused":
            self.refused[_reason(outcome.message)] += 1
        elif outcome.status == "no such thing":
            self.absent += 1
        elif known:
            self.known[known] += 1
        else:
            self.differs += 1
        self.ulps += outcome.ulps
        if outcome.error > self.error:
            self.error, self.worst = outcome.error, outcome.case


@dataclass
class Report(Shown):
    """What :func:`verify` found; prints as a table, and is shown as HTML in Jupyter.

    Attributes:
        backend, against, depth: what was asked.
        checks: one report per check.
        failures: the first differences of each check, shrunk.
        seconds: how long it took.

    Example:
        >>> report = verify("reference", depth="quick", checks=("dequantize_4bit",), progress=False)
        >>> report.agrees, report.cases, report.failures
        (True, 40, [])
    """

    backend: str
    against: str
    depth: str
    checks: list[CheckReport]
    failures: list[Failure]
    seconds: float

    @property
    def agrees(self) -> bool:
        """Whether no case differs (known differences, refusals and absent parts aside) and some case was the same."""
        return not any(c.differs for c in self.checks) and any(c.same for c in self.checks)

    @property
    def cases(self) -> int:
        """Distinct cases that were answered or refused."""
        return sum(c.cases for c in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "backend": self.backend,
            "against": self.against,
            "depth": self.depth,
            "agrees": self.agrees,
            "cases": self.cases,
            "seconds": round(self.seconds, 2),
            "checks": [
                vars(c)
                | {
                    "cases": c.cases,
                    "error": c.error if isfinite(c.error) else None,  # None: a NaN or a wrong shape, which JSON lacks
                    "worst": None if c.worst is None else repr(c.worst),
                    "ulps": c.ulps.tolist(),
                }
                for c in self.checks
            ],
            "failures": [
                vars(f) | {"met": repr(f.met), "smallest": repr(f.smallest), "snippet": f.snippet()}
                for f in self.failures
            ],
        }

    def _table(self) -> Table:
        """Make one row per check."""
        from rich.table import Table  # here, so that importing refq4 stays quick

        table = Table(
            title=f"{self.backend} against {self.against}: {self.cases} cases in {self.seconds:.1f} s",
            title_justify="left",
            title_style="bold",
            caption="worst: the largest error as a fraction of the error budget, above 1 where a case differs; then "
            "the products' elements by their error in units in the last place",
            caption_justify="left",
        )
        table.add_column("check")
        rare = [name for name in ("known", "refused") if any(getattr(c, name) for c in self.checks)]
        for column in ("cases", "same", *rare, "differs", "worst", "≤ ½", "≤ 1", "≤ 2", "≤ 8", "more"):
            table.add_column(column, justify="right")
        for c in self.checks:
            if not c.cases:
                table.add_row(c.name, "0", *[""] * (7 + len(rare)), "absent", style="dim")
                continue
            numbers = (c.cases, c.same, *(getattr(c, name).total() or "" for name in rare), c.differs or "")
            worst = f"{c.error:.2f}" if c.error < 100 else f"{c.error:.0e}"
            products = [worst, *map(str, c.ulps.tolist())] if int(c.ulps.sum()) else [""] * 6
            table.add_row(c.name, *map(str, numbers), *products, style="red" if c.differs else "")
        return table

    def _parts(self) -> Iterator[RenderableType]:
        from ..internals.verbatim import words

        yield self._table()
        for title, counters in (("refused", "refused"), ("known differences", "known")):
            reasons: Counter[str] = sum((getattr(c, counters) for c in self.checks), Counter())
            if reasons:
                yield words((f"\n{title}:", "bold"))
                for reason, times in reasons.most_common():
                    yield words(f"  {times} times: {reason}")
        for failure in self.failures:
            yield words((f"\n{failure.smallest.check} differs, on the smallest input found:", "bold red"))
            yield words(failure.message)
            if failure.hint:
                yield words((f"{failure.met!r}: {failure.hint}", "bold"))
            yield words(f"again:\n{failure.snippet()}")
        yield words((f"\n{self._verdict()}", "bold green" if self.agrees else "bold red"))

    def _verdict(self) -> str:
        """The last line. A check in which every case was refused has shown nothing, and the line says so."""
        asked = [c for c in self.checks if c.cases]
        ran = [c for c in asked if c.cases > c.refused.total()]
        if differ := sum(c.differs > 0 for c in ran):
            of = f"{len(ran)} checks" if ran == asked else f"the {len(ran)} checks that it ran (of {len(asked)})"
            return f"{self.backend} DIFFERS from {self.against} in {differ} of {of}"
        refused = f" in {len(ran)} of {len(asked)} checks; it refused all cases of the others"
        verdict = "agrees with" if self.agrees else "DIFFERS from"
        return f"{self.backend} {verdict} {self.against}{refused * (0 < len(ran) < len(asked))}"


def verify(
    backend: str,
    against: str = "reference",
    depth: str = "normal",
    checks: tuple[str, ...] | None = None,
    progress: bool | None = None,
) -> Report:
    """Run the catalogue of test cases on a backend and compare each result with that of another backend.

    A backend may differ on purpose: ``known_difference(case) -> str | None`` names such a difference. These cases are
    counted under that name and are not failures.

    Args:
        backend: a registered name.
        against: the backend to compare with.
        depth: "quick" (about 400 cases), "normal" (about 1,700) or "deep" (about 7,000).
        checks: names in ``CHECKS``; all if None.
        progress: a progress bar; None shows one in a terminal only.

    Raises:
        UnknownBackendError, BackendUnavailableError: a name that can't be used here.
        ValueError: no such check or depth.

    Example:
        >>> report = verify("reference", depth="quick", checks=("gemv_4bit",), progress=False)
        >>> report.agrees, report.cases
        (True, 40)
    """
    from tqdm import tqdm

    chosen = tuple(CHECKS) if checks is None else checks
    for name in chosen:
        if name not in CHECKS:
            raise ValueError(f"unknown check {name!r}; known: {', '.join(CHECKS)}")
    engine = check_usable(backend)
    check_usable(against)
    explain: Callable[[Case], str | None] = getattr(engine, "known_difference", lambda case: None)
    cases = catalogue(chosen, depth)
    reports = {name: CheckReport(name) for name in chosen}
    failures: dict[str, Failure] = {}
    start = time.perf_counter()
    for case in tqdm(cases, unit="case", leave=False, disable=None if progress is None else not progress):
        outcome = check(case, backend, against)
        known = explain(case) if outcome.status == "differs" else None
        reports[case.check].count(outcome, known)
        if outcome.status == "differs" and not known and case.check not in failures:
            failures[case.check] = _shrunk(outcome, backend, against, explain)
    seconds = time.perf_counter() - start
    return Report(backend, against, depth, list(reports.values()), list(failures.values()), seconds)


def shrink(case: Case, fails: Callable[[Case], bool], tries: int = SHRINK_TRIES) -> Case:
    """The smallest case like this one that still fails: simplify one field at a time for as long as it does.

    Example:
        >>> shrink(Case("gemm_4bit", m=17, n=33, k=130, bias=True), lambda case: case.k > 63)
        Case('gemm_4bit', blocksize=32, weights='ramp', activations='ones')
    """
    for _ in range(tries):
        smaller = next(_failing(simpler(case), fails), None)
        if smaller is None:
            break
        case = smaller
    return case


def _failing(cases: Iterator[Case], fails: Callable[[Case], bool]) -> Iterator[Case]:
    return (case for case in cases if fails(case))


def _shrunk(outcome: Outcome, backend: str, against: str, explain: Callable[[Case], str | None]) -> Failure:
    def fails(case: Case) -> bool:
        return check(case, backend, against).status == "differs" and not explain(case)

    smallest = shrink(outcome.case, fails)
    last = check(smallest, backend, against)
    return Failure(outcome.case, smallest, last.message, outcome.hint or last.hint, backend, against)


def _reason(message: str) -> str:
    """The backend's reason alone, without the call: the same for all cases it refuses for that reason."""
    return message.partition("): ")[2].partition(". What would work")[0]
