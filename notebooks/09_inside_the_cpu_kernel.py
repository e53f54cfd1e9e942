# %% [markdown]
# # 9. Inside the CPU kernel
#
# **How does a processor get from a plain loop over the weights to dozens of times its speed?**
#
# - You will be able to read a kernel of the CPU backend, and say what each rung buys.
# - It needs notebook 8. It is for those who write kernels; others may go on to 11. It takes 25 minutes.
# - To run it yourself: `pip install -e '.[notebooks]'` in a checkout of refq4 ([how](README.md)).
#
# Three ideas do it: put the bytes into the order in which they are needed, look up many codes with one instruction, and
# keep everything else out of the loop. Each is tried here in numpy first, on numbers that can be seen, and held against
# the bytes and results of the real kernel. At the end the kernels themselves run, from the first rung to the last.
#
# Source: [the kernels](../backends/cpu/refq4_cpu/kernels).
# The story with all its figures: [CPU kernels](../docs/cpu-kernels.md).

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
# One weight after the other: take its code out of the byte, look it up, multiply by the block's scale and by x. This is
# `gemv_4bit_1_scalar.c`, in Python.

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
# In C it is the same five lines:

# %%
kernels.show("gemv_4bit_1_scalar.c")

# %% [markdown]
# Each step waits for the one before. A register of a modern processor holds eight or sixteen numbers, and wants them
# all treated alike. But who shall be alike?
#
# ## Lanes are outputs
#
# Sixteen outputs, that is sixteen rows of the weight. At the same k all of them want the same x, and at the end no sum
# must be put together across lanes. Only, their bytes lie K/2 apart. So the backend rearranges a weight once, before
# its first use: the first four bytes of each of sixteen rows, then the next four of each.

# %%
registers.tiles(rows=16, groups=8, row=5, group=2)

# %% [markdown]
# The orange bytes are k = 16 to 23 of row 5, and their scale. In numpy the new order is one transposition, and the
# kernel's own tiles are the same, byte for byte.

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
# One group is 64 bytes: a register of AVX-512. Each of its sixteen lanes holds eight codes of one row. Shifting the
# lanes by a multiple of four bits brings one code of each row into the lowest four bits, and those are what the
# instruction `vpermps` takes for an index into another register. That other register is the whole NF4 table.

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
# Bytes are stored lowest first and each has its first code in the *high* half, so shifts 0, 1, 2, 3, ... bring down k =
# 1, 0, 3, 2, ... That is no trouble: x is put into the same order, once per call.

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
# This is the inner loop of the kernel. `vpermps` is `_mm512_permutexvar_ps`, s counts the shifts, m the tokens and p
# the panels of sixteen rows:

# %%
kernels.show("gemm_4bit_3_avx512.c")

# %% [markdown]
# ## The same with AVX2: two tables of bytes
#
# Most processors have registers half as long, and sixteen fp32 values don't fit one. Two registers and a choice between
# them take five instructions for eight weights. But a table of sixteen *bytes* has an instruction of its own,
# `vpshufb`, and a bf16 number is two bytes. So: look up the upper bytes, look up the lower bytes, put them side by
# side.

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
# `vfmadd` multiplies sixteen fp32 numbers and adds. `vdpbf16ps` takes thirty-two bf16 numbers and adds two products to
# each of sixteen sums. Does one lose by it? Not in the multiplication: two numbers of 8 significant bits have a product
# of 16, and fp32 holds 24.

# %%
a, b = (torch.randn(100_000, generator=generator).bfloat16() for _ in range(2))
assert torch.equal((a.float() * b.float()).double(), a.double() * b.double())

# %% [markdown]
# What is lost is lost before: the weights must be bf16. Rounding each scaled weight would err anew for each. The kernel
# leaves the scale out of the loop, for a block's sum can be scaled as well as its 64 terms, and rounds only the sixteen
# values of the table. And there it has a choice: any factor on the table can be taken out again at the end. So it tries
# 1,536 factors and takes the one under which the sixteen round best.


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
# A factor that costs nothing, and an error that is smaller than rounding each weight would make.
#
# Which of the two ways is faster depends on the processor: in the same time `vdpbf16ps` does twice the work of `vfmadd`
# on some, half of it on others. The backend times both once, and keeps the winner (notebook 8).
#
# ## The ladder
#
# Every kernel that this machine can run, on one weight of 4096 x 4096, on one thread, from the plain loop to the last
# one. `REFQ4_CPU_KERNEL` chooses a kernel, and each is held to the error budget before it is timed. What this machine
# lacks is named.

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
# Full bars were measured just now. The outlined one was not: it is the whole layer on a Zen 4 processor with
# `vdpbf16ps`, two threads, as kept in `docs/benchmarks/cpu.json`.

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
# The same table of that other machine, next to what people use today (milliseconds of a call; `python -m refq4 bench`
# prints one for yours):

# %%
peers = list(zen4[1])
picture.table(
    ["M", *peers],
    [[M, *(f"{row[peer]:.3g}" for peer in peers)] for M, row in zen4.items()],
)

# %% [markdown]
# **So:** dozens of times the plain loop, and none of it by cleverer arithmetic. The bytes lie where they are needed,
# one instruction looks up a register full of codes, and the scale waits outside.

# %% [markdown]
# ## Exercises
#
# Put your answer in place of each `...`, run the cell, and read what it says. The solutions are folded.
#
# **9.1** A dword of four stored bytes, lowest byte first. Which shifts, in steps of four bits, bring down the codes
# of k = 0, 1, ... 7?

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
# **9.2** Put a bf16 number together from its upper and its lower byte, as `vpunpck` and a shift by 16 do.


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
