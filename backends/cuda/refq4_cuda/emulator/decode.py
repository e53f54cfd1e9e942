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
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from . import barriers, bits, convert, floating, functions, halves, integer, tensor  # noqa: F401  (they fill tables)
from .atomics import find_atomic
from .barriers import NUMBERED, is_plain
from .carry import CLOCKS, find_carry, read_clock
from .compare import complement
from .errors import UnknownInstructionError
from .flow import (
    block_ends,
    grain,
    is_branch,
    is_exit,
    read_registers,
    targets_of,
    watched,
    written_registers,
)
from .memory import unsigned
from .parse import Address, Instruction, Operand, Vector, parse
from .program import FLOAT, SIGNED, UNSIGNED, Program, Step, selection
from .semantics import Pure, dtype_of, find
from .slots import assign_slots, lay_out
from .transfer import find_transfer, split_or_join
from .warp import COMPANY, Company

if TYPE_CHECKING:
    from .batch import Batch

__all__ = ["Decoder", "prepare"]

_BANK = {"u": UNSIGNED, "s": SIGNED, "f": FLOAT, "p": UNSIGNED}
SPECIAL = (*(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"), "%laneid", "%warpid",
           "%nwarpid", *(f"%lanemask_{order}" for order in ("eq", "le", "lt", "ge", "gt")), "%dynamic_smem_size",
           "%total_smem_size")  # fmt: skip


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
        assign_slots(program, self._doubtful)
        self._constants: dict[tuple[int, int], int] = {}
        self.symbols = lay_out(program)

    def decode(self) -> None:
        """Every instruction, in order."""
        program = self.program
        program.ends = block_ends(self.kernel)
        program.grain = {space: grain(self.kernel, space) for space in ("global", "shared", "local")}
        program.watched = {program.names[name]: name for name in self._doubtful}
        for pc, instruction in enumerate(self.kernel.code):
            if is_branch(instruction) or is_exit(instruction):
                if is_branch(instruction):
                    program.targets[pc] = targets_of(self.kernel, instruction)
                    if instruction.opcode.startswith("brx"):
                        program.chosen_by[pc] = self.source(instruction.operands[0], "u32", instruction)[1]
                if instruction.guard:
                    program.guards[pc] = (program.names[instruction.guard], instruction.negated)
                program.steps.append(None)
                continue
            company = self._company(instruction)
            if company is None:
                step = self._watching(instruction, self._step(instruction))
                program.steps.append(self._guarded(instruction, step))
                continue
            program.gather[pc] = company.gather(self, instruction)
            program.steps.append(self._watching(instruction, company.decode(self, instruction)))
            if instruction.guard:  # the scheduler parts the lanes
                program.guards[pc] = (program.names[instruction.guard], instruction.negated)

    # --- operands ---------------------------------------------------------------------------------------------------

    def source(self, operand: Operand | str, type_name: str, instruction: Instruction) -> tuple[int, int, Any]:
        """Where to read: bank, slot, and the dtype to narrow to if the register is wider than the type (or None)."""
        name = str(operand)
        width = dtype_of(type_name).itemsize if type_name != "pred" else 0
        if re.fullmatch(r"-?\d+\.\d*(e[+-]?\d+)?", name):
            bits = np.array([float(name)], f"f{width}").view(unsigned[width])
            return _BANK[type_name[0]], self._constant(int(bits[0]), width), None
        slot = self._slot(name, width, instruction)
        narrow = None if self.program.slots[slot] == width else dtype_of(type_name)
        if narrow is not None and self.program.slots[slot] < width:
            raise self.unknown(instruction, f"{name} is narrower than {type_name}")
        return (_BANK[type_name[0]] if narrow is None else UNSIGNED), slot, narrow

    def target(self, operand: Operand | str, type_name: str, instruction: Instruction) -> tuple[int, int]:
        """Where to write: bank and slot. Into a wider register numpy extends by the bank's sign."""
        name = str(operand)
        if name not in self.program.names:
            raise self.unknown(instruction, f"{name} is not a register")
        return _BANK[type_name[0]], self.program.names[name]

    def predicate(self, operand: Operand | str, instruction: Instruction) -> Any:
        """How to read a predicate that may be negated (``!%p1``): a function of (batch, selection)."""
        name = str(operand)
        slot = self.source(name.removeprefix("!"), "pred", instruction)[1]
        if name.startswith("!"):
            return lambda m, s: ~m.rows[UNSIGNED][slot][s]
        return lambda m, s: m.rows[UNSIGNED][slot][s]

    def address(self, operand: Operand, instruction: Instruction) -> tuple[int, int, int]:
        """Slot and width of the base, and the offset."""
        if not isinstance(operand, Address):
            raise self.unknown(instruction, f"{operand} is not an address")
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
            f"{because}, in:  {instruction.text}\nAdd it where its family is (integer.py, bits.py, floating.py, "
            f"halves.py, convert.py, transfer.py, warp.py, tensor.py), with a test of its tricky values"
        )

    def _slot(self, name: str, width: int, instruction: Instruction) -> int:
        program = self.program
        if name in program.names:
            return program.names[name]
        if name in SPECIAL:
            program.names[name] = program.specials[name] = len(program.slots)
            program.slots.append(4)
            return program.names[name]
        if name == "WARP_SZ":
            return self._constant(32, width or 4)
        if name in self.symbols:
            return self._constant(self.symbols[name], width or 8)
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", name):
            return self._constant(int(name[2:], 16), width)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", name):
            return self._constant(self.integer(name) & ((1 << 8 * width) - 1 if width else 1), width)
        raise self.unknown(instruction, f"{name} is not a register, number or array that is known")

    def _constant(self, value: int, width: int) -> int:
        key = (value, width)
        if key not in self._constants:
            self._constants[key] = slot = len(self.program.slots)
            self.program.slots.append(width)
            self.program.constants[slot] = np.array([value], unsigned[width] if width else bool)
        return self._constants[key]

    # --- steps ------------------------------------------------------------------------------------------------------

    def _company(self, instruction: Instruction) -> Company | None:
        company = COMPANY.get(instruction.opcode)
        return NUMBERED if company is COMPANY["bar.sync"] and not is_plain(instruction) else company

    def _step(self, instruction: Instruction) -> Step:
        opcode = instruction.opcode
        if CLOCKS & {str(operand) for operand in instruction.operands}:
            return read_clock(self, instruction)
        if (made := find_transfer(opcode) or find_atomic(opcode) or find_carry(opcode)) is not None:
            return made(self, instruction)
        if opcode.startswith("mov.") and any(isinstance(o, Vector) for o in instruction.operands):
            return split_or_join(self, instruction)
        if (known := find(opcode)) is None:
            raise self.unknown(instruction)
        if opcode.startswith("setp.") and "|" in instruction.text:
            return self._two_predicates(instruction, known)
        return self._pure(instruction, known)

    def _two_predicates(self, instruction: Instruction, known: Pure) -> Step:
        """``setp ... p|q``: the comparison, and its complement."""
        first, second, *sources = instruction.operands
        other = complement(instruction.opcode)
        assert other is not None
        steps = [
            self._pure(replace(instruction, operands=(target, *sources)), one)
            for target, one in ((first, known), (second, other))
            if target != "_"
        ]

        def step(m: Batch, s: Any) -> None:
            for one in steps:
                one(m, s)

        return step

    def _pure(self, instruction: Instruction, known: Pure) -> Step:
        target, *sources = instruction.operands
        if len(sources) != len(known.sources):
            raise self.unknown(instruction, f"with {len(sources)} sources instead of {len(known.sources)}")
        if "!" in "".join(map(str, sources)):
            known, sources = _negating(known, sources)
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
                step(m, selection(m.lanes[s][holds]))

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


def _negating(known: Pure, sources: list[Operand]) -> tuple[Pure, list[Operand]]:
    """Some source is the negation of a predicate."""
    turned = [str(source).startswith("!") for source in sources]

    def function(*values: Any) -> Any:
        return known.function(*(~value if turn else value for value, turn in zip(values, turned, strict=True)))

    return known._replace(function=function), [str(source).removeprefix("!") for source in sources]


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
