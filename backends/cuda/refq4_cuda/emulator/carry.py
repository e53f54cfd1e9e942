"""Sums with a carry, for numbers longer than a register, and the clock: what a thread keeps beside its registers.

    add.cc.u32 %r1, %a0, %b0;      the low words; the carry is kept
    addc.u32   %r2, %a1, %b1;      the high words, and the carry

NVRTC writes these for 128-bit integers and for the large arguments of fp64 sines. A borrow is kept as 1, too.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from .addresses import Made
from .parse import Instruction
from .program import UNSIGNED, Step
from .semantics import find

if TYPE_CHECKING:
    from .batch import Batch
    from .decode import Decoder

__all__ = ["CLOCKS", "find_carry", "read_clock"]

CLOCKS = {"%clock", "%clock64", "%clock_hi", "%globaltimer", "%globaltimer_lo"}
_FORM = re.compile(r"(add|sub|mad)(c?)((?:\.lo|\.hi)?)((?:\.cc)?)\.([busf])(32|64)")


def find_carry(opcode: str) -> Made | None:
    """What decodes a sum that reads or keeps a carry, or None."""
    found = _FORM.fullmatch(opcode)
    return _with_carry if found and (found[2] or found[4]) else None


def _with_carry(decoder: Decoder, instruction: Instruction) -> Step:
    found = _FORM.fullmatch(instruction.opcode)
    assert found is not None
    name, reads, half, keeps, kind, bits = found.groups()
    unsigned = f"u{bits}"
    slot = decoder.target(instruction.operands[0], unsigned, instruction)[1]
    sources = [decoder.source(operand, unsigned, instruction)[1] for operand in instruction.operands[1:]]
    product = find(f"mul{half}.{'s' if kind == 's' else 'u'}{bits}") if name == "mad" else None

    def step(m: Batch, s: Any) -> None:
        a, b, *rest = (m.rows[UNSIGNED][source][s] for source in sources)
        if product is not None:
            signed = f"i{a.itemsize}" if kind == "s" else a.dtype
            a, b = product.function(a.view(signed), b.view(signed)).view(a.dtype), rest[0]
        carry = m.carry[s].astype(a.dtype) if reads else a.dtype.type(0)
        if name == "sub":
            total = a - b - carry
            over = (a < b) | ((a == b) & (carry != 0))
        else:
            total = a + b + carry
            over = (total < a) | ((total == a) & (b != 0)) if reads else total < a
        m.rows[UNSIGNED][slot][s] = total
        if keeps:
            m.carry[s] = over

    return step


def read_clock(decoder: Decoder, instruction: Instruction) -> Step:
    """``mov.u64 %rd1, %clock64``: a number that grows with each read; it says nothing of time."""
    slot = decoder.target(instruction.operands[0], instruction.opcode.split(".")[-1], instruction)[1]

    def step(m: Batch, s: Any) -> None:
        m.ticks += 1
        m.rows[UNSIGNED][slot][s] = np.uint64(m.ticks)

    return step
