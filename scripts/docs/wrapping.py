"""Where lines may break: nowhere in a table's short cell, in a long name only after its joints, in code at no hyphen.

Browsers break a name anywhere rather than let a table scroll (``gemm_4bit_1_scala`` ``r.c``). The style sheet forbids
that; a test's name, which is longer than a column, gets places where it may break.
"""

from __future__ import annotations

import html
import re

SHORT = {"td": 27, "th": 8}  # characters that stay on one line: "70% of the dot-product peak"; "M = 1" as a heading
LONG_NAME = 29  # from here on a name may break; no environment variable is as long

_CELL = re.compile(r"<(?P<tag>t[dh])\b(?P<attributes>[^>]*)>(?P<content>.*?)</t[dh]>", re.DOTALL)
_CODE = re.compile(r"(?<=<code>)[^<]+(?=</code>)")
_NAME = re.compile(rf"\S{{{LONG_NAME},}}")
_JOINT = re.compile(r"(?<=[_/.:,(\[=])(?=\w)|(?<=[a-z0-9])(?=[A-Z])")
_INLINE = re.compile(r"(?<!<pre><code>)(?<=<code>)[^<]+(?=</code>)")
_HYPHENED = re.compile(r"(?<!\S)(?=\S*-)\S{2,30}(?!\S)")  # an option, or the name of a model
_TAG = re.compile(r"<[^>]+>")
_TEXT = re.compile(r"[^<>]+(?=<|$)")


def in_tables(page: str) -> str:
    """The page's HTML with class ``short`` on short cells and ``<wbr>`` in long names."""
    return _CELL.sub(_cell, page)


def in_code(page: str) -> str:
    """The page's HTML with class ``short`` on the words of its inline code that have a hyphen."""
    return _INLINE.sub(lambda code: _HYPHENED.sub(r'<span class="short">\g<0></span>', code[0]), page)


def _cell(match: re.Match[str]) -> str:
    tag, attributes, content = match.groups()
    if "<pre" in content or "class=" in attributes:  # a listing with numbered lines
        return match[0]
    content = _CODE.sub(lambda code: code[0].replace(r"\|", "|"), content)  # as GitHub shows it
    if len(html.unescape(_TAG.sub("", content)).strip()) <= SHORT[tag]:
        return f'<{tag} class="short"{attributes}>{content}</{tag}>'
    return f"<{tag}{attributes}>{_TEXT.sub(_names, content)}</{tag}>"


def _names(text: re.Match[str]) -> str:
    return _NAME.sub(lambda name: _JOINT.sub("<wbr>", name[0]), text[0])
