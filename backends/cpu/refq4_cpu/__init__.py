"""refq4's CPU backend: 4-bit kernels in C, compiled on first use. Start reading at ``kernels/gemv_4bit_1_scalar.c``."""

from .backend import CpuBackend

__all__ = ["CpuBackend"]
