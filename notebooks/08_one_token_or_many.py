# %% [markdown]
# # 8. One token or many
#
# **When is a second token nearly free?**
#
# - You will be able to say when memory is the limit and when arithmetic is, and why bitsandbytes 0.49.1 has two paths.
# - You need notebook 6. The notebook takes 15 minutes.
# - To run it yourself: `pip install -e '.[notebooks]'` in a checkout of refq4 ([how](README.md)).
#
# When a language model generates text, it reads all its weights once for every token. When it reads a prompt, it
# multiplies many tokens at once. Both are the same product, $y = x W^\top$, with one row in $x$ or with many. On some
# machines two tokens take hardly longer than one, but a hundred tokens take much longer on every machine. Two
# properties of the machine decide from how many tokens on the time grows. This notebook measures both, on the machine
# that it runs on.
#
# M is the number of tokens, N of out_features, K of in_features, as on all pages. The notebook uses one thread, so
# that other programs disturb the measurement as little as possible.

# %% tags=["timing"]
import copy
import json
import time
from itertools import cycle
from pathlib import Path

import torch
from refq4_cpu import CpuBackend

import refq4
from refq4.functional import dequantize_4bit, quantize_4bit
from support import roofs

torch.set_num_threads(1)
cpu = CpuBackend()
missing = cpu.available()  # None, or one sentence: what is missing, and how to get it
engine, N, K = ("cpu", 4096, 4096) if missing is None else ("reference", 1024, 1024)
print(
    f"engine: {engine}; the weight: {N} x {K}"
    + (f"\nno CPU kernels: {missing}" if missing else "")
)

# %% [markdown]
# ## Counting
#
# How many bytes must be moved, and how many operations computed? A weight takes half a byte, each block of 64 weights
# takes four bytes for its scale, and each bf16 number of x and y takes two bytes. Each weight and token need two
# operations, a multiplication and an addition.


# %%
def bytes_moved(M, N, K):
    return {
        "weights": N * K / 2,
        "scales": 4 * N * K / 64,
        "x": 2 * M * K,
        "y": 2 * M * N,
    }


def operations(M, N, K):
    return 2 * M * N * K


layer = refq4.nn.LinearNF4(256, 512, bias=False, compress_statistics=False).to("cpu")
report = refq4.explain(layer, torch.randn(3, 256, dtype=torch.bfloat16))
mine = bytes_moved(3, 512, 256)
assert report.flops == operations(3, 512, 256)
assert report.bytes_moved["weight"] == mine["weights"]
# and the code itself: sixteen fp32 numbers
assert report.bytes_moved["scales"] == mine["scales"] + 16 * 4
assert (report.bytes_moved["input"], report.bytes_moved["output"]) == (
    mine["x"],
    mine["y"],
)

counted = (1, 4, 16, 64, 256)
roofs.traffic(
    {M: bytes_moved(M, 4096, 4096) for M in counted},
    {M: operations(M, 4096, 4096) for M in counted},
)

# %% [markdown]
# The weights are read once for all tokens. Every further token adds operations but hardly any bytes, so the
# *intensity*, which is the number of operations per byte, grows in proportion to M.

# %%
for M in (1, 2, 256):
    total = sum(bytes_moved(M, 4096, 4096).values())
    print(
        f"M = {M:3d}: {total / 1e6:5.2f} MB, {operations(M, 4096, 4096) / total:6.2f} "
        "operations a byte"
    )

# %% [markdown]
# ## Two limits
#
# How fast does this machine read its memory, and how fast does it multiply? The CPU backend measures both with the
# loops in `kernels/limits.c`. One loop reads a buffer of 256 MB, which is larger than the caches. The other loop
# computes multiply-adds that need not wait for other results.

# %% tags=["timing"]
if missing is None:
    limits = cpu.limits()
    read, peak = limits["read_gb_s"], max(limits["fma_gflop_s"], limits["dot_gflop_s"])
else:  # torch's own sum and product, in place of limits.c
    buffer, square = torch.ones(1 << 26), torch.ones(1024, 1024)
    start = time.perf_counter()
    buffer.sum()
    read = 4e-9 * buffer.numel() / (time.perf_counter() - start)
    start = time.perf_counter()
    square @ square
    peak = 2e-9 * 1024**3 / (time.perf_counter() - start)
print(f"{read:.1f} GB/s of memory read, {peak:.0f} GFLOP/s of multiply-adds")

