"""A picture of an evaluation: what each layer would cost if it alone were in 4 bits, beside the error of its output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["draw_layers"]

MOST = 40  # layers, the ones that cost the most


def draw_layers(report: dict[str, Any], path: Path) -> None:
    """Draw a bar for each layer, the one that costs the most on top.

    Args:
        report: what ``refq4 eval --json`` prints.
        path: the picture; its suffix chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the report has no layers: it was not made with --against.
    """
    from matplotlib.figure import Figure

    layers = report["layers"][:MOST]
    if not layers:
        raise ValueError("there are no layers to draw: --picture needs --against, and a model with 4-bit layers")
    columns = [("damage", "|(W - W4)x|² / |Wx|²")]
    if layers[0]["kl"] is not None:
        columns.insert(0, ("kl", "KL if it alone were in 4 bits (estimated)"))
    figure = Figure(figsize=(5 * len(columns) + 2, 0.25 * len(layers) + 1), layout="constrained")
    panels = figure.subplots(1, len(columns), squeeze=False)
    names = [layer["name"] for layer in reversed(layers)]
    for axes, (field, label) in zip(panels[0], columns, strict=True):
        axes.barh(names, [layer[field] for layer in reversed(layers)])
        axes.set(xlabel=label)
        axes.grid(True, axis="x", linewidth=0.3)
        axes.tick_params(axis="y", labelsize=7, labelleft=axes is panels[0][0])
    figure.savefig(path, dpi=120)
