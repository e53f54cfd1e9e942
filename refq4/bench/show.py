"""A bench report as tables."""

from __future__ import annotations

from typing import Any

from rich.table import Table

__all__ = ["describe", "gpu_ops_table", "gpu_table", "ops_table", "product_table", "weight_bytes"]


def describe(report: dict[str, Any]) -> str:
    """The machine and its limits, in two lines."""
    about, limit = report["machine"], report["limits"]
    line = ", ".join(f"{key} {value}" for key, value in about.items())
    if limit:
        line += (
            f"\nlimits: memory read {limit['read_gb_s']:.1f} GB/s, fp32 FMA {limit['fma_gflop_s']:.0f} GFLOP/s, "
            f"bf16 dot {limit['dot_gflop_s']:.0f} GFLOP/s"
        )
    else:
        line += f"\nlimits: backend {about['backend']!r} has no limits(), which would measure them"
    return line


def product_table(rows: list[dict[str, Any]], n: int, k: int, limit: dict[str, float]) -> Table:
    """The rows of one shape: refq4's figures, then how many times as long each peer takes."""
    rows = [row for row in rows if (row["n"], row["k"]) == (n, k)]
    table = Table(title=f"N x K = {n} x {k}, {rows[0]['dtype']}", title_justify="left")
    others = [name for name in rows[0]["ms"] if name != "refq4"]
    for heading in ("M", "refq4 ms", "GB/s", "GFLOP/s", "of limits", *(f"{name} ms (x)" for name in others)):
        table.add_column(heading, justify="right")
    for row in rows:
        ours = row["ms"]["refq4"]
        gb_s, gflop_s = weight_bytes(n, k) / ours / 1e6, 2e-6 * row["m"] * n * k / ours
        peers = [f"{row['ms'][name]:.3f} ({_figure(row['ms'][name] / ours, 2)})" for name in others]
        speeds = _figure(gb_s, 1), _figure(gflop_s, 0)
        table.add_row(str(row["m"]), f"{ours:.3f}", *speeds, _share(gb_s, gflop_s, row, limit), *peers)
    missing = [f"{name}: {reason}" for name, reason in rows[0]["missing"].items()]
    if missing:
        table.caption, table.caption_justify = "\n".join(missing), "left"
    return table


def _figure(value: float, decimals: int) -> str:
    """With these decimals, or with two digits where those would leave fewer."""
    return f"{value:.{decimals}f}" if value >= 10 ** (1 - decimals) else f"{value:.2g}"


def weight_bytes(n: int, k: int, blocksize: int = 64) -> float:
    """What a product must read of the weight: packed codes and fp32 scales."""
    return n * k / 2 + 4 * n * k / blocksize


def _share(gb_s: float, gflop_s: float, row: dict[str, Any], limit: dict[str, float]) -> str:
    if not limit:
        return ""
    peak = max(limit["dot_gflop_s"] if "bfloat16" in row["dtype"] else 0, limit["fma_gflop_s"]) or float("inf")
    memory, arithmetic = gb_s / limit["read_gb_s"], gflop_s / peak
    return f"{memory:.0%} read" if memory > arithmetic else f"{arithmetic:.0%} peak"


def ops_table(rows: dict[str, dict[str, float]], n: int, k: int, left_out: dict[str, str] | None = None) -> Table:
    """One line per op, and below the table one for each op that was left out."""
    table = Table(title=f"ops on {n} x {k}", title_justify="left")
    notes = ["a clone or copy of the result shows what the memory allows"]
    notes += [f"left out, {name}: {reason}" for name, reason in (left_out or {}).items()]
    table.caption, table.caption_justify = "\n".join(notes), "left"
    table.add_column("op")
    table.add_column("refq4 ms", justify="right")
    table.add_column("others ms (x)")
    for op, row in rows.items():
        others = [f"{who} {ms:.3f} ({_figure(ms / row['refq4'], 2)})" for who, ms in row.items() if who != "refq4"]
        table.add_row(op, f"{row['refq4']:.3f}", ", ".join(others))
    return table


def gpu_table(rows: list[dict[str, Any]], n: int, k: int, limit: dict[str, float]) -> Table:
    """The rows of one shape on a GPU: replayed from a graph, then launched from Python."""
    rows = [row for row in rows if (row["n"], row["k"]) == (n, k)]
    title = f"N x K = {n} x {k}, {rows[0]['dtype']}, {rows[0]['layers']} weights in turn"
    table = Table(title=title, title_justify="left")
    timers = list(rows[0]["ms"])
    others = [name for name in rows[0]["ms"][timers[0]] if name != "refq4"]
    table.add_column("M", justify="right")
    for timer in reversed(timers):
        for heading in ("refq4", *others):
            table.add_column(f"{timer}: {heading} µs", justify="right")
        table.add_column("GB/s, of a copy's", justify="right")
    for row in rows:
        cells = [str(row["m"])]
        for timer in reversed(timers):
            ours = row["ms"][timer]["refq4"]
            gb_s = weight_bytes(n, k) / ours / 1e6
            cells += [f"{1e3 * ours:.1f}"]
            cells += [f"{1e3 * row['ms'][timer][name]:.1f} ({row['ms'][timer][name] / ours:.2f}x)" for name in others]
            cells += [f"{gb_s:.0f}, {gb_s / limit['copy_gb_s']:.0%}"]
        table.add_row(*cells)
    missing = [f"{name}: {reason}" for name, reason in rows[0]["missing"].items()]
    if missing:
        table.caption, table.caption_justify = "\n".join(missing), "left"
    return table


def gpu_ops_table(rows: dict[str, dict[str, float]], limit: dict[str, float]) -> Table:
    """One line per op on a GPU: time, and the bytes it must move against what a copy moves."""
    table = Table(title="ops on 8192 x 8192", title_justify="left")
    timers = [key for key in next(iter(rows.values())) if key != "bytes"]
    table.add_column("op")
    for timer in timers:
        table.add_column(f"{timer} µs", justify="right")
        table.add_column("GB/s, of a copy's", justify="right")
    for op, row in rows.items():
        cells = [op]
        for timer in timers:
            gb_s = row["bytes"] / row[timer] / 1e6
            cells += [f"{1e3 * row[timer]:.1f}", f"{gb_s:.0f}, {gb_s / limit['copy_gb_s']:.0%}"]
        table.add_row(*cells)
    return table
