# %% [markdown]
# # 2. Sixteen numbers
#
# **Why are NF4's sixteen values where they are?**
#
# - You will be able to derive NF4's sixteen values, say which weight gets which, and try a format of your own.
# - You need notebook 1, and to know the normal distribution. The notebook takes 15 minutes.
# - To run it yourself: `pip install -e '.[notebooks]'` in a checkout of refq4 ([how](README.md)).
#
# A code of 4 bits can stand for any sixteen numbers, because a look-up takes the same time for any table. So we can
# choose numbers that are close to the weights. How are weights distributed? Here are all 10.6 million weights of the
# linear layers of a real model, each divided by the largest magnitude of its block of 64.

# %%
from statistics import NormalDist

import torch

import refq4
from refq4.codebooks import Codebook, create_normal_map, get_codebook
from support import picture
from support.material import encoder_linears, encoder_tensor

everything = torch.cat(
    [encoder_tensor(f"{name}.weight").flatten() for name in encoder_linears()]
)
blocks = everything.view(-1, 64)
scaled = (blocks / blocks.abs().amax(dim=1, keepdim=True)).flatten()

# every eighth block: what the rest of this page works on
weights = blocks[::8].flatten()
print(f"{scaled.numel():,} weights, standard deviation {scaled.std().item():.3f}")
print(
    f"{100 * (scaled.abs() == 1).float().mean().item():.2f} % of them are at an end: "
    "one of each block, its largest"
)

# %%
heights, edges = torch.histogram(scaled, bins=201, range=(-1, 1), density=True)
centres = (edges[1:] + edges[:-1]) / 2
spread = NormalDist(0, scaled.std().item())

figure, axes = picture.canvas(height=2.8)
axes.fill_between(
    centres, heights, step="mid", color=picture.BLUE, alpha=0.5, label="scaled weights"
)
axes.plot(
    centres,
    [spread.pdf(c) for c in centres.tolist()],
    color=picture.VERMILION,
    label="normal distribution",
)
axes.set(
    xlabel="weight / largest magnitude of its block",
    ylabel="density",
    yticks=[],
    ylim=(0, None),
)
axes.legend()
picture.show(
    figure,
    "The histogram of the scaled weights is a bell around 0, with a thin spike at "
    "either end.",
)

# %% [markdown]
# The weights form a bell, with a spike at each end: the spikes are the largest weights of the blocks. (The normal
# curve has the standard deviation of all weights, including the spikes, so it is a little too wide for the bell
# alone.) NF4, "normal float", is made for the bell.
#
# ## The idea: every code equally often
#
# A code of four bits carries the most information if all sixteen codes are used equally often. So we cut the bell
# curve into slices of equal *probability*, not of equal width, and take a number from each slice. The function that
# gives the number for a probability is the *quantile* function, the inverse of the normal distribution's cumulative
# curve.
#
# Two problems remain. First, the curve's ends are at infinity, so the outermost numbers are taken half a slice away
# from each end. Second, one number must be exactly 0, because zeros are common (padding, pruning) and must stay zeros.
# Beside the zero fifteen numbers remain, so one side gets eight and the other seven. The QLoRA paper gave eight to the
# positive side, and so does every NF4 file since: this is a convention, nothing in the weights asks for it.
#
# So the two halves are spaced separately: eight steps above zero, seven below. How far from the ends is half a slice?
# Of 16 equal slices, one for each number, half a slice is 1/32. Two halves of eight numbers that share the zero have 15
# different numbers, and half of a fifteenth is 1/30. NF4 takes the mean of 1/32 and 1/30 at both ends. Divided by the
# outermost number, the ends become 1 and -1.

# %%
# half a slice in from the end: of 16 slices, or of 15
outermost = ((1 - 1 / 32) + (1 - 1 / 30)) / 2
above = torch.linspace(outermost, 0.5, 9)[:-1]
below = 1 - torch.linspace(outermost, 0.5, 8)[:-1]

probabilities = torch.cat([below, torch.tensor([0.5]), above.flip(0)])
quantiles = torch.tensor([NormalDist().inv_cdf(p) for p in probabilities.tolist()])
nf4 = quantiles / quantiles.max()

for half in nf4.view(2, 8).tolist():
    print(*(f"{value:7.4f}" for value in half))
assert torch.allclose(nf4, create_normal_map(), rtol=0, atol=1e-6)
assert get_codebook("nf4").values == tuple(create_normal_map().tolist())

# %% [markdown]
# These are the published NF4 values. The picture shows the steps along the cumulative curve: all steps above the
# middle are equal, and all steps below it are equal and a little larger. Each step gives the number below it on the
# axis.

