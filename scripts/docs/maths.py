r"""LaTeX to MathML while the site is built, so that a page with formulas needs no script and no fonts.

In Markdown ``$...$`` and ``$$...$$`` are marked by pymdownx.arithmatex as ``\(...\)`` and ``\[...\]``; in a notebook's
HTML (cells.py) they come as they are.
"""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

_MARKED = re.compile(
    r'<(span|div) class="arithmatex">\\(?P<open>[(\[])(?P<latex>.*?)\\[)\]]</\1>',
    re.DOTALL,
)
_BAR = re.compile(r"<mo((?: [^>]*)?>&#x(?:0007C|02016);)")  # of a norm: browsers space it like a relation


def render(page: str) -> str:
    """A page's HTML with its formulas as MathML."""
    return _MARKED.sub(lambda match: mathml(html.unescape(match["latex"]), block=match["open"] == "["), page)


def mathml(latex: str, block: bool) -> str:
    """One formula; the LaTeX stays with it, for those who copy it and for screen readers without MathML."""
    markup: str = convert(latex.strip(), display="block" if block else "inline")
    markup = _BAR.sub(r'<mo lspace="0" rspace="0"\1', markup)
    label = html.escape(latex.strip(), quote=True)
    markup = markup.replace("<math ", f'<math aria-label="{label}" ', 1) if block else markup
    return f'<div class="formula" tabindex="0">{markup}</div>' if block else markup
