# %% [markdown]
# # 3. Blocks and scales
#
# **What does a smaller block cost, and what does it gain?**
#
# - You will be able to choose a blocksize, and say how many bits it costs and what damage an outlier does.
# - You need notebook 1. The notebook takes 10 minutes.
# - To run it yourself: `pip install -e '.[notebooks]'` in a checkout of refq4 ([how](README.md)).
#
# The weights of a block share one scale: their largest magnitude (*absmax*), stored as a 32-bit number. In a large
# block, many weights share this scale, so it costs few bits per weight. In a small block, the scale fits the weights
# better. We compare bits and error for two layers of the same model, at all eight blocksizes, and with a single scale
# for the whole matrix.

# %%
from itertools import pairwise
from statistics import NormalDist

import torch

import refq4
from refq4.functional import dequantize_4bit, quantize_4bit
from support import picture
from support.material import FEED_FORWARD, encoder_tensor

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
layers = {
    "an ordinary layer": encoder_tensor(f"{FEED_FORWARD}.weight"),
    "one with an outlier": encoder_tensor("encoder.layer.0.output.dense.weight"),
}
for name, W in layers.items():
    print(
        f"{name}: {list(W.shape)}, largest weight "
        f"{(W.abs().max() / W.std()).item():.0f} standard deviations from 0"
    )

# %%
NF4 = refq4.get_codebook("nf4").on("cpu")


def relative_error(W, decoded):
    return ((decoded - W).norm() / W.norm()).item()


def through_blocks(W, blocksize):
    return dequantize_4bit(*quantize_4bit(W, blocksize=blocksize, quant_type="nf4"))


def through_one_scale(W):
    """The matrix as one block: not offered, for reasons you are about to see."""
    scale = W.abs().max()
    return NF4.values[torch.bucketize(W / scale, NF4.thresholds)] * scale


rows = []
for blocksize in BLOCKSIZES:
    rows.append(
        [
            blocksize,
            4 + 32 / blocksize,
            *(relative_error(W, through_blocks(W, blocksize)) for W in layers.values()),
        ]
    )
whole = [relative_error(W, through_one_scale(W)) for W in layers.values()]

assert rows[1][1] == 4.5
assert all(smaller[2] < larger[2] for smaller, larger in pairwise(rows))
picture.table(
    ["blocksize", "bits per weight", *layers],
    [
        *([size, f"{bits:.3f}", f"{a:.4f}", f"{b:.4f}"] for size, bits, a, b in rows),
        ["all", "4.000", *(f"{w:.4f}" for w in whole)],
    ],
)

# %%
figure, axes = picture.canvas(height=3.2)
for column, name in enumerate(layers):
    bits, error = [row[1] for row in rows], [row[2 + column] for row in rows]
    axes.plot(bits, error, "o-", color=picture.COLOURS[column], label=name)
for size, bits, error, _ in rows[:4]:
    axes.annotate(
        str(size),
        (bits, error),
        (0, -14),
        textcoords="offset points",
        ha="center",
        fontsize=9,
    )
axes.plot(
    4.5, rows[1][2], "o", color="none", markeredgecolor=picture.GREY, markersize=13
)
axes.set(
    xlabel="bits per weight (numbers: blocksize)",
    ylabel="relative error",
    ylim=(0.06, 0.2),
)
axes.legend()
picture.show(
    figure,
    "Error against bits: it falls steeply from 4 to 4.25 bits and slowly beyond; 64 is "
    "past the knee.",
)

# %% [markdown]
# Read the picture from left to right. At first, a smaller block costs few bits and removes much of the error; later
# it costs many bits and removes little. 64 (circled) is behind the bend of the curve. Double quantisation, the
# subject of notebook 4, reduces the cost of its scales. For the layer with an outlier, a single scale for the matrix
# is useless: nearly all weights are lost.
#
# ## Why larger blocks are coarser
#
# The reason is the scale: the largest of many weights is larger than the largest of few. All other weights are
# divided by it. So in a large block most weights are small compared with the scale, and only the few values near 0
# are used for them. For normal numbers we can compute the largest of $n$: it exceeds $t$ unless all $n$ are below
# $t$, so its mean is $\int_0^\infty 1 - P(|x| < t)^n \, dt$.

# %%
W = layers["an ordinary layer"]
measured = [
    quantize_4bit(W, blocksize=size, quant_type="nf4")[1].absmax.mean().item()
    / W.std().item()
    for size in BLOCKSIZES
]

