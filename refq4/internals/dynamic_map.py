"""The 256 values of the 8-bit stage: bitsandbytes' dynamic map.

Double quantisation stores the scales of a weight with it. ``refq4/codebooks.py``, which has the sixteen-value codes and
the rule that picks a value, is where :func:`create_dynamic_map` is imported from.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["create_dynamic_map", "stored_dynamic_maps"]


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """The 8-bit dynamic map: 256 fp32 values dense near 0 and near 1 alike.

    A *dynamic* exponent: the zeros in front of the first set bit count decades, what is left after that bit is a
    linear fraction. Small decades get few bits, the top decade gets the most.

        sign  0 0 0 1 f f f     ->  10**-3 * fraction, the fraction linear in (0.1, 1) with 2**3 steps

    Mirrors ``create_dynamic_map`` of bitsandbytes; Dettmers, "8-Bit Approximations for Parallelism in Deep
    Learning", 2016.

    Args:
        signed: spend one bit on the sign.
        max_exponent_bits: the number of decades.
        total_bits: bits per value; fewer than 8 leave the rest of the 256 entries at 0.

    Returns:
        fp32 [256], ascending.

    Example:
        >>> m = create_dynamic_map()
        >>> m.shape, round(float(m[0]), 4), float(m[-1]), float(m[127])
        (torch.Size([256]), -0.993, 1.0, 0.0)
    """
    usual = (signed, max_exponent_bits, total_bits) == (True, 7, 8)
    values = _USUAL_DYNAMIC_MAP if usual else _dynamic_map_values(signed, max_exponent_bits, total_bits)
    return torch.tensor(values, dtype=torch.float32)


def _dynamic_map_values(signed: bool, max_exponent_bits: int, total_bits: int) -> tuple[float, ...]:
    spare_bits = total_bits - 1 - max_exponent_bits
    if not 2 <= total_bits <= 8 or max_exponent_bits < 1 or spare_bits < 0:
        raise ValueError(
            f"a dynamic map needs 2 <= total_bits <= 8 and 1 <= max_exponent_bits < total_bits, "
            f"got total_bits={total_bits}, max_exponent_bits={max_exponent_bits}"
        )
    # (decade, linear steps): the last entry holds what is left when spare bits leave the all-zero pattern room.
    decades = [(e - max_exponent_bits + 1, 2 ** (e + spare_bits + (not signed))) for e in range(max_exponent_bits)]
    decades.append((0, 2**spare_bits - 1))
    values = [0.0, 1.0]
    for decade, steps in decades:
        edges = torch.linspace(0.1, 1, steps + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        values += (10**decade * means).tolist()
        if signed:
            values += (-(10**decade) * means).tolist()
    return tuple(sorted([*values, *[0.0] * (256 - len(values))]))


_USUAL_DYNAMIC_MAP = _dynamic_map_values(True, 7, 8)  # a constant, so that torch.compile sees one


def stored_dynamic_maps() -> tuple[Tensor, Tensor]:
    """The map, and what nested checkpoints hold that bitsandbytes up to 0.49 wrote on a CPU: its first entry is -1."""
    table = create_dynamic_map()
    old = table.clone()
    old[0] = -1.0
    return table, old
