"""A kernel made ready to run: every instruction becomes a Python function of (batch, selection of lanes).

    registers, constants, %tid.x, ...   each gets a *slot*: a row with one element per lane
    "add.s32 %r3, %r1, 7"         -->   step(m, s):  m.rows[S][3][s] = np.add(m.rows[S][1][s], m.rows[S][40][s])

A row can be read as unsigned, signed or floating point: three views of the same memory. Constants are rows with one
element that numpy repeats. Registers whose values are not needed at the same time share a slot, as in a machine: a
kernel's thousand registers fit into a hundred rows, which stay in the processor's cache. All this is worked out once
per PTX text; running looks nothing up by name.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from . import barriers, compare, floating, integer, tensor, transfer, warp  # noqa: F401  (they fill the table)
from .errors import UnknownInstructionError
from .flow import block_ends, grain, is_branch, is_exit, read_registers, targets_of, watched, written_registers
from .memory import unsigned
from .module import bits_of
from .parse import Address, Instruction, parse
from .program import FLOAT, SIGNED, UNSIGNED, Program, Step, selection
from .semantics import dtype_of, find, results_of
from .slots import assign_slots, lay_out

if TYPE_CHECKING:
    from .batch import Batch

__all__ = ["prepare"]

_BANK = {"u": UNSIGNED, "s": SIGNED, "f": FLOAT, "p": UNSIGNED}
SPECIAL = (*(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"), "%laneid", "%warpid",
           "%nwarpid", *(f"%lanemask_{order}" for order in ("eq", "le", "lt", "ge", "gt")), "%dynamic_smem_size",
           "%total_smem_size")  # fmt: skip
CLOCKS = {"%clock", "%clock64", "%clock_hi", "%globaltimer", "%globaltimer_lo"}


@lru_cache(maxsize=256)
def prepare(text: str, entry: str) -> Program:
    """The program of a kernel, made once per text.

    Raises:
        UnknownInstructionError: the kernel uses an instruction that is not in the tables.
    """
    program = Program(parse(text, entry))
    _Decoder(program).decode()
    return program


class _Decoder:
    """Fills in a :class:`Program`."""

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
                        program.chosen_by[pc] = self._source(str(instruction.operands[0]), "u32", instruction)[1]
                step = None
            else:
                step = self._watching(instruction, self._step(pc, instruction))
            if instruction.guard and (step is None or pc in program.gather):  # the scheduler parts the lanes
                program.guards[pc] = (program.names[instruction.guard], instruction.negated)
                program.steps.append(step)
            else:
                program.steps.append(step and self._guarded(instruction, step))

    # --- operands ---------------------------------------------------------------------------------------------------

    def _source(self, name: str, kind: str, instruction: Instruction) -> tuple[int, int, Any]:
        """Where to read: bank, slot, and the dtype to narrow to if the register is wider than the type (or None)."""
        width = dtype_of(kind).itemsize if kind != "pred" else 0
        slot = self._slot(name, width, instruction)
        narrow = None if self.program.slots[slot] == width else dtype_of(kind)
        if narrow is not None and self.program.slots[slot] < width:
            raise self._unknown(instruction, f"{name} is narrower than {kind}")
        return (_BANK[kind[0]] if narrow is None else UNSIGNED), slot, narrow

    def _reader(self, operand: str | Address, kind: str, instruction: Instruction) -> Any:
        """How to read an operand: the bank and slot of its row, or a function of (batch, selection)."""
        if kind == "any":
            return lambda m, s: None
        if kind == "address":
            return self._address(operand, instruction)
        name = str(operand)
        if kind == "int":
            number = int(name.rstrip("U"), 0)
            return lambda m, s: number
        if name in CLOCKS:
            return lambda m, s: m.tick()
        bank, slot, narrow = self._source(name.removeprefix("!"), kind, instruction)
        if name.startswith("!"):
            return lambda m, s: ~m.rows[bank][slot][s]
        if narrow is not None:  # the low part of a wider register
            return lambda m, s: m.rows[bank][slot][s].astype(narrow)
        return bank, slot

    def _address(self, operand: str | Address, instruction: Instruction) -> Any:
        """The address of each lane as an int64; a 32-bit base wraps in 32 bits."""
        if not isinstance(operand, Address):
            raise self._unknown(instruction, f"{operand} is not an address")
        slot = self._slot(operand.base, 8, instruction)
        width = self.program.slots[slot]
        offset = unsigned[width](operand.offset & ((1 << 8 * width) - 1))

        def address(m: Batch, s: Any) -> Any:
            base = m.rows[UNSIGNED][slot][s]
            base = base + offset if offset else base
            return base.view(np.int64) if width == 8 else base.astype(np.int64)

        return address

    def _target(self, operand: str | Address, kind: str, instruction: Instruction) -> tuple[int, int] | None:
        """Where to write, if anywhere: bank and slot. Into a wider register numpy extends by the bank's sign."""
        name = str(operand)
        if name == "_":
            return None
        if name not in self.program.names:
            raise self._unknown(instruction, f"{name} is not a register")
        return _BANK[kind[0]], self.program.names[name]

    def _unknown(self, instruction: Instruction, why: str = "") -> UnknownInstructionError:
        """The error for what is not in the tables."""
        because = f" ({why})" if why else ""
        return UnknownInstructionError(
            f"kernel {self.kernel.name}, PTX line {instruction.line}: the emulator does not know {instruction.opcode!r}"
            f"{because}, in:  {instruction.text}\nAdd it where its family is (integer.py, floating.py, "
            f"transfer.py, warp.py, tensor.py), with a test of its tricky values"
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
        if (bits := bits_of(name, width)) is not None:
            return self._constant(bits, width)
        raise self._unknown(instruction, f"{name} is not a register, number or array that is known")

    def _constant(self, value: int, width: int) -> int:
        key = (value, width)
        if key not in self._constants:
            self._constants[key] = slot = len(self.program.slots)
            self.program.slots.append(width)
            self.program.constants[slot] = np.array([value], unsigned[width] if width else bool)
        return self._constants[key]

    # --- steps ------------------------------------------------------------------------------------------------------

    def _step(self, pc: int, instruction: Instruction) -> Step:
        """What runs it, guard aside; if its lanes must come together, ``gather`` says which are complete."""
        if (known := find(instruction)) is None:
            raise self._unknown(instruction)
        count, kinds = results_of(instruction), list(known.sources)
        targets, given = instruction.flat[:count], instruction.flat[count:]
        while len(given) < len(kinds) and (missing := [kind for kind in kinds if kind[-1] == "?"]):
            kinds.remove(missing[-1])
        if len(targets) < count or len(given) != len(kinds):
            raise self._unknown(instruction, f"with {len(given)} sources instead of {len(kinds)}")
        places = [self._target(name, kind, instruction) for name, kind in zip(targets, known.results, strict=False)]
        sources = [self._reader(name, kind.rstrip("?"), instruction) for name, kind in zip(given, kinds, strict=True)]
        function, on_lanes, meets = known.function, known.on_lanes, known.meets
        single = places[0] if len(known.results) == 1 else None
        if single is not None and not on_lanes and all(isinstance(source, tuple) for source in sources):
            return _from_rows(function, *single, tuple(sources))
        readers = [_row(*source) if isinstance(source, tuple) else source for source in sources]
        if meets is not None:
            self.program.gather[pc] = lambda m, s: meets(m, s, readers)

        def step(m: Batch, s: Any) -> None:
            values = [read(m, s) for read in readers]
            made = function(m, s, *values) if on_lanes else function(*values)
            if single is not None:
                m.rows[single[0]][single[1]][s] = made
            elif len(known.results) > 1:
                for place, value in zip(places, made, strict=False):
                    if place is not None:
                        m.rows[place[0]][place[1]][s] = value

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


def _row(bank: int, slot: int) -> Any:
    return lambda m, s: m.rows[bank][slot][s]


def _from_rows(function: Any, bank: int, slot: int, sources: tuple[Any, ...]) -> Step:
    """The usual case, quickly: rows in, one row out."""
    if len(sources) == 2 and isinstance(function, np.ufunc):  # it needs no room of its own for the result
        (bank_a, a), (bank_b, b) = sources

        def in_place(m: Batch, s: Any) -> None:
            rows = m.rows
            if type(s) is slice:
                function(rows[bank_a][a][s], rows[bank_b][b][s], out=rows[bank][slot][s])
            else:
                rows[bank][slot][s] = function(rows[bank_a][a][s], rows[bank_b][b][s])

        return in_place

    def step(m: Batch, s: Any) -> None:
        rows = m.rows
        rows[bank][slot][s] = function(*[rows[b][i][s] for b, i in sources])

    return step
