"""Reading ahead: the next piece comes from the disk, in a thread of its own, while the last one is being worked on.

    this thread     wait for 0 | work on 0 | work on 1 | work on 2 ...
    the other one      read 0  |  read 1   |  read 2   |  read 3 ...

One piece ahead and no more, so that two buffers that take turns are enough. The other thread reads and does nothing
else: neither the choice of a backend (a context variable) nor a file that is written ever meets it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

__all__ = ["read_ahead"]

T = TypeVar("T")


def read_ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items, each taken from the iterator while the caller still works on the one before.

    What the iterator raises is raised here, at the item in question. Closing the generator, or an error or interrupt
    that ends it, waits for the item that is being read: afterwards nobody reads any more.

    Example:
        >>> list(read_ahead(iter([1, 2, 3])))
        [1, 2, 3]
    """
    with ThreadPoolExecutor(1, "refq4 reads ahead") as reader:
        coming = reader.submit(_take, items)
        while found := coming.result():
            coming = reader.submit(_take, items)
            yield found[0]


def _take(items: Iterator[T]) -> list[T]:
    """The next item, or nothing."""
    return list(islice(items, 1))
