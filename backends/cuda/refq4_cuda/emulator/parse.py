"""From PTX text to a list of instructions. No instruction is understood here; only its form is.

    ld.global.nc.v4.u32 {%r1, %r2, %r3, %r4}, [%rd5+16];
    |                   |                     '- Address("%rd5", 16)
    |                   '- Vector(("%r1", ...))
    '- opcode, with all its modifiers: "ld.global.nc.v4.u32"

One kernel (an ``.entry``) is taken out of the module. Registers keep their names, except those declared in an inner
scope ``{ ... }`` (inline assembly does that), which get the scope's number: ``l`` becomes ``l#3``.

A call of a ``.func`` is replaced by its body, each time anew: its names get a number of their own, its parameters
become the caller's ``.param`` variables, its ``ret`` a jump behind the body.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import LaunchError, UnknownInstructionError
from .module import Function, Module, Variable, laid_out, read_module, read_variable, width_of

__all__ = ["Address", "Instruction", "Kernel", "Operand", "Vector", "parse", "width_of"]

DEEPEST = 16  # calls within calls: a recursion would have no end


class Address(NamedTuple):
    """``[base+offset]``; the base is a register, a parameter or an array."""

    base: str
    offset: int


class Vector(NamedTuple):
    """``{a, b}``: several registers that one instruction reads or writes."""

    parts: tuple[str, ...]


Operand = str | Address | Vector


@dataclass
class Instruction:
    """One instruction as written.

    Attributes:
        line: in the PTX, from 1. ``source`` is the .cu file's line, where the PTX has it (``-lineinfo``).
        guard: the predicate register of ``@%p``, or None; ``negated`` for ``@!%p``.
        flat: the operands, with the parts of vectors in their place.
    """

    line: int
    source: str
    text: str
    opcode: str
    operands: tuple[Operand, ...]
    guard: str | None = None
    negated: bool = False
    flat: tuple[str | Address, ...] = ()

    def __post_init__(self) -> None:
        self.flat = tuple(part for o in self.operands for part in (o.parts if isinstance(o, Vector) else (o,)))


@dataclass
class Kernel:
    """One parsed ``.entry``.

    Attributes:
        shared, local: arrays of a block and of a thread; what calls pass (``.param`` in a body) is local, too.
        variables: the module's ``.global`` and ``.const`` arrays.
        registers: name -> declared type, such as "b32" or "pred".
        labels: name -> index into ``code``; ``tables`` are lists of labels that ``brx.idx`` chooses from.
    """

    name: str
    parameters: dict[str, Variable] = field(default_factory=dict)
    argument_bytes: int = 0
    shared: dict[str, Variable] = field(default_factory=dict)
    local: dict[str, Variable] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)

    def declare(self, variable: Variable) -> None:
        """An array, among those of its memory."""
        own = {"shared": self.shared, "local": self.local, "param": self.local}
        own.get(variable.space, self.variables)[variable.name] = variable


def parse(text: str, entry: str) -> Kernel:
    """The kernel of that name.

    Raises:
        LaunchError: the PTX has no such kernel.
    """
    module = read_module(text)
    function = module.functions.get(entry)
    if function is None or not function.is_entry:
        known = ", ".join(f.name for f in module.functions.values() if f.is_entry) or "none"
        raise LaunchError(f"the PTX has no kernel {entry!r}; it has: {known}")
    kernel = Kernel(entry)
    # what .ptr says of a parameter is of what it points to
    heads = [re.sub(r"\.ptr\b.*?(?=[\w$]+$)", "", " ".join(text.split())) for text in function.parameters.split(",")]
    kernel.parameters, kernel.argument_bytes = laid_out(v for v in map(read_variable, heads) if v is not None)
    for variable in module.variables.values():
        kernel.declare(variable)
    _Reader(kernel, module).read(function, {}, 0)
    used = {o.base if isinstance(o, Address) else o for one in kernel.code for o in one.flat}
    kernel.shared = {name: variable for name, variable in kernel.shared.items() if name in used}
    return kernel


_INSTRUCTION = re.compile(r"(?:@(!?)([%\w$#]+)\s+)?([a-z][\w.:]*)\s*(.*)")
_OPERAND = re.compile(r"\{([^}]*)\}|\[([^\]]*)\]|([^,\s][^,]*)")
_ADDRESS = re.compile(r"([%\w$.]+)\s*(?:\+?\s*(-?\s*\w+))?")
_CALL = re.compile(r"(?:\(([^)]*)\)\s*,\s*)?([\w$%]+)\s*(?:,\s*\(([^)]*)\))?(.*)")
_SILENT = (".pragma", ".callprototype", ".file", ".alias", ".calltargets")
_TO_THE_LINES_END = re.compile(r"\s*\.(file|reqntid|maxntid|maxnreg|minnctapersm|noreturn|target|version)\b")


class _Reader:
    """Reads bodies, that of the kernel and of what it calls, into the kernel's list of instructions."""

    def __init__(self, kernel: Kernel, module: Module) -> None:
        self.kernel, self.module = kernel, module
        self.scopes: list[dict[str, str]] = []  # names declared in inner scopes, and what they are called from there on
        self.opened = 0
        self.depth = 0
        self.end = ""  # of the function that is read: the label behind it, for ret
        self.last_label = ""

    def read(self, function: Function, names: dict[str, str], depth: int) -> None:
        """A function's body; ``names`` says what its parameters are called by the caller."""
        outer = self.scopes, self.depth, self.end
        self.depth = depth
        if depth:
            self.opened += 1
            self.end = f"end of {function.name}#{self.opened}"
            labels = re.findall(r"^\s*([\w$]+):", function.body, re.MULTILINE)
            self.scopes = [names | {label: f"{label}#{self.opened}" for label in labels}]
        self._read_lines(function)
        if depth:
            self.kernel.labels[self.end] = len(self.kernel.code)
        self.scopes, self.depth, self.end = outer

    def _read_lines(self, function: Function) -> None:
        statement, start, source = "", function.line, ""
        for number, line in enumerate(function.body.split("\n"), function.line):
            if located := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
                file = self.module.files.get(located[1], "source").rsplit("/", 1)[-1]
                source = f"{file} line {located[2]}"
                continue
            if _TO_THE_LINES_END.match(line):
                continue
            for piece in re.split(r"([{};])", line):
                at_start = not statement.strip()
                if piece == "{" and at_start:
                    self.opened += 1
                    self.scopes.append({})
                elif piece == "}" and at_start:
                    self.scopes.pop()
                elif piece == ";":
                    self._read_statement(" ".join(statement.split()), start, source)
                    statement = ""
                elif piece.strip():
                    if not statement:
                        start = number
                    statement += piece + " "
                    while label := re.match(r"\s*([\w$]+):(?!:)", statement):
                        self.last_label = self._named(label[1])
                        self.kernel.labels[self.last_label] = len(self.kernel.code)
                        statement = statement[label.end() :].lstrip()
        if statement.strip():
            raise UnknownInstructionError(f"{self.kernel.name}, PTX line {start}: {statement.strip()!r} has no end")

    def _named(self, name: str) -> str:
        """What a name of this scope is called in the kernel; ``!`` and ``-`` before it stay."""
        name = name.strip()
        if name[:1] == "!":
            return "!" + self._named(name[1:])
        return next((inner[name] for inner in reversed(self.scopes) if name in inner), name)

    def _declared(self, name: str) -> str:
        """A new name: as it is in the kernel's outermost scope, with a number elsewhere."""
        if len(self.scopes) > 1 or self.depth:
            self.scopes[-1][name] = f"{name}#{self.opened}"
        return self._named(name)

    def _read_statement(self, text: str, line: int, source: str) -> None:
        if not text or text.startswith(_SILENT):
            return
        if text.startswith(".reg"):
            _, type_name, names = text.split(maxsplit=2)
            for name in names.split(","):
                many = re.fullmatch(r"([%\w$]+)<(\d+)>", name.strip())
                for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]:
                    self.kernel.registers[self._declared(one)] = type_name[1:]
        elif text.startswith(".branchtargets"):
            self.kernel.tables[self.last_label] = [self._named(name) for name in text.split(maxsplit=1)[1].split(",")]
        elif (variable := read_variable(text)) is not None:
            self.kernel.declare(variable._replace(name=self._declared(variable.name)))
        else:
            self._read_instruction(text, line, source)

    def _read_instruction(self, text: str, line: int, source: str) -> None:
        found = _INSTRUCTION.fullmatch(text)
        if found is None:
            raise UnknownInstructionError(
                f"{self.kernel.name}, PTX line {line}: {text!r} is not an instruction known here"
            )
        guard, negated = (self._named(found[2]) if found[2] else None), found[1] == "!"
        opcode, rest = found[3], found[4]
        tidy = re.sub(r"\{ | (?=[},])", lambda space: space[0].strip(), re.sub(r",(?=\S)", ", ", text))
        if opcode in ("call", "call.uni"):
            self._call(rest, Instruction(line, source, tidy, opcode, (), guard, negated))
            return
        if opcode in ("ret", "ret.uni") and self.depth:
            opcode, rest = "bra.uni", ""
            operands: list[Operand] = [self.end]
        else:
            operands = self._operands(rest)
        if any(isinstance(operand, Address) and operand.base in self.kernel.local for operand in operands):
            opcode = re.sub(r"\.param(::func)?\b", ".local", opcode)  # what calls pass
        self.kernel.code.append(Instruction(line, source, tidy, opcode, tuple(operands), guard, negated))

    def _operands(self, text: str) -> list[Operand]:
        operands: list[Operand] = []
        for vector, address, plain in _OPERAND.findall(text):
            if vector:
                parts = tuple(self._named(part) for part in vector.split(","))
                operands.append(Vector(parts) if len(parts) > 1 else parts[0])
            elif address:
                found = _ADDRESS.fullmatch(address.strip())
                if found is None:
                    operands.append(address)
                else:
                    offset = (found[2] or "0").replace(" ", "")
                    operands.append(Address(self._named(found[1]), int(offset, 0)))
            else:
                operands += [self._named(part) for part in plain.split("|")]  # d|p: two results
        return operands

    def _call(self, rest: str, call: Instruction) -> None:
        """The body of the function, in place of its call."""
        where = f"{self.kernel.name}, PTX line {call.line}: {call.text!r}"
        found = _CALL.fullmatch(rest)
        function = self.module.functions.get(found[2]) if found else None
        if found is None or function is None:
            raise UnknownInstructionError(
                f"{where} calls what is not in this PTX (printf, malloc and calls through a pointer are not emulated): "
                "take the call out, or link the function in"
            )
        if self.depth >= DEEPEST:
            raise UnknownInstructionError(f"{where}: calls within calls, {DEEPEST} deep; recursion is not emulated")
        given = [self._named(name) for text in (found[1], found[3]) for name in (text or "").split(",") if name.strip()]
        wanted = [_name_of(text) for text in f"{function.returns},{function.parameters}".split(",") if text.strip()]
        skip = f"behind the call#{len(self.kernel.code)}"
        if call.guard:
            jump = Instruction(call.line, call.source, call.text, "bra", (skip,), call.guard, not call.negated)
            self.kernel.code.append(jump)
        self.read(function, dict(zip(wanted, given, strict=True)), self.depth + 1)
        self.kernel.labels[skip] = len(self.kernel.code)


def _name_of(declaration: str) -> str:
    return re.sub(r"\[.*", "", declaration).split()[-1]
