"""One thread, or one warp, instruction by instruction, with the values in its registers: for teaching.

    print(trace(ptx, launch, thread=(0, 5)))

     PTX  instruction                       reads                       writes
     31   ld.shared.u32 %r7, [%r6+64]       %r6 = 128                   %r7 = 0x3f803f80 = (1, 1)

Values show as the instruction sees them: as floating point where its type is f32, else as an integer; an address as
tensor + bytes; for a warp, the 32 values in brackets, or one if they agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from refq4.internals.shown import Shown

from .batch import Batch
from .decode import prepare
from .flow import read_registers, written_registers
from .order import WARP
from .parse import Instruction
from .program import FLOAT, SIGNED, UNSIGNED, Program
from .semantics import find, results_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..launch import Launch

__all__ = ["Line", "ThreadTrace", "trace"]


@dataclass(frozen=True)
class Line:
    """One executed instruction: where it stands, what it read and what it wrote, as text."""

    number: int
    source: str
    text: str
    reads: str
    writes: str


@dataclass
class ThreadTrace(Shown):
    """What a thread or a warp did. Prints as a table, shows as HTML in Jupyter.

    Attributes:
        title: which kernel, block and thread.
        lines: the instructions in the order in which they ran.
        left_out: how many followed after the last line that was kept.
    """

    title: str
    lines: list[Line] = field(default_factory=list)
    left_out: int = 0

    def find(self, pattern: str) -> list[Line]:
        """The lines whose instruction matches a regular expression."""
        return [line for line in self.lines if re.search(pattern, line.text)]

    def _parts(self) -> Iterator[RenderableType]:
        from rich.table import Table

        table = Table(title=self.title, title_justify="left", title_style="bold")
        with_source = any(line.source for line in self.lines)
        for column in ("PTX", *["source"][: int(with_source)], "instruction", "reads", "writes"):
            table.add_column(column, overflow="fold", justify="right" if column == "PTX" else "left")
        for line in self.lines:
            table.add_row(str(line.number), *[line.source][: int(with_source)], line.text, line.reads, line.writes)
        yield table
        if self.left_out:
            yield f"... and {self.left_out} more instructions (raise limit to see them)"


def trace(
    ptx: str,
    launch: Launch,
    *,
    thread: tuple[int, int] | None = None,
    warp: tuple[int, int] | None = None,
    limit: int = 1000,
) -> ThreadTrace:
    """Execute a launch and write down what one thread or one warp does.

    Args:
        ptx, launch: as for ``run``; the launch's tensors are written to as usual.
        thread: (block, thread) to follow, counted from 0; the block in the grid's order, x fastest.
        warp: (block, warp) instead.
        limit: keep so many lines.

    Raises:
        EmulatorError: as ``run``.
        ValueError: not one of ``thread`` and ``warp``, or one that the launch does not have.
    """
    from . import _execute

    program = prepare(ptx, launch.variant.entry)
    result, reader = watch(program, launch, thread, warp, limit)
    _execute(program, launch, None, True, reader)
    return result


def watch(
    program: Program, launch: Launch, thread: tuple[int, int] | None, warp: tuple[int, int] | None, limit: int
) -> tuple[ThreadTrace, _Reader]:
    """An empty trace, and what fills it while the launch runs."""
    block, lanes = _whom(launch, thread, warp)
    who = f"thread {thread[1]}" if thread else f"warp {lanes.start // WARP}"
    result = ThreadTrace(f"{program.kernel.name}, block {block}, {who}")
    return result, _Reader(block, lanes, result, limit)


def _whom(launch: Launch, thread: tuple[int, int] | None, warp: tuple[int, int] | None) -> tuple[int, slice]:
    if (thread is None) == (warp is None):
        raise ValueError("trace needs either thread=(block, thread) or warp=(block, warp)")
    block, number = thread or warp or (0, 0)
    blocks, threads = int(np.prod(launch.grid)), int(np.prod(launch.block))
    lanes = slice(number, number + 1) if thread else slice(number * WARP, min(number * WARP + WARP, threads))
    if not (0 <= block < blocks and 0 <= lanes.start < threads):
        raise ValueError(f"the launch has {blocks} blocks of {threads} threads; asked for block {block}, {number}")
    return block, lanes


class _Reader:
    """Called by the scheduler before and after each instruction."""

    def __init__(self, block: int, lanes: slice, result: ThreadTrace, limit: int) -> None:
        self.block, self.lanes, self.result, self.limit = block, lanes, result, limit
        self.reads = ""

    def __call__(self, m: Batch, pc: int, s: Any, ran: bool) -> None:
        here = np.nonzero(m.blocks == self.block)[0]
        if not len(here):
            return
        start = int(here[0]) * m.padded
        active = m.lanes[s]
        active = active[(active >= start + self.lanes.start) & (active < start + self.lanes.stop)]
        if not len(active):
            return
        instruction = m.program.kernel.code[pc]
        if not ran:
            self.reads = self._values(m, instruction, read_registers(instruction), active)
        elif len(self.result.lines) >= self.limit:
            self.result.left_out += 1
        else:
            if instruction.guard and not self.reads:  # a jump is shown only after it ran
                self.reads = self._values(m, instruction, [instruction.guard], active)
            writes = self._values(m, instruction, written_registers(instruction), active)
            line = Line(instruction.line, instruction.source, instruction.text, self.reads, writes)
            self.result.lines.append(line)
            self.reads = ""

    def _values(self, m: Batch, instruction: Instruction, names: list[str], active: np.ndarray) -> str:
        shown = []
        for name in dict.fromkeys(names):
            slot = m.program.names.get(name)
            if slot is not None:
                floating = _is_floating(instruction, name)
                values = [_show(m, slot, lane, floating) for lane in active.tolist()]
                same = len(set(values)) == 1
                shown.append(f"{name} = {values[0] if same else '[' + ' '.join(values) + ']'}")
        return "\n".join(shown)


def _is_floating(instruction: Instruction, name: str) -> bool:
    """Whether the instruction takes the register for an fp32 number."""
    known, results = find(instruction), results_of(instruction)
    if known is None:
        return False
    kinds = [*known.results[:results], *known.sources]
    return any(operand == name and kind == "f32" for operand, kind in zip(instruction.flat, kinds, strict=False))


def _show(m: Batch, slot: int, lane: int, floating: bool) -> str:
    width = m.program.slots[slot]
    if width == 0:
        return str(bool(m.rows[UNSIGNED][slot][lane])).lower()
    if floating and width == 4:
        return f"{m.rows[FLOAT][slot][lane]:.6g}"
    signed = int(m.rows[SIGNED][slot][lane])
    if width == 8 and (place := m.memory.place(signed)) is not None:
        return place
    return str(signed) if abs(signed) < 1 << 16 else f"{int(m.rows[UNSIGNED][slot][lane]):#x}"
