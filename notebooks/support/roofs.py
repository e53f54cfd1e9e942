"""Pictures of speed for notebooks 8 and 9: bytes and operations, a roof and what is under it, a ladder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from IPython.display import Image

from . import picture

__all__ = ["call_times", "cross_overs", "ladder", "roofline", "traffic", "winners"]

MARKERS = "osD^vP"


def traffic(moved: Mapping[int, Mapping[str, float]], operations: Mapping[int, float]) -> Image:
    """M -> {what: bytes}, and M -> operations: bytes as bars, operations a byte as a line."""
    figure, (left, right) = picture.canvas(1, 2, height=3.0)
    tokens = list(moved)
    base = [0.0] * len(tokens)
    for what, colour in zip(moved[tokens[0]], picture.COLOURS, strict=False):
        heights = [moved[m][what] / 1e6 for m in tokens]
        left.bar([str(m) for m in tokens], heights, bottom=base, color=colour, label=what, width=0.7)
        base = [b + h for b, h in zip(base, heights, strict=True)]
    left.set(xlabel="M, tokens", title="megabytes moved by one call", ylim=(0, 1.3 * max(base)))
    left.grid(axis="x", visible=False)
    left.legend(ncols=2, loc="upper left")
    right.plot(tokens, [operations[m] / sum(moved[m].values()) for m in tokens], "o-", color=picture.VERMILION)
    right.set(xlabel="M, tokens", title="operations for each byte")
    _powers_of_two(right, tokens)
    _plain(right.yaxis)
    return picture.show(
        figure, "Left: bytes of a call, nearly all of them weights. Right: operations per byte grow in step with M."
    )


def call_times(
    machines: Mapping[str, tuple[Iterable[int], Mapping[str, Sequence[float]], tuple[float, float]]],
    floors: Callable[[int, tuple[float, float]], tuple[float, float]],
    cross: Callable[[tuple[float, float]], float],
) -> Image:
    """Milliseconds over M, a panel for each machine: measured (dots), what can't be beaten (lines), their cross-over.

    Args:
        machines: name -> tokens, {way: milliseconds}, limits.
        floors: M and limits -> milliseconds that memory and multipliers take at least.
        cross: limits -> the M at which both are the same.
    """
    figure, panels = picture.canvas(1, len(machines), height=3.8, sharey=True)
    for axes, (machine, (tokens, measured, limits)) in zip(panels, machines.items(), strict=True):
        tokens = list(tokens)
        for name, style, floor in zip(
            ("memory", "multipliers"), ("--", ":"), zip(*(floors(m, limits) for m in tokens), strict=True), strict=True
        ):
            axes.plot(tokens, floor, style, color=picture.GREY, label=f"the {name} can't be faster")
        axes.axvline(cross(limits), color=picture.GREY, linewidth=0.8)
        axes.annotate(
            f"cross-over, M = {cross(limits):.1f}",
            (cross(limits), 0),
            xycoords=("data", "axes fraction"),
            xytext=(4, 6),
            textcoords="offset points",
            fontsize=8,
        )
        for (name, times), colour, marker in zip(measured.items(), picture.COLOURS, MARKERS, strict=False):
            axes.plot(tokens, times, marker + "-", color=colour, markersize=5, linewidth=1, label=name)
        axes.set(xlabel="M, tokens", title=machine)
        _powers_of_two(axes, tokens)
        _plain(axes.yaxis)
    panels[0].set_ylabel("milliseconds of a call")
    handles, names = panels[-1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8)
    return picture.show(
        figure,
        "Time of a call over the number of tokens, on two machines: level at first where memory is the limit, "
        "rising in step with M afterwards.",
    )


def roofline(
    read_gb_s: float, peak_gflop_s: float, points: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> Image:
    """GFLOP/s over operations a byte: the roof of a machine, and the name -> (intensities, GFLOP/s) under it."""
    figure, axes = picture.canvas(height=3.8)
    ridge, end = peak_gflop_s / read_gb_s, 2 * max(max(x) for x, _ in points.values())
    axes.plot([0.3, ridge, end], [0.3 * read_gb_s, peak_gflop_s, peak_gflop_s], color=picture.GREY, linewidth=2)
    middle = (0.3 * ridge) ** 0.5
    axes.annotate(f"memory: {read_gb_s:.3g} GB/s", (middle, middle * read_gb_s), xytext=(-6, 6),
                  textcoords="offset points", ha="right", fontsize=9)  # fmt: skip
    axes.annotate(f"multipliers: {peak_gflop_s:.0f} GFLOP/s", (end, peak_gflop_s), xytext=(0, 5),
                  textcoords="offset points", ha="right", fontsize=9)  # fmt: skip
    for (name, (x, y)), colour, marker in zip(points.items(), picture.COLOURS, MARKERS, strict=False):
        axes.plot(x, y, marker, color=colour, markersize=6, label=name)
    axes.set(xlabel="operations for each byte that must be moved", title="GFLOP/s")
    _plain(axes.xaxis, axes.yaxis)
    axes.set_ylim(top=1.6 * peak_gflop_s)
    axes.legend(loc="lower right")
    return picture.show(
        figure, "A roofline: a slope that memory sets, a level that the multipliers set, and measurements below them."
    )


def cross_overs(machines: Mapping[str, tuple[float, float]], cross: Mapping[str, float]) -> Image:
    """name -> (GB/s, GFLOP/s) and name -> tokens at which the limits meet."""
    figure, axes = picture.canvas(height=0.5 * len(cross) + 1.1)
    for row, (name, tokens) in enumerate(reversed(cross.items())):
        read, peak = machines[name]
        axes.barh(row, tokens, color=picture.BLUE, height=0.55)
        axes.text(
            tokens * 1.08, row, f"{tokens:.1f}   ({read:,.0f} GB/s, {peak:,.0f} GFLOP/s)", va="center", fontsize=9
        )
    axes.set_yticks(range(len(cross)), list(reversed(cross)))
    axes.set(xlim=(1, max(cross.values()) * 30), title="tokens at which memory stops being the limit")
    _plain(axes.xaxis)
    axes.grid(axis="y", visible=False)
    return picture.show(figure, "One bar for each machine: the number of tokens at which its two limits meet.")


def winners(rows: Mapping[str, Mapping[str, str]]) -> Image:
    """layout -> {M: kernel}: who was fastest where, one colour for each kernel."""
    kernels = list(dict.fromkeys(kernel for row in rows.values() for kernel in row.values()))
    figure, axes = picture.canvas(height=0.55 * len(rows) + 1.3)
    for y, row in enumerate(rows.values()):
        for x, kernel in enumerate(row.values()):
            axes.barh(y, 1, left=x, color=picture.COLOURS[kernels.index(kernel)], edgecolor="none", height=0.7)
    tokens = list(next(iter(rows.values())))
    axes.set_xticks([i + 0.5 for i in range(len(tokens))], tokens)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(xlabel="M, tokens", title="the fastest kernel on this machine")
    axes.grid(visible=False)
    for kernel in kernels:
        axes.plot([], [], "s", color=picture.COLOURS[kernels.index(kernel)], label=kernel, markersize=9)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return picture.show(figure, "For each layout and number of tokens, the kernel that was fastest here.")


def ladder(times: Mapping[str, Mapping[int, float]], elsewhere: Mapping[str, Mapping[int, float]]) -> Image:
    """kernel -> {M: ms}, measured here (full bars) and elsewhere (outlines), on a logarithmic scale."""
    everything = {**times, **elsewhere}
    tokens = sorted({m for row in everything.values() for m in row})
    figure, panels = picture.canvas(1, len(tokens), height=0.38 * len(everything) + 1.1, sharey=True)
    for axes, m in zip([panels] if len(tokens) == 1 else panels, tokens, strict=True):
        for y, (name, row) in enumerate(reversed(everything.items())):
            if m not in row:
                axes.text(0.02, y, "one token only", va="center", fontsize=8, transform=axes.get_yaxis_transform())
                continue
            here = name in times
            axes.barh(y, row[m], height=0.6, color=picture.BLUE if here else "none", edgecolor=picture.BLUE)
            axes.text(row[m] * 1.15, y, f"{row[m]:.3g}", va="center", fontsize=8)
        axes.set(title=f"M = {m}, ms")
        _plain(axes.xaxis)
        axes.set_xlim(right=axes.get_xlim()[1] * 6)
        axes.grid(axis="y", visible=False)
        axes.set_yticks(range(len(everything)), list(reversed(everything)))
    return picture.show(figure, "Times of the kernels, from the plain loop at the top to the last one.")


def _plain(*which):
    """A logarithmic axis with numbers as people write them."""
    for axis in which:
        getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(lambda value, _: "")


def _powers_of_two(axes, tokens):
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(tokens), [str(m) for m in tokens])
    axes.minorticks_off()
