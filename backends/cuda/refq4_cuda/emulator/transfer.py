"""Loads, stores, cp.async, and moves between registers and parts of them.

ld.volatile.global.L1::evict_first.v4.b32 {%r1, ...}, [%rd1+16];
   '- strong  '- space (none: generic)     '- how many, and of which type; hints on caches change nothing here
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .addresses import ADDRESSES, Made, address_of
from .errors import EmulatorError, Fault
from .memory import unsigned
from .parse import Address, Instruction, Operand, Vector, width_of
from .program import SIGNED, UNSIGNED, Step
from .semantics import dtype_of

if TYPE_CHECKING:
    from .batch import Batch
    from .decode import Decoder

__all__ = ["Form", "find_transfer", "form_of", "split_or_join"]

TRANSFER: dict[str, Made] = dict(ADDRESSES)  # by whole opcode; loads, stores and atomics are made by form


class Form(NamedTuple):
    """What an opcode of a load or store says: memory, type, how many, and whether it is volatile or ordered."""

    space: str
    kind: str
    many: int
    strong: bool


_SPACES = {"global": "global", "shared": "shared", "shared::cta": "shared", "local": "local", "const": "global",
           "param": "param", "param::entry": "param", "param::func": "param"}  # fmt: skip
_STRONG = {"volatile", "relaxed", "acquire", "release", "mmio"}
_SILENT = {"weak", "nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "cta", "cluster", "gpu", "sys"}


def form_of(opcode: str) -> Form | None:
    """The form of ``ld...`` or ``st...``, or None if a modifier is none of those known."""
    space, count, strong = "generic", 1, False
    _, *modifiers, kind = opcode.split(".")
    for modifier in modifiers:
        if modifier in _SPACES:
            space = _SPACES[modifier]
        elif modifier in ("v2", "v4"):
            count = int(modifier[1])
        elif modifier in _STRONG:
            strong = True
        elif modifier not in _SILENT and not modifier.startswith(("L1::", "L2::")):
            return None
    if not re.fullmatch(r"[busf](8|16|32|64)", kind):
        return None
    return Form(space, kind.replace("b", "u"), count, strong)


def find_transfer(opcode: str) -> Made | None:
    """What decodes an opcode that moves data, or None."""
    if opcode in TRANSFER:
        return TRANSFER[opcode]
    family = opcode.split(".")[0]
    if family in ("ld", "ldu", "st") and form_of(opcode) is not None:
        return _store if family == "st" else _load
    return None


def _registers(operand: Operand) -> list[str]:
    return list(operand.parts) if isinstance(operand, Vector) else [str(operand)]


# --- loads and stores -------------------------------------------------------------------------------------------------


def _space_of(decoder: Decoder, form: Form, operand: Operand) -> str:
    """Which memory an instruction means: ``.param`` is the launch's arguments, or what a call passes (local)."""
    if form.space == "param" and isinstance(operand, Address) and operand.base in decoder.kernel.local:
        return "local"
    return form.space


def _load(decoder: Decoder, instruction: Instruction) -> Step:
    form = form_of(instruction.opcode)
    assert form is not None
    kind, count, strong = form.kind, form.many, form.strong
    space = _space_of(decoder, form, instruction.operands[1])
    size = dtype_of(kind).itemsize
    base, width, offset = decoder.address(instruction.operands[1], instruction)
    targets = [
        None if name == "_" else decoder.target(name, kind, instruction)[1]
        for name in _registers(instruction.operands[0])
    ]
    if len(targets) != count:
        raise decoder.unknown(instruction, f"{len(targets)} registers for {count} numbers")
    bank, dtype = (SIGNED, f"i{size}") if kind[0] == "s" else (UNSIGNED, f"u{size}")  # extended by the sign, or by 0

    def step(m: Batch, s: Any) -> None:
        values = m.spaces[space].read(address_of(m, s, base, width, offset), s, size, count, strong).view(dtype)
        for i, slot in enumerate(targets):
            if slot is not None:
                m.rows[bank][slot][s] = values if count == 1 else values[:, i]

    return step


def _store(decoder: Decoder, instruction: Instruction) -> Step:
    form = form_of(instruction.opcode)
    assert form is not None
    kind, count, strong = "u" + form.kind[1:], form.many, form.strong  # bits are bits
    space = _space_of(decoder, form, instruction.operands[0])
    base, width, offset = decoder.address(instruction.operands[0], instruction)
    sources = [decoder.source(name, kind, instruction) for name in _registers(instruction.operands[1])]
    if len(sources) != count:
        raise decoder.unknown(instruction, f"{len(sources)} registers for {count} numbers")
    dtype = dtype_of(kind)

    def step(m: Batch, s: Any) -> None:
        columns = [m.rows[UNSIGNED][slot][s].astype(dtype, copy=False) for _, slot, _ in sources]
        values = columns[0] if count == 1 else np.stack(columns, axis=1)
        m.spaces[space].write(address_of(m, s, base, width, offset), s, values, strong)

    return step


def _nothing(decoder: Decoder, instruction: Instruction) -> Step:
    """Fences and hints. Here every write is seen at once; what a missing fence does, only hardware shows."""
    return lambda m, s: None


