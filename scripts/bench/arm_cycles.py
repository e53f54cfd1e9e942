"""Count the hot loops of the NEON kernels with llvm-mca: predicted cycles for 64 weights, one token. Nothing is run.

    python scripts/bench/arm_cycles.py       a few seconds; needs clang and llvm-mca 17 or newer, and ARM's C headers:
                                             apt-get install clang-19 llvm-19 libc6-dev-arm64-cross

Each loop is the kernel's own inline function, for a group of sixteen rows or a chunk of four, compiled for the
processor and taken from the assembler's text, branch included. 64 weights are 36 bytes (32 of codes, 4 of scale), so a
loop that takes C cycles at F GHz asks memory for 36 * F / C GB/s. The last column is how many cycles it may take if two
cores are to read 100 GB/s together.

What llvm-mca knows are LLVM's tables. For apple-m1 it takes those of an older Apple core, with three vector pipes
where an M1 has four: a third too slow.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from refq4_cpu import build

PROCESSORS = {"neoverse-v2": 2.8, "apple-m1": 3.2}  # name -> GHz, of Graviton4 and of an M1
PAIR_GB_S = 100
BYTES = 36  # of 64 weights
ITERATIONS = 400

# One loop each: name, type of x, elements of x in a step, bytes of codes in a step, sums, body. 128 weights a step.
LOOPS = [
    ("gemv_4bit_3_neon_bf16", "uint16_t", 32, 16, "[4][2]", "EACH_ROW add_chunk_bf16(sum[r], CODES(r), x, &t);"),
    ("gemm_4bit_3_neon_bf16", "uint16_t", 8, 64, "[4][4][2]", "add_group_bf16(sum, at[0] + i, x, &t, 1, 4);"),
    ("gemv_4bit_3_neon_fhm", "uint16_t", 32, 16, "[4][2]", "EACH_ROW add_chunk_halves(sum[r], CODES(r), x, &t);"),
    ("gemm_4bit_3_neon_fhm", "uint16_t", 8, 64, "[4][4][4]", "add_group_halves(sum, at[0] + i, x, &t, 1, 4);"),
    ("gemv_4bit_2_neon, bf16", "float", 32, 16, "[4][2]", "EACH_ROW add_chunk_rounded(sum[r], CODES(r), x, &t);"),
    ("gemm_4bit_2_neon, bf16", "float", 8, 64, "[4][4][4]", "add_group_rounded(sum, at[0] + i, x, &t, 1, 4);"),
    ("gemv_4bit_2_neon, fp32", "float", 32, 16, "[4][2]", "EACH_ROW add_chunk_exact(sum[r], CODES(r), x, &t);"),
    ("gemm_4bit_2_neon, fp32", "float", 8, 64, "[4][4][4]", "add_group_exact(sum, at[0] + i, x, &t, 1, 4);"),
]
HEAD = """
#include "gemm_4bit_2_neon.c"
#include "gemv_4bit_2_neon.c"
#include "gemm_4bit_3_neon_fhm.c"
#include "gemv_4bit_3_neon_fhm.c"
#include "gemm_4bit_3_neon_bf16.c"
#include "gemv_4bit_3_neon_bf16.c"
#define EACH_ROW UNROLL for (int r = 0; r < 4; r++)
#define CODES(r) vld1q_u8(at[r] + i)
"""
FUNCTION = """
void loop_{number}(float32x4_t *out, const uint8_t *const *at, const {type} *x, const void *table, int64_t n) {{
    const uint8x16x4_t t = table_planes(table);
    float32x4_t sum{sums} = {{0}};
    for (int64_t i = 0; i < n; i += {step}, x += {values}) {{
        {body}
    }}
    memcpy(out, sum, sizeof sum);
}}
"""


class Count(NamedTuple):
    """Of one loop on one processor, for 64 weights."""

    loop: str
    processor: str
    instructions: float
    cycles: float

    @property
    def gb_s(self) -> float:
        """What one core asks of memory."""
        return BYTES * PROCESSORS[self.processor] / self.cycles


def main() -> int:
    tools = find_tools()
    if isinstance(tools, str):
        print(tools, file=sys.stderr)
        return 1
    print("| loop | processor | instructions | cycles, predicted | GB/s a core | cycles for 100 GB/s a pair |")
    print("| --- | --- | --- | --- | --- | --- |")
    for count in counted(*tools):
        allowed = BYTES * PROCESSORS[count.processor] / (PAIR_GB_S / 2)
        print(
            f"| {count.loop} | {count.processor} | {count.instructions:.0f} | {count.cycles:.1f} | {count.gb_s:.1f} "
            f"| {allowed:.1f} |"
        )
    return 0


def find_tools() -> tuple[str, str] | str:
    """A clang and an llvm-mca that know neoverse-v2, or what to install."""
    for version in ("", *(f"-{number}" for number in range(25, 16, -1))):
        clang, mca = shutil.which(f"clang{version}"), shutil.which(f"llvm-mca{version}")
        if clang and mca:
            known = subprocess.run(
                [mca, "-mtriple=aarch64", "-mcpu=neoverse-v2"], input="nop\n", capture_output=True, text=True
            )
            if known.returncode == 0 and "not a recognized" not in known.stderr:
                return clang, mca
    return "no clang with an llvm-mca that knows neoverse-v2 (17 or newer): on Debian, apt-get install clang-19 llvm-19"


def counted(clang: str, mca: str) -> list[Count]:
    source = HEAD + "".join(
        FUNCTION.format(number=i, type=kind, values=values, step=step, sums=sums, body=body)
        for i, (_, kind, values, step, sums, body) in enumerate(LOOPS)
    )
    counts = []
    for processor in PROCESSORS:
        assembler = _compiled(clang, processor, source)
        for i, (name, *_) in enumerate(LOOPS):
            if processor != "apple-m1" or "neon_bf16" not in name:  # an M1 has no BF16
                counts.append(Count(name, processor, *_analysed(mca, processor, _loop(assembler, f"loop_{i}"))))
    return counts


def _compiled(clang: str, processor: str, source: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "loops.c"
        path.write_text(source)
        flags = [*build.compiler_flags(build.Tier("neon_bf16")), f"-mcpu={processor}", "-fno-unroll-loops"]
        command = [
            clang,
            "--target=aarch64-linux-gnu",
            *flags,
            "-I",
            str(build.kernel_directory()),
            "-S",
            "-o",
            "-",
            str(path),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _loop(assembler: str, function: str) -> str:
    """The instructions from the function's innermost loop's label to the branch back to it."""
    text = assembler.partition(f"\n{function}:")[2].partition(".cfi_endproc")[0]
    for label, body, branch in re.findall(
        r"^(\.L\w+):[^\n]*\n((?:(?!^\.L).)*?)(^\tb\.\w+\t\1\n)", text, re.DOTALL | re.MULTILINE
    ):
        if "tbl" in body:
            return f"{label}:\n{body}{branch}"
    raise ValueError(f"no loop with a look-up in {function}")


def _analysed(mca: str, processor: str, loop: str) -> tuple[float, float]:
    """Instructions and cycles of half a step: 64 weights."""
    command = [mca, "-mtriple=aarch64", f"-mcpu={processor}", "-mattr=+bf16", f"-iterations={ITERATIONS}"]
    report = subprocess.run(command, input=loop, capture_output=True, text=True, check=True).stdout
    numbers = (re.search(rf"^{what}:\s+(\d+)", report, re.MULTILINE) for what in ("Instructions", "Total Cycles"))
    instructions, cycles = (int(found[1]) / ITERATIONS / 2 for found in numbers if found)
    return instructions, cycles


if __name__ == "__main__":
    sys.exit(main())