# %% [markdown]
# A call can't end before the memory is read, and not before everything is multiplied. Reading takes about the same
# time for every M; multiplying takes M times as long as for one token. The *cross-over* is the M at which both take
# the same time. Below it, a further token is computed while the machine waits for memory anyway.


# %%
def floors_ms(M, N, K, read, peak):
    return 1e-6 * sum(bytes_moved(M, N, K).values()) / read, 1e-6 * operations(
        M, N, K
    ) / peak


def cross_over(N, K, read, peak):
    """The M at which both floors are the same: fixed bytes over what a token adds."""
    moved = bytes_moved(1, N, K)
    return (moved["weights"] + moved["scales"]) / (
        operations(1, N, K) * read / peak - moved["x"] - moved["y"]
    )


memory, multipliers = floors_ms(cross_over(N, K, 20.0, 100.0), N, K, 20.0, 100.0)
assert abs(memory - multipliers) < 1e-9

# %% [markdown]
# ## Measured
#
# We measure three ways to compute the same product, each as the shortest of several runs: the 4-bit layer; the same
# weight, first dequantised to fp32 and then multiplied by torch; and an fp32 weight that was never quantised. A model
# calls one layer after the other, so its weights are not in a cache; here six weights are used in turn for the same
# reason. (Without the CPU kernels the reference computes, and dequantises in each call, which you can see in the dots
# for 4 bits.)

# %% tags=["timing"]
generator = torch.Generator().manual_seed(0)
W = torch.randn(N, K, generator=generator) / K**0.5
tokens = (1, 2, 4, 8, 16, 32, 64, 128)


def shortest_ms(call, weights, x, rounds=5):
    times, turns = [], cycle(weights)
    for _ in range(rounds + 1):
        weight, start = next(turns), time.perf_counter()
        call(weight, x)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


refq4.set_backend(engine)
linear = refq4.nn.Linear4bit(
    K, N, bias=False, quant_type="nf4", compress_statistics=False
)
linear.weight.data = W
four_bit = [copy.deepcopy(linear.to("cpu").eval()) for _ in range(6)]
packed, plain = quantize_4bit(W, quant_type="nf4"), [W, W.clone()]
for linear in four_bit:
    # the first call rearranges the weight
    linear(torch.zeros(1, K, dtype=torch.bfloat16))
ms = {"4 bits": [], "dequantise, then multiply": [], "fp32, not quantised": []}
with torch.inference_mode():
    for M in tokens:
        x = torch.randn(M, K, generator=generator)
        ms["4 bits"].append(
            shortest_ms(lambda linear, x: linear(x), four_bit, x.bfloat16())
        )
        ms["dequantise, then multiply"].append(
            shortest_ms(
                lambda p, x: torch.nn.functional.linear(x, dequantize_4bit(*p)),
                [packed],
                x,
                rounds=1,
            )
        )
        ms["fp32, not quantised"].append(
            shortest_ms(
                lambda w, x: torch.nn.functional.linear(x, w), plain, x, rounds=2
            )
        )

print("milliseconds for", *(f"{M:>6}" for M in tokens), "tokens")
for name, times in ms.items():
    print(f"{name:>25}", *(f"{t:6.2f}" for t in times))

# %% [markdown]
# ## The times in a picture
#
# The picture compares this machine with another one, whose times are in `docs/benchmarks/cpu.json`: a Zen 4 processor
# with two threads, measured on 24 November 2026 with a weight of the same shape, 4096 × 4096. It has an instruction
# that multiplies pairs of bf16 numbers, so it multiplies much faster than it reads.

# %%
kept = json.loads(Path("../docs/benchmarks/cpu.json").read_text())
sizes = {"n": 4096, "k": 4096}
zen4 = {
    row["m"]: row["ms"]["refq4"]
    for row in kept["products"]
    if sizes.items() <= row.items()
}
for M in (1, 2, 4, 8, 16, 128):
    print(
        f"Zen 4, M = {M:3}: {zen4[M]:6.3f} ms, {zen4[M] / zen4[1]:5.2f} times one token"
    )

assert zen4[2] < 1.02 * zen4[1], "the second token is free"
assert zen4[8] < 2.2 * zen4[1], "eight tokens cost what two would"
assert zen4[128] > 7 * zen4[16], "further on each pays its full share"

