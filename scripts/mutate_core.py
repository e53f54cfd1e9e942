"""Mutation testing of the core: change one thing at a time in refq4's Python, and see whether an ordinary test notices.

    python scripts/mutate_core.py                            all modules; hours of processor time
    python scripts/mutate_core.py --sample 1500              that many, drawn at random with a fixed seed
    python scripts/mutate_core.py --only layout --show       one module, and each survivor as a diff
    python scripts/mutate_core.py --again                    the survivors once more, with the tests written since
    python scripts/mutate_core.py --write                    also writes docs/mutation/core.json and the page

What is mutated: ``mutate_core_mutants.py`` (mutmut's operators). How: ``mutate_core_server.py`` (a fork of a warm
pytest for each mutant). Which tests: those that, by coverage.py's contexts, execute the mutated line; one of each test
function first, fast ones first, the last killers of the same function before all. It works on a copy of the tree and
keeps what it has found in ``build/mutation``: a run that was cut short goes on where it was. ``mutation_page.py``
writes docs/mutation-testing.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import coverage
import mutation_page
from mutate_core_mutants import Mutant, mutants_of
from mutate_core_server import PLAN
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "mutation"
SEED = 5
MODULES = (
    "codebooks", "layout", "checks", "state", "statedict", "quantization", "reference", "pipeline", "matmul",
    "autograd", "ops", "params", "nn", "lending", "functional", "backend", "registry", "convert", "trace",
    "explain",
)  # fmt: skip
# Everything that is quick and about the core; the tests of the kernels are mutate_kernels.py's.
TEST_FILES = (
    "codebooks", "golden", "properties", "pipeline", "state", "layers", "autograd", "hostile_inputs",
    "registry", "trace", "lending", "testing", "differences", "compile", "warnings", "memory", "tutorial",
    "arguments", "corners", "damaged_states", "hardening", "fuzz_states", "quantize_model", "fsdp",
    "accelerate",
)  # fmt: skip
TESTS = [*(f"tests/test_{name}.py" for name in TEST_FILES), "refq4"]
PYTEST = ["-q", "-p", "no:cacheprovider", "--tb=no", "-p", "no:randomly"]


def main() -> int:
    """Run the mutants that were asked for; 0 unless one survived without an explanation."""
    options = arguments().parse_args()
    modules = [name for name in MODULES if name in options.only] if options.only else MODULES
    if not modules:
        raise SystemExit(f"none of {options.only} is one of {', '.join(MODULES)}")
    tree = Path(options.tree) if options.tree else copied_tree()
    if options.again:
        forget_survivors(WORK / "results.jsonl")
    covered = coverage_of(tree, options.fresh or options.again)
    every = drawn(tree, modules)
    chosen = every[: options.sample]
    results = run(tree, chosen, covered, options)
    report = summary(chosen, results, of=len(every))
    mutation_page.show(report, diffs=options.show)
    if options.write:
        mutation_page.write("core", report)
    return int(bool(mutation_page.unexplained(report)))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="MODULE", help="modules by name, without .py")
    parser.add_argument("--sample", type=int, metavar="N", help="draw N mutants at random instead of taking all")
    add_shared_arguments(parser, budget=12.0)
    return parser


def add_shared_arguments(parser: argparse.ArgumentParser, budget: float) -> None:
    """What mutate_kernels.py takes, too."""
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants tried at a time")
    parser.add_argument("--minutes", type=float, help="stop after so long; the next run goes on from there")
    parser.add_argument("--budget", type=float, default=budget, help="seconds of tests for a mutant (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs found")
    parser.add_argument("--again", action="store_true", help="try those again that survived; for tests written since")
    parser.add_argument("--show", action="store_true", help="print each survivor as a diff")
    parser.add_argument("--write", action="store_true", help="write the report and the page in docs/")
    parser.add_argument("--tree", help="work on this copy of the repository instead of making one")


def copied_tree() -> Path:
    """A copy of what the tests need, so that an edit during the run changes nothing."""
    tree = WORK / "tree"
    for part in ("refq4", "backends", "pytest_refq4", "tests", "docs", "scripts", "pyproject.toml", "README.md"):
        if (ROOT / part).is_dir():
            shutil.rmtree(tree / part, ignore_errors=True)
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            tree.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / part, tree / part)
    return tree


def environment(tree: Path) -> dict[str, str]:
    paths = [tree, tree / "backends" / "cpu", tree / "backends" / "cuda", ROOT / "scripts"]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}


# --- which tests execute a line ---------------------------------------------------------------------------------------


class Covered:
    """From coverage contexts: the tests of each line, their seconds, and which lines an import runs."""

    def __init__(self, data: Path, log: Path, tree: Path) -> None:
        self._data, self._tree = coverage.CoverageData(str(data)), tree
        self._data.read()
        self._lines: dict[str, dict[int, list[str]]] = {}
        text = log.read_text()
        self.seconds: dict[str, float] = defaultdict(lambda: 0.004)
        for taken, test in re.findall(r"^(\d+\.\d+)s (?:call|setup) +(.*?) *$", text, re.MULTILINE):
            self.seconds[test] += float(taken)
        self.failed = set(re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", text, re.MULTILINE))

    def lines(self, file: str) -> dict[int, list[str]]:
        if file not in self._lines:
            self._lines[file] = self._data.contexts_by_lineno(str(self._tree / file))
        return self._lines[file]

    def tests(self, mutant: Mutant, budget: float, reimport: bool = False) -> dict[str, float]:
        """The tests for a mutant, in the order in which they are tried, as many as fit in ``budget`` seconds."""
        lines = self.lines(mutant.file)
        on_line = self._named(lines.get(n, []) for n in range(mutant.line, mutant.last_line + 1))
        for above in range(mutant.line - 1, mutant.line - 10, -1):
            if on_line:
                break
            on_line = self._named([lines.get(above, [])])  # Dynamo reads a line without running it
        tests = self._in_order(on_line)
        if reimport:  # what an import computes can show in any test of the module
            rest = self._named(lines.values()) - on_line
            tests += self._in_order(rest)
        chosen, spent = {}, 0.0
        for test in tests:
            if spent + self.seconds[test] <= budget or not chosen:
                chosen[test] = self.seconds[test]
                spent += self.seconds[test]
        return chosen

    def at_import(self, mutant: Mutant) -> bool:
        lines = self.lines(mutant.file)
        return any("" in lines.get(n, []) for n in range(mutant.line, mutant.last_line + 1))

    def _named(self, contexts: Iterable[list[str]]) -> set[str]:
        found = {context.rpartition("|")[0] for several in contexts for context in several}
        return found - self.failed - {""}

    def _in_order(self, tests: set[str]) -> list[str]:
        """One case of each test function, then a second of each, and so on; fast ones first."""
        place, seen = {}, defaultdict(int)
        for test in sorted(tests, key=lambda t: (self.seconds[t], t)):
            function = test.partition("[")[0]
            place[test] = (seen[function], self.seconds[test])
            seen[function] += 1
        return sorted(tests, key=lambda t: (place[t], t))


def coverage_of(tree: Path, fresh: bool) -> Covered:
    """The coverage of the tests, taken once and kept."""
    WORK.mkdir(parents=True, exist_ok=True)
    data, log, settings = WORK / "coverage", WORK / "coverage.log", WORK / "coveragerc"
    if fresh or not log.exists():
        settings.write_text(f"[run]\nsource = refq4\ndata_file = {data}\n")
        command = [sys.executable, "-m", "pytest", *PYTEST, "--durations=0", "--cov", f"--cov-config={settings}",
                   "--cov-context=test", "--cov-report=", *TESTS]  # fmt: skip
        print("running the tests once, with the coverage of each", file=sys.stderr)
        with (WORK / "running.log").open("w") as out:
            subprocess.run(command, cwd=tree, env=environment(tree), stdout=out, stderr=out, check=False)
        (WORK / "running.log").replace(log)
    return Covered(data, log, tree)


# --- the mutants ------------------------------------------------------------------------------------------------------


def drawn(tree: Path, modules: list[str]) -> list[Mutant]:
    """All mutants in a random order that is always the same: the first of them, however many, are a sample."""
    every: list[Mutant] = []
    for name in tqdm(modules, desc="mutating", unit="module", disable=None):
        file = f"refq4/{name}.py"
        if (tree / file).exists():
            every += kept_mutants(file, (tree / file).read_bytes())
    return sorted(every, key=shuffled)


def kept_mutants(file: str, source: bytes) -> list[Mutant]:
    """The mutants of a file; finding them takes seconds, so they are kept until it or the operators change."""
    rules = (ROOT / "scripts" / "mutate_core_mutants.py").read_bytes()
    kept = WORK / f"{Path(file).stem}-{hashlib.sha1(rules + source).hexdigest()[:12]}.json"
    if not kept.exists():
        WORK.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps([mutant.plain() for mutant in mutants_of(file, source)]))
    return [Mutant(**plain) for plain in json.loads(kept.read_text())]


def shuffled(mutant: Mutant) -> bytes:
    """A key that sorts mutants at random, and always the same way."""
    return hashlib.sha1(f"{SEED} {mutant.key}".encode()).digest()


def run(tree: Path, mutants: list[Mutant], covered: Covered, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What became of each mutant, by key."""
    log = WORK / "results.jsonl"
    if options.fresh:
        log.unlink(missing_ok=True)
    until = time.monotonic() + 60 * options.minutes if options.minutes else None
    results = read_results(log)
    for mutant in mutants:
        if mutant.key not in results and not covered.tests(mutant, options.budget) and not covered.at_import(mutant):
            results[mutant.key] = {"status": "survived", "by": None, "uncovered": True}
    pending = [m for m in mutants if m.key not in results]
    serve(tree, "swap", pending, covered, options, log, until)
    results |= read_results(log)
    again = [m for m in mutants if needs_reimport(results.get(m.key), m, covered)]
    serve(tree, "reimport", again, covered, options, log, until)
    return results | read_results(log)


