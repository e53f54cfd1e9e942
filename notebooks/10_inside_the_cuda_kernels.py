# %% [markdown]
# # 10. Inside the CUDA kernels
#
# **Among thousands of threads, which one holds which number?**
#
# - You will be able to say which lane holds which element of an `mma`, and find a race without a GPU.
# - You need notebook 8. This notebook is for readers who write kernels; others may go on to 11. It takes 25 minutes.
# - To run it yourself: `pip install -e '.[notebooks]'` in a checkout of refq4 ([how](README.md)).
#
# No GPU is needed. NVRTC, NVIDIA's compiler, translates a kernel to PTX, an assembly language. The project's emulator
# executes this PTX on CPU tensors, and shows the registers of any thread. If there is a GPU, the products below also
# run on it, with the same plan of each launch and the same bytes of its arguments.
#
# The source is in [the kernels' folder](../backends/cuda/refq4_cuda/kernels). [CUDA kernels](../docs/cuda-kernels.md)
# has the gain of each kernel.

# %% tags=["timing"]
import numpy as np
import torch
from refq4_cuda import CudaBackend, CudaEmulatorBackend, emulator, launch
from refq4_cuda.geometry import RUNGS
from refq4_cuda.nvrtc import compile_variant
from refq4_cuda.operands import table_factor

import refq4
from refq4.functional import quantize_4bit
from refq4.testing import assert_within_budget
from support import kernels, picture, registers, stepping

torch.set_num_threads(1)
missing = refq4.backend_info("cuda-emulator")["reason"]
assert missing is None, missing  # the sentence says what to install
no_gpu = refq4.backend_info("cuda")["reason"]
backend, device = (CudaEmulatorBackend(), "cpu") if no_gpu else (CudaBackend(), "cuda")
processor = backend.processor(torch.device(device))
print(f"products run on {backend.name}, compiled for sm_{processor.arch}")
print(f"no GPU: {no_gpu}" if no_gpu else f"GPU: {torch.cuda.get_device_name()}")

# %% [markdown]
# ## A launch
#
# A kernel is started for a *grid* of blocks, here of 256 threads each. 32 neighbouring threads are a *warp*; its
# threads, called *lanes*, execute the same instruction at the same time. There are four kernels for the same product.
# They are called *rungs*: each adds one idea to the one before.

# %%
generator = torch.Generator().manual_seed(10)
ARCH, MULTIPROCESSORS = 80, 132


def quantised(N, K):
    W = torch.randn(N, K, generator=generator) / K**0.5
    B, state = quantize_4bit(W, quant_type="nf4", blocksize=64, backend="reference")
    return B, state, state.packed_weight(B)


def planned(x, weight, rung):
    """y, still unwritten, and the launch that will write it."""
    y = torch.full((x.shape[0], weight.shape[0]), float("nan"), dtype=x.dtype)
    (one,) = launch.product(x, weight, None, y, ARCH, MULTIPROCESSORS, rung=rung)
    return y, one


def ptx(one):
    return compile_variant(one.variant, ARCH, "ptx").data.decode()


B, state, weight = quantised(N=128, K=1024)
x = torch.randn(1, 1024, generator=generator).bfloat16()
rows = []
for rung in reversed(RUNGS):
    _, one = planned(x, weight, rung)
    rows.append(
        [
            rung,
            one.variant.file,
            "x".join(map(str, one.grid)),
            "x".join(map(str, one.block)),
            one.shared,
        ]
    )
picture.table(["rung", "file", "grid", "block", "bytes of shared memory"], rows)

# %% [markdown]
# ## Threads
#
# Which thread reads which bytes of a row? We do not look into the source, but read the addresses from the registers
# when the first warp executes the load.

# %%
loads = {}
for rung, pattern in {"naive": "nc.u8", "vectorised": "no_allocate.v4.u32"}.items():
    _, one = planned(x, weight, rung)
    trace = emulator.trace(ptx(one), one, warp=(0, 0))
    width = 1 if rung == "naive" else 16
    for step, line in enumerate(trace.find(pattern)[: 2 if rung == "naive" else 1]):
        starts = np.array(stepping.addresses(line.reads))
        readers = [
            np.nonzero((starts <= byte) & (byte < starts + width))[0].tolist()
            for byte in range(32)
        ]
        loads[f"{rung}, load {step + 1}"] = readers
