"""Reading machine code instead of a clock: registers, spills, and what the hot loop costs per weight.

    variant --NVRTC--> cubin --cuobjdump--> SASS --> the loop along K, whole --> instructions per weight
                                                  '-> what stands before and after it

A GPU is not needed, so a test can hold a kernel's loop to the budget in the kernel's header on any machine. What is
counted is the code as it stands: both sides of a branch, and no stall; a loop within the loop as often as it runs. It
says what a kernel asks of each part of a multiprocessor, and so which part it will wait for; it is no measurement.

    python -m refq4_cuda.sass                         the product kernels on sm_90
    python -m refq4_cuda.sass --arch 80 --all         every kernel of an architecture
    python -m refq4_cuda.sass --json                  the same as data

Instructions as they stand in the file before, in, and after the loop along K. What of the former runs how often, the
emulator counts (counts.py). The columns per weight (and lane: 32 lanes do this for 32 weights at a time):

    instr     issued instructions                 4 a clock and multiprocessor, for 32 lanes each
    alu       integer and logic ones among them   64 lanes a clock
    l1        wavefronts of shared memory and L1 for 32 weights: one a clock, 128 bytes at most
    bytes     read from global memory by the lane: packed weights, scales and x, cached or not
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from .geometry import ARCHITECTURES, Variant, product_variants
from .launch import all_variants
from .nvrtc import compile_variant, kernel_directory

__all__ = ["Count", "Instruction", "Resources", "budgets", "count", "disassemble", "hot_loop", "loop_nest", "resources"]

_ALU = re.compile(
    r"(LOP|PLOP|SHF|PRMT|IADD|VIADD|LEA|ISETP|FSETP|SEL|FSEL|[FIV]+MNMX|VIADDMNMX|VABS|P2R|R2P|FMNMX|IABS|BMSK|SGXT)"
)
_WIDTH = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


_RING, _STAGE_WEIGHTS = "gemm_4bit_4_ring.cu", 128


class ToolMissingError(RuntimeError):
    """cuobjdump or nvdisasm is not installed; the message says how to get them."""


@dataclass(frozen=True)
class Instruction:
    """One machine instruction; ``opcode`` with its suffixes, such as LDG.E.128.CONSTANT."""

    address: int
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without suffixes."""
        return self.opcode.split(".")[0]

    @property
    def width(self) -> int:
        """Bytes that a memory instruction moves per lane."""
        return next((_WIDTH[part] for part in self.opcode.split(".") if part in _WIDTH), 4)

    @property
    def jumps_to(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.name == "BRA" else None
        return int(found[1], 16) if found else None


@dataclass(frozen=True)
class Resources:
    """What ptxas says of one kernel."""

    registers: int
    stack: int
    spills: int


@dataclass(frozen=True)
class Count:
    """A kernel's resources and its hot loop, per weight; the latter None for kernels that have no such loop."""

    file: str
    entry: str
    defines: tuple[str, ...]
    arch: int
    resources: Resources
    size: int
    before: int
    loop: int
    after: int
    weights: float
    instructions: float | None
    alu: float | None
    l1: float | None
    bytes: float | None


def count(variant: Variant, arch: int) -> Count:
    """Compile (or find in the cache), disassemble, find the hot loop, count."""
    compiled = compile_variant(variant, arch)
    code = disassemble(compiled.path)[variant.entry]
    nest = loop_nest(code, variant)
    weights = sum(times * share for _, times, share in nest)
    first, last = (nest[0][0].address, nest[-1][0].address) if nest else (0, -1)

    def per(of: Callable[[Instruction], int]) -> float | None:
        return round(sum(times * of(one) for one, times, _ in nest) / weights, 3) if nest else None

    return Count(
        variant.file, variant.entry, variant.defines, arch, resources(compiled.log)[variant.entry],
        size=len(code),
        before=sum(one.address < first for one in code),
        loop=len(nest),
        after=sum(one.address > last for one in code) if nest else 0,
        weights=weights,
        instructions=per(lambda one: 1),
        alu=per(lambda one: bool(_ALU.match(one.opcode))),
        l1=per(_wavefronts),
        bytes=per(lambda one: one.width if one.name in ("LDG", "LDGSTS") else 0),
    )  # fmt: skip


def resources(log: str) -> dict[str, Resources]:
    """From ptxas' log (``--ptxas-options=-v``): kernel name to what it uses."""
    pattern = (
        r"function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    return {
        name: Resources(int(registers), int(stack), int(stores) + int(loads))
        for name, stack, stores, loads, registers in re.findall(pattern, log, re.DOTALL)
    }


def budgets(file: str) -> dict[int, tuple[float, float]]:
    """The budget in a kernel's header: tokens to (instructions, ALU operations) per weight."""
    text = (kernel_directory() / file).read_text()
    found = re.findall(r"TOKENS=(\d+)\s+instructions ([\d.]+)\s+alu ([\d.]+)", text)
    return {int(tokens): (float(instructions), float(alu)) for tokens, instructions, alu in found}


# --- from cubin to instructions -------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def disassemble(cubin: Path) -> dict[str, list[Instruction]]:
    """Kernel name to its instructions in order."""
    tool, path = _tools()
    made = subprocess.run(
        [tool, "-sass", str(cubin)], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    )
    kernels: dict[str, list[Instruction]] = {}
    for part in re.split(r"Function : ", made.stdout)[1:]:
        rows = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", part)
        kernels[part.split()[0]] = [Instruction(int(at, 16), opcode, rest) for at, opcode, rest in rows]
    return kernels


@lru_cache(maxsize=1)
def _tools() -> tuple[str, str]:
    """cuobjdump, and a PATH on which it finds nvdisasm: from NVIDIA's wheels, or from an installed toolkit."""
    wheels = [str(p) for entry in sys.path if entry for p in Path(entry).glob("nvidia/*/bin") if p.is_dir()]
    path = os.pathsep.join([*wheels, os.environ.get("PATH", "")])
    tool = shutil.which("cuobjdump", path=path)
    if tool is None or shutil.which("nvdisasm", path=path) is None:
        raise ToolMissingError(
            "reading machine code needs cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
    return tool, path


# --- the loop that does the work ------------------------------------------------------------------------------------


def loop_nest(code: list[Instruction], variant: Variant) -> list[tuple[Instruction, float, float]]:
    """The loop along K, whole: each instruction, how often a pass goes through it, and the weights that it stands for.

    A pass of the ring is a stage: 128 weights a lane. Where the pieces of a stage are a loop of their own, that one
    runs several times for each pass of the loop around it.
    """
    inner, weights = hot_loop(code, variant)
    if not inner:
        return []
    work, of_one = _work(code, variant)
    outer, times = inner, 1.0
    if variant.file == _RING and weights < _STAGE_WEIGHTS:
        outer = min((loop for loop in _loops(code) if loop[0].address < inner[0].address <= loop[-1].address), key=len)
        times = _STAGE_WEIGHTS / weights
    inside = {one.address for one in inner}
    return [
        (one, times if one.address in inside else 1.0, of_one if work and one.opcode.startswith(work) else 0.0)
        for one in outer
    ]


def hot_loop(code: list[Instruction], variant: Variant) -> tuple[list[Instruction], float]:
    """The innermost loop with the work in it, and how many weights a lane gets through in one pass of it."""
    work, weights_of_one = _work(code, variant)
    loops = list(_loops(code))
    if not work or not loops:
        return [], 0

    def issued(loop: list[Instruction]) -> int:
        return sum(one.opcode.startswith(work) for one in loop)

    best = max(loops, key=lambda loop: (issued(loop), -len(loop)))
    return best, issued(best) * weights_of_one


def _work(code: list[Instruction], variant: Variant) -> tuple[str, float]:
    """The opcode that a kernel exists to issue, and how many weights one stands for.

    An mma's A operand holds 16 x 16 (16 x 8 on Turing) of them, for all lanes together.
    """
    tokens = next((int(d.removeprefix("TOKENS=")) for d in variant.defines if d.startswith("TOKENS=")), 1)
    if variant.file.startswith(("gemm", "grad_input_4bit_2")):
        deep = any(i.opcode.startswith("HMMA.16816") for i in code)
        return "HMMA", (8 if deep else 4) / (tokens / 8)
    if variant.file.startswith(("gemv", "grad_input_4bit_1")):
        return "FFMA", 1 / tokens
    if variant.file == "dequantize.cu":
        return "STG.E.128", 4 if "T_FP32" in variant.defines else 8
    return "", 0


def _loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """Each backward jump's loop. One that crosses a shorter loop is none: it comes back from code laid out behind."""
    spans = sorted(
        ((t, i.address) for i in code if (t := i.jumps_to) is not None and t < i.address), key=lambda s: s[1] - s[0]
    )
    real: list[tuple[int, int]] = []
    for first, last in spans:
        if not any(first < f <= last < e or f < first <= e < last for f, e in real):
            real.append((first, last))
            yield [i for i in code if first <= i.address <= last]


def _wavefronts(instruction: Instruction) -> int:
    """Of 32 lanes at best: 128 bytes in one."""
    if instruction.name not in ("LDS", "STS", "LDG", "STG", "LDGSTS"):
        return 0
    return max(1, instruction.width // 4)


# --- the command line -----------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """The table at the top of the file."""
    parser = argparse.ArgumentParser(prog="python -m refq4_cuda.sass", description="What the kernels cost per weight.")
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=ARCHITECTURES)
    parser.add_argument("--all", action="store_true", help="quantising and dequantising too")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    listed = all_variants if chosen.all else product_variants
    counts = [count(variant, arch) for arch in chosen.arch for variant in listed(arch)]
    if chosen.json:
        print(json.dumps([asdict(c) for c in counts], indent=1))
        return
    heads = "".join(f"{head:>7}" for head in ("before", "loop", "after", "instr", "alu", "l1", "bytes"))
    print(f"{'kernel':26}{'macros':44}{'sm':>4}{'regs':>6}{'spill':>6}{heads}")
    for c in counts:
        print(_row(c))


def _row(c: Count) -> str:
    figures = (c.instructions, c.alu, c.l1, c.bytes)
    shown = "".join(f"{'-' if figure is None else format(figure, '.2f'):>7}" for figure in figures)
    spills = c.resources.spills + c.resources.stack
    named = f"{c.file.removesuffix('.cu'):26}{' '.join(c.defines):44}"
    sizes = f"{c.before:7}{c.loop:7}{c.after:7}"
    return f"{named}{c.arch:4}{c.resources.registers:6}{spills:6}{sizes}{shown}"


if __name__ == "__main__":
    main()
