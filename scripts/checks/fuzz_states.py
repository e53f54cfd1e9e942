"""Give QuantState.from_dict damaged state dicts, by the million; a wrong acceptance, another error, a hang is printed.

    python scripts/checks/fuzz_states.py                        10,000 states, a few seconds
    python scripts/checks/fuzz_states.py --count 1000000        the million, in about a quarter of an hour
    python scripts/checks/fuzz_states.py --seed 7 --only 1234   one of them again, with what it holds
    python scripts/checks/fuzz_states.py --layer                the same into Linear4bit.load_state_dict
    python scripts/checks/fuzz_states.py --atheris --seconds 600   guided by coverage (pip install -e '.[fuzz]')

What is tried: state_mutations.py; which of it is valid: state_oracle.py, both beside this file. Besides an answer that
the oracle does not give, these count as failures: any error but a ValueError, a state that saves, loads or decodes to
something else, ten seconds of computing without an answer, and an allocation that takes the process past 1 GiB more
than it had: no state here holds more than a few kilobytes, so whoever allocates that does so on a file's word.

The exit status is 0 if nothing was found, 1 otherwise.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from refq4.internals import remedies

sys.path.insert(0, str(Path(__file__).parent))
from state_mutations import as_python, mutate
from state_oracle import Entries, WrongAnswerError, check, check_layer

Ask = Callable[[Entries], bool]
ALLOWANCE = 1 << 30
PATIENCE = 10  # seconds of computing: one that waits for its turn is not stuck


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="states to try")
    parser.add_argument("--seconds", type=float, help="stop after this long; then --count is not looked at")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other states")
    parser.add_argument("--only", type=int, help="the one state of this number, and what it holds")
    parser.add_argument("--layer", action="store_true", help="load them into a Linear4bit")
    parser.add_argument("--atheris", action="store_true", help="guided by coverage of refq4/internals/statedict.py")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ask = check_layer if options.layer else check
    if options.only is not None:
        print(as_python(mutate(random.Random(f"{options.seed} {options.only}"))))
        return attempt(ask, options.seed, options.only, Counter())
    return with_atheris(ask, options) if options.atheris else by_numbers(ask, options)


def by_numbers(ask: Ask, options: argparse.Namespace) -> int:
    outcomes: Counter[str] = Counter()
    limit_memory()
    faulthandler.register(signal.SIGXCPU, chain=True, file=sys.__stderr__)
    signal.signal(signal.SIGPROF, _give_up)
    stop = time.monotonic() + options.seconds if options.seconds else None
    failed = 0
    numbers = itertools.count() if stop else range(options.count)
    try:
        for number in tqdm(numbers, unit=" states", disable=None, mininterval=1):  # on a terminal
            if number % 1000 == 0:
                limit_time()
            failed += attempt(ask, options.seed, number, outcomes)
            if failed >= 5 or (stop and time.monotonic() > stop):
                break
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    faulthandler.unregister(signal.SIGXCPU)
    print(f"{outcomes.total()} states: " + ", ".join(f"{times} {outcome}" for outcome, times in outcomes.most_common()))
    return 1 if failed else 0


def attempt(ask: Ask, seed: int, number: int, outcomes: Counter[str]) -> int:
    """Try one; returns 1 if it failed."""
    entries = mutate(random.Random(f"{seed} {number}"))
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    try:
        outcomes["valid and accepted" if ask(entries) else "invalid and refused"] += 1
    except WrongAnswerError as wrong:
        outcomes["FAILED"] += 1
        again = f"python scripts/checks/fuzz_states.py --seed {seed} --only {number}"
        print(f"\n{wrong}\nagain: {again}\n{as_python(entries)}\n")
        return 1
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return 0


def _give_up(*_: Any) -> NoReturn:
    raise WrongAnswerError(f"no answer in {PATIENCE} s")


def limit_memory() -> None:
    """From now on this process gets ALLOWANCE more, and an error beyond."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + ALLOWANCE
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def limit_time() -> None:
    """The alarm above is answered between two lines of Python; a loop in C ends the process, with a traceback."""
    soon = int(time.process_time()) + 10 * PATIENCE
    resource.setrlimit(resource.RLIMIT_CPU, (soon, resource.getrlimit(resource.RLIMIT_CPU)[1]))


# --- atheris ----------------------------------------------------------------------------------------------------------


class BytesAsRandom(random.Random):
    """Choices read off a fuzzer's bytes; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self.bits, self.left = int.from_bytes(data, "little"), len(data) * 8

    def getrandbits(self, k: int) -> int:
        taken, self.bits = self.bits & ((1 << k) - 1), self.bits >> k
        return taken

    def random(self) -> float:
        return self.getrandbits(16) / 65536

    def _randbelow(self, n: int) -> int:  # what choice, randrange and sample ask: no loop that rejects
        return self.getrandbits(max(n - 1, 1).bit_length() + 3) % n


def with_atheris(ask: Ask, options: argparse.Namespace) -> int:
    try:
        import atheris
    except ImportError:
        print(f"atheris is not installed: {remedies.install('fuzz')}", file=sys.stderr)
        return 2
    import refq4.internals.statedict
    import refq4.layout

    for module in (refq4.internals.statedict, refq4.layout):
        instrument(atheris, module)

    def one(data: bytes) -> None:
        entries = mutate(BytesAsRandom(data))
        try:
            ask(entries)
        except WrongAnswerError:
            print(as_python(entries), file=sys.stderr)
            raise

    found_in = f"-artifact_prefix={tempfile.gettempdir()}/"
    length = [f"-max_total_time={int(options.seconds)}"] if options.seconds else [f"-runs={options.count}"]
    flags = [
        "-max_len=512",
        "-len_control=0",
        f"-timeout={30 * PATIENCE}",
        f"-seed={options.seed + 1}",
        "-rss_limit_mb=4096",
    ]
    atheris.Setup([sys.argv[0], *length, *flags, found_in], one)
    atheris.Fuzz()  # ends the process: 0, or 77 after a failure
    return 0


def instrument(atheris: Any, module: Any) -> None:
    """Let atheris see the branches of a module that was imported already."""
    for owner in (module, *(value for value in vars(module).values() if isinstance(value, type))):
        for name, value in list(vars(owner).items()):
            if getattr(value, "__module__", None) == module.__name__ and hasattr(value, "__code__"):
                atheris.instrument_func(value)
                setattr(owner, name, value)


if __name__ == "__main__":
    sys.exit(main())
