"""The landing page's picture with a panel for each step, and what the steps' own pages take from the code."""

from __future__ import annotations

import re

import drawing
import places
from steps import Step, decisions, source, steps


def pipeline(page: str) -> str:
    """The picture, wide and tall, and under it seven panels, of which assets/pipeline.js shows one at a time."""
    told = steps()
    drawn = "\n".join(_without_blank_lines(draw(told, linked=True)) for draw in (drawing.wide, drawing.tall))
    panels = "\n\n".join(_panel(step, page) for step in told)
    return (
        f'<div class="pipeline">\n{drawn}\n</div>\n\n'
        f'<div class="panels" aria-live="polite" markdown="1">\n\n{panels}\n\n</div>'
    )


def sources() -> set[str]:
    """The files that hold the steps: every step links to its code."""
    return {source(dotted)[1] for told in steps() for dotted in told.code}


def rule(page: str, number: str) -> str:
    """A step's rule, set apart."""
    return f'!!! abstract "The rule"\n\n    {steps()[int(number) - 1].rule}'


def step(page: str, number: str) -> str:
    """What a step can decide, and its code: the end of its page."""
    told = steps()[int(number) - 1]
    return f"## What it can decide\n\n{_decisions(told)}\n\n## Code\n\n{_code(told, page)}\n\n{_notebook(told, '../')}"


def _panel(told: Step, page: str) -> str:
    links = "; ".join(filter(None, [f"[more about this step]({told.page})", _notebook(told, "")]))
    return (
        f'<section class="panel" id="{told.anchor}" markdown="1">\n\n'
        f"### {told.number} {told.title} {{ #{told.anchor}-title }}\n\n{told.rule}\n\n{_decisions(told)}\n\n"
        f"{_code(told, page)}\n\n{links}\n\n</section>"
    )


def _decisions(told: Step) -> str:
    rows = [f"| {decision.choice} | {decision.why} |" for _, decision in decisions(*told.decisions.split())]
    return "\n".join(["| decision | when |", "| --- | --- |", *rows])


def _code(told: Step, page: str) -> str:
    blocks = []
    for dotted in told.code:
        text, path, line = source(dotted)
        blocks.append(
            f'````{{ .python title="{path}, line {line}" }}\n{text}\n````\n\n'
            f'<a href="{places.link_to(path, page)}#__codelineno-0-{line}">{dotted} in its file</a>'
        )
    return "\n\n".join(blocks)


def _notebook(told: Step, up: str) -> str:
    """A link to the notebook that shows the step."""
    for path in places.notebooks():
        if re.match(rf"notebooks/0*{told.notebook}_", path):
            return f"[notebook {told.notebook}]({up}../{path}) shows it on real weights"
    return ""


def _without_blank_lines(svg: str) -> str:
    return "\n".join(line for line in svg.splitlines() if line.strip())