step = 0.01
inside = torch.tensor(
    [2 * NormalDist().cdf(i * step) - 1 for i in range(1000)], dtype=torch.float64
)
expected = [(1 - inside**size).sum().item() * step for size in BLOCKSIZES]
for size, real, normal in zip(
    BLOCKSIZES[1::2], measured[1::2], expected[1::2], strict=True
):
    print(
        f"largest of {size:4}: {real:.2f} standard deviations, of normal numbers "
        f"{normal:.2f}"
    )

figure, axes = picture.canvas(height=2.8)
axes.plot(
    BLOCKSIZES, measured, "o-", color=picture.BLUE, label="mean scale of this layer"
)
axes.plot(BLOCKSIZES, expected, "--", color=picture.VERMILION, label="normal numbers")
axes.set(
    xscale="log",
    xlabel="blocksize",
    ylabel="standard deviations",
    xticks=BLOCKSIZES,
    xticklabels=BLOCKSIZES,
)
axes.minorticks_off()
axes.legend()
picture.show(
    figure,
    "The mean scale grows with the logarithm of the blocksize, in the real layer as "
    "for normal numbers.",
)

# %% [markdown]
# Real scales grow faster, because the rows of a matrix have different sizes, and large weights are more frequent than
# in a normal distribution.
#
# ## What an outlier does
#
# The other layer has a weight that is 175 standard deviations from zero. This is not an accident: trained models have
# a few such weights. This weight becomes the scale of its block, and every weight of less than a 25th of it becomes 0
# (a 22nd, if the weight is negative). Here you can make one in a block of 16 weights:
#
# <div class="playground" id="figure-outlier">(In the documentation you can drag an outlier here.)</div>
#
# (There is more of that in the [playground](../docs/playground.md#outlier).) The picture below shows the block of the
# model's outlier and the next one, before and after quantising.

# %%
W = layers["one with an outlier"]
before, after = W.view(-1, 64), through_blocks(W, 64).view(-1, 64)
hit = W.flatten().abs().argmax().item() // 64
lost = (after[hit] == 0).sum().item()
print(f"the outlier's block: {lost} of 64 weights become 0")
spoilt, error = (
    (after[hit + 1] == 0).sum().item(),
    relative_error(before[hit + 1], after[hit + 1]),
)
print(f"the next block: {spoilt}, and its relative error is {error:.3f}")
assert lost == 63

figure, axes = picture.canvas(height=3.0)
places, both = range(128), slice(hit, hit + 2)
axes.vlines(
    places,
    before[both].flatten(),
    after[both].flatten(),
    color=picture.VERMILION,
    linewidth=1.2,
)
axes.plot(
    places,
    before[both].flatten(),
    "o",
    color=picture.BLUE,
    markersize=4,
    label="weight",
)
axes.plot(
    places,
    after[both].flatten(),
    "_",
    color=picture.VERMILION,
    markersize=6,
    markeredgewidth=2,
    label="decoded",
)
axes.axvline(63.5, color=picture.GREY, linestyle="dashed")
axes.set(
    ylim=(-0.16, 0.16),
    xlim=(-1, 128),
    xlabel="place (the outlier itself is far off the picture)",
    ylabel="weight",
)
figure.legend(loc="outside upper right", ncols=2)
picture.show(
    figure,
    "In the outlier's block every other weight is decoded as 0; the next block is "
    "decoded as usual.",
)

# %% [markdown]
# All 63 neighbours became 0; the next block did not change. This is the advantage of blocks: an outlier damages only
# its own block. With one scale for the whole matrix it would damage all weights:

# %%
gone = (through_one_scale(W) == 0).float().mean().item()
kept = (through_blocks(W, 64) == 0).float().mean().item()
print(
    f"weights that become 0: {100 * gone:.1f} % with one scale, {100 * kept:.1f} % "
    "with one scale for each 64"
)
assert gone > 0.99

# %% [markdown]
# ## A block of zeros
#
# Pruned or padded weights may be whole blocks of zeros. The scale of such a block is 0, and a weight divided by its
# scale is 0/0. So we need a rule: such a block stores the code of 0.0, which in NF4 is 7.