for _opcode in ("membar.cta", "membar.gl", "membar.sys", "fence.proxy.async", "fence.proxy.async.shared::cta",
                *(f"fence.{order}.{at}" for order in ("sc", "acq_rel") for at in ("cta", "cluster", "gpu", "sys")),
                *(f"prefetch.{space}L{level}" for space in ("", "global.") for level in (1, 2)),
                "nanosleep.u32", "applypriority.global.L2::evict_normal", "griddepcontrol.wait",
                "griddepcontrol.launch_dependents"):  # fmt: skip
    TRANSFER[_opcode] = _nothing


def _trap(decoder: Decoder, instruction: Instruction) -> Step:
    def step(m: Batch, s: Any) -> None:
        raise Fault(
            EmulatorError, m.lanes[s], "executes trap", "look for an assertion in the source that does not hold"
        )

    return step


TRANSFER["trap"] = _trap


def _policy(decoder: Decoder, instruction: Instruction) -> Step:
    """``createpolicy``: a hint for a cache, whose value means nothing."""
    slot = decoder.target(instruction.operands[0], "u64", instruction)[1]

    def step(m: Batch, s: Any) -> None:
        m.rows[UNSIGNED][slot][s] = 0

    return step


for _level in ("evict_last", "evict_first", "evict_normal", "evict_unchanged"):
    TRANSFER[f"createpolicy.fractional.L2::{_level}.b64"] = _policy


# --- cp.async ---------------------------------------------------------------------------------------------------------


def _copy(decoder: Decoder, instruction: Instruction) -> Step:
    """``cp.async [shared], [global], bytes {, bytes to read}``: what is not read is filled with zeros."""
    target = decoder.address(instruction.operands[0], instruction)
    source = decoder.address(instruction.operands[1], instruction)
    size = decoder.integer(instruction.operands[2])
    hint = "cache_hint" in instruction.opcode
    many = len(instruction.operands) - hint
    given = decoder.source(instruction.operands[3], "u32", instruction) if many > 3 else None

    def step(m: Batch, s: Any) -> None:
        to, start = address_of(m, s, *target), address_of(m, s, *source)
        lanes = m.lanes[s]
        read = np.full(len(lanes), size) if given is None else np.minimum(m.rows[UNSIGNED][given[1]][s], size)
        data = np.zeros((len(lanes), size), np.uint8)
        if (some := read == size).any():
            data[some] = m.memory.read(start[some], lanes[some], 4, size // 4).reshape(-1, size // 4).view(np.uint8)
        if (some := (read > 0) & (read < size)).any():
            m.memory.require_aligned(start[some], lanes[some], size)
            for i in range(size):
                if (some := (read > i) & (read < size)).any():
                    data[some, i] = m.memory.read(start[some] + i, lanes[some], 1, 1)
        m.shared.copy(to, s, data)

    return step


def _commit(decoder: Decoder, instruction: Instruction) -> Step:
    return lambda m, s: m.shared.commit(s)


def _wait(decoder: Decoder, instruction: Instruction) -> Step:
    newest = decoder.integer(instruction.operands[0]) if instruction.operands else None
    return lambda m, s: m.shared.wait(s, newest)


for _cache in ("ca", "cg"):
    for _shared in ("shared", "shared::cta"):
        for _hint in ("", ".L2::cache_hint", ".L2::64B", ".L2::128B", ".L2::256B", ".L2::cache_hint.L2::128B"):
            TRANSFER[f"cp.async.{_cache}.{_shared}.global{_hint}"] = _copy
TRANSFER["cp.async.commit_group"] = _commit
TRANSFER["cp.async.wait_group"] = TRANSFER["cp.async.wait_all"] = _wait


# --- parts of a register ----------------------------------------------------------------------------------------------


def split_or_join(decoder: Decoder, instruction: Instruction) -> Step:
    """``mov.b32 %r, {lo, hi}`` and back, in two or four parts: the first part is the lowest."""
    bits = width_of(instruction.opcode.split(".")[-1]) * 8
    target, source = instruction.operands
    parts = _registers(source if isinstance(source, Vector) else target)
    each = bits // len(parts)
    if each < 8 or (isinstance(source, Vector) and isinstance(target, Vector)):
        raise decoder.unknown(instruction, f"with {len(parts)} parts")
    whole, part = unsigned[bits // 8], unsigned[each // 8]
    if isinstance(source, Vector):
        _, slot = decoder.target(target, f"u{bits}", instruction)
        slots = [decoder.source(name, f"u{each}", instruction)[1] for name in parts]

        def join(m: Batch, s: Any) -> None:
            u = m.rows[UNSIGNED]
            value = u[slots[0]][s].astype(whole)
            for i, one in enumerate(slots[1:], 1):
                value |= u[one][s].astype(whole) << whole(each * i)
            u[slot][s] = value

        return join
    slot = decoder.source(source, f"u{bits}", instruction)[1]
    targets = [None if name == "_" else decoder.target(name, f"u{each}", instruction)[1] for name in parts]

    def split(m: Batch, s: Any) -> None:
        u = m.rows[UNSIGNED]
        value = u[slot][s].copy()  # a part may be written into the register that is read
        for i, one in enumerate(targets):
            if one is not None:
                u[one][s] = (value >> whole(each * i)).astype(part)

    return split
