"""Integers, predicates and moves: wrap-around arithmetic, clamped shifts, fields, bytes, and sums with a carry.

    add.cc.u32 %r1, %a0, %b0;      the low words of a longer number; the carry is kept
    addc.u32   %r2, %a1, %b1;      the high words, and the carry

NVRTC writes the latter for 128-bit integers and for the large arguments of fp64 sines. A borrow is kept as 1, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .semantics import Known, Row, dtype_of, family, known, pure

if TYPE_CHECKING:
    from .batch import Batch

__all__: list[str] = []

U32, U64, S64 = np.uint32, np.uint64, np.int64
SIZES = ("16", "32", "64")


def each(
    name: str, kinds: str, function: Callable[..., Row], signature: str = "{t} = {t} {t}", sizes: Any = SIZES
) -> None:
    """One function for all sizes of some kinds: ``add`` for ``s u`` enters add.s16 ... add.u64."""
    for kind in kinds.split():
        for size in sizes:
            pure(f"{name}.{kind}{size}", signature.format(t=kind.replace("b", "u") + size))(function)


def _wide(row: Row) -> Row:
    """In twice as many bits: Python's integers for 64, of which numpy has no double."""
    return row.astype(object if row.itemsize == 8 else f"{row.dtype.kind}{2 * row.itemsize}")


def _widening(kind: str) -> Callable[..., Row]:
    wide = dtype_of(kind)
    return lambda a, b: a.astype(wide) * b.astype(wide)


def _high(a: Row, b: Row) -> Row:
    return (_wide(a) * _wide(b) >> 8 * a.itemsize).astype(a.dtype)


each("add", "s u", np.add)
each("sub", "s u", np.subtract)
each("mul.lo", "s u", np.multiply)
each("mad.lo", "s u", lambda a, b, c: a * b + c, "{t} = {t} {t} {t}")
each("mul.hi", "s u", _high)
each("mad.hi", "s u", lambda a, b, c: _high(a, b) + c, "{t} = {t} {t} {t}")
each("min", "s u", np.minimum)
each("max", "s u", np.maximum)
each("neg", "s", np.negative, "{t} = {t}")
each("abs", "s", np.abs, "{t} = {t}")
each("and", "b", np.bitwise_and, sizes=("8", *SIZES))
each("or", "b", np.bitwise_or, sizes=("8", *SIZES))
each("xor", "b", np.bitwise_xor, sizes=("8", *SIZES))
each("not", "b", np.invert, "{t} = {t}")
each("cnot", "b", lambda a: (a == 0).astype(a.dtype), "{t} = {t}")
each("selp", "b s u", lambda a, b, p: np.where(p, a, b), "{t} = {t} {t} pred")
each("mov", "b s u", lambda a: a, "{t} = {t}")
each("sad", "s u", lambda a, b, c: np.where(a > b, a - b, b - a) + c, "{t} = {t} {t} {t}")
for _name, _function in {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.items():
    pure(f"{_name}.pred", "pred = pred pred")(_function)
pure("not.pred", "pred = pred")(np.logical_not)
pure("mov.pred", "pred = pred")(lambda a: a)
for _kind, _type in {"f32": "f32", "f64": "f64", "f16": "u16", "bf16": "u16", "f16x2": "u32", "bf16x2": "u32"}.items():
    pure(f"mov.{_kind}", f"{_type} = {_type}")(lambda a: a)
    pure(f"selp.{_kind}", f"{_type} = {_type} {_type} pred")(lambda a, b, p: np.where(p, a, b))
for _narrow, _double in (("u32", "u64"), ("s32", "s64"), ("u16", "u32"), ("s16", "s32")):
    pure(f"mul.wide.{_narrow}", f"{_double} = {_narrow} {_narrow}")(_widening(_double))
    pure(f"mad.wide.{_narrow}", f"{_double} = {_narrow} {_narrow} {_double}")(
        lambda a, b, c, product=_widening(_double): product(a, b) + c  # noqa: B008
    )


def _low24(a: Row) -> Row:
    return a << 8 >> 8


def _saturated(function: Callable[..., Row]) -> Callable[..., Row]:
    return lambda a, b: np.clip(function(a.astype(S64), b.astype(S64)), -(2**31), 2**31 - 1).astype(np.int32)


each("mul24.lo", "s u", lambda a, b: _low24(a) * _low24(b), sizes=("32",))
each("mad24.lo", "s u", lambda a, b, c: _low24(a) * _low24(b) + c, "{t} = {t} {t} {t}", ("32",))
pure("add.sat.s32", "s32 = s32 s32")(_saturated(np.add))
pure("sub.sat.s32", "s32 = s32 s32")(_saturated(np.subtract))


def _divide(a: Row, b: Row) -> Row:
    """Towards zero, as C's remainder; by zero it gives all ones."""
    return np.where(b == 0, ~(a ^ a), (a - np.fmod(a, b)) // b)


each("div", "s u", _divide)
each("rem", "s u", lambda a, b: np.where(b == 0, a, np.fmod(a, b)))


@family("dp4a")
def _dp4a(parts: list[str]) -> Known | None:
    """d = c + the sum of four products of bytes, each side signed or not."""
    left, right = (f"{kind[0].replace('s', 'i')}1" for kind in parts[1:])

    def function(a: Row, b: Row, c: Row) -> Row:
        x, y = (np.ascontiguousarray(v).view(k).reshape(-1, 4).astype(S64) for v, k in ((a, left), (b, right)))
        return (c.astype(S64) + (x * y).sum(axis=1)).astype(c.dtype)

    kind = "s32" if "s32" in parts else "u32"
    return Known((kind,), ("u32", "u32", kind), function)


@family("add", "sub", "mad", "addc", "subc", "madc")
def _carrying(parts: list[str]) -> Known | None:
    """A sum that reads or keeps a carry."""
    found = re.fullmatch(r"(add|sub|mad)(c?)((?:\.lo|\.hi)?)((?:\.cc)?)\.([us])(32|64)", ".".join(parts))
    if found is None or not (found[2] or found[4]):
        return None
    name, reads, half, keeps, kind, bits = found.groups()
    product = {"": None, ".lo": np.multiply, ".hi": _high}[half]

    def function(m: Batch, s: Any, a: Row, b: Row, *c: Row) -> Row:
        if product is not None:
            a, (b,) = product(a, b), c
        size = 8 * a.itemsize
        unsigned = [_wide(v.view(f"u{v.itemsize}")).astype(object if size == 64 else S64) for v in (a, b)]
        first, second = unsigned[0], unsigned[1] + (m.carry[s] if reads else 0)
        total = first - second if name == "sub" else first + second
        if keeps:
            m.carry[s] = total >> size != 0
        return (total & (1 << size) - 1).astype(f"u{a.itemsize}").view(a.dtype)

    type_name = kind + bits
    return Known((type_name,), (type_name,) * (3 if name == "mad" else 2), function, on_lanes=True)


# --- shifts -----------------------------------------------------------------------------------------------------------


def _constant(row: Row) -> int | None:
    """The number of a row that stands for a constant (one element, repeated), else None."""
    return int(row[0]) if row.strides == (0,) else None


def _left(a: Row, by: Row) -> Row:
    """PTX clamps the amount: past the width nothing is left."""
    bits = a.itemsize * 8
    if (amount := _constant(by)) is not None and amount < bits:
        return a << a.dtype.type(amount)
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), a.dtype.type(0))


