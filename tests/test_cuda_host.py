"""The CUDA kernels as host C++ on fibers: right under all schedules tried, clean under sanitizers, faults reported.

The fibers themselves: test_cuda_host_fibers.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

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


def ask(case: Case, mode: str = "plain", seed: int = 0, arch: int = 80, **fibers: Any) -> str:
    """What came of a case, in words: "<case>: same", or what was wrong."""
    if (missing := unavailable(mode)) is not None:
        pytest.skip(missing)
    refq4.register_backend(HostBackend(Fibers(arch, seed, mode, **fibers)), replace=True)
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
    Case("gemm_4bit", m=5, n=33, k=4096, dtype="bfloat16"),  # K is split between blocks
]
NAIVE, TENSOR_CORE, RING = PRODUCTS[0], PRODUCTS[3], Case("gemm_4bit", m=5, n=17, k=2304, dtype="bfloat16")


@pytest.mark.parametrize("seed", SCHEDULES, ids="schedule {}".format)
@pytest.mark.parametrize("case", [*BITS, *PRODUCTS], ids=repr)
def test_the_kernels_agree_with_the_reference_under_every_schedule(case, seed):
    assert ask(case, seed=seed) == f"{case!r}: same"


def test_the_tensor_core_kernel_for_turing_agrees_too():
    assert ask(TENSOR_CORE, seed=7, arch=75) == f"{TENSOR_CORE!r}: same"


@pytest.mark.parametrize("mode", ["thread", "address"])
@pytest.mark.parametrize("case", [BITS[1], BITS[4], TENSOR_CORE, RING, PRODUCTS[-1]], ids=repr)
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
        TENSOR_CORE, "thread", "data race",
    ),
    "no __syncwarp between a copy's wait and its use": Fault(
        "gemm_4bit_4_ring.cu", "wait<STAGES - 1>();\n        __syncwarp();", "wait<STAGES - 1>();",
        RING, "thread", "data race",
    ),
    "no __syncwarp before a slot of the ring is filled again": Fault(
        "gemm_4bit_4_ring.cu", "__syncwarp();\n        fetch(", "fetch(", RING, "thread", "data race",
    ),
    "a wait for one copy too few": Fault(
        "gemm_4bit_4_ring.cu", "copy_async_wait<STAGES - 1>", "copy_async_wait<STAGES>",
        RING, "plain", "elements are off",
    ),
    "a barrier that only half of the block reaches": Fault(
        "dequantize.cu", "    __syncthreads();\n", "    if (threadIdx.x < 128) __syncthreads();\n",
        BITS[4], "plain", "threads 0 to 127 wait in __syncthreads",
    ),
    "a shuffle that leaves half of the warp out": Fault(
        "gemv_4bit_1_naive.cu", "__shfl_xor_sync(0xFFFFFFFFu", "__shfl_xor_sync(0x0000FFFFu",
        NAIVE, "plain", "a shuffle reads a lane that its mask leaves out",
    ),
    "a tail that is read and written beyond the end": Fault(
        "dequantize.cu", "i < p.numel; i += step", "i <= p.numel; i += step",
        BITS[4], "address", "heap-buffer-overflow",
    ),
    "a shared array that is one short": Fault(
        "dequantize.cu", "values[VALUES * COPIES]", "values[VALUES * COPIES - 1]",
        BITS[4], "address", "out of bounds",
    ),
    "a 16-byte read at an odd address": Fault(
        "gemm_4bit_3_tensor_core.cu", "(const uint4 *)(x[n] + k)", "(const uint4 *)(x[n] + k + 1)",
        TENSOR_CORE, "address", "misaligned address",
    ),
    "two fragment registers swapped": Fault(
        "gemm_4bit_3_tensor_core.cu", "multiply_16x8x16(d, a[0], b.x, b.y)", "multiply_16x8x16(d, a[0], b.y, b.x)",
        TENSOR_CORE, "plain", "elements are off",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_reported(fault):
    sources = kernel_sources()
    whole = sources[fault.file]
    assert fault.old in whole, f"{fault.file} has moved on: there is no {fault.old!r} to replace"
    sources[fault.file] = whole.replace(fault.old, fault.new, 1)
    # One multiprocessor: K is not split, so that the ring goes round.
    assert fault.said in ask(fault.case, fault.mode, sources=sources, multiprocessors=1)


def test_the_command_runs_a_case_and_shows_its_launches(capsys):
    assert main(["gemm_4bit", "-M", "2", "-N", "5", "-K", "64", "--dtype", "float32", "--bias", "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    assert "grid (1, 1, 1)  block (256, 1, 1)" in shown
    assert "schedule 3: Case('gemm_4bit', m=2, n=5, bias=True): same" in shown


def test_the_command_stops_in_gdb_where_the_kernel_begins(capfd):
    if shutil.which("gdb") is None:
        pytest.skip("there is no gdb: apt install gdb")
    with stdin(b"print threadIdx\nprint p.N\nkill\nquit\n"):
        main(["gemm_4bit", "-M", "2", "-N", "5", "-K", "64", "--gdb"])
    shown = capfd.readouterr().out
    if "ptrace" in shown:
        pytest.skip("gdb may not trace programs here; in a container: --cap-add SYS_PTRACE")
    assert "Temporary breakpoint 1, gemm_ring" in shown
    assert "{x = 0, y = 0, z = 0}" in shown
    assert "$2 = 5" in shown


@contextmanager
def stdin(text: bytes) -> Iterator[None]:
    """What the processes started meanwhile read."""
    reading, writing = os.pipe()
    os.write(writing, text)
    os.close(writing)
    before = os.dup(0)
    os.dup2(reading, 0)
    try:
        yield
    finally:
        os.dup2(before, 0)
        os.close(reading)
        os.close(before)


def test_the_command_wants_an_op(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "name an op, or ask for --all" in capsys.readouterr().err
