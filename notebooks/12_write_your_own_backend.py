# %% [markdown]
# # 12. Write your own backend
#
# **How little code is enough for a backend of your own?**
#
# - You will be able to write a backend in fifty lines, and check it with `verify`.
# - You need notebook 11. The notebook takes 20 minutes.
# - To run it yourself: `pip install -e '.[notebooks]'` in a checkout of refq4 ([how](README.md)).
#
# We write three functions in numpy: quantise, decode and multiply. After each one, `verify` checks it. The first
# attempts are those that most people would make, and they fail. The result is the backend of `docs/numpy_backend.py`;
# the last cell compares the two.
#
# `refq4/backend.py` describes what each op must return. The core checks all arguments and makes all decisions; a
# backend gets plain tensors, and computes.

# %%
import ast
import inspect
import textwrap
from pathlib import Path

import numpy as np
import torch

import refq4
from refq4.backend import Backend
from refq4.testing import verify
from support import errors

torch.set_num_threads(1)
history = {}


def ask(backend, step):
    refq4.register_backend(backend, replace=True)
    history[step] = verify(backend.name, depth="quick", progress=False)
    return history[step]


# %% [markdown]
# ## Nothing
#
# A class with only a name is already a backend. It can't compute anything yet, and says so: the base class finds out
# which ops a subclass has, and refuses the others by name.


# %%
class Nothing(Backend):
    name = "mine"


report = ask(Nothing(), "nothing")
assert not report.agrees  # refusing everything is no agreement
for check in report.checks[:3]:
    print(
        f"{check.name}: refused {check.refused.total()} times, because "
        f"{next(iter(check.refused))}"
    )

# %% [markdown]
# ## Quantise: the obvious way
#
# Divide each block by its largest magnitude, choose the nearest of the sixteen values, and put two codes into a byte.


# %%
class Obvious(Backend):
    name = "mine"

    def quantize_4bit(self, A, code, blocksize):
        x = blocks_of(A.reshape(-1).float().numpy(), blocksize)
        absmax = np.abs(x).max(axis=1)
        with np.errstate(all="ignore"):
            scaled = x / absmax[:, None]
        nearest = np.abs(scaled[..., None] - code.values.numpy()).argmin(axis=-1)
        codes = nearest.reshape(-1).astype(np.uint8)
        return torch.from_numpy(codes[1::2] << 4 | codes[0::2]), torch.from_numpy(
            absmax
        )


def blocks_of(flat, blocksize):
    """[blocks, blocksize], the last one filled up with zeros."""
    return np.append(flat, np.zeros(-len(flat) % blocksize, np.float32)).reshape(
        -1, blocksize
    )


def complaint(report, check):
    (failure,) = (f for f in report.failures if f.smallest.check == check)
    print(failure.smallest, failure.message, failure.hint, sep="\n")


complaint(ask(Obvious(), "quantise, obviously"), "quantize_4bit")

# %% [markdown]
# The report shows the smallest input that fails. There are two mistakes: the length of the result and, when this is
# fixed, the half of the byte in which the first code is stored. Fix one thing at a time.


