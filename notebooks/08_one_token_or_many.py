# %% [markdown]
# # 8. One token or many
#
# **When is a second token nearly free?**
#
# - You will be able to say when memory is the limit and when arithmetic is, and why a layer has two paths.
# - It needs notebook 6. It takes 15 minutes.
# - To run it yourself: `pip install -e '.[notebooks]'` in a checkout of refq4 ([how](README.md)).
#
# A language model that writes reads all its weights once for every word. Reading a prompt, it has many words at hand.
# It is the same product, $y = x W^\top$, with one row in $x$ or with many. Yet there are machines on which two tokens
# take hardly longer than one. But a hundred tokens take longer on every machine. Two numbers decide where that
# changes. This notebook measures both, on the machine that it runs on.
#
# M tokens, N out_features, K in_features, as everywhere. One thread, so that the machine's other work disturbs little.

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
# What must be moved, and what computed? Half a byte for each weight, four bytes of scale for each block of 64, two
# bytes for each bf16 number that goes in or out. Two operations, a multiplication and an addition, for each weight and
# token.


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
# The weights are read once, however many tokens share them. Every further token brings operations and hardly any
# bytes, so the *intensity*, operations for each byte, grows in step with M.

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
# loops in `kernels/limits.c`: a buffer of 256 MB, which fits no cache, and multiply-adds that wait for nothing.

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
# A call can't be over before the memory is read, nor before everything is multiplied. Memory takes about the same time
# whatever M is; multiplying takes M times as long as for one token. The *cross-over* is the M at which both take the
# same time: below it, another token is computed while the machine waits for memory anyway.


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
# Three ways to the same product, the shortest of several runs each. The 4-bit layer; the same weight, first dequantised
# to fp32, then multiplied by torch; and an fp32 weight that was never quantised. A model goes from layer to layer, so
# no weight waits in a cache for its turn: six of them take turns here. (Without the CPU kernels the reference serves,
# which dequantises in each call, and the 4-bit dots show it.)

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
# ## What it looks like
#
# Beside this machine stands one whose times are kept in `docs/benchmarks/cpu.json`: a Zen 4 processor, two threads,
# 24 November 2026, on the same weight of 4096 × 4096. It has an instruction that multiplies pairs of bf16 numbers, so
# that its multipliers are far ahead of its memory.

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
# On the left the curve is flat at first. Two tokens take as long as one, and four take a quarter longer: the
# multiplications are done while the machine waits for weights. From the cross-over on the curve rises in step with M.
#
# On the right the same three ways on the machine that made this page (or on yours, if you run it). If its blue curve
# rises from the first token on and stays above both floors, then neither memory nor multipliers are its limit, but
# taking codes apart: the third cost, below. The fp32 layer has seven times the bytes, so it waits longer, and shares
# its longer wait among more tokens. Where multiplications are all
# that counts, four bits save none: what difference is left is that of bf16 and fp32 products.
#
# *Dequantise, then multiply* is the line to remember for step 6. It decodes 8 MB of codes to 64 MB, writes
# them to memory and reads them again, whatever M is. Many tokens repay that, one token can't.

# %% tags=["timing"]
first, second, last = ms["4 bits"][0], ms["4 bits"][1], ms["4 bits"][-1]
print(f"one token takes {first:.2f} ms, a second one {second - first:.2f} ms more")
print(f"a token in a batch of {tokens[-1]}: {last / tokens[-1]:.2f} ms each")
plain_ms = ms["fp32, not quantised"]
print(f"fp32 takes {plain_ms[0] / first:.1f} times as long as 4 bits at M = 1,")
print(f"and {plain_ms[-1] / last:.1f} times at M = {tokens[-1]}")

# %% [markdown]
# ## The roofline
#
# The same measurements with the axes turned: how many operations a second, over how many operations each byte allows.
# The slope is the memory, the level the multipliers, and no dot can be above either.

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
# Quantising moves a product to the right along the slope: seven times fewer bytes, seven times the speed that memory
# allows. Once on the level there is nothing more to be had from it. Where dots stay well below both lines, a third
# thing is the limit: a code must be taken apart and looked up before it can be multiplied. Notebook 9 is about that.
#
# ## Other machines
#
# The cross-over is a property of the machine. Two whose limits are kept in `docs/benchmarks`, beside this one. The
# third is no measurement: what `refq4_cuda/roofline.py` assumes of an H200 GPU.

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
# On a GPU some forty tokens are as good as free, which is why servers wait to collect them. On the Zen 4 processor it
# is a few; on the Zen 3, which has no instruction for bf16, hardly one.
#
# ## Who decides
#
# Two decisions of a layer depend on M, both in step 6 (notebook 6). The *op* is what the backend runs:
#
# - `gemv_4bit` for one token. GEMV is matrix times vector: every weight is read once and used once, so it is decoded in
#   registers, right where it is multiplied.
# - `gemm_4bit` for several tokens. GEMM is matrix times matrix: every decoded weight is used for all tokens.
#
# The *path* says how the call gets there, and it has the names of bitsandbytes 0.49.1, which has no kernel for several
# tokens. There `gemv_4bit` is the kernel for one token, and `MatMul4Bit` everything else: it decodes the whole weight
# to memory and multiplies with the ordinary product, the red line above. One token can't pay for that: hence two paths.
# In refq4 a backend has a kernel of its own behind either path. For a weight in its stored layout:

# %%
_, state = quantize_4bit(torch.randn(512, 256), quant_type="nf4")
for M in (1, 2):
    decision = refq4.functional.choose_path(torch.randn(M, 256), state)
    print(f"M = {M}: {decision.choice}, because: {decision.why}")

# %% [markdown]
# And the CPU backend, once it is called, picks one of its kernels. Which one is fastest for how many tokens differs
# from processor to processor, so it is not written down: the first call timed them all, and kept the fastest.

# %% tags=["timing"]
if missing is None:
    calibration = refq4.backend_info("cpu")["calibration"]
    shown = roofs.winners(calibration)
else:
    shown = f"no CPU kernels here: {missing}"
shown

# %% [markdown]
# **So:** a second token is nearly free for as long as the machine waits for the weights anyway. Four bits make the
# wait of the first token seven times shorter than fp32 does. Fewer further tokens fit into a shorter wait, and none
# of them is slower than in fp32.

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
# **8.2** `MatMul4Bit` of bitsandbytes 0.49.1 reads the packed weight, writes it as bf16, and reads that again. How
# many times the bytes is that of reading the packed weight alone?

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
