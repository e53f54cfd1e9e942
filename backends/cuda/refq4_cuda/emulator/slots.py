"""Where everything of a kernel lies: a slot for each register, a place for each array.

Registers whose values are not needed at the same time share a slot. Shared arrays have places in the block's memory,
local ones in the thread's; the module's own arrays have memory of their own, as long as the program lives.
"""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np

from .flow import is_branch, read_registers, targets_of, written_registers
from .module import laid_out, width_of
from .parse import Kernel
from .program import Program

__all__ = ["assign_slots", "lay_out"]


def lay_out(program: Program) -> dict[str, int]:
    """The place or address of every name that an instruction may use as a number."""
    kernel = program.kernel
    # static arrays first, in order of declaration; the dynamic one behind them, at its own alignment
    shared, program.static_shared = laid_out(sorted(kernel.shared.values(), key=lambda variable: variable.size is None))
    local, program.local = laid_out(kernel.local.values())
    places = {name: variable.at for name, variable in (shared | kernel.parameters | local).items()}
    return places | _make_arrays(program)


def assign_slots(program: Program, doubtful: set[str]) -> None:
    """One slot for registers of one width that are never needed at the same time; a watched one has its own.

    What an instruction reads and what it writes overlap at that instruction, so they never share.
    """
    ranges = _needed(program.kernel)
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


def _needed(kernel: Kernel) -> dict[str, tuple[int, int]]:
    """The first and the last instruction between which a register's value matters, if it is written before it is read.

    Those are the first and the last that name it, and any later one that jumps back between the two. Where a jump leads
    past the first, or the first one reads, the value may come from anywhere.
    """
    ranges: dict[str, tuple[int, int]] = {}
    jumps = []
    for pc, one in enumerate(kernel.code):
        read = read_registers(one)
        for name in (*read, *written_registers(one)):
            if name in kernel.registers:
                ranges[name] = ranges.get(name, (0 if name in read else pc, pc))[0], pc
        jumps += [(pc, target) for target in targets_of(kernel, one)] if is_branch(one) else []
    over = np.full(len(kernel.code), len(kernel.code))  # of each instruction, the nearest target of jumps past it
    for pc, target in jumps:
        over[pc + 1 : target] = np.minimum(over[pc + 1 : target], target)
    for name, (first, last) in ranges.items():
        for pc, target in jumps:
            if pc > last and first <= target <= last:
                last = pc
        ranges[name] = (0, len(kernel.code)) if over[first] <= last else (first, last)
    return ranges


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
