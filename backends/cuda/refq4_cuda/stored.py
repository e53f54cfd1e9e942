"""The backend's own form of a weight: the bytes as they are stored, with the arguments of their launches beside them.

Nothing is copied and nothing rearranged. A weight that was checked once need not be checked in each call, and what a
product's argument says of it is packed once for each number of tokens:

    StoredWeight.tensors     packed, absmax, code, and of nested scales their absmax, code and offset: what it reads
                .products    (tokens, dtype, alignment, processor) --> Product: a plan, and the bytes that stay
    a call                   x, bias, y and the room for sums go into the bytes; nothing else is done

A product that several threads meet first is made by each of them, and is the same. No tensor of a call is kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from refq4.backend import BackendUnsupportedError, Nested, PackedWeight, PreparedWeight
from refq4.layout import block_count, packed_bytes

from .launch import Launch, Product, filled, product_of

__all__ = ["LAYOUT", "StoredWeight", "packed_again", "product", "stored"]

LAYOUT = "stored"  # with nested scales, their blocksize follows: "stored, scales in blocks of 256"
_NESTED = ", scales in blocks of "
_MOST_PRODUCTS = 256
_address = Tensor.data_ptr


class StoredWeight(PreparedWeight):
    """A weight as the kernels read it; ``addresses`` is where its tensors were when ``products`` were made."""

    weight: PackedWeight
    addresses: tuple[int, ...]
    products: dict[Any, Product | None]


def stored(backend: str, weight: PackedWeight) -> StoredWeight:
    """Of a canonical weight [N, K]; the memory is shared."""
    nested, layout = weight.nested, LAYOUT
    tensors: tuple[Tensor, ...] = (weight.packed, weight.absmax, weight.code)
    if nested is not None:
        tensors, layout = (*tensors, nested.absmax, nested.code, nested.offset), f"{layout}{_NESTED}{nested.blocksize}"
    made = StoredWeight(backend, layout, tensors, weight.shape, weight.blocksize, weight.quant_type)
    made.weight, made.addresses, made.products = weight, tuple(map(_address, tensors)), {}
    return made


def packed_again(prepared: PackedWeight | PreparedWeight) -> PackedWeight:
    """Give the canonical weight, as it is or of a prepared one, which may have come through an op as bare tensors.

    Raises:
        BackendUnsupportedError: it is in the layout of another backend.
        ValueError: a tensor is not what the sizes want: the kernels read them by address.
    """
    if isinstance(prepared, PackedWeight):
        return prepared
    if isinstance(prepared, StoredWeight):
        return prepared.weight
    name, _, nested_blocksize = prepared.layout.partition(_NESTED)
    if name != LAYOUT or not (nested_blocksize.isdecimal() or nested_blocksize == ""):
        raise BackendUnsupportedError(f"backend 'cuda' reads the layouts canonical and stored, not {prepared.layout!r}")
    numel, second = math.prod(prepared.shape), int(nested_blocksize or 0)
    blocks = block_count(numel, prepared.blocksize)
    wanted = [(packed_bytes(numel), torch.uint8), (blocks, torch.uint8 if second else torch.float32)]
    wanted += [(16, torch.float32)]
    if second:
        wanted += [(block_count(blocks, second), torch.float32), (256, torch.float32), (1, torch.float32)]
    found = [(t.numel(), t.dtype) for t in prepared.tensors]
    devices = {t.device for t in prepared.tensors}
    readable = all(t.is_contiguous() and (t.data_ptr() or not t.numel()) for t in prepared.tensors)
    if found != wanted or len(devices) != 1 or not readable:
        raise ValueError(
            f"a weight {list(prepared.shape)} in the layout {prepared.layout!r} has tensors of {wanted} on one device, "
            f"got {found} on {', '.join(map(str, devices))}"
        )
    packed, absmax, code, *rest = prepared.tensors
    nested = Nested(rest[0], rest[1], rest[2], second) if rest else None
    return PackedWeight(packed, absmax, code, prepared.blocksize, prepared.shape, prepared.quant_type, nested)


def product(x: Tensor, weight: StoredWeight, bias: Tensor | None, y: Tensor, processor: Any) -> list[Launch] | None:
    """As ``launch.product``, from what was made at the first call with as many tokens.

    Raises:
        ValueError: a tensor of the weight has no memory any more, or not as much as the weight needs.
    """
    addresses = tuple(map(_address, weight.tensors))
    if addresses != weight.addresses:  # a storage was freed, and perhaps allocated again, or ``.data`` was set
        if addresses[0] == 0:
            raise ValueError("the packed weight has no memory: its storage was freed")
        packed_again(PreparedWeight(*weight))  # as bare tensors: their sizes are checked
        weight.products, weight.addresses = {}, addresses
    x_address, products = x.data_ptr(), weight.products
    key = (x.shape[0], x.dtype, x_address % 16, processor)
    try:
        made = products[key]
    except KeyError:
        if len(products) >= _MOST_PRODUCTS:
            products.clear()
        made = products[key] = product_of(
            weight.weight, x.dtype, x.shape[0], x_address % 16 == 0, processor.arch, processor.multiprocessors,
            limits=processor.limits,
        )  # fmt: skip
    return None if made is None else [filled(made, x, x_address, bias, y, processor.counters)]
