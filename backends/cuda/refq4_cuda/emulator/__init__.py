"""The emulator: PTX, as a compiler wrote it, executed on numpy, with every access checked.

    report = run(ptx, launch)                       the kernel computes into the launch's tensors
    print(trace(ptx, launch, thread=(0, 5)))        one thread, instruction by instruction, with register values
    run_ptx(ptx, "scale", (2, 1, 1), (32, 1, 1), [x, y, 0.5])     any kernel, with its arguments; trace_ptx likewise

It is no model of a GPU: it knows neither caches nor time. It executes the PTX text, so inline assembly, operand order
and fragment layouts are exactly those that a device gets; the arguments are the bytes that a device gets, and the
addresses in them are those of CPU tensors. ``docs/cuda-without-a-gpu.md`` says what it finds and what it can't.

    module, parse -> flow -> slots, decode.py       text, control flow, one Python function per instruction (program.py)
    semantics, integer, floating, compare.py        the table of instructions, and those that compute
    transfer.py                                     loads, stores, atomics, cp.async
    warp, barriers, tensor.py                       what threads do together: shuffles and votes, barriers, mma
    memory, shared -> order.py                      the memories and their bounds; the check for races
    batch, schedule.py                              the lanes of some blocks, and who runs next
    ptx.py, tracing.py                              arguments for any kernel; what one thread did
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .batch import Batch
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
from .memory import GlobalMemory, Region, name_of
from .order import WARP, Order
from .program import Program
from .ptx import Argument, launch_of, regions_of
from .schedule import Scheduler, Watcher, batches
from .tracing import ThreadTrace, trace, watch

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
    "run_ptx",
    "trace",
    "trace_ptx",
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
    return _execute(program, launch, seed, checks, None)


def run_ptx(
    ptx: str,
    entry: str,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Argument],
    *,
    shared: int = 0,
    seed: int | None = None,
) -> Report:
    """Execute any kernel; its results are in the tensors afterwards.

    Args:
        ptx: the text, as NVRTC, nvcc or Triton wrote it for sm_75 or newer.
        entry: the kernel's name in it.
        grid, block: how many blocks and threads, three ints each: x, y, z.
        args: one for each of the kernel's parameters. A CPU tensor of any dtype stands for a pointer to its first
            element, 0 for a null pointer; an int or a float is packed as the parameter declares; bytes are a struct.
        shared: bytes of dynamic shared memory.
        seed: draw which warp goes first, instead of all in step.

    Returns:
        How many instructions ran, by opcode. The module's own ``.global`` arrays begin each run as the text says.

    Raises:
        AccessError: an access outside every tensor, or not aligned; the message says which tensor and element.
        RaceError: two threads touch the same memory, one of them writing, in no order.
        UninitialisedError: what nobody wrote, or what cp.async is still bringing, is read.
        ConvergenceError: threads that must meet at a barrier, a shuffle or an mma do not.
        LaunchError: grid, block or arguments do not fit the kernel.
        UnknownInstructionError: an instruction that the emulator does not know; the message quotes its line.

    Source: NVIDIA's PTX ISA. Where it leaves bits open (``.approx``, the sums of mma), docs/your-cuda-kernel.md.

    Example:
        >>> import torch
        >>> ptx = '''
        ... .version 7.0
        ... .target sm_75
        ... .address_size 64
        ... .visible .entry double_it(.param .u64 x) {
        ...     .reg .b32 %r<3>; .reg .b64 %rd<3>;
        ...     ld.param.u64 %rd1, [x]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd1, %rd1, %rd2;
        ...     ld.global.u32 %r2, [%rd1]; shl.b32 %r2, %r2, 1; st.global.u32 [%rd1], %r2; ret;
        ... }'''
        >>> x = torch.arange(4, dtype=torch.int32)
        >>> run_ptx(ptx, "double_it", (1, 1, 1), (4, 1, 1), [x]).instructions
        32
        >>> x.tolist()
        [0, 2, 4, 6]
    """
    program = prepare(ptx, entry)
    launch = launch_of(program.kernel, grid, block, args, shared)
    return _execute(program, launch, seed, True, None, args)


def trace_ptx(
    ptx: str,
    entry: str,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Argument],
    *,
    shared: int = 0,
    thread: tuple[int, int] | None = None,
    warp: tuple[int, int] | None = None,
    limit: int = 1000,
) -> ThreadTrace:
    """Execute any kernel as ``run_ptx`` does, and write down what one thread or one warp does.

    Args:
        ptx, entry, grid, block, args, shared: as for ``run_ptx``.
        thread, warp, limit: as for ``trace``.

    Raises:
        EmulatorError, ValueError: as ``run_ptx`` and ``trace``.

    Source: refq4's own; ``trace`` shows the columns.

    Example:
        >>> import torch
        >>> ptx = '''
        ... .version 7.0
        ... .target sm_75
        ... .visible .entry seven(.param .u64 x) {
        ...     .reg .b32 %r<2>; .reg .b64 %rd<2>;
        ...     ld.param.u64 %rd1, [x]; mov.u32 %r1, 7; st.global.u32 [%rd1], %r1; ret;
        ... }'''
        >>> x = torch.zeros(1, dtype=torch.int32)
        >>> trace_ptx(ptx, "seven", (1, 1, 1), (1, 1, 1), [x], thread=(0, 0)).find("mov")[0].writes
        '%r1 = 7'
    """
    program = prepare(ptx, entry)
    launch = launch_of(program.kernel, grid, block, args, shared)
    result, reader = watch(program, launch, thread, warp, limit)
    _execute(program, launch, None, True, reader, args)
    return result


def _execute(
    program: Program,
    launch: Launch,
    seed: int | None,
    checks: bool,
    watcher: Watcher | None,
    args: Sequence[Argument] | None = None,
) -> Report:
    """Run all blocks.

    With ``args``, global memory is what they and the module's arrays span, and the order of all accesses is checked.
    """
    _check_launch(program, launch)
    with program.running if program.arrays else nullcontext():  # another thread's launch has the same arrays
        for array, initial in program.arrays.values():
            array[:] = np.frombuffer(initial, np.uint8)
        total, threads = int(np.prod(launch.grid)), int(np.prod(launch.block))
        padded = -(-threads // WARP) * WARP
        regions = regions_of(program.kernel, args or (), program.arrays)
        if args is None:  # the project's own kernels never write what they read: readers need not be remembered
            regions += [Region(t.data_ptr(), t.numel() * t.element_size(), name_of(t)) for t in launch.buffers]
        order = Order(total, padded)
        memory = GlobalMemory(regions, order, program.grain["global"], checks, readers=args is not None)
        counts = [0] * len(program.steps)
        with np.errstate(all="ignore"):
            for blocks in batches(total, max(LANES // padded, 1)):
                Scheduler(Batch(program, launch, blocks, memory, checks), counts, seed, watcher).run()
    opcodes: Counter[str] = Counter()
    for instruction, count in zip(program.kernel.code, counts, strict=True):
        opcodes[instruction.opcode] += count
    return Report(
        program.kernel.name, total, sum(counts), {one: count for one, count in opcodes.most_common() if count}
    )


MOST_SHARED = 227 * 1024  # of the largest GPU that the emulator knows, sm_90


def _check_launch(program: Program, launch: Launch) -> None:
    kernel, threads = program.kernel, int(np.prod(launch.block))
    if len(launch.arguments) != kernel.argument_bytes:
        raise LaunchError(
            f"kernel {kernel.name} takes {kernel.argument_bytes} bytes of arguments, the launch has "
            f"{len(launch.arguments)}: the struct in C and the one in Python differ"
        )
    sizes = zip((*launch.grid, *launch.block), (2**31 - 1, 65535, 65535, 1024, 1024, 64), strict=True)
    if not 1 <= threads <= 1024 or not all(1 <= size <= most for size, most in sizes):
        raise LaunchError(f"kernel {kernel.name}: no device runs grid {launch.grid} with blocks of {launch.block}")
    if not 0 <= launch.shared <= MOST_SHARED:
        raise LaunchError(
            f"kernel {kernel.name}: shared={launch.shared}, and a block has 0 to {MOST_SHARED} bytes of it"
        )
    if any(tensor.device.type != "cpu" for tensor in launch.buffers):
        raise LaunchError(f"kernel {kernel.name}: the emulator reads CPU tensors, and one is on another device")
