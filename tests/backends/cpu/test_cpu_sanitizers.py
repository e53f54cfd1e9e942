"""The kernels under AddressSanitizer and UBSan: the best tier here, all of them in scripts/checks/sanitize_cpu.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("refq4_cpu", reason="the package refq4_cpu is not installed: pip install -e .")
from refq4_cpu import CpuBackend, build

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts" / "checks"))
import sanitize_cpu

pytestmark = pytest.mark.reference_only("it names its backend itself")


def test_the_best_tier_is_clean_on_the_quick_catalogue():
    if (reason := CpuBackend().available()) is not None:
        pytest.skip(f"the CPU backend is not available: {reason}")
    run = sanitize_cpu.sanitized(build.chosen_tier().name, "--quick")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    assert "cpu agrees with reference" in run.stdout
