"""The NEON kernels as an ARM processor runs them: cross-compiled, under qemu, on operands against guard pages.

What the reference wrote is held to bit for bit where bits are promised. Products keep the error budget, and have the
bits of the same kernel emulated on this machine, so what ``verify`` finds of an emulated tier holds for the processor.
On a 64-bit ARM machine the same runs without qemu.
"""

from __future__ import annotations

import platform
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from patience import BUSY
from torch import Tensor

from refq4.backend import PackedWeight
from refq4.codebooks import get_codebook
from refq4.reference import ReferenceBackend

pytest.importorskip("refq4_cpu", reason="the package refq4_cpu is not installed")
sys.path.insert(0, str(Path(__file__).parents[3] / "scripts" / "bench"))
import arm_cycles
import cpu_tiers
from refq4_cpu import CpuBackend, build
from refq4_cpu.kernels import DTYPES, GRAD_INPUT_KERNELS, PRODUCT_KERNELS, TILES
from test_cpu_ops import assert_same_bits, assert_within_budget, random_weight

pytestmark = pytest.mark.reference_only("it names its backend itself")

TIER = "neon_bf16"  # has the kernels of neon and neon_fhm, too
REFERENCE = ReferenceBackend()
QUANTIZE, DEQUANTIZE, PRODUCT, TILED_PRODUCT = range(4)  # of arm_harness.c
LENGTHS = [(1, 64), (31, 32), (64, 64), (4097, 64), (333, 48), (65, 7), (1000, 32), (8192, 4096)]
SHAPES = [(1, 32, 32), (5, 96, 32), (17, 64, 64), (35, 192, 64), (3, 256, 256), (66, 160, 32), (33, 1024, 512)]
STRADDLING = [(7, 77, 64), (3, 33, 32), (2, 100, 48)]
TOKENS = (1, 2, 5, 8, 11)


