"""Kernels that nobody wrote for the emulator: their PTX as NVRTC and Triton emit it, judged by torch.

The CUDA sources are in ``foreign/``, the launches in ``tests/support/foreign.py`` and ``foreign_triton.py``. A fault
planted in a copy must be caught, under the right name.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("refq4_cuda", reason="the package refq4_cuda is not installed: pip install -e .")
from foreign import CASES, ptx_of, source_of, uniform
from refq4_cuda import emulator
from refq4_cuda.emulator import AccessError, LaunchError, run_ptx
from refq4_cuda.nvrtc import compile_ptx

from refq4.functional import quantize_4bit


@pytest.mark.parametrize("kernel", CASES)
def test_a_cuda_kernel_computes_what_torch_does(kernel):
    file, check = CASES[kernel]
    check(ptx_of(file))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [75, 86, 89, 90])
@pytest.mark.parametrize("kernel", CASES)
def test_it_does_for_every_architecture(kernel, arch):
    file, check = CASES[kernel]
    if arch == 75 and file in ("matrices.cu", "scans.cu", "arithmetic.cu"):
        pytest.skip("the file has instructions that begin with sm_80 (cp.async, redux, bf16): nothing to install")
    check(ptx_of(file, arch))


# what is changed -> (kernel, old text, new text, the error, words in its message)
FAULTS = {
    "no barrier between the levels of a tree": (
        "max_tree", "room[threadIdx.x + half]);\n        __syncthreads();", "room[threadIdx.x + half]);",
        emulator.RaceError, "with no barrier between: a race",
    ),
    "no barrier between the warps' sums and the warp that reads them": (
        "sum_shuffle", "part[threadIdx.x / 32] = v;\n    __syncthreads();", "part[threadIdx.x / 32] = v;",
        emulator.RaceError, "with no barrier between: a race",
    ),
    "no barrier before the room of the maxima is used for the sums": (
        "softmax", "top = room[0];\n    __syncthreads();", "top = room[0];", emulator.RaceError, "a race",
    ),
    "a scan in one buffer": (
        "scan_block", "room[1 - now][t] = room", "room[now][t] = room", emulator.RaceError, "a race",
    ),
    "a count that is no atomic": (
        "histogram", "atomicAdd(&room[x[i]], 1u)", "room[x[i]]++", emulator.RaceError, "a race",
    ),
    "bins that nobody zeroed": (
        "histogram", "room[threadIdx.x] = 0;", "", emulator.UninitialisedError, "nobody has written",
    ),
    "no mask for the tail of a row": (
        "transpose", "r + k < rows && c < columns", "r + k < rows", emulator.AccessError,
        r"element 3500, byte 14000 of argument 0, float32 \[50, 70\]",
    ),
    "an index that is one too large": (
        "convolve", "at >= n", "at > n", emulator.AccessError, r"element 100, byte 400 of argument 0, float32 \[100\]",
    ),
    "a wait that leaves one group too many open": (
        "matmul_tensor", "wait_group 0", "wait_group 1", emulator.UninitialisedError, "cp.async is still filling",
    ),
    "a copy of 16 bytes from an odd place": (
        "matmul_tensor", "+ lane % 2 * 8)", "+ lane % 2 * 7)", emulator.AccessError, "not a multiple of 16",
    ),
    "a vote that half of the warp misses": (
        "compact", "unsigned keep = __ballot_sync(~0u, v > 0);",
        "unsigned keep = 0;\n    if (v > 0) keep = __ballot_sync(~0u, 1);", emulator.ConvergenceError, "never comes",
    ),
    "a barrier inside a branch": (
        "sort_bitonic", "keys[t] = b; keys[other] = a; }", "keys[t] = b; keys[other] = a; __syncthreads(); }",
        emulator.ConvergenceError, "never comes",
    ),
    "a producer that does not wait for its consumer": (
        "producer", 'if (i) asm volatile("bar.sync 2, 64;" ::: "memory");', 'if (i) asm volatile("bar.arrive 2, 64;");',
        emulator.RaceError, "a race",
    ),
    "a sum that other blocks read before it is complete": (
        "scan_chained", "while (ready[blockIdx.x - 1] == 0) { }\n            __threadfence();\n            sum = sums",
        "sum = ((int *)y)", emulator.RaceError,
        r"of block number 1 with no atomic of both between: a race.\n.*\nBlocks meet only by atomics",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_by_its_name(fault):
    kernel, old, new, error, words = FAULTS[fault]
    file, check = CASES[kernel]
    source = source_of(file)
    at = source.index(f" {kernel}(")
    assert old in source[at:], "the kernel has changed: change the fault, too"
    with pytest.raises(error, match=words):
        check(compile_ptx(source[:at] + source[at:].replace(old, new, 1)))


def test_a_result_written_over_its_own_input_is_a_race():
    x, fell = torch.rand(100), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(
        emulator.RaceError, match=r"argument 0, float32 \[100\] .*, read by thread \d+ with no barrier between: a race"
    ):
        emulator.run_ptx(ptx_of("matrices.cu"), "convolve", (1, 1, 1), (128, 1, 1), [x, x, fell, 100])


# --- the launch -------------------------------------------------------------------------------------------------------


def test_arguments_are_packed_as_the_kernel_declares_them():
    source = """
    struct Pair { double d; short s; };
    extern "C" __global__ void tell(double *y, float f, short s, unsigned char c, long long l, Pair p, int *none) {
        y[0] = f, y[1] = s, y[2] = c, y[3] = l, y[4] = p.d, y[5] = p.s, y[6] = none == 0;
    }"""
    y, pair = torch.zeros(7, dtype=torch.float64), struct.pack("<dhxxxxxx", 2.5, -3)
    emulator.run_ptx(compile_ptx(source), "tell", (1, 1, 1), (1, 1, 1), [y, 0.5, -7, 200, -(2**40), pair, 0])
    assert y.tolist() == [0.5, -7.0, 200.0, -(2.0**40), 2.5, -3.0, 1.0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([torch.zeros(4), 1], r"takes 3 arguments \(.u64, .u64, .u32\), and 2 are given.*Triton adds two pointers"),
        ([torch.zeros(4), 1.5, 1], r"argument 1 \(.u64\): 1.5 is not a whole number"),
        ([torch.zeros(4), torch.zeros(4), 2**40], r"argument 2 \(.u32\): .* does not fit into 32 bits"),
        ([torch.zeros(4), torch.zeros(4), torch.zeros(4)], r"argument 2 \(.u32\) is not a pointer"),
        ([torch.zeros(4, device="meta"), torch.zeros(4), 4], r"reads CPU tensors, and this one is on meta"),
    ],
    ids=["too few", "a float for a pointer", "too large a number", "a tensor for a number", "not on the CPU"],
)
def test_an_argument_that_does_not_fit_is_named(args, message):
    with pytest.raises(emulator.LaunchError, match=message):
        emulator.run_ptx(ptx_of("reductions.cu"), "softmax", (1, 1, 1), (128, 1, 1), args)


def test_a_grid_of_one_number_is_refused():
    with pytest.raises(emulator.LaunchError, match="three ints are expected"):
        emulator.run_ptx(ptx_of("reductions.cu"), "softmax", 3, (128, 1, 1), [0, 0, 0])  # type: ignore[arg-type]


def test_tensors_with_strides_and_tensors_that_overlap_are_taken_whole():
    memory = torch.arange(200, dtype=torch.float32)
    every_other, tail, y = memory[0:100:2], memory[50:], torch.zeros(100)
    source = 'extern "C" __global__ void add(float *a, float *b, float *y) {'
    source += " y[threadIdx.x] = a[2 * threadIdx.x] + b[threadIdx.x]; }"
    emulator.run_ptx(compile_ptx(source), "add", (1, 1, 1), (50, 1, 1), [every_other, tail, y])
    assert y[:50].tolist() == [3.0 * i + 50 for i in range(50)]


def test_a_call_that_is_not_in_the_text_is_named():
    source = 'extern "C" int printf(const char *, ...); extern "C" __global__ void k() { printf("%d", threadIdx.x); }'
    with pytest.raises(emulator.UnknownInstructionError, match=r"PTX line \d+: .*vprintf.* calls what is not in this"):
        emulator.run_ptx(compile_ptx(source), "k", (1, 1, 1), (32, 1, 1), [])


def test_the_trace_of_a_foreign_kernel_names_its_arguments():
    x, y = torch.rand(400), torch.zeros(4)
    args = [x, y, 400]
    trace = emulator.trace_ptx(
        ptx_of("reductions.cu"), "max_tree", (4, 1, 1), (128, 1, 1), args, shared=512, thread=(1, 3)
    )
    assert "argument 0, float32 [400] + 524" in trace.find("ld.global")[0].reads
    assert trace.title == "max_tree, block 1, thread 3"


# --- Triton -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign_triton():
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton --no-deps (Linux)")
    import foreign_triton

    return foreign_triton


TRITON = ("softmax", "layer_norm", "matmul", "pipelined", "cumsum", "histogram", "transpose", "sort", "argmin",
          "attention", "gelu")  # fmt: skip


@pytest.mark.parametrize("kernel", TRITON)
def test_a_triton_kernel_computes_what_torch_does(kernel, foreign_triton):
    check = foreign_triton.TRITON_CASES[f"triton_{kernel}"]
    check(80)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [75, 86, 89, 90])
@pytest.mark.parametrize("kernel", TRITON)
def test_a_triton_kernel_does_for_every_architecture(kernel, arch, foreign_triton):
    check = foreign_triton.TRITON_CASES[f"triton_{kernel}"]
    check(arch)


def test_every_triton_kernel_is_run(foreign_triton):
    assert {f"triton_{name}" for name in TRITON} == foreign_triton.TRITON_CASES.keys()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_triton_kernels_agree_with_the_reference(quant_type, foreign_triton):
    got, wanted = foreign_triton.peer_dequantized(quant_type, 1024)
    assert torch.equal(got, wanted)
    w = uniform(16, 64)
    w[3] = 0
    packed, absmax = foreign_triton.peer_quantized(quant_type, w)
    mine, state = quantize_4bit(w, quant_type=quant_type, blocksize=64, backend="reference")
    assert torch.equal(absmax, state.absmax)
    differing = (packed.view(16, 32) != mine.view(16, 32)).any(dim=1).nonzero().flatten().tolist()
    assert differing == [3], "a block of zeros is divided by zero there; all others agree bit for bit"


def test_the_page_about_other_kernels_shows_what_it_prints(capsys):
    page = (Path(__file__).parents[3] / "docs" / "your-cuda-kernel.md").read_text()
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)\n```", page, re.DOTALL | re.MULTILINE):
        exec(compile(block, "your-cuda-kernel.md", "exec"), names)
    for line in capsys.readouterr().out.splitlines()[1:]:
        assert line in page, "the page shows another text"


COUNTING = """
.version 7.0
.target sm_75
.address_size 64
.global .align 4 .u32 counter;
.visible .entry count(.param .u64 out, .param .b32 factor) {
    .reg .b32 %r<4>; .reg .b64 %rd<3>;
    mov.u64 %rd1, counter; atom.global.add.u32 %r1, [%rd1], 1;
    ld.param.u64 %rd2, [out]; ld.param.b32 %r2, [factor]; st.global.b32 [%rd2], %r2; ret;
}"""


def test_a_launch_with_its_own_bytes_has_the_modules_arrays_as_well():
    from refq4_cuda.launch import Launch, Variant

    out, adding = (
        torch.zeros(1, dtype=torch.int32),
        COUNTING.replace("st.global.b32 [%rd2], %r2", "st.global.b32 [%rd2], %r1"),
    )
    arguments = struct.pack("Qi4x", out.data_ptr(), 0)[:12]
    for _ in range(2):  # each time from what the text says
        emulator.run(adding, Launch(Variant("", "count", ()), (1, 1, 1), (1, 1, 1), 0, arguments, (out.fill_(9),)))
        assert out.item() == 0


def test_two_threads_that_run_one_program_have_its_arrays_one_after_the_other():
    from concurrent.futures import ThreadPoolExecutor

    adding = COUNTING.replace("st.global.b32 [%rd2], %r2", "add.u32 %r1, %r1, 1; atom.global.max.u32 %r3, [%rd2], %r1")

    def counted(_: int) -> int:
        out = torch.zeros(1, dtype=torch.int32)
        run_ptx(adding, "count", (25, 1, 1), (32, 1, 1), [out, 0])
        return int(out)

    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(counted, range(8))) == {800}


def test_a_number_of_numpys_is_packed_as_pythons():
    out = torch.zeros(1)
    run_ptx(COUNTING.replace(".b32 factor", ".f32 factor"), "count", (1, 1, 1), (1, 1, 1), [out, np.float32(2.5)])
    assert out.item() == 2.5


@pytest.mark.parametrize(
    ("grid", "block", "shared"),
    [
        ((1, 70000, 1), (1, 1, 1), 0),
        ((1, 1, 1), (1, 1, 128), 0),
        ((1, 1, 1), (-4, -1, 1), 0),
        ((1, 1, 1), (1, 1, 1), -16),
        ((1, 1, 1), (1, 1, 1), 10 << 20),
    ],
    ids=["grid.y", "block.z", "negative", "negative shared memory", "too much shared memory"],
)
def test_a_launch_that_no_device_runs_is_refused(grid, block, shared):
    with pytest.raises(LaunchError, match=r"no device runs|a block has 0 to"):
        run_ptx(COUNTING, "count", grid, block, [torch.zeros(1, dtype=torch.int32), 0], shared=shared)


def test_an_access_where_there_is_no_memory_at_all_is_named():
    ptx = COUNTING.replace(".global .align 4 .u32 counter;", "").replace(
        "mov.u64 %rd1, counter; atom.global.add.u32 %r1, [%rd1], 1;", ""
    )
    with pytest.raises(AccessError, match="outside every buffer"):
        run_ptx(ptx, "count", (1, 1, 1), (1, 1, 1), [0, 1])