# %%
zeros = torch.zeros(64)
packed, state = quantize_4bit(zeros, quant_type="nf4")
codes = torch.stack([packed >> 4, packed & 15]).unique().tolist()
print(
    "0 / 0 =",
    (zeros / zeros.abs().max())[0].item(),
    "| scale",
    state.absmax.item(),
    "| codes",
    codes,
)
assert codes == [7]
assert torch.equal(dequantize_4bit(packed, state), zeros)

# %% [markdown]
# Does the code matter, if it is multiplied by a scale of 0? Some builds of bitsandbytes (the CPU build of 0.49.1, and
# the CUDA build) store code 0 here, which means -1, and -1 × 0 is also 0. But double quantisation stores a scale in 8
# bits, as the nearest of 256 values, and 0 is not always one of them:

# %%
W = layers["an ordinary layer"].clone()
W.view(-1, 64)[5] = 0
packed, state = quantize_4bit(W, quant_type="nf4", compress_statistics=True)
with_code_7 = dequantize_4bit(packed, state).view(-1, 64)[5]

packed.view(-1, 32)[5] = 0x00  # two codes 0 in each of the block's 32 bytes
with_code_0 = dequantize_4bit(packed, state).view(-1, 64)[5]

print(
    f"zeros decoded from code 7: {with_code_7[0].item():g}, from code 0: "
    f"{with_code_0[0].item():.5f}"
)
assert with_code_7.eq(0).all()
assert with_code_0.ne(0).all()

# %% [markdown]
# ## Where blocks begin and end
#
# The matrix is cut into blocks in the order of memory, row after row, whether or not a row ends inside a block. If
# the length of a row is a multiple of the blocksize, each row consists of whole blocks. If not, blocks straddle rows,
# and the last block may be short. This is so for five rows of 100 weights:

# %%
_, state = quantize_4bit(torch.randn(5, 100), quant_type="nf4")
print(
    f"5 × 100 = 500 weights: {state.absmax.numel()} blocks, the last one of {500 % 64}"
)
assert state.absmax.numel() == -(-500 // 64) == 8

figure, axes = picture.canvas(height=1.9)
for block in range(8):
    for row in range(5):
        first, last = max(64 * block, 100 * row), min(64 * (block + 1), 100 * (row + 1))
        if first < last:
            axes.barh(
                row,
                last - first,
                left=first - 100 * row,
                color=picture.COLOURS[block % 2 * 5],
                height=0.85,
            )
            axes.text(
                (first + last) / 2 - 100 * row,
                row,
                block,
                color="black" if block % 2 else "white",
                ha="center",
                va="center",
            )
axes.invert_yaxis()
axes.set(xlabel="column", ylabel="row", xlim=(0, 100), yticks=range(5))
axes.grid(visible=False)
picture.show(
    figure,
    "Five rows of 100 weights coloured by block: eight blocks of 64 wrap from the end "
    "of a row to the next.",
)

# %% [markdown]
# It is no error if a row begins in the middle of a block. But then the fast kernels can't be used; notebook 6 shows
# this decision and its warning.
#
# **Summary:** smaller blocks need more bits for scales. In return, the largest weight of a block is smaller, so the
# steps are finer, and an outlier damages fewer weights. Blocks of 64 have most of the gain and cost few bits.

# %% [markdown]
# ## Exercises
#
# Put your answer in place of each `...`, run the cell, and read what it says. The solutions are folded.
#
# **3.1** Compute the scale of each block of a weight, over the flattened tensor. The last block may be short.

# %% tags=["exercise"]
from support import exercises


def scales(W, blocksize): ...


exercises.check("3.1", scales)

# %% [markdown]
# <details><summary>A solution to 3.1</summary>
#
# ```python
# import torch
#
#
# def scales(W, blocksize):
#     blocks = W.flatten().split(blocksize)
#     return torch.stack([block.abs().max() for block in blocks])
# ```
#
# </details>

# %% [markdown]
# **3.2** A block has one weight of 10 and 63 weights of 0.7. What value does a weight of 0.7 have after
# decoding NF4?

# %% tags=["exercise"]
answer = ...
exercises.check("3.2", answer)

# %% [markdown]
# <details><summary>A solution to 3.2</summary>
#
# ```python
# answer = 0.0796 * 10  # 0.07 lies nearest to NF4's first value above 0
# ```
#
# </details>

# %% [markdown]
# **Next:** [reducing the scales from half a bit to an eighth](04_quantising_the_scales.ipynb)
