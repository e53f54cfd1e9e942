"""The whole 4-bit layer in Triton: quantise, decode, multiply. Read from top to bottom; what a step does is said once.

    packed bytes      | e0 e1 | e2 e3 | ...        element e is in byte e // 2, the first one in the high nibble
    absmax            | block 0: e0 ... e63 | ...  element e has scale e // blocksize, whatever the rows are
    decoded           code[nibble] * absmax        in fp32, rounded once to the wanted dtype

A kernel in Triton is written for one *program*: a tile of the result. Triton spreads the tile over threads, and
decides on registers, shared memory, tensor cores. What it must not decide is rounding: every kernel is compiled with
``enable_fp_fusion=False``, so that a product and a sum are two roundings, and divides with ``div_rn``, since ``/`` is
an approximation on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)


# --- decoding ---------------------------------------------------------------------------------------------------------


@triton.jit
def scale_of(block, mask, absmax, nested_absmax, nested_code, nested_offset, nested_blocksize):
    """The fp32 scale of each block; with double quantisation code256[q] * absmax2[block // blocksize2] + offset."""
    if nested_absmax is None:
        scale = tl.load(absmax + block, mask=mask, other=0.0)
    else:
        q = tl.load(absmax + block, mask=mask, other=0).to(tl.int32)
        coarse = tl.load(nested_absmax + block // nested_blocksize, mask=mask, other=0.0)
        scale = tl.load(nested_code + q, mask=mask, other=0.0) * coarse + tl.load(nested_offset)
    return scale


@triton.jit
def decoded(
    element, mask, packed, code, absmax, blocksize, nested_absmax, nested_code, nested_offset, nested_blocksize
):
    """The fp32 values of elements, wherever they stand in the weight."""
    byte = tl.load(packed + element // 2, mask=mask, other=0).to(tl.int32)
    nibble = tl.where(element % 2 == 0, byte >> 4, byte & 15)
    scale = scale_of(element // blocksize, mask, absmax, nested_absmax, nested_code, nested_offset, nested_blocksize)
    return tl.load(code + nibble, mask=mask, other=0.0) * scale


@triton.jit
def dequantize(
    out, numel, packed, code, absmax, blocksize, nested_absmax, nested_code, nested_offset, nested_blocksize,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of a 4-bit weight per program."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = element < numel
    value = decoded(
        element, mask, packed, code, absmax, blocksize, nested_absmax, nested_code, nested_offset, nested_blocksize
    )
    tl.store(out + element, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def dequantize_bytes(out, numel, q, code, length, absmax, blocksize, BLOCK: tl.constexpr):
    """The 8-bit stage: one code a byte; a code that the table does not have decodes to zero."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = element < numel
    index = tl.load(q + element, mask=mask, other=0).to(tl.int32)
    scale = tl.load(absmax + element // blocksize, mask=mask, other=0.0)
    value = tl.load(code + index, mask=mask & (index < length), other=0.0) * scale
    tl.store(out + element, value.to(out.dtype.element_ty), mask=mask)


# --- quantising -------------------------------------------------------------------------------------------------------


@triton.jit
def block_absmax(absmax, x, numel, blocksize, CHUNK: tl.constexpr):
    """The largest magnitude of one block per program.

    Magnitudes order like their bits, and a NaN's bits are above infinity's: an integer maximum keeps a NaN.
    """
    first = tl.program_id(0) * blocksize
    most = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, blocksize, CHUNK):
        i = start + tl.arange(0, CHUNK)
        value = tl.load(x + first + i, mask=(i < blocksize) & (first + i < numel), other=0.0).to(tl.float32)
        most = tl.maximum(most, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(absmax + tl.program_id(0), tl.max(most, 0).to(tl.float32, bitcast=True))


@triton.jit
def code_of(element, mask, x, absmax, blocksize, thresholds, order, length, LEVELS: tl.constexpr):
    """The code of each element: how many thresholds lie below the scaled value, looked up in ``order``.

    scaled = clamp(x * (1 / absmax), -1, 1), and 0 * x where 1 / absmax is not finite. A NaN stays one: rank 0.
    """
    largest = tl.load(absmax + element // blocksize, mask=mask, other=1.0)
    inverse = tl.div_rn(tl.full(largest.shape, 1.0, tl.float32), largest)
    inverse = tl.where(tl.abs(inverse) <= LARGEST, inverse, 0.0)
    scaled = tl.load(x + element, mask=mask, other=0.0).to(tl.float32) * inverse
    scaled = tl.where(scaled < -1.0, -1.0, tl.where(scaled > 1.0, 1.0, scaled))
    rank = tl.zeros(element.shape, tl.int32)
    for level in tl.static_range(LEVELS):  # 8, 4, 2, 1 for sixteen codes
        further = rank + (1 << (LEVELS - 1 - level))
        there = mask & (further < length)
        below = tl.load(thresholds + further - 1, mask=there, other=0.0) < scaled
        rank = tl.where(there & below, further, rank)
    return tl.load(order + rank, mask=mask, other=0).to(tl.int32)


@triton.jit
def block_codes(
    out, x, numel, absmax, blocksize, thresholds, order, length, pad,
    PACKED: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK bytes of codes per program: one code a byte, or two; an odd last one is padded with the code of 0."""
    byte = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PACKED:
        high, low = byte * 2, byte * 2 + 1
        upper = code_of(high, high < numel, x, absmax, blocksize, thresholds, order, length, LEVELS)
        lower = code_of(low, low < numel, x, absmax, blocksize, thresholds, order, length, LEVELS)
        value = upper << 4 | tl.where(low < numel, lower, pad)
        mask = high < numel
    else:
        mask = byte < numel
        value = code_of(byte, mask, x, absmax, blocksize, thresholds, order, length, LEVELS)
    tl.store(out + byte, value.to(tl.uint8), mask=mask)


# --- products ---------------------------------------------------------------------------------------------------------


@triton.jit
def gemv(
    y, x, bias, N, K, packed, code, absmax, blocksize, nested_absmax, nested_code, nested_offset, nested_blocksize,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One token: BN outputs per program. The weight is read once, and nothing is read twice, so memory is the limit.

             K
    x   [ ........ ]                     y[n] = sum over k of x[k] * w[n, k] + bias[n]
    w   [ ........ ]  BN rows, BK columns at a time; BN x BK sums run side by side, and meet at the end
    """
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    sums = tl.zeros((BN, BK), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        mask = (row < N)[:, None] & (k < K)[None, :]
        w = decoded(
            row[:, None] * K + k[None, :], mask, packed, code, absmax, blocksize,
            nested_absmax, nested_code, nested_offset, nested_blocksize,
        )  # fmt: skip
        token = tl.load(x + k, mask=k < K, other=0.0)
        sums += w.to(token.dtype).to(tl.float32) * token.to(tl.float32)[None, :]
    total = tl.sum(sums, 1)
    if bias is not None:
        total += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
    tl.store(y + row, total.to(y.dtype.element_ty), mask=row < N)


@triton.jit
def gemm(
    y, x, bias, M, N, K, packed, code, absmax, blocksize, nested_absmax, nested_code, nested_offset, nested_blocksize,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Several tokens: BM x BN outputs per program, through tensor cores for fp16 and bf16.

              BK                    BN
        BM [ tokens ]  x   BK [ weights, transposed ]   ->   BM [ a partial sum, added to the total in fp32 ]

    fp32 is multiplied as fp32 ("ieee"), not as TF32. Each tile's sum starts from zero, and what is rounded off when it
    is added to the total is kept and added at the end: so the error grows with BK, not with K.
    """
    token, row = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    sums, lost = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        mask = (k < K)[:, None] & (row < N)[None, :]
        w = decoded(
            row[None, :] * K + k[:, None], mask, packed, code, absmax, blocksize,
            nested_absmax, nested_code, nested_offset, nested_blocksize,
        )  # fmt: skip
        a = tl.load(x + token[:, None] * K + k[None, :], mask=(token < M)[:, None] & (k < K)[None, :], other=0.0)
        part = tl.dot(a, w.to(a.dtype), input_precision="ieee")
        total = sums + part
        rounded = part - (total - sums)
        lost += tl.where(tl.abs(rounded) < float("inf"), rounded, 0.0)  # of an infinity nothing is lost
        sums = total
    sums += lost
    if bias is not None:
        sums += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[None, :]
    place = token[:, None] * N + row[None, :]
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=(token < M)[:, None] & (row < N)[None, :])
