# %% [markdown]
# # 8. One token or many
#
# **When is a second token nearly free?**
#
# A language model that writes reads all its weights once for every word. Reading a prompt, it has many words at hand.
# It is the same product, $y = x W^\top$, with one row in $x$ or with many. Yet there are machines on which two tokens
# take hardly longer than one, and on all machines the hundredth pays its full share. Two numbers decide where that
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
print(f"engine: {engine}; the weight: {N} x {K}" + (f"\nno CPU kernels: {missing}" if missing else ""))

# %% [markdown]
# ## Counting
#
# What must be moved, and what computed? Half a byte for each weight, four bytes of scale for each block of 64, two
# bytes for each bf16 number that goes in or out. Two operations, a multiplication and an addition, for each weight and
# token.


# %%
def bytes_moved(M, N, K):
    return {"weights": N * K / 2, "scales": 4 * N * K / 64, "x": 2 * M * K, "y": 2 * M * N}


def operations(M, N, K):
    return 2 * M * N * K


layer = refq4.nn.LinearNF4(256, 512, bias=False, compress_statistics=False).to("cpu")
report = refq4.explain(layer, torch.randn(3, 256, dtype=torch.bfloat16))
mine = bytes_moved(3, 512, 256)
assert report.flops == operations(3, 512, 256)
assert report.bytes_moved["weight"] == mine["weights"]
assert report.bytes_moved["scales"] == mine["scales"] + 16 * 4  # and the code itself: sixteen fp32 numbers
assert (report.bytes_moved["input"], report.bytes_moved["output"]) == (mine["x"], mine["y"])

counted = (1, 4, 16, 64, 256)
roofs.traffic({M: bytes_moved(M, 4096, 4096) for M in counted}, {M: operations(M, 4096, 4096) for M in counted})

# %% [markdown]
# The weights are read once, whoever shares them. Every further token brings operations and hardly any bytes, so the
# *intensity*, operations for each byte, grows in step with M.

# %%
for M in (1, 2, 256):
    total = sum(bytes_moved(M, 4096, 4096).values())
    print(f"M = {M:3d}: {total / 1e6:5.2f} MB, {operations(M, 4096, 4096) / total:6.2f} operations a byte")

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
# same time: below it, another token costs nothing that would not be spent waiting for memory anyway.


# %%
def floors_ms(M, N, K, read, peak):
    return 1e-6 * sum(bytes_moved(M, N, K).values()) / read, 1e-6 * operations(M, N, K) / peak


def cross_over(N, K, read, peak):
    """The M at which both floors are the same: the fixed bytes over what a token adds to either side."""
    moved = bytes_moved(1, N, K)
    return (moved["weights"] + moved["scales"]) / (operations(1, N, K) * read / peak - moved["x"] - moved["y"])


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
linear = refq4.nn.Linear4bit(K, N, bias=False, quant_type="nf4", compress_statistics=False)
linear.weight.data = W
four_bit = [copy.deepcopy(linear.to("cpu").eval()) for _ in range(6)]
packed, plain = quantize_4bit(W, quant_type="nf4"), [W, W.clone()]
for linear in four_bit:
    linear(torch.zeros(1, K, dtype=torch.bfloat16))  # the first call rearranges the weight
ms = {"4 bits": [], "dequantise, then multiply": [], "fp32, not quantised": []}
with torch.inference_mode():
    for M in tokens:
        x = torch.randn(M, K, generator=generator)
        ms["4 bits"].append(shortest_ms(lambda linear, x: linear(x), four_bit, x.bfloat16()))
        ms["dequantise, then multiply"].append(
            shortest_ms(lambda p, x: torch.nn.functional.linear(x, dequantize_4bit(*p)), [packed], x, rounds=1)
        )
        ms["fp32, not quantised"].append(shortest_ms(lambda w, x: torch.nn.functional.linear(x, w), plain, x, rounds=2))

floors = zip(*(floors_ms(M, N, K, read, peak) for M in tokens), strict=True)
floors = dict(zip(("the memory can't be faster", "the multipliers can't be faster"), floors, strict=True))
roofs.call_times(tokens, ms, floors, cross_over(N, K, read, peak))

# %% [markdown]
# Left of the cross-over the 4-bit layer costs what its bytes cost, and the fp32 layer, with seven times the bytes,
# takes several times as long. Right of it multiplications are all that counts, and of those four bits save none: the
# lines come together. Dequantising first writes and reads 64 MB on the way, which only many tokens repay.

# %% tags=["timing"]
first, second, last = ms["4 bits"][0], ms["4 bits"][1], ms["4 bits"][-1]
print(f"one token takes {first:.2f} ms, a second one {second - first:.2f} ms more")
print(f"a token in a batch of {tokens[-1]}: {last / tokens[-1]:.2f} ms each")
print(f"fp32 takes {ms['fp32, not quantised'][0] / first:.1f} times as long as 4 bits at M = 1, ", end="")
print(f"{ms['fp32, not quantised'][-1] / last:.1f} times at M = {tokens[-1]}")

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
from refq4_cuda import roofline as h200

machines = {"this machine, one thread": (read, peak)}
for name, file in {"Zen 3, two threads, AVX2": "cpu-avx2.json", "Zen 4, two threads, vdpbf16ps": "cpu.json"}.items():
    kept = json.loads(Path("../docs/benchmarks", file).read_text())["limits"]
    machines[name] = kept["read_gb_s"], max(kept["fma_gflop_s"], kept["dot_gflop_s"])
tensor_cores = 2 * h200.TENSOR_FMA * h200.MULTIPROCESSORS * h200.CLOCK
machines["H200, assumed"] = 1e-9 * h200.READ_SHARE * h200.COPY_BANDWIDTH, 1e-9 * tensor_cores
cross = {name: cross_over(4096, 4096, *both) for name, both in machines.items()}
roofs.cross_overs(machines, cross)

# %% [markdown]
# On a GPU some forty tokens are as good as free, which is why servers wait to collect them. On a processor the gain of
# the second token is small and the eighth has none.
#
# ## Who decides
#
# Which kernel is best depends on M too. Two of the layer's decisions concern it. The pipeline's step 6 asks whether it
# is one token (notebook 6); asked for the path of a weight in its stored layout, it says:

# %%
_, state = quantize_4bit(torch.randn(512, 256), quant_type="nf4")
for M in (1, 2):
    decision = refq4.functional.choose_path(torch.randn(M, 256), state)
    print(f"M = {M}: {decision.choice}, because: {decision.why}")

# %% [markdown]
# And the CPU backend, once it is called, picks one of its kernels. Which one is fastest for how many tokens differs
# from processor to processor, so nobody wrote it down: the first call timed them all, and kept the winners.

# %% tags=["timing"]
if missing is None:
    calibration = refq4.backend_info("cpu")["calibration"]
    shown = roofs.winners(calibration)
else:
    shown = f"no CPU kernels here: {missing}"
shown

# %% [markdown]
# So: a second token is nearly free for as long as the machine waits for the weights anyway. Four bits make that wait
# seven times shorter than fp32 does, and the range of free tokens as much smaller.
