"""What Python hands to the compiled library: the weight as one struct, and the types of all other arguments.

Every function that reads a weight takes one pointer to ``Weight`` of ``kernels/refq4.h``. :data:`WEIGHT_FIELDS` is
that struct in Python, and packing its nine numbers into bytes costs less than passing nine arguments through ctypes.
A test compares each offset with the C compiler's.
"""

from __future__ import annotations

import struct
from ctypes import CDLL, c_char_p, c_double, c_int, c_int64, c_void_p

from torch import Tensor

from refq4.backend import Nested

__all__ = ["WEIGHT_FIELDS", "code_struct", "declare", "weight_struct"]

# The name in refq4.h and the letter of Python's struct module: P is a pointer, q is int64_t.
WEIGHT_FIELDS = (
    ("packed", "P"),
    ("code", "P"),
    ("blocksize", "q"),
    ("absmax", "P"),
    ("q", "P"),
    ("nested_absmax", "P"),
    ("nested_code", "P"),
    ("nested_offset", "P"),
    ("nested_blocksize", "q"),
)
_pack = struct.Struct("@" + "".join(letter for _, letter in WEIGHT_FIELDS)).pack


def weight_struct(codes: Tensor, code: Tensor, blocksize: int, absmax: Tensor, nested: Nested | None) -> bytes:
    """The bytes of a ``Weight``. It holds addresses only: the tensors must outlive the call that reads it."""
    if nested is None:
        return _pack(codes.data_ptr(), code.data_ptr(), blocksize, absmax.data_ptr(), 0, 0, 0, 0, 0)
    return _pack(
        codes.data_ptr(), code.data_ptr(), blocksize, 0, absmax.data_ptr(), nested.absmax.data_ptr(),
        nested.code.data_ptr(), nested.offset.data_ptr(), nested.blocksize,
    )  # fmt: skip


def code_struct(code: Tensor, blocksize: int) -> bytes:
    """The ``Weight`` beside tiles, which hold the packed codes and the scales themselves."""
    return _pack(0, code.data_ptr(), blocksize, 0, 0, 0, 0, 0, 0)


def declare(functions: CDLL) -> None:
    """Set every function's argument types: ctypes would otherwise pass 64-bit sizes as 32-bit integers."""
    f, pointer, weight = functions, c_void_p, c_char_p
    f.refq4_kernel.argtypes = [c_char_p]
    f.refq4_kernel.restype = pointer
    f.refq4_product.argtypes = [*[pointer] * 4, c_int, *[c_int64] * 3, pointer, weight, c_int]
    f.refq4_product.restype = c_int
    f.refq4_grouped.argtypes = [c_char_p, c_int64, pointer, c_int64, *[pointer] * 3, c_int, *[c_int64] * 2, pointer,
                                weight, c_int]  # fmt: skip
    f.refq4_grouped.restype = c_int
    f.refq4_quantize.argtypes = [pointer, c_int, c_int64, c_int64, pointer, pointer, c_int, c_int, *[pointer] * 3,
                                 c_int, c_int]  # fmt: skip
    f.refq4_dequantize.argtypes = [weight, c_int, c_int64, pointer, c_int, c_int]
    f.refq4_tile.argtypes = [weight, c_int64, c_int64, pointer, c_int]
    f.refq4_untile.argtypes = [pointer, *[c_int64] * 3, pointer, pointer, c_int]
    f.refq4_limit.argtypes = [c_int, pointer, c_int64, c_int]
    f.refq4_limit.restype = c_double
    f.refq4_ask_for_large_pages.argtypes = [pointer, c_int64]
    for function in (f.refq4_ask_for_large_pages, f.refq4_quantize, f.refq4_dequantize, f.refq4_tile, f.refq4_untile):
        function.restype = None
