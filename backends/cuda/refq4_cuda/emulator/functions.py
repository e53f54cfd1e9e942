"""Floating point beyond sums and products: fp64, directed rounding, division, roots, and what hardware approximates.

The ``.approx`` and ``.full`` forms are computed in fp64 and rounded once: at least as near to the truth as the hardware
is, whose error NVIDIA bounds (2 units in the last place for ex2, rcp, sqrt and rsqrt). Results agree within those
bounds, not in bits; their special values (infinities, NaN, signed zeros) are the hardware's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .floating import canonical, exact_fma_64, two_sum
from .semantics import pure

__all__ = ["nudged"]

Row = Any  # a numpy row, one element per lane
F32, F64 = np.float32, np.float64


# --- directed rounding ------------------------------------------------------------------------------------------------


def nudged(mode: str, nearest: Row, error: Row) -> Row:
    """The nearest number, moved to the neighbour that ``mode`` wants; ``error`` has the sign of exact - nearest."""
    down, up = error < 0, error > 0
    if mode == "rz":
        down, up = down & (nearest > 0), up & (nearest < 0)
    infinity = nearest.dtype.type(np.inf)
    if mode in ("rm", "rz"):
        nearest = np.where(down, np.nextafter(nearest, -infinity), nearest)
    if mode in ("rp", "rz"):
        nearest = np.where(up, np.nextafter(nearest, infinity), nearest)
    return nearest


def _sum_error(x: Row, y: Row, nearest: Row) -> Row:
    """The sign of x + y - nearest, for fp64 x and y and an fp32 number."""
    total, lost = two_sum(x, y)
    difference = total - nearest
    return np.where(difference != 0, difference, lost)


def _directed(mode: str) -> None:
    def add(a: Row, b: Row) -> Row:
        return canonical(nudged(mode, a + b, _sum_error(a.astype(F64), b.astype(F64), a + b)))

    def mul(a: Row, b: Row) -> Row:
        return canonical(nudged(mode, a * b, a.astype(F64) * b - (a * b)))

    def fma(a: Row, b: Row, c: Row) -> Row:
        product, wide = a.astype(F64) * b, c.astype(F64)
        nearest = (product + wide).astype(F32)
        return canonical(nudged(mode, nearest, _sum_error(product, wide, nearest)))

    def div(a: Row, b: Row) -> Row:
        nearest = a / b
        return canonical(nudged(mode, nearest, (a - nearest.astype(F64) * b) * np.sign(b)))

    def sqrt(a: Row) -> Row:
        nearest = np.sqrt(a)
        return canonical(nudged(mode, nearest, a - nearest.astype(F64) ** 2))

    pure(f"add.{mode}.f32", "f32 = f32 f32")(add)
    pure(f"sub.{mode}.f32", "f32 = f32 f32")(lambda a, b: add(a, -b))
    pure(f"mul.{mode}.f32", "f32 = f32 f32")(mul)
    pure(f"fma.{mode}.f32", "f32 = f32 f32 f32")(fma)
    pure(f"div.{mode}.f32", "f32 = f32 f32")(div)
    pure(f"rcp.{mode}.f32", "f32 = f32")(lambda a: div(np.ones_like(a), a))
    pure(f"sqrt.{mode}.f32", "f32 = f32")(sqrt)


for _mode in ("rz", "rm", "rp"):
    _directed(_mode)
pure("div.rn.f32", "f32 = f32 f32")(lambda a, b: canonical(a / b))
pure("sqrt.rn.f32", "f32 = f32")(lambda a: canonical(np.sqrt(a)))


# --- approximations ---------------------------------------------------------------------------------------------------


def _approximate(function: Callable[..., Row]) -> Callable[..., Row]:
    return lambda *values: canonical(function(*(v.astype(F64) for v in values)).astype(F32))


_FUNCTIONS: dict[str, Callable[[Row], Row]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
}
for _name, _function in _FUNCTIONS.items():
    pure(f"{_name}.approx.f32", "f32 = f32")(_approximate(_function))
for _form in ("approx", "full"):
    pure(f"div.{_form}.f32", "f32 = f32 f32")(_approximate(np.divide))
pure("rcp.approx.ftz.f64", "f64 = f64")(lambda a: 1 / a)
pure("rsqrt.approx.f64", "f64 = f64")(lambda a: 1 / np.sqrt(a))
pure("rsqrt.approx.ftz.f64", "f64 = f64")(lambda a: 1 / np.sqrt(a))


# --- fp64 -------------------------------------------------------------------------------------------------------------

for _rounding in ("", ".rn"):
    pure(f"add{_rounding}.f64", "f64 = f64 f64")(np.add)
    pure(f"sub{_rounding}.f64", "f64 = f64 f64")(np.subtract)
    pure(f"mul{_rounding}.f64", "f64 = f64 f64")(np.multiply)
pure("div.rn.f64", "f64 = f64 f64")(np.divide)
pure("rcp.rn.f64", "f64 = f64")(lambda a: 1 / a)
pure("sqrt.rn.f64", "f64 = f64")(np.sqrt)
pure("fma.rn.f64", "f64 = f64 f64 f64")(exact_fma_64)
pure("min.f64", "f64 = f64 f64")(np.fmin)
pure("max.f64", "f64 = f64 f64")(np.fmax)
pure("abs.f64", "f64 = f64")(np.abs)
pure("neg.f64", "f64 = f64")(np.negative)

for _kind in ("f32", "f64"):
    pure(f"copysign.{_kind}", f"{_kind} = {_kind} {_kind}")(lambda sign, value: np.copysign(value, sign))
    pure(f"testp.finite.{_kind}", f"pred = {_kind}")(np.isfinite)
    pure(f"testp.infinite.{_kind}", f"pred = {_kind}")(np.isinf)
    pure(f"testp.notanumber.{_kind}", f"pred = {_kind}")(np.isnan)
    pure(f"testp.number.{_kind}", f"pred = {_kind}")(lambda a: ~np.isnan(a))
    pure(f"testp.subnormal.{_kind}", f"pred = {_kind}")(lambda a: (a != 0) & (np.abs(a) < np.finfo(a.dtype).tiny))
    pure(f"testp.normal.{_kind}", f"pred = {_kind}")(lambda a: np.isfinite(a) & (np.abs(a) >= np.finfo(a.dtype).tiny))
for _name, _pick in (("min", np.minimum), ("max", np.maximum)):
    pure(f"{_name}.NaN.f32", "f32 = f32 f32")(lambda a, b, pick=_pick: canonical(pick(a, b)))
