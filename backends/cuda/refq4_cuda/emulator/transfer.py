"""Loads, stores, cp.async, and moves between registers and pairs of half their width."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .errors import AccessError, Fault
from .memory import unsigned
from .parse import Instruction, Operand, Vector
from .program import SIGNED, UNSIGNED, Step
from .semantics import dtype_of

if TYPE_CHECKING:
    from .batch import Batch
    from .decode import Decoder

__all__ = ["TRANSFER", "Transfer", "split_or_join"]


class Transfer(NamedTuple):
    """How one opcode becomes a step."""

    decode: Callable[[Decoder, Instruction], Step]


TRANSFER: dict[str, Transfer] = {}


def _registers(operand: Operand) -> list[str]:
    return list(operand.parts) if isinstance(operand, Vector) else [str(operand)]


def _form(opcode: str) -> tuple[str, int]:
    """The element's type and how many: ``ld.shared.v4.u32`` has four u32."""
    parts = opcode.split(".")
    count = next((int(part[1]) for part in parts if part in ("v2", "v4")), 1)
    return parts[-1].replace("b", "u"), count


# --- loads and stores -------------------------------------------------------------------------------------------------


def _load_parameter(decoder: Decoder, instruction: Instruction) -> Step:
    kind, count = _form(instruction.opcode)
    base, width, offset = decoder.address(instruction.operands[1], instruction)
    dtype = dtype_of(kind)
    names = _registers(instruction.operands[0])
    targets = [decoder.target(name, kind, instruction) for name in names]

    def step(m: Batch, s: Any) -> None:
        start = _address(m, s, base, width, offset)
        if (start != start[0]).any() or int(start[0]) + count * dtype.itemsize > len(m.arguments):
            look = "the emulator reads parameters at places that are the same for all threads"
            raise Fault(AccessError, m.lanes[s], f"reads its arguments at byte {int(start.max())}", look)
        for (bank, slot), value in zip(targets, np.frombuffer(m.arguments, dtype, count, int(start[0])), strict=True):
            m.rows[bank][slot][s] = value

    return step


def _load(space: str) -> Callable[[Decoder, Instruction], Step]:
    def decode(decoder: Decoder, instruction: Instruction) -> Step:
        kind, count = _form(instruction.opcode)
        size = dtype_of(kind).itemsize
        base, width, offset = decoder.address(instruction.operands[1], instruction)
        names = _registers(instruction.operands[0])
        targets = [decoder.target(name, kind, instruction) for name in names]
        bank, form = (SIGNED, f"i{size}") if kind[0] == "s" else (UNSIGNED, f"u{size}")  # extended by the sign, or by 0

        def step(m: Batch, s: Any) -> None:
            values = _read(m, s, space, _address(m, s, base, width, offset), size, count).view(form)
            for i, (_, slot) in enumerate(targets):
                m.rows[bank][slot][s] = values if count == 1 else values[:, i]

        return step

    return decode


def _store(space: str) -> Callable[[Decoder, Instruction], Step]:
    def decode(decoder: Decoder, instruction: Instruction) -> Step:
        kind, count = _form(instruction.opcode)
        kind = "u" + kind[1:]  # bits are bits
        base, width, offset = decoder.address(instruction.operands[0], instruction)
        names = _registers(instruction.operands[1])
        sources = [decoder.source(name, kind, instruction) for name in names]
        dtype = dtype_of(kind)

        def step(m: Batch, s: Any) -> None:
            columns = [m.rows[UNSIGNED][slot][s].astype(dtype, copy=False) for _, slot, _ in sources]
            values = columns[0] if count == 1 else np.stack(columns, axis=1)
            _write(m, s, space, _address(m, s, base, width, offset), values)

        return step

    return decode


def _address(m: Batch, s: Any, slot: int, width: int, offset: int) -> np.ndarray:
    """The address of each lane as a uint64; a 32-bit base wraps in 32 bits."""
    base = m.rows[UNSIGNED][slot][s]
    if offset:
        base = base + base.dtype.type(offset & ((1 << 8 * width) - 1))
    address: np.ndarray = base.astype(np.uint64, copy=False)
    return address


def _read(m: Batch, s: Any, space: str, address: np.ndarray, size: int, count: int) -> np.ndarray:
    if space == "shared":
        return m.shared.read(address.view(np.int64), s, size, count)
    return m.memory.read(address, m.lanes[s], size, count)


def _write(m: Batch, s: Any, space: str, address: np.ndarray, values: np.ndarray) -> None:
    if space == "shared":
        m.shared.write(address.view(np.int64), s, values)
    else:
        m.memory.write(address, m.lanes[s], values)


# An address of unknown space ("ld.f32") is taken as global: nothing here makes generic addresses of shared memory.
_LOADS = {"ld": "global", "ld.global": "global", "ld.global.nc": "global", "ld.global.nc.L1::no_allocate": "global",
          "ld.global.cg": "global", "ld.shared": "shared"}  # fmt: skip
_TYPES = [f"{kind}{size}" for kind in "bus" for size in (8, 16, 32, 64)] + ["f32"]
for form in [vector + name for vector in ("", "v2.", "v4.") for name in _TYPES]:
    TRANSFER[f"ld.param.{form}"] = Transfer(_load_parameter)
    for opcode, where in _LOADS.items():
        TRANSFER[f"{opcode}.{form}"] = Transfer(_load(where))
    for where in ("global", "shared"):
        TRANSFER[f"st.{where}.{form}"] = Transfer(_store(where))


