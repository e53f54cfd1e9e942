"""docs/mutation-testing.md, from the reports of ``mutate_core.py`` and ``mutate_kernels.py``; and what a report says.

A report is JSON in docs/mutation: totals for each file and the mutants that survived. Why each of those may survive
stands in scripts/mutation_explained.toml; a survivor without an entry there makes the script fail that found it.

    python scripts/mutation_page.py          write the page anew from the two reports
"""

from __future__ import annotations

import json
import math
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "mutation-testing.md"
REPORTS = ROOT / "docs" / "mutation"
EXPLAINED = ROOT / "scripts" / "mutation_explained.toml"


class Score(NamedTuple):
    """Mutants tried, those killed, and those that no test could kill, because they do the same."""

    mutants: int
    killed: int
    equivalent: int

    @property
    def share(self) -> float:
        """Of the mutants that differ, the share that was killed."""
        return self.killed / max(self.mutants - self.equivalent, 1)

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval for the share, as a random sample tells it."""
        n, p, z = max(self.mutants - self.equivalent, 1), self.share, 1.96
        centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def explanation(survivor: dict[str, Any]) -> dict[str, str] | None:
    """The entry of mutation_explained.toml for a survivor, if there is one."""
    for entry in tomllib.loads(EXPLAINED.read_text())["survivor"]:
        same_place = survivor["file"].endswith(entry["file"]) and entry.get("function", "") in survivor["function"]
        if same_place and any(text in survivor["after"] for text in entry["after"]):
            found: dict[str, str] = entry
            return found
    return None


def unexplained(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The survivors that nobody has accounted for."""
    return [survivor for survivor in report["survivors"] if explanation(survivor) is None]


def scores(report: dict[str, Any]) -> dict[str, Score]:
    """The score of each file, and of "all"."""
    same = [s["file"] for s in report["survivors"] if (e := explanation(s)) is not None and e["kind"] == "equivalent"]
    found = {f: Score(row["mutants"], row["killed"], same.count(f)) for f, row in report["files"].items()}
    return found | {"all": Score(*(sum(column) for column in zip(*found.values(), strict=True)))}


def show(report: dict[str, Any], diffs: bool = False) -> None:
    """The table in a terminal; with ``diffs`` each survivor that has no explanation."""
    for file, score in scores(report).items():
        print(f"{file:55} {score.mutants:5} mutants {score.killed:5} killed {score.share:7.1%}")
    missing = unexplained(report)
    print(f"{len(report['survivors'])} survived, {len(missing)} of them without an explanation")
    for s in missing if diffs else []:
        print(f"\n{s['key']} {s['file']} {s['function']}\n  - {s['before']}\n  + {s['after']}")


def write(kind: str, report: dict[str, Any]) -> None:
    """Keep the report, and write the page with it."""
    REPORTS.mkdir(exist_ok=True)
    (REPORTS / f"{kind}.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(*(json.loads((REPORTS / f"{name}.json").read_text()) for name in ("core", "kernels"))))


def page(core: dict[str, Any], kernels: dict[str, Any]) -> str:
    """The page."""
    return f"""# Mutation testing

A green test run says little until one has seen it fail. Here a program changes the source in one place, a `+` into a
`-`, a `<` into a `<=`, an argument into None, and runs the ordinary tests on what comes out: if none fails, either the
tests have a hole or the change changes nothing. (Bugs that a person would plant, each with the test that catches it,
are in [mutants.md](mutants.md).) The page is written by the two scripts that measure:

```bash
python scripts/mutate_core.py --write         # the core: mutmut's operators, a fork of a warm pytest for each mutant
python scripts/mutate_kernels.py --write      # C, compiled for this processor; CUDA, by NVRTC and the emulator
```

Both take `--sample N`, `--minutes N`, `--only NAME ...` and `--show`; `--help` says the rest. They work on a copy of
the tree, keep what they have found in `build/mutation`, and try the mutants in a random order that is always the same:
any part of a run is a random sample. What is mutated and what is left out, by which rule, stands at the head of
`scripts/mutate_core_mutants.py` and `scripts/mutate_kernels_mutants.py`. The tests that kill are ordinary tests; those
that execute the mutated line run, one case of each test function first, for some seconds. A crash and an endless loop
are deaths. A survivor is accounted for below, or the script fails.

*Score* is the share of the killed among the mutants that do not provably do the same as the original.

## The core

{_measured(core)}

{_table(core)}

{_survivors(core)}

## The kernels

{_measured(kernels)} {_left_out(kernels)}

The files for AVX-512 are not among them: the processor of this run has AVX2. Left out as well is what only tunes (how
many threads, what is prefetched, what stays in a cache).

{_table(kernels)}

{_survivors(kernels)}
"""


def _measured(report: dict[str, Any]) -> str:
    total = scores(report)["all"]
    low, high = total.interval()
    every = report["mutants in all"]
    drawn = (
        f"All {total.mutants} mutants."
        if report["complete"]
        else f"A random sample (seed {report['seed']}) of {total.mutants} mutants{f' of {every}' if every else ''}; "
        f"95 % interval {low:.1%} to {high:.1%}."
    )
    note = f" {report['note']}" if report.get("note") else ""
    return f"{drawn} Killed: **{total.share:.1%}**.{note}"


def _left_out(report: dict[str, Any]) -> str:
    left = report.get("left out", {})
    return (
        f"{left.get('do not compile', 0)} changes more did not compile, and {left.get('unknown instruction', 0)} gave "
        f"PTX with instructions that no kernel uses and the emulator does not know: neither counts."
    )


def _table(report: dict[str, Any]) -> str:
    rows = [
        f"| {f'`{Path(file).name}`' if file != 'all' else '**all**'} | {s.mutants} | {s.killed} | {s.equivalent} | "
        f"{s.share:.1%} |"
        for file, s in scores(report).items()
    ]
    head = "| file | mutants | killed | do the same | score |\n| --- | --- | --- | --- | --- |"
    return "\n".join([head, *rows])


def _survivors(report: dict[str, Any]) -> str:
    rows = []
    for s in report["survivors"]:
        entry = explanation(s)
        why = "**no explanation yet**" if entry is None else f"{entry['kind']}: {entry['why']}"
        where = f"`{Path(s['file']).name}` `{s['function'].rpartition('.')[2]}`"
        rows.append(f"| {where} | {_code(s['before'])} | {_code(s['after'])} | {why} |")
    head = "| survivor in | was | became | why it may |\n| --- | --- | --- | --- |"
    return "\n".join([head, *rows]) if rows else "None survived."


def _code(text: str) -> str:
    text = text.replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


if __name__ == "__main__":
    core, kernels = (json.loads((REPORTS / f"{name}.json").read_text()) for name in ("core", "kernels"))
    PAGE.write_text(page(core, kernels))
    sys.exit(int(bool(unexplained(core) or unexplained(kernels))))
