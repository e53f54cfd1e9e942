# %% [markdown]
# # 9. Inside the CPU kernel
#
# **How can a processor be dozens of times as fast as with a plain loop over the weights?**
#
# - You will be able to read a kernel of the CPU backend, and say what each rung gains.
# - You need notebook 8. This notebook is for readers who write kernels; others may go on to 11. It takes 25 minutes.
# - To run it yourself: `pip install -e '.[notebooks]'` in a checkout of refq4 ([how](README.md)).
#
# There are three ideas: put the bytes into the order in which they are needed, look up many codes with one
# instruction, and keep everything else out of the loop. We try each idea in numpy first, on numbers that we can
# print, and compare it with the bytes and results of the real kernel. The kernels are called *rungs*: each adds one
# idea to the one before. At the end all rungs run, from the first to the last.
#
# The source is in [the kernels' folder](../backends/cpu/refq4_cpu/kernels). All figures are in [CPU
# kernels](../docs/cpu-kernels.md).

# %% tags=["timing"]
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from refq4_cpu import CpuBackend
from refq4_cpu.kernels import PRODUCT_KERNELS

from refq4 import get_codebook
from refq4.backend import Call
from refq4.functional import quantize_4bit
from refq4.testing import assert_within_budget, oracle
from support import kernels, picture, registers, roofs

torch.set_num_threads(1)
cpu = CpuBackend()
missing = cpu.available()  # None, or one sentence: what is missing, and how to get it
print(missing or f"{cpu.info()['processor']}: the best tier is {cpu.info()['tier']}")

# %% [markdown]
# ## The plain loop
#
# The plain loop handles one weight after the other: it extracts the code from the byte, looks it up, and multiplies
# by the block's scale and by x. This is `gemv_4bit_1_scalar.c`, in Python.

# %%
N, K, blocksize = 16, 64, 64
generator = torch.Generator().manual_seed(9)
W, x = torch.randn(N, K, generator=generator), torch.randn(1, K, generator=generator)
B, state = quantize_4bit(W, quant_type="nf4", blocksize=blocksize)
weight = state.packed_weight(B)
packed, absmax, code = (t.numpy() for t in (weight.packed, weight.absmax, weight.code))


