"""A grouped product in one C call: which kernel serves the rows of each expert, and where they are.

offsets   0 3 3 4 9            groups   (kernel for 3 rows, expert 0, first row 0, 3 rows)
experts    e0 e1 e2 e3                  (kernel for 1 row,  expert 2, first row 3, 1 row)
                                        (kernel for 5 rows, expert 3, first row 4, 5 rows)
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

__all__ = ["groups"]


def groups(offsets: Tensor, kernel_for: Callable[[int], int]) -> tuple[bytes, int]:
    """The ``Group`` structs of ``kernels/library.c`` for the experts that have rows, and how many there are.

    Args:
        offsets: int64 [E + 1].
        kernel_for: the address of the kernel for a number of rows.
    """
    words = array("q")
    for expert, (first, stop) in enumerate(pairwise(offsets.tolist())):
        if first < stop:
            words.extend((kernel_for(stop - first), expert, first, stop - first))
    return words.tobytes(), len(words) // 4
