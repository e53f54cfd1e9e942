"""The CUDA kernels as host C++ on fibers: for gdb, sanitizers, and odd schedules. Needs neither a GPU nor NVRTC.

    python -m refq4_cuda.host --help

    kernels/*.cu --- g++ ---> a program that replays one launch, one block at a time, one fiber per CUDA thread
                                 |
                                 |-- a schedule seed      in which order threads run between barriers
                                 |-- ThreadSanitizer      only barriers order threads: a missing one is a data race
                                 |-- AddressSanitizer     every buffer and shared array has an end; UBSan: alignment
                                 '-- gdb                  break gemm_ring if threadIdx.x == 37

What it is not: the code that a GPU runs. PTX, contraction of multiply-adds, register allocation and memory order
between blocks are the compiler's and the hardware's; the emulator (``refq4_cuda/emulator``) interprets the real PTX.
"""

from .backend import Fibers, HostBackend
from .build import HostError, kernel_sources, unavailable
from .run import debug, run

__all__ = ["Fibers", "HostBackend", "HostError", "debug", "kernel_sources", "run", "unavailable"]