class Harness(NamedTuple):
    """The compiled ``arm_harness.c`` and what starts it."""

    command: list[str]

    def run(self, *arguments: str, cases: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([*self.command, *arguments], input=cases, capture_output=True, timeout=BUSY, check=False)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    compiler, runner = _tools()
    return Harness([*runner, _compiled(compiler, build.Tier(TIER), tmp_path_factory.mktemp("arm"))])


def _compiled(compiler: list[str], tier: build.Tier, folder: Path) -> str:
    target, source = str(folder / "arm_harness"), str(Path(__file__).with_name("arm_harness.c"))
    flags = [*build.compiler_flags(tier), "-static", "-I", str(build.kernel_directory())]
    done = subprocess.run([*compiler, *flags, source, "-o", target, "-lm"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def _tools() -> tuple[list[str], list[str]]:
    """What compiles for 64-bit ARM, and what runs it; the test is skipped where one is missing."""
    if platform.machine() in ("aarch64", "arm64"):
        if TIER not in build.supported_tiers():
            pytest.skip("this ARM processor has no BF16 instructions")
        return [*build.find_compiler().command], []
    missing = [tool for tool in ("aarch64-linux-gnu-gcc", "qemu-aarch64") if shutil.which(tool) is None]
    if missing:
        pytest.skip(
            f"there is no {' and no '.join(missing)} to run ARM code with: on Debian and Ubuntu, "
            "`apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user`"
        )
    return ["aarch64-linux-gnu-gcc"], ["qemu-aarch64", "-cpu", "max"]


def _case(op: int, kernel: int, dtype: torch.dtype, m: int, n: int, k: int, blocksize: int, *operands: Tensor) -> bytes:
    """One case, at both ends of its pages."""
    data = b"".join(operand.contiguous().view(torch.uint8).numpy().tobytes() for operand in operands)
    ends = [struct.pack("8q", op, kernel, DTYPES[dtype], m, n, k, blocksize, at_start) + data for at_start in (0, 1)]
    return b"".join(ends)


def _results(done: subprocess.CompletedProcess[bytes], expected: list[Tensor]) -> Iterator[Tensor]:
    """The tensors that the harness wrote, each as its expected one is shaped; those of the two ends are the same."""
    assert done.returncode == 0, f"exit status {done.returncode} (-11 is a fault)\n{done.stderr.decode()}"
    assert len(done.stdout) == sum(tensor.nbytes for tensor in expected)
    at = 0
    for tensor in expected:
        chunk = bytearray(done.stdout[at : at + tensor.nbytes])
        yield torch.frombuffer(chunk, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
        at += tensor.nbytes


def test_quantising_and_dequantising_give_the_references_bits(harness: Harness) -> None:
    code, cases, expected = get_codebook("nf4").on("cpu"), [], []
    for dtype in DTYPES:
        for numel, blocksize in LENGTHS:
            A = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
            A[:: max(numel // 3, 1)] = torch.tensor([0.0, float("nan"), float("inf"), 1e-40])[numel % 4]
            packed, absmax = REFERENCE.quantize_4bit(A, code, blocksize)
            pad = code.zero_code() if numel % 2 else 0
            cases.append(_case(QUANTIZE, 0, dtype, numel, pad, 0, blocksize, A, code.thresholds, code.order))
            expected += [packed, absmax] * 2
            weight = PackedWeight(packed, absmax, code.values, blocksize, (numel,), "nf4")
            cases.append(_case(DEQUANTIZE, 0, dtype, numel, 0, 0, blocksize, packed, code.values, absmax))
            expected += [REFERENCE.dequantize_4bit(weight, dtype)] * 2
    for got, wanted in zip(_results(harness.run(cases=b"".join(cases)), expected), expected, strict=True):
        assert_same_bits(got, wanted)


def test_every_kernel_multiplies_as_it_does_emulated_and_within_the_budget(
    harness: Harness, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = harness.run("names").stdout.decode().split()
    for name, value in cpu_tiers.environment(TIER).items():
        monkeypatch.setenv(name, value)
    tier = cpu_tiers.require(TIER, request)
    emulated, cases, expected, checks = CpuBackend(), [], [], []
    for n, k, blocksize in SHAPES + STRADDLING:
        weight = random_weight(n, k, blocksize)
        tiles = emulated.prepare_weight(weight)
        for kernel in PRODUCT_KERNELS:
            for dtype in DTYPES:
                for m in TOKENS:
                    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
                    bias = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
                    for op, layout, operand in ((PRODUCT, "canonical", weight), (TILED_PRODUCT, TILES, tiles)):
                        refused = kernel.refuses(tier.features, dtype, m, k, blocksize, layout)
                        if refused is not None or operand is None:
                            continue
                        number, operands = (
                            names.index(kernel.name),
                            (x, bias, weight.packed, weight.code, weight.absmax),
                        )
                        cases.append(_case(op, number, dtype, m, n, k, blocksize, *operands))
                        y = emulated._product(x, operand, bias, kernel)
                        assert_within_budget(y, x, weight, bias)
                        expected += [y, y]
                        checks.append(kernel.name)
    assert set(checks) == {kernel.name for kernel in PRODUCT_KERNELS if kernel.feature in build.TIERS[TIER]}
    results = list(_results(harness.run(cases=b"".join(cases)), expected))
    for name, got, wanted in zip([name for name in checks for _ in range(2)], results, expected, strict=True):
        assert torch.equal(got, wanted), name


def test_the_gradient_is_what_the_emulated_kernel_gives(
    harness: Harness, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = harness.run("names").stdout.decode().split().index(GRAD_INPUT_KERNELS[0].name)
    for name, value in cpu_tiers.environment(TIER).items():
        monkeypatch.setenv(name, value)
    cpu_tiers.require(TIER, request)
    emulated, cases, expected = CpuBackend(), [], []
    for n, k, blocksize in SHAPES + STRADDLING:
        weight = random_weight(n, k, blocksize)
        for dtype in DTYPES:
            for m in TOKENS:
                grad = torch.randn(m, n, generator=torch.Generator().manual_seed(m)).to(dtype)
                zeros = torch.zeros(k, dtype=dtype)  # the harness adds a bias
                operands = (grad, zeros, weight.packed, weight.code, weight.absmax)
                cases.append(_case(PRODUCT, number, dtype, m, k, n, blocksize, *operands))
                expected += [emulated.grad_input_4bit(grad, weight)] * 2
    for got, wanted in zip(_results(harness.run(cases=b"".join(cases)), expected), expected, strict=True):
        assert torch.equal(got, wanted)


def test_instructions_that_simde_lacks_are_emulated_to_the_bit(harness: Harness, tmp_path: Path) -> None:
    if (missing := build.emulation_lacks()) is not None:
        pytest.skip(missing)
    compiler = [*build.find_compiler().command]
    emulated = Harness([_compiled(compiler, build.Tier(TIER, emulated=True), tmp_path)]).run("instructions")
    done = harness.run("instructions")
    assert (done.returncode, emulated.returncode, len(done.stdout)) == (0, 0, 20000 * 16 * 4)
    got, wanted = (torch.frombuffer(bytearray(run.stdout), dtype=torch.int32) for run in (emulated, done))
    assert torch.equal(got, wanted), f"{(got != wanted).sum()} of {got.numel()} results differ"


def test_the_cycles_that_the_page_predicts_are_those_that_llvm_counts() -> None:
    if isinstance(tools := arm_cycles.find_tools(), str):
        pytest.skip(tools)
    page = (Path(__file__).parents[3] / "docs" / "cpu-kernels.md").read_text()
    rows = re.findall(
        r"^\| `(g\w+)`(, \w+)? \| (Neoverse V2|Apple M1)[^|]* \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.M
    )
    assert len(rows) == 9
    counts = {(count.loop, count.processor): count for count in arm_cycles.counted(*tools)}
    for kernel, dtype, processor, *figures in rows:
        count = counts[f"{kernel}{dtype}", {"Neoverse V2": "neoverse-v2", "Apple M1": "apple-m1"}[processor]]
        found = (count.instructions, count.cycles, count.gb_s)
        assert found == pytest.approx(tuple(map(float, figures)), rel=0.1), "another LLVM may differ a little"


def test_the_guard_pages_do_fault(harness: Harness) -> None:
    assert harness.run("beyond").returncode == -11
