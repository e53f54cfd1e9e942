"""The versions of other libraries that the tests pass on. pyproject.toml pins the same; a test holds the two together.

A library that is older is refused, since what an integration builds on is missing there. One that is newer was not
tried, and may work.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re

from ..internals import remedies
from ..internals.checks import warn_caller

__all__: list[str] = []  # for the modules beside it

TRIED = {"transformers": ("5.21", "5.25"), "peft": ("0.19", "0.22"), "diffusers": ("0.42", "0.43")}  # from, before


def check(library: str, extra: str) -> None:
    """Import ``library``, and compare its version with those that were tried; ``extra`` of refq4 installs it.

    Raises:
        ImportError: it is older, or missing, or can't be imported.

    Warns:
        UserWarning: it is newer.

    Example:
        >>> TRIED["transformers"][0]
        '5.21'
    """
    oldest, before = TRIED[library]
    try:
        importlib.import_module(library)
        found = importlib.metadata.version(library)
        tried = f"refq4 was tried with {library} {oldest} and newer, before {before}; this is {found}"
        if _numbers(found) < _numbers(oldest):
            raise ImportError(tried)
    except ImportError as error:
        raise ImportError(f"this needs {library}: {remedies.install(extra)} ({error})") from error
    if _numbers(found) >= _numbers(before):
        warn_caller(f"{tried}, and may or may not work")


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, those that the ranges above are written in."""
    return tuple(int(number) for number in re.findall(r"\d+", f"{version}.0")[:2])
