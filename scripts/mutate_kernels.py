"""Mutation testing of the kernels: one operator, constant or instruction of the C and CUDA sources changed at a time.

    python scripts/mutate_kernels.py                          every file; hours of processor time
    python scripts/mutate_kernels.py --sample 60              that many of each file, drawn with a fixed seed
    python scripts/mutate_kernels.py --only quantize --show   files whose name contains it, and each survivor as a diff
    python scripts/mutate_kernels.py --write                  also writes docs/mutation/kernels.json and the page

What is mutated, and what is left out: ``mutate_kernels_mutants.py``. A C mutant is compiled as the tier that holds it
(-O0, two seconds at most) and meets tests/test_cpu_ops.py and the guard pages of tests/test_cpu_memory.py, with the
mutated rung preferred by calibration. The AVX-512 files are compiled by the tests but can't run on a processor without
it: they are mutated where the processor has it. A CUDA mutant goes through NVRTC to PTX and meets the emulator's tests.
A crash and a loop without end are deaths; what does not compile is no mutant. Like ``mutate_core.py`` it works on a
copy, keeps what it has found in ``build/mutation``, and goes on from there.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mutate_core
import mutation_page
from mutate_core import WORK
from mutate_core_mutants import Mutant
from mutate_core_server import PLAN
from mutate_kernels_mutants import mutants_of
from mutate_kernels_server import tier_of

C, CUDA = Path("backends/cpu/refq4_cpu/kernels"), Path("backends/cuda/refq4_cuda/kernels")
C_FILES = (
    "refq4.h", "tiles.h", "driver.h", "tiles_2_avx2.h", "quantize_1_scalar.c", "quantize_2_avx2.c",
    "dequantize_1_scalar.c", "dequantize_2_avx2.c", "squared_error.c", "gemv_4bit_1_scalar.c", "gemm_4bit_1_scalar.c",
    "gemv_4bit_2_avx2.c", "gemm_4bit_2_avx2.c", "gemm_4bit_3_avx2_bytes.c", "gemm_4bit_4_avx2_blocked.c",
)  # fmt: skip
CUDA_FILES = (
    "device.cuh", "sums.cuh", "quantize_1_naive.cu", "quantize_2_vectorised.cu", "dequantize.cu",
    "gemv_4bit_1_naive.cu", "gemv_4bit_2_vectorised.cu", "gemm_4bit_3_tensor_core.cu", "gemm_4bit_4_ring.cu",
)  # fmt: skip
FILES = [*(C / name for name in C_FILES), *(CUDA / name for name in CUDA_FILES)]
TESTS = ["tests/test_cpu_ops.py", "tests/test_cpu_memory.py", "tests/test_cuda_emulator_kernels.py"]
# About all kernels at once: they would compile every variant of a mutated header.
NOT_FOR_MUTANTS = ("knows_every_instruction", "guard_pages_do_fault", "design_lets", "imports_nothing", "is_refused")
# The tests of test_cpu_ops.py that can tell something about a file, by what its name begins with.
STORAGE = "quantises|tails|zeros|thresholds|eight_bit|dequantises|written_past|number_is_read|guard_pages"
PRODUCTS = "tiles|products|straddle|multiplies|rung|same_bits|infinite|strided|tokens|guard_pages"
ABOUT = {
    "squared": "squared_error|longer_than",
    "quantize": STORAGE,
    "dequantize": STORAGE,
    "gem": PRODUCTS,
    "driver": PRODUCTS,
    "tiles": PRODUCTS,
}
# Which variants of the CUDA kernels reach a function of a header, or a part of a file, and what a test must be about.
REACHES = [
    ("device.cuh", "pack_bf16", "T_BF16", ""),
    ("device.cuh", "pack_fp16", "T_FP16", ""),
    ("device.cuh", "multiply_16x8x16", "tensor_core|ring", ""),
    ("device.cuh", "copy_async|shared_address", "ring", ""),
    ("device.cuh", "load8|load_once", "vectorised", ""),
    ("device.cuh", "store8", "dequantize", ""),
    ("device.cuh", "scale_of_block|divide", "naive|dequantize", "nested"),
    ("device.cuh", "nested_scale|scale_of_shifted", "vectorised|tensor_core|ring|dequantize", "nested"),
    ("device.cuh", "nibble", "gemv_4bit_1_naive|dequantize", ""),
    ("device.cuh", "store_product", "gem", ""),
    ("device.cuh", "to_fp32|from_fp32|pack", "T_BF16|T_FP16", ""),
    ("dequantize.cu", "load_codes", "dequantize.*(EIGHT_BIT|T_FP32)", ""),
    ("sums.cuh", "", "ring", ""),
]
NVRTC_SECONDS = 0.5  # a variant that the mutant's tests have not used yet has to be compiled


def main() -> int:
    """Run the mutants that were asked for; 0 unless one survived without an explanation."""
    options = arguments().parse_args()
    files = [file for file in FILES if not options.only or any(part in str(file) for part in options.only)]
    if not files:
        raise SystemExit(f"no file's name contains one of {options.only}")
    tree = Path(options.tree) if options.tree else mutate_core.copied_tree()
    known = seconds_of_tests(tree, options.fresh or options.again)
    every = [drawn(tree, file) for file in files]
    chosen = [mutant for mutants in every for mutant in mutants[: options.sample]]
    results = run(tree, mixed(chosen), known, options)
    report = mutate_core.summary(chosen, results, of=sum(map(len, every))) | {"what": "kernels"}
    report["left out"] = left_out(chosen, results)
    mutation_page.show(report, diffs=options.show)
    if options.write:
        mutation_page.write("kernels", report)
    return int(bool(mutation_page.unexplained(report)))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="files whose path contains one of these")
    parser.add_argument("--sample", type=int, metavar="N", help="draw N mutants of each file instead of taking all")
    mutate_core.add_shared_arguments(parser, budget=10.0)
    return parser


def drawn(tree: Path, file: Path) -> list[Mutant]:
    """The file's mutants in a random order that is always the same."""
    every = mutants_of(str(file), (tree / file).read_text())
    return sorted(every, key=mutate_core.shuffled)