def plain_loop(n):
    total = 0.0
    for k in range(K):
        i = n * K + k
        byte = packed[i // 2]
        nibble = byte & 15 if i % 2 else byte >> 4
        total += float(code[nibble]) * float(absmax[i // blocksize]) * float(x[0, k])
    return total


exact = oracle(x, B, state)[0]
assert np.allclose([plain_loop(n) for n in range(N)], exact, rtol=1e-6)
print("the first three outputs:", *(f"{plain_loop(n):.4f}" for n in range(3)))

# %% [markdown]
# The same five lines in C:

# %%
kernels.show("gemv_4bit_1_scalar.c")

# %% [markdown]
# Each step waits for the one before. A register of a modern processor has eight or sixteen *lanes*, each with one
# number, and an instruction does the same to all lanes. So which numbers should be in the lanes?
#
# ## Lanes are outputs
#
# Each lane computes one of sixteen outputs, which are sixteen rows of the weight. At one k all of them need the same
# x, and at the end nothing must be summed across lanes. But in memory the bytes of neighbouring rows are K/2 bytes
# apart. So the backend rearranges a weight once, before its first use: first the first four bytes of each of the
# sixteen rows, then the next four bytes of each row, and so on.

# %%
registers.tiles(rows=16, groups=8, row=5, group=2)

# %% [markdown]
# The orange bytes are k = 16 to 23 of row 5, and their scale. In numpy the new order is one transposition. The
# kernel's own tiles have the same bytes.

# %%
# [row, group, byte] -> [group, row, byte]
groups = packed.reshape(16, 8, 4).transpose(1, 0, 2)
# sixteen scales, then eight groups
record = np.concatenate([absmax.view(np.uint8), groups.reshape(-1)])
prepared = None if missing else cpu.prepare_weight(weight)
if prepared is not None:  # plain C, without vector instructions, has no use for tiles
    assert prepared.layout == "tiles16"
    assert np.array_equal(prepared.tensors[0].numpy(), record)
    # and the way back is exact
    assert torch.equal(cpu.restore_weight(prepared).packed, weight.packed)
print(f"{len(record)} bytes: {4 * 16} of scales, {8 * 64} of codes")

# %% [markdown]
# ## Sixteen look-ups with one instruction
#
# One group has 64 bytes, the size of a register of AVX-512. Each of its sixteen lanes has eight codes of one row. A
# shift of the lanes by a multiple of four bits moves one code of each row into the lowest four bits. The instruction
# `vpermps` uses these bits as an index into another register, which contains the whole NF4 table.

# %%
group = groups[2].copy().view("<u4").reshape(16)  # k = 16 .. 23 of all sixteen rows
shift = 3
shifted = group >> np.uint32(4 * shift)
looked_up = code[shifted & 15]
registers.lanes(
    {
        "group 2: a lane for each row, eight codes in each": [
            f"{v:08x}" for v in group
        ],
        f"shifted by {4 * shift} bits: the last hexadecimal digit is the code": [
            f"{v:08x}" for v in shifted
        ],
        "the table, in a register": [f"{v:.3f}" for v in code],
        "vpermps: sixteen weights, still without their scales": [
            f"{v:.3f}" for v in looked_up
        ],
    },
    follow=[[5], [5], [shifted[5] & 15], [5]],
)

# %% [markdown]
# In a lane the first byte is the lowest one, and each byte has its first code in the *high* half. So shifts 0, 1, 2,
# 3, ... give k = 1, 0, 3, 2, ... This is not a problem: x is put into the same order, once per call.

# %%
decoded = code[
    torch.from_numpy(packed).view(-1, 1).repeat(1, 2).view(-1).numpy()
    >> np.tile([4, 0], N * K // 2)
    & 15
]
decoded = decoded.reshape(N, K)  # what the plain loop looks up
for g in range(8):
    lanes = groups[g].copy().view("<u4").reshape(16)
    for s in range(8):
        k = 8 * g + (s ^ 1)
        assert np.array_equal(code[lanes >> np.uint32(4 * s) & 15], decoded[:, k])
print("shift:", *range(8), "  brings down k =", *(s ^ 1 for s in range(8)))

# %% [markdown]
# This is the inner loop of the kernel. `vpermps` is written `_mm512_permutexvar_ps`; s counts the shifts, m the
# tokens, and p the panels of sixteen rows:

# %%
kernels.show("gemm_4bit_3_avx512.c")

# %% [markdown]
# ## The same with AVX2: two tables of bytes
#
# Most processors have registers of half this length, and sixteen fp32 values don't fit into one. With two registers
# and a choice between them, a look-up of eight weights takes five instructions. But there is an instruction for a
# table of sixteen *bytes*, `vpshufb`, and a bf16 number has two bytes. So the kernel looks up the upper bytes, looks
# up the lower bytes, and joins them.

# %%
bf16 = (
    torch.from_numpy(code.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
)
upper, lower = (bf16 >> 8).astype(np.uint8), bf16.astype(np.uint8)
# the low halves of rows 5 and 6: k = 17, 19, 21, 23 of each
index = groups[2, 5:7].reshape(-1) & 15
words = lower[index] | upper[index].astype(np.uint16) << 8
values = (words.astype(np.uint32) << 16).view(np.float32)
registers.lanes(
    {
        "eight bytes of group 2: four of row 5, four of row 6": [
            f"{b:02x}" for b in groups[2, 5:7].reshape(-1)
        ],
        "& 15: eight codes": [f"{i}" for i in index],
        "vpshufb in the upper bytes of the table": [f"{b:02x}" for b in upper[index]],
        "vpshufb in its lower bytes": [f"{b:02x}" for b in lower[index]],
        "vpunpck: side by side, eight bf16 numbers": [f"{w:04x}" for w in words],
        "<< 16: fp32, for bf16 is fp32's upper half": [f"{v:.3f}" for v in values],
    },
    follow=[range(4)] * 6,
    groups=4,
)

# %%
assert np.array_equal(
    values,
    torch.from_numpy(decoded[5:7, 17:24:2].copy())
    .bfloat16()
    .float()
    .numpy()
    .reshape(-1),
)
# per 8 weights: two shifts, two look-ups, a blend
two_tables_of_floats = 8 * (2 + 2 + 1)
# a shift; per half: an and, two look-ups, two unpacks, four to widen
two_tables_of_bytes = 1 + 2 * (1 + 2 + 2 + 4)
print(
    f"instructions for 64 weights: {two_tables_of_floats} by floats, "
    f"{two_tables_of_bytes} by bytes"
)

# %% [markdown]
# ## Multiplying: fp32, or pairs of bf16
#
# `vfmadd` multiplies sixteen fp32 numbers and adds the products to sixteen sums. `vdpbf16ps` multiplies thirty-two
# bf16 numbers, and adds two products to each of sixteen sums. Does it lose precision? The multiplication does not:
# the product of two numbers of 8 significant bits has 16 bits, and fp32 has 24.

# %%
a, b = (torch.randn(100_000, generator=generator).bfloat16() for _ in range(2))
assert torch.equal((a.float() * b.float()).double(), a.double() * b.double())

# %% [markdown]
# The precision is lost before, because the weights must be rounded to bf16. Rounding each scaled weight would make a
# new error for each. But the scale can be outside the loop, because multiplying a block's sum by the scale is the
# same as multiplying its 64 terms. So the kernel rounds only the sixteen values of the table. It can also multiply
# the table by any factor, and divide by it at the end. So it tries 1,536 factors and uses the one with which the
# sixteen values round best.


# %%
def entry_errors(values, factor):
    rounded = torch.from_numpy(values * np.float32(factor)).bfloat16().double().numpy()
    return np.abs(rounded / factor - values)


def rounding_error(values, factor):
    return float(np.sqrt(np.mean(entry_errors(values, factor) ** 2)))


factors = 1 + np.arange(1536) / 1536
best = {}
for name in ("nf4", "fp4"):
    table = np.array(get_codebook(name).values, np.float32)
    errors = [rounding_error(table, c) for c in factors]
    best[name] = factors[int(np.argmin(errors))]
    print(
        f"{name}: {errors[0]:.6f} as it is, {min(errors):.6f} under the factor "
        f"{best[name]:.4f}"
    )

# %%
nf4 = np.array(get_codebook("nf4").values, np.float32)
figure, axes = picture.canvas(height=2.8)
for i, (factor, colour) in enumerate(
    {1.0: picture.VERMILION, best["nf4"]: picture.BLUE}.items()
):
    axes.bar(
        np.arange(16) + 0.4 * i - 0.2,
        entry_errors(nf4, factor),
        0.36,
        color=colour,
        label=f"times {factor:.4g}",
    )
axes.set_xticks(range(16), [f"{v:.2f}" for v in nf4], fontsize=8)
axes.set(xlabel="the sixteen values of NF4", title="what rounding each to bf16 loses")
axes.grid(axis="x", visible=False)
axes.legend()
picture.show(
    figure,
    "The rounding error of each of the sixteen values: as they are, and times the best "
    "factor.",
)

# %%
W4 = decoded * absmax[:, None]
# in units of the scale, as the table is
each = (torch.from_numpy(W4).bfloat16().float().numpy() - W4) / absmax[:, None]
print(f"each scaled weight rounded: {np.sqrt(np.mean(each**2)):.6f}", end="; ")
print(
    f"the table: {rounding_error(nf4, 1.0):.6f}, with its factor "
    f"{rounding_error(nf4, best['nf4']):.6f}"
)

# %% [markdown]
# The factor costs no time, and the error is smaller than with rounding each weight.
#
# Which of the two instructions is faster depends on the processor: in the same time, `vdpbf16ps` multiplies twice as
# many numbers as `vfmadd` on some processors, and half as many on others. The backend measures both once, and uses
# the faster one (notebook 8).
#
# ## All rungs
#
# We measure every kernel that this machine can run, from the plain loop to the last one, on one weight of 4096 x
# 4096, with one thread. `REFQ4_CPU_KERNEL` chooses a kernel. Before a kernel is measured, its result is checked
# against the error budget. The cell also names the kernels that this machine can't run, and why.

# %% tags=["timing"]
times, refused = {}, {}
if missing is None:
    n = k = 4096
    W = torch.randn(n, k, generator=generator) / k**0.5
    big, big_state = quantize_4bit(W, quant_type="nf4", blocksize=64)
    canonical, small = (
        big_state.packed_weight(big),
        torch.randn(1, K, generator=generator).bfloat16(),
    )
    for kernel in PRODUCT_KERNELS:
        os.environ["REFQ4_CPU_KERNEL"] = kernel.name
        engine = CpuBackend()  # a new one: a backend remembers which kernel serves what
        refusal = engine.can_run(
            Call("gemv_4bit", "cpu", torch.bfloat16, 1, n, k, 64, "nf4")
        )
        if refusal is not None:
            refused[kernel.name] = refusal
            continue
        assert_within_budget(
            engine.gemv_4bit(small, weight, None), small, B, state, what=kernel.name
        )
        tiled = engine.prepare_weight(canonical) if kernel.reads_tiles else None
        times[kernel.name] = {}
        for M in (1,) if kernel.most_tokens == 1 else (1, 16):
            tokens = torch.randn(M, k, generator=generator).bfloat16()
            shortest = float("inf")
            for _ in range(2 if kernel.feature == "c" else 5):
                start = time.perf_counter()
                engine.gemm_4bit(tokens, canonical if tiled is None else tiled, None)
                shortest = min(shortest, 1e3 * (time.perf_counter() - start))
            times[kernel.name][M] = shortest
    del os.environ["REFQ4_CPU_KERNEL"]
print(missing or "\n".join(f"not here: {reason}" for reason in refused.values()))

# %% [markdown]
# The filled bars were measured by the cell above. The outlined bar is from another machine: it is the whole layer on
# a Zen 4 processor with `vdpbf16ps` and two threads, from `docs/benchmarks/cpu.json`.

# %% tags=["timing"]
kept = json.loads(Path("../docs/benchmarks/cpu.json").read_text())
zen4 = {
    row["m"]: row["ms"]
    for row in kept["products"]
    if (row["n"], row["k"]) == (4096, 4096)
}
roofs.ladder(
    times, {"elsewhere: Zen 4, 2 threads": {M: zen4[M]["refq4"] for M in (1, 16)}}
)

# %% tags=["timing"]
if times:
    first, last = (f(row[1] for row in times.values()) for f in (max, min))
    sixteen = min(row[16] for row in times.values() if 16 in row)
    print(
        f"M = 1: {first / last:.0f} times as fast as the plain loop, "
        f"{4096**2 / last / 1e6:.1f} weights a nanosecond"
    )
    print(f"sixteen tokens take {sixteen / last:.1f} times as long as one")

# %% [markdown]
# This is the table of the other machine, with other libraries that people use today, in milliseconds per call.
# `python -m refq4 bench` prints the same table for your machine.

# %%
peers = list(zen4[1])
picture.table(
    ["M", *peers],
    [[M, *(f"{row[peer]:.3g}" for peer in peers)] for M, row in zen4.items()],
)

# %% [markdown]
# **Summary:** the last kernel is dozens of times as fast as the plain loop, with the same arithmetic.
# The bytes are in the order in which they are needed, one instruction looks up a register full of codes, and the
# scale is outside the loop.

# %% [markdown]
# ## Exercises
#
# Put your answer in place of each `...`, run the cell, and read what it says. The solutions are folded.
#
# **9.1** A dword has four stored bytes, the lowest byte first. Which shifts, in steps of four bits, move the codes of
# k = 0, 1, ... 7 into the lowest four bits?

# %% tags=["exercise"]
from support import exercises

answer = [...]
exercises.check("9.1", answer)

# %% [markdown]
# <details><summary>A solution to 9.1</summary>
#
# ```python
# answer = [s ^ 1 for s in range(8)]  # in each byte the first code is the high one
# ```
#
# </details>

# %% [markdown]
# **9.2** Make a bf16 number from its upper and its lower byte, as `vpunpck` and a shift by 16 do.


# %% tags=["exercise"]
def join(upper, lower): ...


exercises.check("9.2", join)

# %% [markdown]
# <details><summary>A solution to 9.2</summary>
#
# ```python
# import struct
#
#
# def join(upper, lower):
#     return struct.unpack("<f", struct.pack("<I", (upper << 8 | lower) << 16))[0]
# ```
#
# </details>

# %% [markdown]
# **Next:** [inside the CUDA kernels](10_inside_the_cuda_kernels.ipynb)
