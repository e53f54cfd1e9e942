"""Addresses: base and offset, and the generic ones, which say by their size which memory they mean.

    0 ...                global memory: the addresses of the CPU's own tensors
    SHARED_WINDOW ...    the block's shared memory
    LOCAL_WINDOW ...     the thread's local memory

``cvta.shared`` makes a generic address of a shared one, ``cvta.to.shared`` goes back, ``isspacep`` asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .memory import Memory, unsigned
from .parse import Instruction
from .program import UNSIGNED, Step, selection

if TYPE_CHECKING:
    from .batch import Batch
    from .decode import Decoder

__all__ = ["ADDRESSES", "Generic", "LOCAL_WINDOW", "SHARED_WINDOW", "Made", "address_of"]

SHARED_WINDOW, LOCAL_WINDOW = 1 << 61, 1 << 62  # no tensor's address is that large
WINDOWS = {"global": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW}
Made = Callable[["Decoder", Instruction], Step]
ADDRESSES: dict[str, Made] = {}


def address_of(m: Batch, s: Any, slot: int, width: int, offset: int) -> np.ndarray:
    """The address of each lane as an int64; a 32-bit base wraps in 32 bits."""
    base = m.rows[UNSIGNED][slot][s]
    if offset:
        base = base + base.dtype.type(offset & ((1 << 8 * width) - 1))
    address: np.ndarray = base.view(np.int64) if width == 8 else base.astype(np.int64)
    return address


class Generic:
    """Addresses that say by their size which memory they mean."""

    def __init__(self, **memories: Memory) -> None:
        self.memories = memories

    def read(self, address: np.ndarray, s: Any, element: int, count: int, strong: bool = False) -> np.ndarray:
        """As ``Memory.read``."""
        result = np.empty((len(address), count) if count > 1 else len(address), unsigned[element])
        for memory, inside, some, at in self._split(address, s):
            result[at] = memory.read(inside, some, element, count, strong)
        return result

    def write(self, address: np.ndarray, s: Any, values: np.ndarray, strong: bool = False) -> None:
        """As ``Memory.write``."""
        for memory, inside, some, at in self._split(address, s):
            memory.write(inside, some, values[at], strong)

    def update(self, address: np.ndarray, s: Any, size: int, function: Callable[..., Any], *rows: Any) -> np.ndarray:
        """As ``Memory.update``."""
        found = np.empty(len(address), unsigned[size])
        for memory, inside, some, at in self._split(address, s):
            found[at] = memory.update(inside, some, size, function, *(row[at] for row in rows))
        return found

    def _split(self, address: np.ndarray, s: Any) -> Iterator[tuple[Memory, np.ndarray, Any, Any]]:
        """Memory, addresses within it, selection, and which of the lanes."""
        lanes = self.memories["shared"].order.lanes[s]
        starts = np.searchsorted([SHARED_WINDOW, LOCAL_WINDOW], address, "right")
        for k, (space, window) in enumerate(WINDOWS.items()):
            if (here := starts == k).any():
                yield self.memories[space], address[here] - window, selection(lanes[here]), here


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


for _space, _window in (WINDOWS | {"shared::cta": SHARED_WINDOW, "const": 0}).items():
    ADDRESSES[f"cvta.{_space}.u64"] = _convert_address(True, _window, 64)
    if _window:
        ADDRESSES[f"cvta.to.{_space}.u64"] = _convert_address(False, _window, 64)
ADDRESSES["isspacep.shared"] = ADDRESSES["isspacep.shared::cta"] = _is_in(SHARED_WINDOW, LOCAL_WINDOW)
ADDRESSES["isspacep.local"] = _is_in(LOCAL_WINDOW, 1 << 64)
ADDRESSES["isspacep.global"] = _is_in(0, SHARED_WINDOW)
