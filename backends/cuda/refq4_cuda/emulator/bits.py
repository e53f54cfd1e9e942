"""Bits and bytes: counts, fields, reversals, logic of three operands, funnel shifts, dot products of bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

from .integer import constant, each, shift_left, shift_right
from .semantics import Pure, dtype_of, family, pure

Row = Any  # a numpy row, one element per lane
U32, U64, S64 = np.uint32, np.uint64, np.int64


def _leading_zeros(a: Row) -> Row:
    """clz. The exponent that frexp finds is exact: 32 bits fit into a double."""
    if a.itemsize == 4:
        return 32 - np.frexp(a.astype(np.float64))[1]
    high = (a >> U64(32)).astype(U32)
    return np.where(high != 0, _leading_zeros(high), 32 + _leading_zeros(a.astype(U32)))


for _bits in ("32", "64"):
    pure(f"clz.b{_bits}", f"u32 = u{_bits}")(_leading_zeros)
    pure(f"popc.b{_bits}", f"u32 = u{_bits}")(lambda a: np.bitwise_count(a).astype(U32))
    pure(f"cnot.b{_bits}", f"u{_bits} = u{_bits}")(lambda a: (a == 0).astype(a.dtype))


def _highest_bit(a: Row, shift: bool) -> Row:
    """bfind: where the highest bit stands that differs from the sign; all ones if there is none."""
    unsigned = a.view(f"u{a.itemsize}")
    significant = np.where(a < 0, ~unsigned, unsigned) if a.dtype.kind == "i" else unsigned
    zeros = _leading_zeros(significant).astype(np.int64)
    width = a.itemsize * 8
    place = zeros if shift else width - 1 - zeros
    return np.where(zeros == width, 0xFFFFFFFF, place).astype(U32)


for _kind in ("u32", "s32", "u64", "s64"):
    pure(f"bfind.{_kind}", f"u32 = {_kind}")(lambda a: _highest_bit(a, False))
    pure(f"bfind.shiftamt.{_kind}", f"u32 = {_kind}")(lambda a: _highest_bit(a, True))


def _reversed(a: Row) -> Row:
    """brev: the bytes in reverse, and each byte's bits."""
    size = a.itemsize
    turned = np.ascontiguousarray(a).view(np.uint8).reshape(-1, size)[:, ::-1]
    bits = np.packbits(np.unpackbits(turned, axis=1, bitorder="little"), axis=1, bitorder="big")
    return np.ascontiguousarray(bits).view(a.dtype)[:, 0]


pure("brev.b32", "u32 = u32")(_reversed)
pure("brev.b64", "u64 = u64")(_reversed)


def _field(a: Row, position: Row, length: Row) -> Row:
    """bfe: ``length`` bits from ``position`` on; a signed one fills up with the highest bit there is of it."""
    width = a.itemsize * 8
    position, length = np.minimum(position & 255, width), np.minimum(length & 255, width)
    unsigned = a.view(f"u{a.itemsize}")
    cut = shift_right(a, position).view(unsigned.dtype)  # what lies beyond the top of a signed number is its sign
    mask = np.where(
        length >= width,
        ~a.dtype.type(0).view(unsigned.dtype),
        shift_left(cut.dtype.type(1) + cut * 0, length) - cut.dtype.type(1),
    )
    value = cut & mask
    if a.dtype.kind == "u":
        return value
    last = np.minimum(position + length.astype(S64) - 1, width - 1)  # where the sign stands
    negative = (shift_right(unsigned, last.clip(0).astype(U32)) & cut.dtype.type(1)).astype(bool) & (length > 0)
    return np.where(negative, value | ~mask, value).view(a.dtype)


for _kind in ("u32", "s32", "u64", "s64"):
    pure(f"bfe.{_kind}", f"{_kind} = {_kind} u32 u32")(_field)


def _insert(field: Row, into: Row, position: Row, length: Row) -> Row:
    """bfi: the lowest ``length`` bits of the field, put into bits ``position`` and up; what sticks out is lost."""
    width, whole = field.itemsize * 8, field.dtype.type
    if (at := constant(position)) is not None and (many := constant(length)) is not None and at < width:
        mask = whole(((1 << (many & 255)) - 1) << at & (1 << width) - 1)
        return (field << whole(at) & mask) | (into & ~mask)
    position, length = np.minimum(position & 255, width), np.minimum(length & 255, width)
    ones = np.where(length >= width, ~whole(0), shift_left(np.ones(len(field), field.dtype), length) - whole(1))
    mask = shift_left(ones, position)
    return (shift_left(field, position) & mask) | (into & ~mask)


for _kind in ("u32", "u64"):
    pure(f"bfi.b{_kind[1:]}", f"{_kind} = {_kind} {_kind} u32 u32")(_insert)


