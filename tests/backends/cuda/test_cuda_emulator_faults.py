"""Faults planted in copies of the CUDA kernels, one at a time: the emulator, or a comparison, must find each.

A test suite that is green says little until one has seen it fail. Each fault below is one replacement in a kernel's
source, of the kind that people make. The copy is compiled by NVRTC and runs the same check that the kernel as it is
passes. ``docs/cuda-without-a-gpu.md`` has this list as a table.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("refq4_cuda", reason="the package refq4_cuda is not installed: pip install -e .")
import cuda_cases as cases
from refq4_cuda import emulator, launch, nvrtc
from refq4_cuda.experts import grouped_product

from refq4.codebooks import get_codebook
from refq4.testing.budget import Budget, assert_same_bits, assert_within_budget, grouped_budget

cases.require_nvrtc()

PAGE = Path(__file__).parents[3] / "docs" / "cuda-without-a-gpu.md"
NUMBERS = "other numbers"

# --- the checks -------------------------------------------------------------------------------------------------------


def check_product(rung: str, m: int, n: int, k: int, dtype: str = "bfloat16", arch: int = 80) -> None:
    """A product within the error budget, with bias."""
    given = cases.operands(m, n, k, 64, dtype, bias=True)
    y = cases.multiply(given, arch, rung, multiprocessors=4)
    assert_within_budget(y, given.x, given.packed, given.state, given.bias)


def ring() -> None:
    """Several steps of the ring in every warp, K split over CTAs, N with a tail."""
    check_product("ring", 5, 33, 4096)


def tensor_core() -> None:
    """A tail in M and in N."""
    check_product("tensor_core", 5, 33, 512)


def turing() -> None:
    """The two half steps of sm_75."""
    check_product("tensor_core", 5, 33, 512, "float16", 75)


def vectorised() -> None:
    """fp32 on the SIMT path."""
    check_product("vectorised", 3, 9, 1088, "float32")


def naive() -> None:
    """A weight of more than 65,536 elements."""
    check_product("naive", 1, 20, 4096)


def dequantised() -> None:
    """Nested scales to bf16 and fp32, and a result at an address that allows no vectors."""
    packed, state = cases.quantised(33, 64, 64, nested=True)
    weight = state.packed_weight(packed)
    for dtype, offset in ((torch.bfloat16, 0), (torch.bfloat16, 1), (torch.float32, 0)):
        room = cases.poisoned((33 * 64 + 1,), dtype)
        out = room[offset:][: 33 * 64].view(33, 64)
        cases.run(launch.dequantize_4bit(weight, out, 80), 80)
        assert_same_bits(out, cases.REFERENCE.dequantize_4bit(weight, dtype))


def quantised() -> None:
    """A short last block, with an odd number of elements."""
    code = get_codebook("nf4").on("cpu")
    A = torch.randn(64 * 30 + 11, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted, scales = cases.REFERENCE.quantize_4bit(A, code, 64)
    packed, absmax = cases.poisoned(wanted.shape, wanted.dtype), cases.poisoned(scales.shape, scales.dtype)
    cases.run(launch.quantize(A, code, 64, True, packed, absmax, 80), 80)
    assert_same_bits(packed, wanted)
    assert_same_bits(absmax, scales)


def experts() -> None:
    """Two experts of three with rows, and K split over CTAs."""
    given = cases.operands(4, 3 * 33, 4096, 64, "bfloat16")
    state = given.state.copy()
    state.shape, offsets = torch.Size((3, 33, 4096)), [0, 1, 1, 4]
    y = cases.poisoned((4, 33), torch.bfloat16)
    weight = state.packed_weight(given.packed)
    cases.run(grouped_product(given.x, weight, None, torch.tensor(offsets), y, 80, 132) or [], 80)
    grouped_budget(given.x, given.packed, state, offsets).check(y, "grouped product")


def check_gradient(rung: str, m: int, n: int, k: int, nested: bool) -> None:
    """x [M, K] times the weight as it is stored, [K, N]."""
    packed, state = cases.quantised(k, n, 64, nested=nested)
    weight = state.packed_weight(packed)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).bfloat16()
    y = cases.poisoned((m, n), torch.bfloat16)
    cases.run(launch.product(x, weight, None, y, 80, 4, rung, transposed=True) or [], 80)
    decoded = cases.REFERENCE.dequantize_4bit(weight, torch.float32)
    Budget.of(x.double() @ decoded.double(), x @ decoded.bfloat16(), torch.bfloat16).check(y, "product")


def gradient() -> None:
    """Several steps of 64 rows, the last one short, split over CTAs, and a tail in M and in N."""
    check_gradient("tensor_core", 9, 144, 520, nested=True)


def tiled() -> None:
    """Tails everywhere, and rows that begin in the middle of a byte."""
    check_gradient("tiled", 5, 33, 71, nested=False)


CHECKS: tuple[Callable[[], None], ...] = (
    ring, tensor_core, turing, vectorised, naive, dequantised, quantised, experts, gradient, tiled
)  # fmt: skip


# --- the faults -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """One bug: in ``file``, ``old`` (which occurs there once) becomes ``new``; ``check`` then dies of ``dies_of``."""

    name: str
    file: str
    old: str
    new: str
    check: Callable[[], None]
    dies_of: str


RING, PLAIN, SUMS, SHARED = "gemm_4bit_4_ring.cu", "gemm_4bit_3_tensor_core.cu", "sums.cuh", "device.cuh"
GROUPED, GRADIENT = "grouped.cuh", "grad_input_4bit_2_tensor_core.cu"
RACE, ACCESS, UNWRITTEN, DIVERGENCE = "RaceError", "AccessError", "UninitialisedError", "ConvergenceError"

FAULTS = [
    Fault(
        "no barrier between filling the table and reading it",
        PLAIN,
        "    make_table(table, p);\n    __syncthreads();\n",
        "    make_table(table, p);\n",
        tensor_core,
        RACE,
    ),
    Fault(
        "no barrier before the sums overwrite the table",
        PLAIN,
        "    __syncthreads();\n    float *sums",
        "    float *sums",
        tensor_core,
        RACE,
    ),
    Fault(
        "no __syncwarp after the wait: another lane's copy is read",
        RING,
        "copy_async_wait<STAGES - 1>();\n        __syncwarp();",
        "copy_async_wait<STAGES - 1>();",
        ring,
        RACE,
    ),
    Fault(
        "no __syncwarp before the refill: a stage is overwritten while it is read",
        RING,
        "        __syncwarp();\n        fetch(",
        "        fetch(",
        ring,
        RACE,
    ),
    Fault(
        "no barrier between the halves of the reduction",
        SUMS,
        "        }\n        __syncthreads();\n        if (k_warp < half) {",
        "        }\n        if (k_warp < half) {",
        ring,
        RACE,
    ),
    Fault(
        "no barrier before the reduction overwrites table and ring",
        SUMS,
        "        __syncthreads();\n        if (k_warp >= half",
        "        if (k_warp >= half",
        ring,
        RACE,
    ),
    Fault(
        "a wait that leaves one group too many open",
        RING,
        "copy_async_wait<STAGES - 1>()",
        "copy_async_wait<STAGES>()",
        ring,
        UNWRITTEN,
    ),
    Fault(
        "one stage of scales is not filled before the loop",
        RING,
        "for (int i = 0; i < STAGES - 1; i++)\n        store_scales",
        "for (int i = 1; i < STAGES - 1; i++)\n        store_scales",
        ring,
        UNWRITTEN,
    ),
    Fault(
        "two fragment registers of A swapped",
        SHARED,
        '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])',
        '"r"(a[0]), "r"(a[2]), "r"(a[1]), "r"(a[3])',
        tensor_core,
        NUMBERS,
    ),
    Fault(
        "Turing's second half step takes the first half's registers",
        SHARED,
        '"r"(a[2]), "r"(a[3]), "r"(b1)',
        '"r"(a[0]), "r"(a[1]), "r"(b1)',
        turing,
        NUMBERS,
    ),
    Fault(
        "the low nibble first",
        SHARED,
        "element & 1 ? byte & 15u : byte >> 4",
        "element & 1 ? byte >> 4 : byte & 15u",
        naive,
        NUMBERS,
    ),
    Fault(
        "no mask for the tail of N", SHARED, "if (m >= p.M || n >= p.N) return;", "if (m >= p.M) return;", ring, ACCESS
    ),
    Fault(
        "no mask for the tail of M",
        SHARED,
        "if (m >= p.M || n >= p.N) return;",
        "if (n >= p.N) return;",
        tensor_core,
        ACCESS,
    ),
    Fault(
        "rows past the end of N are copied",
        RING,
        "i * 4 * ROW_TILES < s.rows_left ? 16 : 0",
        "16",
        ring,
        ACCESS,
    ),
    Fault(
        "eight elements are loaded where fewer are left",
        "quantize_2_vectorised.cu",
        "if (first + GROUP <= p.numel) load8(x, v);",
        "if (first < p.numel) load8(x, v);",
        quantised,
        ACCESS,
    ),
    Fault(
        "the scale of one row of the fragment is forgotten",
        PLAIN,
        "sum[n][2] = fmaf(d[2], high_scale, sum[n][2]);",
        "sum[n][2] = d[2] + sum[n][2];",
        tensor_core,
        NUMBERS,
    ),
    Fault(
        "vectors without a check of the alignment",
        "dequantize.cu",
        "if (p.aligned) {",
        "if (true) {",
        dequantised,
        ACCESS,
    ),
    Fault(
        "a barrier inside a branch: threads that do not wait read too early",
        "quantize_2_vectorised.cu",
        "% COPIES] = cell;\n    }\n    __syncthreads();",
        "% COPIES] = cell;\n    __syncthreads();\n    }",
        quantised,
        RACE,
    ),
    Fault(
        "threads that return before a barrier",
        "gemv_4bit_2_vectorised.cu",
        "    __syncthreads();\n",
        "    if ((i64)blockIdx.x * WARPS + threadIdx.x / 32 >= p.N) return;\n    __syncthreads();\n",
        vectorised,
        DIVERGENCE,
    ),
    Fault(
        "a shuffle's mask with half the warp",
        "quantize_2_vectorised.cu",
        "__shfl_xor_sync(0xFFFFFFFFu, most, o)",
        "__shfl_xor_sync(0x0000FFFFu, most, o)",
        quantised,
        DIVERGENCE,
    ),
    Fault(
        "an index in too few bits",
        "gemv_4bit_1_naive.cu",
        "i64 element = row * p.K + k;",
        "i64 element = (u16)(row * p.K + k);",
        naive,
        NUMBERS,
    ),
    Fault(
        "an address in 32 bits",
        "gemv_4bit_2_vectorised.cu",
        "load_once16(packed + k / 2)",
        "load_once16((const u8 *)(u64)(u32)(u64)(packed + k / 2))",
        vectorised,
        ACCESS,
    ),
    Fault(
        "the nested scale fused into one rounding",
        SHARED,
        "__fadd_rn(__fmul_rn(__ldg(s.nested_code + q), absmax), __ldg(s.nested_offset))",
        "__ldg(s.nested_code + q) * absmax + __ldg(s.nested_offset)",
        dequantised,
        NUMBERS,
    ),
    Fault(
        "the operands of cvt.rn.bf16x2 in the order of memory",
        SHARED,
        'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));',
        'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(lo), "f"(hi));',
        dequantised,
        NUMBERS,
    ),
    Fault(
        "a copy of the table's entry that lies in the ring",
        RING,
        "lane4 = lane * 4;",
        "lane4 = lane * 8;",
        ring,
        UNWRITTEN,
    ),
    Fault(
        "a CTA counts itself in before all its threads have stored their sums",
        SUMS,
        "    __threadfence();\n    __syncthreads();\n    if (threadIdx.x == 0) {",
        "    __threadfence();\n    if (threadIdx.x == 0) {",
        ring,
        RACE,
    ),
    Fault(
        "the CTA before the last one adds up the splits",
        SUMS,
        "return *word == p.splits - 1;",
        "return *word == p.splits - 2;",
        ring,
        RACE,
    ),
    Fault(
        "the tiles of two experts share their counters and their room for sums",
        GROUPED,
        "return (i64)blockIdx.z * gridDim.x + blockIdx.x;",
        "return blockIdx.x;",
        experts,
        RACE,
    ),
    Fault(
        "an expert with the scales of the first",
        GROUPED,
        "scales.absmax += scales.q",
        "scales.absmax += 0 * scales.shift; scales.q",
        experts,
        NUMBERS,
    ),
    Fault(
        "an expert's rows end where the tile does, not where the expert does",
        GROUPED,
        "p.M = tile.z;",
        "p.M = 8;",
        experts,
        ACCESS,
    ),
    Fault(
        "no barrier between decoding a tile and multiplying it",
        GRADIENT,
        "tiles, to);\n        __syncthreads();",
        "tiles, to);",
        gradient,
        RACE,
    ),
    Fault(
        "one tile instead of two: the next step is decoded into it while it is read",
        GRADIENT,
        "to ^= TILE_BYTES, mine ^= TILE_BYTES;",
        "",
        gradient,
        RACE,
    ),
    Fault(
        "the words of a tile are read in another order than they are written",
        GRADIENT,
        "^ row_warp * 4 ^ t * 8",
        "^ row_warp * 4",
        gradient,
        NUMBERS,
    ),
    Fault(
        "the second row of a pair with the scale of the first",
        GRADIENT,
        "pack(__fmul_rn(w[0], scale[0]), __fmul_rn(w[1], scale[1]))",
        "pack(__fmul_rn(w[0], scale[0]), __fmul_rn(w[1], scale[0]))",
        gradient,
        NUMBERS,
    ),
    Fault(
        "rows past the end of K are fetched",
        GRADIENT,
        "pairs_left -= stride;\n        if (pairs_left > 0) fetch",
        "pairs_left -= stride;\n        fetch",
        gradient,
        ACCESS,
    ),
    Fault(
        "x past the end of K is multiplied with",
        GRADIENT,
        "if (x_left > 0) b =",
        "b =",
        gradient,
        ACCESS,
    ),
    Fault(
        "no barrier before the next tile overwrites this one",
        "grad_input_4bit_1_tiled.cu",
        "sum[m] += part[m];\n        __syncthreads();",
        "sum[m] += part[m];",
        tiled,
        RACE,
    ),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_kernels_as_they_are_pass(check):
    assert verdict(check) == "passed"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_dies(fault, tmp_path, monkeypatch, capsys):
    plant(fault, tmp_path, monkeypatch)
    assert verdict(fault.check) == fault.dies_of


def test_the_page_shows_the_list():
    assert table() in PAGE.read_text(), f"the table in {PAGE.name} is another; it should be:\n{table()}"


def test_the_pages_python_runs(capsys):
    """Here, because the page is this file's: what it shows must be what happens."""
    for block in re.findall(r"```python\n(.*?)\n```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), {})
    assert "dequantize, block 0, thread 5" in capsys.readouterr().out


def plant(fault: Fault, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the compiler read a copy of the kernels with the fault in it."""
    shutil.copytree(nvrtc.kernel_directory(), directory, dirs_exist_ok=True)
    source = (directory / fault.file).read_text()
    assert source.count(fault.old) == 1, (
        f"{fault.file} has moved on: {fault.old!r} occurs {source.count(fault.old)} times"
    )
    (directory / fault.file).write_text(source.replace(fault.old, fault.new))
    monkeypatch.setattr(nvrtc, "kernel_directory", lambda: directory)
    monkeypatch.setattr(cases, "ptx_of", cases.ptx_of.__wrapped__)  # not the text that is kept for the kernel as it is


def verdict(check: Callable[[], None]) -> str:
    """What the check dies of."""
    try:
        check()
    except emulator.EmulatorError as error:
        return type(error).__name__
    except AssertionError:
        return NUMBERS
    return "passed"


def table() -> str:
    """The faults as the page shows them."""
    rows = [f"| {f.name} | `{f.file}` | {f.check.__name__} | {f.dies_of} |" for f in FAULTS]
    return "\n".join(["| fault | in | check | found as |", "| --- | --- | --- | --- |", *rows])
