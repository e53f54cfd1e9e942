"""refq4's CUDA backend: kernels in CUDA C++, compiled on first use, and run without a GPU by an emulator.

Start reading at ``kernels/gemv_4bit_1_naive.cu``. Importing this package imports no part of ``cuda``.
"""

from .backend import CudaBackend, CudaEmulatorBackend

__all__ = ["CudaBackend", "CudaEmulatorBackend"]
