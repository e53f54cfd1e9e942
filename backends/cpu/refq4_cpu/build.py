"""From C source to a loaded library: find a compiler, choose a tier, compile once, call through ctypes.

The best tier (``features.py`` lists them) that the processor *and* the operating system can run is taken
(``kernels/cpu_features.c`` asks both); ``REFQ4_CPU_TIER`` names another one. A tier is one translation unit,
``kernels/library.c``, compiled in about two seconds on first use and kept in the cache
(``refq4/internals/buildcache.py``). A wheel that was built with ``REFQ4_BUILD_TIERS=1`` (``scripts/build_tiers.py``)
brings its tiers along, in ``built/``, and needs no compiler, unless ``CC`` or ``REFQ4_CPU_CFLAGS`` asks for one.

A tier that the processor lacks runs emulated, if it is named and ``REFQ4_CPU_EMULATE=1`` allows it: the same sources,
compiled without an -m flag against SIMDe's C versions of the instructions (``kernels/emulated_simd.h``,
``emulated_neon.h``). That is slow, and there for tests.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from refq4.internals.buildcache import RefusedError, cache_directory, cache_key, cached

from .features import FEATURES, FLAGS, NATIVE, TIERS, Tier

__all__ = [
    "EMULATE_VARIABLE",
    "TIERS",
    "TIER_VARIABLE",
    "BuildError",
    "Compiler",
    "Library",
    "Tier",
    "find_compiler",
    "load",
    "supported_tiers",
]

TIER_VARIABLE = "REFQ4_CPU_TIER"
EMULATE_VARIABLE = "REFQ4_CPU_EMULATE"

_ARM_NUMBERS = ("CPU implementer", "CPU part")  # of /proc/cpuinfo
_EMULATED = ("-O1", "-DREFQ4_EMULATED")  # -O3 would compile for minutes


class BuildError(RuntimeError):
    """Compiling or choosing a tier failed; the message says why and what to do."""


class CompileError(BuildError, RefusedError):
    """The compiler refused the kernels; the message quotes it and gives the command."""


@dataclass(frozen=True)
class Compiler:
    """A C compiler: the words that start it and the first line of its ``--version``."""

    command: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class Library:
    """A tier, compiled and loaded."""

    tier: Tier
    path: Path
    key: str
    compiler: Compiler
    functions: ctypes.CDLL


def load(tier: Tier | None = None) -> Library:
    """The library of a tier; of :func:`chosen_tier` if none is given.

    Raises:
        BuildError: no compiler, an unknown or unsupported tier, or the compiler failed.
        CacheError: the cache directory can't be used.
    """
    return _load(tier or chosen_tier(), os.environ.get("REFQ4_CACHE_DIR"), os.environ.get("CC"))


@cache
def _load(tier: Tier, _cache: str | None, _cc: str | None) -> Library:
    if not tier.emulated and (built := _built_in(f"refq4_cpu-{tier.name}")) is not None:
        key = cache_key(built.read_bytes(), processor_name())
        return Library(tier, built, key, Compiler((), "none: it came with the wheel"), ctypes.CDLL(str(built)))
    compiler = find_compiler()
    command = [*compiler.command, *compiler_flags(tier), "library.c"]
    if tier.emulated:
        command.append("-lm")  # fmaf, where there is no instruction for it
    key = cache_key(*_sources(), *command, compiler.version, platform.machine(), processor_name())
    stem = f"refq4_cpu-{tier.name}{'-emulated' if tier.emulated else ''}"
    path = _compiled(f"{stem}-{key}.so", command, f"the {tier} kernels")
    return Library(tier, path, key, compiler, ctypes.CDLL(str(path)))


def _built_in(stem: str) -> Path | None:
    """The library that came with the wheel, if it was made of the sources beside it and nobody asks for a compiler."""
    made_of = kernel_directory().parent / "built" / "sources"
    if os.environ.get("CC") or extra_flags() or not made_of.is_file():
        return None
    path = made_of.with_name(f"{stem}.so")
    return path if path.is_file() and made_of.read_text() == cache_key(*_sources()) else None


def compiler_flags(tier: Tier) -> list[str]:
    """How a tier's sources are compiled: flags that gcc and clang share, and what the environment adds."""
    speed = _EMULATED if tier.emulated else NATIVE
    if not tier.emulated and (platform.system(), platform.machine()) == ("Darwin", "arm64"):
        speed = (*speed, "-mcpu=native")  # on Linux a home, and the cache in it, may be shared by other processors
    return [*speed, *FLAGS, *tier.flags, *extra_flags()]


def supported_tiers() -> list[str]:
    """The tiers that this processor and operating system can run, best first."""
    bits = cpu_features()
    has = {name for name, feature in FEATURES.items() if feature.bit is None or bits >> feature.bit & 1}
    return [name for name, features in TIERS.items() if has.issuperset(features)]


def chosen_tier() -> Tier:
    """The tier in effect: the one asked for, checked, or the best that is not emulated."""
    possible, emulate = supported_tiers(), _emulation_allowed()
    asked = os.environ.get(TIER_VARIABLE, "")
    if not asked:
        return Tier(possible[0])
    if asked not in TIERS:
        raise BuildError(f"the environment variable {TIER_VARIABLE}={asked!r} is not a tier; known: {', '.join(TIERS)}")
    if asked in possible:
        return Tier(asked)
    if not emulate:
        raise BuildError(
            f"the environment variable {TIER_VARIABLE}={asked!r}: this machine can't run that tier, only "
            f"{', '.join(possible)}. To run it emulated, which is slow, set {EMULATE_VARIABLE}=1"
        )
    if (missing := emulation_lacks()) is not None:
        raise BuildError(f"the tier {asked!r} can't be emulated: {missing}")
    return Tier(asked, emulated=True)


