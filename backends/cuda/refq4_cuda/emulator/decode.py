"""A kernel made ready to run: every instruction becomes a Python function of (batch, selection of lanes).

    registers, constants, %tid.x, ...   each gets a *slot*: a row with one element per lane
    "add.s32 %r3, %r1, 7"         -->   step(m, s):  m.rows[S][3][s] = np.add(m.rows[S][1][s], m.rows[S][40][s])

A row can be read as unsigned, signed or floating point: three views of the same memory. Constants are rows with one
element that numpy repeats. Registers whose values are not needed at the same time share a slot, as in a machine: a
kernel's thousand registers fit into a hundred rows, which stay in the processor's cache. All this is worked out once
per PTX text; running looks nothing up by name.
"""

from __future__ import annotations

import re
from functools import lru_cache
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

import numpy as np

from . import floating, integer  # noqa: F401  (they fill the table of pure instructions)
from .errors import UnknownInstructionError
from .flow import (
    block_ends,
    is_branch,
    is_exit,
    live_ranges,
    read_registers,
    smallest_shared_access,
    watched,
    written_registers,
)
from .memory import unsigned
from .parse import Address, Instruction, Operand, Vector, parse, width_of
from .program import FLOAT, SIGNED, UNSIGNED, Program, Step
from .semantics import PURE, Pure, dtype_of
from .transfer import TRANSFER, split_or_join
from .warp import COMPANY

if TYPE_CHECKING:
    from .batch import Batch

__all__ = ["Decoder", "prepare"]

