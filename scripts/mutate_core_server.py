"""Runs the tests of many mutants from one warm pytest: a plug-in for ``mutate_core.py``, which starts it.

Importing torch and collecting the tests takes ten seconds; most mutants die in a tenth of one. So pytest imports and
collects once, and then every mutant gets a fork of that process, in two ways:

    swap      the code objects that differ are put into the live functions; the rest of the world is as collected
    reimport  where a constant, a default or a class body differs, or where the function has run during the import:
              forked before anything of refq4 was imported, and this process imports and collects by itself

A fork ends at the first test that fails. One that runs ten times as long as its tests should is dead as well.
"""

from __future__ import annotations

import gc
import importlib
import importlib.machinery
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NoReturn

import pytest
from mutate_core_mutants import Mutant, nested_code, same_bytecode

PLAN = "REFQ4_MUTATION_PLAN"
SPARE_MEMORY = 4 << 30


@dataclass
class Job:
    """A mutant, the tests that may kill it with their seconds, and a process on it."""

    mutant: Mutant
    tests: dict[str, float]
    pid: int = 0
    pipe: int = -1
    started: float = 0.0
    said: bytes = field(default=b"", repr=False)

    @property
    def patience(self) -> float:
        """CPU seconds that it gets."""
        return 15 + 10 * sum(self.tests.values())


class Server:
    """Hands out forks and writes what became of each mutant, a line of JSON at a time."""

    def __init__(self, plan: dict[str, Any], run: Callable[[Job], str | None]) -> None:
        self.jobs = [Job(Mutant(**entry["mutant"]), entry["tests"]) for entry in plan["mutants"]]
        self.at_a_time: int = plan["jobs"]
        self.results = Path(plan["results"])
        self.way: str = plan["way"]
        self.run = run
        self._killers: dict[str, list[str]] = {}

    def serve(self) -> None:
        waiting, running = list(reversed(self.jobs)), []
        with self.results.open("a") as log:
            while waiting or running:
                while waiting and len(running) < self.at_a_time:
                    running.append(self._start(waiting.pop()))
                ready, _, _ = select.select([job.pipe for job in running], [], [], 0.5)
                for job in list(running):
                    status = self._look(job, job.pipe in ready)
                    if status is not None:
                        running.remove(job)
                        self._learn(job, status)
                        seconds = round(time.monotonic() - job.started, 2)
                        log.write(
                            json.dumps({"key": job.mutant.key, "way": self.way, "seconds": seconds, **status}) + "\n"
                        )
                        log.flush()

    def _start(self, job: Job) -> Job:
        known = [test for test in self._killers.get(job.mutant.function, []) if test in job.tests]
        job.tests = {test: job.tests[test] for test in dict.fromkeys([*known, *job.tests])}
        job.pipe, write = os.pipe()
        job.started = time.monotonic()
        job.pid = os.fork()
        if job.pid == 0:
            os.close(job.pipe)
            self._be_the_mutant(job, write)
        os.close(write)
        return job

    def _be_the_mutant(self, job: Job, write: int) -> NoReturn:
        os.setpgid(0, 0)
        limit_resources(job.patience)
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        try:
            killer = self.run(job)
            said = {"status": "survived"} if killer is None else {"status": "killed", "by": killer}
        except NeedsReimport:
            said = {"status": "reimport"}
        except NotAMutant:
            said = {"status": "does not compile"}
        except BaseException as error:
            said = {"status": "error", "by": f"{type(error).__name__} while it was put in: {error}"[:200]}
        os.write(write, json.dumps(said).encode())
        os._exit(0)

    def _look(self, job: Job, ready: bool) -> dict[str, str] | None:
        if ready:
            said = os.read(job.pipe, 65536)
            job.said += said
            if said:
                return None
            os.close(job.pipe)
            _, status = os.waitpid(job.pid, 0)
            end_group(job.pid)
            shutil.rmtree(scratch_of(job.mutant), ignore_errors=True)
            if job.said:
                heard: dict[str, str] = json.loads(job.said)
                return heard
            how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status >> 8}"
            return {"status": "killed", "by": "time" if how in ("SIGXCPU", "SIGKILL") else how}
        if time.monotonic() - job.started > 10 * job.patience:
            end_group(job.pid)
        return None

    def _learn(self, job: Job, status: dict[str, str]) -> None:
        """The test that killed the last mutant of a function is the best guess for its next one."""
        if status.get("by") in job.tests:
            known = self._killers.setdefault(job.mutant.function, [])
            known[:] = [status["by"], *[test for test in known if test != status["by"]]][:6]


def import_once(plan: dict[str, Any]) -> None:
    """What most tests need and is not under test, imported before the forks instead of in each."""
    for name in plan.get("imports", ()):
        importlib.import_module(name)


def freeze() -> None:
    """Leave what is there now out of garbage collection: a fork would copy the memory that a collection writes to."""
    gc.collect()
    gc.freeze()


