"""Kernels that are not refq4's, for the emulator: CUDA from ``tests/backends/cuda/foreign``, Triton from here on.

``CASES`` has one function for each kernel: it makes the inputs, runs the PTX with ``run_ptx``, and compares with torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from refq4_cuda.emulator import run_ptx
from refq4_cuda.nvrtc import compile_ptx
from torch import Tensor

FOREIGN = Path(__file__).parents[1] / "backends" / "cuda" / "foreign"
Case = Callable[[str], None]
CASES: dict[str, tuple[str, Case]] = {}  # kernel -> (file, check)


def source_of(file: str) -> str:
    return (FOREIGN / file).read_text()


@cache
def ptx_of(file: str, arch: int = 80) -> str:
    return compile_ptx(source_of(file), arch)


def case(file: str) -> Callable[[Case], Case]:
    def enter(check: Case) -> Case:
        CASES[check.__name__] = file, check
        return check

    return enter


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 4 - 2


def whole(*shape: int, high: int = 100, seed: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def near(got: Tensor, wanted: Tensor, error: float = 1e-5) -> None:
    torch.testing.assert_close(got, wanted.to(got.dtype), rtol=error, atol=error)


def same(got: Tensor, wanted: Tensor) -> None:
    assert torch.equal(got, wanted), f"{int((got != wanted).sum())} of {got.numel()} differ"


# --- reductions -------------------------------------------------------------------------------------------------------


@case("reductions.cu")
def sum_shuffle(ptx: str) -> None:
    x, y = uniform(1000), torch.zeros(1)
    run_ptx(ptx, "sum_shuffle", (2, 1, 1), (128, 1, 1), [x, y, 1000])
    near(y[0], x.double().sum())


@case("reductions.cu")
def max_tree(ptx: str) -> None:
    x, y = uniform(400), torch.full((4,), float("nan"))
    run_ptx(ptx, "max_tree", (4, 1, 1), (128, 1, 1), [x, y, 400], shared=512)
    same(y, torch.stack([part.max() for part in x.split(128)]))


@case("reductions.cu")
def softmax(ptx: str) -> None:
    x = uniform(3, 200)
    y = torch.full_like(x, float("nan"))
    run_ptx(ptx, "softmax", (3, 1, 1), (128, 1, 1), [x, y, 200])
    near(y, x.double().softmax(1))


@case("reductions.cu")
def layer_norm(ptx: str) -> None:
    x, w, b = uniform(4, 96), uniform(96, seed=1), uniform(96, seed=2)
    y = torch.full_like(x, float("nan"))
    run_ptx(ptx, "layer_norm", (2, 1, 1), (64, 1, 1), [x, w, b, y, 24, 1e-5])
    near(y, torch.nn.functional.layer_norm(x.double(), (96,), w.double(), b.double()), 2e-5)


@case("reductions.cu")
def dot_double(ptx: str) -> None:
    a, b, y = uniform(500).double(), uniform(500, seed=1).double(), torch.zeros(2, dtype=torch.float64)
    run_ptx(ptx, "dot_double", (1, 1, 1), (128, 1, 1), [a, b, y, 500])
    near(y, torch.stack([a @ b, (a @ b).abs().sqrt() / 3]), 1e-12)


@case("reductions.cu")
def argmax(ptx: str) -> None:
    x, best = uniform(200) - 5, torch.zeros(1, dtype=torch.int64)
    run_ptx(ptx, "argmax", (2, 1, 1), (128, 1, 1), [x, best, 200])
    assert int(best) & 0xFFFFFFFF == int(x.argmax())


# --- scans, sorts, histograms -----------------------------------------------------------------------------------------


@case("scans.cu")
def scan_block(ptx: str) -> None:
    x = whole(200)
    y = torch.full_like(x, -1)
    run_ptx(ptx, "scan_block", (1, 1, 1), (256, 1, 1), [x, y, 200])
    same(y, x.cumsum(0, dtype=torch.int32))


@case("scans.cu")
def scan_chained(ptx: str) -> None:
    x, sums, ready = whole(700), torch.zeros(6, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
    y = torch.full_like(x, -1)
    run_ptx(ptx, "scan_chained", (6, 1, 1), (128, 1, 1), [x, y, sums, ready, 700])
    same(y, x.cumsum(0, dtype=torch.int32))


@case("scans.cu")
def histogram(ptx: str) -> None:
    x, bins = whole(900, high=256, dtype=torch.uint8), torch.zeros(256, dtype=torch.int32)
    run_ptx(ptx, "histogram", (2, 1, 1), (256, 1, 1), [x, bins, 900])
    same(bins, torch.bincount(x, minlength=256).int())


@case("scans.cu")
def histogram_match(ptx: str) -> None:
    keys, bins = whole(300, high=7), torch.zeros(7, dtype=torch.int32)
    run_ptx(ptx, "histogram_match", (3, 1, 1), (128, 1, 1), [keys, bins, 300])
    same(bins, torch.bincount(keys, minlength=7).int())


@case("scans.cu")
def compact(ptx: str) -> None:
    x, count = uniform(300), torch.zeros(1, dtype=torch.int32)
    out = torch.zeros(300)
    run_ptx(ptx, "compact", (3, 1, 1), (128, 1, 1), [x, out, count, 300])
    kept = x[x > 0]
    assert int(count) == len(kept)
    same(out[: len(kept)].sort()[0], kept.sort()[0])


@case("scans.cu")
def sort_bitonic(ptx: str) -> None:
    x = whole(128, high=50)
    wanted = x.sort()[0]
    run_ptx(ptx, "sort_bitonic", (1, 1, 1), (128, 1, 1), [x], shared=512)
    same(x, wanted)


@case("scans.cu")
def sort_local(ptx: str) -> None:
    x = whole(64, 16, high=50)
    y = torch.full_like(x, -1)
    run_ptx(ptx, "sort_local", (2, 1, 1), (32, 1, 1), [x, y])
    same(y, x.sort(1)[0])


@case("scans.cu")
def minimum_cas(ptx: str) -> None:
    x, best, votes = uniform(100).abs() + 0.5, torch.full((1,), 3e38), torch.zeros(1, dtype=torch.int32)
    run_ptx(ptx, "minimum_cas", (2, 1, 1), (64, 1, 1), [x, best, votes, 100])
    same(best[0], x.min())
    assert int(votes) == 15


# --- tiles ------------------------------------------------------------------------------------------------------------


@case("matrices.cu")
def transpose(ptx: str) -> None:
    x = uniform(50, 70)
    y = torch.full((70, 50), float("nan"))
    run_ptx(ptx, "transpose", (3, 2, 1), (32, 8, 1), [x, y, 50, 70])
    same(y, x.t().contiguous())


@case("matrices.cu")
def matmul_tiled(ptx: str) -> None:
    A, B = uniform(20, 40), uniform(40, 30, seed=1)
    C = torch.full((20, 30), float("nan"))
    run_ptx(ptx, "matmul_tiled", (2, 2, 1), (16, 16, 1), [A, B, C, 20, 30, 40])
    near(C, A.double() @ B.double())


@case("matrices.cu")
def matmul_tensor(ptx: str) -> None:
    A, B, C = uniform(16, 64).bfloat16(), uniform(64, 8, seed=1).bfloat16(), torch.full((16, 8), float("nan"))
    run_ptx(ptx, "matmul_tensor", (1, 1, 1), (32, 1, 1), [A, B, C, 64])
    near(C, A.double() @ B.double())


@case("matrices.cu")
def matmul_int8(ptx: str) -> None:
    A, B = (whole(*shape, high=255, seed=i).sub(127).to(torch.int8) for i, shape in enumerate([(16, 32), (8, 32)]))
    C, D = torch.zeros(16, 8, dtype=torch.int32), torch.zeros(16, 8, dtype=torch.int32)
    run_ptx(ptx, "matmul_int8", (1, 1, 1), (32, 1, 1), [A, B, C, D])
    same(C, A.int() @ B.int().t())
    same(D, C)


@case("matrices.cu")
def convolve(ptx: str) -> None:
    x, fell = uniform(100), torch.zeros(1, dtype=torch.int32)
    y = torch.full_like(x, float("nan"))
    run_ptx(ptx, "convolve", (1, 1, 1), (128, 1, 1), [x, y, fell, 100])
    taps = torch.tensor([0.0625, 0.25, 0.375, 0.25, 0.0625])
    near(y, torch.nn.functional.conv1d(x.view(1, 1, -1), taps.view(1, 1, -1), padding=2).view(-1))
    assert int(fell) == 7 + 128 * 5 - (100 + 100 + 100 + 99 + 98)  # the module's counter starts at 7


# --- instructions -----------------------------------------------------------------------------------------------------


@case("arithmetic.cu")
def functions(ptx: str) -> None:
    x = uniform(100)
    y = torch.full((20, 100), float("nan"))
    run_ptx(ptx, "functions", (1, 1, 1), (128, 1, 1), [x, y, 100])
    v, a = x.double(), x.double().abs()
    wanted = [
        v.sin(),
        v.cos(),
        v.tanh(),
        v.erf(),
        (a + 1).log(),
        v / 3,
        a.sqrt(),
        0.5 * v * (1 + (v * 0.70710678).erf()),
    ]
    wanted += [v.exp2(), a**1.5, v.round(), v.floor(), 1 / (v + 9), v.clamp(0, 1), v * v, v, v.floor(), a.log1p()]
    wanted += [torch.full_like(v, 2).copysign(v), v.sign() * a ** (1 / 3)]
    near(y, torch.stack(wanted), 3e-6)
    exact = v * v + torch.tensor(1e-9).double()
    assert (y[14].double() <= exact).all()
    assert (y[15].double() >= v + 1e-9).all()


def _bits(v: int) -> list[int]:
    mask, n = 0xFFFFFFFF, v ^ 0xFFFFFFFF
    signed = v - (1 << 32) if v >> 31 else v
    eight = (n << 32 | v).to_bytes(8, "little")
    field = v >> 5 & 0x7FF
    found = [int(f"{v:032b}"[::-1], 2), v.bit_count(), 32 - v.bit_length(), (v & -v).bit_length()]
    found += [
        (n << 7 | v >> 25) & mask,
        v * 0x9E3779B9 >> 32,
        int.from_bytes(bytes(eight[k] for k in (6, 4, 3, 1)), "little"),
    ]
    found += [field, field - (field >> 10 << 11) & mask, v ^ v >> 3 ^ v << 5 & mask, v.bit_length() - 1 & mask]
    found += [abs(v - 77) + 5 & mask, v // 7 + v % 13, int(abs(signed) // 7 * (1 if signed >= 0 else -1)) & mask]
    return [*found, v * v >> 20 & mask, max(signed, -5) & mask]


@case("arithmetic.cu")
def bits(ptx: str) -> None:
    values = [0, 1, 2, 76, 77, 78, 0x7FFFFFFF, 0x80000000, 0xDEADBEEF, 0xFFFFFFFF, *range(3, 2**32, 2**32 // 54)]
    x = torch.tensor(values, dtype=torch.int64).to(torch.uint32)
    y = torch.zeros(16, len(values), dtype=torch.uint32)
    run_ptx(ptx, "bits", (2, 1, 1), (64, 1, 1), [x, y, len(values)])
    same(y.long(), torch.tensor([_bits(v) for v in values]).t())


@case("arithmetic.cu")
def halves(ptx: str) -> None:
    n = 64  # pairs; fp16 first, bf16 behind
    kinds = (torch.float16, torch.bfloat16)
    a, b, c = (torch.cat([uniform(2 * n, seed=i).to(kind).view(torch.int32) for kind in kinds]) for i in range(3))
    y = torch.zeros(4 * n, dtype=torch.int32)
    run_ptx(ptx, "halves", (2, 1, 1), (32, 1, 1), [a, b, c, y, n])
    (fa, fb, fc), (ba, bb, bc) = ([t[i * n : i * n + n].view(kind) for t in (a, b, c)] for i, kind in enumerate(kinds))
    got = y.view(4, n)
    same(got[0].view(torch.float16), (fa.double() * fb.double() + fc.double()).half())
    same(got[1].view(torch.float16), torch.maximum(fa, fb))
    same(got[2].view(torch.bfloat16), (ba.double() * bb.double() + bc.double()).bfloat16())
    low = fa[0::2] + fa[1::2]
    same(got[3].view(torch.float16), torch.stack([low, low * low], 1).view(-1))


@case("arithmetic.cu")
def calls(ptx: str) -> None:
    x, k = uniform(100), torch.tensor([0.5, -1.0, 0.25, 0.125])
    y = torch.full_like(x, float("nan"))
    run_ptx(ptx, "calls", (1, 1, 1), (128, 1, 1), [x, k, y, 100])
    v = k[0] + x * (k[1] + x * (k[2] + x * k[3]))
    v = torch.where(v > 1, k[1] + (1 / v) * (k[2] + (1 / v) * k[3]), v)
    cases = [v + 1, v * 2, -v, v * v, 1 / (1 + v * v), v - 3, v.abs(), torch.full_like(v, 7), v.clamp(min=0.5)]
    near(y, torch.stack(cases)[torch.arange(100) % 9, torch.arange(100)])


@case("arithmetic.cu")
def producer(ptx: str) -> None:
    x = whole(4, 32)
    y = torch.full_like(x, -1)
    run_ptx(ptx, "producer", (1, 1, 1), (64, 1, 1), [x, y, 4])
    same(y, x.flip(1) * 3 + 1)
