"""The emulator as a processor: takes the launches that a GPU would take, and compiles their kernels to PTX.

The plan does not know the difference. It is made for an architecture (``REFQ4_CUDA_EMULATOR_ARCH``) and for the
multiprocessors of a large GPU, so that a product is split as it would be there.
"""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING

from .geometry import ARCHITECTURES, published
from .nvrtc import compile_variant

if TYPE_CHECKING:
    from .launch import Launch, Variant

__all__ = ["ARCH_VARIABLE", "Emulated", "processor"]

ARCH_VARIABLE = "REFQ4_CUDA_EMULATOR_ARCH"
_DEFAULT = 80
_MULTIPROCESSORS = 132


def processor() -> Emulated:
    """The emulator, for the architecture that the environment names.

    Raises:
        ValueError: it names none; the message lists those there are.
    """
    asked = os.environ.get(ARCH_VARIABLE, "") or str(_DEFAULT)
    if asked not in map(str, ARCHITECTURES):
        known = ", ".join(map(str, ARCHITECTURES))
        raise ValueError(f"the environment variable {ARCH_VARIABLE}={asked!r} is not an architecture; known: {known}")
    return _emulated(int(asked))


class Emulated:
    """Attributes as those of ``driver.Device``: ``arch``, ``multiprocessors``, ``limits`` and ``problem``."""

    problem = None

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.multiprocessors = _MULTIPROCESSORS
        self.limits = published(arch)
        self._ptx: dict[Variant, str] = {}

    def counters(self, tiles: int) -> int:
        """None: what a kernel reads here is a tensor."""
        return 0

    def run(self, launches: list[Launch]) -> None:
        """Run kernels, one after the other, with every check on.

        Raises:
            Whatever the emulator finds wrong in the kernel, with the instruction and the thread.
        """
        from . import emulator  # here, since it is large and a GPU never needs it

        for launch in launches:
            emulator.run(self._compiled(launch.variant), launch)

    def _compiled(self, variant: Variant) -> str:
        if variant not in self._ptx:
            self._ptx[variant] = compile_variant(variant, self.arch, "ptx").data.decode()
        return self._ptx[variant]


@cache
def _emulated(arch: int) -> Emulated:
    return Emulated(arch)
