"""Run one case, or a small sweep, of refq4's conformance checks on the fibers, and say what came of it.

python -m refq4_cuda.host gemm_4bit -M 3 -N 33 -K 192 --dtype bfloat16
python -m refq4_cuda.host gemm_4bit -M 3 -N 33 -K 192 --dtype bfloat16 --seed 7 --sanitize thread
python -m refq4_cuda.host dequantize_4bit -N 5 -K 96 --gdb
python -m refq4_cuda.host --all --sanitize address
"""

from __future__ import annotations

import argparse
import sys

import refq4
from refq4.backend import OPS
from refq4.registry import isolated_registry
from refq4.testing import Case, check
from refq4.testing.cases import DTYPES

from ..geometry import ARCHITECTURES
from .backend import Fibers, HostBackend

SCHEDULES = (0, 1, 7)


def sweep() -> list[Case]:
    """A case for each kernel, with sizes that leave tails."""
    cases = []
    for dtype in DTYPES:
        cases += [
            Case("quantize_4bit", n=5, k=77, dtype=dtype, weights="outliers"),
            Case("quantize_4bit", n=4, k=130, dtype=dtype, code="fp4", blocksize=128, weights="thresholds"),
            Case("quantize_blockwise", n=5, k=300, dtype=dtype, blocksize=256),
            Case("dequantize_4bit", n=7, k=96, dtype=dtype, nested=True),
            Case("dequantize_blockwise", n=3, k=300, dtype=dtype, blocksize=256),
            Case("gemv_4bit", n=7, k=65, dtype=dtype, bias=True),
            Case("gemv_4bit", n=33, k=2048, dtype=dtype, nested=True),
            Case("gemm_4bit", m=5, n=33, k=320, dtype=dtype, nested=True, bias=True, blocksize=32),
            Case("gemm_4bit", m=17, n=40, k=1088, dtype=dtype),
        ]
    return cases


def main(words: list[str] | None = None) -> int:
    """The command; returns how many cases were not the same as the reference."""
    options = _parser().parse_args(words)
    if not options.all and options.op is None:
        _parser().error("name an op, or ask for --all")
    mode = "debug" if options.gdb else options.sanitize
    fibers = Fibers(options.arch, options.seed, mode, multiprocessors=options.multiprocessors, verbose=not options.all)
    with isolated_registry():
        refq4.register_backend(HostBackend(fibers))
        return _sweep(fibers) if options.all else _ask(_case(options), fibers)


def _parser() -> argparse.ArgumentParser:
    first, _, examples = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "python -m refq4_cuda.host", description=first, epilog=examples, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("op", nargs="?", choices=OPS, help="what to run: " + ", ".join(OPS), metavar="op")
    parser.add_argument("-M", type=int, default=1, help="tokens (1)")
    parser.add_argument("-N", type=int, default=33, help="out_features (33)")
    parser.add_argument("-K", type=int, default=192, help="in_features (192)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of activations or results (bfloat16)")
    parser.add_argument("--code", default="nf4", help="the codebook (nf4)")
    parser.add_argument("--blocksize", type=int, default=64, help="of the weight (64)")
    parser.add_argument("--nested", action="store_true", help="double quantisation")
    parser.add_argument("--bias", action="store_true", help="add a bias to the product")
    parser.add_argument("--data", type=int, default=0, help="seed of the numbers (0)")
    parser.add_argument("--seed", type=int, default=0, help="schedule: 0 ascending, 1 descending, else random (0)")
    parser.add_argument("--multiprocessors", type=int, default=132, help="of that GPU: how far K is split (132)")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, default=80, help="as which GPU (80)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--sanitize", choices=("thread", "address"), default="plain", help="races; bounds and alignment")
    how.add_argument("--gdb", action="store_true", help="stop in gdb where each kernel begins")
    parser.add_argument("--all", action="store_true", help="a small sweep over ops and dtypes, three schedules each")
    return parser


def _case(options: argparse.Namespace) -> Case:
    return Case(
        options.op, m=options.M, n=options.N, k=options.K, dtype=options.dtype, code=options.code,
        blocksize=options.blocksize, nested=options.nested, bias=options.bias, seed=options.data,
    )  # fmt: skip


def _sweep(fibers: Fibers) -> int:
    failed = 0
    for case in sweep():
        for fibers.seed in SCHEDULES:
            failed += _ask(case, fibers)
    return failed


def _ask(case: Case, fibers: Fibers) -> bool:
    """Check a case and print what came of it; True if that is not "same"."""
    outcome = check(case, HostBackend.name)
    print(f"schedule {fibers.seed}: {outcome}", flush=True)
    return outcome.status != "same"


if __name__ == "__main__":
    sys.exit(main())
