"""Running a launch on fibers: record it, let the program replay it, take the buffers back.

The recording is the launch as the driver would get it, and the bytes of its buffers; ``replay.cpp`` shows the layout.
A program of its own, and not a library in this process, so that a kernel that crashes leaves Python alive, the
sanitizers see the kernel and nothing else, and a debugger starts at once.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..launch import Launch
from .build import HostError, compile_program, unavailable

__all__ = ["debug", "run"]

_SANITIZER_OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1",
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def run(
    launch: Launch, *, arch: int, seed: int = 0, mode: str = "plain", sources: Mapping[str, str] | None = None
) -> None:
    """Run a launch block by block; what it writes is in its buffers afterwards.

    Args:
        launch: as ``refq4_cuda.launch`` plans it, on CPU tensors.
        arch: the compute capability it was planned for.
        seed: the order of threads and blocks: 0 ascending, 1 descending, else random.
        mode: "plain", "thread" (ThreadSanitizer) or "address" (AddressSanitizer and UBSan).
        sources: the kernels' files by name instead of those of the package.

    Raises:
        HostError: it can't be built, or the kernel broke a rule; the message is the program's report.
    """
    if (reason := unavailable(mode)) is not None:
        raise HostError(reason)
    program = compile_program(launch.variant, arch, mode, sources)
    with tempfile.TemporaryDirectory(prefix="refq4-host-") as scratch:
        recording = Path(scratch) / "launch"
        spans = record(launch, seed, recording)
        command, environment = [str(program), str(recording)], os.environ | _SANITIZER_OPTIONS
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            how = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
            what = f"{launch.variant.entry} with schedule seed {seed} ended with {how}"
            raise HostError(f"{what}:\n{_report(done.stderr)}")
        _take_back(recording, spans)


def debug(launch: Launch, *, arch: int, seed: int = 0) -> None:
    """gdb on a launch, stopped where the kernel begins; what it had written when gdb ends is in the buffers."""
    if shutil.which("gdb") is None:
        raise HostError("there is no gdb: install it, for example with apt install gdb")
    program = compile_program(launch.variant, arch, "debug")
    with tempfile.TemporaryDirectory(prefix="refq4-host-") as scratch:
        recording = Path(scratch) / "launch"
        spans = record(launch, seed, recording)
        commands = ["-q", "-ex", f"tbreak {launch.variant.entry}", "-ex", "run"]
        subprocess.run(["gdb", *commands, "--args", str(program), str(recording)], check=False)
        _take_back(recording, spans)


def record(launch: Launch, seed: int, path: Path) -> list[tuple[int, int, int]]:
    """Write the file that ``replay`` reads; returns (address, bytes, offset in the file) of each buffer."""
    spans = _spans(launch.buffers)
    arguments = launch.arguments + bytes(-len(launch.arguments) % 8)
    numbers = (seed, *launch.grid, *launch.block, launch.shared, len(launch.arguments), len(spans))
    written: list[tuple[int, int, int]] = []
    with path.open("wb") as file:
        file.write(struct.pack("<10Q", *numbers) + arguments)
        for address, size in spans:
            file.write(struct.pack("<2Q", address, size))
            written.append((address, size, file.tell()))
            file.write(ctypes.string_at(address, size) + bytes(-size % 8))
    return written


def _spans(buffers: Sequence[Tensor]) -> list[tuple[int, int]]:
    """(address, bytes) of the memory behind the tensors: those that overlap become one."""
    spans: list[tuple[int, int]] = []
    for tensor in buffers:
        if tensor.device != torch.device("cpu"):
            raise HostError(f"fibers run on the CPU's memory; plan the launch with CPU tensors, not {tensor.device}")
    for start, size in sorted((t.data_ptr(), t.nbytes) for t in buffers if t.nbytes):
        if spans and start < sum(spans[-1]):
            before, length = spans[-1]
            spans[-1] = before, max(length, start + size - before)
        else:
            spans.append((start, size))
    return spans


def _report(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if "doesn't fully support makecontext" not in line]
    return "\n".join(lines).strip()


def _take_back(recording: Path, spans: Sequence[tuple[int, int, int]]) -> None:
    data = recording.read_bytes()
    for address, size, offset in spans:
        ctypes.memmove(address, data[offset : offset + size], size)
