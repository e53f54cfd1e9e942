# %% [markdown]
# # 4. Quantising the scales
#
# **How do the scales get from half a bit per weight to an eighth?**
#
# - You will be able to reduce the scales from half a bit per weight to an eighth, and decode them by hand.
# - You need notebook 3. The notebook takes 15 minutes.
# - To run it yourself: `pip install -e '.[notebooks]'` in a checkout of refq4 ([how](README.md)).
#
# One 32-bit scale for each block of 64 weights is half a bit per weight, which is a ninth of everything that a 4-bit
# layer stores. Scales are numbers, so they can be quantised as well. The QLoRA paper calls this *double
# quantisation*; the parameter is `compress_statistics=True`. First, look at the scales of a real layer:

# %%
import torch

import refq4
from refq4.functional import (
    dequantize_4bit,
    dequantize_blockwise,
    quantize_4bit,
    quantize_blockwise,
)
from support import picture
from support.material import (
    FEED_FORWARD,
    encoder_linear,
    encoder_linears,
    encoder_tensor,
)

W = encoder_tensor(f"{FEED_FORWARD}.weight")
packed, plain = quantize_4bit(W, quant_type="nf4")
scales = plain.absmax
low, mean, high = (f(scales).item() for f in (torch.min, torch.mean, torch.max))
print(f"{scales.numel()} scales, from {low:.3f} to {high:.3f}, mean {mean:.3f}")

figure, axes = picture.canvas(height=2.4)
axes.hist(scales.numpy(), bins=150, range=(0, 0.5), color=picture.BLUE)
axes.axvline(scales.mean().item(), color=picture.VERMILION)
axes.text(
    scales.mean() + 0.005,
    0.9,
    "mean",
    color=picture.VERMILION,
    transform=axes.get_xaxis_transform(),
)
axes.set(xlabel="scale", yticks=[])
picture.show(
    figure,
    "A histogram of the scales: one narrow hump around the mean, well away from 0.",
)

# %% [markdown]
# ## The recipe
#
# The recipe has three steps. Subtract the mean of the scales and keep it (the *offset*). Put the differences into
# blocks of 256, each with its own 32-bit scale. Store each difference as the nearest of 256 numbers, in one byte.

# %%
offset = scales.mean()
codes, second = quantize_blockwise(scales - offset, blocksize=256)
decoded = dequantize_blockwise(codes, second) + offset

packed, nested = quantize_4bit(W, quant_type="nf4", compress_statistics=True)
assert torch.equal(codes, nested.absmax)
assert torch.equal(second.absmax, nested.state2.absmax)
assert torch.equal(offset, nested.offset)
picture.table(
    ["what", "type", "how many", "bytes"],
    [
        ["scales, before", "float32", scales.numel(), scales.nbytes],
        ["codes of the scales", "uint8", codes.numel(), codes.nbytes],
        [
            "scales of the scales",
            "float32",
            second.absmax.numel(),
            second.absmax.nbytes,
        ],
        ["offset", "float32", 1, offset.nbytes],
    ],
)

# %% [markdown]
# The assertions check that the library stores the same, bit for bit. How large is the error of the decoded scales? It
# is less than half a per cent, compared with nine per cent for the weights:

# %%
error = ((decoded - scales).norm() / scales.norm()).item()
print(f"relative error of the scales {error:.4f}")
assert error < 0.005

# %% [markdown]
# ## 256 numbers
#
# The 256 numbers are not evenly spaced. They are called the *dynamic map*. It works like a floating point number
# whose exponent has no fixed length. A byte has a sign, then zeros, then a one, then a fraction. Each further zero
# makes the number ten times smaller, and leaves one bit less for the fraction. So near 1 the steps are about a
# hundredth, and near 0 there are numbers as small as a millionth.

