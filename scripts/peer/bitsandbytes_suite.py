"""bitsandbytes' own 4-bit tests, on refq4 under the name ``bitsandbytes``.

    python scripts/peer/bitsandbytes_suite.py DIR                DIR: a checkout of bitsandbytes 0.50.2, or its tests/
    python scripts/peer/bitsandbytes_suite.py DIR --backend cpu --select gemv

The tests run twice, each time in a process of their own: on the installed bitsandbytes, and on refq4 in its place
(``sys.modules["bitsandbytes"]``). Printed is how many pass there, how many of those pass here, and each one that
doesn't, with the reason. Exit code 1 if there is one. A run takes 20 minutes, most of them in ``torch.compile``.

Not asked: the tests of 8-bit layers, of optimizers and of operators under ``torch.ops.bitsandbytes``, a namespace that
refq4 does not take. Missed on purpose, each an entry of ``docs/differences.md``: test_linear_kbit_fp32_bias (the bias
is never rewritten), test_embedding_not_implemented_error (embeddings can be saved), and those that look for a message
in a log (test_4bit_*_warnings: refq4 warns) or for its words (test_matmul_4bit_weight_orientation). Four fp32 cases of
test_gemv_4bit ("fc2" of dim 1024) take torch's rounding for the truth, which an exact product misses, as it says.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

FILES = {  # the tests of each file that are about 4 bits: a part of their names, any if empty
    "test_functional.py": ("Quantize4Bit", "normal_map"),
    "test_linear4bit.py": (),
    "test_autograd.py": ("matmul_4bit",),
    "test_modules.py": ("4bit", "FP4", "NF4", "not_implemented"),
    "test_parametrize.py": (),
}


class Absent:
    """Stands where bitsandbytes has an 8-bit class, so that a test file can be imported."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("refq4 has 4-bit layers only")


def put_refq4_in_place() -> None:
    """``import bitsandbytes`` gives refq4 from here on."""
    import refq4
    import refq4.autograd
    import refq4.functional
    import refq4.nn.parametrize

    parts = {"": refq4, ".functional": refq4.functional, ".nn": refq4.nn, ".nn.modules": refq4.nn}
    parts |= {".autograd": refq4.autograd, ".nn.parametrize": refq4.nn.parametrize}
    shims = {name: ModuleType(f"bitsandbytes{name}") for name in parts}
    for name, shim in shims.items():
        shim.__dict__.update({k: v for k, v in vars(parts[name]).items() if not k.startswith("__")})
        sys.modules[shim.__name__] = shim
    for name in ("Linear8bitLt", "Embedding8bit", "StableEmbedding", "Int8Params"):
        setattr(shims[".nn"], name, Absent)
    shims[".functional"].has_avx512bf16 = lambda: False  # type: ignore[attr-defined]  # no packed path to prepare for
    for name, shim in shims.items():
        parent, _, last = name.rpartition(".")
        if name:
            setattr(shims[parent], last, shim)


class Outcomes:
    """A pytest plugin: keeps the 4-bit tests, and what became of each."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if any(part in item.nodeid for part in FILES[item.path.name] or ("",))]

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.rpartition("/")[2]
        if report.when == "call" or not report.passed:
            reason = "" if report.passed else str(report.longrepr).strip().splitlines()[-1]
            self.found[name] = f"{report.outcome} {reason}".strip()


def run_here(tests: Path, engine: str, backend: str, select: str, out: Path) -> None:
    import pytest

    if engine == "refq4":
        put_refq4_in_place()
        import refq4

        refq4.set_backend(backend)
    sys.path.insert(0, str(tests.parent))
    outcomes = Outcomes()
    files = [str(tests / name) for name in FILES if (tests / name).exists()]
    options = ["-q", "-p", "no:cacheprovider", "--tb=line", "--continue-on-collection-errors", "-k", select]
    pytest.main([*options, f"--rootdir={tests.parent}", *files], plugins=[outcomes])
    out.write_text(json.dumps(outcomes.found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, help="a checkout of bitsandbytes 0.50.2, or the tests folder of one")
    parser.add_argument("--backend", default="auto", help="of refq4 (default: auto)")
    parser.add_argument("--select", default="", help="pytest's -k")
    parser.add_argument("--engine", choices=("bitsandbytes", "refq4"), help="run one only, and write its outcomes")
    parser.add_argument("--out", type=Path, help="a JSON file: what became of each test")
    options = parser.parse_args()
    tests = options.dir.resolve()
    tests = tests / "tests" if (tests / "tests").is_dir() else tests
    if not (tests / "test_linear4bit.py").exists():
        parser.error(f"no tests of bitsandbytes in {tests}")
    if options.engine and options.out:
        run_here(tests, options.engine, options.backend, options.select, options.out)
        return 0
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine in ("bitsandbytes", "refq4"):
            out = Path(folder) / engine
            line = [sys.executable, __file__, str(tests), "--engine", engine, "--out", str(out)]
            subprocess.run([*line, "--backend", options.backend, "--select", options.select], check=True)
            found[engine] = json.loads(out.read_text())
    theirs, ours = found["bitsandbytes"], found["refq4"]
    wanted = [name for name, outcome in theirs.items() if outcome == "passed"]
    missed = {name: ours.get(name, "not collected") for name in wanted if ours.get(name) != "passed"}
    for name, outcome in missed.items():
        print(f"{name}\n    {outcome}")
    print(f"{len(wanted):,} pass on bitsandbytes; {len(wanted) - len(missed):,} of them on refq4 ({options.backend})")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
