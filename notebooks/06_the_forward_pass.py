# %% [markdown]
# # 6. The forward pass, step by step
#
# **What are the seven steps of a 4-bit layer, and what changes the decision of each?**
#
# - You will be able to read the trace of a call, say why each of the seven steps exists, and change its decision.
# - You need notebook 1. The notebook takes 20 minutes.
# - To run it yourself: `pip install -e '.[notebooks]'` in a checkout of refq4 ([how](README.md)).
#
# A call `layer(x)` has seven steps, and each step decides something: where the weight's scales are, in which type to
# compute, which kernel to call. If a 4-bit layer surprises you (it is slow, less exact than expected, or warns), the
# reason is usually one of these decisions. `refq4.trace()` records them. We follow one tensor through all seven
# steps, and change the decision of every step.

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
# This is the usual call: one token, and a layer that was just quantised. The function that computes it is as long as
# the table. Each step takes values, and returns a value and a *decision* (what it chose, and why). `step` returns the
# value, and records the decision while a trace is active.

# %%
body = inspect.getsource(refq4.pipeline.linear_4bit).rpartition('"""')[2]
print(body.strip("\n"))
assert body.count("step(") == 7

# %% [markdown]
# Now we look at the steps one at a time.
#
# ## 1 · Recover the quant state
#
# The weight is bytes; scales, shape and code are in its *quant state*, an attribute of the parameter. An attribute is
# easily lost, because code that makes a new parameter from the same bytes does not copy it. FSDP (fully sharded data
# parallel) does this: it splits a model over several machines, and joins the pieces of a weight when it is needed. So
# the layer keeps a second reference to the quant state.

# %%
layer = new_layer()
assert step(1, layer, x) == "kept"

# the same bytes, and nothing else
layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
assert step(1, layer, x) == "recovered"

# %% [markdown]
# Without both references, the layer can't compute, and raises an error that says what to do:

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
# Bytes in a checkpoint are in the order of the matrix. A fast kernel may need another order, so that one instruction
# loads the bytes that it needs together. In inference, the backend may rearrange the weight into its own layout; the
# reference has no such layout. In training the stored bytes are used, because the backward pass also decodes them.

# %%
layer = new_layer()
assert step(2, layer, x) == "canonical"
assert step(2, layer, x.clone().requires_grad_()) == "canonical"
assert step(2, layer.train(), x) == "canonical"

# %% [markdown]
# These three calls make the same choice, for three reasons. The other choice needs a backend with its own layout. The
# CPU backend has one if the machine has AVX2 or AVX-512. (So there is no assertion here; the output is that of the
# machine that made the page.)

# %% tags=["timing"]
with refq4.use_backend("auto"):
    step(2, new_layer(), x)

# %% [markdown]
# ## 3 · Bias dtype
#
# The bias is not quantised. If it has another type than the input, a copy of it is cast, because a kernel takes
# operands of one type. (Step 5 does not do it: if the input already has the compute dtype, it casts nothing.)
# bitsandbytes 0.49.1 and 0.50.2 cast the parameter itself, so after a single call in half precision the stored bias
# stays rounded. In refq4 the parameter does not change.

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
# In which type are products computed? If you set `compute_dtype=`, in that type. If not, the first input decides:
# float32 or bfloat16 become the layer's compute dtype. A float16 input is computed in float16, but the layer does not
# remember this type: its largest number is 65,504, and a layer should not compute everything in it by accident. A later
# input is not asked (as in bitsandbytes), so that one bfloat16 input can't change how all later float16 inputs are
# computed: after a first float16 input, each input is computed in its own type.

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
# This is the first of three warnings. It means that no precision was chosen for this layer, so it computes in the
# input's float16. To avoid the warning, choose a type: `compute_dtype=torch.float16` if you want float16,
# `torch.bfloat16` for a larger range, `torch.float32` for exact results. The warning has a second form, if you chose
# float32 and the input is float16. This costs time on machines where half precision is faster:

# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    new_layer(compute_dtype=torch.float32)(x.half())
print(f"{caught[0].category.__name__}: {caught[0].message}")
assert "computes in float32" in str(caught[0].message)

# %% [markdown]
# How much does the choice matter? `refq4.explain` compares a call with the same product in 64-bit arithmetic, with
# the same 4-bit weights. So it measures only the error of *computing*, which is added to the error of the weights.

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
# Even with bfloat16, the error of computing is much smaller than the error of 4-bit weights.
#
# ## 5 · Cast the operands
#
# If the input has another type than the compute dtype, input and bias are cast to it. (After step 3 the bias has the
# input's type, so either both need the cast or neither does.)

# %%
layer = new_layer(compute_dtype=torch.bfloat16)
assert step(5, layer, x.bfloat16()) == "nothing"
assert step(5, layer, x) == "cast"