def mixed(mutants: list[Mutant]) -> list[Mutant]:
    """One order over all files, so that a run that is cut short has tried some of each."""
    return sorted(mutants, key=mutate_core.shuffled)


def seconds_of_tests(tree: Path, fresh: bool) -> dict[str, dict[str, Any]]:
    """Each test's seconds on the kernels as they are, and which CUDA variants it launches; taken once and kept."""
    kept = WORK / "kernel_tests.json"
    if fresh or not kept.exists():
        print("running the kernels' tests once, with the time of each", file=sys.stderr)
        serve(tree, {"seconds": str(kept), "mutants": []}, WORK / "kernel_tests.log")
    known: dict[str, dict[str, Any]] = json.loads(kept.read_text())
    if failed := [test for test, what in known.items() if not what["passed"]]:
        raise SystemExit(f"these tests fail without any mutant: {', '.join(failed)}")
    return known


def tests_for(mutant: Mutant, known: dict[str, dict[str, Any]], budget: float) -> dict[str, float]:
    """The tests for a mutant in the order in which they are tried, as many as fit in ``budget`` seconds."""
    wanted = cuda_tests(mutant, known) if str(CUDA) in mutant.file else c_tests(mutant, known)
    chosen: dict[str, float] = {}
    compiled: set[str] = set()
    for test in wanted:
        new = set(known[test]["variants"]) - compiled
        seconds = known[test]["seconds"] + NVRTC_SECONDS * len(new)
        if sum(chosen.values()) + seconds <= budget or not chosen:
            chosen[test] = seconds
            compiled |= new
    return chosen


