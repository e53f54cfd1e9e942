"""Processes whose coverage nobody needs: measuring one adds a third to its time.

A notebook, the site's generator, the kernels under a sanitizer: what they run of refq4 the ordinary tests run, too.
Where this can't be said (the command line), a process is measured.
"""

from __future__ import annotations

import os

VARIABLE = "COVERAGE_PROCESS_CONFIG"  # what coverage starts by in a new process


def environment() -> dict[str, str]:
    """This process's environment, for one that is not to be measured."""
    return {name: value for name, value in os.environ.items() if name != VARIABLE}