#
# ```text
# sign   zeros, then a one   fraction     which numbers
#   s    1                   ffffff       64 from 0.1 to 1
#   s    01                  fffff        32 from 0.01 to 0.1
#   s    001                 ffff         16 from 0.001 to 0.01
#   ...
#   s    0000001                           1 below a millionth
# ```
#
# Choose the bits of a byte:
#
# <div class="playground" id="figure-byte">(In the documentation you can choose them here.)</div>
#
# Together with 0 and 1 these are 256 numbers. They are sorted, and a code is a position in this list.

# %%
dynamic = refq4.functional.create_dynamic_map()
steps = dynamic.diff()
print(
    "the smallest and the largest above 0:",
    *(f"{value:.2g}" for value in dynamic[dynamic > 0][[0, -1]].tolist()),
)
assert dynamic.numel() == 256
assert torch.equal(dynamic, dynamic.sort().values)

figure, (left, right) = picture.canvas(1, 2, height=2.8)
left.plot(range(256), dynamic, ".", color=picture.BLUE, markersize=3)
left.set(xlabel="code", ylabel="value", xticks=[0, 64, 127, 192, 255])
right.plot(dynamic[128:], steps[127:], ".", color=picture.BLUE, markersize=4)
right.set(
    xscale="log", yscale="log", xlabel="value above 0", ylabel="step from the one below"
)
picture.show(
    figure,
    "The dynamic map: 256 values in an S, flat around 0; its steps grow with the "
    "value, decade by decade.",
)

# %% [markdown]
# ## Why the mean is subtracted first
#
# The map is symmetric: half of its numbers are below zero, and they are closest together around zero. But scales are
# all positive, and none is near zero. Without subtracting the mean, they would use only the part of the map with
# large steps, and none of the negative half. After subtracting the mean, they use both halves and the fine middle.
# The differences are also smaller than the scales, so every step is smaller. Each dot is a scale, divided by the
# scale of its block:


# %%
def as_the_map_sees(values):
    return values.view(-1, 256) / values.view(-1, 256).abs().amax(dim=1, keepdim=True)


views = {"with the mean": scales, "mean subtracted": scales - offset}
figure, axes = picture.canvas(height=2.4)
axes.vlines(dynamic, 0.5, 0.95, color=picture.GREY, linewidth=0.5)
for row, (colour, values) in enumerate(
    zip((picture.VERMILION, picture.BLUE), views.values(), strict=True)
):
    seen = as_the_map_sees(values).flatten()
    jitter = (
        torch.rand(seen.numel(), generator=torch.Generator().manual_seed(0)) * 0.5
        - 0.25
    )
    axes.plot(seen, row * -1 + jitter, ".", color=colour, markersize=0.8)
axes.set(
    yticks=[0.72, 0, -1],
    yticklabels=["the map", *views],
    xlabel="value",
    xlim=(-1.02, 1.02),
)
axes.grid(visible=False)
picture.show(
    figure,
    "Scales are in the right half of the map, and in its dense middle after the mean "
    "is subtracted.",
)


# %%
def worth(values):
    codes, state = quantize_blockwise(values, blocksize=256)
    off = dequantize_blockwise(codes, state) - values
    return codes.unique().numel(), (off.norm() / scales.norm()).item()


rows = [[name, *worth(values)] for name, values in views.items()]
assert rows[1][2] < rows[0][2] / 2
picture.table(
    ["", "codes in use", "error of the scales"],
    [[name, used, f"{error:.4f}"] for name, used, error in rows],
)

# %% [markdown]
# ## Adding up the bits
#
# A scale is shared by 64 weights and now has 8 bits. The scale of the scales is shared by 64 × 256 weights and has 32
# bits. So the half bit becomes $8/64 + 32/(64 \cdot 256) = 0.127$ bits, as in the paper. The other parts have the
# same size for every matrix: the offset, the sixteen values, the map.