assert loads["naive, load 1"][0] == [0, 1]
assert loads["vectorised, load 1"][31] == [1]
registers.threads(loads)

# %% [markdown]
# In the naive kernel two lanes read the same byte, one for each of its codes, so a load reads 16 bytes for the whole
# warp. In the vectorised kernel each *lane* reads 16 bytes, so one load reads 512 bytes. The idea of the second rung
# is to use fewer and larger loads.
#
# These lines of the two kernels use the loaded bytes:

# %%
kernels.show("gemv_4bit_1_naive.cu")

# %%
kernels.show("gemv_4bit_2_vectorised.cu")

# %% [markdown]
# ## Shuffles
#
# Each lane of the naive kernel has its own sum, and the 32 sums must be added. Lanes can't read each other's
# registers, but they can exchange values: `shfl.bfly` gives each lane the value of the lane whose number differs in
# one bit. After five exchanges, all lanes have the total.

# %%
B1, state1, weight1 = quantised(N=8, K=64)
x1 = 8 * torch.randn(1, 64, generator=generator)
y1, one = planned(x1, weight1, "naive")
trace = emulator.trace(ptx(one), one, warp=(0, 0))
exchanges, distances = trace.find("shfl.sync.bfly"), [16, 8, 4, 2, 1]
sums = [stepping.bits(line.reads).view(np.float32) for line in exchanges]
for stage, distance in enumerate(distances):
    added = sums[stage] + sums[stage][np.arange(32) ^ distance]
    if stage < 4:
        # to the last bit what the next exchange reads
        assert np.array_equal(added, sums[stage + 1])
assert np.all(added == float(y1[0, 0]))  # and every lane ends with the output
registers.shuffle([*sums, added], distances)

# %% [markdown]
# The orange boxes show how the values of all lanes reach lane 0. After each exchange, a sum contains the values of
# twice as many lanes: 1, 2, 4, 8, 16, 32.
#
# ## One thread, step by step
#
# We dequantise a weight and follow thread 5 of block 0, from its own number to its first value. The trace has every
# instruction that the thread executed. The cell shows only those that the product depends on; it finds them by going
# backwards from the product.

# %% tags=["timing"]
out = torch.empty(weight1.shape, dtype=torch.bfloat16)
(one,) = launch.dequantize_4bit(weight1, out, arch=ARCH)
trace = emulator.trace(ptx(one), one, thread=(0, 5))
product = trace.find("mul.rn.f32")[0]
way = stepping.made_from(trace, product)
print(f"{len(way)} of {len(trace.lines)} instructions")
picture.table(
    ["instruction", "reads", "writes"],
    [
        [
            f"`{line.text}`",
            line.reads.replace("\n", "; "),
            line.writes.replace("\n", "; "),
        ]
        for line in way
    ],
)

# %% [markdown]
# An address is shown as a tensor and a byte in it. Thread 5 loads its four bytes, extracts one code, loads its
# block's scale, and looks up the code in shared memory. Shared memory has 32 copies of the table, one for each lane,
# so that no two lanes read the same memory bank at once. This is why the index is the code times 32 plus the lane.

# %%
decoded = state1.code[
    (B1.view(-1)[20:24].view(torch.uint8)[:, None] >> torch.tensor([4, 0]) & 15)
    .view(-1)
    .long()
]
wanted = decoded * state1.absmax[0]  # elements 40 to 47, all in block 0
assert torch.equal(out.view(-1)[40:48], wanted.bfloat16())
assert abs(float(product.writes.split(" = ")[1]) - wanted).min() < 1e-5

# %% [markdown]
# ## A fragment
#
# Tensor cores multiply whole matrices: `mma.sync.m16n8k16` takes A of 16 x 16 and B of 16 x 8 and adds their product
# to D. No thread has a whole matrix. Each thread has some elements in its registers, and the instruction defines
# which ones. With lane = 4g + t, they are:
#
# | | registers | are |
# | --- | --- | --- |
# | A | a0, a2 | row g, columns 2t, 2t+1 and 2t+8, 2t+9 |
# | | a1, a3 | the same of row g+8 |
# | B | b0, b1 | column g, rows 2t, 2t+1 and 2t+8, 2t+9 |
# | D | d0, d1 and d2, d3 | row g and row g+8, columns 2t, 2t+1 |
#
# In the picture a box is a register: two bf16 numbers in A and B, one fp32 number in D. The number in the box is the
# lane; lane 6 is orange.