# %% tags=["timing"]
zen4_limits = kept["limits"]["read_gb_s"], kept["limits"]["dot_gflop_s"]
short = {M: zen4[M] for M in zen4 if M in tokens}
roofs.call_times(
    {
        "Zen 4, two threads (kept)": (
            short,
            {"4 bits": list(short.values())},
            zen4_limits,
        ),
        "this machine, one thread": (tokens, ms, (read, peak)),
    },
    floors=lambda M, limits: floors_ms(M, N, K, *limits),
    cross=lambda limits: cross_over(N, K, *limits),
)

# %% [markdown]
# The left picture is the Zen 4 processor. Its curve is flat at first: two tokens take as long as one, and four take a
# quarter longer, because the machine multiplies while it waits for weights. From the cross-over on, the curve rises
# in proportion to M.
#
# The right picture has the three ways on the machine that made this page (or on yours, if you run it). If its curve *4
# bits* rises from the first token on and stays above both limits, then neither memory nor multipliers are the limit,
# but a third cost: decoding, see below. The fp32 layer has seven times as many bytes, so it waits longer for memory,
# and more tokens fit into this time. If multiplying is the limit, four bits do not help: the remaining difference is
# that between bf16 and fp32 products.
#
# Remember the line *dequantise, then multiply* for step 6. It decodes 8 MB of codes to 67 MB of fp32 numbers, writes
# them to memory and reads them again, for every M: 134 MB of traffic. (In bf16 it would be half of that.) With many
# tokens this time does not matter; with one token it is most of the time.

# %% tags=["timing"]
first, second, last = ms["4 bits"][0], ms["4 bits"][1], ms["4 bits"][-1]
print(f"one token takes {first:.2f} ms, a second one {second - first:.2f} ms more")
print(f"a token in a batch of {tokens[-1]}: {last / tokens[-1]:.2f} ms each")
plain_ms = ms["fp32, not quantised"]
print(f"fp32 takes {plain_ms[0] / first:.1f} times as long as 4 bits at M = 1,")
print(f"and {plain_ms[-1] / last:.1f} times at M = {tokens[-1]}")
packed_speed = 1e-6 * sum(bytes_moved(1, N, K).values()) / first
plain_speed = 4e-6 * N * K / plain_ms[0]
print(
    f"at M = 1, 4 bits read {packed_speed:.0f} GB/s and fp32 {plain_speed:.0f} GB/s; "
    f"the limit is {read:.0f}"
)

# %% [markdown]
# The fp32 weight has seven times as many bytes. At M = 1 it can take still longer than seven times: torch's product of
# one row need not read as fast as the machine can, as the last line shows.
#
# ## The roofline
#
# The next picture shows the same measurements as a *roofline*: operations per second against operations per byte. The
# sloping line is the limit of memory, the horizontal line is the limit of the multipliers, and no dot can be above
# these lines.

# %% tags=["timing"]
moved = {"4 bits": [sum(bytes_moved(M, N, K).values()) for M in tokens]}
moved["fp32, not quantised"] = [4 * N * K + 4 * M * (N + K) for M in tokens]
dots = {
    name: (
        [operations(M, N, K) / b for M, b in zip(tokens, moved[name], strict=True)],
        [1e-6 * operations(M, N, K) / t for M, t in zip(tokens, ms[name], strict=True)],
    )
    for name in moved
}
roofs.roofline(read, peak, dots)

# %% [markdown]
# Quantising moves a product to the right along the slope: with seven times fewer bytes, memory allows seven times the
# speed. On the horizontal part, quantising makes nothing faster. If dots are far below both lines, there is a third
# limit: a code must be extracted from its byte and looked up before it can be multiplied. Notebook 9 is about this.
#
# ## Other machines
#
# The cross-over is a property of the machine. The picture compares this machine with two others whose limits are in
# `docs/benchmarks`, and with an H200 GPU. The limits of the H200 were not measured: they are assumptions in
# `refq4_cuda/roofline.py`.

# %% tags=["timing"]
from refq4_cuda.roofline import GPUS

h200 = GPUS[90]

machines = {"this machine, one thread": (read, peak)}
for name, file in {
    "Zen 3, two threads, AVX2": "cpu-avx2.json",
    "Zen 4, two threads, vdpbf16ps": "cpu.json",
}.items():
    kept = json.loads(Path("../docs/benchmarks", file).read_text())["limits"]
    machines[name] = kept["read_gb_s"], max(kept["fma_gflop_s"], kept["dot_gflop_s"])
