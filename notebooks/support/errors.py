"""Pictures of errors and of answers for notebooks 11 to 13."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from IPython.display import Image
from torch import Tensor

from refq4.testing import Report

from . import picture

__all__ = ["against_size", "by_layer", "many_orders", "scoreboard", "shares", "ulp_histograms"]

EDGES, BINS = (0.5, 1, 2, 8), ("≤ ½", "≤ 1", "≤ 2", "≤ 8", "more")


def many_orders(results: np.ndarray, exact: float, engines: Mapping[str, float]) -> Image:
    """One output, summed in many orders: a histogram around the exact value, and where each engine's result lies."""
    figure, axes = picture.canvas(height=3.2)
    away = results.astype(float) - exact
    unit = 10.0 ** np.floor(np.log10(abs(away).max()))
    axes.hist(away / unit, bins=40, color=picture.SKY, label="other orders")
    top = axes.get_ylim()[1]
    axes.axvline(0, ymax=0.7, color=picture.GREEN, linewidth=2.5, label="exact")
    places: dict[float, list[str]] = {}
    for name, result in engines.items():
        places.setdefault((result - exact) / unit, []).append(name)
    for step, (place, names) in enumerate(sorted(places.items(), reverse=True)):
        height = top * (1.05 + 0.13 * step)
        axes.plot([place, place], [0, height], color=picture.VERMILION, linewidth=1.2)
        axes.text(place, height, " " + ", ".join(names), fontsize=8, va="center")
    axes.set(
        xlabel=f"distance from the exact result, times {unit:g}",
        title="how often, of 400 orders",
        ylim=(0, top * (1.1 + 0.13 * len(places))),
    )
    axes.legend(loc="center left")
    return picture.show(figure, "A histogram of one output in many orders of its terms, with each engine's result.")


def ulp_histograms(ulps: Mapping[str, Mapping[str, Tensor]]) -> Image:
    """dtype -> engine -> errors in units in the last place: the share of outputs in each class."""
    figure, panels = picture.canvas(1, len(ulps), height=3.0, sharey=True)
    for axes, (dtype, engines) in zip(panels, ulps.items(), strict=True):
        width = 0.85 / len(engines)
        for i, (name, errors) in enumerate(engines.items()):
            counts = np.bincount(np.searchsorted(EDGES, errors.flatten().numpy()), minlength=5) / errors.numel()
            at = np.arange(5) + (i - len(engines) / 2 + 0.5) * width
            axes.bar(at, 100 * counts, width, color=picture.COLOURS[i], label=name)
        axes.set_xticks(range(5), BINS)
        axes.set(title=dtype, xlabel="units in the last place")
        axes.grid(axis="x", visible=False)
    panels[0].set_ylabel("% of the outputs")
    panels[-1].legend()
    return picture.show(figure, "For each dtype and engine, the share of outputs that err by so many units.")


def against_size(exact: Tensor, errors: Tensor, ulps: Tensor, allowed: Tensor) -> Image:
    """The same errors in units in the last place and as they are, over the size of the output, and the budget."""
    figure, (left, right) = picture.canvas(1, 2, height=3.2)
    size = exact.abs().flatten().numpy()
    left.plot(size, ulps.flatten().numpy(), ".", color=picture.BLUE, markersize=3)
    left.set(yscale="log", xscale="log", title="error in units in the last place", xlabel="size of the output")
    order = np.argsort(size)
    right.plot(size[order], allowed.flatten().numpy()[order], color=picture.VERMILION, label="allowed")
    right.plot(size, errors.flatten().numpy(), ".", color=picture.BLUE, markersize=3, label="error")
    right.set(xscale="log", title="error", xlabel="size of the output")
    right.legend(loc="center left")
    return picture.show(
        figure,
        "Left, errors in units: the smaller the output, the more. Right, the errors themselves, all below a limit.",
    )


def shares(used: Mapping[str, Sequence[float]]) -> Image:
    """engine -> for each case the share of the budget it used."""
    figure, axes = picture.canvas(height=0.5 * len(used) + 1.0)
    for row, (values, colour) in enumerate(zip(used.values(), picture.COLOURS, strict=False)):
        axes.plot(values, [row] * len(values), "|", color=colour, markersize=14)
    axes.axvline(1, color=picture.VERMILION)
    axes.text(0.99, len(used) - 0.45, "allowed", ha="right", fontsize=8)
    axes.set_yticks(range(len(used)), list(used))
    axes.set(xlim=(0, 1.1), ylim=(-0.6, len(used) - 0.2), title="worst error of a case, as a share of what is allowed")
    axes.grid(axis="y", visible=False)
    return picture.show(figure, "One stroke for each case, all of them left of the limit.")


def scoreboard(history: Mapping[str, Report]) -> Image:
    """step -> what verify said after it: a row for each, a box for each check."""
    checks = [check.name for check in next(iter(history.values())).checks]
    figure, axes = picture.canvas(height=0.42 * len(history) + 1.6)
    for row, report in enumerate(history.values()):
        for column, check in enumerate(report.checks):
            colour = picture.VERMILION if check.differs else picture.GREEN if check.same else picture.GREY
            text = f"{check.same}" if check.cases else "-"
            axes.barh(-row, 0.92, left=column + 0.04, height=0.8, color=colour, alpha=0.75 if check.cases else 0.2)
            axes.text(column + 0.5, -row, text, ha="center", va="center", fontsize=8, color="white")
    axes.set_xticks(np.arange(len(checks)) + 0.5, checks, fontsize=7, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks([-row for row in range(len(history))], list(history))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    axes.set_title("cases answered right (grey: refused, orange: some answered wrong)")
    return picture.show(figure, "For each step a row of checks: refused at first, all right at the end.")


def by_layer(layers: Mapping[str, Sequence[float]], kinds: Sequence[str]) -> Image:
    """format -> errors [encoder layer, kind], flat: a panel for each kind, over the depth."""
    figure, panels = picture.canvas(1, len(kinds), height=3.1, sharey=True)
    for k, (axes, kind) in enumerate(zip(panels, kinds, strict=True)):
        for (name, values), colour, marker in zip(layers.items(), picture.COLOURS, "os^", strict=False):
            axes.plot(values[k :: len(kinds)], marker + "-", color=colour, markersize=4, linewidth=1, label=name)
        axes.set_title(kind, fontsize=9)
        axes.set_xticks(range(0, 6, 2))
    panels[0].set(ylim=(0, None), ylabel="relative error")
    panels[0].set_xlabel("encoder layer")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return picture.show(
        figure, "Relative errors of the weights, layer by layer, for each kind of matrix and each format."
    )
