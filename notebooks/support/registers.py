"""Pictures of registers for notebooks 9 and 10: lanes, layouts, who holds which element of a matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from IPython.display import Image
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from . import picture

__all__ = ["fragment", "lanes", "shuffle", "threads", "tiles"]

REGISTERS = (picture.BLUE, picture.GREEN, picture.PURPLE, picture.VERMILION)
PALE = 0.3  # how much colour, the rest being white, a box has that is written on: black on it is easy to read


def lanes(steps: Mapping[str, Sequence[str]], follow: Sequence[Sequence[int]] = (), groups: int = 0) -> Image:
    """Registers one below the other, a box for each lane, and in each the lanes to follow marked.

    Args:
        steps: what happened -> the lanes' contents, lane 0 first.
        follow: for each step, the lanes to mark.
        groups: a thicker line after so many lanes.
    """
    figure, axes = picture.canvas(height=0.55 * len(steps) + 0.2)
    most = max(len(contents) for contents in steps.values())
    for row, (title, contents) in enumerate(steps.items()):
        y, width = -1.75 * row, most / len(contents)
        axes.text(0, y + 1.1, title, fontsize=9, va="bottom")
        for lane, text in enumerate(contents):
            marked = bool(follow) and lane in follow[row]
            if len(text) > 7 and _size(width / most, text) < picture.SMALLEST:
                text = f"{text[: len(text) // 2]}\n{text[len(text) // 2 :]}"
            _box(
                axes,
                lane * width,
                y,
                width,
                1,
                picture.ORANGE if marked else picture.SKY,
                text,
                _size(width / most, text),
            )
        for edge in range(groups, len(contents), groups) if groups else ():
            axes.plot([edge * width] * 2, [y, y + 1], color=picture.GREY, linewidth=2)
    _bare(axes, (-0.02, most + 0.02), (-1.75 * (len(steps) - 1) - 0.05, 1.8))
    return picture.show(figure, "Registers, one box for each lane. " + "; then ".join(steps) + ".")


def tiles(rows: int, groups: int, row: int, group: int) -> Image:
    """The canonical layout and the tile layout of the same rows, with one dword and its scale followed."""
    figure, (left, right) = picture.canvas(1, 2, height=3.4)
    for r in range(rows):
        for g in range(groups):
            here = (r, g) == (row, group)
            colour, strength = (picture.ORANGE, 1) if here else (picture.BLUE, 0.08 + 0.6 * g / groups)
            _box(left, 2 * g, -r, 2, 1, colour, "", 6, strength)
            _box(right, r, -2 * g - 2, 1, 2, colour, "", 6, strength)
        colour, strength = (picture.ORANGE, 1) if r == row else (picture.GREEN, PALE)
        _box(right, r, 0, 1, 2, colour, "", 6, strength)
        left.text(-0.2, -r + 0.5, f"row {r}", ha="right", va="center", fontsize=7)
        right.text(r + 0.5, 2.2, f"{r}", ha="center", va="bottom", fontsize=7)
    for g in range(groups):
        left.text(2 * g + 1, 1.2, f"{4 * g}-{4 * g + 3}", ha="center", va="bottom", fontsize=7)
        right.text(-0.3, -2 * g - 1, f"bytes {4 * g}-{4 * g + 3}", ha="right", va="center", fontsize=7)
    right.text(-0.3, 1, "scales", ha="right", va="center", fontsize=7)
    right.text(-0.3, 2.2, "row", ha="right", va="bottom", fontsize=7)
    left.set_title("stored: all bytes of a row, then the next row")
    right.set_title("tiles: each line is one load of 64 bytes")
    _bare(left, (-2.4, 2 * groups), (-rows + 1, 2))
    _bare(right, (-3.6, rows), (-2 * groups, 3.4))
    return picture.show(
        figure, "Left, sixteen rows of bytes. Right, the same bytes: the first four of each row, then the next four."
    )


def threads(loads: Mapping[str, Sequence[Sequence[int]]]) -> Image:
    """Who reads what: load -> for each byte the lanes that read it, in that one instruction."""
    figure, axes = picture.canvas(height=0.5 * len(loads) + 0.6)
    count = max(len(readers) for readers in loads.values())
    for row, (title, readers) in enumerate(loads.items()):
        for byte, who in enumerate(readers):
            if len(who):
                text = ",\n".join(str(lane) for lane in who)
                _box(axes, byte, -1.25 * row, 1, 1, picture.BLUE, text, picture.SMALLEST, 0.1 + 0.55 * who[0] / 31)
        axes.text(-0.4, 0.5 - 1.25 * row, title, ha="right", va="center", fontsize=8)
    for byte in range(0, count, 4):
        axes.text(byte + 0.5, 1.15, str(byte), ha="center", va="bottom", fontsize=7)
    axes.text(-0.4, 1.15, "byte of the row", ha="right", va="bottom", fontsize=7)
    _bare(axes, (-7.5, count), (-1.25 * (len(loads) - 1), 1.8))
    return picture.show(figure, "Bytes of a row, and in each the lanes that read it: " + "; ".join(loads) + ".")


def shuffle(values: Sequence[Sequence[float]], distances: Sequence[int], follow: int = 0) -> Image:
    """Partial sums of a warp, [stages + 1, 32]: each stage adds the value of the lane at the distance (by xor)."""
    figure, axes = picture.canvas(height=4.4)
    for stage, row in enumerate(values):
        y = -2.2 * stage
        same = len({round(v, 4) for v in row})
        axes.text(-0.6, y + 0.5, f"{same} different", ha="right", va="center", fontsize=8)
        for lane, value in enumerate(row):
            mark = _feeds(lane, follow, distances[stage:])
            _box(
                axes,
                lane,
                y,
                1,
                1,
                picture.ORANGE if mark else picture.SKY,
                f"{value:.1f}",
                picture.SMALLEST,
                rotation=90,
            )
        if stage < len(distances):
            for lane in range(32):
                partner = lane ^ distances[stage]
                mark = _feeds(lane, follow, distances[stage + 1 :])
                axes.plot([partner + 0.5, lane + 0.5], [y, y - 1.2], linewidth=1.3 if mark else 0.4,
                          color=picture.ORANGE if mark else picture.GREY)  # fmt: skip
            axes.text(32.4, y - 0.6, f"xor {distances[stage]}", va="center", fontsize=8)
    _bare(axes, (-5.4, 35), (-2.2 * len(distances), 1.2))
    return picture.show(
        figure, "Five stages: in each, every lane adds the sum of the one whose number differs in a bit."
    )


def fragment(matrices: Mapping[str, np.ndarray], names: Mapping[str, Sequence[str]], lane: int) -> Image:
    """Who holds what: name -> int [rows, columns] of ``lane * registers + register``; one lane's elements marked.

    Args:
        matrices: a box is a register, the number in it the lane that has it, the colour which one it is.
        names: matrix -> its registers' names.
        lane: whose elements are orange.
    """
    widths = [m.shape[1] for m in matrices.values()]
    figure, panels = picture.canvas(1, len(matrices), height=4.4, width_ratios=widths)
    for axes, (title, holder) in zip(panels, matrices.items(), strict=True):
        registers = names[title]
        for (r, c), code in np.ndenumerate(holder):
            who, register = divmod(int(code), len(registers))
            colour, strength = (picture.ORANGE, 1) if who == lane else (REGISTERS[register], PALE)
            first_row, first_column = np.argwhere(holder == code)[0]
            if (r, c) == (first_row, first_column):  # one box for all elements of a register: they are neighbours
                height, width = np.argwhere(holder == code)[-1] - (r, c) + 1
                _box(axes, c, -r - height + 1, width, height, colour, str(who), 7, strength)
        for register, name in enumerate(registers):
            at = 2.2 * register
            _box(axes, at, -holder.shape[0] - 0.4, 0.9, 0.9, REGISTERS[register], "", 7)
            axes.text(at + 1, -holder.shape[0] + 0.05, name, fontsize=8, va="center")
        axes.set_title(title)
        _bare(axes, (0, max(holder.shape[1], 2.2 * len(registers))), (-holder.shape[0] - 0.5, 1))
    return picture.show(
        figure, f"Matrices, in each element its lane; those of lane {lane} are marked. Colours: registers."
    )


# --- helpers ----------------------------------------------------------------------------------------------------------


def _feeds(lane: int, end: int, distances: Sequence[int]) -> bool:
    """Whether a lane's value has yet a way to lane ``end``."""
    return (lane ^ end) & ~sum(distances) == 0


def _box(axes, x, y, width, height, colour, text, size, strength=PALE, rotation=0):
    face = [1 - strength * (1 - part) for part in to_rgb(colour)]
    axes.add_patch(Rectangle((x, y), width, height, facecolor=face, edgecolor=picture.GREY, linewidth=0.5))
    axes.text(
        x + width / 2,
        y + height / 2,
        text,
        ha="center",
        va="center",
        fontsize=size,
        color="black",
        linespacing=0.95,
        rotation=rotation,
    )


def _size(share, text):
    """The letters' size at which a text fits a box that takes this share of the picture's width."""
    longest = max(map(len, text.split("\n")))
    return min(8, 72 * picture.WIDTH * share / (0.68 * longest + 0.5))


def _bare(axes, x, y):
    axes.set(xlim=x, ylim=y)
    axes.set_axis_off()
