"""The forward pass as a picture: one drawing, wide for screens and the README, tall for phones.

    python scripts/docs/drawing.py      writes docs/pipeline.svg, the wide one, for pages without a script

On the landing page both are inline, each step is a link to its panel, and the style sheet shows the one that fits.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import places
from steps import Step, steps

DESCRIPTION = (
    "Seven steps in a row: {names}. Step 6 takes one of three paths: own layout for a rearranged weight, gemv_4bit for "
    "one token, MatMul4Bit for several and for gradients; each calls a backend: reference, cpu, cuda, or your own."
)
PATHS = (("own layout", "rearranged"), ("gemv_4bit", "one token"), ("MatMul4Bit", "several, gradients"))
ENGINES = (("reference", "pure PyTorch"), ("cpu", "C, SIMD"), ("cuda", "tensor cores"), ("yours", "a file of yours"))

FONT = "ui-sans-serif, system-ui, sans-serif"

# For the file that stands alone; on the site assets/site.css says the same with the theme's colours.
STYLE = """
.box rect{fill:#f4f1ea;stroke:#6b6459;stroke-width:1.2}.path rect{fill:#dbe9f6;stroke:#2f6690}
.engine rect{fill:#fbe6cf;stroke:#b3651b}text{fill:#222;text-anchor:middle}.number{font-weight:700;fill:#2f6690}
.side{fill:#5c564d;font-size:12px}.line{stroke:#6b6459;stroke-width:1.4;fill:none}.tip{fill:#6b6459}.paper{fill:#fff}
@media (prefers-color-scheme:dark){.box rect{fill:#2b2f38;stroke:#8d96a5}.path rect{fill:#1d3347;stroke:#6aa5d8}
.engine rect{fill:#41301d;stroke:#d79a55}text{fill:#e8e8e8}.number{fill:#8fc1ee}.side{fill:#b9bec8}
.line{stroke:#8d96a5}.tip{fill:#8d96a5}.paper{fill:#1b1d23}}
"""


@dataclass(frozen=True)
class Box:
    """A rectangle of the picture."""

    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        """Its middle, from left to right."""
        return self.x + self.width / 2


def wide(all_steps: Sequence[Step], name: str = "wide", linked: bool = False) -> str:
    """Steps from left to right, 980 by 330."""
    boxes = [Box(78 + 124 * i, 70, 108, 74) for i in range(7)]
    parts = [_text(78, 40, "the weight: packed codes, quant state", "side", anchor="start")]
    parts += [_line(f"M{boxes[0].middle} 47V68"), _text(26, 103, "x", "side"), _text(26, 119, "[M, K]", "side")]
    parts += [_line("M52 107H76"), _text(boxes[6].middle, 40, "y [M, N]", "side")]
    parts += [_line(f"M{boxes[6].middle} 69V48")]
    parts += [_line(f"M{a.x + a.width} 107H{b.x - 2}") for a, b in pairwise(boxes)]
    parts += [_step(step, box, linked) for step, box in zip(all_steps, boxes, strict=True)]
    paths = [Box(430 + 160 * i, 186, 140, 46) for i in range(3)]
    engines = [Box(356 + 150 * i, 268, 130, 46) for i in range(4)]
    parts += [_line(f"M{boxes[5].middle} 144V164H{path.middle}V184") for path in paths]
    parts += [_tree(paths, engines, 250)]
    parts += _named(PATHS, paths, "path") + _named(ENGINES, engines, "engine")
    parts += [_text(210, 284, "backends compute;", "side"), _text(210, 300, "the core decides", "side")]
    return _svg(980, 330, name, all_steps, parts, linked)


def tall(all_steps: Sequence[Step], name: str = "tall", linked: bool = False) -> str:
    """Steps from top to bottom, 340 by 690."""
    boxes = [Box(30, 44 + 60 * i, 280, 44) for i in range(6)] + [Box(30, 606, 280, 44)]
    parts = [_text(170, 16, "x [M, K]; the weight: packed codes, quant state", "side"), _line("M170 22V42")]
    parts += [_line(f"M170 {a.y + 44}V{b.y - 2}") for a, b in pairwise(boxes[:6])]
    paths = [Box(4, 420, 100, 46), Box(108, 420, 100, 46), Box(212, 420, 124, 46)]
    engines = [Box(8 + 83 * i, 518, 75, 46) for i in range(4)]
    parts += [_line(f"M170 388V404H{path.middle}V418") for path in paths]
    parts += [_tree(paths, engines, 490), _line("M170 490V604"), _line("M170 650V668")]
    parts += [_text(170, 684, "y [M, N]", "side")]
    parts += [_step(step, box, linked, lines=1) for step, box in zip(all_steps, boxes, strict=True)]
    parts += _named(PATHS, paths, "path") + _named([(n, "") for n, _ in ENGINES], engines, "engine")
    return _svg(340, 690, name, all_steps, parts, linked)


def _svg(width: int, height: int, name: str, all_steps: Sequence[Step], parts: list[str], linked: bool) -> str:
    described = DESCRIPTION.format(names=", ".join(step.title for step in all_steps))
    role = "group" if linked else "img"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="{name}" viewBox="0 0 {width} {height}" role="{role}" '
            f'aria-labelledby="{name}-title {name}-text" font-family="{FONT}" font-size="13">',
            f'<title id="{name}-title">The forward pass of a 4-bit linear layer</title>',
            f'<desc id="{name}-text">{html.escape(described)}</desc>',
            "" if linked else f"<style>{STYLE}</style>",
            f'<defs><marker id="{name}-tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>',
            "" if linked else f'<rect class="paper" width="{width}" height="{height}" rx="10"/>',
            *(part.replace("TIP", f"{name}-tip") for part in parts),
            "</svg>",
        ]
    )


def _step(step: Step, box: Box, linked: bool, lines: int = 3) -> str:
    if lines == 1:
        baseline = box.y + 27
        label = [_text(box.x + 24, baseline, str(step.number), "number"), _text(box.middle + 8, baseline, step.title)]
    else:
        words = textwrap.wrap(step.title, 12)
        first = box.y + 42 + 8 * (3 - len(words))
        label = [_text(box.middle, box.y + 20, str(step.number), "number")]
        label += [_text(box.middle, first + 15 * i - 4, line) for i, line in enumerate(words)]
    drawn = f'<g class="box">{_rect(box)}{"".join(label)}</g>'
    if not linked:
        return drawn
    spoken = f"Step {step.number}: {step.title}"
    return f'<a href="#{step.anchor}" aria-label="{html.escape(spoken)}">{drawn}</a>'


def _named(names: Sequence[tuple[str, str]], boxes: Sequence[Box], kind: str) -> list[str]:
    drawn = []
    for (name, what), box in zip(names, boxes, strict=True):
        below = _text(box.middle, box.y + 35, what, "side") if what else ""
        text = _text(box.middle, box.y + (18 if what else 28), name)
        drawn.append(f'<g class="box {kind}">{_rect(box)}{text}{below}</g>')
    return drawn


def _tree(paths: Sequence[Box], engines: Sequence[Box], level: float) -> str:
    """From each path to each engine: down to a common line, and down from it."""
    left, right = engines[0].middle, engines[-1].middle
    down = "".join(f"M{path.middle} {path.y + path.height}V{level}" for path in paths)
    plain = f'<path class="line" d="{down}M{left} {level}H{right}"/>'
    return plain + "".join(_line(f"M{engine.middle} {level}V{engine.y - 2}") for engine in engines)


def _rect(box: Box) -> str:
    return f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" rx="8"/>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "") -> str:
    kinds = f' class="{kind}"' if kind else ""
    style = f' style="text-anchor:{anchor}"' if anchor else ""
    return f'<text{kinds}{style} x="{x}" y="{y}">{html.escape(text, quote=False)}</text>'


def _line(path: str) -> str:
    return f'<path class="line" d="{path}" marker-end="url(#TIP)"/>'


if __name__ == "__main__":
    (places.ROOT / "docs" / "pipeline.svg").write_text(wide(steps(), "pipeline") + "\n")