def c_tests(mutant: Mutant, known: dict[str, dict[str, Any]]) -> list[str]:
    name, tier = Path(mutant.file).name, tier_of(mutant)
    about = next((words for start, words in ABOUT.items() if name.startswith(start)), ".")
    tests = [t for t in known if "test_cpu" in t and re.search(about, t) and not any(w in t for w in NOT_FOR_MUTANTS)]
    tests = [t for t in tests if not re.search(r"avx512|\[avx2" if tier == "c" else r"avx512|\[c[-\]]", t)]
    if "rung" in about:  # of the tests of each rung, those of this one
        mine = Path(name).stem
        tests = [t for t in tests if not re.search(r"\[gem[vm]_4bit", t) or mine in t or not name.startswith("gem")]
    return in_turn(tests, known, lambda test: test.partition("[")[0])


def cuda_tests(mutant: Mutant, known: dict[str, dict[str, Any]]) -> list[str]:
    name = Path(mutant.file).name
    variant, about = name, ""
    for file, function, reached, said in REACHES:
        if file == name and re.match(function, mutant.function):
            variant, about = reached, said
            break
    tests = [t for t in known if any(re.search(variant, v) for v in known[t]["variants"]) and about in t]
    tests = [t for t in tests if not any(word in t for word in NOT_FOR_MUTANTS)]
    return in_turn(tests, known, lambda test: str([v for v in known[test]["variants"] if re.search(variant, v)]))


def in_turn(tests: list[str], known: dict[str, dict[str, Any]], group: Any) -> list[str]:
    """One of each group, then a second of each, and so on; fast ones first."""
    place: dict[str, tuple[int, float]] = {}
    seen: dict[str, int] = {}
    for test in sorted(tests, key=lambda t: (known[t]["seconds"], t)):
        name = group(test)
        place[test] = (seen.get(name, 0), known[test]["seconds"])
        seen[name] = seen.get(name, 0) + 1
    return sorted(tests, key=lambda t: (place[t], t))


def run(
    tree: Path, mutants: list[Mutant], known: dict[str, dict[str, Any]], options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """What became of each mutant, by key."""
    log = WORK / "kernels.jsonl"
    if options.fresh:
        log.unlink(missing_ok=True)
    if options.again:
        mutate_core.forget_survivors(log)
    results = mutate_core.read_results(log)
    pending = [m for m in mutants if m.key not in results]
    entries = [{"mutant": m.plain(), "tests": tests_for(m, known, options.budget)} for m in pending]
    if entries:
        until = time.monotonic() + 60 * options.minutes if options.minutes else None
        plan = {"mutants": entries, "jobs": options.jobs, "results": str(log)}
        serve(tree, plan, WORK / "kernels.log", log, until)
    return mutate_core.read_results(log)


def serve(
    tree: Path, plan: dict[str, Any], said: Path, results: Path | None = None, until: float | None = None
) -> None:
    """Start the server on this plan and show how far it is."""
    plan = {"way": "swap", "root": str(tree), "pytest": mutate_core.PYTEST, "files": TESTS, **plan}
    (WORK / "kernels.plan.json").write_text(json.dumps(plan))
    environment = mutate_core.environment(tree) | {PLAN: str(WORK / "kernels.plan.json")}
    with said.open("w") as out:
        command = [sys.executable, str(mutate_core.ROOT / "scripts" / "mutate_kernels_server.py")]
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        mutate_core.watch(server, len(plan["mutants"]), results, until, "kernels")
    if server.returncode not in (0, -15) and "seconds" not in plan:
        raise SystemExit(f"the server of mutants ended with {server.returncode}; see {said}")


def left_out(mutants: list[Mutant], results: dict[str, dict[str, Any]]) -> dict[str, int]:
    """How many were no mutants (they do not compile), and how many can't be judged by the emulator."""
    said = [results.get(m.key, {}) for m in mutants]
    return {
        "do not compile": sum(s.get("status") == "does not compile" for s in said),
        "unknown instruction": sum("emulator does not know" in str(s.get("by")) for s in said),
    }


if __name__ == "__main__":
    sys.exit(main())
