"""A rich console that shows every string as it is. rich is told so here, and nowhere else.

rich reads ``[cuda]`` in a string as markup and ``:smile:`` as an emoji, and drops or replaces them. What refq4 prints
are messages, paths and names of tensors, in which both are ordinary text. Text that needs a style is made by
:func:`words`. A :class:`~refq4.internals.shown.Shown` draws itself through this console whatever console it is printed
to.

Not imported by the layer: rich is loaded when something is shown.
"""

from __future__ import annotations

import re
from typing import Any

from rich import console as rich_console
from rich.text import Text

__all__ = ["Console", "console", "visible", "words"]

PIPED_WIDTH = 120
# Control characters but newline and tab, which terminals obey or swallow, and halves of characters, which can't be
# encoded: a path has them for bytes that are no UTF-8.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Console(rich_console.Console):
    """A console without markup and emoji codes; takes the arguments of rich's own."""

    def render_str(self, text: str, **settings: Any) -> Text:
        """Make a string into a text: rich calls this for each string that it is given. Numbers may get a colour."""
        return super().render_str(visible(text), **(settings | {"markup": False, "emoji": False}))

    def on_broken_pipe(self) -> None:
        """Raise on: rich calls this where it caught the error, and would exit with 1 by itself."""
        raise


def console(stderr: bool = False, piped_width: int | None = None) -> Console:
    """Make a console for standard output, or standard error.

    It has the colours and the width of the terminal (rich respects NO_COLOR); piped, it is plain and wide enough for
    the tables.
    """
    terminal = Console(stderr=stderr)
    return terminal if terminal.is_terminal else Console(stderr=stderr, width=piped_width or PIPED_WIDTH)


def words(*parts: str | tuple[str, str]) -> Text:
    """Join strings, and pairs of a string and its style, into one text.

    Example:
        >>> words(("wrong", "bold red"), "  model[0]").plain
        'wrong  model[0]'
    """
    return Text.assemble(*(visible(part) if isinstance(part, str) else (visible(part[0]), part[1]) for part in parts))


def visible(text: str) -> str:
    r"""Replace the characters that a terminal would not show by their escapes.

    Example:
        >>> visible("a\x1b[31mb")
        'a\\x1b[31mb'
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
