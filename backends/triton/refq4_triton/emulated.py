"""Triton kernels without a GPU: compiled to PTX for a GPU that is not there, and run by the emulator on CPU tensors.

    kernel, arguments  --->  signature  --->  triton.compile  --->  PTX  --->  refq4_cuda.emulator.run_ptx

This is the one place where a backend uses another package of refq4: the emulator takes anybody's PTX, and is no part of
the CUDA backend's own work. What the launcher of Triton notes of a launch is noted here as well: the types of the
arguments, which of them are None, and which pointers are multiples of 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import triton
from refq4_cuda.emulator import run_ptx
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import kernels

__all__ = ["ARCH", "TARGETS", "compiled", "run"]

ARCH = 80
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "uint8": "u8"}


def run(name: str, grid: tuple[int, ...], args: Sequence[Tensor | int | None], tile: dict[str, int]) -> None:
    """Run a kernel of ``kernels.py`` on CPU tensors, with every check of the emulator.

    Raises:
        EmulatorError: the kernel does something that it must not.
    """
    made = compiled(name, *described(args), tuple(tile.items()))
    given = [arg for arg in args if arg is not None]
    scratch = [0] * 2  # Triton's own two parameters, which plain kernels do not use
    threads = made.metadata.num_warps * 32
    blocks = (*grid, 1, 1)[:3]
    run_ptx(made.asm["ptx"], name, blocks, (threads, 1, 1), [*given, *scratch], shared=made.metadata.shared)


def described(args: Sequence[Tensor | int | None]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The types of arguments as Triton writes them, and the positions of pointers that are multiples of 16."""
    types, aligned = [], []
    for i, arg in enumerate(args):
        if isinstance(arg, Tensor):
            types.append("*" + _TYPES[str(arg.dtype).removeprefix("torch.")])
            if arg.data_ptr() % 16 == 0:
                aligned.append(i)
        else:
            types.append("constexpr" if arg is None else "i32")
    return tuple(types), tuple(aligned)


@cache
def compiled(
    name: str,
    types: tuple[str, ...],
    aligned: tuple[int, ...],
    tile: tuple[tuple[str, int], ...],
    target: str = "sm_80",
) -> Any:
    """A kernel for one of ``TARGETS``: ``.asm`` has its PTX, or its binary for AMD (``hsaco``)."""
    function = getattr(kernels, name)
    signature = dict(zip(function.arg_names, types, strict=False))
    signature |= dict.fromkeys(dict(tile), "constexpr")
    constants = dict.fromkeys((n for n, kind in signature.items() if kind == "constexpr"), None) | dict(tile)
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options={"num_warps": 4, "enable_fp_fusion": False})
