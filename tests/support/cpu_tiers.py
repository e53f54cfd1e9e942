"""Every tier of the CPU backend on every machine: emulated where the processor lacks its instructions."""

from __future__ import annotations

import platform

import pytest
from refq4_cpu import build

# What a test of every tier takes. neon_bf16 has the kernels of neon and neon_fhm, and each rung has tests of its own.
TIERS = [pytest.param(tier, marks=[pytest.mark.slow] if tier in ("neon", "neon_fhm") else []) for tier in build.TIERS]


def native(tier: str) -> bool:
    """Whether this machine's compiler has the tier's instructions, if not its processor."""
    x86, arm = platform.machine() in ("x86_64", "AMD64"), platform.machine() in ("aarch64", "arm64")
    return tier == "c" or (arm if "neon" in tier else x86)


def environment(tier: str) -> dict[str, str]:
    """What a process needs in its environment to run a tier."""
    return {build.TIER_VARIABLE: tier, build.EMULATE_VARIABLE: "1"}


def require(tier: str, request: pytest.FixtureRequest) -> build.Tier:
    """The tier as it runs here; skips the test only where it has to be emulated and SIMDe is not installed."""
    if tier in build.supported_tiers():
        return build.Tier(tier)
    if (missing := build.emulation_lacks()) is not None:
        stop = pytest.fail if request.config.getoption("--require-peers") else pytest.skip
        stop(f"this processor lacks the tier {tier}, and it can't be emulated: {missing}")
    return build.Tier(tier, emulated=True)