# %%
line = torch.linspace(-2.2, 2.2, 200)
figure, axes = picture.canvas(height=3.4)
axes.plot(
    line / quantiles.max(),
    [NormalDist().cdf(v) for v in line.tolist()],
    color=picture.GREY,
)
axes.hlines(probabilities, -1.15, nf4, color=picture.BLUE, linewidth=0.8)
axes.vlines(nf4, 0, probabilities, color=picture.VERMILION, linewidth=0.8)
axes.plot(
    nf4, torch.zeros(16), "o", color=picture.VERMILION, markersize=5, clip_on=False
)
axes.set(
    xlim=(-1.15, 1.15),
    ylim=(0, 1),
    xlabel="value",
    ylabel="probability of less than that",
)
axes.grid(visible=False)
picture.show(
    figure,
    "The cumulative normal curve: sixteen heights, eight steps above the middle and "
    "seven below.",
)

# %% [markdown]
# ## Which weight gets which code
#
# A weight gets the code of the nearest value, so the border between two codes, the *threshold*, is half way between
# their values. Drag a threshold to another place, and the error grows:
#
# <div class="playground" id="figure-thresholds">(In the documentation you can drag thresholds here.)</div>
#
# These were weights of a normal distribution. In the next picture the colours show the model's weights of each code.

# %%
book = get_codebook("nf4")
figure, axes = picture.canvas(height=3.0)
code_of = torch.bucketize(centres, torch.tensor(book.thresholds))
for code in range(16):
    mine = code_of == code
    axes.bar(
        centres[mine],
        heights[mine],
        width=0.01,
        color=picture.COLOURS[code % 2 * 5],
        alpha=0.8,
    )
axes.vlines(
    book.thresholds, 0, 1.25, color=picture.GREY, linewidth=0.8, linestyle="dashed"
)
axes.plot(
    book.values, [0] * 16, "o", color=picture.VERMILION, markersize=5, clip_on=False
)
axes.set(
    xlabel="scaled weight (dots: values, dashes: thresholds)",
    yticks=[],
    ylim=(0, 1.25),
    xlim=(-1.03, 1.03),
)
axes.grid(visible=False)
picture.show(
    figure,
    "The histogram cut by fifteen thresholds into sixteen slices, narrow near 0 and "
    "wide at the ends.",
)

# %% [markdown]
# Does each slice contain equally many weights? Let us count them.

# %%
FORMATS = {
    "nf4": picture.BLUE,
    "af4": picture.GREEN,
    "e2m1": picture.PURPLE,
    "int4": picture.ORANGE,
    "fp4": picture.VERMILION,
}


def shares(name: str) -> torch.Tensor:
    """How often each code is used, in the order of the values."""
    packed, _ = refq4.functional.quantize_4bit(weights, quant_type=name)
    counts = torch.bincount(packed.flatten() >> 4, minlength=16) + torch.bincount(
        packed.flatten() & 15, minlength=16
    )
    return (counts / counts.sum())[list(get_codebook(name).order)]


used = {name: shares(name) for name in FORMATS}
entropy = {name: -(share * share.log2()).sum().item() for name, share in used.items()}
print(
    "bits of information in a code of 4 bits:",
    ", ".join(f"{name} {bits:.2f}" for name, bits in entropy.items()),
)
assert 3.8 < entropy["nf4"] < 3.9

figure, axes = picture.canvas(height=2.4)
axes.bar(range(16), 100 * used["nf4"], color=picture.BLUE)
axes.axhline(100 / 16, color=picture.VERMILION)
axes.set(xlabel="NF4 code", ylabel="% of all weights", xticks=range(16))
picture.show(
    figure,
    "Bars of how often each NF4 code is used: more often than 1 in 16 in the middle, "
    "less at the ends.",
)

# %% [markdown]
# They do not: the codes in the middle are used more often, the outer ones less. In NF4 the value 1 is the outermost
# quantile, which is 1.85 standard deviations from the middle. But a block is divided by its largest weight, and the
# largest of 64 normal numbers is further from the middle:

# %%
furthest = blocks.abs().amax(dim=1) / blocks.std(dim=1)
print(
    f"the largest weight of a block: {furthest.mean().item():.2f} standard deviations "
    "from zero, on average"
)
assert quantiles.max() < 1.85 < 2.5 < furthest.mean()

