"""The page of benchmarks, from the files that ``python -m refq4 bench --json`` wrote to ``docs/benchmarks``.

The tables are those that the command prints, in Markdown.
"""

from __future__ import annotations

import json
from typing import Any

import places
from rich.table import Table

from refq4.bench import show

_LIMITS = {
    "read_gb_s": "memory read, GB/s",
    "fma_gflop_s": "peak in fp32, GFLOP/s",
    "dot_gflop_s": "peak of bf16 products, GFLOP/s",
}


def benchmarks(page: str) -> str:
    """A section for each file, and its picture if there is one beside it."""
    folder = places.ROOT / "docs" / "benchmarks"
    return "\n\n".join(_section(path.stem, json.loads(path.read_text())) for path in sorted(folder.glob("*.json")))


def _section(name: str, report: dict[str, Any]) -> str:
    about = "".join(f"| {key} | {value} |\n" for key, value in report["machine"].items())
    limits = "".join(f"| {_LIMITS.get(key, key)} | {value:.0f} |\n" for key, value in report["limits"].items() if value)
    parts = [f"## {name}", f"From [{name}.json](benchmarks/{name}.json).", f"| | |\n| --- | --- |\n{about}{limits}"]
    shapes = dict.fromkeys((row["n"], row["k"]) for row in report["products"])
    on_gpu = any(isinstance(ms, dict) for row in report["products"] for ms in row["ms"].values())
    products = show.gpu_table if on_gpu else show.product_table
    parts += [_markdown(products(report["products"], n, k, report["limits"])) for n, k in shapes]
    if "ops" in report:
        limit, (n, k) = report["limits"], next(iter(shapes))  # the command times them on the first shape
        ops = show.gpu_ops_table(report["ops"], limit) if on_gpu else show.ops_table(report["ops"], n, k)
        parts.append(_markdown(ops))
    for picture in sorted((places.ROOT / "docs" / "benchmarks").glob(f"{name}-*.png")):
        if not picture.stem.removeprefix(f"{name}-").count("-"):
            parts.append(f"![{name}: products of all peers under the machine's limits](benchmarks/{picture.name})")
    return "\n\n".join(parts)


def _markdown(table: Table) -> str:
    """A table for terminals as one for pages."""
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    heads = [str(column.header) for column in table.columns]
    rules = ["---:" if column.justify == "right" else "---" for column in table.columns]
    rows = [heads, rules, *zip(*columns, strict=True)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n\n".join(filter(None, [f"### {table.title}", "\n".join(lines), str(table.caption or "")]))