# --- atomics ----------------------------------------------------------------------------------------------------------


def _atomic_add(decoder: Decoder, instruction: Instruction) -> Step:
    """One lane after the other, in the order of lanes: each gets what it found."""
    _, to = decoder.target(str(instruction.operands[0]), "u32", instruction)
    base, width, offset = decoder.address(instruction.operands[1], instruction)
    _, addend, _ = decoder.source(str(instruction.operands[2]), "u32", instruction)

    def step(m: Batch, s: Any) -> None:
        address, lanes = _address(m, s, base, width, offset), m.lanes[s]
        found = np.empty(len(lanes), np.uint32)
        for i in range(len(lanes)):
            lane = lanes[i : i + 1]
            found[i] = m.memory.add(address[i : i + 1], lane, m.rows[UNSIGNED][addend][lane])[0]
        m.rows[UNSIGNED][to][s] = found

    return step


def _fence(decoder: Decoder, instruction: Instruction) -> Step:
    """Here every write is seen at once; what a missing fence does, only hardware shows."""
    return lambda m, s: None


TRANSFER["atom.global.add.u32"] = Transfer(_atomic_add)
TRANSFER["membar.gl"] = Transfer(_fence)


# --- cp.async ---------------------------------------------------------------------------------------------------------


def _copy(decoder: Decoder, instruction: Instruction) -> Step:
    """``cp.async [shared], [global], bytes {, bytes to read}``: what is not read is filled with zeros."""
    target = decoder.address(instruction.operands[0], instruction)
    source = decoder.address(instruction.operands[1], instruction)
    size = decoder.integer(instruction.operands[2])
    given = decoder.source(instruction.operands[3], "u32", instruction) if len(instruction.operands) > 3 else None

    def step(m: Batch, s: Any) -> None:
        to, start, lanes = _address(m, s, *target).view(np.int64), _address(m, s, *source), m.lanes[s]
        read = np.full(len(lanes), size) if given is None else np.minimum(m.rows[UNSIGNED][given[1]][s], size)
        data = np.zeros((len(lanes), size), np.uint8)
        for length in np.unique(read):
            if length:
                some = read == length
                data[some, :length] = _bytes(m, lanes[some], start[some], size, int(length))
        m.shared.copy(to, s, data)

    return step


def _bytes(m: Batch, lanes: np.ndarray, address: np.ndarray, size: int, length: int) -> np.ndarray:
    """``length`` of ``size`` bytes; the address must be aligned to ``size`` even when less is read."""
    if length == size:
        words = m.memory.read(address, lanes, 4, size // 4)
        return np.ascontiguousarray(words).reshape(len(lanes), -1).view(np.uint8)
    m.memory.require_aligned(address, lanes, size)
    one_by_one = [m.memory.read(address + np.uint64(i), lanes, 1, 1) for i in range(length)]
    return np.stack(one_by_one, axis=1)


def _commit(decoder: Decoder, instruction: Instruction) -> Step:
    return lambda m, s: m.shared.commit(s)


def _wait(decoder: Decoder, instruction: Instruction) -> Step:
    newest = decoder.integer(instruction.operands[0]) if instruction.operands else None
    return lambda m, s: m.shared.wait(s, newest)


TRANSFER["cp.async.cg.shared.global"] = TRANSFER["cp.async.ca.shared.global"] = Transfer(_copy)
TRANSFER["cp.async.commit_group"] = Transfer(_commit)
TRANSFER["cp.async.wait_group"] = TRANSFER["cp.async.wait_all"] = Transfer(_wait)


# --- halves -----------------------------------------------------------------------------------------------------------


def split_or_join(decoder: Decoder, instruction: Instruction) -> Step:
    """``mov.b32 %r, {lo, hi}`` and back: the first part is the low half."""
    whole_kind = _form(instruction.opcode)[0]
    bits = int(whole_kind[1:])
    half_kind, half = f"u{bits // 2}", unsigned[bits // 16]
    target, source = instruction.operands
    if any(isinstance(operand, Vector) and len(operand.parts) != 2 for operand in (target, source)):
        raise decoder.unknown(instruction, "with other than two parts")
    if isinstance(source, Vector):
        _, slot = decoder.target(target, whole_kind, instruction)
        low, high = (decoder.source(part, half_kind, instruction)[1] for part in source.parts)
        whole = unsigned[bits // 8]

        def join(m: Batch, s: Any) -> None:
            u = m.rows[UNSIGNED]
            u[slot][s] = u[low][s].astype(whole) | u[high][s].astype(whole) << whole(bits // 2)

        return join
    slot = decoder.source(source, whole_kind, instruction)[1]
    low_name, high_name = target.parts if isinstance(target, Vector) else ("_", "_")

    def split(m: Batch, s: Any) -> None:
        u = m.rows[UNSIGNED]
        value = u[slot][s]
        if low_name != "_":
            u[decoder.program.names[low_name]][s] = value.astype(half)
        if high_name != "_":
            u[decoder.program.names[high_name]][s] = (value >> value.dtype.type(bits // 2)).astype(half)

    return split