def _right(a: Row, by: Row) -> Row:
    """As to the left; a signed number fills up with its sign."""
    bits = a.itemsize * 8
    if (amount := _constant(by)) is not None and amount < bits:
        return a >> a.dtype.type(amount)
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, a.dtype.type(0))


each("shl", "b", _left, "{t} = {t} u32")
each("shr", "s u b", _right, "{t} = {t} u32")


def _funnel(left: bool, wraps: bool) -> Callable[..., Row]:
    def shifted(low: Row, high: Row, by: Row) -> Row:
        amount = (by & U32(31) if wraps else np.minimum(by, 32)).astype(U64)
        pair = high.astype(U64) << U64(32) | low
        return (pair << amount >> U64(32) if left else pair >> amount).astype(U32)

    return shifted


for _side in "lr":
    for _mode in ("wrap", "clamp"):
        pure(f"shf.{_side}.{_mode}.b32", "u32 = u32 u32 u32")(_funnel(_side == "l", _mode == "wrap"))


# --- bits and bytes ---------------------------------------------------------------------------------------------------


def _leading_zeros(a: Row) -> Row:
    """clz. The exponent that frexp finds is exact: 32 bits fit into a double."""
    if a.itemsize == 4:
        return 32 - np.frexp(a.astype(np.float64))[1]
    high = (a >> U64(32)).astype(U32)
    return np.where(high != 0, _leading_zeros(high), 32 + _leading_zeros(a.astype(U32)))


def _highest_bit(a: Row, shift: bool) -> Row:
    """bfind: where the highest bit stands that differs from the sign; all ones if there is none."""
    significant = np.where(a < 0, ~a, a).view(f"u{a.itemsize}")
    zeros, width = _leading_zeros(significant).astype(S64), 8 * a.itemsize
    return np.where(zeros == width, 0xFFFFFFFF, zeros if shift else width - 1 - zeros).astype(U32)


