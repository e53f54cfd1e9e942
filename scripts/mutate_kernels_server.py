"""Runs the kernels' tests on mutants of the C and CUDA sources: ``mutate_core_server.py``, another way to put one in.

A fork gets a copy of the package whose one file differs, as links beside the mutated text, and a build cache of its
own. Then the ordinary tests of the kernels run, in this process (``tests/test_cpu_ops.py``, the emulator's tests) and
in those that they start (guard pages). What does not compile is no mutant.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mutate_core_mutants import Mutant
from mutate_core_server import PLAN, Job, NotAMutant, Server, Swapper, freeze, scratch_of

PACKAGES = {"refq4_cpu": Path("backends/cpu"), "refq4_cuda": Path("backends/cuda")}


class KernelSwapper(Swapper):
    """The pytest plug-in: each fork compiles its mutant where the original would have been compiled."""

    def __init__(self, plan: dict[str, Any]) -> None:
        super().__init__(plan)
        self.did_not_compile = self.unknown_instruction = False

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        if self.plan.get("seconds"):
            Path(self.plan["seconds"]).write_text(json.dumps(self._reached(items)))
            return True
        freeze()
        Server(self.plan, lambda job: self.run(job, items)).serve()
        return True

    def run(self, job: Job, items: dict[str, pytest.Item]) -> str | None:
        killer = super().run(job, items)
        if self.did_not_compile:
            raise NotAMutant
        if self.unknown_instruction:
            return "an instruction that the emulator does not know"
        return killer

    def swap(self, mutant: Mutant) -> None:
        package = Path(mutant.file).parts[2]
        overlay = scratch_of(mutant)
        shutil.rmtree(overlay, ignore_errors=True)
        os.environ["REFQ4_CACHE_DIR"] = str(overlay / "cache")
        os.environ["PYTHONPATH"] = f"{overlay}{os.pathsep}{os.environ['PYTHONPATH']}"
        original = self.root / PACKAGES[package] / package
        kernels = linked_copy(original, overlay / package)
        target = kernels / Path(mutant.file).name
        target.unlink()
        target.write_bytes(mutant.apply((self.root / mutant.file).read_bytes()))
        (put_in_c if package == "refq4_cpu" else self._put_in_cuda)(mutant, kernels)

    def _put_in_cuda(self, mutant: Mutant, kernels: Path) -> None:
        import cuda_cases
        from refq4_cuda import nvrtc

        compile_, nvrtc.kernel_directory = nvrtc._compile, lambda: kernels
        cuda_cases.ptx_of.cache_clear()

        def noting(*arguments: Any) -> Any:
            try:
                return compile_(*arguments)
            except nvrtc.CompileError:
                self.did_not_compile = True
                raise

        nvrtc._compile = noting

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and "UnknownInstruction" in report.longreprtext:
            self.unknown_instruction = True
        super().pytest_runtest_logreport(report)

    def _reached(self, items: dict[str, pytest.Item]) -> dict[str, Any]:
        """Each test's seconds, whether it passes, and the CUDA variants that it launches."""
        import cuda_cases

        reached: dict[str, Any] = {}
        launched: list[str] = []
        plain = cuda_cases.ptx_of

        def noting(variant: Any, arch: int) -> str:
            launched.append(f"{variant.file} {' '.join(variant.defines)} sm_{arch}")
            ptx: str = plain(variant, arch)
            return ptx

        cuda_cases.ptx_of = noting
        for item in items.values():
            launched.clear()
            self.failed = None
            start = time.process_time()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            seconds = time.process_time() - start
            reached[item.nodeid] = {"seconds": seconds, "passed": not self.failed, "variants": sorted(set(launched))}
        return reached


def linked_copy(package: Path, to: Path) -> Path:
    """The package as links, so that any of its files can be replaced; returns its kernels' directory."""
    (to / "kernels").mkdir(parents=True)
    for path in package.iterdir():
        if path.name != "kernels":
            (to / path.name).symlink_to(path)
    for path in (package / "kernels").iterdir():
        (to / "kernels" / path.name).symlink_to(path)
    return to / "kernels"


def put_in_c(mutant: Mutant, kernels: Path) -> None:
    """Compile the tier that holds the mutant, and let the mutated rung be the one that calibration prefers."""
    import torch
    from refq4_cpu import CpuBackend, build, calibrate

    build.kernel_directory = lambda: kernels
    os.environ["REFQ4_CPU_CFLAGS"] = "-O0"
    os.environ[build.TIER_VARIABLE] = tier_of(mutant)
    for remembered in (build._load, build._cpu_features):
        remembered.cache_clear()
    try:
        build.load()
    except build.BuildError:
        raise NotAMutant from None
    name = Path(mutant.file).stem if Path(mutant.file).name.startswith("ge") else "gemm_4bit_2_avx2"
    row = {str(m): name for m in calibrate.MEASURED_M}
    dtypes, layouts = ("float32", "bfloat16", "float16"), ("canonical", "tiles16")
    calibrate._measure = lambda *_: {f"{dtype} {layout}": row for dtype in dtypes for layout in layouts}
    backend = CpuBackend()
    backend._calibration()
    assert torch.get_num_threads() == 1, "a thread pool before the fork would hang after it"


def tier_of(mutant: Mutant) -> str:
    """The tier that is compiled for a mutant: plain C where the file is part of it, AVX2 for what every rung shares."""
    name = Path(mutant.file).name
    shared = mutant.function in ("dequantize_blocks", "dequantize_item", "dequantize_in_items", "streams")
    return "c" if ("scalar" in name or name == "refq4.h") and not shared else "avx2"


def main() -> int:
    plan = json.loads(Path(os.environ[PLAN]).read_text())
    os.chdir(plan["root"])
    sys.path.insert(0, str(Path(plan["root"]) / "tests"))
    return int(pytest.main([*plan["pytest"], *plan["files"]], plugins=[KernelSwapper(plan)]))


if __name__ == "__main__":
    sys.exit(main())
