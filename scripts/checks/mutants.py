"""Plant one bug at a time in a copy of refq4 and see which test catches it.

A test suite that is green says little until one has seen it fail. Each mutant below changes one decision on which the
numbers depend: a threshold, the order of nibbles, a rounding, the offset of the nested scales. The copy with the bug
goes through the ordinary tests, and the first test that fails is the mutant's killer.

    python scripts/checks/mutants.py                  all mutants; exits with 1 if one survives
    python scripts/checks/mutants.py --only nibble    those whose name contains the word
    python scripts/checks/mutants.py --write          also writes docs/mutants.md

The first run of all is on the copy without a bug: if that fails, no mutant's death would mean anything.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "mutants.md"

# In the order in which they are tried: the cheap ones first. None of them needs bitsandbytes.
TESTS = [
    "tests/core/test_codebooks.py",
    "tests/peer/test_golden.py",
    "tests/core/test_properties.py",
    "tests/core/test_pipeline.py",
    "tests/core/test_state.py",
    "tests/core/test_damaged_states.py",
    "tests/core/test_layers.py",
    "tests/core/test_autograd.py",
    "tests/core/test_extreme_values.py",
    "tests/core/test_functional.py",
]


@dataclass(frozen=True)
class Mutant:
    """One bug: in ``file``, ``old`` (which occurs there once) becomes ``new``."""

    name: str
    file: str
    old: str
    new: str


MUTANTS = [
    Mutant(
        "NF4 thresholds one unit in the last place too high",
        "refq4/internals/rounding.py",
        "return tuple(fp32((a + b) / 2) for a, b in pairwise(ascending))",
        "return tuple(-next_below(-fp32((a + b) / 2)) for a, b in pairwise(ascending))",
    ),
    Mutant(
        "FP4 pivot 0.00260417 spelt as the exact midpoint 1/384",
        "refq4/codebooks.py",
        "FP4_PIVOTS = (0.00260417,",
        "FP4_PIVOTS = (1 / 384,",
    ),
    Mutant(
        "FP4 ties on the negative side go to the larger magnitude",
        "refq4/codebooks.py",
        "down = [next_below(-p) for p in reversed(up)]",
        "down = [-p for p in reversed(up)]",
    ),
    Mutant(
        "x >= threshold goes up, instead of x > threshold",
        "refq4/reference.py",
        "torch.bucketize(scaled, thresholds, out_int32=True)",
        "torch.bucketize(scaled, thresholds, out_int32=True, right=True)",
    ),
    Mutant(
        "8-bit ties go to the upper entry",
        "refq4/codebooks.py",
        "torch.where(nearest > middles,",
        "torch.where(nearest >= middles,",
    ),
    Mutant(
        "first element in the low nibble",
        "refq4/layout.py",
        "return (codes[0::2] << 4) | codes[1::2]",
        "return (codes[1::2] << 4) | codes[0::2]",
    ),
    Mutant(
        "nibbles swapped in packing and in unpacking alike",
        "refq4/layout.py",
        "    return (codes[0::2] << 4) | codes[1::2]\n\n\ndef unpack(packed: Tensor, numel: int) -> Tensor:",
        "    return (codes[1::2] << 4) | codes[0::2]\n\n\n"
        "def unpack(packed: Tensor, numel: int) -> Tensor:\n"
        "    packed = (packed << 4) | (packed >> 4)",
    ),
    Mutant(
        "the odd nibble filled with code 0",
        "refq4/reference.py",
        "pad_code=code.zero_code()",
        "pad_code=0",
    ),
    Mutant(
        "storage padded with ones instead of zeros",
        "refq4/layout.py",
        "packed.new_zeros(missing)",
        "packed.new_ones(missing)",
    ),
    Mutant(
        "x / absmax instead of x * (1 / absmax)",
        "refq4/reference.py",
        "return (x * inverse.unsqueeze(1)).clamp_(-1.0, 1.0)",
        "return torch.where(inverse.unsqueeze(1) > 0, x / absmax.unsqueeze(1), 0 * x).clamp_(-1.0, 1.0)",
    ),
    Mutant(
        "an all-zero block keeps the infinite 1 / absmax",
        "refq4/reference.py",
        "inverse = torch.where(inverse.isfinite(), inverse, torch.zeros_like(inverse))",
        "pass",
    ),
    Mutant(
        "a NaN ranks above all thresholds",
        "refq4/reference.py",
        "torch.where(scaled.isnan(), thresholds[0], scaled)",
        "torch.where(scaled.isnan(), 2.0, scaled)",
    ),
    Mutant(
        "value and scale rounded to the target dtype before they are multiplied",
        "refq4/reference.py",
        "(values * absmax[blocks].unsqueeze(1)).view(-1).to(dtype)",
        "(values.to(dtype) * absmax[blocks].unsqueeze(1).to(dtype)).view(-1)",
    ),
    Mutant(
        "dequantising truncates bf16 through fp16",
        "refq4/reference.py",
        "(values * absmax[blocks].unsqueeze(1)).view(-1).to(dtype)",
        "(values * absmax[blocks].unsqueeze(1)).view(-1).to(torch.float16).to(dtype)",
    ),
    Mutant(
        "each scale taken from the block before",
        "refq4/reference.py",
        "(values * absmax[blocks].unsqueeze(1))",
        "(values * absmax[blocks].roll(1).unsqueeze(1))",
    ),
    Mutant(
        "absmax without the absolute value",
        "refq4/reference.py",
        "scales[blocks] = x.abs().amax(dim=1)",
        "scales[blocks] = x.amax(dim=1)",
    ),
    Mutant(
        "the short last block is left out of the blocks",
        "refq4/reference.py",
        "    if whole != numel:",
        "    if whole > numel:",
    ),
    Mutant(
        "the offset of the nested scales forgotten",
        "refq4/reference.py",
        ") + nested.offset.to(torch.float32)",
        ")",
    ),
    Mutant(
        "the offset of the nested scales subtracted",
        "refq4/reference.py",
        ") + nested.offset.to(torch.float32)",
        ") - nested.offset.to(torch.float32)",
    ),
    Mutant(
        "the offset one unit in the last place off",
        "refq4/reference.py",
        ") + nested.offset.to(torch.float32)",
        ") + nested.offset.to(torch.float32) * 1.0000001",
    ),
    Mutant(
        "grad_bias sums the first dimension only",
        "refq4/autograd.py",
        "leading = tuple(range(grad.dim() - 1))",
        "leading = (0,)",
    ),
    Mutant(
        "a single token whose gradient is wanted takes the GEMV path",
        "refq4/matmul.py",
        "    if gradient:\n        return Route(WANTS_GRADIENT, op)\n",
        "",
    ),
    Mutant(
        "blocks that straddle rows take the GEMV path",
        "refq4/matmul.py",
        "    if k % blocksize:\n        return Route(STRADDLING, op)\n",
        "",
    ),
    Mutant(
        "the bias parameter rewritten by a forward",
        "refq4/pipeline.py",
        "    return bias.to(dtype), BIAS_CAST",
        "    bias.data = bias.data.to(dtype)\n    return bias, BIAS_CAST",
    ),
    Mutant(
        "fp32 computed in bf16, as bitsandbytes 0.50.2 does on a CPU",
        "refq4/pipeline.py",
        "    return (x.to(dtype), None if bias is None else bias.to(dtype)), CAST_INPUT",
        "    dtype = torch.bfloat16\n    return (x.to(dtype), None if bias is None else bias.to(dtype)), CAST_INPUT",
    ),
]


def main() -> int:
    """Run the mutants that were asked for; 0 if all died."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutants whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants tried at a time")
    parser.add_argument("--write", action="store_true", help="write docs/mutants.md")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only.lower() in m.name.lower()]
    if not chosen:
        parser.error(f"no mutant's name contains {options.only!r}")
    if killer := first_failure(None):
        print(f"the tests fail without any mutant: {killer}", file=sys.stderr)
        return 1
    with ThreadPoolExecutor(options.jobs) as pool:
        killers = list(tqdm(pool.map(first_failure, chosen), total=len(chosen), unit="mutant", disable=None))
    width = max(len(m.name) for m in chosen)
    for mutant, killer in zip(chosen, killers, strict=True):
        print(f"{mutant.name:{width}}  {killer or 'SURVIVED'}")
    if options.write:
        PAGE.write_text(page(list(zip(chosen, killers, strict=True))))
    survivors = killers.count(None)
    print(f"{len(chosen)} mutants, {survivors} survived")
    return int(survivors > 0)