# %% [markdown]
# ## 6 · Dispatch
#
# This step decides two things. The *op* is what the backend is asked to compute, and it depends on the number of
# tokens, and on nothing else:
#
# - one token: `gemv_4bit`. GEMV is matrix times vector. Every weight is read once and used once, so it is decoded in
#   registers, immediately before it is multiplied.
# - several tokens: `gemm_4bit`. GEMM is matrix times matrix. Every decoded weight is used for all tokens.
#
# The *path* has the names of bitsandbytes 0.49.1. On a GPU its `gemv_4bit` is a kernel for one token. For everything
# else it has `MatMul4Bit`, which decodes the whole weight to memory and then calls the ordinary product. For one token
# this is too slow (notebook 8 measures it), so bitsandbytes has two paths. Only `MatMul4Bit` can compute the gradient
# of the *input* (notebook 7); a bias gets its gradient on every path.
#
# In refq4 each path ends in one of the two ops, and the backend chooses the *kernel*, the function that computes the
# op. So a call can have the path `MatMul4Bit`, the op `gemv_4bit` and the kernel `gemm_4bit_1_scalar`. A table of
# examples is on the page of [step 6](../docs/explanation/step-6-dispatch-to-matmul-4bit.md).
#
# One token takes the path `gemv_4bit`. Three things change this: more than one token, no token at all, or a gradient of
# the input that is needed.

# %%
layer = new_layer()
one, several = x[:1], x
assert step(6, layer, one) == "gemv_4bit"
assert step(6, layer, several) == "MatMul4Bit"
assert step(6, layer, one.clone().requires_grad_()) == "MatMul4Bit"
assert step(6, layer, x[:0]) == "MatMul4Bit"

# %% [markdown]
# The shape is a fourth reason. If K is not a multiple of the blocksize, a block straddles two rows (notebook 3 has a
# picture), and the path `gemv_4bit` can't be used. The op is still `gemv_4bit`, but on a CPU only the plain kernel
# takes such a weight. The second warning says this. It means that the layer will be slow; choose a blocksize that
# divides `in_features`.

# %%
straddling = refq4.nn.LinearNF4(100, 64).to("cpu").eval()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert step(6, straddling, torch.randn(1, 100)) == "MatMul4Bit"
print(f"\n{caught[0].category.__name__}: {caught[0].message}")
assert "multiple of the blocksize" in str(caught[0].message)

# %% [markdown]
# A weight in the backend's own layout (step 2) has its own path, `own layout`, for any number of tokens. You saw it
# at the end of notebook 1, with twelve tokens and the op `gemm_4bit`.
#
# The third warning is about a weight that was quantised as [in, out] instead of [out, in]. No layer has such a weight,
# only the function `matmul_4bit` takes it, and has a path of its own for it: it decodes the whole matrix first. To
# avoid the warning, quantise `W.t().contiguous()` instead.

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
# The result is cast to the type of the input, whatever the compute dtype is. So a 4-bit layer can replace another
# layer, and the rest of the model need not change.

# %%
layer = new_layer(compute_dtype=torch.bfloat16)
assert step(7, layer, x.bfloat16()) == "nothing"
assert step(7, layer, x) == "cast"
assert layer(x).dtype == x.dtype

# %% [markdown]
# ## All at once
#
# The picture shows six calls with their seven steps; decisions that differ from the first call are coloured. One
# cause can change several steps: an input of another type changes steps 3, 4, 5 and 7.

# %%
lost = new_layer()
lost.weight = torch.nn.Parameter(lost.weight.data, requires_grad=False)
calls = {
    "one token": (new_layer(), one),
    "several": (new_layer(), several),
    "one, gradient\nwanted": (new_layer(), one.clone().requires_grad_()),
    "state lost": (lost, one),
    "compute dtype\nbfloat16": (new_layer(compute_dtype=torch.bfloat16), one),
    "bfloat16 input,\ncomputes\nin float32": (
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
# How long did a call take, and how exact was it? `explain` shows the trace, the error compared with 64-bit arithmetic,
# and the bytes that were moved. It reports the second call, because the first one may compile kernels and choose
# between them; for step 4 the layer forgets the first. (The times are those of the machine that made this page.)

# %% tags=["timing"]
report = refq4.explain(new_layer(), one)
assert report.error <= report.allowed
report

# %% [markdown]
# **Summary:** a call has seven steps, each with a decision that you can see and change. The three
# warnings are about step 4 (no precision was chosen) and step 6 (K is not a multiple of the blocksize; the weight was
# quantised as [in, out]).

# %% [markdown]
# ## Exercises
#
# Put your answer in place of each `...`, run the cell, and read what it says. The solutions are folded.
#
# **6.1** Name the paths of four calls on the reference, without a gradient: `x` of [1, 64], of [1, 1, 64] and of [2,
# 64] with a layer of 64 in_features, and `x` of [1, 100] with a layer of 100.

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
# **Next:** [the backward pass](07_backward_through_frozen_weights.ipynb)
