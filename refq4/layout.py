"""Where the codes of a weight are in memory.

Everything is *flat*: a weight of any shape is read in row-major order, and element i has a place that depends on i
alone. That is why blocks may straddle rows when the row length is not a multiple of the blocksize.

    element        0     1     2     3     4     5    ...   n-1
                 +-----------+-----------+-----------+     +-----------+
    byte         |     0     |     1     |     2     | ... | (n-1)//2  |      packed: uint8 [(n+1)//2]
                 +-----------+-----------+-----------+     +-----------+
    bits          7..4  3..0  7..4  3..0                    the FIRST element of a pair is in the HIGH nibble
                 |<------------ blocksize elements ------------>|<---- next block ...
    absmax       |                   0                          |   1   ...   fp32 [ceil(n/blocksize)]

If n is odd, the last low nibble holds the code of 0.0.

The bytes may be stored under another dtype (``quant_storage``), which changes no bit: FSDP needs one dtype for all
parameters of a model, so it sees the bytes of two or four pairs as one bf16, fp16 or fp32 number.

    uint8  [ceil(n/2), 1]         bf16, fp16  [ceil(n/4), 1]         fp32  [ceil(n/8), 1]      zero bytes fill up
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["STORAGE_DTYPES", "block_count", "from_storage", "pack", "packed_bytes", "to_storage", "unpack"]

STORAGE_DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
"""What the packed bytes may be stored under.

Example:
    >>> [dtype.itemsize for dtype in STORAGE_DTYPES]
    [1, 2, 2, 4]
"""


def packed_bytes(numel: int) -> int:
    """Return the number of bytes that ``numel`` codes take.

    Example:
        >>> packed_bytes(64), packed_bytes(65)
        (32, 33)
    """
    return (numel + 1) // 2


def block_count(numel: int, blocksize: int) -> int:
    """Return the number of blocks of ``blocksize`` elements; the last one may be short.

    Example:
        >>> block_count(128, 64), block_count(129, 64)
        (2, 3)
    """
    return -(-numel // blocksize)


def pack(codes: Tensor, pad_code: int) -> Tensor:
    """Pack two codes into each byte, the first in the high nibble.

    Args:
        codes: uint8 [n], each below 16.
        pad_code: the code for the last low nibble if n is odd.

    Returns:
        uint8 [(n+1)//2].

    Example:
        >>> [hex(b) for b in pack(torch.tensor([1, 2, 15], dtype=torch.uint8), pad_code=7).tolist()]
        ['0x12', '0xf7']
    """
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), pad_code)])
    return (codes[0::2] << 4) | codes[1::2]


def unpack(packed: Tensor, numel: int) -> Tensor:
    """Return the codes in the bytes.

    Args:
        packed: uint8 [(numel+1)//2].

    Returns:
        uint8 [numel].

    Example:
        >>> unpack(torch.tensor([0x12, 0xF7], dtype=torch.uint8), 3).tolist()
        [1, 2, 15]
    """
    return torch.stack([packed >> 4, packed & 0xF], dim=1).reshape(-1)[:numel]


def to_storage(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bytes under a storage dtype, as the column that a state dict holds.

    Args:
        packed: uint8 [n].
        dtype: one of :data:`STORAGE_DTYPES`.

    Returns:
        ``dtype`` [ceil(n / itemsize), 1].

    Example:
        >>> to_storage(torch.zeros(6, dtype=torch.uint8), torch.float32).shape
        torch.Size([2, 1])
    """
    missing = -packed.numel() % dtype.itemsize
    if missing:
        packed = torch.cat([packed, packed.new_zeros(missing)])
    return packed.view(dtype).unsqueeze(1)


def from_storage(stored: Tensor, numel: int) -> Tensor:
    """Return the flat bytes of ``numel`` codes, stored in any dtype and orientation.

    Args:
        stored: any storage dtype, [b, 1], its transpose [1, b], or any other shape; contiguous or not.

    Returns:
        uint8 [(numel+1)//2], a view where the memory allows it.

    Example:
        >>> stored = to_storage(torch.tensor([1, 2, 3], dtype=torch.uint8), torch.float32)
        >>> stored.shape, from_storage(stored, 5).tolist()
        (torch.Size([1, 1]), [1, 2, 3])
    """
    flat = stored.reshape(-1)  # vmap of torch 2.8 stops at any view(dtype)
    return (flat if flat.dtype is torch.uint8 else flat.view(torch.uint8))[: packed_bytes(numel)]