# %%
A, Bm, D = (np.full(shape, -1) for shape in ((16, 16), (16, 8), (16, 8)))
for lane in range(32):
    g, t = divmod(lane, 4)
    for half in range(2):  # a register of A or B is two numbers of 16 bits
        A[g, 2 * t + half], A[g + 8, 2 * t + half] = 4 * lane, 4 * lane + 1
        A[g, 2 * t + 8 + half], A[g + 8, 2 * t + 8 + half] = 4 * lane + 2, 4 * lane + 3
        Bm[2 * t + half, g], Bm[2 * t + 8 + half, g] = 2 * lane, 2 * lane + 1
        D[g, 2 * t + half], D[g + 8, 2 * t + half] = (
            4 * lane + half,
            4 * lane + 2 + half,
        )
titles = {
    "A: weights": ("a0", "a1", "a2", "a3"),
    "B: x": ("b0", "b1"),
    "D: sums": ("d0", "d1", "d2", "d3"),
}
registers.fragment(dict(zip(titles, (A, Bm, D), strict=True)), titles, lane=6)

# %% [markdown]
# Is the picture right? We take the registers of all 32 lanes from a real `mma`, put them where the picture says,
# multiply the matrices in numpy, and compare the result with the registers that the instruction wrote.

# %%
x8 = torch.randn(8, 1024, generator=generator).bfloat16()
y8, one = planned(x8, weight, "tensor_core")
warp = emulator.trace(ptx(one), one, warp=(0, 0), limit=5000)
mma = warp.find("^mma")[0]


def halves(words):
    """uint32 [...] to the two bf16 numbers in each, the lower half first: [..., 2]."""
    return (
        np.stack([words << 16, words & 0xFFFF0000], axis=-1)
        .astype(np.uint32)
        .view(np.float32)
    )


def matrix(holder, values):
    """Values [lane, register, half] where the picture says; the half is the parity."""
    result = np.zeros(holder.shape, np.float32)
    for (r, c), code in np.ndenumerate(holder):
        lane, register = divmod(int(code), values.shape[1])
        result[r, c] = values[lane, register, (r if holder is Bm else c) % 2]
    return result


