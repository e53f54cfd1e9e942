"""Any kernel's PTX: arguments packed as the kernel declares them, every check on.

    y = torch.empty(64)
    run_ptx(ptx, "scale", grid=(2, 1, 1), block=(32, 1, 1), args=[x, y, 0.5, 64])

What the compilers write is taken as it is (NVRTC, nvcc, Triton; sm_75 to sm_90). The project's own kernels come with a
``Launch`` and go through ``run``, which checks less of global memory and is faster.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .errors import LaunchError
from .memory import Region, name_of
from .module import FORMATS, Variable
from .parse import Kernel

if TYPE_CHECKING:
    from ..launch import Launch

__all__ = ["launch_of", "regions_of"]

Argument = Tensor | int | float | bytes


def launch_of(
    kernel: Kernel, grid: Sequence[int], block: Sequence[int], args: Sequence[Argument], shared: int
) -> Launch:
    """A launch with the arguments as bytes.

    Raises:
        LaunchError: grid, block or an argument does not fit.
    """
    from ..launch import Launch, Variant

    sizes = []
    for name, given in (("grid", grid), ("block", block)):
        if not isinstance(given, Sequence) or len(given) != 3 or not all(isinstance(n, int) for n in given):
            raise LaunchError(f"{name}={given!r}: three ints are expected, such as (4, 1, 1)")
        sizes.append((given[0], given[1], given[2]))
    data = bytearray(kernel.argument_bytes)
    if len(args) != len(kernel.parameters):
        declared = ", ".join(f".{p.kind}" for p in kernel.parameters.values()) or "none"
        raise LaunchError(
            f"kernel {kernel.name} takes {len(kernel.parameters)} arguments ({declared}), and {len(args)} are given. "
            "Triton adds two pointers at the end, for scratch memory: pass 0 for each"
        )
    for i, (parameter, value) in enumerate(zip(kernel.parameters.values(), args, strict=True)):
        data[parameter.at : parameter.at + (parameter.size or 0)] = _packed(kernel, i, parameter, value)
    tensors = tuple(value for value in args if isinstance(value, Tensor))
    return Launch(Variant("", kernel.name, ()), sizes[0], sizes[1], shared, bytes(data), tensors)


def _packed(kernel: Kernel, i: int, parameter: Variable, value: Argument) -> bytes:
    """One argument's bytes, by the type that the kernel declares for it."""
    kind, size, what = parameter.kind, parameter.size or 0, f"kernel {kernel.name}, argument {i} (.{parameter.kind})"
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            raise LaunchError(
                f"{what}: the emulator reads CPU tensors, and this one is on {value.device}; pass x.cpu()"
            )
        if size != 8 or kind in FORMATS:
            raise LaunchError(f"{what} is not a pointer, and a tensor is given: pass a number")
        return value.data_ptr().to_bytes(8, "little")
    if isinstance(value, bytes):
        if len(value) != size:
            raise LaunchError(f"{what} has {size} bytes, and {len(value)} are given")
        return value
    number: Any = value
    if isinstance(number, np.number):
        number = number.item()
    try:
        if kind in FORMATS or (isinstance(number, float) and kind[0] == "b"):
            return struct.pack(FORMATS.get(kind) or FORMATS[f"f{8 * size}"], number)
        if isinstance(number, float) or kind == "b8":
            raise LaunchError(f"{what}: {number!r} is not a {'struct of bytes' if kind == 'b8' else 'whole number'}")
        bits = 8 * size
        if not -(1 << bits - 1) <= number < 1 << bits:
            raise LaunchError(f"{what}: {number} does not fit into {bits} bits")
        return (int(number) & (1 << bits) - 1).to_bytes(size, "little")
    except (struct.error, OverflowError, TypeError, KeyError) as error:
        raise LaunchError(f"{what}: {number!r} can't be passed: {error}") from None


def regions_of(kernel: Kernel, args: Sequence[Argument], arrays: dict[str, Any]) -> list[Region]:
    """The memory that a launch may touch, each piece under the name that a message gives it.

    A tensor spans what its strides reach; tensors that overlap are one piece, named after the first.
    """
    regions = []
    for i, value in enumerate(args):
        if isinstance(value, Tensor) and value.numel():
            last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            size = value.element_size()
            regions.append(Region(value.data_ptr(), (last + 1) * size, f"argument {i}, {name_of(value)}", size))
    for name, (memory, _) in arrays.items():
        if len(memory):
            where = f"the module's .{kernel.variables[name].space} array {name}"
            regions.append(Region(memory.ctypes.data, len(memory), where))
    joined: list[Region] = []
    for region in sorted(regions):
        if joined and region.base < joined[-1].base + joined[-1].nbytes:
            first = joined[-1]
            end = max(first.base + first.nbytes, region.base + region.nbytes)
            joined[-1] = first._replace(nbytes=end - first.base)
        else:
            joined.append(region)
    return joined