# %%
n = W.numel()
price = {
    "codes of the weights": 8 * packed.nbytes / n,
    "codes of the scales": 8 * nested.absmax.nbytes / n,
    "scales of the scales": 8 * nested.state2.absmax.nbytes / n,
    "offset": 8 * nested.offset.nbytes / n,
    "the sixteen values": 8 * nested.code.nbytes / n,
    "the map": 8 * nested.state2.code.nbytes / n,
}
total = sum(price.values())
scales_only = price["codes of the scales"] + price["scales of the scales"]
assert scales_only == 8 / 64 + 32 / (64 * 256)
assert round(total, 6) == round(8 * (packed.nbytes + nested.nbytes()) / n, 6)
picture.table(
    ["part", "bits per weight"],
    [[k, f"{v:.6f}"] for k, v in price.items()] + [["together", f"{total:.6f}"]],
)

# %%
figure, axes = picture.canvas(height=1.7)
before = {"codes of the weights": 4, "scales": 32 / 64}
after = {
    "codes of the weights": 4,
    "scales": scales_only,
    "tables and offset": total - 4 - scales_only,
}
for row, parts in enumerate((after, before)):
    left = 0
    for colour, part in zip(
        (picture.BLUE, picture.VERMILION, picture.GREEN), parts, strict=False
    ):
        axes.barh(
            row,
            parts[part],
            left=left,
            color=colour,
            height=0.6,
            label=part if row == 0 else None,
        )
        left += parts[part]
axes.set(
    yticks=(0, 1),
    yticklabels=("double\nquantisation", "plain"),
    xlabel="bits per weight (from 3.8)",
    xlim=(3.8, 4.55),
)
axes.grid(axis="y", visible=False)
figure.legend(loc="outside upper right", ncols=3)
picture.show(
    figure,
    "Stacked bars: the scales shrink from half a bit to an eighth; tables and offset "
    "are a sliver.",
)

# %% [markdown]
# ## Against real files
#
# Such a calculation is easily wrong, so we save the layer in both ways and look at the files. A `.safetensors` file
# has a header in JSON, which names the tensors, and then their bytes.

# %%
import tempfile
from pathlib import Path

from safetensors.torch import save_file


