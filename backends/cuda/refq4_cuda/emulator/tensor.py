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

from .floating import canonical, decode, encode
from .memory import SHARED_WINDOW
from .order import WARP
from .program import selection
from .semantics import Known, Row, family
from .warp import whole_warp

if TYPE_CHECKING:
    from .batch import Batch

__all__: list[str] = []

_PER_REGISTER = {"tf32": 1, "f16": 2, "bf16": 2, "s8": 4, "u8": 4}
# (type of A, of B, of the sums) and the k there are
_MMA = {
    ("bf16", "bf16", "f32"): (8, 16), ("f16", "f16", "f32"): (8, 16), ("f16", "f16", "f16"): (8, 16),
    ("tf32", "tf32", "f32"): (4, 8), ("s8", "s8", "s32"): (16, 32), ("u8", "u8", "s32"): (16, 32),
    ("s8", "u8", "s32"): (16, 32), ("u8", "s8", "s32"): (16, 32),
}  # fmt: skip


def _numbers(bits: Row, kind: str) -> Row:
    """A register's bits as fp64 numbers (int8: int64 ones)."""
    if kind == "tf32":  # the low 13 bits are not read
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if kind in ("s8", "u8"):
        return np.ascontiguousarray(bits).view(np.int8 if kind == "s8" else np.uint8).astype(np.int64)
    return decode(bits, kind)


@family("mma")
def _mma(parts: list[str]) -> Known | None:
    """``mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32`` and its kin."""
    result, left, right, sums = parts[-4:]
    k = next((k for k in _MMA.get((left, right, sums), ()) if parts[3] == f"m16n8k{k}"), None)
    if k is None or result != sums or parts[1:3] + parts[4:-4] != ["sync", "aligned", "row", "col"]:
        return None
    width = 4 * _PER_REGISTER[left]  # of a register, as a block of 8 rows for each warp
    blocks = k // width

    def function(*registers: Row) -> list[Row]:
        a, b, c = registers[: 2 * blocks], registers[2 * blocks : 3 * blocks], registers[3 * blocks :]
        rows = _numbers(np.stack(a), left).reshape(blocks, 2, -1, 8, width).transpose(2, 1, 3, 0, 4).reshape(-1, 16, k)
        columns = _numbers(np.stack(b), right).reshape(blocks, -1, 8, width).transpose(1, 0, 3, 2).reshape(-1, k, 8)
        product = rows @ columns  # [warp, 16, 8]
        if sums == "f16":  # two in a register, row g in the first, row g + 8 in the second
            totals = [product[:, 8 * i : 8 * i + 8].reshape(-1) + decode(c[i], sums) for i in (0, 1)]
            return [encode(total, sums).view(np.uint32) for total in totals]
        totals = [product[:, i // 2 * 8 : i // 2 * 8 + 8, i % 2 :: 2].reshape(-1) + c[i] for i in range(4)]
        return [canonical(total.astype(np.float32)) for total in totals] if sums == "f32" else totals

    kinds = ("u32", "u32") if sums == "f16" else (sums,) * 4
    return Known(kinds, ("u32",) * 3 * blocks + kinds, function, meets=whole_warp)


@family("ldmatrix", "stmatrix")
def _blocks(parts: list[str]) -> Known | None:
    """Blocks between shared memory and registers."""
    form = ".".join(parts[1:]).replace("shared::cta", "shared")
    count = next((n for n in (1, 2, 4) if form.replace(".trans", "") == f"sync.aligned.m8n8.x{n}.shared.b16"), 0)
    if not count:
        return None

    def giving(m: Batch, s: Any, address: Row) -> tuple[Row, Any]:
        """The addresses of rows, and the lanes that give them."""
        gives = m.lanes[s] % WARP < 8 * count
        inside = np.where(address >= SHARED_WINDOW, address - SHARED_WINDOW, address)
        return inside[gives], selection(m.lanes[s][gives])

    def turned(blocks: Row) -> Row:
        return np.ascontiguousarray(blocks.transpose(0, 1, 3, 2) if "trans" in parts else blocks)

    def load(m: Batch, s: Any, address: Row) -> Any:
        rows = m.shared.read(*giving(m, s, address), 4, 4)  # [8 * count lanes of each warp, 4]
        blocks = turned(np.ascontiguousarray(rows).view(np.uint16).reshape(-1, count, 8, 8))
        words = [np.ascontiguousarray(blocks[:, i]).view(np.uint32).reshape(-1) for i in range(count)]
        return words if count > 1 else words[0]

    def store(m: Batch, s: Any, address: Row, *registers: Row) -> None:
        blocks = [np.ascontiguousarray(row).view(np.uint16).reshape(-1, 8, 8) for row in registers]
        m.shared.write(*giving(m, s, address), turned(np.stack(blocks, axis=1)).view(np.uint32).reshape(-1, 4))

    words = ("u32",) * count
    if parts[0] == "ldmatrix":
        return Known(words, ("address",), load, True, whole_warp)
    return Known((), ("address", *words), store, True, whole_warp)
