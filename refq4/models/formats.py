"""A format of its own for some layers: patterns on their names, and what of the settings is different there.

    {"mlp": {"blocksize": 128}, "lm_head": {"quant_type": "fp4"}}        Python, and the JSON in a config
    --set mlp=blocksize:128 --set lm_head=quant_type:fp4,scales:search   the command line

Each pattern that matches a name applies; where two say the same thing, the later one holds.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..codebooks import get_codebook
from ..internals.checks import check_blocksize
from ..internals.scale_search import check_way
from .patterns import first_match

__all__ = ["Formats", "check_formats", "check_used", "format_of", "parse_formats"]

Formats = Mapping[str, Mapping[str, Any]]


def check_formats(formats: Formats) -> dict[str, dict[str, Any]]:
    """A copy, with each value checked.

    Raises:
        ValueError: a setting that there is not, or a value that it can't have; the message names the pattern.

    Example:
        >>> check_formats({"mlp": {"block_size": 128}})
        Traceback (most recent call last):
        ValueError: formats['mlp'] has no setting 'block_size': did you mean 'blocksize'?
    """
    for pattern, settings in formats.items():
        for name, value in settings.items():
            if name not in _CHECKS:
                near = difflib.get_close_matches(name, _CHECKS, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_CHECKS)}"
                raise ValueError(f"formats[{pattern!r}] has no setting {name!r}: {hint}")
            try:
                _CHECKS[name](value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"formats[{pattern!r}]: {error}") from None
    return {pattern: dict(settings) for pattern, settings in formats.items()}


def format_of(formats: Formats, *names: str) -> dict[str, Any]:
    """What is different for a layer, by its dotted name, or by several that it goes by.

    Example:
        >>> format_of({"mlp": {"blocksize": 128}, "up": {"scales": "search"}}, "layers.0.mlp.up")
        {'blocksize': 128, 'scales': 'search'}
    """
    return {
        key: value
        for pattern, settings in formats.items()
        if any(first_match(name, [pattern]) for name in names)
        for key, value in settings.items()
    }


def check_used(formats: Formats, names: Iterable[str]) -> None:
    """Raise a ValueError if a pattern matches none of the layers."""
    layers = list(names)
    for pattern in formats:
        if not any(first_match(name, [pattern]) for name in layers):
            raise ValueError(f"formats: the pattern {pattern!r} matches none of the {len(layers)} layers to quantise")


def parse_formats(given: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Formats from the command line.

    Example:
        >>> parse_formats(["mlp=blocksize:128,scales:search", "attn=compress_statistics:false"])
        {'mlp': {'blocksize': 128, 'scales': 'search'}, 'attn': {'compress_statistics': False}}
    """
    formats: dict[str, dict[str, Any]] = {}
    for text in given:
        pattern, _, settings = text.partition("=")
        pairs = [pair.partition(":") for pair in settings.split(",")]
        if not pattern or not all(name and value for name, _, value in pairs):
            raise ValueError(f"--set {text}: expected PATTERN=SETTING:VALUE,..., such as mlp=blocksize:128")
        formats.setdefault(pattern, {}).update((name.strip(), _parsed(value.strip())) for name, _, value in pairs)
    return check_formats(formats)


def _parsed(value: str) -> Any:
    return int(value) if value.isdigit() else {"true": True, "false": False}.get(value.lower(), value)


def _check_bool(value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"compress_statistics is true or false, got {value!r}")


_CHECKS: dict[str, Callable[[Any], object]] = {
    "quant_type": get_codebook,
    "blocksize": check_blocksize,
    "compress_statistics": _check_bool,
    "scales": check_way,
}
