"""Ask the installed bitsandbytes the cases of ``refq4.testing`` and write docs/bitsandbytes-differences.md.

python scripts/peer/bitsandbytes_table.py            7,000 cases, in about a minute; exits with 1 if one is unexplained
python scripts/peer/bitsandbytes_table.py --quick    400 cases, printed and not written
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch

from refq4.testing import Report, verify
from refq4.testing.peer_differences import ENTRIES

PAGE = Path(__file__).parents[2] / "docs" / "bitsandbytes-differences.md"


def page(report: Report) -> str:
    known: Counter[tuple[str, str]] = Counter()
    for check in report.checks:
        for names, times in check.known.items():
            for name in names.split("; "):
                known[name, check.name] += times
    asked = [check for check in report.checks if check.cases]
    lines = [
        "# How often bitsandbytes differs, and why",
        "",
        f"Written by `python scripts/peer/bitsandbytes_table.py`: {report.cases} cases, bitsandbytes "
        f"{version('bitsandbytes')}, torch {torch.__version__}, {platform.machine()} with "
        f"{torch.backends.cpu.get_cpu_capability()}. A case counts as explained if every number",
        "that differs is what entries of [differences.md](differences.md) say it is; it counts once for each of them.",
        "",
        "| check | cases | same | explained | refused | unexplained |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for c in asked:
        row = (c.name, c.cases, c.same, c.known.total(), c.refused.total(), c.differs)
        lines.append(f"| {' | '.join(map(str, row))} |")
    lines += ["", "| difference | cases | in |", "| --- | --- | --- |"]
    for name in ENTRIES:
        where = {check: times for (entry, check), times in known.items() if entry == name}
        lines.append(f"| {name} | {sum(where.values())} | {', '.join(where) or 'not met in these cases'} |")
    reasons: Counter[str] = sum((c.refused for c in asked), Counter())
    lines += ["", "Refused, because bitsandbytes has no such thing:", ""]
    lines += [f"- {times} times: {reason}" for reason, times in sorted(reasons.items())]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="400 cases, printed and not written")
    quick = parser.parse_args().quick
    report = verify("bitsandbytes", depth="quick" if quick else "deep")
    if quick:
        print(page(report))
    else:
        PAGE.write_text(page(report))
    if not report.agrees:
        print(report)
    return 0 if report.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