@pure("lop3.b32", "u32 = u32 u32 u32 u32")
def _(a: Row, b: Row, c: Row, table: Row) -> Row:
    """Bit i of the table says the result where the bits of a, b and c spell i."""
    which, result = int(table[0]), np.zeros(len(a), U32)
    for i in range(8):
        if which >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def _funnel(left: bool, wraps: bool) -> Any:
    def shifted(low: Row, high: Row, by: Row) -> Row:
        amount = (by & U32(31) if wraps else np.minimum(by, 32)).astype(U64)
        pair = high.astype(U64) << U64(32) | low
        return (pair << amount >> U64(32) if left else pair >> amount).astype(U32)

    return shifted


for _left in (True, False):
    for _wraps in (True, False):
        _opcode = f"shf.{'l' if _left else 'r'}.{'wrap' if _wraps else 'clamp'}.b32"
        pure(_opcode, "u32 = u32 u32 u32")(_funnel(_left, _wraps))

for _kind in ("s16", "s32", "s64"):
    pure(f"abs.{_kind}", f"{_kind} = {_kind}")(np.abs)
for _kind in ("u16", "u32", "u64", "s16", "s32", "s64"):
    pure(f"sad.{_kind}", f"{_kind} = {_kind} {_kind} {_kind}")(lambda a, b, c: np.where(a > b, a - b, b - a) + c)


# --- products that need more bits -------------------------------------------------------------------------------------


def _high(a: Row, b: Row) -> Row:
    """The upper half of a product."""
    size = a.itemsize
    if size < 8:
        wide = np.dtype(f"{a.dtype.kind}{2 * size}")
        return (a.astype(wide) * b.astype(wide) >> wide.type(8 * size)).astype(a.dtype)
    x, y, mask = a.view(U64), b.view(U64), U64(0xFFFFFFFF)
    xl, xh, yl, yh = x & mask, x >> U64(32), y & mask, y >> U64(32)
    middle = xh * yl + (xl * yl >> U64(32))
    other = xl * yh + (middle & mask)
    high = xh * yh + (middle >> U64(32)) + (other >> U64(32))
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, U64(0)) - np.where(b < 0, x, U64(0))
    return high.view(a.dtype)


each("mul.hi", "s u", _high)
each("mad.hi", "s u", lambda a, b, c: _high(a, b) + c, "{t} = {t} {t} {t}")
for _narrow, _wide in (("u32", "u64"), ("s32", "s64"), ("u16", "u32"), ("s16", "s32")):
    pure(f"mad.wide.{_narrow}", f"{_wide} = {_narrow} {_narrow} {_wide}")(
        lambda a, b, c: a.astype(c.dtype) * b.astype(c.dtype) + c
    )


def _low24(a: Row) -> Row:
    return a << a.dtype.type(8) >> a.dtype.type(8)


for _kind in ("u32", "s32"):
    pure(f"mul24.lo.{_kind}", f"{_kind} = {_kind} {_kind}")(lambda a, b: _low24(a) * _low24(b))
    pure(f"mad24.lo.{_kind}", f"{_kind} = {_kind} {_kind} {_kind}")(lambda a, b, c: _low24(a) * _low24(b) + c)


def _saturated(function: Any) -> Any:
    return lambda a, b: np.clip(function(a.astype(S64), b.astype(S64)), -(2**31), 2**31 - 1).astype(np.int32)


pure("add.sat.s32", "s32 = s32 s32")(_saturated(np.add))
pure("sub.sat.s32", "s32 = s32 s32")(_saturated(np.subtract))


@family("dp4a")
def _dp4a(parts: list[str]) -> Pure | None:
    """d = c + the sum of four products of bytes, each side signed or not."""
    left, right = parts[1:]

    def function(a: Row, b: Row, c: Row) -> Row:
        x, y = (
            np.ascontiguousarray(v).view(f"{k[0].replace('s', 'i')}1").reshape(-1, 4)
            for v, k in ((a, left), (b, right))
        )
        return (c.astype(S64) + (x.astype(S64) * y.astype(S64)).sum(axis=1)).astype(c.dtype)

    kind = "s32" if "s32" in (left, right) else "u32"
    return Pure(kind, ("u32", "u32", kind), function)


# --- logic of one bit, moves of any type ------------------------------------------------------------------------------

for _name, _function in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.items():
    pure(f"{_name}.b8", "u8 = u8 u8")(_function)
for _kind in ("f16", "bf16", "f64", "f16x2", "bf16x2"):
    _unsigned = "u" + str(dtype_of("f64").itemsize * 8 if _kind == "f64" else 32 if "x2" in _kind else 16)
    pure(f"mov.{_kind}", f"{_unsigned} = {_unsigned}")(lambda a: a)
    pure(f"selp.{_kind}", f"{_unsigned} = {_unsigned} {_unsigned} pred")(lambda a, b, p: np.where(p, a, b))
