"""Instructions that the threads of a warp execute together: shuffles, votes, matches, reductions.

    bar.warp.sync, shfl, vote, match, redux, elect     the lanes named in the mask that have not returned
    mma, ldmatrix                                      all 32 lanes of the warp           (tensor.py)

``whole_warp`` and ``named_lanes`` say which groups of lanes are complete: all participating lanes have arrived. The
scheduler lets the others wait at the instruction. A lane that waits to the end for lanes that never arrive is a
divergence, and an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ConvergenceError, Fault
from .order import WARP
from .semantics import Row, on_lanes

if TYPE_CHECKING:
    from .batch import Batch

__all__ = ["named_lanes", "whole_warp"]

# --- who must be there ------------------------------------------------------------------------------------------------


def whole_warp(m: Batch, s: Any, readers: list[Any]) -> np.ndarray | None:
    """All lanes of the warp."""
    return None if _is_warps(s) else _are_there(m, s, np.uint64(0xFFFFFFFF))


def named_lanes(m: Batch, s: Any, readers: list[Any]) -> np.ndarray | None:
    """The lanes in the mask, which is the last source."""
    mask, lanes = readers[-1](m, s), m.lanes[s]
    left_out = mask >> (lanes % WARP).astype(np.uint32) & 1 == 0
    if left_out.any():
        raise Fault(
            ConvergenceError,
            lanes[left_out],
            f"synchronises under the mask {int(mask[left_out][0]):#010x}, which leaves it out",
            "look at the mask: it must name every lane that gets here",
        )
    if _is_warps(s):
        return None
    running = np.bincount(m.warp[m.live], 2.0 ** (m.lanes[m.live] % WARP), m.count // WARP).astype(np.uint64)
    return _are_there(m, s, mask & running[m.warp[s]])


def _is_warps(s: Any) -> bool:
    """Whether a selection is made of whole warps: lanes are sorted, so 32 of them 31 apart follow one another."""
    if isinstance(s, slice):
        return bool(s.start % WARP == 0 and s.stop % WARP == 0)
    if len(s) % WARP:
        return False
    first, last = s[::WARP], s[WARP - 1 :: WARP]
    return not bool((first % WARP).any()) and bool((last - first == WARP - 1).all())


def _are_there(m: Batch, s: Any, mask: Any) -> np.ndarray | None:
    complete: np.ndarray = mask & ~_bits_of(m, s, 1).astype(np.uint64) == 0
    return None if complete.all() else complete


def _bits_of(m: Batch, s: Any, holds: Any) -> Row:
    """For each lane, the bits of the lanes of its warp that take part and for which ``holds``."""
    warp = m.warp[s]
    return np.bincount(warp, holds * 2.0 ** (m.lanes[s] % WARP), m.count // WARP)[warp].astype(np.uint32)


# --- what they do -----------------------------------------------------------------------------------------------------

on_lanes("bar.warp.sync", " = u32", named_lanes)(lambda m, s, mask: m.order.warp_sync(s))

_SOURCE_LANE: dict[str, Callable[..., Any]] = {
    "bfly": np.bitwise_xor,
    "down": np.add,
    "up": np.subtract,
    "idx": lambda lane, by: by & (WARP - 1),
}


def _shuffle(mode: str) -> Callable[..., Any]:
    def function(m: Batch, s: Any, values: Row, by: Row, clamp: Row, mask: Row) -> tuple[Row, Row]:
        lanes = m.lanes[s]
        lane = lanes % WARP
        # The clamp operand packs two fields: in bits 8..12 the lanes' segment, in bits 0..4 its end.
        packed = clamp.astype(np.int64)
        segment, end = packed >> 8 & 31, packed & 31
        wanted = _SOURCE_LANE[mode](lane, by.astype(np.int64) & 31)
        lowest, highest = lane & segment, (lane & segment) | (end & ~segment)
        if mode == "idx":
            wanted = lowest | (wanted & ~segment)
        inside = wanted >= highest if mode == "up" else wanted <= highest
        origin = np.where(inside, lanes - lane + wanted, lanes)
        place = np.full(m.count, -1)  # of each lane among those that take part
        place[s] = np.arange(len(lanes))
        absent = place[origin] < 0
        if absent.any():
            raise Fault(
                ConvergenceError,
                lanes[absent],
                f"asks lane {int(origin[absent][0]) % WARP} for its value, which takes no part",
                "look at the mask, and at which lanes got here",
            )
        return values[place[origin]], inside

    return function


for _mode in _SOURCE_LANE:
    on_lanes(f"shfl.sync.{_mode}.b32", "u32 pred? = u32 u32 u32 u32", named_lanes)(_shuffle(_mode))


@on_lanes("vote.sync.ballot.b32", "u32 = pred u32", named_lanes)
def _ballot(m: Batch, s: Any, holds: Row, mask: Row) -> Row:
    return _bits_of(m, s, holds)


for _mode, _answer in {
    "any": lambda yes, no: yes != 0,
    "all": lambda yes, no: no == 0,
    "uni": lambda yes, no: (yes == 0) | (no == 0),
}.items():
    on_lanes(f"vote.sync.{_mode}.pred", "pred = pred u32", named_lanes)(
        lambda m, s, holds, mask, answer=_answer: answer(_bits_of(m, s, holds), _bits_of(m, s, ~holds))
    )


def _match(m: Batch, s: Any, values: Row, mask: Row) -> Row:
    """For each lane, the bits of the lanes of its warp with the same value."""
    pairs = np.stack((m.warp[s].astype(np.uint64), values.astype(np.uint64)))
    group = np.unique(pairs, axis=1, return_inverse=True)[1].reshape(-1)
    return np.bincount(group, 2.0 ** (m.lanes[s] % WARP)).astype(np.uint32)[group]


def _match_all(m: Batch, s: Any, values: Row, mask: Row) -> tuple[Row, Row]:
    equal = _match(m, s, values, mask)
    agree = equal == _bits_of(m, s, 1)
    return np.where(agree, equal, np.uint32(0)), agree


for _bits in ("32", "64"):
    on_lanes(f"match.any.sync.b{_bits}", f"u32 = u{_bits} u32", named_lanes)(_match)
    on_lanes(f"match.all.sync.b{_bits}", f"u32 pred? = u{_bits} u32", named_lanes)(_match_all)


def _reduce(operation: np.ufunc) -> Callable[..., Row]:
    """``redux.sync``: one number of a warp, for all its lanes that take part."""

    def function(m: Batch, s: Any, values: Row, mask: Row) -> Row:
        starts, counts = np.unique(m.warp[s], return_index=True, return_counts=True)[1:]
        return np.repeat(operation.reduceat(values, starts), counts)

    return function


for _opcode, _operation in {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}.items():  # fmt: skip
    for _kind in ("u32", "s32") if _opcode in ("add", "min", "max") else ("b32",):
        _type = _kind.replace("b", "u")
        on_lanes(f"redux.sync.{_opcode}.{_kind}", f"{_type} = {_type} u32", named_lanes)(_reduce(_operation))


@on_lanes("activemask.b32", "u32 =", lambda *ignored: None)
def _active(m: Batch, s: Any) -> Row:
    return _bits_of(m, s, 1)


@on_lanes("elect.sync", "u32 pred = u32", named_lanes)
def _elect(m: Batch, s: Any, mask: Row) -> tuple[Row, Row]:
    """The lowest lane that takes part."""
    there = _bits_of(m, s, 1).astype(np.int64)
    lowest = np.log2(there & -there).astype(np.uint32)
    return lowest, m.lanes[s] % WARP == lowest