# %%
class LongEnough(Obvious):
    def quantize_4bit(self, A, code, blocksize):
        packed, absmax = super().quantize_4bit(A, code, blocksize)
        return packed[: (A.numel() + 1) // 2], absmax


report = ask(LongEnough(), "as long as it must be")
complaint(report, "quantize_4bit")

# %% [markdown]
# ## Quantise: the rule
#
# "Nearest" does not say what happens on a border, in a block of zeros, or with a NaN. And dividing rounds differently
# from multiplying by the reciprocal. The rule of `refq4.codebooks` defines all of this: multiply by 1/absmax in fp32,
# clamp, and count the *thresholds* below the value. The thresholds are passed together with the code, so FP4, whose
# borders come from CUDA's source, needs no special case.


# %%
class Quantises(Backend):
    name = "mine"

    def quantize_blockwise(self, A, code, blocksize):
        x = blocks_of(A.reshape(-1).float().numpy(), blocksize)
        absmax = np.abs(x).max(axis=1, initial=0)
        with np.errstate(all="ignore"):
            inverse = np.float32(1) / absmax
            inverse = np.where(np.isfinite(inverse), inverse, np.float32(0))
            scaled = np.clip(x * inverse[:, None], np.float32(-1), np.float32(1))
        # thresholds below x; ties go down
        rank = np.searchsorted(code.thresholds.numpy(), scaled, side="left")
        rank[np.isnan(scaled)] = 0
        codes = code.order.numpy()[rank].reshape(-1)[: A.numel()]
        return torch.from_numpy(codes).view(A.shape), torch.from_numpy(absmax)

    def quantize_4bit(self, A, code, blocksize):
        codes, absmax = self.quantize_blockwise(A.reshape(-1), code, blocksize)
        codes = np.append(
            codes.numpy(), [np.uint8(code.zero_code())] * (A.numel() % 2)
        ).astype(np.uint8)
        return torch.from_numpy(codes[0::2] << 4 | codes[1::2]), absmax


report = ask(Quantises(), "quantise, by the rule")
done = {check.name: check for check in report.checks}
for name in ("quantize_4bit", "quantize_blockwise"):
    print(f"{name}: {done[name].same} of {done[name].cases} the same, bit for bit")
    assert done[name].same == done[name].cases

# %% [markdown]
# The 8-bit codes of double quantisation need no further function: they follow the same rule, with another code.
#
# ## Decode: the obvious way
#
# Unpack the codes, look them up, and multiply by the block's scale.


# %%
class DecodesPlain(Quantises):
    def dequantize_4bit(self, weight, dtype):
        packed, absmax = weight.packed.numpy(), weight.absmax.numpy()
        codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[
            : int(np.prod(weight.shape))
        ]
        scales = absmax.repeat(weight.blocksize)[: len(codes)]
        with np.errstate(all="ignore"):
            values = weight.code.numpy()[codes] * scales
        return torch.from_numpy(values).to(dtype).view(weight.shape)


complaint(ask(DecodesPlain(), "decode, obviously"), "dequantize_4bit")

# %% [markdown]
# The smallest input shows the reason: `nested=True`. With double quantisation the scales are also 8-bit codes, with
# their own scales and an offset (notebook 4).


# %%
class Decodes(Quantises):
    def dequantize_blockwise(self, q, absmax, code, blocksize, dtype):
        scales = absmax.numpy().repeat(blocksize)[: q.numel()]
        with np.errstate(all="ignore"):
            values = code.numpy()[q.reshape(-1).numpy()] * scales
        return torch.from_numpy(values).to(dtype).view(q.shape)

    def dequantize_4bit(self, weight, dtype):
        packed, absmax = weight.packed.numpy(), weight.absmax
        codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[
            : int(np.prod(weight.shape))
        ]
        # double quantisation: the scales are 8-bit codes with scales of their own
        if weight.nested is not None:
            second = weight.nested
            absmax = self.dequantize_blockwise(
                absmax, second.absmax, second.code, second.blocksize, torch.float32
            )
            absmax = absmax + second.offset
        flat = self.dequantize_blockwise(
            torch.from_numpy(codes), absmax, weight.code, weight.blocksize, dtype
        )
        return flat.view(weight.shape)


report = ask(Decodes(), "decode, nested too")
done = {check.name: check for check in report.checks}
for name in ("dequantize_4bit", "dequantize_blockwise", "embedding"):
    print(f"{name}: {done[name].same} of {done[name].cases} the same, bit for bit")
    assert done[name].same == done[name].cases

# %% [markdown]
# ## Multiply
#
# A product need not have the reference's bits; it must be within the error budget (notebook 11). If you decode to
# fp32, sum in fp32 and round once, the error is well within it. One token is not a special case for numpy, so both
# ops are one function.


# %%
class Multiplies(Decodes):
    def gemm_4bit(self, x, weight, bias):
        W = self.dequantize_4bit(weight, torch.float32).numpy()
        y = x.float().numpy() @ W.T
        return torch.from_numpy(y if bias is None else y + bias.float().numpy()).to(
            x.dtype
        )

    gemv_4bit = gemm_4bit


report = ask(Multiplies(), "multiply")
assert report.agrees
assert not any(check.refused for check in report.checks)
errors.scoreboard(history)

# %% [markdown]
# The checks *forward*, *backward* and *state dict* test a whole layer. We wrote no code for them: the core does
# everything with our three functions. This backend has no layout of its own, and does not need one.

# %% tags=["timing"]
report

# %% [markdown]
# ## In use
#
# From now on the name works like that of any other backend. `compare` runs a layer on several backends and shows the
# first step with different bits.

# %%
layer = refq4.nn.LinearNF4(256, 64).to("cpu").eval()
x = torch.randn(1, 256, generator=torch.Generator().manual_seed(12))
with refq4.use_backend("mine"), refq4.trace() as t:
    layer(x)
assert {op.backend for op in t.ops} == {"mine"}
print(*(f"{op.op} by {op.backend}" for op in t.ops), sep="\n")
comparison = refq4.compare(layer, x, backends=["reference", "mine"])
assert comparison.largest_difference("mine") < 1e-5

# %% [markdown]
# ## One backend, not two
#
# `docs/numpy_backend.py` is the same backend in one file; copy it to start your own. This cell reads both, and checks
# that they are the same program.


# %%
def programs(nodes):
    """name -> the function as a syntax tree: comments and blank lines don't count."""
    return {
        node.name: ast.dump(node) for node in nodes if isinstance(node, ast.FunctionDef)
    }


source = Path("../docs/numpy_backend.py").read_text()
module = ast.parse(source).body
(kept,) = (
    node
    for node in module
    if isinstance(node, ast.ClassDef) and node.name == "NumpyBackend"
)
functions = {
    f: None
    for some in (Quantises, Decodes, Multiplies)
    for f in vars(some).values()
    if inspect.isfunction(f)
}
mine = "".join(textwrap.dedent(inspect.getsource(f)) for f in [*functions, blocks_of])
built = programs(ast.parse(mine).body)
assert built == programs(kept.body) | {"blocks_of": programs(module)["blocks_of"]}
print(
    f"{len(built)} functions, {len(mine.splitlines())} lines, all of them those of "
    "docs/numpy_backend.py"
)
assert len(source.splitlines()) < 100

# %% [markdown]
# **Summary:** a backend is three functions in about fifty lines, and you need not write tests. Now
# replace one function at a time by your own kernel, and run `verify` again. If your backend can't run some calls, say
# so in `can_run`. `docs/write-a-backend.md` continues with packages, your own layouts and your CI.

# %% [markdown]
# ## Exercises
#
# Put your answer in place of each `...`, run the cell, and read what it says. The solutions are folded.
#
# **12.1** Write `gemv_4bit` for x [1, K], a weight with plain scales, and a bias [N] or None. `verify` tests it with
# forty cases.

# %% tags=["exercise"]
from support import exercises


def gemv(x, weight, bias): ...


exercises.check("12.1", gemv)

# %% [markdown]
# <details><summary>A solution to 12.1</summary>
#
# ```python
# import torch
#
#
# def gemv(x, weight, bias):
#     codes = torch.stack([weight.packed >> 4, weight.packed & 15], 1).flatten().long()
#     scales = weight.absmax.repeat_interleave(weight.blocksize)
#     count = weight.shape[0] * weight.shape[1]
#     W = (weight.code[codes[:count]] * scales[:count]).view(weight.shape)
#     y = torch.nn.functional.linear(x.float(), W, None if bias is None else bias.float())
#     return y.to(x.dtype)
# ```
#
# </details>

# %% [markdown]
# **12.2** A backend has a bug, and `verify` names it. First give any wrong answer and read the message.
# Then answer with the word that names the cause: "offset", "nibbles", "bias" or "scale".

# %% tags=["exercise"]
answer = ...
exercises.check("12.2", answer)

# %% [markdown]
# <details><summary>A solution to 12.2</summary>
#
# ```python
# answer = "nibbles"
# ```
#
# </details>

# %% [markdown]
# **Next:** [a real model](13_a_real_model.ipynb); and [write a backend](../docs/write-a-backend.md), for packages and
# your CI
