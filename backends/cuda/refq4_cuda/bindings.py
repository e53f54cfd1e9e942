"""The door to cuda-python: its modules are imported here, when somebody asks for them, and nowhere else.

Importing refq4, or this package, imports no part of ``cuda`` and opens no library. What is missing on a machine comes
out of here as a :class:`CudaError`: one sentence with the reason and the remedy.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

__all__ = ["EXTRA", "CudaError", "nvrtc_bindings"]

EXTRA = "pip install 'refq4[cuda]' (refq4[cuda12] where torch or the driver is of CUDA 12)"


class CudaError(RuntimeError):
    """Something of CUDA is missing, too old, or failed; the message says what and what to do."""


@cache
def nvrtc_bindings() -> ModuleType:
    """``cuda.bindings.nvrtc``, with NVRTC itself loaded.

    Raises:
        CudaError: one of the two is not installed.
    """
    nvrtc = import_bindings("nvrtc")
    try:
        nvrtc.nvrtcVersion()  # cuda-python opens the library at the first call
    except Exception as error:
        raise CudaError(
            f"cuda-python is installed, but NVRTC, which compiles the kernels, was not found "
            f"({_first_line(error)}): {EXTRA}"
        ) from error
    return nvrtc


def import_bindings(name: str) -> ModuleType:
    """``cuda.bindings.NAME``.

    Raises:
        CudaError: cuda-python is not installed, or is damaged.
    """
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise CudaError(f"cuda-python is not installed ({_first_line(error)}): {EXTRA}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