def needs_reimport(result: dict[str, Any] | None, mutant: Mutant, covered: Covered) -> bool:
    if result is None or result.get("way") == "reimport" or result.get("uncovered"):
        return False
    return result["status"] == "reimport" or (result["status"] == "survived" and covered.at_import(mutant))


def read_results(log: Path) -> dict[str, dict[str, Any]]:
    """The last result of each mutant; where putting it in failed there is none, and the next run tries again."""
    if not log.exists():
        return {}
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    return {line["key"]: line for line in lines if line["status"] != "error"}


def forget_survivors(log: Path) -> None:
    """Leave only the killed in the log: new tests can't have brought those back."""
    killed = [result for result in read_results(log).values() if result["status"] == "killed"]
    log.write_text("".join(f"{json.dumps(result)}\n" for result in killed))


def serve(
    tree: Path,
    way: str,
    mutants: list[Mutant],
    covered: Covered,
    options: argparse.Namespace,
    log: Path,
    until: float | None,
) -> None:
    """Start the server on these mutants and show how far it is."""
    if not mutants:
        return
    reimports = way == "reimport"
    entries = [{"mutant": m.plain(), "tests": covered.tests(m, options.budget, reimports)} for m in mutants]
    plan = {
        "way": way,
        "root": str(tree),
        "jobs": options.jobs,
        "results": str(log),
        "pytest": PYTEST,
        "imports": ["torch._dynamo", "hypothesis", "pytest_cov"],
        "files": sorted({test.partition("::")[0] for entry in entries for test in entry["tests"]}),
        "mutants": entries,
    }
    (WORK / f"{way}.json").write_text(json.dumps(plan))
    env = environment(tree) | {PLAN: str(WORK / f"{way}.json")}
    with (WORK / f"{way}.log").open("w") as out:
        command = [sys.executable, str(ROOT / "scripts" / "mutate_core_server.py")]
        server = subprocess.Popen(command, env=env, stdout=out, stderr=out)
        watch(server, len(mutants), log, until, way)
    if server.returncode not in (0, -15):
        raise SystemExit(f"the server of mutants ended with {server.returncode}; see {WORK / f'{way}.log'}")


