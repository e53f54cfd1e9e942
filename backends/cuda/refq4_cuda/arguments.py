"""The kernels' argument structs, as ctypes sees them: the same fields in the same order as ``kernels/device.cuh``.

A kernel gets one struct by value, so a launch is one buffer of bytes. :func:`packer` turns a struct into a function
that packs its flattened fields, a few times faster than building the ctypes object; a test holds sizes and offsets to
what the compiler says.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from ctypes import Structure, c_float, c_int, c_int64, c_void_p, sizeof
from typing import Any

__all__ = [
    "DequantizeArguments",
    "GroupedArguments",
    "ProductArguments",
    "QuantizeArguments",
    "Scales",
    "Weight",
    "flat_fields",
    "packer",
]


class Scales(Structure):
    """One scale for ``blocksize`` elements; with ``q``, double-quantised."""

    _fields_ = (
        ("absmax", c_void_p),
        ("q", c_void_p),
        ("nested_code", c_void_p),
        ("nested_offset", c_void_p),
        ("blocksize", c_int64),
        ("nested_blocksize", c_int64),
        ("shift", c_int),
        ("nested_shift", c_int),
    )


class Weight(Structure):
    """The canonical weight: packed codes, the values they stand for, the scales."""

    _fields_ = (("packed", c_void_p), ("code", c_void_p), ("scales", Scales))


class QuantizeArguments(Structure):
    """Of the kernels in ``quantize_*.cu``."""

    _fields_ = (
        ("x", c_void_p),
        ("numel", c_int64),
        ("blocksize", c_int64),
        ("thresholds", c_void_p),
        ("order", c_void_p),
        ("code_length", c_int),
        ("pad_code", c_int),
        ("absmax", c_void_p),
        ("out", c_void_p),
    )


class DequantizeArguments(Structure):
    """Of ``dequantize.cu``."""

    _fields_ = (("weight", Weight), ("out", c_void_p), ("numel", c_int64), ("aligned", c_int))


class ProductArguments(Structure):
    """Of the kernels in ``gemv_*.cu`` and ``gemm_*.cu``."""

    _fields_ = (
        ("x", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("M", c_int64),
        ("N", c_int64),
        ("K", c_int64),
        ("weight", Weight),
        ("partial", c_void_p),
        ("arrived", c_void_p),
        ("row_warps", c_int),
        ("splits", c_int),
        ("factor", c_float),
        ("back", c_float),
    )


class GroupedArguments(Structure):
    """Of the same kernels, compiled with GROUPED (``grouped.cuh``)."""

    _fields_ = (("product", ProductArguments), ("tiles", c_void_p))


_LETTERS = {c_void_p: "P", c_int64: "q", c_int: "i", c_float: "f"}


def flat_fields(kind: type[Structure], prefix: str = "", base: int = 0) -> list[tuple[str, int, Any]]:
    """(dotted name, offset, ctypes type) of every field, those of inner structs included, in order."""
    fields: list[tuple[str, int, Any]] = []
    for name, field_type, *_ in kind._fields_:
        offset = base + getattr(kind, name).offset
        if issubclass(field_type, Structure):
            fields += flat_fields(field_type, f"{prefix}{name}.", offset)
        else:
            fields.append((prefix + name, offset, field_type))
    return fields


def packer(kind: type[Structure]) -> Callable[..., bytes]:
    """A function from the flattened fields' values, in order, to the struct's bytes.

    Example:
        >>> len(packer(QuantizeArguments)(0, 10, 64, 0, 0, 16, 7, 0, 0)) == sizeof(QuantizeArguments)
        True
    """
    # "@" aligns each field as C does; "0q" at the end fills the struct up to a multiple of eight.
    made = struct.Struct("@" + "".join(_LETTERS[field_type] for _, _, field_type in flat_fields(kind)) + "0q")
    if made.size != sizeof(kind):
        raise TypeError(f"{kind.__name__} packs to {made.size} bytes, and C expects {sizeof(kind)}")
    return made.pack
