"""From PTX text to a list of instructions. No instruction is understood here; only its form is.

    ld.global.nc.v4.u32 {%r1, %r2, %r3, %r4}, [%rd5+16];
    |                   |                     '- Address("%rd5", 16)
    |                   '- Vector(("%r1", ...))
    '- opcode, with all its modifiers: "ld.global.nc.v4.u32"

One kernel (an ``.entry``) is taken out of the module. Registers keep their names, except those declared in an inner
scope ``{ ... }`` (inline assembly does that), which get the scope's number: ``l`` becomes ``l#3``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import LaunchError, UnknownInstructionError

__all__ = ["Address", "Instruction", "Kernel", "Operand", "Parameter", "Symbol", "Vector", "parse", "width_of"]


class Address(NamedTuple):
    """``[base+offset]``; the base is a register, a parameter or a shared array."""

    base: str
    offset: int


class Vector(NamedTuple):
    """``{a, b}``: several registers that one instruction reads or writes."""

    parts: tuple[str, ...]


Operand = str | Address | Vector


class Parameter(NamedTuple):
    """One kernel parameter: where it lies in the argument bytes."""

    offset: int
    size: int


class Symbol(NamedTuple):
    """One array in shared memory; ``size`` is None for the dynamic one."""

    size: int | None
    align: int


@dataclass
class Instruction:
    """One instruction as written.

    Attributes:
        line: in the PTX, from 1. ``source`` is the .cu file's line, where the PTX has it (``-lineinfo``).
        guard: the predicate register of ``@%p``, or None; ``negated`` for ``@!%p``.
    """

    line: int
    source: str
    text: str
    opcode: str
    operands: tuple[Operand, ...]
    guard: str | None = None
    negated: bool = False


@dataclass
class Kernel:
    """One parsed ``.entry``."""

    name: str
    parameters: dict[str, Parameter] = field(default_factory=dict)
    argument_bytes: int = 0
    shared: dict[str, Symbol] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)  # name -> declared type, such as "b32" or "pred"
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # -> index into code


def width_of(type_name: str) -> int:
    """Bytes of a type such as ``u32`` (0 for ``pred``)."""
    return 0 if type_name == "pred" else int(re.sub(r"\D+", "", type_name)) // 8


_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.([usbf])(\d+)\s+(?:\.ptr[\s.\w]*?)?([\w$]+)(?:\[(\d+)\])?")


def parse(text: str, entry: str) -> Kernel:
    """The kernel of that name.

    Raises:
        LaunchError: the PTX has no such kernel.
    """
    found = re.search(rf"\.entry\s+{re.escape(entry)}\s*\((.*?)\)(.*?)\n\}}", text, re.DOTALL)
    if found is None:
        known = ", ".join(re.findall(r"\.entry\s+([\w$]+)", text)) or "none"
        raise LaunchError(f"the PTX has no kernel {entry!r}; it has: {known}")
    kernel = Kernel(entry)
    _read_parameters(kernel, found[1])
    for align, name, size in _SHARED.findall(text[: found.start()] + found[2]):
        kernel.shared[name] = Symbol(int(size) if size else None, int(align))
    opening = text.index("{", found.start(2))
    first_line = text.count("\n", 0, opening) + 1
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.MULTILINE))
    _read_body(kernel, text[opening : found.end(2)], first_line, files)
    return kernel


def _read_parameters(kernel: Kernel, head: str) -> None:
    end = 0
    for align, _, bits, name, count in _PARAMETER.findall(head):
        element = int(bits) // 8
        step = int(align) if align and count else element  # .align of a pointer speaks of what it points to
        start = -(-end // step) * step
        end = start + element * int(count or 1)
        kernel.parameters[name] = Parameter(start, end - start)
    kernel.argument_bytes = end


def _read_body(kernel: Kernel, body: str, first_line: int, files: dict[str, str]) -> None:
    scopes: list[dict[str, str]] = []  # names declared in inner scopes, and what they are called from there on
    opened, statement, start, source = 0, "", first_line, ""
    for number, line in enumerate(body.split("\n"), first_line):
        line = line.split("//")[0]
        if located := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            source = f"{files.get(located[1], 'source').rsplit('/', 1)[-1]} line {located[2]}"
            continue
        for piece in re.split(r"([{};])", line):
            at_start = not statement.strip() or statement.rstrip().endswith(":")
            if piece == "{" and at_start:
                opened += 1
                scopes.append({})
            elif piece == "}" and at_start:
                scopes.pop()
            elif piece == ";":
                _read_statement(kernel, " ".join(statement.split()), start, source, scopes, opened)
                statement = ""
            elif piece.strip():
                if not statement:
                    start = number
                statement += piece + " "
                if re.fullmatch(r"\s*[\w$]+:\s*", statement):
                    kernel.labels[statement.strip()[:-1]] = len(kernel.code)
                    statement = ""
    if statement.strip():
        raise UnknownInstructionError(f"{kernel.name}, PTX line {start}: {statement.strip()!r} has no end")


_INSTRUCTION = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)")
_OPERAND = re.compile(r"\{([^}]*)\}|\[([^\]]*)\]|([^,\s][^,]*)")


def _read_statement(
    kernel: Kernel, text: str, line: int, source: str, scopes: list[dict[str, str]], scope: int
) -> None:
    if text.startswith(".reg"):
        _, type_name, names = text.split(maxsplit=2)
        for name in names.split(","):
            many = re.fullmatch(r"([%\w$]+)<(\d+)>", name.strip())
            for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]:
                inner = len(scopes) > 1
                unique = f"{one}#{scope}" if inner else one
                if inner:
                    scopes[-1][one] = unique
                kernel.registers[unique] = type_name[1:]
        return
    if text.startswith((".shared", ".pragma")):
        return
    found = _INSTRUCTION.fullmatch(text)
    if found is None:
        raise UnknownInstructionError(f"{kernel.name}, PTX line {line}: {text!r} is no instruction known here")

    def named(name: str) -> str:
        name = name.strip()
        return next((inner[name] for inner in reversed(scopes) if name in inner), name)

    operands: list[Operand] = []
    for vector, address, plain in _OPERAND.findall(found[4]):
        if vector:
            operands.append(Vector(tuple(named(part) for part in vector.split(","))))
        elif address:
            base, _, offset = address.partition("+")
            operands.append(Address(named(base), int(offset or "0", 0)))
        else:
            operands += [named(part) for part in plain.split("|")]  # d|p: two results
    guard = named(found[2]) if found[2] else None
    text = re.sub(r"\{ | (?=[},])", lambda space: space[0].strip(), re.sub(r",(?=\S)", ", ", text))
    kernel.code.append(Instruction(line, source, text, found[3], tuple(operands), guard, found[1] == "!"))
