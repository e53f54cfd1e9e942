"""Launching kernels on a GPU: torch's context, torch's stream, one packed argument buffer per launch.

    Launch (variant, grid, block, shared, arguments)
      |   variant    --->  a cubin (nvrtc.py)  --->  a module and a function, loaded once per device
      '-  arguments  --->  one buffer: cuLaunchKernel copies it as it is, however many arguments are in it

But for a megabyte of counters (``counters.py``), nothing here allocates device memory or waits for the device: what a
plan needs, it has taken from torch, whose allocator knows streams and CUDA graphs. The primary context is the one that
torch computes in.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from .bindings import OLDEST, CudaError, driver_bindings
from .counters import Counters
from .geometry import Limits
from .nvrtc import compile_variant, unknown_architecture

if TYPE_CHECKING:
    from .launch import Launch, Variant

__all__ = ["Device", "device"]

_WITHOUT_ASKING = 48 * 1024  # bytes of dynamic shared memory that a kernel gets without cuFuncSetAttribute


@cache
def device(index: int) -> Device:
    """The GPU that torch calls ``cuda:index``."""
    return Device(index)


class Device:
    """One GPU: what plans need to know of it, and the kernels loaded on it.

    Attributes:
        index: torch's number, which is the driver's.
        arch: compute capability as an int, such as 90.
        multiprocessors: how many it has.
        limits: shared memory and registers, as the device tells them.
        problem: None, or why no kernel can be compiled for this device.
        counters: gives the address of so many counters that are zero, for one launch on the current stream, or 0.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self._driver = driver_bindings()
        self._handle = self._ask("cuDeviceGet", index)
        attribute = self._driver.CUdevice_attribute
        major = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
        minor = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
        self.arch = 10 * major + minor
        self.multiprocessors = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        self.limits = Limits(
            self._attribute(attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
            self._attribute(attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR),
            self._attribute(attribute.CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK),
        )
        self.problem = _problem(self.arch)
        self._context = self._ask("cuDevicePrimaryCtxRetain", self._handle)
        self._address = int(self._context)
        self._functions: dict[Variant, _Function] = {}
        self.counters: Callable[[int], int] = lambda tiles: 0  # until the first kernel is loaded
        self._lock = threading.Lock()

    def run(self, launches: list[Launch]) -> None:
        """Put kernels on torch's current stream of this device, one after the other.

        Raises:
            CudaError: a launch was refused, or an earlier kernel went wrong; the message says which was being launched.
            CompileError: a kernel is met for the first time and does not compile.
        """
        # What torch.cuda.current_stream(index).cuda_stream gives, without making the Stream object on the way.
        stream = torch._C._cuda_getCurrentRawStream(self.index)
        status, current = self._driver.cuCtxGetCurrent()
        elsewhere = status or int(current) != self._address  # this thread is in another context, or in none yet
        if elsewhere:
            self._ask("cuCtxPushCurrent", self._context)
        try:
            for launch in launches:
                variant, grid, block, shared, arguments, _ = launch
                function = self._functions[variant] if variant in self._functions else self._load(variant, stream)
                if shared > function.shared:
                    self._allow(function, shared)
                held = _scratch.holding(arguments)
                (status,) = self._driver.cuLaunchKernel(function.handle, *grid, *block, shared, stream, 0, held)
                if status:
                    raise CudaError(self._failure(launch, status))
        finally:
            if elsewhere:
                self._ask("cuCtxPopCurrent")

    def _failure(self, launch: Launch, status: Any) -> str:
        return (
            f"launching {_named(launch.variant)} on cuda:{self.index} (sm_{self.arch}) failed: "
            f"{self._text(status)}; grid {launch.grid}, block {launch.block}, {launch.shared} bytes of shared "
            f"memory. Kernels run asynchronously, so the fault may lie in one launched before: repeat with "
            f"CUDA_LAUNCH_BLOCKING=1, or under compute-sanitizer"
        )

    # --- loading ------------------------------------------------------------------------------------------------------

    def _load(self, variant: Variant, stream: int) -> _Function:
        with self._lock:
            if variant not in self._functions:
                status, mode = self._driver.cuStreamIsCapturing(stream)  # of this device, whichever is torch's current
                if status or int(mode):
                    raise CudaError(
                        f"{_named(variant)} is not loaded on cuda:{self.index} yet, and can't be while a CUDA graph is "
                        f"captured: run the same call once before the capture"
                    )
                # The module stays loaded as long as the process: a captured graph may hold its functions.
                module = self._ask("cuModuleLoadData", compile_variant(variant, self.arch).data)
                handle = self._ask("cuModuleGetFunction", module, variant.entry.encode())
                self._functions[variant] = _Function(handle, _WITHOUT_ASKING)
                if len(self._functions) == 1:
                    with suppress(CudaError):  # no room for them: a tensor of zeros does in each call
                        self.counters = Counters(self.index, self._ask, self._driver).here
            return self._functions[variant]

    def _allow(self, function: _Function, shared: int) -> None:
        limit = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._ask("cuFuncSetAttribute", function.handle, limit, shared)
        function.shared = shared

    # --- asking the driver --------------------------------------------------------------------------------------------

    def _attribute(self, attribute: Any) -> int:
        return int(self._ask("cuDeviceGetAttribute", attribute, self._handle))

    def _ask(self, name: str, *arguments: Any) -> Any:
        """Call a driver function; its result if it has one."""
        status, *result = getattr(self._driver, name)(*arguments)
        if status:
            raise CudaError(f"{name} failed on cuda:{self.index}: {self._text(status)}")
        return result[0] if result else None

    def _text(self, status: Any) -> str:
        text = self._driver.cuGetErrorString(status)[1]
        return f"{text.decode() if text else 'unknown error'} ({getattr(status, 'name', int(status))})"


def _problem(arch: int) -> str | None:
    oldest = 10 * OLDEST[0] + OLDEST[1]
    if arch < oldest:
        return f"the GPU is an sm_{arch}, and the kernels need sm_{oldest} (Turing) or newer"
    return unknown_architecture(arch)


@dataclass
class _Function:
    """A kernel on a device, and the dynamic shared memory that it may use so far."""

    handle: Any
    shared: int


class _Scratch(threading.local):
    """The argument buffer and the list that tells cuLaunchKernel where it is; per thread, and used again at once.

    extra:  CU_LAUNCH_PARAM_BUFFER_POINTER, &buffer, CU_LAUNCH_PARAM_BUFFER_SIZE, &size, CU_LAUNCH_PARAM_END
    """

    CAPACITY = 4096  # bytes that a kernel's parameters can take

    def __init__(self) -> None:
        buffer = (ctypes.c_ubyte * self.CAPACITY)()
        self._bytes = memoryview(buffer).cast("B")
        self._filled = self._bytes[:0]
        self._size = ctypes.c_size_t(0)
        address, size = ctypes.addressof(buffer), ctypes.addressof(self._size)
        self._extra = (ctypes.c_void_p * 5)(1, address, 2, size, 0)
        self._address = ctypes.addressof(self._extra)

    def holding(self, arguments: bytes) -> int:
        """The address of ``extra`` for these argument bytes; valid until this thread's next launch."""
        try:
            self._filled[:] = arguments  # as a rule as many as last time
        except ValueError:
            size = len(arguments)
            if size > self.CAPACITY:
                message = f"{size} bytes of arguments: a kernel takes {self.CAPACITY} at most"
                raise CudaError(message) from None
            self._filled, self._size.value = self._bytes[:size], size
            self._filled[:] = arguments
        return self._address


_scratch = _Scratch()


def _named(variant: Variant) -> str:
    return f"{variant.entry} of {variant.file}" + (f" ({', '.join(variant.defines)})" if variant.defines else "")
