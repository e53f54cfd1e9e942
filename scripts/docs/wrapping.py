"""Where a line may break: in a long name after its joints; in an option, an arrow or a short cell nowhere.

Browsers break a name anywhere rather than let a table scroll (``gemm_4bit_1_scala`` ``r.c``), and after each hyphen
(``-`` ``-quick``, ``w-`` ``>packed``). The style sheet forbids the first in tables; a name that is longer than its line
gets places where it may break.
"""

from __future__ import annotations

import html
import re
from collections import Counter

SHORT, SHORT_NUMBER = {"td": 22, "th": 8}, 27  # characters that stay on one line: "70% of the dot-product peak"
BRIEF, BRIEF_NUMBER = 12, 22  # the same on a phone: "the read limit" breaks there, "3.247 (1.63x)" does not
LONG_NAME = 29  # from here on a name in a cell may break; no environment variable is as long
NAME_ON_A_PHONE = 14  # the same on a phone
LONGEST_IN_PROSE, LONGEST_IN_A_HEADING = 40, 20  # characters in a phone's line

_CELL = re.compile(r"<(?P<tag>t[dh])\b(?P<attributes>[^>]*)>(?P<content>.*?)</t[dh]>", re.DOTALL)
_CODE = re.compile(r"(?<=<code>)[^<]+(?=</code>)")
_NAME_ALONE = re.compile(r"\s*(?:<a [^>]*>)?<code>(?:(?!</code>).)*</code>(?:</a>)?\s*", re.DOTALL)
_LETTERS = re.compile(r'<div class="language-text highlight">(<pre\b.*?</pre>)', re.DOTALL)
_DRAWN = re.compile(r"^ {2}|\S {3,}\S", re.MULTILINE)
_NAME = re.compile(rf"(?=\S*[A-Za-z]{{2}})\S{{{NAME_ON_A_PHONE},}}")  # no number
_JOINT = re.compile(r"(?<=[\w:)\]][_/.:,(\[=])(?=\w{3})|(?<=[a-z0-9])(?=[A-Z])")  # .c and .py stay where they are
_HYPHENS = re.compile(r"(?<![\w-])(?=[\w-]*-\w)[\w-]{1,23}\w(?![\w-])|-+&gt;")
_ARROW = re.compile(r"-+&gt;")
_TAG = re.compile(r"(<[^>]+>)")
_NAME_OF_TAG = re.compile(r"</?(\w+)")
_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_NO_PROSE = ("svg", "math", "script", "style", "textarea")


def in_page(page: str) -> str:
    """The page's HTML with the classes ``short``, ``brief`` and ``name`` on cells, and with its breaks in place."""
    parts = _TAG.split(_LETTERS.sub(_lines, _CELL.sub(_cell, page)))
    inside: Counter[str] = Counter()
    for i, part in enumerate(parts):
        if i % 2:
            name = _NAME_OF_TAG.match(part)
            if name:
                inside[name[1]] += -1 if part.startswith("</") else 1
        elif part.strip() and not any(inside[tag] for tag in _NO_PROSE) and parts[i - 1] != '<span class="o">':
            parts[i] = _text(part, inside)
    return "".join(parts)


def _cell(match: re.Match[str]) -> str:
    tag, attributes, content = match.groups()
    if "<pre" in content or "class=" in attributes:  # a listing with numbered lines
        return match[0]
    content = _CODE.sub(lambda code: code[0].replace(r"\|", "|"), content)  # as GitHub shows it
    text = html.unescape(_TAG.sub("", content)).strip()
    number = text.lstrip("-")[:1].isdigit()
    most = {"short": SHORT_NUMBER if number else SHORT[tag], "brief": BRIEF_NUMBER if number else BRIEF}
    kinds = [kind for kind, longest in most.items() if len(text) <= longest]
    kinds += ["name"] if _NAME_ALONE.fullmatch(content) else []
    attributes = f' class="{" ".join(kinds)}"{attributes}' if kinds else attributes
    return f"<{tag}{attributes}>{content}</{tag}>"


def _lines(match: re.Match[str]) -> str:
    """Text that is neither drawn nor in columns may be wrapped: commands, and what was printed."""
    drawn = _DRAWN.search(html.unescape(_TAG.sub("", match[1])))
    return match[0] if drawn else f'<div class="language-text lines highlight">{match[1]}'


def _text(text: str, inside: Counter[str]) -> str:
    listing = inside["pre"]
    if not listing and (inside["td"] or inside["th"]):
        text = _NAME.sub(lambda name: _broken(name[0], LONG_NAME), text)
    elif not listing and any(inside[tag] for tag in _HEADINGS):
        text = _NAME.sub(lambda name: _broken(name[0], LONGEST_IN_A_HEADING, on_a_phone=False), text)
    elif not listing and inside["code"]:
        text = _NAME.sub(lambda name: _broken(name[0], LONGEST_IN_PROSE, on_a_phone=False), text)
    return (_HYPHENS if inside["code"] else _ARROW).sub(r'<span class="whole">\g<0></span>', text)


def _broken(name: str, longest: int, on_a_phone: bool = True) -> str:
    if len(html.unescape(name)) >= longest:
        return _JOINT.sub("<wbr>", name)
    return _JOINT.sub('<wbr class="narrow">', name) if on_a_phone else name
