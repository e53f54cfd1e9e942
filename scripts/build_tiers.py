"""Hatchling's hook for a wheel with the CPU backend's tiers built in, so that ``cpu`` works without a compiler.

REFQ4_BUILD_TIERS=1 python -m hatchling build -t wheel         with the compiler in $CC, else cc

Without the variable the wheel is the same for every machine, and the kernels are compiled on first use. With it, each
tier of this machine's architecture is compiled once, and the best one is chosen where the wheel is used. That wheel is
for this operating system and architecture, and for a C library that is no older than the one here.

The environment in which a wheel is built has no torch, so this reads the two files that it needs without the package.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VARIABLE = "REFQ4_BUILD_TIERS"
ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "backends/cpu/refq4_cpu/kernels"


class BuildTiers(BuildHookInterface[Any]):
    """Adds ``refq4_cpu/built`` to a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        asked = os.environ.get(VARIABLE, "")
        if asked not in ("", "0", "1"):
            raise ValueError(f"the environment variable {VARIABLE}={asked!r} is neither '0' nor '1'")
        if asked != "1" or version == "editable":
            return
        self.scratch = tempfile.TemporaryDirectory()
        for path in built(Path(self.scratch.name)):
            build_data["force_include"][str(path)] = f"refq4_cpu/built/{path.name}"
        system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"], build_data["tag"] = False, f"py3-none-{system}"


def built(folder: Path) -> list[Path]:
    """Compile the tiers of this architecture; the last file says which sources they were made of."""
    features = module_of("features", KERNELS.parent / "features.py")
    cache = module_of("buildcache", ROOT / "refq4/internals/buildcache.py")
    compiler = shlex.split(os.environ.get("CC", "cc"))
    arm = platform.machine() in ("aarch64", "arm64")
    paths = []
    for name in features.TIERS:
        if name == "c" or name.startswith("neon") == arm:
            flags = (*features.NATIVE, *features.FLAGS, *features.Tier(name).flags)
            paths.append(compiled([*compiler, *flags, "library.c"], folder / f"refq4_cpu-{name}.so"))
    paths.append(compiled([*compiler, "-O1", "-fPIC", "cpu_features.c"], folder / "cpu_features.so"))
    sources = folder / "sources"
    sources.write_text(cache.cache_key(*(path.read_bytes() for path in sorted(KERNELS.glob("*.[ch]")))))
    return [*paths, sources]


def compiled(command: list[str], path: Path) -> Path:
    """The shared library that the command makes."""
    subprocess.run([*command, "-shared", "-o", str(path)], cwd=KERNELS, check=True)
    return path


def module_of(name: str, path: Path) -> ModuleType:
    """A file as a module, without the package around it."""
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = sys.modules[name] = module_from_spec(spec)  # a dataclass looks its module up
    spec.loader.exec_module(module)
    return module