def _emulation_allowed() -> bool:
    asked = os.environ.get(EMULATE_VARIABLE, "")
    if asked not in ("", "0", "1"):
        raise BuildError(f"the environment variable {EMULATE_VARIABLE}={asked!r} is neither '0' nor '1'")
    return asked == "1"


def emulation_lacks() -> str | None:
    """None if tiers can be emulated here, else what is missing and how to get it."""
    if _finds_simde((*find_compiler().command, *extra_flags())):
        return None
    return (
        "the compiler finds no <simde/x86/avx512.h>. Install SIMDe's headers, on Debian and Ubuntu with "
        "`apt-get install libsimde-dev`"
    )


@cache
def _finds_simde(command: tuple[str, ...]) -> bool:
    probe = "#if !__has_include(<simde/x86/avx512.h>) || !__has_include(<simde/arm/neon.h>)\n#error\n#endif\n"
    return (
        subprocess.run(
            [*command, "-E", "-x", "c", "-"], input=probe, capture_output=True, text=True, check=False
        ).returncode
        == 0
    )


def cpu_features() -> int:
    """The bits that ``kernels/cpu_features.c`` documents."""
    return _cpu_features(os.environ.get("REFQ4_CACHE_DIR"), os.environ.get("CC"))


@cache
def _cpu_features(_cache: str | None, _cc: str | None) -> int:
    if (built := _built_in("cpu_features")) is not None:
        return int(ctypes.CDLL(str(built)).refq4_cpu_features())
    compiler = find_compiler()
    command = [*compiler.command, "-O1", "-fPIC", "cpu_features.c"]
    source = (kernel_directory() / "cpu_features.c").read_bytes()
    path = _compiled(f"cpu_features-{cache_key(source, *command, compiler.version)}.so", command, "")
    return int(ctypes.CDLL(str(path)).refq4_cpu_features())


def find_compiler() -> Compiler:
    """The compiler to use: ``$CC``, then cc, gcc, clang, then the ziglang package.

    Raises:
        BuildError: there is none, or ``$CC`` names one that doesn't start.
    """
    asked = os.environ.get("CC", "")
    if asked:
        found = _version(tuple(words_of("CC")))
        if found is None:
            raise BuildError(f"the environment variable CC={asked!r} names no C compiler that starts")
        return found
    candidates = [(name,) for name in ("cc", "gcc", "clang") if shutil.which(name)]
    for command in [*candidates, *_zig()]:
        found = _version(command)
        if found is not None:
            return found
    raise BuildError(
        "there is no C compiler (looked for $CC, cc, gcc, clang). Install one, for example with "
        "`apt install gcc` or `pip install ziglang`"
    )


def _zig() -> list[tuple[str, ...]]:
    return [(sys.executable, "-m", "ziglang", "cc")] if importlib.util.find_spec("ziglang") else []


@cache
def _version(command: tuple[str, ...]) -> Compiler | None:
    try:
        done = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, errors="replace", timeout=600, check=False
        )
    except OSError:
        return None
    lines = done.stdout.splitlines()
    return Compiler(command, lines[0]) if done.returncode == 0 and lines else None


def _compiled(name: str, command: list[str], what: str) -> Path:
    """The library of that name from the cache, compiled if need be; ``what`` is told on stderr (if not empty)."""

    def build(target: Path) -> None:
        if what:
            print(f"refq4: compiling {what} (once, up to half a minute) ...", end="", file=sys.stderr, flush=True)
        start = time.perf_counter()
        full = [*command, "-shared", "-o", str(target)]
        done = subprocess.run(
            full, cwd=kernel_directory(), capture_output=True, text=True, errors="replace", check=False
        )
        took = f" {time.perf_counter() - start:.1f} s" if done.returncode == 0 else " failed"
        if what:
            print(took, file=sys.stderr, flush=True)
        if done.returncode != 0:
            raise CompileError(_failure(full, done.stderr))

    return cached(cache_directory("cpu"), name, build)


def _failure(command: list[str], stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if "error" in line] or stderr.splitlines()
    shown = "\n  ".join(lines[:5])
    return f"compiling the CPU kernels failed:\n  {shown}\nThe command was: {shlex.join(command)}\nSet CC to another."


def extra_flags() -> list[str]:
    """``REFQ4_CPU_CFLAGS``, for sanitizers and experiments; part of the cache key like all flags."""
    return words_of("REFQ4_CPU_CFLAGS")


def words_of(variable: str) -> list[str]:
    """An environment variable split as a shell would; a BuildError that names it if its quotes don't close."""
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise BuildError(f"the environment variable {variable}={os.environ[variable]!r}: {error}") from None


def kernel_directory() -> Path:
    """Where the C sources lie; the wheel is always installed unpacked."""
    return Path(str(files("refq4_cpu") / "kernels"))


def _sources() -> list[bytes]:
    return [path.read_bytes() for path in sorted(kernel_directory().glob("*.[ch]"))]


@cache
def processor_name() -> str:
    """The processor's model name, where the system tells it; of an ARM processor under Linux, its numbers."""
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return told.get("model name") or " ".join(f"{name} {told[name]}" for name in _ARM_NUMBERS if name in told)
