"""A notebook as mkdocs-jupyter renders it, made at home on the site.

Out go Jupyter's own style sheet (half a megabyte a page, light only), scripts, and the addresses of MathJax and Mermaid
on other hosts. What stays is structure, under class names that the theme colours in light and dark.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator

import maths
import places

_OUT = re.compile(
    r"<(?P<tag>style|script)\b.*?</(?P=tag)>"
    r'|<div class="zeroclipboard-container">.*?</clipboard-copy>\s*</div>'
    r"|<div [^>]*\bclipboard-copy-txt\b[^>]*>.*?</div>"
    r'|<div class="jp-InputPrompt[^>]*>.*?</div>'
    r'|<div class="jp-OutputPrompt[^>]*>.*?</div>',
    re.DOTALL,
)
# The theme's colours, and its copy button, look for <div class="highlight"><pre><code>.
_CODE = re.compile(r'<div class="highlight-ipynb[^"]*"\s*><pre>(.*?)</pre>', re.DOTALL)
_BLOCK = '<div class="highlight"><pre><code>{}</code></pre></div>'
_DRAWS = re.compile(r"(figure|_), .*= picture\.canvas\(")
_TAG = re.compile(r"<[^>]*>")
_TEXT = re.compile(r'(<div class="[^"]*\bjp-RenderedMarkdown\b[^>]*>)(.*?)(</div>\s*</div>)', re.DOTALL)
_NOT_PROSE = re.compile(r"(<(?:pre|code)\b.*?</(?:pre|code)>)", re.DOTALL)
_FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^$\n]+?)\$(?![\w$])", re.DOTALL)
_PLAIN = re.compile(r'<div class="highlight"><pre>(?:<span></span>)?(.*?)</pre>', re.DOTALL)
_PRINTED = re.compile(r'(<div class="[^"]*\bjp-RenderedText\b[^>]*>\s*)<pre>(.*?</pre>)', re.DOTALL)
_IN_COLUMNS = re.compile(r"^.*?(?:\S {2,}(?=\S).*?){3}$", re.MULTILINE)
_NO_WORDS = re.compile(r'alt="No description has been provided for this image"')
_LINK = re.compile(r'(<a [^>]*href=")([^"]+)(")')


def clean(page: str, path: str) -> str:
    """The page's own HTML.

    Args:
        page: what mkdocs-jupyter made of a notebook.
        path: the page's path on the site.
    """
    descriptions = _descriptions(path)
    page = _NO_WORDS.sub(lambda _: f'alt="{html.escape(next(descriptions, ""), quote=True)}"', page)
    page = _CODE.sub(lambda match: _code(match[1]), _OUT.sub("", page))
    page = _PRINTED.sub(_printed, page)
    return _TEXT.sub(lambda match: f"{match[1]}{_text(match[2], path)}{match[3]}", page)


def _descriptions(path: str) -> Iterator[str]:
    """The sentence for each picture, in order, which nbconvert leaves where it is: in the output's metadata."""
    for cell in json.loads((places.ROOT / path).read_text())["cells"]:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                yield output["metadata"].get("image/png", {}).get("alt", "")


def _code(cell: str) -> str:
    """A cell's code: what computes is shown, what draws (from ``picture.canvas`` on) is folded."""
    lines = cell.split("\n")
    start = next((i for i, line in enumerate(lines) if _DRAWS.match(_TAG.sub("", line))), len(lines))
    computes, draws = "\n".join(lines[:start]), "\n".join(lines[start:])
    parts = [_BLOCK.format(computes)] if _TAG.sub("", computes).strip() else []
    if draws:
        parts.append(f'<details class="drawing"><summary>how it is drawn</summary>{_BLOCK.format(draws)}</details>')
    return f"{''.join(parts)}<div>"  # which the cell's own end closes


def _printed(match: re.Match[str]) -> str:
    """What was printed: a line with three gaps is a row of a table, and on a phone its columns stay in order."""
    opening = '<pre class="columns">' if _IN_COLUMNS.search(match[2]) else "<pre>"
    return f"{match[1]}{opening}{match[2]}"


def _listing(match: re.Match[str]) -> str:
    """A block of code in Markdown, or of letters where no language has coloured it."""
    language = "" if "<span" in match[1] else "language-text "
    return f'<div class="{language}highlight"><pre><code>{match[1]}</code></pre>'


def _text(cell: str, path: str) -> str:
    """A cell of Markdown, or a table that was shown: formulas outside code, links as the site has them."""
    parts = _NOT_PROSE.split(_PLAIN.sub(_listing, cell))
    parts[::2] = [_FORMULA.sub(_formula, part) for part in parts[::2]]
    return _LINK.sub(lambda match: f"{match[1]}{places.relative_url(match[2], path)}{match[3]}", "".join(parts))


def _formula(match: re.Match[str]) -> str:
    latex = html.unescape(match["block"] or match["inline"])
    return maths.mathml(latex, block=match["block"] is not None)
