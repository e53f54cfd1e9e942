"""From CUDA C++ to a cubin or PTX: NVRTC, called once per variant, and the result kept on disk.

    Variant (file, entry, macros)  --->  NVRTC  --->  cubin   for a device of that architecture, nothing newer or older
                + architecture                  '-->  PTX     for the emulator
                                                '-->  log     registers, spills, shared memory (cubin only)

A device is always given a cubin of its own architecture: PTX of a newer NVRTC than the driver would be refused, and
would be compiled again in every process. Neither a driver nor a GPU is needed here. The cache, its rules and its
directory are refq4's (``refq4/internals/buildcache.py``).
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from refq4.internals.buildcache import RefusedError, cache_directory, cache_key, cached

from .bindings import CudaError, dotted, nvrtc_bindings, nvrtc_version

if TYPE_CHECKING:
    from .launch import Variant

__all__ = [
    "FLAGS_VARIABLE",
    "CompileError",
    "Compiled",
    "Form",
    "compile_ptx",
    "compile_variant",
    "kernel_directory",
    "unknown_architecture",
]

Form = Literal["cubin", "ptx"]
FLAGS_VARIABLE = "REFQ4_CUDA_FLAGS"

# The numbers are part of what the kernels promise: subnormals stay, divisions and roots are rounded correctly. Where
# a fused multiply-add would change a bit, a kernel says __fmul_rn and __fadd_rn; elsewhere it is welcome.
_OPTIONS = ("-std=c++17", "-default-device", "--ftz=false", "--prec-div=true", "--prec-sqrt=true", "--fmad=true")
_CUBIN_OPTIONS = ("--ptxas-options=-v",)


class CompileError(CudaError, RefusedError):
    """NVRTC refused a kernel; the message quotes the lines at fault and says how to repeat it."""


@dataclass(frozen=True)
class Compiled:
    """What NVRTC made: the bytes (an ELF cubin, or PTX text), the compiler's log, and the file that holds the bytes."""

    data: bytes
    log: str
    path: Path


def compile_variant(variant: Variant, arch: int, form: Form = "cubin") -> Compiled:
    """One kernel for one architecture, from the cache or compiled now (about a second, told on stderr).

    Args:
        variant: the file, its entry point and its macros.
        arch: the compute capability as an int, such as 90.
        form: "cubin" for a device, "ptx" for the emulator.

    Raises:
        CompileError: the source is wrong, or this NVRTC does not know the architecture.
        CudaError: cuda-python or NVRTC is not installed.
        CacheError: the cache directory can't be used.
    """
    options = compile_options(variant, arch, form)
    key = cache_key(variant.file, variant.entry, *_sources(variant.file), *options, dotted(nvrtc_version()))
    stem = f"{Path(variant.file).stem}-sm{arch}-{key}"
    directory = cache_directory("cuda")
    made: dict[str, bytes] = {}  # one compilation gives both files

    def write(target: Path, what: str) -> None:
        if not made:
            made[form], made["log"] = _told(variant, arch, options, form)
        target.write_bytes(made[what])

    def write_both(target: Path) -> None:
        write(target, form)
        cached(directory, f"{stem}.{form}.log", lambda log: write(log, "log"))

    path = cached(directory, f"{stem}.{form}", write_both)
    log = cached(directory, f"{stem}.{form}.log", lambda target: write(target, "log"))
    return Compiled(path.read_bytes(), log.read_text(), path)


def compile_ptx(source: str, arch: int = 80, *options: str) -> str:
    """The PTX of any CUDA C++ source, for ``emulator.run_ptx``. Nothing is kept on disk, no GPU is needed.

    Args:
        source: kernels, best as ``extern "C" __global__``, whose names stay as they are written. NVRTC has no headers
            of the CUDA toolkit: instructions that those wrap are inline assembly here.
        arch: the compute capability as an int, such as 80.
        options: further ones for NVRTC, such as "-DN=4" or "-lineinfo".

    Raises:
        CompileError: the source is wrong, or this NVRTC does not know the architecture.
        CudaError: cuda-python or NVRTC is not installed.

    Source: NVRTC, https://docs.nvidia.com/cuda/nvrtc.

    Example:
        >>> ptx = compile_ptx('extern "C" __global__ void one(int *x) { *x = 1; }')
        >>> ".visible .entry one(" in ptx
        True
    """
    asked = (f"--gpu-architecture=compute_{arch}", "-std=c++17", "-default-device", *options)
    return _run(source.encode(), [], [], "kernel.cu", arch, asked, "ptx")[0].decode()


def compile_options(variant: Variant, arch: int, form: Form) -> tuple[str, ...]:
    """What NVRTC is given; ``REFQ4_CUDA_FLAGS`` is added at the end."""
    target = f"--gpu-architecture={'sm' if form == 'cubin' else 'compute'}_{arch}"
    defines = (f"-D{define}" for define in variant.defines)
    extra = shlex.split(os.environ.get(FLAGS_VARIABLE, ""))
    return (target, *_OPTIONS, *(_CUBIN_OPTIONS if form == "cubin" else ()), *defines, *extra)


def unknown_architecture(arch: int) -> str | None:
    """None if this NVRTC compiles for the architecture, else a sentence with the remedy."""
    known = nvrtc_bindings().nvrtcGetSupportedArchs()[1]
    if arch in known:
        return None
    return (
        f"NVRTC {dotted(nvrtc_version())} does not compile for sm_{arch}, only for {', '.join(map(str, known))}: "
        f"install the NVRTC of another CUDA version, for example pip install -U nvidia-cuda-nvrtc"
    )


