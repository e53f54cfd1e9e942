"""From a variant to a program: the kernel's file as host C++, with the scheduler linked in, compiled once and kept.

    kernels/*.cu, *.cuh   as they are; with REFQ4_HOST, device.cuh takes what is "on the device" from include/host.h
    fibers.cpp, ...       the scheduler, warp operations and main(): compiled once per mode, never instrumented

A *mode* is a way to look: plain, thread (ThreadSanitizer), address (AddressSanitizer and UBSan), debug (for gdb).
"""

from __future__ import annotations

import atexit
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache, partial
from importlib.resources import files
from pathlib import Path

from refq4.buildcache import cache_directory, cache_key, cached

from ..geometry import Variant

__all__ = ["MODES", "HostError", "compile_program", "find_compiler", "kernel_sources", "unavailable"]

# mode -> flags of the kernel, and the macro by which our headers know it
MODES: dict[str, tuple[tuple[str, ...], str]] = {
    "plain": (("-O1",), ""),
    "thread": (("-O1", "-g1", "-fsanitize=thread"), "-DHOST_THREAD_SANITIZER"),
    "address": (
        ("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        "-DHOST_ADDRESS_SANITIZER",
    ),
    "debug": (("-O0", "-g3"), ""),
}

# -ffp-contract=off: each operation rounds as it is written. -fno-strict-aliasing: kernels read memory in wider words.
_FLAGS = ("-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-Wno-attributes")
_RUNTIME = ("fibers.cpp", "warp.cpp", "replay.cpp")


class HostError(RuntimeError):
    """A kernel can't be built or run as host C++, or broke a rule when it ran; the message says what and where."""


def compile_program(variant: Variant, arch: int, mode: str, sources: Mapping[str, str] | None = None) -> Path:
    """The program that replays launches of ``variant``.

    Args:
        variant: file, entry and macros.
        arch: the compute capability that ``__CUDA_ARCH__`` tells the kernel, such as 80.
        mode: a key of :data:`MODES`.
        sources: the kernels' files by name instead of those of the package, for experiments.

    Raises:
        HostError: no compiler, or it failed.
        CacheError: the cache directory can't be used.
    """
    kept = sources is None  # experiments would only fill the cache
    sources = kernel_sources() if sources is None else sources
    flags = [*_FLAGS, *MODES[mode][0], *(f"-D{define}" for define in variant.defines)]
    flags += ["-DREFQ4_HOST", f"-D__CUDA_ARCH__={arch}0", f"-DHOST_ENTRY={variant.entry}", *_macro(mode)]
    compiler = find_compiler()
    texts = [part for item in sorted(sources.items()) for part in item]
    key = cache_key(*_own_texts(), *texts, *compiler, _version(compiler), *flags)
    objects = _runtime_objects(mode)

    def build(target: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="refq4-host-") as scratch:
            _write_sources(Path(scratch), sources, variant.file)
            _compile([*compiler, *flags, "-o", str(target), "kernel.cpp", *map(str, objects)], Path(scratch), variant)

    directory = cache_directory("cuda-host") if kept else _until_exit()
    return cached(directory, f"{Path(variant.file).stem}-{mode}-{key}", build)


def kernel_sources() -> dict[str, str]:
    """The kernels' files by name."""
    directory = Path(str(files("refq4_cuda") / "kernels"))
    return {path.name: path.read_text() for path in sorted(directory.glob("*.cu*"))}


def find_compiler() -> tuple[str, ...]:
    """The words that start the C++ compiler: ``$CXX``, then g++, clang++, c++.

    Raises:
        HostError: there is none.
    """
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(command[0]):
            return tuple(command)
    raise HostError(
        f"the environment variable CXX={shlex.join(asked)!r} names no C++ compiler that is installed"
        if asked
        else "there is no C++ compiler (looked for $CXX, g++, clang++, c++). Install one, for example: apt install g++"
    )


@cache
def unavailable(mode: str) -> str | None:
    """None if programs of that mode can be built and run here, else one sentence: what is missing, how to get it."""
    if sys.platform != "linux":
        return f"the kernels as host C++ need Linux (ELF sections, ucontext), and this is {sys.platform}"
    try:
        compiler = find_compiler()
    except HostError as error:
        return str(error)
    with tempfile.TemporaryDirectory(prefix="refq4-host-") as scratch:
        source, program = Path(scratch) / "empty.cpp", Path(scratch) / "empty"
        source.write_text("int main() { return 0; }\n")
        flags = MODES[mode][0]
        built = _run([*compiler, *flags, "-o", str(program), str(source)], Path(scratch))
        if built.returncode:
            return (
                f"{shlex.join([*compiler, *flags])} makes no programs here ({_first_errors(built.stderr, 1)}); "
                "sanitizers need libtsan, libasan and libubsan, which are part of g++ on Debian and Ubuntu"
            )
        ran = _run([str(program)], Path(scratch))
        if ran.returncode:
            return (
                f"programs with {shlex.join(flags)} don't start here ({ran.stderr.strip()[:200]}); where the message "
                "is about memory mappings: sudo sysctl vm.mmap_rnd_bits=28"
            )
    return None


@cache
def _until_exit() -> Path:
    """A directory that goes when this process does."""
    directory = tempfile.mkdtemp(prefix="refq4-host-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


def _runtime_objects(mode: str) -> list[Path]:
    compiler, directory = find_compiler(), Path(__file__).parent
    flags = [*_FLAGS, "-O1", "-g1", "-c", "-Iinclude", *_macro(mode)]
    key = cache_key(*_own_texts(), *compiler, _version(compiler), *flags)

    def build_from(source: str, target: Path) -> None:
        _compile([*compiler, *flags, source, "-o", str(target)], directory, None)

    home = cache_directory("cuda-host")
    return [cached(home, f"{Path(name).stem}-{mode}-{key}.o", partial(build_from, name)) for name in _RUNTIME]


def _macro(mode: str) -> list[str]:
    return [MODES[mode][1]] if MODES[mode][1] else []


def _write_sources(scratch: Path, sources: Mapping[str, str], main: str) -> None:
    """What the compiler sees: copies whose lines are known by their home, for debuggers and reports."""
    if main not in sources:
        raise HostError(f"there is no kernel file {main!r}; there are {', '.join(sorted(sources))}")
    home = Path(str(files("refq4_cuda") / "kernels"))
    for name, text in sources.items():
        (scratch / name).write_text(f'#line 1 "{home / name}"\n{text}')
    for path in (Path(__file__).parent / "include").glob("*.h"):
        (scratch / path.name).write_text(f'#line 1 "{path}"\n{path.read_text()}')
    (scratch / "kernel.cpp").write_text(f'#include "{main}"\n#include "entry.h"\n')


def _compile(command: list[str], directory: Path, variant: Variant | None) -> None:
    done = _run(command, directory)
    if done.returncode:
        what = f"{variant.file} ({' '.join(variant.defines)})" if variant else "the fibers"
        raise HostError(
            f"compiling {what} as host C++ failed:\n  {_first_errors(done.stderr, 8)}\n"
            f"The command was: {shlex.join(command)}"
        )


def _run(command: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    plain = os.environ | {"LC_ALL": "C"}  # messages in English, in ASCII
    return subprocess.run(command, cwd=directory, env=plain, capture_output=True, text=True, check=False)


def _first_errors(stderr: str, count: int) -> str:
    lines = [line for line in stderr.splitlines() if "error" in line] or stderr.splitlines()
    return "\n  ".join(lines[:count])


def _own_texts() -> list[str]:
    here = Path(__file__).parent
    return [path.read_text() for path in sorted([*here.glob("*.cpp"), *here.glob("*.h"), *here.glob("include/*.h")])]


@cache
def _version(compiler: tuple[str, ...]) -> str:
    return _run([*compiler, "--version"], Path()).stdout
