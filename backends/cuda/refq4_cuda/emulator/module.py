"""The outer form of a PTX module: its functions, its arrays, and the text without what says nothing to a machine.

    .const .align 4 .b8 taps[20] = {0, 0, 128, 61, ...};     Variable("const", "taps", 20 bytes, ...)
    .func (.param .b32 r) f(.param .b32 p) { ... }           Function("f", returns, parameters, body)
    .visible .entry k(.param .u64 p) .reqntid 128 { ... }    Function("k", "", parameters, body)
    .section .debug_line { ... }                             left out, as are comments

Lines keep their numbers: what is taken out leaves its line breaks behind.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import UnknownInstructionError

__all__ = ["Function", "Module", "Variable", "bits_of", "laid_out", "read_module", "read_variable", "width_of"]

FORMATS = {"f16": "<e", "f32": "<f", "f64": "<d"}


class Variable(NamedTuple):
    """One declared array or number.

    Attributes:
        space: global, const, shared, local or param.
        size: in bytes; None for the dynamic shared array, whose size the launch gives.
        kind: the declared type of an element, such as ``u64``.
        initial: the bytes it starts with (zeros where the text gives none).
        references: (offset, name, addend) of the addresses of other variables among them.
        at: its place among those of its memory, in bytes.
    """

    space: str
    name: str
    size: int | None
    align: int
    kind: str
    initial: bytes = b""
    references: tuple[tuple[int, str, int], ...] = ()
    at: int = 0


class Function(NamedTuple):
    """An ``.entry`` or a ``.func``, its parts as text; ``line`` is that of the opening brace."""

    name: str
    is_entry: bool
    returns: str
    parameters: str
    body: str
    line: int


@dataclass
class Module:
    """All of a PTX text."""

    functions: dict[str, Function] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def width_of(type_name: str) -> int:
    """Bytes of a type such as ``u32`` or ``f16x2`` (0 for ``pred``)."""
    if type_name == "pred":
        return 0
    bits, _, times = re.sub(r"^[a-z]+", "", type_name).partition("x")
    return int(bits) * int(times or 1) // 8


_HEAD = re.compile(r"\.(entry|func)\s+(?:\.noreturn\s+)?(?:\(([^)]*)\)\s*)?([\w$]+)\s*(?:\(([^)]*)\))?[^{;]*([{;])")


def read_module(text: str) -> Module:
    """Take a module apart. Nothing of a function's body is understood yet."""
    module = Module(files=dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.MULTILINE)))
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    debug = re.search(r"^\s*\.section\b", text, re.MULTILINE)
    text = text[: debug.start()] if debug else text
    outside, at = "", 0
    for head in _HEAD.finditer(text):
        if head.start() < at:
            continue
        outside += text[at : head.start()] + ";"
        at = head.end()
        if head[5] == "{":
            at = _closing(text, head.end())
            line = text.count("\n", 0, head.start(5)) + 1
            body = text[head.start(5) : at]
            module.functions[head[3]] = Function(head[3], head[1] == "entry", head[2] or "", head[4] or "", body, line)
    outside += text[at:]
    outside = re.sub(r"^\s*\.(version|target|address_size|file|loc)\b.*$", "", outside, flags=re.MULTILINE)
    outside = re.sub(r"\.(visible|weak|extern)\s*;", ";", outside)  # what stood before a function
    for statement in outside.split(";"):
        if (variable := read_variable(" ".join(statement.split()))) is not None:
            module.variables[variable.name] = variable
    return module


def _closing(text: str, at: int) -> int:
    """The place behind the brace that closes the one before ``at``."""
    depth = 1
    for brace in re.finditer(r"[{}]", text[at:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return at + brace.end()
    raise UnknownInstructionError("the PTX text ends inside a function: a closing brace is missing")


_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(global|const|shared|local|param)\s+(?:\.attribute\([^)]*\)\s*)?"
    r"(?:\.align\s+(\d+)\s+)?(?:\.v([24])\s+)?\.([busf]\d+(?:x2)?)\s+([\w$]+)((?:\s*\[\w*\])*)\s*(?:=\s*(.*))?"
)


def read_variable(statement: str) -> Variable | None:
    """A declaration ``.space .align n .type name[n] = {...}``, or None if the statement is something else."""
    found = _VARIABLE.fullmatch(statement)
    if found is None:
        return None
    space, align, vector, kind, name, dimensions, initial = found.groups()
    element, count = width_of(kind) * int(vector or 1), 1
    extents = re.findall(r"\[(\w*)\]", dimensions)
    for extent in extents:
        count *= int(extent, 0) if extent else 0
    size = None if space == "shared" and "" in extents else element * count
    data, references = _initial(initial, kind) if initial else (b"", ())
    if size is not None and "" in extents:
        size = len(data)
    return Variable(space, name, size, int(align or element), kind, data.ljust(size or 0, b"\0"), references)


def laid_out(variables: Iterable[Variable]) -> tuple[dict[str, Variable], int]:
    """Each at its place, the first multiple of its alignment behind the one before; and where the last one ends."""
    end, placed = 0, {}
    for variable in variables:
        start = -(-end // variable.align) * variable.align
        placed[variable.name] = variable._replace(at=start)
        end = start + (variable.size or 0)
    return placed, end


def bits_of(number: str, width: int) -> int | None:
    """The bits of a number as it is written, in so many bytes (0 for a predicate), or None if it is none."""
    if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", number):
        return int(number[2:], 16)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", number):
        return int(number.rstrip("U"), 0) & ((1 << 8 * width) - 1 if width else 1)
    if re.fullmatch(r"-?\d+\.\d*(e[+-]?\d+)?", number) and f"f{8 * width}" in FORMATS:
        return int.from_bytes(struct.pack(FORMATS[f"f{8 * width}"], float(number)), "little")
    return None


def _initial(text: str, kind: str) -> tuple[bytes, tuple[tuple[int, str, int], ...]]:
    """The bytes of ``{1, 0f3F800000, name + 4, generic(name)}``, and where addresses stand in them."""
    data, references, width = b"", [], width_of(kind)
    for item in (part.strip() for part in re.sub(r"[{}]", "", text).split(",") if part.strip()):
        if (bits := bits_of(item, width)) is not None:
            data += bits.to_bytes(width, "little")
        elif (named := re.fullmatch(r"(?:generic\()?([\w$]+)\)?\s*(?:\+\s*(\d+))?", item)) and width == 8:
            references.append((len(data), named[1], int(named[2] or 0)))
            data += bytes(8)
        else:
            raise UnknownInstructionError(f"the initial value {item!r} of a .{kind} is none that the emulator reads")
    return data, tuple(references)
