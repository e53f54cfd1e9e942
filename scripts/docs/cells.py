"""A notebook as mkdocs-jupyter renders it, made at home on the site.

Out go Jupyter's own style sheet (half a megabyte a page, light only), scripts, and the addresses of MathJax and Mermaid
on other hosts. What stays is structure, under class names that the theme colours in light and dark.
"""

from __future__ import annotations

import re

import maths
import places
from bs4 import BeautifulSoup, Tag

_UNWANTED = re.compile(r"<(style|script)\b.*?</\1>", re.DOTALL)
_PARTS = ".zeroclipboard-container, .clipboard-copy-txt, .celltoolbar, .jp-InputPrompt, .jp-OutputPrompt"
_FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^$\n]+?)\$(?![\w$])", re.DOTALL)


def clean(html: str, page: str) -> str:
    """The page's own HTML.

    Args:
        html: what mkdocs-jupyter made of a notebook.
        page: the page's path on the site.
    """
    soup = BeautifulSoup(_UNWANTED.sub("", html), "html.parser")
    for part in soup.select(_PARTS):
        part.decompose()
    for code in soup.select(".highlight-ipynb"):
        code["class"] = ["highlight"]
    for pre in soup.select(".highlight pre"):
        _wrap_in_code(soup, pre)
    for text in soup.select(".jp-RenderedMarkdown"):
        _render_text(text, page)
    return str(soup)


def _wrap_in_code(soup: BeautifulSoup, pre: Tag) -> None:
    """The theme's copy button looks for <pre><code>."""
    code = soup.new_tag("code")
    for child in list(pre.children):
        code.append(child.extract())
    pre.append(code)


def _render_text(cell: Tag, page: str) -> None:
    for string in list(cell.find_all(string=_FORMULA)):
        if string.find_parent(["code", "pre"]) is None:
            string.replace_with(BeautifulSoup(_FORMULA.sub(_formula, _escape(string)), "html.parser"))
    for anchor in cell.find_all("a", href=True):
        anchor["href"] = places.relative_url(anchor["href"], page)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _formula(match: re.Match[str]) -> str:
    latex = (match["block"] or match["inline"]).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return maths.mathml(latex, block=match["block"] is not None)
