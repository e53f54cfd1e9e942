# %% [markdown]
# # 6. The forward pass, step by step
#
# **What are the seven steps of a 4-bit layer, and what makes each of them decide otherwise?**
#
# - You will be able to read the trace of a call, say why each of the seven steps is there, and turn its decision.
# - It needs notebook 1. It takes 20 minutes.
# - To run it yourself: `pip install -e '.[notebooks]'` in a checkout of refq4 ([how](README.md)).
#
# Between `layer(x)` and its result lie seven steps, and each decides something: where the weight's scales are, in
# which type to compute, which kernel to call. Most surprises with 4-bit layers (slow, less exact than hoped, a
# warning) are one of these decisions. `refq4.trace()` records them. We take one tensor through all seven, and make
# every step go the other way.

# %%
import inspect
import warnings

import torch

import refq4
from support import picture
from support.material import QUERY, encoder_inputs, encoder_linear

refq4.set_backend("reference")  # the plain engine: the same decisions on every machine
tokens, x = encoder_inputs("The quick brown fox jumps over the lazy dog.")


def new_layer(**settings):
    return refq4.nn.Linear4bit.from_linear(
        encoder_linear(QUERY), quant_type="nf4", **settings
    )


def steps(layer, x):
    """The seven steps of one call."""
    with refq4.trace() as record:
        layer(x)
    return record.calls[0].steps


def step(number, layer, x):
    """One step of one call: shown, and its choice returned."""
    taken = next(step for step in steps(layer, x) if step.number == number)
    print(f"{taken.number} {taken.name}: {taken.choice}\n    because {taken.why}")
    return taken.choice


usual = steps(new_layer(), x[:1])
picture.table(
    ["step", "decision", "because", "gives"],
    [[f"{s.number} {s.name}", s.choice, s.why, f"`{s.result}`"] for s in usual],
)

# %% [markdown]
# That is the usual call, one token through a layer fresh from quantising. The function behind it is as long as the
# table: each step takes values, and gives a value and a *decision* (what it chose, and why). `step` hands the value on,
# and writes the decision down while somebody traces.

# %%
body = inspect.getsource(refq4.pipeline.linear_4bit).rpartition('"""')[2]
print(body.strip("\n"))
assert body.count("step(") == 7

# %% [markdown]
# Now the steps one at a time.
#
# ## 1 · Recover the quant state
#
# The weight is bytes; scales, shape and code are in its *quant state*, an attribute of the parameter. An attribute is
# easily lost: anything that builds a new parameter from the same bytes drops it. FSDP does: it splits a model over
# several machines, and puts a weight together from its pieces when it is needed. So the layer keeps a second
# reference.

# %%
layer = new_layer()
assert step(1, layer, x) == "kept"

# the same bytes, and nothing else
layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
assert step(1, layer, x) == "recovered"

# %% [markdown]
# With neither there is no way to go on, and the layer says what to do:

# %%
try:
    refq4.nn.LinearNF4(384, 384)(x)
except RuntimeError as error:
    print(error)
else:
    raise AssertionError("a layer without a quant state computed something")

# %% [markdown]
# ## 2 · Ask for the backend's layout
#
# Bytes in a checkpoint lie in the order of the matrix. A fast kernel may want another order, so that one instruction
# fetches what belongs together. At inference the backend is asked whether it has one; the reference has none. In
# training the stored bytes are used, as backward decodes them too.

# %%
layer = new_layer()
assert step(2, layer, x) == "canonical"
assert step(2, layer, x.clone().requires_grad_()) == "canonical"
assert step(2, layer.train(), x) == "canonical"

# %% [markdown]
# Three times the same choice, for three reasons. The other choice needs a backend with a layout of its own. The CPU
# backend has one, if this machine has AVX2 or AVX-512 (hence no assertion here; the answer is that of the machine
# that made the page).

# %% tags=["timing"]
with refq4.use_backend("auto"):
    step(2, new_layer(), x)

# %% [markdown]
# ## 3 · Bias dtype
#
# The bias is not quantised. If it has another type than the input, a copy is cast. (bitsandbytes casts the parameter
# itself, so that a single call in half precision coarsens the bias for good; here the parameter stays.)

# %%
layer = new_layer(compute_dtype=torch.float32)
assert step(3, layer, x) == "kept"

exact = layer.bias.clone()
assert step(3, layer, x.bfloat16()) == "cast"
assert torch.equal(layer.bias, exact)

layer.bias = None
assert step(3, layer, x) == "none"

# %% [markdown]
# ## 4 · Compute dtype
#
# In which type are products formed? If you said so with `compute_dtype=`, in that. If not, the first input decides:
# float32 or bfloat16 become the layer's compute dtype. A float16 input is computed in float16, but the layer does not
# remember it: its range is narrow (nothing above 65,504), and a layer should not be bound to it by accident.

