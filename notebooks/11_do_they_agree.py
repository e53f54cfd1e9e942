# %% [markdown]
# # 11. Do they agree?
#
# **Two engines give different numbers. Is one of them wrong?**
#
# - You will be able to tell a rounding difference from a bug, and get a failing input down to its smallest form.
# - It needs notebook 6. It takes 15 minutes.
# - To run it yourself: `pip install -e '.[notebooks]'` in a checkout of refq4 ([how](README.md)).
#
# A plain reference, C kernels, CUDA kernels, bitsandbytes: they all multiply by the same 4-bit weight, and hardly two
# give the same bits. Some of that is as it must be, some of it would be a bug. This notebook tells one from the other,
# and then plants a bug to see it found.

# %% tags=["timing"]
import numpy as np
import torch

import refq4
from refq4.functional import dequantize_4bit, matmul_4bit, quantize_4bit
from refq4.reference import ReferenceBackend
from refq4.testing import (
    assert_same_bits,
    catalogue,
    check,
    error_budget,
    oracle,
    ulp,
    verify,
)
from support import errors, picture

torch.set_num_threads(1)
infos = [refq4.backend_info(name) for name in refq4.list_backends()]
engines = [
    info["name"] for info in infos if info["available"] and "cpu" in info["devices"]
]
engines.sort(key=lambda name: name != "reference")
picture.table(
    ["engine", "here", "why not"],
    [[i["name"], "yes" if i["available"] else "no", i["reason"] or ""] for i in infos],
)

# %% [markdown]
# ## What must be the same, bit for bit
#
# Codes, packed bytes, scales, and decoded weights: `code * absmax` is one multiplication and one rounding, and nobody
# has an excuse to get another number.

# %%
generator = torch.Generator().manual_seed(11)
W = torch.randn(256, 1024, generator=generator) / 32
B, state = quantize_4bit(W, quant_type="nf4", backend="reference")
decoded = dequantize_4bit(B, state, backend="reference")
for name in engines:
    assert_same_bits(
        quantize_4bit(W, quant_type="nf4", backend=name)[0],
        B,
        what=f"packed bytes of {name}",
    )
    assert_same_bits(
        dequantize_4bit(B, state, backend=name),
        decoded,
        what=f"decoded weight of {name}",
    )
print(f"{decoded.numel():,} weights: the same bits from every engine")

# %% [markdown]
# ## What can't be
#
# A product is a sum of 1,024 terms, and every addition rounds. Another order, another result. Here is one output, its
# terms added up in 400 orders, and where the engines' results lie.

# %% tags=["timing"]
x = torch.randn(4, 1024, generator=generator)
# in fp64, from the decoded weight: what an exact engine would give
exact = oracle(x, B, state)
terms = (x[0] * decoded[0]).numpy()
shuffled = [
    terms[torch.randperm(1024, generator=generator).numpy()] for _ in range(400)
]
# one after the other, in fp32
orders = np.array([np.add.accumulate(some)[-1] for some in shuffled])
products = {name: matmul_4bit(x, B, state, backend=name) for name in engines}
for name, product in products.items():
    same = float((product == products["reference"]).float().mean())
    print(f"{name}: {same:.0%} of the outputs have the reference's bits")
errors.many_orders(
    orders, float(exact[0, 0]), {name: float(y[0, 0]) for name, y in products.items()}
)

# %% [markdown]
# None is exact, and none is wrong. So a product can't be held to bits. What else?
#
# ## Units in the last place
#
# The distance between neighbouring numbers is one unit in the last place. Rounding the exact result once costs at most
# half of one. How far off is each engine, in three dtypes?

# %% tags=["timing"]
units = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    y_exact = oracle(x.to(dtype), B, state)
    units[str(dtype).removeprefix("torch.")] = {
        name: (
            matmul_4bit(x.to(dtype), B, state, backend=name).double() - y_exact
        ).abs()
        / ulp(y_exact, dtype)
        for name in engines
    }
errors.ulp_histograms(units)

# %% [markdown]
# In bf16 and fp16 one rounding at the end is most of the error; kernels that keep their weights in fp32 until then are
# closer than the reference, which rounds each weight. In fp32 it is all additions.
#
# It would be tempting to draw a line: eight units, say. But look at who crosses it.

# %% tags=["timing"]
budget = error_budget(x, B, state)
got = products["reference"].double()
distance = (got - budget.oracle).abs()
in_units = distance / ulp(budget.oracle, torch.float32)
worst = int(in_units.argmax())
print(
    f"{float(in_units.flatten()[worst]):,.0f} units off is an output of "
    f"{float(exact.flatten()[worst]):.1e}"
)
errors.against_size(budget.oracle, distance, in_units, budget.allowed)

