"""How the notebooks draw: one style, kept out of their cells.

    figure, axes = picture.canvas(height=3)          matplotlib's own figure and axes, in the style
    axes.plot(..., color=picture.BLUE)
    picture.show(figure, "what is to be seen, for those who can't")

A picture has no background of its own, and its lines and letters are a grey that stands out equally on white and on
black, so that one file serves a light page and a dark one. The colours are those of Okabe and Ito, which people who
are colour-blind can tell apart; yellow is left out, as white swallows it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import Any

import matplotlib
import PIL.Image
from IPython.display import Image, Markdown
from matplotlib.figure import Figure
from matplotlib.text import Text

__all__ = ["BLUE", "COLOURS", "GREEN", "GREY", "ORANGE", "PURPLE", "SKY", "VERMILION", "canvas", "show", "table"]

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
GREY = "#808080"  # 4:1 against white, 4:1 against #1e1e2e

WIDTH = 8.0  # inches of every picture; at 100 to the inch as it is shown, drawn at twice that
SHOWN_DPI, DRAWN_DPI = 100, 200
SMALLEST = 6.5  # points of a letter: nine pixels where the picture is shown

STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": GREY,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.dpi": DRAWN_DPI,
    "figure.facecolor": "none",
    "font.size": 10,
    "grid.alpha": 0.25,
    "grid.color": GREY,
    "grid.linewidth": 0.6,
    "hatch.color": GREY,
    "legend.frameon": False,
    "legend.fontsize": "small",
    "savefig.facecolor": "none",
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}
matplotlib.rcParams.update(STYLE)  # for the notebook's process: what a cell adds later (legends, texts) is in style too


def canvas(rows: int = 1, columns: int = 1, *, height: float = 3.2, **options: Any) -> tuple[Figure, Any]:
    """An empty figure in the style, and its axes (an array of them where there are several).

    Args:
        rows, columns: how many axes.
        height: of the whole figure in inches; all are 8 wide.
        options: what ``Figure.subplots`` takes (``sharex``, ``width_ratios``, ...).
    """
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def show(figure: Figure, description: str) -> Image:
    """The figure as a picture that ends a cell.

    Args:
        figure: from :func:`canvas`.
        description: what there is to see, in a sentence: the text that screen readers read.
    """
    memory = io.BytesIO()
    for text in figure.findobj(Text):
        if text.get_text() and text.get_fontsize() < SMALLEST:
            raise ValueError(
                f"{text.get_text()!r} is drawn at {text.get_fontsize():.1f} points, which is "
                f"too small to read; draw it at {SMALLEST} or more"
            )
    figure.savefig(memory, format="png", dpi=DRAWN_DPI)
    small = io.BytesIO()
    pixels = PIL.Image.open(memory).quantize(128, method=PIL.Image.Quantize.FASTOCTREE)  # a third of the bytes
    pixels.save(small, format="png", optimize=True)
    return Image(small.getvalue(), width=round(WIDTH * SHOWN_DPI), alt=description)


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> Markdown:
    """A table that ends a cell: words to the left, numbers to the right."""
    header, cells = list(header), [[str(cell) for cell in row] for row in rows]
    numbers = [all(re.fullmatch(r"[-+]?[\d,.]+(e[-+]?\d+)?", row[i]) for row in cells) for i in range(len(header))]
    lines = [header, ["---:" if right else ":---" for right in numbers], *cells]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))
