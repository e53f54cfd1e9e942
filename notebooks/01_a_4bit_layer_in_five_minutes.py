# %% [markdown]
# # 1. A 4-bit layer in five minutes
#
# **What goes into a 4-bit layer, what is stored, and what comes out?**
#
# - You will be able to say what is stored for a 4-bit layer, how many bits per weight that is, and what comes out.
# - You need to know Python, and what a linear layer is. The notebook takes 5 minutes.
# - To run it yourself: `pip install -e '.[notebooks]'` in a checkout of refq4 ([how](README.md)).
#
# A linear layer multiplies its input by a matrix of weights. Most of a language model consists of such matrices, and
# most of the time of running the model is spent on reading them from memory. So how many bits of each weight do we
# need? This notebook uses a real layer, the first one of a sentence encoder that many search engines use, and a real
# sentence as its input.
#
# If you want to read code first, [refq4/one_page.py](../refq4/one_page.py) is the whole layer in fewer than ninety
# lines. The last cell of this notebook shows that it stores the same bytes.

# %%
import torch

import refq4
from support import picture
from support.material import QUERY, encoder_inputs, encoder_linear

linear = encoder_linear(QUERY)
tokens, x = encoder_inputs("The quick brown fox jumps over the lazy dog.")
W = linear.weight.data

print(f"W  {list(W.shape)}  one row for each output, one column for each input feature")
print(f"x  {list(x.shape)}   one row for each token:")
print(*tokens)

# %% [markdown]
# ## What is stored
#
# One call makes a 4-bit layer of the layer. NF4 is the name of the format; notebook 2 explains it.

# %%
layer = refq4.nn.Linear4bit.from_linear(
    linear, quant_type="nf4", compress_statistics=False
)
state = layer.quant_state

picture.table(
    ["stored", "type", "shape", "bytes", "what it is"],
    [
        [
            "weight",
            "uint8",
            list(layer.weight.shape),
            layer.weight.nbytes,
            "two 4-bit codes in each byte",
        ],
        [
            "absmax",
            "float32",
            list(state.absmax.shape),
            state.absmax.nbytes,
            "one scale for each block of 64 weights",
        ],
        [
            "code",
            "float32",
            list(state.code.shape),
            state.code.nbytes,
            "the sixteen numbers that a code can mean",
        ],
    ],
)

# %% [markdown]
# Divide the bits by the number of weights to get the bits per weight: four for the code, and half a bit for the
# weight's share of a scale (32 bits, shared by 64 weights). Notebook 4 reduces this half bit to an eighth.

# %%
codes = 8 * layer.weight.nbytes / W.numel()
scales = 8 * state.absmax.nbytes / W.numel()
table_of_16 = 8 * state.code.nbytes / W.numel()
print(
    f"{codes} for the code + {scales} for the scale + {table_of_16:.4f} for the table "
    "of sixteen numbers"
)
assert (codes, scales) == (4, 32 / 64)

# %%
figure, axes = picture.canvas(height=1.9)
axes.barh(
    ["NF4", "bfloat16", "float32"], [codes, 16, 32], color=picture.BLUE, height=0.55
)
axes.barh("NF4", scales, left=codes, color=picture.VERMILION, height=0.55)
axes.text(codes + scales + 0.3, 0, "the scale", color=picture.VERMILION, va="center")
axes.set(xlabel="bits per weight", xticks=[0, 4.5, 16, 32])
axes.grid(axis="y", visible=False)
picture.show(
    figure,
    "Bars of bits per weight: float32 32, bfloat16 16, NF4 4.5, of which a thin end is "
    "the scale.",
)

# %% [markdown]
# ## What a code means
#
# "Code" has two meanings. `state.code` is the table of sixteen numbers. The code of a weight is the place of its number
# in this table, from 0 to 15.
#
# Look at the first block: 64 neighbouring weights of the first row. The block's scale is the largest magnitude among
# them. Each weight is divided by the scale, so that it is between -1 and 1, and then replaced by the nearest of the
# sixteen numbers.

# %%
block = W.flatten()[:64]
scale = block.abs().max()
nearest = (block / scale).unsqueeze(1).sub(state.code).abs().argmin(dim=1)

assert scale == state.absmax[0]
print("scale", round(scale.item(), 4))
for row in nearest.view(4, 16).tolist():
    print("codes", *(f"{code:3}" for code in row))

# %% [markdown]
# Decoding is one look-up and one product, `code[i] * scale`. Done by hand, it gives the same bits as the library.

# %%
decoded = state.code[nearest] * scale
W4 = refq4.functional.dequantize_4bit(layer.weight, state)
assert torch.equal(decoded, W4.flatten()[:64])

figure, axes = picture.canvas(height=3.4)
for level in state.code * scale:
    axes.axhline(level.item(), color=picture.GREY, linewidth=0.6, alpha=0.6)