# %% [markdown]
# So the real bell is narrower than the bell for which NF4 was made. The QLoRA paper calls NF4
# "information-theoretically optimal"; this is true only for a bell of one width. And we do not want equal use of the
# codes, but small *errors*.
#
# In the [playground](../docs/playground.md#normal) you can drag weights over the thresholds.
#
# ## Five formats on the same weights
#
# | | |
# | --- | --- |
# | NF4 | the quantiles above |
# | AF4 | "abnormal float": Yoshida's answer to NF4 (2023), made for a small absolute error |
# | E2M1 | the 4-bit float of new GPUs and the OCP standard: 0, ½, 1, 1½, 2, 3, 4, 6 and their negatives |
# | int4 | whole numbers from -7 to 7 |
# | FP4 | bitsandbytes' own 4-bit float, with a strange small number next to zero |

# %%
figure, axes = picture.canvas(height=2.4)
for row, (name, colour) in enumerate(reversed(FORMATS.items())):
    axes.axhline(row, color=picture.GREY, linewidth=0.6, alpha=0.5)
    axes.plot(get_codebook(name).values, [row] * 16, "o", color=colour, markersize=5)
axes.set(yticks=range(5), yticklabels=reversed(FORMATS), xlabel="value")
axes.grid(visible=False)
picture.show(
    figure,
    "Five number lines with the values of each format: int4 evenly spaced, the others "
    "denser around 0.",
)


# %%
def errors(tensor: torch.Tensor, name: str) -> tuple[float, float]:
    """Relative error in a format: root of the mean square, mean of the magnitude."""
    off = (
        refq4.functional.dequantize_4bit(
            *refq4.functional.quantize_4bit(tensor, quant_type=name)
        )
        - tensor
    )
    return (off.norm() / tensor.norm()).item(), (
        off.abs().mean() / tensor.abs().mean()
    ).item()


real = {name: errors(weights, name) for name in FORMATS}
assert min(real, key=lambda name: real[name]) == "nf4"

picture.table(
    ["format", "error, root mean square", "error, mean magnitude"],
    [[name, f"{rms:.4f}", f"{mean:.4f}"] for name, (rms, mean) in real.items()],
)

# %% [markdown]
# On the weights of this model, NF4 has the smallest error by both measures, although E2M1 uses its codes more evenly.
# For a single weight, the best format depends on the weight's size. So we sort the weights by magnitude into ten
# classes, and compute the error of each class; a dot marks the best format of the class.

# %%
magnitudes = torch.linspace(0, 1, 10 * 100 + 1)[:-1].add(0.0005).view(10, 100)


def error_by_magnitude(name: str) -> torch.Tensor:
    """The root mean square error in each class of magnitudes."""
    book = get_codebook(name)
    both = torch.cat([magnitudes, -magnitudes], dim=1)
    codes = torch.tensor(book.encode(both.flatten().tolist())).view_as(both)
    return (torch.tensor(book.values)[codes] - both).square().mean(dim=1).sqrt()


curves = {name: error_by_magnitude(name) for name in FORMATS}
winners = [min(curves, key=lambda name: curves[name][i].item()) for i in range(10)]
print("best by magnitude, from 0 to 1:", *winners)

figure, axes = picture.canvas(height=3.2)
for name, curve in curves.items():
    axes.stairs(
        curve,
        torch.linspace(0, 1, 11),
        color=FORMATS[name],
        label=name,
        linewidth=1.6,
        baseline=None,
    )
for i, name in enumerate(winners):
    axes.plot(0.05 + i / 10, curves[name][i], "o", color=FORMATS[name], markersize=7)
axes.set(
    xlabel="magnitude of the scaled weight",
    ylabel="error, root mean square",
    ylim=(0, None),
)
axes.legend(ncols=5)
picture.show(
    figure,
    "Error by magnitude of the weight: e2m1 is best for small ones, int4 for large "
    "ones, nf4 between.",
)

# %% [markdown]
# No format is best in every class. Formats with many values around zero have larger errors on large weights; there
# int4, whose steps are all equal, is much better. So the best format depends on how many weights of each size there
# are:

# %%
torch.manual_seed(0)
count = 1 << 18
shapes = {
    "this model": weights,
    "normal": torch.randn(count),
    "uniform": torch.rand(count) * 2 - 1,
    "heavy tails (Student's t, 3)": torch.distributions.StudentT(3.0).sample((count,)),
}
contest = {
    shape: {name: errors(drawn, name)[0] for name in FORMATS}
    for shape, drawn in shapes.items()
}
best = {shape: min(row, key=row.get) for shape, row in contest.items()}
print(*(f"{shape}: {name}" for shape, name in best.items()), sep="\n")
assert best == dict(zip(shapes, ("nf4", "nf4", "int4", "af4"), strict=True))

figure, axes = picture.canvas(height=2.8)
for offset, (name, colour) in enumerate(FORMATS.items()):
    places = [group + 0.16 * (offset - 2) for group in range(4)]
    axes.bar(
        places,
        [row[name] for row in contest.values()],
        width=0.14,
        color=colour,
        label=name,
    )