_BANK = {"u": UNSIGNED, "s": SIGNED, "f": FLOAT, "p": UNSIGNED}
SPECIAL = (*(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"), "%laneid")


@lru_cache(maxsize=256)
def prepare(text: str, entry: str) -> Program:
    """The program of a kernel, made once per text.

    Raises:
        UnknownInstructionError: the kernel uses an instruction that is not in the tables.
    """
    program = Program(parse(text, entry))
    Decoder(program).decode()
    return program


class Decoder:
    """Fills in a :class:`Program`. Instructions that are not pure have their own tables, in the files named there."""

    def __init__(self, program: Program) -> None:
        self.program, self.kernel = program, program.kernel
        self._doubtful = watched(self.kernel)
        self._assign_slots()
        self._constants: dict[tuple[int, int], int] = {}
        self.symbols = self._lay_out_shared() | {n: p.offset for n, p in self.kernel.parameters.items()}

    def decode(self) -> None:
        """Every instruction, in order."""
        program = self.program
        program.ends = block_ends(self.kernel)
        program.grain = smallest_shared_access(self.kernel)
        program.watched = {program.names[name]: name for name in self._doubtful}
        for pc, instruction in enumerate(self.kernel.code):
            if is_branch(instruction) or is_exit(instruction):
                if is_branch(instruction):
                    program.targets[pc] = self.kernel.labels[str(instruction.operands[0])]
                if instruction.guard:
                    program.guards[pc] = (program.names[instruction.guard], instruction.negated)
                program.steps.append(None)
                continue
            step = self._step(instruction, TRANSFER | COMPANY)
            if instruction.opcode in COMPANY:
                program.gather[pc] = COMPANY[instruction.opcode].gather(self, instruction)
                if instruction.guard:
                    raise self.unknown(instruction, "a predicate on an instruction that needs the whole warp")
            step = self._watching(instruction, step)
            program.steps.append(self._guarded(instruction, step))

    # --- operands ---------------------------------------------------------------------------------------------------

    def source(self, operand: Operand | str, type_name: str, instruction: Instruction) -> tuple[int, int, Any]:
        """Where to read: bank, slot, and the dtype to narrow to if the register is wider than the type (or None)."""
        name = str(operand)
        width = dtype_of(type_name).itemsize if type_name != "pred" else 0
        slot = self._slot(name, width, instruction)
        narrow = None if self.program.slots[slot] == width else dtype_of(type_name)
        if narrow is not None and self.program.slots[slot] < width:
            raise self.unknown(instruction, f"{name} is narrower than {type_name}")
        return (_BANK[type_name[0]] if narrow is None else UNSIGNED), slot, narrow

    def target(self, operand: Operand | str, type_name: str, instruction: Instruction) -> tuple[int, int]:
        """Where to write: bank and slot. Into a wider register numpy extends by the bank's sign."""
        name = str(operand)
        if name not in self.program.names:
            raise self.unknown(instruction, f"{name} is no register")
        return _BANK[type_name[0]], self.program.names[name]

    def address(self, operand: Operand, instruction: Instruction) -> tuple[int, int, int]:
        """Slot and width of the base, and the offset."""
        if not isinstance(operand, Address):
            raise self.unknown(instruction, f"{operand} is no address")
        slot = self._slot(operand.base, 8, instruction)
        return slot, self.program.slots[slot], operand.offset

    def integer(self, operand: Operand | str) -> int:
        """An operand that must be written as a number."""
        return int(str(operand).rstrip("U"), 0)

    def unknown(self, instruction: Instruction, why: str = "") -> UnknownInstructionError:
        """The error for what is not in the tables."""
        because = f" ({why})" if why else ""
        return UnknownInstructionError(
            f"kernel {self.kernel.name}, PTX line {instruction.line}: the emulator does not know {instruction.opcode!r}"
            f"{because}, in:  {instruction.text}\nIt knows the instructions that refq4's kernels use; add this one "
            f"where its family is (integer.py, floating.py, transfer.py, warp.py), with a test of its tricky values"
        )

    def _slot(self, name: str, width: int, instruction: Instruction) -> int:
        program = self.program
        if name in program.names:
            return program.names[name]
        if name in SPECIAL:
            program.names[name] = program.specials[name] = len(program.slots)
            program.slots.append(4)
            return program.names[name]
        if name in self.symbols:
            return self._constant(self.symbols[name], width or 8)
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", name):
            return self._constant(int(name[2:], 16), width)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", name):
            return self._constant(self.integer(name) & ((1 << 8 * width) - 1 if width else 1), width)
        raise self.unknown(instruction, f"{name} is no register, number or shared array")

    def _constant(self, value: int, width: int) -> int:
        key = (value, width)
        if key not in self._constants:
            self._constants[key] = slot = len(self.program.slots)
            self.program.slots.append(width)
            self.program.constants[slot] = np.array([value], unsigned[width] if width else bool)
        return self._constants[key]

    def _assign_slots(self) -> None:
        """One slot for registers of one width that are never needed at the same time; a watched one has its own.

        What an instruction reads and what it writes overlap at that instruction, so they never share.
        """
        ranges = live_ranges(self.kernel)
        free: dict[int, list[int]] = {}
        used: list[tuple[int, int]] = []  # (last instruction, slot), a heap
        for name, (first, last) in sorted(ranges.items(), key=lambda item: item[1]):
            while used and used[0][0] < first:
                slot = heappop(used)[1]
                free.setdefault(self.program.slots[slot], []).append(slot)
            width = width_of(self.kernel.registers[name])
            shares = name not in self._doubtful
            if shares and free.get(width):
                slot = free[width].pop()
            else:
                slot = len(self.program.slots)
                self.program.slots.append(width)
            self.program.names[name] = slot
            if shares:
                heappush(used, (last, slot))

    def _lay_out_shared(self) -> dict[str, int]:
        """Static arrays first, in order of declaration; the dynamic one behind them, at its own alignment."""
        end, places = 0, {}
        for name, (size, align) in sorted(self.kernel.shared.items(), key=lambda item: item[1].size is None):
            end = -(-end // align) * align
            places[name] = end
            end += size or 0
        self.program.static_shared = end
        return places

    # --- steps ------------------------------------------------------------------------------------------------------

    def _step(self, instruction: Instruction, special: dict[str, Any]) -> Step:
        opcode = instruction.opcode
        if opcode in special:
            made: Step = special[opcode].decode(self, instruction)
            return made
        if opcode.startswith("mov.") and any(isinstance(o, Vector) for o in instruction.operands):
            return split_or_join(self, instruction)
        if opcode not in PURE:
            raise self.unknown(instruction)
        return self._pure(instruction, PURE[opcode])

    def _pure(self, instruction: Instruction, known: Pure) -> Step:
        target, *sources = instruction.operands
        if len(sources) != len(known.sources):
            raise self.unknown(instruction, f"with {len(sources)} sources instead of {len(known.sources)}")
        bank, slot = self.target(target, known.result, instruction)
        reads = [self.source(operand, kind, instruction) for operand, kind in zip(sources, known.sources, strict=True)]
        function = known.function
        if any(narrow is not None for _, _, narrow in reads):
            return _narrowing(function, bank, slot, reads)
        if len(reads) == 1:
            return _unary(function, bank, slot, *reads[0][:2])
        if len(reads) == 2:
            return _binary(function, bank, slot, *reads[0][:2], *reads[1][:2])
        places = [read[:2] for read in reads]

        def step(m: Batch, s: Any) -> None:
            rows = m.rows
            rows[bank][slot][s] = function(*[rows[b][i][s] for b, i in places])

        return step

    def _guarded(self, instruction: Instruction, step: Step) -> Step:
        """``@%p``: only the lanes whose predicate holds."""
        if instruction.guard is None:
            return step
        slot, negated = self.program.names[instruction.guard], instruction.negated
        doubtful = slot in self.program.watched

        def guarded(m: Batch, s: Any) -> None:
            if doubtful:
                m.require_written(slot, s)
            holds = m.rows[UNSIGNED][slot][s]
            if negated:
                holds = ~holds
            count = np.count_nonzero(holds)
            if count == len(holds):
                step(m, s)
            elif count:
                step(m, m.selection(m.lanes[s][holds]))

        return guarded

    def _watching(self, instruction: Instruction, step: Step) -> Step:
        """Check before and note after, for the registers that need it."""
        names, doubtful = self.program.names, self._doubtful
        reads = [names[name] for name in read_registers(instruction) if name in doubtful and name != instruction.guard]
        writes = [names[name] for name in written_registers(instruction) if name in doubtful]
        if not reads and not writes:
            return step

        def watching(m: Batch, s: Any) -> None:
            for slot in reads:
                m.require_written(slot, s)
            step(m, s)
            for slot in writes:
                m.written[slot][s] = True

        return watching


def _unary(function: Any, bank: int, slot: int, bank_a: int, a: int) -> Step:
    def step(m: Batch, s: Any) -> None:
        rows = m.rows
        rows[bank][slot][s] = function(rows[bank_a][a][s])

    return step


def _binary(function: Any, bank: int, slot: int, bank_a: int, a: int, bank_b: int, b: int) -> Step:
    def step(m: Batch, s: Any) -> None:
        rows = m.rows
        rows[bank][slot][s] = function(rows[bank_a][a][s], rows[bank_b][b][s])

    def in_place(m: Batch, s: Any) -> None:
        rows = m.rows
        if type(s) is slice:
            function(rows[bank_a][a][s], rows[bank_b][b][s], out=rows[bank][slot][s])
        else:
            rows[bank][slot][s] = function(rows[bank_a][a][s], rows[bank_b][b][s])

    return in_place if isinstance(function, np.ufunc) else step  # a ufunc needs no room of its own for the result


def _narrowing(function: Any, bank: int, slot: int, reads: list[tuple[int, int, Any]]) -> Step:
    """Some source is the low part of a wider register."""

    def step(m: Batch, s: Any) -> None:
        rows = m.rows
        values = (rows[b][i][s] if n is None else rows[b][i][s].astype(n) for b, i, n in reads)
        rows[bank][slot][s] = function(*values)

    return step
