"""python -m refq4 bench: how fast, next to what people use today, and how far from what the machine can do.

Peers are interleaved: each round takes each of them once through several layers whose weights together don't fit the
last-level cache, one after the other as in a model, and the medians of many rounds are compared. So a slow moment of
the machine hits all of them, and no one is timed on a cached weight. The Python calls are included; users wait for
them, too.

    limits      main memory read, fp32 multiply-add, bf16 dot product: measured first, in the same process
    products    shape x M: milliseconds and how many times faster a refq4 layer is than each peer
    ops         quantise, dequantise, rearrange; a call on a 64 x 64 layer

With ``--device cuda`` the same on a GPU, by its own clock, launched from Python and replayed from a CUDA graph.

Files: ``peers`` and ``ggml`` (who is measured), ``measure`` and ``gpu`` (how), ``show`` (tables), ``plot`` (pictures),
``command``.
Not here: correctness, which is ``python -m refq4 verify``.
"""

from .command import bench

__all__ = ["bench"]