# %%
assert step(4, new_layer(compute_dtype=torch.bfloat16), x) == "as set"

layer = new_layer()
assert step(4, layer, x) == "inferred"
assert step(4, layer, x.bfloat16()) == "as set"  # float32, from the first input
assert layer.compute_dtype == torch.float32

layer = new_layer()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert step(4, layer, x.half()) == "as the input"
assert layer.compute_dtype is None
print(f"\n{caught[0].category.__name__}: {caught[0].message}")

# %% [markdown]
# That is the first warning of three. It means: no precision was chosen for this layer, so it computes in the input's
# float16. The remedy is to choose: `compute_dtype=torch.float16` if you mean it, `torch.bfloat16` for range,
# `torch.float32` to be exact. Its second form comes if you chose float32 and send float16, which costs time on
# machines where half precision is faster:

# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    new_layer(compute_dtype=torch.float32)(x.half())
print(f"{caught[0].category.__name__}: {caught[0].message}")
assert "computes in float32" in str(caught[0].message)

# %% [markdown]
# What difference does the choice make? `refq4.explain` measures a call against the same product in 64-bit arithmetic,
# with the same 4-bit weights. So this is the error of *computing* alone, which comes on top of that of the weights.

# %%
errors = {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    errors[str(dtype).removeprefix("torch.")] = refq4.explain(
        new_layer(compute_dtype=dtype), x
    ).error

exact_linear = encoder_linear(QUERY)
of_weights = (new_layer()(x) - exact_linear(x)).abs().max().item()
assert errors["float32"] < 1e-4 < errors["float16"] < errors["bfloat16"] < of_weights

figure, axes = picture.canvas(height=2.0)
names = [f"computed in {name}" for name in errors]
axes.barh(names, errors.values(), color=picture.BLUE)
axes.barh("weights of 4 bits", of_weights, color=picture.VERMILION)
axes.set(xscale="log", xlabel="largest error of an output")
axes.invert_yaxis()
axes.grid(axis="y", visible=False)
picture.show(
    figure,
    "Errors on a logarithmic scale: float32 a millionth, float16 and bfloat16 far "
    "below that of 4-bit weights.",
)

# %% [markdown]
# Even bfloat16 loses much less than four bits do.
#
# ## 5 · Cast the operands
#
# Input and bias are brought into the compute dtype, if they are not in it already.

# %%
layer = new_layer(compute_dtype=torch.bfloat16)
assert step(5, layer, x.bfloat16()) == "nothing"
assert step(5, layer, x) == "cast"

# %% [markdown]
# ## 6 · Dispatch
#
# Two things are decided here. The *op* is what the backend runs, and it follows the number of tokens:
#
# - one token: `gemv_4bit`. GEMV is matrix times vector. Every weight is read once and used once, so it is decoded in
#   registers, right where it is multiplied.
# - several tokens: `gemm_4bit`. GEMM is matrix times matrix. Every decoded weight is used for all tokens.
#
# The *path* has the names of bitsandbytes 0.49.1. Its `gemv_4bit` is a kernel for one token. For everything else it has
# `MatMul4Bit`, which decodes the whole weight to memory and multiplies with the ordinary product. One token can't pay
# for that (notebook 8 measures it): hence two paths. And only `MatMul4Bit` can go backward (notebook 7).
#
# One token takes `gemv_4bit`. Three things change that: more tokens, none at all, or a gradient that is wanted.

# %%
layer = new_layer()
one, several = x[:1], x
assert step(6, layer, one) == "gemv_4bit"
assert step(6, layer, several) == "MatMul4Bit"
assert step(6, layer, one.clone().requires_grad_()) == "MatMul4Bit"
assert step(6, layer, x[:0]) == "MatMul4Bit"

# %% [markdown]
# A fourth is the shape. If K is not a multiple of the blocksize, a block straddles two rows (notebook 3 draws it), and
# the kernel for one token can't be used. The second warning says so. It means: this layer will be slow for single
# tokens; choose a blocksize that divides `in_features`.

# %%
straddling = refq4.nn.LinearNF4(100, 64).to("cpu").eval()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert step(6, straddling, torch.randn(1, 100)) == "MatMul4Bit"
print(f"\n{caught[0].category.__name__}: {caught[0].message}")
assert "multiple of the blocksize" in str(caught[0].message)

# %% [markdown]
# And a weight in the backend's own layout (step 2) has a path of its own, `own layout`, for any number of tokens:
# notebook 1 ended with twelve of them, and `gemm_4bit` behind it.
#
# The third warning is about an old habit: a weight that was quantised as [in, out] instead of [out, in]. It still
# works, by decoding the whole matrix first. It means: quantise `W.t().contiguous()` instead.

# %%
# [384, 1536]: in, out
W = encoder_linear("encoder.layer.0.intermediate.dense").weight.data.t().contiguous()
packed, state = refq4.functional.quantize_4bit(W, quant_type="nf4")
with warnings.catch_warnings(record=True) as caught, refq4.trace() as record:
    warnings.simplefilter("always")
    y = refq4.matmul_4bit(x, packed, state)
taken = record.calls[0].steps[0]
print(f"{taken.number} {taken.name}: {taken.choice}\n    because {taken.why}")
print(f"\n{caught[0].category.__name__}: {caught[0].message}")
assert y.shape == (len(tokens), 1536)
assert taken.choice == "dequantize + linear"

# %% [markdown]
# ## 7 · Cast back
#
# Whatever it was computed in, the result comes in the type of the input: a layer can be swapped in without the rest
# of the model noticing.

# %%
layer = new_layer(compute_dtype=torch.bfloat16)
assert step(7, layer, x.bfloat16()) == "nothing"
assert step(7, layer, x) == "cast"
assert layer(x).dtype == x.dtype

# %% [markdown]
# ## All at once
#
# Six calls, seven steps; what differs from the first call is coloured. The colours spread from the cause: an input in
# another type changes steps 3, 4, 5 and 7 together.

# %%
lost = new_layer()
lost.weight = torch.nn.Parameter(lost.weight.data, requires_grad=False)
calls = {
    "one token": (new_layer(), one),
    "several": (new_layer(), several),
    "one, gradient\nwanted": (new_layer(), one.clone().requires_grad_()),
    "state lost": (lost, one),
    "compute dtype\nbfloat16": (new_layer(compute_dtype=torch.bfloat16), one),
    "bfloat16 input,\ncomputes in float32": (
        new_layer(compute_dtype=torch.float32),
        one.bfloat16(),
    ),
}
taken = {name: steps(layer, given) for name, (layer, given) in calls.items()}

figure, axes = picture.canvas(height=3.4)
first = taken["one token"]
for column, record in enumerate(taken.values()):
    for row, made in enumerate(record):
        differs = made.choice != first[row].choice
        axes.barh(
            row,
            0.96,
            left=column - 0.48,
            height=0.9,
            color=picture.ORANGE if differs else picture.GREY,
            alpha=1 if differs else 0.08,
        )
        axes.text(
            column,
            row,
            made.choice,
            ha="center",
            va="center",
            fontsize=8.5,
            color="black" if differs else None,
        )
axes.set(
    yticks=range(7),
    yticklabels=[f"{s.number} {s.name}" for s in first],
    ylim=(6.5, -0.5),
    xlim=(-0.5, 5.5),
)
axes.set_xticks(range(6), taken, fontsize=8)
axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
axes.spines[:].set_visible(False)
axes.grid(visible=False)
picture.show(
    figure,
    "A grid of six calls by seven steps with the decision of each; those that differ "
    "from the first call stand out.",
)

# %% [markdown]
# And when all is done: what did this call cost and how exact was it? `explain` puts the trace, the error against
# 64-bit arithmetic and the bytes that had to be moved on one page. (The times are those of the machine that made it.)

# %% tags=["timing"]
report = refq4.explain(new_layer(), one)
assert report.error <= report.allowed
report

# %% [markdown]
# **So:** seven steps, each with a decision that you can see and turn. The three warnings are about step 4 (no
# precision was chosen) and step 6 (K is not a multiple of the blocksize; a weight the wrong way round).

# %% [markdown]
# ## Exercises
#
# Put your answer in place of each `...`, run the cell, and read what it says. The solutions are folded.
#
# **6.1** The paths of four calls on the reference, without a gradient: `x` of [1, 64], of [1, 1, 64] and of [2, 64]
# through a layer of 64 in_features, and [1, 100] through one of 100.

# %% tags=["exercise"]
from support import exercises

answer = [..., ..., ..., ...]
exercises.check("6.1", answer)

# %% [markdown]
# <details><summary>A solution to 6.1</summary>
#
# ```python
# answer = ["gemv_4bit", "gemv_4bit", "MatMul4Bit", "MatMul4Bit"]
# ```
#
# </details>

# %% [markdown]
# **6.2** Find a layer and an input for which step 4 decides "as the input".

# %% tags=["exercise"]
layer, given = ..., ...
exercises.check("6.2", (layer, given))

# %% [markdown]
# <details><summary>A solution to 6.2</summary>
#
# ```python
# import torch
#
# import refq4
#
# layer = refq4.nn.LinearNF4(64, 8).to("cpu")  # no compute dtype was set
# given = torch.ones(1, 64, dtype=torch.float16)
# ```
#
# </details>

# %% [markdown]
# **Next:** [the way back](07_backward_through_frozen_weights.ipynb)
