"""A grouped product in one C call: the kernel for each number of rows that an expert can have."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from refq4.backend import BackendUnsupportedError

from .calibrate import LARGEST_M

__all__ = ["NO_KERNEL", "kernels_by_rows"]

NO_KERNEL = -2  # what refq4_grouped returns where an expert has more rows than the kernel asked for takes


def kernels_by_rows(address: Callable[[int], int]) -> bytes:
    """Give ``refq4_grouped`` of ``kernels/library.c`` the kernels' addresses for 0, 1, 2 ... rows.

    Args:
        address: of the kernel for so many rows; it raises where none can serve, and the table has a zero there.
    """

    def known(rows: int) -> int:
        try:
            return address(rows)
        except BackendUnsupportedError:
            return 0

    return array("q", [known(rows) for rows in range(LARGEST_M + 1)]).tobytes()
