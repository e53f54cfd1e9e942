"""The emulator: what NVRTC emitted, executed on numpy, with every access checked.

    report = run(ptx, launch)                       the kernel computes into the launch's tensors
    print(trace(ptx, launch, thread=(0, 5)))        one thread, instruction by instruction, with register values

It is no model of a GPU: it knows neither caches nor time. It executes the PTX text, so inline assembly, operand order
and fragment layouts are exactly those that a device gets; the arguments are the bytes that a device gets, and the
addresses in them are those of CPU tensors. ``docs/cuda-without-a-gpu.md`` says what it finds and what it can't.

    parse.py -> flow.py -> decode.py      text, control flow, one Python function per instruction (program.py)
    semantics, integer, floating.py       what an instruction computes
    transfer.py, warp.py                  loads, stores, cp.async; barriers, shuffles, mma
    memory.py, shared.py                  the two memories and their checks
    batch.py, schedule.py                 the lanes of some blocks, and who runs next
    tracing.py                            what one thread did
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .batch import WARP, Batch
from .decode import prepare
from .errors import (
    AccessError,
    ConvergenceError,
    EmulatorError,
    LaunchError,
    RaceError,
    RunawayError,
    UninitialisedError,
    UnknownInstructionError,
)
from .memory import GlobalMemory
from .program import Program
from .schedule import Scheduler, Watcher, batches
from .tracing import ThreadTrace, trace

if TYPE_CHECKING:
    from ..launch import Launch

__all__ = [
    "AccessError",
    "ConvergenceError",
    "EmulatorError",
    "LaunchError",
    "RaceError",
    "Report",
    "RunawayError",
    "ThreadTrace",
    "UninitialisedError",
    "UnknownInstructionError",
    "run",
    "trace",
]

LANES = 4096  # blocks are run together up to about this many threads: enough to feed numpy, little enough for caches


@dataclass
class Report:
    """What a launch did.

    Attributes:
        kernel: the entry point's name.
        blocks: how many were run.
        instructions: executed, counted per thread.
        opcodes: the same for each opcode, most frequent first.
    """

    kernel: str
    blocks: int
    instructions: int
    opcodes: dict[str, int] = field(repr=False)


def run(ptx: str, launch: Launch, *, seed: int | None = None, checks: bool = True) -> Report:
    """Execute a launch; its results are in ``launch.buffers`` afterwards.

    Args:
        ptx: the text that NVRTC made for the launch's variant.
        launch: grid, block, shared bytes, arguments and tensors (on the CPU).
        seed: draw which warp goes first, instead of all in step.
        checks: look for races, and for reads of what nobody wrote. Bounds and alignment are always checked.

    Raises:
        EmulatorError: the kernel does something that it must not; the message names place, thread and cause.
    """
    program = prepare(ptx, launch.variant.entry)
    counts = _execute(program, launch, seed, checks, None)
    opcodes: dict[str, int] = {}
    for instruction, count in zip(program.kernel.code, counts, strict=True):
        if count:
            opcodes[instruction.opcode] = opcodes.get(instruction.opcode, 0) + count
    ordered = dict(sorted(opcodes.items(), key=lambda item: -item[1]))
    return Report(program.kernel.name, int(np.prod(launch.grid)), sum(ordered.values()), ordered)


def _execute(program: Program, launch: Launch, seed: int | None, checks: bool, watcher: Watcher | None) -> list[int]:
    """Run all blocks; how often each instruction was executed, counted per thread."""
    _check_launch(program, launch)
    memory = GlobalMemory(launch.buffers, int(np.prod(launch.grid)), int(np.prod(launch.block)))
    threads = -(-int(np.prod(launch.block)) // WARP) * WARP
    counts = [0] * len(program.steps)
    with np.errstate(all="ignore"):
        for blocks in batches(int(np.prod(launch.grid)), max(LANES // threads, 1)):
            batch = Batch(program, launch.grid, launch.block, blocks, launch.shared, launch.arguments, memory, checks)
            Scheduler(batch, counts, seed, watcher).run()
    return counts


def _check_launch(program: Program, launch: Launch) -> None:
    kernel, threads = program.kernel, int(np.prod(launch.block))
    if len(launch.arguments) != kernel.argument_bytes:
        raise LaunchError(
            f"kernel {kernel.name} takes {kernel.argument_bytes} bytes of arguments, the launch has "
            f"{len(launch.arguments)}: the struct in C and the one in Python differ"
        )
    if not 1 <= threads <= 1024 or min(launch.grid) < 1:
        raise LaunchError(f"kernel {kernel.name}: no device runs grid {launch.grid} with blocks of {launch.block}")
    if any(tensor.device.type != "cpu" for tensor in launch.buffers):
        raise LaunchError(f"kernel {kernel.name}: the emulator reads CPU tensors, and one is on another device")