def kernel_directory() -> Path:
    """Where the CUDA sources lie; the wheel is always installed unpacked."""
    return Path(str(files("refq4_cuda") / "kernels"))


# --- one compilation ------------------------------------------------------------------------------------------------


def _told(variant: Variant, arch: int, options: tuple[str, ...], form: Form) -> tuple[bytes, bytes]:
    macros = " ".join(variant.defines)
    what = f"{variant.file} ({macros})" if macros else variant.file
    print(f"refq4: compiling {what} for sm_{arch} (once, about a second) ...", end="", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        data, log = _compile(variant.file, arch, options, form)
    except CudaError:
        print(" failed", file=sys.stderr, flush=True)
        raise
    print(f" {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return data, log.encode()


def _compile(file: str, arch: int, options: tuple[str, ...], form: Form) -> tuple[bytes, str]:
    source, *header_texts = _sources(file)
    headers = [path.name.encode() for path in _headers()]
    return _run(source, header_texts, headers, file, arch, options, form)


def _run(
    source: bytes, header_texts: list[bytes], headers: list[bytes], file: str, arch: int, options: tuple[str, ...],
    form: Form,
) -> tuple[bytes, str]:  # fmt: skip
    nvrtc = nvrtc_bindings()
    if (problem := unknown_architecture(arch)) is not None:
        raise CompileError(problem)
    status, program = nvrtc.nvrtcCreateProgram(source, file.encode(), len(headers), header_texts, headers)
    _check(nvrtc, status, "nvrtcCreateProgram")
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _read(nvrtc, "ProgramLog", program).decode(errors="replace").rstrip("\0 \n")
        if int(status) != 0:
            raise CompileError(_failure(file, arch, options, form, log))
        if form == "cubin":
            return _read(nvrtc, "CUBIN", program), log
        return _read(nvrtc, "PTX", program).rstrip(b"\0"), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _read(nvrtc: ModuleType, what: str, program: Any) -> bytes:
    """One of NVRTC's results: nvrtcGet<what>Size, then nvrtcGet<what>."""
    status, size = getattr(nvrtc, f"nvrtcGet{what}Size")(program)
    _check(nvrtc, status, f"nvrtcGet{what}Size")
    data = bytearray(size)  # not bytes: Python shares small ones, and NVRTC writes into it
    (status,) = getattr(nvrtc, f"nvrtcGet{what}")(program, data)
    _check(nvrtc, status, f"nvrtcGet{what}")
    return bytes(data)


def _check(nvrtc: ModuleType, status: Any, function: str) -> None:
    if int(status) != 0:
        text = nvrtc.nvrtcGetErrorString(status)[1].decode()
        raise CudaError(f"{function} failed: {text}. The NVRTC in use is {dotted(nvrtc_version())}")


def _headers() -> list[Path]:
    return sorted(kernel_directory().glob("*.cuh"))


def _sources(file: str) -> list[bytes]:
    """The text of the kernel's file, then of every header: NVRTC reads nothing from disk itself."""
    path = kernel_directory() / file
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in kernel_directory().glob("*.cu")))
        raise CompileError(f"there is no kernel file {file!r}; known: {known or 'none, the installation is damaged'}")
    return [path.read_bytes(), *(header.read_bytes() for header in _headers())]


# --- a failure, made readable ---------------------------------------------------------------------------------------

_PTXAS_ERROR = re.compile(r"ptxas .*?, line (\d+); (?:error|fatal)\s*: (.*)")


def _failure(file: str, arch: int, options: tuple[str, ...], form: Form, log: str) -> str:
    """The first errors with their source lines, and the command that would give them again."""
    shown = _ptxas_errors(file, arch, options, log) or _front_end_errors(log) or log.splitlines()
    lines = "\n  ".join(shown[:12])
    where = "Change the source, "  # of somebody else
    if (kernel_directory() / file).is_file():
        where = f"The sources are in {kernel_directory()}. Where they are as installed, check {FLAGS_VARIABLE}, "
    return (
        f"compiling {file} for sm_{arch} failed:\n  {lines}\n"
        f"The options were: {shlex.join(options)}\n"
        f"{where}or install another NVRTC (this one is {dotted(nvrtc_version())})."
    )


def _front_end_errors(log: str) -> list[str]:
    """Of the front end's log, its errors only: each is a line ``file(line): error: ...``, the source, and a caret."""
    shown: list[str] = []
    inside = False
    for line in log.splitlines():
        if re.match(r"\S.*\b(error|warning|note|Remark)\b", line):
            inside = "error" in line and "detected in the compilation" not in line
        if inside and line.strip():
            shown.append(line)
    return shown


def _ptxas_errors(file: str, arch: int, options: tuple[str, ...], log: str) -> list[str]:
    """ptxas counts lines of PTX that nobody has seen (it is inline assembly gone wrong): quote them."""
    found = _PTXAS_ERROR.findall(log)
    if not found:
        return []
    as_ptx = tuple(o for o in options if not o.startswith(("--gpu-architecture", "--ptxas-options")))
    text, _ = _compile(file, arch, (f"--gpu-architecture=compute_{arch}", *as_ptx), "ptx")
    ptx = text.decode().splitlines()
    return [f"PTX line {number}: {message}\n    {ptx[int(number) - 1].strip()}" for number, message in found]
