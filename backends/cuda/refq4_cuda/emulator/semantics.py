"""The table of instructions that compute: an opcode, the types of its operands, and a numpy function of whole rows.

    @pure("mul.wide.u32", "u64 = u32 u32")
    def _(a, b):                   one element per lane, dtypes as the signature says
        return a.astype(u64) * b

Types: u, s, f and the number of bits (f16 and f32 are numpy's floats); ``b16`` with bf16 bits is a u16; ``pred`` is a
bool. The families are in ``integer.py`` and ``floating.py``; ``lookup`` finds an opcode in any of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["PURE", "Pure", "dtype_of", "pure"]

Function = Callable[..., Any]


class Pure(NamedTuple):
    """One opcode: the type of the result, those of the sources, and the function."""

    result: str
    sources: tuple[str, ...]
    function: Function


PURE: dict[str, Pure] = {}


def pure(opcode: str, signature: str) -> Callable[[Function], Function]:
    """Enter a function into the table; see the top of the file."""

    def enter(function: Function) -> Function:
        result, sources = signature.split("=")
        PURE[opcode] = Pure(result.strip(), tuple(sources.split()), function)
        return function

    return enter


def dtype_of(type_name: str) -> Any:
    """The numpy dtype of a type in a signature."""
    if type_name == "pred":
        return np.dtype(bool)
    kind, bits = re.fullmatch(r"([usf])(\d+)", type_name).groups()  # type: ignore[union-attr]
    return np.dtype(f"{kind.replace('s', 'i')}{int(bits) // 8}")