def file_of(name, **settings):
    """The size of a saved layer without its bias, and how much of it are tensors."""
    layer = refq4.nn.Linear4bit.from_linear(
        encoder_linear(name), quant_type="nf4", **settings
    )
    tensors = {key: value for key, value in layer.state_dict().items() if key != "bias"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.safetensors"
        save_file(tensors, path)
        return path.stat().st_size, sum(tensor.nbytes for tensor in tensors.values())


rows = []
for title, double in (("plain", False), ("double quantisation", True)):
    size, tensors = file_of(FEED_FORWARD, compress_statistics=double)
    state = nested if double else plain
    # the offset is in the JSON
    described = tensors - packed.nbytes - state.nbytes() + (4 if double else 0)
    rows.append(
        [
            title,
            f"{size:,}",
            f"{size - tensors:,}",
            f"{described}",
            f"{8 * size / n:.4f}",
        ]
    )
    assert described in range(70, 200)
picture.table(
    [
        "the layer's file",
        "bytes",
        "of which header",
        "and description (JSON)",
        "bits per weight",
    ],
    rows,
)

# %% [markdown]
# This is the same table for all 36 layers of the encoder:

# %%
numbers = sum(encoder_tensor(f"{name}.weight").numel() for name in encoder_linears())
plain_files = sum(
    file_of(name, compress_statistics=False)[0] for name in encoder_linears()
)
small_files = sum(
    file_of(name, compress_statistics=True)[0] for name in encoder_linears()
)
sizes = {
    "float32": 4 * numbers,
    "bfloat16": 2 * numbers,
    "NF4": plain_files,
    "NF4, double quantisation": small_files,
}
assert 4.12 < 8 * small_files / numbers < 4.25

picture.table(
    [f"{numbers:,} weights as", "MB", "bits per weight"],
    [
        [name, f"{size / 1e6:.2f}", f"{8 * size / numbers:.3f}"]
        for name, size in sizes.items()
    ],
)

# %% [markdown]
# The layers of this encoder are small, so tables, headers and JSON still matter: 4.17 bits instead of 4.127. In a
# layer of 4096 × 4096 they are a thousandth of a bit per weight.
#
# ## How much the error grows
#
# The error hardly grows. The picture shows the error of each layer's weights, with plain scales and with quantised
# scales.


# %%
def error_of(W, **settings):
    decoded = dequantize_4bit(*quantize_4bit(W, quant_type="nf4", **settings))
    return ((decoded - W).norm() / W.norm()).item()


pairs = []
for name in encoder_linears():
    W = encoder_tensor(f"{name}.weight")
    pairs.append((error_of(W), error_of(W, compress_statistics=True)))
added = max(double / single - 1 for single, double in pairs)
print(f"the error of a layer grows by {100 * added:.2f} % of itself at worst")
assert added < 0.02

figure, axes = picture.canvas(height=2.6)
axes.plot(
    [single for single, _ in pairs],
    "o",
    color=picture.BLUE,
    label="plain scales",
    markersize=7,
)
axes.plot(
    [double for _, double in pairs],
    "x",
    color=picture.VERMILION,
    label="quantised scales",
)
axes.set(xlabel="layer", ylabel="relative error", ylim=(0.08, 0.11))
axes.legend(ncols=2)
picture.show(
    figure,
    "The error of 36 layers with plain and with quantised scales: dots and crosses "
    "coincide.",
)

# %% [markdown]
# ## Where it goes wrong
#
# A scale is decoded as `map[code] * scale + offset`, and the result can be below zero. This happens to a block whose
# weights are very small compared with those of other blocks. We make such a block in this layer, by dividing its
# weights by a thousand:

# %%
W = encoder_tensor("encoder.layer.2.intermediate.dense.weight")
block = W.view(-1, 64)[5]
block *= 0.001
packed, state = quantize_4bit(W, quant_type="nf4", compress_statistics=True)
scale = (dequantize_blockwise(state.absmax, state.state2) + state.offset)[5]
back = dequantize_4bit(packed, state).view(-1, 64)[5]

print(f"scale {block.abs().max().item():.6f} comes back as {scale.item():.6f}")
print("weights       ", *(f"{value:9.6f}" for value in block[:6].tolist()))
print("come back as  ", *(f"{value:9.6f}" for value in back[:6].tolist()))
assert scale < 0
assert (block * back <= 0).all()

# %% [markdown]
# All signs of the block are wrong. But its weights are so small that this hardly matters compared with the other
# weights. bitsandbytes (0.49.1 and 0.50.2) decodes in the same way, and such checkpoints exist, so refq4 gives the
# same bits.
#
# **Summary:** the mean is subtracted from the scales, and the differences are stored in 8 bits, with a scale for
# each 256. The scales take 0.127 bits per weight instead of 0.5, and the error of the weights is hardly larger than
# before.

# %% [markdown]
# ## Exercises
#
# Put your answer in place of each `...`, run the cell, and read what it says. The solutions are folded.
#
# **4.1** Compute the fp32 scales of a state with double quantisation. `state.absmax` are 8-bit codes, `state.state2`
# has their table `code` and their scales `absmax` (one for each 256), and `state.offset` is the mean that was
# subtracted. Try it without the offset as well.

# %% tags=["exercise"]
from support import exercises


def scales(state): ...


exercises.check("4.1", scales)

# %% [markdown]
# <details><summary>A solution to 4.1</summary>
#
# ```python
# def scales(state):
#     second = state.state2
#     each = second.absmax.repeat_interleave(256)[: state.absmax.numel()]
#     return second.code[state.absmax.long()] * each + state.offset
# ```
#
# </details>

# %% [markdown]
# **4.2** How many bits per weight does NF4 with double quantisation take in blocks of 128?

# %% tags=["exercise"]
answer = ...
exercises.check("4.2", answer)

# %% [markdown]
# <details><summary>A solution to 4.2</summary>
#
# ```python
# answer = 4 + 8 / 128 + 32 / (128 * 256)
# ```
#
# </details>

# %% [markdown]
# **Next:** [how all this is stored in a file](05_bytes_on_disk.ipynb)
