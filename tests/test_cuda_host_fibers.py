"""The fibers themselves, with small kernels of their own: order, barriers, warp operations, and what they refuse.

The project's kernels on the fibers: test_cuda_host.py.
"""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

pytest.importorskip("refq4_cuda", reason="the package refq4_cuda is not installed: pip install -e .")
from refq4_cuda.host import HostError, kernel_sources, run, unavailable
from refq4_cuda.launch import Launch, Variant

from refq4.testing import assert_same_bits

if (reason := unavailable("plain")) is not None:
    pytest.skip(f"kernels can't be compiled as host C++: {reason}", allow_module_level=True)

pytestmark = pytest.mark.reference_only("it names its engine itself")

HEAD = """
#include "device.cuh"
struct Own { const u8 *in; u8 *out; };
KERNEL(own, 1024)(Own p) {
    int tid = threadIdx.x;
    [[maybe_unused]] int lane = tid % 32;
"""


def run_own(
    body: str, given: Tensor, out: Tensor, *, block: int = 64, shared: int = 0, seed: int = 0, arch: int = 80,
    dtype: str = "BF16", mode: str = "plain", grid: int = 1, cut: int = 0,
) -> Tensor:  # fmt: skip
    """Runs a kernel with that body; ``cut`` leaves so many bytes of its arguments out."""
    arguments = struct.pack("<QQ", given.data_ptr(), out.data_ptr())
    launch = Launch(
        Variant("own.cu", "own", (f"T_{dtype}",)), (grid, 1, 1), (block, 1, 1), shared,
        arguments[: len(arguments) - cut], (given, out),
    )  # fmt: skip
    run(launch, arch=arch, seed=seed, mode=mode, sources=kernel_sources() | {"own.cu": HEAD + body + "}"})
    return out


NOTHING = torch.zeros(4)
ORDER = "i64 *seen = (i64 *)p.out; seen[1 + seen[0]++] = blockIdx.x * blockDim.x + tid;"


def order(seed: int) -> list[int]:
    return run_own(ORDER, NOTHING, torch.zeros(129, dtype=torch.int64), seed=seed, grid=2)[1:].tolist()


def test_seeds_0_and_1_run_threads_and_blocks_up_and_down():
    assert order(0) == list(range(128))
    assert order(1) == list(reversed(range(128)))


def test_other_seeds_are_each_an_order_of_their_own_and_always_the_same_one():
    assert order(7) == order(7)
    assert sorted(order(7)) == list(range(128))
    assert order(7) not in (order(8), order(0), order(1))


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_what_is_written_before_a_barrier_is_read_after_it(seed):
    body = "DYNAMIC_SHARED(s); ((int *)s)[tid] = tid; __syncthreads(); ((int *)p.out)[tid] = ((int *)s)[95 - tid];"
    got = run_own(body, NOTHING, torch.zeros(96, dtype=torch.int32), block=96, shared=384, seed=seed)
    assert got.tolist() == list(reversed(range(96)))


def test_without_a_barrier_some_schedule_reads_shared_memory_that_nobody_has_written():
    body = "DYNAMIC_SHARED(s); ((float *)s)[tid] = 1.0f; ((float *)p.out)[tid] = ((float *)s)[63 - tid];"
    assert run_own(body, NOTHING, torch.zeros(64), shared=256).isnan().any()