# %% [markdown]
# Where large terms cancel, a small output carries the rounding errors of large numbers, and its own unit is tiny. The
# error itself knows nothing of that. So the budget allows twice the largest error that the *reference* makes in the
# same call, plus one unit for the rounding at the end.

# %%
allowed = 2 * distance.max() + ulp(budget.oracle, torch.float32)
assert torch.allclose(allowed, budget.allowed, rtol=1e-12)
for name, product in products.items():
    budget.check(product, what=name)  # raises if one element errs more
print("every engine is within the budget")

# %% [markdown]
# ## A test that can't fail
#
# How a comparison is written matters as much as its limit. A kernel that writes nothing, not even zeros, may leave NaN
# behind:

# %%
broken = products["reference"].clone()
broken[2, 7] = float("nan")
difference = (broken.double() - budget.oracle).abs()
print("difference > allowed anywhere?", bool((difference > budget.allowed).any()))
print(
    "not (difference <= allowed) anywhere?",
    bool((~(difference <= budget.allowed)).any()),
)
try:
    budget.check(broken, what="broken")
except AssertionError as error:
    print(error)

# %% [markdown]
# Every comparison with NaN is false, so the first question, the usual one, finds nothing. The second is the same limit,
# asked the other way round.
#
# ## 400 questions
#
# `verify` asks an engine about sizes at which kernels break: one and its neighbours, the edges of tiles and vectors,
# blocks that straddle rows. And how much of their budget do engines use?

# %% tags=["timing"]
asked = "cpu" if "cpu" in engines else "reference"
report = verify(asked, depth="quick", progress=False)
assert report.agrees
report

# %% tags=["timing"]
cases = catalogue(("gemv_4bit", "gemm_4bit"), "quick")
used = {
    name: [check(case, name).error for case in cases] for name in ("reference", asked)
}
assert all(0 <= share <= 1 for row in used.values() for share in row)
errors.shares(used)

# %% [markdown]
# ## A bug
#
# A kernel takes eight elements at a time. It has a path of its own for short rows, but in long ones it forgets what is
# left over at the end.


# %%
class Tailless(ReferenceBackend):
    name = "tailless"

    def gemm_4bit(self, x, weight, bias):
        K = weight.shape[1]
        done = K if K < 8 else K // 8 * 8
        W = self.dequantize_4bit(weight, x.dtype)
        return torch.nn.functional.linear(x[:, :done], W[:, :done], bias)

    gemv_4bit = gemm_4bit


refq4.register_backend(Tailless())
# K = 1024: nothing is left over
budget.check(matmul_4bit(x, B, state, backend="tailless"), what="tailless")

# %% [markdown]
# The test above finds nothing: 1,024 is a multiple of eight, as all sizes are that come to mind. `verify` tries others.

# %%
found = verify("tailless", depth="quick", checks=("gemm_4bit",), progress=False)
assert not found.agrees
(failure,) = found.failures
print("met:     ", failure.met)
print("smallest:", failure.smallest)
print(failure.message)
print(failure.hint)

# %% [markdown]
# From the case in which the bug was met it went on to smaller ones, field by field, for as long as they failed: one
# token, one output, nine elements, weights that are a ramp and activations that are ones. And because the wrong numbers
# are just what comes out if the tail of each row is missing, the report says so. What it prints at last is a program
# that shows it again. (On so small an input another bug would give the same numbers, and is named, too; the report
# above looked at the larger one.)

# %%
print(failure.snippet())
print("---")
exec(failure.snippet())

# %% [markdown]
# **So:** bits where nothing can differ, a budget that is measured where something must, questions at the edges, and an
# answer that says what to look for. Your own engine is asked in the same way: notebook 12.

# %% [markdown]
# ## Exercises
#
# Put your answer in place of each `...`, run the cell, and read what it says. The solutions are folded.
#
# **11.1** Compare two tensors: True if they differ nowhere by more than `allowed`. A NaN must not pass.

# %% tags=["exercise"]
from support import exercises


def agrees(got, wanted, allowed): ...


exercises.check("11.1", agrees)

# %% [markdown]
# <details><summary>A solution to 11.1</summary>
#
# ```python
# def agrees(got, wanted, allowed):
#     return bool(((got - wanted).abs() <= allowed).all())
# ```
#
# </details>

# %% [markdown]
# **11.2** How large is a unit in the last place of bfloat16 at 3.0?

# %% tags=["exercise"]
answer = ...
exercises.check("11.2", answer)

# %% [markdown]
# <details><summary>A solution to 11.2</summary>
#
# ```python
# answer = 2 ** (1 - 7)  # 3 lies between 2 and 4, and 7 bits follow the leading one
# ```
#
# </details>

# %% [markdown]
# **Next:** [write your own backend](12_write_your_own_backend.ipynb)
