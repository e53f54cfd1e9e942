"""Pictures of a bench report: the CPU's roofline, and how many times faster than cuBLAS on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["roofline", "speedups"]


def roofline(report: dict[str, Any], path: Path) -> None:
    """Draw every peer's products under the machine's limits.

    Args:
        report: what ``python -m refq4 bench --json`` writes; limits that were not measured are not drawn.
        path: the picture; its suffix chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    limits, rows = report["limits"], report["products"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    intensity = [2.0**i for i in range(1, 13)]  # FLOP per byte of packed weight
    for name, peak in (("bf16 dot product", limits.get("dot_gflop_s")), ("fp32 FMA", limits.get("fma_gflop_s"))):
        if peak:
            roof = [min(peak, i * limits["read_gb_s"]) for i in intensity]
            axes.plot(intensity, roof, label=f"limit: memory read and {name}", linewidth=1.2, color="0.4")
    for peer in rows[0]["ms"]:
        work = [2e-6 * row["m"] * row["n"] * row["k"] for row in rows]
        at = [2.0 * row["m"] / 0.5625 for row in rows]
        axes.plot(at, [w / row["ms"][peer] for w, row in zip(work, rows, strict=True)], "o", markersize=4, label=peer)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of packed weight (3.6 x M)", ylabel="GFLOP/s")
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def speedups(report: dict[str, Any], path: Path) -> None:
    """Draw, for each shape of a GPU report, how many times faster than ``torch bf16`` each peer is, over M.

    Args:
        report: what ``python -m refq4 bench --device cuda --json`` writes.
        path: the picture; its suffix chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: ``torch bf16`` was not measured.
    """
    from matplotlib.figure import Figure

    if any("torch bf16" not in row["ms"]["plain"] for row in report["products"]):
        raise ValueError("the picture compares with 'torch bf16', which was not measured: add it to --peers")
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in report["products"]))
    figure = Figure(figsize=(4.5 * len(shapes), 4), layout="constrained")
    panels = figure.subplots(1, len(shapes), squeeze=False)
    for axes, (n, k) in zip(panels[0], shapes, strict=True):
        rows = [row for row in report["products"] if (row["n"], row["k"]) == (n, k)]
        times = [row["ms"].get("graph", row["ms"]["plain"]) for row in rows]
        for peer in times[0]:
            faster = [time["torch bf16"] / time[peer] for time in times]
            axes.plot([row["m"] for row in rows], faster, "o-", markersize=4, label=peer)
        axes.set(xlabel="M (tokens)", title=f"N x K = {n} x {k}")
        axes.set_xscale("log", base=2)
        axes.grid(True, linewidth=0.3)
    panels[0][0].set_ylabel("times as fast as cuBLAS bf16")
    panels[0][0].legend(fontsize=8)
    about = report["machine"]
    figure.suptitle(f"{about.get('gpu', 'no GPU')}, {about.get('date', '')}", fontsize=9)
    figure.savefig(path, dpi=120)
