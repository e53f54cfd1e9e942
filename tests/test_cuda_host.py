"""The CUDA kernels as host C++ on fibers: the reference's bits under any schedule, clean under sanitizers, and what
happens to planted faults.

The fibers themselves: test_cuda_host_fibers.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import pytest

pytest.importorskip("refq4_cuda", reason="the package refq4_cuda is not installed: pip install -e .")
from refq4_cuda.host import Fibers, HostBackend, kernel_sources, unavailable
from refq4_cuda.host.__main__ import main

import refq4
from refq4.registry import isolated_registry
from refq4.testing import Case, check

if (reason := unavailable("plain")) is not None:
    pytest.skip(f"kernels can't be compiled as host C++: {reason}", allow_module_level=True)

pytestmark = pytest.mark.reference_only("it names its engine itself")

SCHEDULES = (0, 1, 7)


@pytest.fixture(autouse=True)
def own_registry() -> Iterator[None]:
    with isolated_registry():
        yield


def ask(
    case: Case, mode: str = "plain", seed: int = 0, arch: int = 80, sources: Mapping[str, str] | None = None
) -> str:
    """What came of a case, in words: "<case>: same", or what was wrong."""
    if (missing := unavailable(mode)) is not None:
        pytest.skip(missing)
    refq4.register_backend(HostBackend(Fibers(arch, seed, mode, sources=sources)), replace=True)
    return str(check(case, HostBackend.name))


BITS = [
    Case("quantize_4bit", n=5, k=77, weights="outliers"),
    Case("quantize_4bit", n=4, k=130, code="fp4", blocksize=128, weights="thresholds", dtype="bfloat16"),
    Case("quantize_4bit", n=3, k=400, blocksize=512, weights="zero blocks", dtype="float16"),
    Case("quantize_blockwise", n=5, k=300, blocksize=256, dtype="bfloat16"),
    Case("dequantize_4bit", n=7, k=65, nested=True, dtype="bfloat16"),
    Case("dequantize_4bit", n=2, k=300, code="fp4", blocksize=32, weights="not finite", dtype="float16"),
    Case("dequantize_blockwise", n=3, k=301, blocksize=256),
]

PRODUCTS = [
    Case("gemv_4bit", n=7, k=65, dtype="float32", bias=True),
    Case("gemv_4bit", n=33, k=2304, dtype="bfloat16", nested=True),
    Case("gemm_4bit", m=3, n=7, k=96, dtype="float32", nested=True, blocksize=32),
    Case("gemm_4bit", m=5, n=33, k=320, dtype="float16", bias=True, blocksize=32),
    Case("gemm_4bit", m=9, n=17, k=128, dtype="bfloat16", code="fp4", nested=True, bias=True),
    Case("gemm_4bit", m=17, n=40, k=1088, dtype="float16"),
]


@pytest.mark.parametrize("seed", SCHEDULES, ids="schedule {}".format)
@pytest.mark.parametrize("case", [*BITS, *PRODUCTS], ids=repr)
def test_the_kernels_agree_with_the_reference_under_every_schedule(case, seed):
    assert ask(case, seed=seed) == f"{case!r}: same"


@pytest.mark.parametrize("case", PRODUCTS[-3:], ids=repr)
def test_the_kernels_for_turing_agree_too(case):
    assert ask(case, seed=7, arch=75) == f"{case!r}: same"


@pytest.mark.parametrize("mode", ["thread", "address"])
@pytest.mark.parametrize("case", [BITS[1], BITS[4], PRODUCTS[0], PRODUCTS[1], PRODUCTS[4]], ids=repr)
def test_the_kernels_are_clean_under_the_sanitizer(case, mode):
    assert ask(case, mode, seed=7) == f"{case!r}: same"


class Fault(NamedTuple):
    """A planted bug: in ``file``, ``old`` becomes ``new``; the case is run in a mode, and the report says so."""

    file: str
    old: str
    new: str
    case: Case
    mode: str
    said: str


FAULTS = {
    "no barrier after a table is made": Fault(
        "dequantize.cu", "    __syncthreads();\n", "", BITS[4], "thread", "data race"
    ),
    "no barrier before a table is overwritten": Fault(
        "gemm_4bit_3_tensor_core.cu", "    __syncthreads();\n    float *sums", "    float *sums",
        PRODUCTS[3], "thread", "data race",
    ),
    "a barrier that only half of the block reaches": Fault(
        "dequantize.cu", "    __syncthreads();\n", "    if (threadIdx.x < 128) __syncthreads();\n",
        BITS[4], "plain", "threads 0 to 127 wait in __syncthreads",
    ),
    "a shuffle that leaves half of the warp out": Fault(
        "gemv_4bit_1_naive.cu", "__shfl_xor_sync(0xFFFFFFFFu", "__shfl_xor_sync(0x0000FFFFu",
        PRODUCTS[0], "plain", "a shuffle reads a lane that its mask leaves out",
    ),
    "a tail that is read and written beyond the end": Fault(
        "dequantize.cu", "i < p.numel; i += step", "i <= p.numel; i += step",
        BITS[4], "address", "heap-buffer-overflow",
    ),
    "a write beyond the end, without a sanitizer": Fault(
        "dequantize.cu", "i < p.numel; i += step", "i <= p.numel; i += step",
        BITS[4], "plain", "wrote outside a buffer",
    ),
    "a shared array that is one short": Fault(
        "dequantize.cu", "values[VALUES * COPIES]", "values[VALUES * COPIES - 1]",
        BITS[4], "address", "out of bounds",
    ),
    "a 16-byte read at an odd address": Fault(
        "gemm_4bit_3_tensor_core.cu", "(const uint4 *)(x[n] + k)", "(const uint4 *)(x[n] + k + 1)",
        PRODUCTS[3], "address", "misaligned address",
    ),
    "two fragment registers swapped": Fault(
        "gemm_4bit_3_tensor_core.cu", "multiply_16x8x16(d, a[0], b.x, b.y)", "multiply_16x8x16(d, a[0], b.y, b.x)",
        PRODUCTS[3], "plain", "elements are off",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_reported(fault):
    sources = kernel_sources()
    whole = sources[fault.file]
    assert fault.old in whole, f"{fault.file} has moved on: there is no {fault.old!r} to replace"
    sources[fault.file] = whole.replace(fault.old, fault.new, 1)
    assert fault.said in ask(fault.case, fault.mode, sources=sources)


def test_the_command_runs_a_case_and_shows_its_launches(capsys):
    assert main(["gemm_4bit", "-M", "2", "-N", "5", "-K", "64", "--dtype", "float32", "--bias", "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    assert "grid (1, 1, 1)  block (256, 1, 1)" in shown
    assert "schedule 3: Case('gemm_4bit', m=2, n=5, bias=True): same" in shown


def test_the_command_wants_an_op(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "name an op, or ask for --all" in capsys.readouterr().err
