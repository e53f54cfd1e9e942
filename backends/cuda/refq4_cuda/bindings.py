"""The door to cuda-python: its modules are imported here, when somebody asks for them, and nowhere else.

Importing refq4, or this package, imports no part of ``cuda`` and opens no library. What is missing on a machine comes
out of here as a :class:`CudaError`: one sentence with the reason and the remedy.

    torch for the CPU?   no cuda-python?   no NVRTC?   no driver?   driver too old?   no GPU?      asked in this order

Only ``cuda.bindings`` is used. Without a driver, the second call through ``cuda.core`` after a failed one can wait
for ever; ``cuda.bindings`` raises each time.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch

from refq4.internals.remedies import install

__all__ = [
    "CudaError",
    "dotted",
    "driver_bindings",
    "driver_version",
    "nvrtc_bindings",
    "nvrtc_version",
    "why_no_gpu",
]

TRITON = "use the backend triton, which computes there"
EMULATOR = "without a GPU, the backend cuda-emulator runs the same kernels"

OLDEST = (7, 5)  # the compute capability that the kernels ask for

_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


class CudaError(RuntimeError):
    """Something of CUDA is missing, too old, or failed; the message says what and what to do."""


def _extra() -> str:
    return f"{install('cuda')}, or with [cuda12] for [cuda] where torch and the driver are of CUDA 12"


def why_no_gpu() -> str | None:
    """None if kernels can be compiled for a GPU of this machine and run there, else the reason and the remedy."""
    if torch.version.hip is not None:
        return f"torch {torch.__version__} is built for AMD's GPUs, and these kernels are for NVIDIA's: {TRITON}"
    if torch.version.cuda is None and torch.xpu.is_available():
        return f"torch {torch.__version__} is built for Intel's GPUs, and these kernels are for NVIDIA's: {TRITON}"
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA: install a build with CUDA from https://pytorch.org; "
            f"{EMULATOR}"
        )
    try:
        nvrtc_version()
        driver_bindings()
    except CudaError as error:
        return str(error)
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) can't use the GPU that the driver (CUDA "
            f"{dotted(driver_version())}) offers: update the driver, or install a torch for an older CUDA"
        )
    if (found := torch.cuda.get_device_capability()) < OLDEST:
        return (
            f"the GPU is of compute capability {found[0]}.{found[1]}, and the kernels need {OLDEST[0]}.{OLDEST[1]} "
            f"(Turing) or newer: use the reference"
        )
    return None


@cache
def nvrtc_bindings() -> ModuleType:
    """``cuda.bindings.nvrtc``, with NVRTC itself loaded.

    Raises:
        CudaError: one of the two is not installed.
    """
    nvrtc = _import("nvrtc")
    try:
        nvrtc.nvrtcVersion()  # cuda-python opens the library at the first call
    except Exception as error:
        raise CudaError(
            f"NVRTC, which compiles the kernels, is not installed ({_first_line(error)}): {_extra()}"
        ) from error
    return nvrtc


@cache
def nvrtc_version() -> int:
    """Of the NVRTC that compiles here: 13000 is 13.0."""
    status, major, minor = nvrtc_bindings().nvrtcVersion()
    if status:
        raise CudaError(f"NVRTC does not tell its version (status {int(status)}): install it again: {_extra()}")
    return 1000 * int(major) + 10 * int(minor)


@cache
def driver_bindings() -> ModuleType:
    """``cuda.bindings.driver``, initialised, on a machine with a GPU and a driver that takes this NVRTC's cubins.

    Raises:
        CudaError: something is missing or too old.
    """
    driver = _import("driver")
    try:
        (status,) = driver.cuInit(0)
    except Exception as error:
        raise CudaError(f"there is no NVIDIA driver ({_first_line(error)}): install one; {EMULATOR}") from error
    if status and int(status) != _NO_DEVICE:
        raise CudaError(
            f"the NVIDIA driver does not start ({status.name}): check it with nvidia-smi, and that its kernel module "
            f"and its library are of the same version; {EMULATOR}"
        )
    # Within a major version any driver loads any cubin; a device that is there says that the driver knows it.
    found, nvrtc = driver_version(), nvrtc_version()
    if found // 1000 < nvrtc // 1000:
        raise CudaError(
            f"the NVIDIA driver is too old (it is for CUDA {dotted(found)}, and the NVRTC installed is of CUDA "
            f"{dotted(nvrtc)}): update the driver, or {install('cuda12')} for a driver of CUDA 12"
        )
    if status or int(driver.cuDeviceGetCount()[1]) == 0:
        raise CudaError(
            f"the NVIDIA driver finds no GPU: check nvidia-smi and the environment variable CUDA_VISIBLE_DEVICES; "
            f"{EMULATOR}"
        )
    return driver


def driver_version() -> int:
    """The newest CUDA that the driver knows: 12040 is 12.4."""
    return int(_import("driver").cuDriverGetVersion()[1])


def dotted(version: int) -> str:
    """A version as people write it: 12040 is "12.4"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise CudaError(f"cuda-python is not installed ({_first_line(error)}): {_extra()}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
