"""Threads for tests: run side by side to their end, while another goes on; what goes wrong in any of them is kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable


def faults_of(jobs: Iterable[Callable[[], None]], meanwhile: Callable[[threading.Event], None]) -> list[Exception]:
    """What the jobs, each in a thread of its own, and ``meanwhile``, in one more, raised; a failed assertion, too.

    Args:
        jobs: each is called once.
        meanwhile: is called once, with an event that is set when the last of the jobs has ended: then it returns.
    """
    faults: list[Exception] = []
    done = threading.Event()

    def kept(job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:
            faults.append(error)

    beside = threading.Thread(target=kept, args=(lambda: meanwhile(done),))
    threads = [threading.Thread(target=kept, args=(job,)) for job in jobs]
    for thread in (beside, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    beside.join()
    return faults