tensor_cores = 2 * h200.tensor * h200.multiprocessors * h200.clock
machines["H200, assumed"] = 1e-9 * h200.reads, 1e-9 * tensor_cores
cross = {name: cross_over(4096, 4096, *both) for name, both in machines.items()}
roofs.cross_overs(machines, cross)

# %% [markdown]
# On a GPU about forty tokens take hardly longer than one, so servers collect tokens before they compute. On the Zen 4
# processor this is true for a few tokens; on the Zen 3, which has no instruction for bf16, hardly for two.
#
# ## Which decisions depend on M
#
# Two decisions of a layer depend on M, both in step 6 (notebook 6). The *op* is what the backend is asked to compute:
#
# - `gemv_4bit` for one token. GEMV is matrix times vector: every weight is read once and used once, so it is decoded
#   in registers, immediately before it is multiplied.
# - `gemm_4bit` for several tokens. GEMM is matrix times matrix: every decoded weight is used for all tokens. Up to the
#   cross-over its time is that of reading the weight as well; beyond it, that of multiplying.
#
# The *path* says how the call gets to the op. Paths have the names of bitsandbytes 0.49.1, which on a GPU has no kernel
# for several tokens. There `gemv_4bit` is the kernel for one token, and `MatMul4Bit` does everything else: it decodes
# the whole weight to memory and then calls the ordinary product, like *dequantise, then multiply* above. For one token
# this is too slow, so bitsandbytes has two paths. In refq4 a path costs nothing by itself: it ends in one of the two
# ops, and the backend chooses the kernel. The page of [step 6](../docs/explanation/step-6-dispatch-to-matmul-4bit.md)
# has a table of paths, ops and kernels, and one of what bitsandbytes does on a CPU and in version 0.50.2. These are the
# decisions for a weight in its stored layout:

# %%
_, state = quantize_4bit(torch.randn(512, 256), quant_type="nf4")
for M in (1, 2):
    decision = refq4.functional.choose_path(torch.randn(M, 256), state)
    print(f"M = {M}: {decision.choice}, because: {decision.why}")

# %% [markdown]
# The CPU backend then chooses one of its kernels. Which kernel is fastest for a number of tokens depends on the
# processor. So the choice is not fixed: the first call measures all kernels and remembers the fastest.

# %% tags=["timing"]
if missing is None:
    calibration = refq4.backend_info("cpu")["calibration"]
    shown = roofs.winners(calibration)
else:
    shown = f"no CPU kernels here: {missing}"
shown

# %% [markdown]
# **Summary:** a second token is nearly free as long as the machine waits for the weights anyway. With
# four bits the machine waits for a seventh of the bytes of fp32, so fewer further tokens are free. But no number of
# tokens takes longer than with fp32.

# %% [markdown]
# ## Exercises
#
# Put your answer in place of each `...`, run the cell, and read what it says. The solutions are folded.
#
# **8.1** A machine reads 100 GB/s and multiplies 1000 GFLOP/s. At which M do reading and multiplying take the same
# time? (Blocks of 64, fp32 scales; leave x and y out.)

# %% tags=["exercise"]
from support import exercises

answer = ...
exercises.check("8.1", answer)

# %% [markdown]
# <details><summary>A solution to 8.1</summary>
#
# ```python
# seconds_read = (4 / 8 + 4 / 64) / 100e9  # a weight
# seconds_multiplied = 2 / 1000e9  # a weight and a token
# answer = seconds_read / seconds_multiplied
# ```
#
# </details>

# %% [markdown]
# **8.2** `MatMul4Bit` of bitsandbytes 0.49.1 reads the packed weight, writes it as bf16, and reads the
# bf16 weight again. How many times as many bytes is this as reading only the packed weight?

# %% tags=["exercise"]
answer = ...
exercises.check("8.2", answer)

# %% [markdown]
# <details><summary>A solution to 8.2</summary>
#
# ```python
# packed = 4 / 8 + 4 / 64
# answer = (packed + 2 + 2) / packed
# ```
#
# </details>

# %% [markdown]
# **Next:** [inside the CPU kernel](09_inside_the_cpu_kernel.ipynb); or, if you don't write kernels, [do they
# agree?](11_do_they_agree.ipynb)
