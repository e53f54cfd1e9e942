"""Run the CPU kernels under AddressSanitizer and UBSan, each tier over the catalogue of ``python -m refq4 verify``.

    python scripts/checks/sanitize_cpu.py             every tier (emulated where the processor lacks it), deep catalogue
    python scripts/checks/sanitize_cpu.py --quick     the same on the quick one

The sanitizers must be loaded before Python, so each tier runs in a process of its own with the compiler's libasan
preloaded. The first report of either ends the process; the exit status is the number of tiers that failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile

from refq4_cpu import build

FLAGS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=alignment -fno-sanitize-recover=all"


def main() -> int:
    """Run the tiers; returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="about 400 cases a tier instead of 7,000")
    parser.add_argument("--tier", action="append", choices=list(build.TIERS), help="only this tier (repeatable)")
    options = parser.parse_args()
    failed = 0
    for tier in options.tier or build.TIERS:
        run = sanitized(tier, "--quick" if options.quick else "--deep")
        print(f"{tier:12} {'clean' if run.returncode == 0 else 'FAILED'}", flush=True)
        if run.returncode:
            failed += 1
            print(run.stdout[-2000:], run.stderr[-6000:], file=sys.stderr)
    return failed


def sanitized(tier: str, depth: str) -> subprocess.CompletedProcess[str]:
    """``python -m refq4 verify`` of one tier, its kernels compiled with both sanitizers."""
    with tempfile.TemporaryDirectory(prefix="refq4-sanitized-") as cache:
        environment = os.environ | {
            build.TIER_VARIABLE: tier,
            build.EMULATE_VARIABLE: "1",
            "REFQ4_CPU_CFLAGS": FLAGS,
            "REFQ4_CACHE_DIR": cache,
            "LD_PRELOAD": " ".join(_runtime(name) for name in ("libasan.so", "libubsan.so")),
            # what Python and torch leave allocated at the end is not ours; theirs may also share a symbol name twice
            "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        command = [sys.executable, "-m", "refq4", "verify", "--backend", "cpu", depth]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _runtime(name: str) -> str:
    compiler = build.find_compiler().command
    found = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
