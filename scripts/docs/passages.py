"""Passages of a page that are made while the site is built, from the code and the figures they are about.

A page asks with a comment on a line of its own, ``<!-- refq4: NAME ARGUMENTS -->``; NAME is a key of ``PASSAGES``.
A passage is a function of the page it goes to and of the arguments; links in it are written as in that page.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import figures
import kernels_code
import pipeline_page
import tables

PASSAGES: dict[str, Callable[..., str]] = {
    "benchmarks": figures.benchmarks,
    "codebook-data": tables.codebook_data,
    "codebooks": tables.codebooks,
    "environment": tables.environment,
    "file": tables.file,
    "gpu-model": tables.gpu_model,
    "help": tables.command_line,
    "inner-loops": kernels_code.inner_loops,
    "pipeline": pipeline_page.pipeline,
    "rule": pipeline_page.rule,
    "state-dict": tables.state_dict,
    "step": pipeline_page.step,
    "tiles": kernels_code.tiles,
    "values": tables.values,
}

_MARKER = re.compile(r"^<!-- refq4: (\S+)((?: \S+)*) -->$", re.MULTILINE)


def fill(markdown: str, page: str) -> str:
    """The page with every marker replaced.

    Raises:
        KeyError: a marker names no passage.
    """

    def passage(match: re.Match[str]) -> str:
        if match[1] not in PASSAGES:
            raise KeyError(f"{page}: no passage {match[1]!r}; there are {', '.join(sorted(PASSAGES))}")
        return PASSAGES[match[1]](page, *match[2].split())

    return _MARKER.sub(passage, markdown)
