"""The seven steps as the site tells them: each is a page ``docs/explanation/step-N-....md``.

Its front matter holds what the picture on the landing page shows of it, too: title, rule, code, decisions, notebook.
"""

from __future__ import annotations

import importlib
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any

import places
import yaml

from refq4.trace import Decision

PAGES = places.ROOT / "docs" / "explanation"


@dataclass(frozen=True)
class Step:
    """One step of the forward pass.

    Args:
        number: 1 to 7.
        page: its page on the site.
        title: its name, as the trace has it.
        rule: one or two sentences.
        code: dotted names of the functions that are the step.
        decisions: a module and the prefix of the constants in it that are the step's decisions.
        notebook: the number of the notebook that shows it.
    """

    number: int
    page: str
    title: str
    rule: str
    code: tuple[str, ...]
    decisions: str
    notebook: int

    @property
    def anchor(self) -> str:
        """Where the landing page tells of it."""
        return f"step-{self.number}"


def steps() -> list[Step]:
    """All seven, in order."""
    return [_read(path) for path in sorted(PAGES.glob("step-*.md"))]


def _read(path: Any) -> Step:
    about = yaml.safe_load(path.read_text().split("---")[1])
    page = places.uri(path.relative_to(places.ROOT).as_posix())
    fields = {key: about[key] for key in ("rule", "decisions", "notebook")}
    return Step(number=about["step"], title=about["name"], page=page, code=tuple(about["code"]), **fields)


def decisions(module: str, prefix: str = "") -> list[tuple[str, Decision]]:
    """The decisions in a module whose names begin so, in the order they stand there."""
    names = vars(importlib.import_module(module)).items()
    return [(name, value) for name, value in names if isinstance(value, Decision) and name.startswith(prefix)]


def source(dotted: str) -> tuple[str, str, int]:
    """A function or class: its text, its file's path in the repository, the line it begins on."""
    module, _, name = dotted.rpartition(".")
    thing = getattr(importlib.import_module(module), name)
    lines, first = inspect.getsourcelines(thing)
    path = inspect.getsourcefile(thing)
    assert path is not None
    relative = path.removeprefix(f"{places.ROOT}/")
    return textwrap.dedent("".join(lines)).rstrip(), relative, first
