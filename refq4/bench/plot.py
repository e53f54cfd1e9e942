"""The roofline picture of a bench report: how much arithmetic a byte of weight gets, and what the machine allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["roofline"]


def roofline(report: dict[str, Any], path: Path) -> None:
    """Draw every peer's products under the machine's limits.

    Args:
        report: what ``python -m refq4 bench --json`` writes; limits that were not measured are not drawn.
        path: the picture; its suffix chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    limits, rows = report["limits"], report["products"]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
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
    plt.close(figure)
