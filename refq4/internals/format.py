"""The constants of the stored format, and how its parts are named in messages.

What may be stored (block sizes, dtypes) and the limits on what a file may claim. The checks
(``refq4/internals/checks.py``) and the reader of state dicts (``refq4/internals/statedict.py``) share them.
"""

from __future__ import annotations

import reprlib
from typing import Any

import torch
from torch import Tensor

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Elements that may share a scale.

Example:
    >>> 64 in BLOCKSIZES, 48 in BLOCKSIZES
    (True, False)
"""
NESTED_BLOCKSIZE = 256
"""Scales that share a scale, with double quantisation.

Example:
    >>> NESTED_BLOCKSIZE in BLOCKSIZES
    True
"""
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What can be quantised, and decoded to.

Example:
    >>> torch.float64 in WEIGHT_DTYPES
    False
"""
JSON_KEY = "quant_state.bitsandbytes__"
MAX_NUMEL = 2**48  # no tensor is larger; keeps arithmetic on a file's claims small


# --- how things are shown: short, and printable whatever a file holds -------------------------------------------------


def describe(value: Any) -> str:
    """A tensor as its dtype and shape, anything else as its type and value."""
    if isinstance(value, Tensor):
        sparse = "" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} "
        return f"{sparse}{dtype_name(value.dtype)} {list(value.shape)}"
    return f"{type(value).__name__} {shown(value)}"


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80
_short.maxlist = _short.maxtuple = 10


def shown(value: Any) -> str:
    """A value on one line, cut short."""
    try:
        return " ".join(_short.repr(value).split())  # on one line
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        return f"{article(value)} too long to show"


def article(value: Any) -> str:
    """The type of a value with its article: "an int"."""
    return f"{'an' if type(value).__name__[0] in 'aeio' else 'a'} {type(value).__name__}"


def dtype_name(dtype: torch.dtype | None) -> str:
    """A dtype without "torch." in front."""
    return str(dtype).removeprefix("torch.")