def test_shuffles_read_the_lane_they_name():
    body = "((int *)p.out)[tid] = __shfl_xor_sync(0xFFFFFFFFu, tid, 5) + 1000 * __shfl_sync(0xFFFFFFFFu, tid, 3);"
    got = run_own(body, NOTHING, torch.zeros(64, dtype=torch.int32), seed=7)
    assert got.tolist() == [(i ^ 5) + 1000 * (i // 32 * 32 + 3) for i in range(64)]


def test_every_fp16_number_widens_as_torch_widens_it():
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    halves = halves[~halves.isnan()]
    body = f"for (int i = tid; i < {halves.numel()}; i += 64) "
    body += "((float *)p.out)[i] = fp16_to_fp32(((const u16 *)p.in)[i]);"
    assert_same_bits(run_own(body, halves, torch.zeros(halves.numel())), halves.float())


@pytest.mark.parametrize(("dtype", "pack"), [(torch.float16, "pack_fp16"), (torch.bfloat16, "pack_bf16")], ids=str)
def test_fp32_rounds_to_the_nearest_16_bit_number_as_in_torch(dtype, pack):
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    numbers = numbers[numbers.isfinite()].sort().values
    between = ((numbers[1:].double() + numbers[:-1].double()) / 2).float()
    near = [between.nextafter(torch.tensor(side)) for side in (-torch.inf, torch.inf)]
    far = torch.tensor([65519.9, 65520.0, 65536.0, 3.4e38, torch.inf, -torch.inf, 1e-45, -0.0])
    given = torch.cat([numbers, between, *near, far])
    body = f"for (i64 i = tid; i < {given.numel()}; i += 64) "
    body += f"((u32 *)p.out)[i] = {pack}(((const float *)p.in)[i], -((const float *)p.in)[i]);"
    got = run_own(body, given, torch.zeros(given.numel(), dtype=torch.int32)).view(dtype).view(-1, 2)
    assert_same_bits(got, torch.stack([given, -given], dim=1).to(dtype))


@pytest.mark.parametrize(("arch", "dtype"), [(80, "BF16"), (80, "FP16"), (75, "FP16")])
def test_a_tensor_core_product_is_the_matrix_product(arch, dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, size, generator=generator).float() for size in ((16, 16), (16, 8)))
    kind = {"BF16": torch.bfloat16, "FP16": torch.float16}[dtype]
    body = """
    int g = lane / 4, t = lane % 4;
    const u32 *A = (const u32 *)p.in, *B = A + 128;  // rows of A and columns of B, two k in a word
    u32 a[4] = {A[8 * g + t], A[8 * (g + 8) + t], A[8 * g + t + 4], A[8 * (g + 8) + t + 4]};
    float d[4] = {1, 1, 1, 1}, *D = (float *)p.out;
    multiply_16x8x16(d, a, B[8 * g + t], B[8 * g + t + 4]);
    for (int i = 0; i < 4; i++) D[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
    """
    given = torch.cat([a.flatten(), b.t().flatten()]).to(kind)
    got = run_own(body, given, torch.zeros(16, 8), block=32, arch=arch, dtype=dtype, seed=7)
    assert_same_bits(got, a @ b + 1)


COPY = """
    DYNAMIC_SHARED(s);
    u32 *out = (u32 *)p.out, *word = (u32 *)s;
    copy_async16(s, p.in, 16);
    copy_async_commit();
    copy_async16(s + 16, p.in, 0);
    copy_async_commit();
    out[0] = word[0];
    copy_async_wait<1>();
    out[1] = word[0], out[2] = word[4];
    copy_async_wait<0>();
    out[3] = word[4];
"""


def test_an_asynchronous_copy_is_there_after_its_wait_and_not_before():
    given, out = torch.tensor([11, 12, 13, 14], dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    assert run_own(COPY, given, out, block=1, shared=32).tolist() == [-1, 11, -1, 0]


BROKEN = {
    "half a barrier": ("if (tid < 40) __syncthreads();", "threads 0 to 39 wait in __syncthreads on line 7"),
    "two barriers": ("if (tid < 32) __syncthreads();\n else __syncthreads();", "is reached on different lines"),
    "a lane gone": ("if (tid != 5) __shfl_sync(0xFFFFFFFFu, tid, 1);", "threads 5 to 5 have left the kernel"),
    "not in the mask": ("__shfl_sync(0xFFFFu, tid, 1);", "a warp operation whose mask leaves it out"),
    "beyond the mask": ("if (tid < 16) __shfl_sync(0xFFFFu, tid, 16);", "reads a lane that its mask leaves out"),
    "misaligned copy": (
        "DYNAMIC_SHARED(s); copy_async16(s + 8, p.in, 16);",
        "cp.async: an address is no multiple of 16",
    ),
    "after the end": ("p.out[16] = 1;", "wrote outside a buffer of 16 bytes, at offset 16"),
    "before the start": ("p.out[-1] = 1;", "wrote outside a buffer of 16 bytes, at offset -1"),
}


@pytest.mark.parametrize(("body", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_rule_ends_the_run_with_a_sentence(body, said):
    with pytest.raises(HostError) as caught:
        run_own(body, NOTHING, torch.zeros(4), shared=64)
    assert said in str(caught.value)


def test_arguments_of_another_size_than_the_kernels_struct_are_refused():
    with pytest.raises(HostError, match="the launch has 8 argument bytes, the kernel's struct 16"):
        run_own("", NOTHING, torch.zeros(4), cut=8)


def test_tensors_elsewhere_than_on_the_cpu_are_refused():
    launch = Launch(Variant("own.cu", "own", ()), (1, 1, 1), (1, 1, 1), 0, bytes(16), (torch.empty(4, device="meta"),))
    with pytest.raises(HostError, match="plan the launch with CPU tensors, not meta"):
        run(launch, arch=80, sources=kernel_sources() | {"own.cu": HEAD + "}"})


def test_a_kernel_that_is_no_cpp_gives_the_compilers_first_errors():
    with pytest.raises(HostError, match=r"compiling own.cu \(T_BF16\) as host C\+\+ failed:\n.*own.cu:7.*'wrong'"):
        run_own("wrong;", NOTHING, torch.zeros(4))


def test_without_a_compiler_it_says_how_to_get_one(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    unavailable.cache_clear()
    with pytest.raises(HostError, match=r"there is no C\+\+ compiler .*apt install g\+\+"):
        run_own("", NOTHING, torch.zeros(4))
    unavailable.cache_clear()


@pytest.mark.parametrize(
    ("array", "said"),
    [("__shared__ float s[64]", "global-buffer-overflow"), ("DYNAMIC_SHARED(s)", "heap-buffer-overflow")],
    ids=["static", "dynamic"],
)
def test_the_address_sanitizer_knows_the_end_of_a_shared_array(array, said):
    if (missing := unavailable("address")) is not None:
        pytest.skip(missing)
    body = f"{array}; ((float *)s)[tid] = 0; float *volatile at = (float *)s; *(float *)p.out = at[64];"
    with pytest.raises(HostError, match=said):
        run_own(body, NOTHING, torch.zeros(4), shared=256, mode="address")


def test_a_compiler_that_makes_no_programs_is_named_with_its_first_error(monkeypatch):
    monkeypatch.setenv("CXX", "g++ --no-such-option")
    unavailable.cache_clear()
    said = unavailable("thread")
    unavailable.cache_clear()
    assert said is not None
    assert said.startswith("g++ --no-such-option -O1 -g1 -fsanitize=thread makes no programs here")
    assert "unrecognized command-line option" in said


@pytest.mark.parametrize(
    ("barrier", "races"),
    [("__syncwarp();", False), ("__shfl_sync(0xFFFFFFFFu, tid, 0);", True), ("__syncthreads();", False)],
)
def test_only_barriers_order_threads_for_the_thread_sanitizer(barrier, races):
    if (missing := unavailable("thread")) is not None:
        pytest.skip(missing)
    body = f"""
    DYNAMIC_SHARED(s);
    int *mine = (int *)s + tid / 32 * 32;
    for (int i = 0; i < 3; i++) {{
        mine[lane] = tid;
        {barrier}
        ((int *)p.out)[tid] = mine[lane ^ 1];
        {barrier}
    }}
    """
    arguments = body, NOTHING, torch.zeros(64, dtype=torch.int32)
    if not races:
        assert run_own(*arguments, shared=256, mode="thread", seed=7).tolist() == [i ^ 1 for i in range(64)]
        return
    with pytest.raises(HostError, match=r"data race(.|\n)*own\.cu"):
        run_own(*arguments, shared=256, mode="thread", seed=7)
