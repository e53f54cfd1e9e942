"""Addresses: base and offset, and the generic ones, which say by their size which memory they mean.

    0 ...                global memory: the addresses of the CPU's own tensors
    SHARED_WINDOW ...    the block's shared memory
    LOCAL_WINDOW ...     the thread's local memory

``cvta.shared`` makes a generic address of a shared one, ``cvta.to.shared`` goes back, ``isspacep`` asks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .parse import Instruction
from .program import UNSIGNED, Step

if TYPE_CHECKING:
    from .batch import Batch
    from .decode import Decoder

__all__ = ["ADDRESSES", "LOCAL_WINDOW", "SHARED_WINDOW", "Made", "address_of", "windows"]

SHARED_WINDOW, LOCAL_WINDOW = 1 << 61, 1 << 62  # no tensor's address is that large
Made = Callable[["Decoder", Instruction], Step]
ADDRESSES: dict[str, Made] = {}


def address_of(m: Batch, s: Any, slot: int, width: int, offset: int) -> np.ndarray:
    """The address of each lane as a uint64; a 32-bit base wraps in 32 bits."""
    base = m.rows[UNSIGNED][slot][s]
    if offset:
        base = base + base.dtype.type(offset & ((1 << 8 * width) - 1))
    address: np.ndarray = base.astype(np.uint64, copy=False)
    return address


def windows(m: Batch, s: Any, address: np.ndarray) -> list[tuple[str, Any, np.ndarray, Any]]:
    """Generic addresses by memory: (space, selection, address within it, which of the lanes)."""
    if int(address.max()) < SHARED_WINDOW:
        return [("global", s, address, slice(None))]
    parts = []
    for space, low, high in (("global", 0, SHARED_WINDOW), ("shared", SHARED_WINDOW, LOCAL_WINDOW),
                             ("local", LOCAL_WINDOW, 1 << 64)):  # fmt: skip
        here = (address >= np.uint64(low)) & (address <= np.uint64(high - 1))
        if here.any():
            parts.append((space, m.selection(m.lanes[s][here]), address[here] - np.uint64(low), here))
    return parts


_WINDOWS = {"shared": SHARED_WINDOW, "shared::cta": SHARED_WINDOW, "local": LOCAL_WINDOW, "global": 0, "const": 0}


def _convert_address(to_generic: bool, window: int, bits: int) -> Made:
    def decode(decoder: Decoder, instruction: Instruction) -> Step:
        slot = decoder.target(instruction.operands[0], f"u{bits}", instruction)[1]
        _, source, _ = decoder.source(instruction.operands[1], f"u{bits}", instruction)
        by = np.uint64(window if to_generic else -window & (1 << 64) - 1)

        def step(m: Batch, s: Any) -> None:
            m.rows[UNSIGNED][slot][s] = m.rows[UNSIGNED][source][s] + by

        return step

    return decode


def _is_in(low: int, high: int) -> Made:
    def decode(decoder: Decoder, instruction: Instruction) -> Step:
        slot = decoder.target(instruction.operands[0], "pred", instruction)[1]
        _, source, _ = decoder.source(instruction.operands[1], "u64", instruction)

        def step(m: Batch, s: Any) -> None:
            address = m.rows[UNSIGNED][source][s]
            m.rows[UNSIGNED][slot][s] = (address >= np.uint64(low)) & (address <= np.uint64(high - 1))

        return step

    return decode


for _space, _window in _WINDOWS.items():
    ADDRESSES[f"cvta.{_space}.u64"] = _convert_address(True, _window, 64)
    if _window:
        ADDRESSES[f"cvta.to.{_space}.u64"] = _convert_address(False, _window, 64)
ADDRESSES["isspacep.shared"] = ADDRESSES["isspacep.shared::cta"] = _is_in(SHARED_WINDOW, LOCAL_WINDOW)
ADDRESSES["isspacep.local"] = _is_in(LOCAL_WINDOW, 1 << 64)
ADDRESSES["isspacep.global"] = _is_in(0, SHARED_WINDOW)