def first_failure(mutant: Mutant | None) -> str | None:
    """The id of the first test that fails on a copy with this bug, or None if all pass."""
    with tempfile.TemporaryDirectory(prefix="refq4-mutant-") as scratch:
        copy = Path(scratch)
        for part in ("refq4", "backends", "tests", "pyproject.toml"):
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            elif (ROOT / part).exists():
                shutil.copy(ROOT / part, copy / part)
        if mutant is not None:
            (copy / mutant.file).write_text(planted(mutant))
        environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", *TESTS]
        run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        if run.returncode == 0:
            return None
        failed = re.search(r"^(?:FAILED|ERROR) (\S+?(?:\[.*?\])?)(?: - |$)", run.stdout, re.MULTILINE)
        return failed.group(1) if failed else f"pytest exit {run.returncode}: {run.stdout[-200:]}{run.stderr[-200:]}"


def planted(mutant: Mutant) -> str:
    """The text of the mutant's file with the bug in it."""
    text = (ROOT / mutant.file).read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"mutant {mutant.name!r}: {mutant.old!r} occurs {text.count(mutant.old)} times, wanted once")
    return text.replace(mutant.old, mutant.new)


def page(results: list[tuple[Mutant, str | None]]) -> str:
    """docs/mutants.md."""
    rows = "\n".join(
        f"| {mutant.name} | `{Path(mutant.file).name}` | {f'`{killer}`' if killer else '**survived**'} |"
        for mutant, killer in results
    )
    survived = sum(killer is None for _, killer in results)
    return f"""# Bugs planted, and the tests that catch them

Written by `python scripts/checks/mutants.py --write`, which plants one bug at a time in a copy of the package and runs
the ordinary tests (without bitsandbytes) until one fails. {len(results)} bugs, {survived} survived.

| bug | in | first test that fails |
| --- | --- | --- |
{rows}
"""


if __name__ == "__main__":
    sys.exit(main())
