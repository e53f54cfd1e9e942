"""Tensor cores: mma, and the loads that bring 8 x 8 blocks of shared memory into its registers.

mma.m16n8k16: registers of lane 4 g + t (g = 0..7, t = 0..3), each with two 16-bit numbers, low half first.

                 k = 2t, 2t+1   2t+8, 2t+9                 n = g                            n = 2t, 2t+1
    A  row g   [     a0       |     a2     ]   B  k = 2t   [ b0 ]      C, D  row g        [   c0, c1   ]
       row g+8 [     a1       |     a3     ]      k = 2t+8 [ b1 ]            row g+8      [   c2, c3   ]

So one register of a warp, seen as 16-bit numbers, is an 8 x 8 block of A, or of B transposed: [lane, half] in memory
is [g, 2t + half]. m16n8k8 has the left half of A (a0, a1) and the upper half of B (b0).

Products of 16-bit numbers are exact; the sum with C is made in fp64 and rounded once to fp32. Hardware sums in an order
and with roundings that NVIDIA does not publish: results agree within the error budget, not in bits.
The other types differ in how many numbers a register holds: one (tf32, k4 and k8), two (fp16, bf16) or four (int8, k16
and k32), and so in how wide a block is.

ldmatrix: lane 8 i + r gives the address of row r of block i (16 bytes); lane 4 g + t gets numbers 2t, 2t+1 of row g, or
with .trans those of rows 2t, 2t+1 in column g.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .addresses import SHARED_WINDOW, address_of
from .floating import canonical, from_bfloat
from .halves import encode_half
from .order import WARP
from .parse import Instruction, Operand, Vector
from .program import FLOAT, SIGNED, UNSIGNED, Step, selection
from .warp import COMPANY, Company, Decode, whole_warp

if TYPE_CHECKING:
    from .batch import Batch
    from .decode import Decoder

__all__ = ["COMPANY"]


def _slots(decoder: Decoder, operand: Operand, kind: str, instruction: Instruction) -> list[int]:
    parts = operand.parts if isinstance(operand, Vector) else (str(operand),)
    return [decoder.source(part, kind, instruction)[1] for part in parts]


def _numbers(kind: str) -> Any:
    """How a register's bits become fp64 numbers (int8: int64 ones)."""
    if kind == "bf16":
        return lambda bits: from_bfloat(bits.view(np.uint16)).astype(np.float64)
    if kind == "tf32":  # the low 13 bits are not read
        return lambda bits: (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if kind == "f16":
        return lambda bits: bits.view(np.float16).astype(np.float64)
    return lambda bits: bits.view(np.int8 if kind == "s8" else np.uint8).astype(np.int64)


_PER_REGISTER = {"tf32": 1, "f16": 2, "bf16": 2, "s8": 4, "u8": 4}


def _mma(k: int, left: str, right: str, sums: str) -> Decode:
    per = _PER_REGISTER[left]

    def decode(decoder: Decoder, instruction: Instruction) -> Step:
        d, a, b, c = instruction.operands
        kind = "u32" if sums == "f16" else sums
        to = [decoder.target(part, kind, instruction)[1] for part in (d.parts if isinstance(d, Vector) else (str(d),))]
        a_slots, b_slots = _slots(decoder, a, "u32", instruction), _slots(decoder, b, "u32", instruction)
        c_slots = _slots(decoder, c, kind, instruction)
        blocks, results = k // (4 * per), 2 if sums == "f16" else 4
        if (len(to), len(a_slots), len(b_slots), len(c_slots)) != (results, 2 * blocks, blocks, results):
            raise decoder.unknown(instruction, "with other numbers of registers")
        a_numbers, b_numbers = _numbers(left), _numbers(right)

        def block(m: Batch, s: Any, slot: int, numbers: Any) -> np.ndarray:
            """One register of each warp as a block of 8 rows, in fp64."""
            bits = np.ascontiguousarray(m.rows[UNSIGNED][slot][s])
            rows: np.ndarray = numbers(bits).reshape(-1, 8, 4 * per)
            return rows

        def step(m: Batch, s: Any) -> None:
            parts = [block(m, s, slot, a_numbers) for slot in a_slots]
            upper, lower = np.concatenate(parts[0::2], axis=2), np.concatenate(parts[1::2], axis=2)
            columns = np.concatenate([block(m, s, slot, b_numbers) for slot in b_slots], axis=2)  # [warp, n, k]
            product = np.concatenate([upper, lower], axis=1) @ columns.transpose(0, 2, 1)  # [warp, 16, 8]
            if sums == "f16":
                _add_halves(m, s, product, c_slots, to)
                return
            bank = FLOAT if sums == "f32" else SIGNED
            for i in range(4):
                rows = slice(0, 8) if i < 2 else slice(8, 16)
                total = product[:, rows, i % 2 :: 2].reshape(-1) + m.rows[bank][c_slots[i]][s]
                m.rows[bank][to[i]][s] = canonical(total.astype(np.float32)) if bank == FLOAT else total

        return step

    return decode


def _add_halves(m: Batch, s: Any, product: np.ndarray, c_slots: list[int], to: list[int]) -> None:
    """fp16 sums: two in a register, row g in the first, row g + 8 in the second."""
    for i in range(2):
        halves = np.ascontiguousarray(m.rows[UNSIGNED][c_slots[i]][s]).view(np.float16).astype(np.float64)
        total = product[:, 8 * i : 8 * i + 8].reshape(-1) + halves
        m.rows[UNSIGNED][to[i]][s] = encode_half(total, "f16").view(np.uint32)


# --- blocks of shared memory ------------------------------------------------------------------------------------------


def _block_addresses(m: Batch, s: Any, place: tuple[int, int, int], count: int) -> tuple[Any, np.ndarray]:
    """The lanes that give the addresses of ``count`` blocks, and those addresses."""
    giving = m.lanes[s] % WARP < 8 * count
    address = address_of(m, s, *place)[giving]
    inside = np.where(address >= SHARED_WINDOW, address - SHARED_WINDOW, address)
    return selection(m.lanes[s][giving]), inside


def _load_blocks(count: int, trans: bool) -> Decode:
    def decode(decoder: Decoder, instruction: Instruction) -> Step:
        target, source = instruction.operands
        names = target.parts if isinstance(target, Vector) else (str(target),)
        to = [decoder.target(name, "u32", instruction)[1] for name in names]
        place = decoder.address(source, instruction)

        def step(m: Batch, s: Any) -> None:
            some, address = _block_addresses(m, s, place, count)
            rows = m.shared.read(address, some, 4, 4)  # [8 * count lanes of each warp, 4]
            blocks = np.ascontiguousarray(rows).view(np.uint16).reshape(-1, count, 8, 8)
            if trans:
                blocks = np.ascontiguousarray(blocks.transpose(0, 1, 3, 2))
            for i, slot in enumerate(to):
                m.rows[UNSIGNED][slot][s] = np.ascontiguousarray(blocks[:, i]).view(np.uint32).reshape(-1)

        return step

    return decode


def _store_blocks(count: int, trans: bool) -> Decode:
    def decode(decoder: Decoder, instruction: Instruction) -> Step:
        target, source = instruction.operands
        slots, place = _slots(decoder, source, "u32", instruction), decoder.address(target, instruction)

        def step(m: Batch, s: Any) -> None:
            registers = [np.ascontiguousarray(m.rows[UNSIGNED][slot][s]).view(np.uint16) for slot in slots]
            blocks = np.stack([register.reshape(-1, 8, 8) for register in registers], axis=1)
            if trans:
                blocks = blocks.transpose(0, 1, 3, 2)
            some, address = _block_addresses(m, s, place, count)
            m.shared.write(address, some, np.ascontiguousarray(blocks).view(np.uint32).reshape(-1, 4))

        return step

    return decode


# --- the table --------------------------------------------------------------------------------------------------------

for _left, _right, _sums, _ks in (
    ("bf16", "bf16", "f32", (8, 16)), ("f16", "f16", "f32", (8, 16)), ("f16", "f16", "f16", (8, 16)),
    ("tf32", "tf32", "f32", (4, 8)), ("s8", "s8", "s32", (16, 32)), ("u8", "u8", "s32", (16, 32)),
    ("s8", "u8", "s32", (16, 32)), ("u8", "s8", "s32", (16, 32)),
):  # fmt: skip
    for _k in _ks:
        _name = f"mma.sync.aligned.m16n8k{_k}.row.col.{_sums}.{_left}.{_right}.{_sums}"
        COMPANY[_name] = Company(_mma(_k, _left, _right, _sums), whole_warp)
for _count in (1, 2, 4):
    for _trans in ("", ".trans"):
        for _shared in ("shared", "shared::cta"):
            _form = f"m8n8.x{_count}{_trans}.{_shared}.b16"
            COMPANY[f"ldmatrix.sync.aligned.{_form}"] = Company(_load_blocks(_count, bool(_trans)), whole_warp)
            COMPANY[f"stmatrix.sync.aligned.{_form}"] = Company(_store_blocks(_count, bool(_trans)), whole_warp)
