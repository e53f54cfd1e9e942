"""How long a test waits for what must come: minutes, since a machine with other work to do is no fault of the code.

What is waited for is a condition (a process ends, an element appears), never a time that must have been enough.
"""

from __future__ import annotations

import time
from collections.abc import Callable

BUSY = 600.0  # seconds


def until(condition: Callable[[], object], what: str) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: it does not hold after ``BUSY`` seconds.
    """
    end = time.monotonic() + BUSY
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not after {BUSY:.0f} s")
        time.sleep(0.05)
