"""A product for each expert in one launch: rows of x to tiles, tiles to CTAs, and what is sent where.

    offsets   0        3   3              8         rows per expert    3, 0, 5
                                                    tokens of a tile   4, where so many cost least
    tiles     (0, 0, 3)    (2, 3, 4) (2, 7, 1)      expert, first row, rows: blockIdx.z counts them

The kernels are those of single products, compiled with GROUPED (``kernels/grouped.cuh``), and ``geometry.py`` (where
experts are stored the other way round, ``gradient.py``) cuts a tile up as it would a product of its own. The list of
tiles is made on the CPU, where the core has the offsets, and copied into the stream; only experts that have rows are in
it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from refq4.backend import PackedWeight

from . import geometry, gradient
from .geometry import Limits, ceil_div, choose, grouped, published
from .launch import Launch, filled, planned_product, shape_of

__all__ = ["expert", "grouped_product", "tiles_of"]

# Tokens that a rung multiplies at a time, and what a weight then costs: instructions (python -m refq4_cuda.sass). The
# ring's 64 cost as much as twice 32, and with an expert's addresses need more registers than there are. The naive rung
# takes all rows of an expert.
_COSTS: Mapping[str, Mapping[int, float]] = {
    "ring": {8: 2.1, 16: 2.5, 32: 2.9},
    "tensor_core": {8: 8.6, 32: 10.6},
    "vectorised": {1: 8.2, 4: 13.9},
    "naive": {1 << 31: 165.0},
}
_TRANSPOSED_COSTS: Mapping[str, Mapping[int, float]] = {
    "tensor_core": {8: 7.2, 32: 8.0, 64: 9.2},
    "tiled": {32: 47.5},
}
_MOST_TILES = 65535  # gridDim.z

_pack_address = struct.Struct("P").pack


def grouped_product(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    offsets: Tensor,
    y: Tensor,
    arch: int,
    multiprocessors: int,
    rung: str | None = None,
    limits: Limits | None = None,
    transposed: bool = False,
) -> list[Launch] | None:
    """Rows offsets[e] to offsets[e + 1] of x [T, K] times the transpose of weight[e] [N, K], plus bias[e] -> y [T, N].

    Args:
        weight: of shape [E, N, K]; each expert begins with a block, of scales as well.
        bias: [E, N].
        offsets: int64 [E + 1] on the CPU.
        rung: one of ``geometry.RUNGS`` (``gradient.RUNGS``) instead of the best one.
        transposed: the weight is stored as [E, K, N].

    Returns:
        None where an expert has so many rows, on average, that decoding it and ``torch.matmul`` is faster.
    """
    planner, costs = (gradient, _TRANSPOSED_COSTS) if transposed else (geometry, _COSTS)
    bounds = offsets.tolist()
    rows = [stop - first for first, stop in pairwise(bounds) if first < stop]
    if not rows or 0 in y.shape:
        return []
    address, limits = x.data_ptr(), limits or published(arch)
    shape = shape_of(weight, x.dtype, max(rows), address % 16 == 0, transposed)
    chosen_rung = choose(rung, planner.RUNGS, planner.refuses, shape, arch, limits)
    tokens = min(cost := costs[chosen_rung], key=lambda t: cost[t] * sum(ceil_div(r, t) for r in rows))
    tiles = tiles_of(bounds, tokens)
    if len(tiles) > _MOST_TILES or (rung is None and sum(rows) > planner.CROSS_OVER[chosen_rung] * len(rows)):
        return None
    shape = shape._replace(m=min(tokens, shape.m))
    chosen = planner.plan(shape, arch, multiprocessors, chosen_rung, limits, len(tiles))
    assert chosen is not None  # a rung that is named serves any number of tokens
    one = filled(planned_product(weight, x.dtype, shape.m, chosen, transposed), x, address, bias, y)
    listed = torch.tensor(tiles, dtype=torch.int32).to(x.device, non_blocking=True)
    arguments = one.arguments + _pack_address(listed.data_ptr())  # GroupedArguments
    return [one._replace(variant=grouped(one.variant), arguments=arguments, buffers=(*one.buffers, listed))]


def tiles_of(bounds: list[int], tokens: int) -> list[tuple[int, int, int, int]]:
    """(expert, first row, rows, 0) of each tile.

    Example:
        >>> tiles_of([0, 3, 3, 8], tokens=4)
        [(0, 0, 3, 0), (2, 3, 4, 0), (2, 7, 1, 0)]
    """
    return [
        (e, row, min(tokens, stop - row), 0)
        for e, (first, stop) in enumerate(pairwise(bounds))
        for row in range(first, stop, tokens)
    ]


def expert(weight: PackedWeight, e: int) -> PackedWeight:
    """Expert ``e`` of [E, N, K] as a weight [N, K] on the same memory."""

    def part(values: Tensor) -> Tensor:
        return values.view(weight.shape[0], -1)[e]

    nested = None if weight.nested is None else weight.nested._replace(absmax=part(weight.nested.absmax))
    return weight._replace(
        packed=part(weight.packed), absmax=part(weight.absmax), shape=weight.shape[1:], nested=nested
    )