class NeedsReimport(Exception):  # noqa: N818  (no error: the other way has to be taken)
    """The difference is not inside functions alone."""


class NotAMutant(Exception):  # noqa: N818  (no error either)
    """It does not compile."""


def scratch_of(mutant: Mutant) -> Path:
    """A directory for a fork, which the server removes when it has ended."""
    return Path(tempfile.gettempdir()) / f"refq4-mutant-{mutant.key}"


def end_group(pid: int) -> None:
    """End a fork with all that it started; it leads a group of its own."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def limit_resources(seconds: float) -> None:
    """CPU time, and memory that a mutant's shapes could ask for."""
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 10))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + SPARE_MEMORY, size + SPARE_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# --- swap -----------------------------------------------------------------------------------------------------------


class Swapper:
    """The pytest plug-in of the first way: stands where pytest would run the tests it has collected."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.failed: str | None = None
        self.root = Path(plan["root"])

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        import_once(self.plan)
        items = {item.nodeid: item for item in session.items}
        self.functions = live_functions(str(self.root))
        freeze()
        Server(self.plan, lambda job: self.run(job, items)).serve()
        return True

    def run(self, job: Job, items: dict[str, pytest.Item]) -> str | None:
        self.swap(job.mutant)
        chosen = [items[test] for test in job.tests if test in items]
        for item, following in zip(chosen, [*chosen[1:], None], strict=False):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed:
                return self.failed
        return None

    def swap(self, mutant: Mutant) -> None:
        path = self.root / mutant.file
        source = path.read_bytes()
        old = compile(source, str(path), "exec", dont_inherit=True)
        new = compile(mutant.apply(source), str(path), "exec", dont_inherit=True)
        for before, after in differences(old, new):
            for function in self.functions.get(_place(before), []):
                function.__code__ = after
        for module in list(sys.modules.values()):
            if str(getattr(module, "__file__", None)).startswith(str(self.root)):
                for value in list(vars(module).values()):
                    if hasattr(value, "cache_clear"):
                        value.cache_clear()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid


def differences(old: CodeType, new: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    """The functions that differ, outer ones first, in pairs; NeedsReimport if anything else does too."""
    if same_bytecode(old, new):
        return
    mine, theirs = nested_code(old), nested_code(new)
    a_function = bool(old.co_flags & 1)  # CO_OPTIMIZED: modules and class bodies are not
    if a_function:
        if old.co_freevars != new.co_freevars:
            raise NeedsReimport
        yield old, new
    elif not same_bytecode(old, new, deep=False):
        raise NeedsReimport
    if len(mine) == len(theirs):
        for before, after in zip(mine, theirs, strict=True):
            yield from differences(before, after)


def live_functions(root: str) -> dict[tuple[Any, ...], list[FunctionType]]:
    found: dict[tuple[Any, ...], list[FunctionType]] = {}
    for thing in gc.get_objects():
        if type(thing) is FunctionType and thing.__code__.co_filename.startswith(root):
            found.setdefault(_place(thing.__code__), []).append(thing)
    return found


def _place(code: CodeType) -> tuple[Any, ...]:
    return code.co_filename, code.co_qualname, code.co_firstlineno


# --- reimport -------------------------------------------------------------------------------------------------------


class Selection:
    """The pytest plug-in of the second way: the chosen tests in their order, and which failed."""

    def __init__(self, tests: dict[str, float]) -> None:
        self.order = {test: at for at, test in enumerate(tests)}
        self.failed: str | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.failed is None:
            self.failed = f"{report.nodeid} (import)"


def reimport(plan: dict[str, Any]) -> Callable[[Job], str | None]:
    import_once(plan)
    root = Path(plan["root"])

    def run(job: Job) -> str | None:
        if any(str(getattr(m, "__file__", None)).startswith(str(root)) for m in sys.modules.values()):
            raise RuntimeError("something of the tree was imported before the fork")
        path, real = str(root / job.mutant.file), importlib.machinery.SourceFileLoader.get_code

        def get_code(self: Any, name: str) -> Any:
            if self.path != path:
                return real(self, name)
            return compile(job.mutant.apply(Path(path).read_bytes()), path, "exec", dont_inherit=True)

        importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
        chosen = Selection(job.tests)
        files = dict.fromkeys(test.partition("::")[0] for test in job.tests)
        quiet = ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]  # of import_once
        code = pytest.main([*plan["pytest"], *quiet, "-x", *files], plugins=[chosen])
        if chosen.failed is None and code != 0:
            return f"pytest exit {int(code)}"
        return chosen.failed

    return run


def main() -> int:
    plan = json.loads(Path(os.environ[PLAN]).read_text())
    os.chdir(plan["root"])
    if plan["way"] == "reimport":
        Server(plan, reimport(plan)).serve()
        return 0
    return int(pytest.main([*plan["pytest"], *plan["files"]], plugins=[Swapper(plan)]))


if __name__ == "__main__":
    sys.exit(main())