def watch(server: subprocess.Popen[bytes], total: int, log: Path | None, until: float | None, what: str) -> None:
    """A progress bar until the server ends, which is made to end at the time ``until``."""

    def done() -> int:
        return log.read_bytes().count(b"\n") if log is not None and log.exists() else 0

    before = done()
    with tqdm(total=total, desc=what, unit="mutant", disable=None) as bar:
        while server.poll() is None:
            if until is not None and time.monotonic() > until:
                server.terminate()
            time.sleep(0.5)
            bar.update(done() - before - bar.n)


def summary(mutants: list[Mutant], results: dict[str, dict[str, Any]], of: int) -> dict[str, Any]:
    """The report: totals of each module, and the survivors; ``of`` is how many mutants there are in all."""
    tried = [m for m in mutants if results.get(m.key, {}).get("status") in ("killed", "survived")]
    tried = [m for m in tried if "emulator does not know" not in str(results[m.key].get("by"))]
    modules: dict[str, dict[str, int]] = {}
    for mutant in tried:
        row = modules.setdefault(mutant.file, {"mutants": 0, "killed": 0})
        row["mutants"] += 1
        row["killed"] += results[mutant.key]["status"] == "killed"
    survivors = [m for m in tried if results[m.key]["status"] == "survived"]
    return {
        "what": "core",
        "seed": SEED,
        "mutants in all": of,
        "complete": len(tried) == of,
        "files": {file: modules[file] for file in sorted(modules)},
        "survivors": [
            {"key": m.key, "file": m.file, "function": m.function, "before": m.before, "after": m.after}
            for m in sorted(survivors, key=lambda m: (m.file, m.start))
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
