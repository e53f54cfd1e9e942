"""The tile layout of ``kernels/tiles.h``, made and undone: what ``prepare_weight`` and ``restore_weight`` do.

canonical [N, K]   --- tiled ---->  tiles16: panels of sixteen rows, one stream with their scales
                   <-- untiled ---
"""

from __future__ import annotations

import math
from ctypes import CDLL

import torch
from torch import Tensor

from refq4.backend import Nested, PackedWeight, PreparedWeight
from refq4.layout import block_count, packed_bytes

from .arguments import code_struct, weight_struct
from .kernels import TILES, can_tile, checked_tiles, tile_bytes

__all__ = ["Tiles", "addressed", "as_arguments", "struct_of", "tiled", "untiled"]

PANEL = 16  # rows


class Tiles(PreparedWeight):
    """A weight that this backend laid out itself: its sizes need no check, and its addresses are looked up once."""

    tiles: int
    code: bytes  # the struct of kernels/refq4.h


def tiled(functions: CDLL, weight: PackedWeight) -> Tiles | None:
    """A weight [N, K] or [E, N, K] in tiles; None where blocks straddle rows, or a panel's rows two experts."""
    *experts, rows, k = weight.shape
    if not can_tile(k, weight.blocksize) or (experts and rows % PANEL):
        return None
    n = rows * math.prod(experts)
    tiles = torch.empty(tile_bytes(n, k, weight.blocksize), dtype=torch.uint8)
    functions.refq4_tile(struct_of(weight), n, k, tiles.data_ptr(), torch.get_num_threads())
    kept = [tiles, weight.code]
    if weight.nested is not None:  # tiles hold the scales undone; the way back needs the bytes they came from
        nested = weight.nested
        kept += [weight.absmax, nested.absmax, nested.code, nested.offset, torch.tensor(nested.blocksize)]
    prepared = PreparedWeight("cpu", TILES, tuple(kept), weight.shape, weight.blocksize, weight.quant_type)
    return _with_addresses(prepared, tiles, weight.code)


def untiled(functions: CDLL, prepared: PreparedWeight) -> PackedWeight:
    """The canonical weight back, bit for bit."""
    *rows, k = prepared.shape
    n = math.prod(rows)
    (tiles, code), kept = checked_tiles(prepared), prepared.tensors[2:]
    packed = torch.empty(packed_bytes(n * k), dtype=torch.uint8)
    absmax = kept[0] if kept else torch.empty(block_count(n * k, prepared.blocksize), dtype=torch.float32)
    functions.refq4_untile(
        tiles.data_ptr(), n, k, prepared.blocksize, packed.data_ptr(), None if kept else absmax.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    nested = Nested(kept[1], kept[2], kept[3], int(kept[4])) if kept else None
    return PackedWeight(packed, absmax, code, prepared.blocksize, prepared.shape, prepared.quant_type, nested)


def addressed(weight: PreparedWeight) -> Tiles:
    """Tiles that came as plain tensors (through an op, say): checked against their shape."""
    return _with_addresses(weight, *checked_tiles(weight))


def struct_of(weight: PackedWeight) -> bytes:
    """The ``Weight`` of a canonical one."""
    return weight_struct(weight.packed, weight.code, weight.blocksize, weight.absmax, weight.nested)


def as_arguments(weight: PackedWeight | PreparedWeight) -> tuple[str, int | None, bytes]:
    """The layout of a weight, the address of its tiles if it has any, and its ``Weight``."""
    if type(weight) is PackedWeight:
        return "canonical", None, struct_of(weight)
    known = weight if type(weight) is Tiles else addressed(weight)  # type: ignore[arg-type]
    return TILES, known.tiles, known.code


def _with_addresses(weight: PreparedWeight, tiles: Tensor, code: Tensor) -> Tiles:
    known = Tiles(*weight)
    known.tiles, known.code = tiles.data_ptr(), code_struct(code, weight.blocksize)
    return known
