"""A griffe extension: docstrings as they are written here, for a site in Markdown.

``Example:`` sections become griffe's ``Examples:`` (it shows those as Python), and roles such as ``:func:`name``` plain
code. Arguments that share a sentence (``absmax, out: ...``) get a row each, with their own types and defaults. A class
that is made by ``__new__`` takes its arguments. The help that Python shows is not touched.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension, Object

_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_SECTION = re.compile(r"^(?:Args|Attributes):\n(?:(?: .*)?\n)+", re.MULTILINE)
_SHARED = re.compile(r"^ {4}(\w+(?:, \w+)+)(:.*\n(?: {5}.*\n)*)", re.MULTILINE)
_ROLE = re.compile(r":(?:func|class|meth|data|mod|attr):`~?([^`]+)`")


class Docstrings(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            text = _SECTION.sub(lambda section: _SHARED.sub(_each, section[0]), obj.docstring.value + "\n")
            obj.docstring.value = _ROLE.sub(r"`\1`", _EXAMPLE.sub("Examples:", text)).rstrip()

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        """Called for every class once its members are known."""
        if "__new__" in cls.members and "__init__" not in cls.members:
            cls.members["__init__"] = cls.members["__new__"]


def _each(shared: re.Match[str]) -> str:
    return "".join(f"    {name}{shared[2]}" for name in shared[1].split(", "))