a, b = (
    np.stack([stepping.bits(mma.reads, i) for i in which], axis=1)
    for which in (range(4), range(4, 6))
)
d = np.stack([stepping.floats(mma.writes, i) for i in range(4)], axis=1)
wrote = d[D // 4, D % 4]
assert np.allclose(
    matrix(A, halves(a)) @ matrix(Bm, halves(b)), wrote, rtol=1e-4, atol=1e-5
)
exchanged = matrix(A, halves(a[:, [0, 2, 1, 3]])) @ matrix(Bm, halves(b))
print(
    "largest difference: "
    f"{abs(matrix(A, halves(a)) @ matrix(Bm, halves(b)) - wrote).max():.0e}",
    end="; ",
)
print(f"if a1 and a2 were exchanged: {abs(exchanged - wrote).max():.1f}")
assert abs(exchanged - wrote).max() > 0.1

# %% [markdown]
# ## A byte is a fragment register
#
# In A, a register has two neighbours in k. A stored byte also has two neighbours in k. So a table of 256 *pairs*
# turns a byte into a fragment register with one look-up, without separating the two codes. Lane 4g + t uses byte 4t
# of row g. The order of k in the columns is free, as long as x has the same order.

# %%
packed = weight.packed.view(128, 512)
table = weight.code * table_factor("nf4", torch.bfloat16)
for lane in range(32):
    g, t = divmod(lane, 4)
    for register, row in ((0, g), (1, g + 8)):
        byte = int(packed[row, 4 * t])
        pair = table[[byte >> 4, byte & 15]].bfloat16().float().numpy()
        assert np.array_equal(halves(a)[lane, register], pair)
byte = int(packed[1, 8])
print(
    f"lane 6, a0: byte {byte:#04x} of row 1 -> register {a[6, 0]:#010x} -> values "
    f"{halves(a)[6, 0]}"
)

# %% [markdown]
# These lines of the kernel make a0 to a3 of two `mma`s:

# %%
kernels.show("gemm_4bit_3_tensor_core.cu")

# %% [markdown]
# The next rung has one copy of each entry for each bank, and its entries are 256 bytes apart. So the address of an
# entry is one byte permutation:

# %%
kernels.show("gemm_4bit_4_ring.cu")

# %% [markdown]
# ## All rungs
#
# The cell runs all rungs, and checks each result against the error budget. How many instructions does a weight take?
# The emulator counts them per lane, including everything outside the loop.

# %% tags=["timing"]
B4, state4, weight4 = quantised(N=128, K=2048)
x4 = torch.randn(1, 2048, generator=generator).bfloat16()
counted = {}
for rung in reversed(RUNGS):
    y4, one = planned(x4, weight4, rung)
    counted[rung] = emulator.run(ptx(one), one).instructions / (128 * 2048)
    assert_within_budget(y4, x4, B4, state4, what=rung)
figure, axes = picture.canvas(height=2.2)
axes.barh(list(counted), list(counted.values()), color=picture.BLUE, height=0.6)
for row, value in enumerate(counted.values()):
    axes.text(value, row, f" {value:.1f}", va="center")
axes.invert_yaxis()
axes.grid(axis="y", visible=False)
axes.set_title("instructions for each weight, one token")
picture.show(
    figure, "Instructions for each weight: fewer with every rung from naive to ring."
)

# %% [markdown]
# To be as fast as its memory, an H200 may use four instructions per weight ([CUDA kernels](../docs/cuda-kernels.md)).
# The loop of the ring takes 2.1 in machine code. Here the count also includes filling the tables, which is a large
# part for such a small weight.
#
# How many instructions do eight tokens take? The vectorised kernel multiplies again for each token. With tensor
# cores, B has eight columns anyway.

# %%
eight = {}
for rung in ("vectorised", "tensor_core"):
    y8, one = planned(x8, weight, rung)
    y1, alone = planned(x8[:1].contiguous(), weight, rung)
    eight[rung] = (
        emulator.run(ptx(one), one).instructions
        / emulator.run(ptx(alone), alone).instructions
    )
    assert_within_budget(y8, x8, B, state, what=rung)
    print(f"{rung}: eight tokens take {eight[rung]:.1f} times the instructions of one")
assert eight["tensor_core"] < 1.1 < 2 < eight["vectorised"]

# %% [markdown]
# ## On this machine's processor
#
# These are the same launches, planned for the processor of the first cell: the GPU if there is one, otherwise the
# emulator again.

# %% tags=["timing"]
x_there = x4.to(device)
B_there, state_there = B4.to(device), state4.copy().to(device)
for rung in reversed(RUNGS):
    y_there = torch.empty(1, 128, dtype=torch.bfloat16, device=device)
    there = state_there.packed_weight(B_there)
    plan = launch.product(
        x_there,
        there,
        None,
        y_there,
        processor.arch,
        processor.multiprocessors,
        rung=rung,
    )
    processor.run(plan)
    assert_within_budget(y_there.cpu(), x4, B4, state4, what=rung)
    if no_gpu is None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(100):
            processor.run(plan)
        end.record()
        torch.cuda.synchronize()
        print(f"{rung}: {10 * begin.elapsed_time(end):.1f} µs")
print(f"all four rungs are within the budget on {backend.name}")

# %% [markdown]
# **Summary:** the lane and the register define which number a thread has. No variable in the source
# says this, and a mistake is visible only in the result. This is why the emulator checks every access, and why every
# kernel is compared with the reference (notebook 11).

# %% [markdown]
# ## Exercises
#
# Put your answer in place of each `...`, run the cell, and read what it says. The solutions are folded.
#
# **10.1** Which lane holds row r, column k of A in `mma.m16n8k16`?

# %% tags=["exercise"]
from support import exercises


def lane(r, k): ...


exercises.check("10.1", lane)

# %% [markdown]
# <details><summary>A solution to 10.1</summary>
#
# ```python
# def lane(r, k):
#     return 4 * (r % 8) + k % 8 // 2
# ```
#
# </details>

# %% [markdown]
# **10.2** In a copy of `gemm_4bit_3_tensor_core.cu`, the `__syncthreads()` between filling the table
# and reading it was removed. Which error will the emulator raise? The names are in [CUDA without a
# GPU](../docs/cuda-without-a-gpu.md).

# %% tags=["exercise"]
answer = ...
exercises.check("10.2", answer)

# %% [markdown]
# <details><summary>A solution to 10.2</summary>
#
# ```python
# answer = "RaceError"  # some warps read entries that others may still have to write
# ```
#
# </details>

# %% [markdown]
# **Next:** [two backends give different numbers: is one wrong?](11_do_they_agree.ipynb)
