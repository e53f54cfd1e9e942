"""refq4's Triton backend: one file of kernels for NVIDIA's, AMD's and Intel's GPUs, run without a GPU by an emulator.

Start reading at ``kernels.py``. Importing this package imports no part of ``triton``.
"""

from .backend import TritonBackend, TritonEmulatorBackend

__all__ = ["TritonBackend", "TritonEmulatorBackend"]
