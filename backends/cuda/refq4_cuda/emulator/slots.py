"""Where everything of a kernel lies: a slot for each register, a place for each array.

Registers whose values are not needed at the same time share a slot. Shared arrays have places in the block's memory,
local ones in the thread's; the module's own arrays have memory of their own, as long as the program lives.
"""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np

from .flow import live_ranges
from .parse import width_of
from .program import Program

__all__ = ["assign_slots", "lay_out"]


def lay_out(program: Program) -> dict[str, int]:
    """The place or address of every name that an instruction may use as a number."""
    parameters = {name: parameter.offset for name, parameter in program.kernel.parameters.items()}
    return _lay_out_shared(program) | parameters | _lay_out_local(program) | _make_arrays(program)


def assign_slots(program: Program, doubtful: set[str]) -> None:
    """One slot for registers of one width that are never needed at the same time; a watched one has its own.

    What an instruction reads and what it writes overlap at that instruction, so they never share.
    """
    ranges = live_ranges(program.kernel)
    free: dict[int, list[int]] = {}
    used: list[tuple[int, int]] = []  # (last instruction, slot), a heap
    for name, (first, last) in sorted(ranges.items(), key=lambda item: item[1]):
        while used and used[0][0] < first:
            slot = heappop(used)[1]
            free.setdefault(program.slots[slot], []).append(slot)
        width = width_of(program.kernel.registers[name])
        shares = name not in doubtful
        if shares and free.get(width):
            slot = free[width].pop()
        else:
            slot = len(program.slots)
            program.slots.append(width)
        program.names[name] = slot
        if shares:
            heappush(used, (last, slot))


def _lay_out_shared(program: Program) -> dict[str, int]:
    """Static arrays first, in order of declaration; the dynamic one behind them, at its own alignment."""
    end, places = 0, {}
    for name, (size, align) in sorted(program.kernel.shared.items(), key=lambda item: item[1].size is None):
        end = -(-end // align) * align
        places[name] = end
        end += size or 0
    program.static_shared = end
    return places


def _lay_out_local(program: Program) -> dict[str, int]:
    places = {}
    for name, (size, align) in program.kernel.local.items():
        places[name] = start = -(-program.local // max(align, 1)) * max(align, 1)
        program.local = start + (size or 0)
    return places


def _make_arrays(program: Program) -> dict[str, int]:
    """Memory for the module's arrays that the kernel, or another array, names; its address does not change."""
    variables, places = program.kernel.variables, {}
    for name, variable in variables.items():
        room = np.zeros(len(variable.initial) + 256, np.uint8)
        start = -room.ctypes.data % 256
        program.arrays[name] = (room[start : start + len(variable.initial)], variable.initial)
        places[name] = room.ctypes.data + start
    for name, variable in variables.items():
        data = bytearray(variable.initial)
        for offset, other, addend in variable.references:
            if other in places:
                data[offset : offset + 8] = (places[other] + addend).to_bytes(8, "little")
        program.arrays[name] = (program.arrays[name][0], bytes(data))
    return places
