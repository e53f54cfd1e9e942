"""The kernels under AddressSanitizer and UBSan, over the catalogue of ``python -m refq4 verify``.

    pytest tests/backends/cpu/test_cpu_sanitizers.py            the tier of this machine, or $REFQ4_CPU_TIER: 400 cases
    pytest -m slow tests/backends/cpu/test_cpu_sanitizers.py    every tier, emulated where the processor lacks it: 7,000

The sanitizers must be loaded before Python, so each tier runs in a process of its own with the compiler's libasan
preloaded. The first report of either ends the process.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("refq4_cpu", reason="the package refq4_cpu is not installed: pip install -e .")
from refq4_cpu import CpuBackend, build

pytestmark = pytest.mark.reference_only("it names its backend itself")
FLAGS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=alignment -fno-sanitize-recover=all"


def assert_clean(tier: str, depth: str, cache: str) -> None:
    """``python -m refq4 verify`` of one tier, its kernels compiled with both sanitizers."""
    compiler = build.find_compiler().command
    runtimes = (
        subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan.so", "libubsan.so")
    )
    environment = os.environ | {
        build.TIER_VARIABLE: tier,
        build.EMULATE_VARIABLE: "1",
        "REFQ4_CPU_CFLAGS": FLAGS,
        "REFQ4_CACHE_DIR": cache,
        "LD_PRELOAD": " ".join(map(str.strip, runtimes)),
        # what Python and torch leave allocated at the end is not ours; theirs may also share a symbol name twice
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, "-m", "refq4", "verify", "--backend", "cpu", depth]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    assert "cpu agrees with reference" in run.stdout


def test_the_chosen_tier_is_clean_on_the_quick_catalogue(tmp_path):
    if (reason := CpuBackend().available()) is not None:
        pytest.skip(f"the CPU backend is not available: {reason}")
    assert_clean(build.chosen_tier().name, "--quick", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("tier", build.TIERS)
def test_every_tier_is_clean_on_the_deep_catalogue(tier, tmp_path):
    assert_clean(tier, "--deep", str(tmp_path))
