"""Whose threads the kernels run on: see ``kernels/threads.c`` for why torch's are the better ones.

``REFQ4_CPU_THREADS`` is ``torch`` (its OpenMP runtime, the default where there is one) or ``own`` (a pool of ours).
How many is torch's choice in either case: ``torch.get_num_threads()`` is read at each call.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

__all__ = ["THREADS_VARIABLE", "borrow_torch_threads"]

THREADS_VARIABLE = "REFQ4_CPU_THREADS"


def borrow_torch_threads(library: ctypes.CDLL) -> str:
    """Hand the OpenMP runtime that torch has loaded to the kernels.

    Returns:
        "torch", or "own" if there is no such runtime or the environment asks for that.

    Raises:
        ValueError: the environment variable has another value.
    """
    asked = os.environ.get(THREADS_VARIABLE, "torch")
    if asked not in ("torch", "own"):
        raise ValueError(f"the environment variable {THREADS_VARIABLE}={asked!r} is neither 'torch' nor 'own'")
    entry = _gomp_parallel() if asked == "torch" else None
    library.refq4_use_torch_threads.argtypes = [ctypes.c_void_p]
    library.refq4_use_torch_threads(entry)
    return "own" if entry is None else "torch"


def _gomp_parallel() -> int | None:
    """The address of GOMP_parallel in the runtime that torch computes with; None if it has none."""
    if "OpenMP" not in torch.__config__.parallel_info():
        return None
    core = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{'dylib' if sys.platform == 'darwin' else 'so'}"
    try:
        # Already loaded: this gives a handle, and a symbol is looked up in what it depends on, too.
        return ctypes.cast(ctypes.CDLL(str(core)).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
