"""What prints as text in a terminal and shows as HTML in Jupyter: the base class of every report.

A trace, an explanation, a comparison, the reports of the tools and of the emulator each give their parts (strings and
tables), and this class draws them. How text is kept from being read as markup: ``refq4/internals/verbatim.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

__all__ = ["Shown"]


class Shown:
    """A report that prints as text and shows as HTML in Jupyter; subclasses have ``_parts``."""

    def _parts(self) -> Iterator[RenderableType]:
        """Give strings and tables, from top to bottom; strings are shown as they are."""
        raise NotImplementedError

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the parts on any console as on refq4's own, which takes no string for markup."""
        from .verbatim import Console as Verbatim  # here, so that importing refq4 stays quick

        ours = Verbatim(force_jupyter=False)
        for part in self._parts():
            yield from ours.render(part, options)

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int = 120) -> str:
        """Plain text, ``width`` columns wide."""
        plain: str = self._shown(width=width, color_system=None).file.getvalue()
        return plain

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """What Jupyter shows: HTML, or where there is none the text, not the fields that a dataclass would print."""
        return {"text/plain": self.text(width=100), "text/html": self._repr_html_()}

    def _repr_html_(self) -> str:
        """HTML in colours that follow the page."""
        html: str = self._shown(width=100, record=True).export_html(
            inline_styles=True,
            code_format='<pre style="white-space:pre;overflow-x:auto;line-height:1.2;font-family:monospace">{code}'
            "</pre>",
        )
        return html

    def _shown(self, **settings: Any) -> Any:
        import io

        from .verbatim import Console as Verbatim

        console = Verbatim(file=io.StringIO(), force_jupyter=False, **settings)  # in Jupyter it would display, too
        console.print(self)
        return console
