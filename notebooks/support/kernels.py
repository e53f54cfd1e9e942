"""The inner loops of the kernels, taken from their sources: for the notebooks, and for the pages about kernels.

An excerpt begins at the one line that holds its first words, and is so many lines long. ``lines`` raises where a source
has moved on; ``tests/docs/test_pages.py`` asks that each is whole (its braces close) and short.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from IPython.display import Markdown

__all__ = ["CPU", "CUDA", "EXCERPTS", "Excerpt", "lines", "path_of", "picture_of_tiles", "show"]

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("backends/cpu/refq4_cpu/kernels", "backends/cuda/refq4_cuda/kernels")


class Excerpt(NamedTuple):
    """Where an excerpt begins, its length, and what it does, in a sentence."""

    first: str
    count: int
    does: str


CPU = {
    "gemv_4bit_1_scalar.c": Excerpt(
        "for (int64_t k = 0; k < p->K; k++) {",
        5,
        "One weight after the other: take the code, look it up, scale it, multiply.",
    ),
    "gemm_4bit_1_scalar.c": Excerpt(
        "static void decode_row(", 7, "A row is decoded once, block by block; every token uses it."
    ),
    "gemm_4bit_2_avx2.c": Excerpt(
        "__m256 avx2_lookup(",
        5,
        "Eight outputs: shift the code down, look it up in both halves of the table, and let its top bit choose.",
    ),
    "gemm_4bit_3_avx2_bytes.c": Excerpt(
        "void byte_lookup(",
        8,
        "Thirty-two look-ups with two instructions: the upper bytes of bf16 values, and the lower ones, side by side.",
    ),
    "gemm_4bit_3_avx512.c": Excerpt(
        "UNROLL for (int s = 0; s < 8; s++) {",
        9,
        "Sixteen outputs: one shift, one look-up, and a multiply-add for each token.",
    ),
    "gemm_4bit_5_avx512_bf16_blocked.c": Excerpt(
        "static inline void decode_group",
        4,
        "Eight codes of sixteen rows become registers of four steps, once for all tokens.",
    ),
    "gemm_4bit_4_avx512_bf16.c": Excerpt(
        "UNROLL for (int s = 0; s < 4; s++) {",
        9,
        "The same with pairs of bf16: one look-up gives 32 weights, one vdpbf16ps uses them.",
    ),
    "gemm_4bit_4_avx2_blocked.c": Excerpt(
        "for (const float *stop = w + part * PANEL",
        8,
        "A plain fp32 product, of a piece that was decoded into the L1 cache.",
    ),
    "gemv_4bit_2_avx2.c": Excerpt(
        "__m256 chunk_sum_avx2(", 11, "One token on the stored bytes: 64 weights of a row, along K."
    ),
    "gemm_4bit_2_neon.c": Excerpt(
        "UNROLL for (int low = 0; low < 2; low++) {",
        10,
        "NEON: sixteen look-ups of bytes, put together to four weights of four rows each.",
    ),
    "gemv_4bit_2_neon.c": Excerpt(
        "UNROLL for (int low = 0; low < 2; low++) {", 5, "The same along a row, on the stored bytes."
    ),
    "gemm_4bit_3_neon_fhm.c": Excerpt(
        "for (int r = 0; r < 4; r += 2) {",
        5,
        "Weights as fp16: fmlal multiplies the lower four, fmlal2 the upper four.",
    ),
    "gemv_4bit_3_neon_fhm.c": Excerpt("UNROLL for (int low = 0; low < 2; low++) {", 10, "The same along a row."),
    "gemm_4bit_3_neon_bf16.c": Excerpt(
        "UNROLL for (int p = 0; p < (MT + 1) / 2; p++) {", 12, "bfmmla: two rows by two tokens, four k deep."
    ),
    "gemv_4bit_3_neon_bf16.c": Excerpt(
        "UNROLL for (int low = 0; low < 2; low++) {", 7, "bfdot: pairs of bf16, as zip leaves them."
    ),
}
CUDA = {
    "gemv_4bit_1_naive.cu": Excerpt(
        "for (i64 k = lane; k < p.K; k += 32) {", 6, "A lane takes every 32nd weight: its block, its scale, its code."
    ),
    "gemv_4bit_2_vectorised.cu": Excerpt(
        "for (int j = 0; j < 8; j++) w[j] =",
        8,
        "Eight codes of a word are looked up in shared memory and used for each token.",
    ),
    "gemm_4bit_3_tensor_core.cu": Excerpt(
        "for (int j = 0; j < 2; j++) {", 6, "A byte is looked up as a pair, which is a register of the fragment."
    ),
    "gemm_4bit_4_ring.cu": Excerpt(
        "DEVICE u32 look_up(const u8 *table",
        3,
        "The address of an entry is put together from the byte and the lane, by one prmt.",
    ),
}
EXCERPTS = CPU | CUDA


def path_of(file: str) -> str:
    """Where a kernel's file lies, from the top of the repository."""
    (folder,) = (folder for folder in FOLDERS if (ROOT / folder / file).exists())
    return f"{folder}/{file}"


def lines(file: str) -> str:
    """The excerpt of a kernel's file.

    Raises:
        ValueError: the line with which it begins is not there, or not there once.
    """
    first, count, _ = EXCERPTS[file]
    every = (ROOT / path_of(file)).read_text().splitlines()
    starts = [number for number, line in enumerate(every) if first in line]
    if len(starts) != 1:
        raise ValueError(f"{file} has moved on: {first!r} stands there {len(starts)} times")
    chosen = every[starts[0] : starts[0] + count]
    margin = min(len(line) - len(line.lstrip()) for line in chosen if line[0] != "#")
    return "\n".join(line if line[0] == "#" else line[margin:] for line in chosen)


def picture_of_tiles() -> str:
    """The layout of tiles, as the comment at the top of tiles.h draws it."""
    comment = (ROOT / path_of("tiles.h")).read_text().partition("*/")[0].splitlines()
    stripped = [line.removeprefix(" *").removeprefix(" ") for line in comment]
    start = next(i for i, line in enumerate(stripped) if line.startswith("    panel p"))
    stop = next(i for i, line in enumerate(stripped) if line.startswith("    tiles "))
    return textwrap.dedent("\n".join(stripped[start : stop + 1]))


def show(file: str) -> Markdown:
    """The excerpt as the end of a cell shows it, with its sentence and the name of the file."""
    from IPython.display import Markdown

    return Markdown(f"`{file}`: {EXCERPTS[file].does}\n\n```c\n{lines(file)}\n```")
