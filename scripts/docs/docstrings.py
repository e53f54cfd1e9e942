"""A griffe extension: docstrings as they are written here, for a site in Markdown.

``Example:`` sections become griffe's ``Examples:`` (it shows those as Python), and roles such as ``:func:`name``` plain
code. The help that Python shows is not touched.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_ROLE = re.compile(r":(?:func|class|meth|data|mod|attr):`~?([^`]+)`")


class Docstrings(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\1`", _EXAMPLE.sub("Examples:", obj.docstring.value))
