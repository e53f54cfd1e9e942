"""Up to how many tokens the fused kernel is taken, and from how many the weight is decoded and cuBLAS multiplies.

    crossovers.json       by architecture and shape, from the model of ``roofline.py`` (which writes it)
    the cache directory   what ``refq4 tune`` measured on a GPU of this machine; asked first

A row is N, K and the numbers of tokens after which the other of the two is faster, fused first: [4096, 4096, [256]]. A
shape that is not there is served as the nearest that is: the one at the smallest ratios of N and K.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from refq4.internals.buildcache import CacheError, cache_directory

__all__ = ["FILE", "Row", "forget", "is_fused", "keep", "modelled", "modelled_turns", "tuned_file"]

FILE = Path(__file__).with_name("crossovers.json")
Row = tuple[int, int, Sequence[int]]

_LIKE = {87: 86, 88: 89, 103: 100, 110: 120, 121: 120}  # of the same kind, or with as slow a memory
_LATEST = 120


def is_fused(m: int, n: int, k: int, arch: int, multiprocessors: int) -> bool:
    """Whether the fused kernel is expected to be the faster one at M tokens.

    Example:
        >>> is_fused(16, 4096, 4096, 90, 132), is_fused(512, 4096, 4096, 90, 132)
        (True, False)
    """
    rows = {tuple(row[:2]): row for row in [*modelled(arch), *_measured(arch, multiprocessors)]}
    return bisect_left(_nearest(list(rows.values()), n, k), m) % 2 == 0


def modelled_turns(n: int, k: int, arch: int) -> Sequence[int]:
    """What the model says of a shape: the numbers of tokens after which the other way is faster, fused first."""
    return _nearest(modelled(arch), n, k)


def modelled(arch: int) -> list[Row]:
    """The rows for an architecture, or for one like it."""
    known = _shipped()
    found: list[Row] = known.get(str(arch)) or known[str(_LIKE.get(arch, _LATEST))]
    return found


def keep(arch: int, multiprocessors: int, rows: Sequence[Row]) -> Path:
    """Write what was measured on a GPU to the cache directory; that of other GPUs, and of other shapes, stays.

    Raises:
        CacheError: the directory can't be used.
    """
    path = tuned_file()
    by_shape = {tuple(row[:2]): list(row) for row in [*_measured(arch, multiprocessors), *rows]}
    kept = _tuned() | {_name(arch, multiprocessors): list(by_shape.values())}
    path.write_text(json.dumps(kept, indent=1) + "\n")
    forget()
    return path


def forget() -> None:
    """Read the measured cross-overs again when they are asked for next."""
    _tuned.cache_clear()


def tuned_file() -> Path:
    """Where ``refq4 tune`` writes."""
    return cache_directory("cuda") / "crossovers.json"


def _nearest(rows: Sequence[Row], n: int, k: int) -> Sequence[int]:
    return min(rows, key=lambda row: abs(math.log2(row[0] / n)) + abs(math.log2(row[1] / k)))[2]


def _measured(arch: int, multiprocessors: int) -> list[Row]:
    rows = _tuned().get(_name(arch, multiprocessors), [])
    return [tuple(row) for row in rows if isinstance(row, list) and len(row) == 3 and isinstance(row[2], list)]


def _name(arch: int, multiprocessors: int) -> str:
    return f"sm_{arch} with {multiprocessors} multiprocessors"


@cache
def _shipped() -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = json.loads(FILE.read_text())
    return found


@cache
def _tuned() -> dict[str, Any]:
    try:
        found = json.loads(tuned_file().read_text())
    except (OSError, ValueError, CacheError):  # never tuned, or a damaged file: the model's figures do
        return {}
    return found if isinstance(found, dict) else {}