axes.set(xticks=range(4), xticklabels=contest, ylabel="error, root mean square")
axes.grid(axis="x", visible=False)
figure.legend(loc="outside upper right", ncols=5)
picture.show(
    figure,
    "Error bars by format: NF4 lowest for this model and normal, int4 for uniform, AF4 "
    "for heavy tails.",
)

# %% [markdown]
# ## Could it be better?
#
# We can search for better values. Take normal weights in blocks of 64, keep the values -1, 0 and 1, and move the
# other thirteen values until the mean error does not become smaller any more. (Each value is moved to the median of
# the weights that get its code, and this is repeated.)

# %%
normal = torch.randn(2048, 64)
normal = (normal / normal.abs().amax(dim=1, keepdim=True)).flatten()
found = torch.linspace(-1, 1, 16)
found[7] = 0
for _ in range(100):
    nearest = torch.bucketize(normal, (found[1:] + found[:-1]) / 2)
    for code in {*range(16)} - {0, 7, 15}:
        found[code] = normal[nearest == code].median()


def mean_error(values: torch.Tensor) -> float:
    """The mean magnitude of the error of ``normal`` in a code."""
    values = values.sort().values
    return (
        (values[torch.bucketize(normal, (values[1:] + values[:-1]) / 2)] - normal)
        .abs()
        .mean()
        .item()
    )


af4 = torch.tensor(get_codebook("af4").values)
print(
    f"mean error: found {mean_error(found):.5f}, nf4 {mean_error(nf4):.5f}, af4 "
    f"{mean_error(af4):.5f}"
)
assert mean_error(found) < mean_error(nf4) < 1.01 * mean_error(found) < mean_error(af4)

figure, axes = picture.canvas(height=1.8)
for row, (values, colour) in enumerate(
    ((af4, picture.GREEN), (nf4, picture.BLUE), (found, picture.VERMILION))
):
    axes.plot(values, [row] * 16, "o", color=colour, markersize=5)
axes.set(
    yticks=range(3),
    yticklabels=["af4", "nf4", "found"],
    xlabel="value",
    ylim=(-0.5, 2.5),
)
axes.grid(visible=False)
picture.show(
    figure,
    "Three number lines: the values found by search nearly coincide with NF4's, AF4's "
    "lie further in.",
)

# %% [markdown]
# The search does not use quantiles, but its values are almost those of NF4. So for blocks of 64 there is a better
# reason for NF4's values than equal use: they make the mean error small.
#
# A format is just sixteen numbers, so you can make your own: every function and every backend accepts it by its name.

# %%
refq4.register_codebook(
    Codebook(
        "found", found.tolist(), description="least mean error for normal blocks of 64"
    )
)
rms, mean = errors(weights, "found")
assert mean < 1.02 * real["nf4"][1]

picture.table(
    ["format", "error, root mean square", "error, mean magnitude"],
    [
        ["nf4", *(f"{error:.4f}" for error in real["nf4"])],
        ["found", f"{rms:.4f}", f"{mean:.4f}"],
    ],
)

# %% [markdown]
# **Summary:** NF4's values are 0 and fifteen quantiles of the normal distribution, scaled so that
# the ends are ±1. They are close together where most weights are. For blocks of 64 normal weights hardly any format
# is better. For uniform weights int4 is better, whose steps are equal, and for weights with heavy tails AF4, whose
# values are nearer to zero.

# %% [markdown]
# ## Exercises
#
# Put your answer in place of each `...`, run the cell, and read what it says. The solutions are folded.
#
# **2.1** Find sixteen values from -1 to 1, including 0, whose error on *uniform* weights is at least a tenth smaller
# than that of NF4.

# %% tags=["exercise"]
from support import exercises

values = [...]
exercises.check("2.1", values)

# %% [markdown]
# <details><summary>A solution to 2.1</summary>
#
# ```python
# values = [i / 7.5 - 1 for i in range(16)]
# values[7] = 0.0  # where two steps of 1/15 meet
# ```
#
# </details>

# %% [markdown]
# **2.2** Compute codes [n] from scaled weights [n] and the sorted values [16]: choose the nearest
# value, or the lower one of two that are equally near.


# %% tags=["exercise"]
def nearest(x, values): ...


exercises.check("2.2", nearest)

# %% [markdown]
# <details><summary>A solution to 2.2</summary>
#
# ```python
# def nearest(x, values):
#     middles = (values[1:] + values[:-1]) / 2
#     return (x[:, None] > middles).sum(1)
# ```
#
# </details>

# %% [markdown]
# **Next:** [why blocks of 64?](03_blocks_and_scales.ipynb)