places = range(64)
axes.vlines(
    places, block, decoded, color=picture.VERMILION, linewidth=1.5, label="error"
)
axes.plot(places, block, "o", color=picture.BLUE, markersize=4.5, label="weight")
axes.plot(
    places,
    decoded,
    "_",
    color=picture.VERMILION,
    markersize=8,
    markeredgewidth=2,
    label="decoded from 4 bits",
)
axes.set(xlabel="place in the block", ylabel="weight", xlim=(-1, 64))
axes.grid(visible=False)
figure.legend(loc="outside upper right", ncols=3)
picture.show(
    figure,
    "64 weights as dots between sixteen horizontal lines; each is moved to the nearest "
    "line.",
)

# %% [markdown]
# The lines are close together around zero, where most weights are, and far apart where few weights are. This is the
# whole idea of the format.
#
# ## What comes out
#
# The 4-bit layer takes the same input as the original one, and gives an output of the same shape and type. The weights
# are wrong by 9 % (the norm of the error divided by the norm of the weights). The outputs are wrong by a little less,
# because an output is a sum of 384 products, in which positive and negative errors partly cancel.

# %%
y, y4 = linear(x), layer(x)
error_of_weights = ((W4 - W).norm() / W.norm()).item()
error_of_outputs = ((y4 - y).norm() / y.norm()).item()
alike = torch.nn.functional.cosine_similarity(y, y4)

assert y4.shape == y.shape
assert y4.dtype == y.dtype
assert error_of_outputs < 0.1
print(
    f"error of the weights {error_of_weights:.3f}, of the outputs "
    f"{error_of_outputs:.3f}"
)
print(f"cosine of the two outputs, token by token: at worst {alike.min().item():.4f}")

# %%
figure, axes = picture.canvas(height=3.6)
axes.axline((0, 0), slope=1, color=picture.GREY, linewidth=1)
axes.plot(
    y.flatten().detach(),
    y4.flatten().detach(),
    ".",
    color=picture.BLUE,
    markersize=2.5,
    alpha=0.6,
)
axes.set(
    xlabel="output with 32-bit weights",
    ylabel="output with 4-bit weights",
    aspect="equal",
    anchor="W",
)
picture.show(
    figure,
    "4608 outputs of the 4-bit layer against those of the original: a thin cloud along "
    "the diagonal.",
)

# %% [markdown]
# ## What happened inside
#
# Every call of a layer has the same seven steps, and each step decides something. `refq4.trace` records what was
# decided and why; notebook 6 explains the steps one at a time. (The times and the name of the backend are those of
# the machine that made this page.)
#
# Step 6 has two lines. The first line is the *path*: `own layout` if the backend has rearranged the weight, otherwise
# `gemv_4bit` for one token or `MatMul4Bit` for several. The second line is the *op* that ran: GEMV, matrix times
# vector, for one token; GEMM, matrix times matrix, for the twelve tokens of our sentence. Beside it stands the
# *kernel*, the function of the backend that computed the op ([path, op and
# kernel](../docs/explanation/step-6-dispatch-to-matmul-4bit.md)).

# %% tags=["timing"]
with refq4.trace() as steps:
    layer(x)

assert [step.number for step in steps.calls[0].steps] == [1, 2, 3, 4, 5, 6, 7]
steps

# %% [markdown]
# ## The same on one page
#
# `refq4/one_page.py` is also a 4-bit layer. It quantises, packs, decodes and multiplies, and nothing else. It also
# quantises the scales, as notebook 4 explains. Both layers store the same bytes.

# %%
from refq4 import one_page

page = one_page.Linear4bit(W, linear.bias)
nested = refq4.nn.Linear4bit.from_linear(
    linear, quant_type="nf4", compress_statistics=True
)

assert torch.equal(page.packed, nested.weight.flatten())
assert torch.equal(page.q, nested.quant_state.absmax)
assert torch.equal(
    page.weight(), refq4.functional.dequantize_4bit(nested.weight, nested.quant_state)
)
print(
    f"{page.packed.numel()} bytes of codes and {page.q.numel()} bytes of scales, the "
    "same in both"
)

# %% [markdown]
# **Summary:** a block of 64 weights becomes 64 codes of 4 bits and one scale. A code means one of
# sixteen numbers, times this scale. A weight takes 4.5 bits instead of 32, and the output has almost the same
# direction as before.

# %% [markdown]
# ## Exercises
#
# Put your answer in place of each `...`, run the cell, and read what it says. The solutions are folded.
#
# **1.1** How many bits per weight does NF4 take in blocks of 32, with 32-bit scales?

# %% tags=["exercise"]
from support import exercises

answer = ...
exercises.check("1.1", answer)

# %% [markdown]
# <details><summary>A solution to 1.1</summary>
#
# ```python
# answer = 4 + 32 / 32
# ```
#
# </details>

# %% [markdown]
# **1.2** Decode by hand: compute n weights from codes [n], one scale for each 64 codes, and the table
# of sixteen values.


# %% tags=["exercise"]
def decode(codes, scales, table): ...


exercises.check("1.2", decode)

# %% [markdown]
# <details><summary>A solution to 1.2</summary>
#
# ```python
# def decode(codes, scales, table):
#     return table[codes.long()] * scales.repeat_interleave(64)
# ```
#
# </details>

# %% [markdown]
# **Next:** [why these sixteen numbers?](02_sixteen_numbers.ipynb)