def _reversed(a: Row) -> Row:
    """brev: the bytes in reverse, and each byte's bits."""
    turned = np.ascontiguousarray(a).view(np.uint8).reshape(-1, a.itemsize)[:, ::-1]
    bits = np.packbits(np.unpackbits(turned, axis=1, bitorder="little"), axis=1, bitorder="big")
    return bits.view(a.dtype)[:, 0]


def _ones(like: Row, length: Row) -> Row:
    """So many bits from the lowest on."""
    return ~_left(~(like ^ like), length)


def _field(a: Row, position: Row, length: Row) -> Row:
    """bfe: ``length`` bits from ``position`` on; a signed one fills up with the highest bit there is of it."""
    width = a.itemsize * 8
    position, length = np.minimum(position & 255, width), np.minimum(length & 255, width)
    value = _right(a, position) & _ones(a, length)  # what lies beyond the top of a signed number is its sign
    if a.dtype.kind == "u":
        return value
    last = np.minimum(position + length.astype(S64) - 1, width - 1).clip(0).astype(U32)  # where the sign stands
    negative = (_right(a, last) & 1).astype(bool) & (length > 0)
    return np.where(negative, value | ~_ones(a, length), value)


def _insert(field: Row, into: Row, position: Row, length: Row) -> Row:
    """bfi: the lowest ``length`` bits of the field, put into bits ``position`` and up; what sticks out is lost."""
    width, whole = field.itemsize * 8, field.dtype.type
    if (at := _constant(position)) is not None and (many := _constant(length)) is not None and at < width:
        mask = whole(((1 << (many & 255)) - 1) << at & (1 << width) - 1)
        return (field << whole(at) & mask) | (into & ~mask)
    position, length = np.minimum(position & 255, width), np.minimum(length & 255, width)
    mask = _left(_ones(field, length), position)
    return (_left(field, position) & mask) | (into & ~mask)


for _bits in ("32", "64"):
    pure(f"clz.b{_bits}", f"u32 = u{_bits}")(_leading_zeros)
    pure(f"popc.b{_bits}", f"u32 = u{_bits}")(lambda a: np.bitwise_count(a).astype(U32))
    pure(f"brev.b{_bits}", f"u{_bits} = u{_bits}")(_reversed)
    pure(f"bfi.b{_bits}", f"u{_bits} = u{_bits} u{_bits} u32 u32")(_insert)
    for _kind in (f"u{_bits}", f"s{_bits}"):
        pure(f"bfind.{_kind}", f"u32 = {_kind}")(lambda a: _highest_bit(a, False))
        pure(f"bfind.shiftamt.{_kind}", f"u32 = {_kind}")(lambda a: _highest_bit(a, True))
        pure(f"bfe.{_kind}", f"{_kind} = {_kind} u32 u32")(_field)


@pure("lop3.b32", "u32 = u32 u32 u32 u32")
def _(a: Row, b: Row, c: Row, table: Row) -> Row:
    """Bit i of the table says the result where the bits of a, b and c spell i."""
    which, result = int(table[0]), np.zeros(len(a), U32)
    for i in range(8):
        if which >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


@pure("prmt.b32", "u32 = u32 u32 u32")
def _(a: Row, b: Row, selector: Row) -> Row:
    """Each nibble of the selector picks one of the eight bytes of (b, a); its top bit asks for that byte's sign."""
    pool = np.stack((a, b), axis=1).view(np.uint8)  # [lanes, 8], a's low byte first
    nibbles = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)
    picked = np.take_along_axis(pool, (nibbles & 7).astype(np.intp), axis=1)
    if (nibbles & 8).any():
        picked = np.where(nibbles & 8, (picked >> 7) * np.uint8(255), picked)
    return picked.view(np.uint32)[:, 0]


@family("mov")
def _parts(parts: list[str]) -> Known | None:
    """``mov.b32 %r, {lo, hi}`` and back, in two or four parts: the first part is the lowest."""
    if len(parts) != 4:  # how many parts on the left, and on the right
        return None
    left, right, whole = int(parts[2]), int(parts[3]), f"u{parts[1][1:]}"
    each = dtype_of(whole).itemsize * 8 // max(left, right)
    if min(left, right) > 1 or each < 8:
        return None
    if left == 1:
        return known(f"{whole} = {f'u{each} ' * right}", lambda *row: np.stack(row, axis=1).view(dtype_of(whole))[:, 0])
    part = f"u{each // 8}"
    return known(f"{f'u{each} ' * left} = {whole}", lambda row: list(row.copy().view(part).reshape(-1, left).T))
