"""The fibers as something that runs plans, so that every check of ``refq4.testing`` can be asked of them.

It is a debugger and no engine: nobody but ``python -m refq4_cuda.host`` and the tests registers it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from ..backend import PlannedBackend
from ..launch import Launch
from .build import unavailable
from .run import debug, run

__all__ = ["Fibers", "HostBackend"]


class Fibers:
    """A processor: launches go to :func:`refq4_cuda.host.run`.

    Args:
        arch: the compute capability that launches are planned and compiled for.
        seed: the order of threads and blocks.
        mode: how the kernel is compiled; see ``build.MODES``. "debug" opens gdb.
        sources: the kernels' files by name instead of those of the package.
        multiprocessors: how many the imagined GPU has: a product is split to fill them.
        verbose: print a line per launch.
    """

    def __init__(
        self,
        arch: int = 80,
        seed: int = 0,
        mode: str = "plain",
        *,
        sources: Mapping[str, str] | None = None,
        multiprocessors: int = 132,
        verbose: bool = False,
    ) -> None:
        self.arch, self.seed, self.mode, self.sources = arch, seed, mode, sources
        self.multiprocessors, self.verbose = multiprocessors, verbose

    def run(self, launches: list[Launch]) -> None:
        """Run kernels, one after the other."""
        for launch in launches:
            start = time.perf_counter()
            if self.mode == "debug":
                debug(launch, arch=self.arch, seed=self.seed)
            else:
                run(launch, arch=self.arch, seed=self.seed, mode=self.mode, sources=self.sources)
            if self.verbose:
                variant, took = launch.variant, time.perf_counter() - start
                print(
                    f"  {variant.entry}[{' '.join(variant.defines)}]  grid {launch.grid}  block {launch.block}  "
                    f"shared {launch.shared}  {took:.2f} s"
                )


class HostBackend(PlannedBackend):
    """The CUDA kernels as host C++, on CPU tensors."""

    name = "cuda-host"
    priority = -2
    devices = ("cpu",)
    description = "the CUDA kernels as host C++ on fibers: for debuggers and sanitizers"

    def __init__(self, fibers: Fibers) -> None:
        self.fibers = fibers

    def available(self) -> str | None:
        return unavailable(self.fibers.mode)

    def processor(self, device: torch.device) -> Fibers:
        return self.fibers
