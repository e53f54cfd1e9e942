# %% [markdown]
# # 11. Do they agree?
#
# **Two backends give different numbers. Is one of them wrong?**
#
# - You will be able to distinguish a rounding difference from a bug, and find the smallest input that fails.
# - You need notebook 6. The notebook takes 15 minutes.
# - To run it yourself: `pip install -e '.[notebooks]'` in a checkout of refq4 ([how](README.md)).
#
# The plain reference, the C kernels, the CUDA kernels and bitsandbytes all multiply by the same 4-bit weight, and
# hardly two of them give the same bits. Some differences are necessary; others would be bugs. This notebook shows how
# to distinguish them, and then plants a bug and finds it.

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
    ["backend", "here", "why not"],
    [[i["name"], "yes" if i["available"] else "no", i["reason"] or ""] for i in infos],
)

# %% [markdown]
# ## What must be the same, bit for bit
#
# Codes, packed bytes, scales and decoded weights must have the same bits on every backend. `code * absmax` is one
# multiplication and one rounding, so every backend must get the same number.

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
print(f"{decoded.numel():,} weights: the same bits from every backend")

# %% [markdown]
# ## What can't be the same
#
# A product is a sum of 1,024 terms, and every addition is rounded. So another order of the terms gives another
# result. The picture shows one output, with its terms added in 400 different orders, and the results of the backends.

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
# No result is exact, and none is wrong. So we can't compare the bits of products. What can we compare?
#
# ## Units in the last place
#
# The distance between neighbouring numbers of a dtype is one unit in the last place (ulp). If the exact result is
# rounded once, the error is at most half a unit. How large is the error of each backend, in three dtypes?

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
# In bf16 and fp16, most of the error comes from the rounding at the end; kernels that keep their weights in fp32 are
# closer to the exact result than the reference, which rounds each weight. In fp32, the error comes from the
# additions.
#
# We could allow a fixed number of units, for example eight. But look at the results that exceed this limit.

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
# If large terms cancel, the output is small, but it has the rounding errors of large numbers, and its own unit is
# very small. So an error that is normal for this call can be many units. Therefore the error budget allows twice the
# largest error that the *reference* makes in the same call, plus one unit for the rounding at the end. If a plain loop
# over k errs more than the reference, which adds in many partial sums, the loop's error counts: it is right, too.

# %%
allowed = 2 * distance.max() + ulp(budget.oracle, torch.float32)
assert (budget.allowed >= allowed).all()
assert (budget.allowed < 10 * allowed).all()  # a plain loop is no worse than that
for name, product in products.items():
    budget.check(product, what=name)  # raises if one element errs more
print("every backend is within the budget")

# %% [markdown]
# ## A test that can't fail
#
# It matters how a comparison is written, not only which limit it has. If a kernel writes nothing, the result may
# contain NaN:

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
# Every comparison with NaN is false, so the first comparison, which is the usual one, finds no error. The second
# comparison has the same limit, but checks that every difference is within it.
#
# ## 400 test cases
#
# `verify` tests a backend with sizes at which kernels often fail: one and its neighbours, the edges of tiles and
# vectors, blocks that straddle rows. The picture shows how much of its budget each backend uses.

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
# This kernel computes eight elements at a time. It has a separate path for short rows, but in long rows it forgets
# the remaining elements at the end.


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
# The test above does not find the bug: 1,024 is a multiple of eight, like most sizes that people try. `verify` tries
# other sizes.

# %%
found = verify("tailless", depth="quick", checks=("gemm_4bit",), progress=False)
assert not found.agrees
(failure,) = found.failures
print("met:     ", failure.met)
print("smallest:", failure.smallest)
print(failure.message)
print(failure.hint)

# %% [markdown]
# `verify` found the bug in one case, and then tried smaller cases, field by field, as long as they
# failed. The smallest case has one token, one output, nine elements, weights that are a ramp, and activations that
# are ones. The wrong numbers are the same as without the tail of each row, so the report names this bug. At the end
# it prints a program that shows the failure again. (With such a small input, another bug would give the same numbers,
# so the program's output names it as well; the report above used the larger case.)

# %%
print(failure.snippet())
print("---")
exec(failure.snippet())

# %% [markdown]
# **Summary:** compare bits where all backends must agree. For products, compare with a budget that is
# measured with the reference. Test sizes at the edges, and let the report say what to look for. Notebook 12 tests
# your own backend in the same way.

# %% [markdown]
# ## Exercises
#
# Put your answer in place of each `...`, run the cell, and read what it says. The solutions are folded.
#
# **11.1** Compare two tensors: return True if no element differs by more than `allowed`. A NaN must not pass.

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
