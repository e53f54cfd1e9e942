# %% [markdown]
# # 7. Backward through frozen weights
#
# **How can a model learn if its weights can't change?**
#
# - You will be able to compute a gradient through frozen weights, check it, and train LoRA adapters beside them.
# - You need notebook 6, and to know the chain rule. The notebook takes 20 minutes.
# - To run it yourself: `pip install -e '.[notebooks]'` in a checkout of refq4 ([how](README.md)).
#
# A weight of 4 bits can't be trained: a step of gradient descent is far smaller than the distance from one of the
# sixteen values to the next. QLoRA trains something else. It freezes the 4-bit weights, puts small trainable matrices
# (LoRA, low-rank adaptation) beside them, and computes gradients *through* the frozen weights. This notebook does all
# of this.
#
# ## What backward has to compute
#
# The forward pass is $y = x W^\top + b$. From the gradient $g_y$ of the loss with respect to $y$, the chain rule
# gives three more:
#
# $$g_x = g_y W, \qquad g_b = \textstyle\sum g_y,$$
#
# $$g_W = g_y^\top x.$$
#
# `MatMul4Bit` computes only the first two. The third one is expensive, and training adapters does not need it. For
# $g_x$ the weight is decoded a second time.

# %%
import torch

import refq4
from refq4.autograd import MatMul4Bit
from refq4.functional import dequantize_4bit, quantize_4bit
from support import picture
from support.material import QUERY, encoder_inputs, encoder_linear

linear = encoder_linear(QUERY)
layer = refq4.nn.Linear4bit.from_linear(linear, quant_type="nf4").train()
tokens, x = encoder_inputs("The quick brown fox jumps over the lazy dog.")
x.requires_grad_()

with refq4.trace() as record:
    y = layer(x)
g_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
y.backward(g_y)
print("step 6:", record.calls[0].steps[5].choice)

W4 = dequantize_4bit(layer.weight, layer.quant_state)
assert torch.allclose(x.grad, g_y @ W4, rtol=1e-4, atol=1e-5)
assert layer.weight.grad is None
assert not layer.weight.requires_grad
print("gradient of x: that of the decoded weights. Gradient of the weights: none.")

# %% [markdown]
# So the gradient is exact *for the 4-bit layer*. Compared with the layer before quantising, it has an error like that
# of the outputs in notebook 1, and nearly the same direction:

# %%
exact = g_y @ linear.weight
cosine = torch.nn.functional.cosine_similarity(
    x.grad.flatten(), exact.flatten(), dim=0
).item()
print(f"cosine of the two gradients {cosine:.4f}")
assert cosine > 0.99

figure, axes = picture.canvas(height=3.2)
axes.axline((0, 0), slope=1, color=picture.GREY, linewidth=1)
axes.plot(
    exact.flatten(),
    x.grad.flatten(),
    ".",
    color=picture.BLUE,
    markersize=2.5,
    alpha=0.6,
)
axes.set(
    xlabel="gradient through 32-bit weights",
    ylabel="through 4-bit weights",
    aspect="equal",
    anchor="W",
)
picture.show(
    figure,
    "Gradients of the input through 4-bit weights against those through the original: "
    "along the diagonal.",
)

# %% [markdown]
# ## Is it the right derivative?
#
# `torch.autograd.gradcheck` checks our formula. It moves each input a little up and down, observes how the output
# changes, and compares this with the result of backward. It computes in 64 bits, because the difference of two nearly
# equal numbers has few correct digits.

# %%
W = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
packed, state = quantize_4bit(W, quant_type="nf4")
inputs = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
bias = torch.randn(6, dtype=torch.float64, requires_grad=True)

assert torch.autograd.gradcheck(
    lambda a, b: MatMul4Bit.apply(a, packed, None, b, state), (inputs, bias)
)
print(
    "backward is the derivative of forward, for all",
    inputs.numel() + bias.numel(),
    "inputs",
)

# %% [markdown]
# A check is only useful if it can fail. Here is the same check of a backward that is wrong by one per cent:


# %%
class OnePercentOff(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        return a @ dequantize_4bit(packed, state).double().t()

    @staticmethod
    def backward(ctx, g):
        return 1.01 * g @ dequantize_4bit(packed, state).double()


try:
    torch.autograd.gradcheck(OnePercentOff.apply, (inputs,))
except RuntimeError as error:
    print(str(error).splitlines()[0])
else:
    raise AssertionError("gradcheck did not notice")

# %% [markdown]
# ## What is kept for the backward pass
#
# Between forward and backward, autograd keeps the tensors that backward will need. For $g_x$ this is the weight. An
# ordinary layer keeps 32 bits for each weight; a 4-bit layer keeps the packed bytes and the scales, which it has
# anyway. No decoded weight is kept, and neither is the input: only $g_W$ would need it. PyTorch can show us what it
# keeps:


# %%
def kept_by(layer, x):
    """The bytes of the tensors that autograd keeps for backward."""
    kept = {}

    def note(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    assert x.data_ptr() not in kept
    return sum(kept.values())


kept = {"ordinary layer, frozen": kept_by(linear, x), "4-bit layer": kept_by(layer, x)}
print(kept)
packed_and_scales = 384 * 384 // 2 + layer.quant_state.nbytes()
assert kept == {
    "ordinary layer, frozen": 384 * 384 * 4,
    "4-bit layer": packed_and_scales,
}

figure, axes = picture.canvas(height=1.4)
axes.barh(
    list(kept),
    [size / 1e3 for size in kept.values()],
    color=[picture.VERMILION, picture.BLUE],
)
axes.set(xlabel="kB kept between forward and backward")
axes.grid(axis="y", visible=False)
picture.show(
    figure,
    "Two bars: the ordinary layer keeps 590 kB for backward, the 4-bit layer 77.",
)

# %% [markdown]
# ## Something to fine-tune
#
# This is a very small language model: it reads 24 bytes of text and predicts the next byte. It is trained for some
# seconds on a real text that comes with Python, the reference pages that `help()` shows. (The text depends on the
# version of Python, so the tests do not compare the digits of these cells.)

# %% tags=["timing"]
import copy
from pydoc_data import topics

CONTEXT, WIDTH = 24, 256


class ByteModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(256, 32)
        self.read = torch.nn.Linear(CONTEXT * 32, WIDTH)
        self.think = torch.nn.Linear(WIDTH, WIDTH)
        self.say = torch.nn.Linear(WIDTH, 256)

    def forward(self, bytes_before):
        h = torch.nn.functional.gelu(self.read(self.embed(bytes_before).flatten(1)))
        return self.say(h + torch.nn.functional.gelu(self.think(h)))


def windows(text):
    """Every piece of 25 bytes: 24 to read, one to foretell."""
    return torch.tensor(list(text)).unfold(0, CONTEXT + 1, 1)


def loss_on(model, pieces):
    return torch.nn.functional.cross_entropy(model(pieces[:, :-1]), pieces[:, -1])


def train(model, pieces, steps, rate):
    """Adam on whatever is not frozen, the rate falling to zero; returns the losses."""
    parameters = [
        parameter for parameter in model.parameters() if parameter.requires_grad
    ]
    optimiser = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimiser, 1.0, 0.02, total_iters=steps
    )
    draw = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        loss = loss_on(
            model, pieces[torch.randint(len(pieces), (128,), generator=draw)]
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    return losses


torch.manual_seed(0)
pages = "\n".join(topics.topics[name] for name in sorted(topics.topics))
manual = pages.encode()[:200_000]
base = ByteModel()
losses = train(base, windows(manual), steps=150, rate=3e-3)
print(
    f"{sum(p.numel() for p in base.parameters()):,} parameters; loss {losses[0]:.2f} "
    f"-> {losses[-1]:.2f}"
)
assert losses[-1] < 3 < losses[0]

# %% [markdown]
# ## LoRA in six lines
#
# Beside each frozen matrix $W$ there are two thin matrices, and the layer computes $x W^\top + x A^\top B^\top$. $A$
# has 8 rows and $B$ has 8 columns. $B$ begins with zeros, so at first the output does not change. If the frozen layer
# has 4 bits, this is QLoRA.


# %%
class LoRA(torch.nn.Module):
    def __init__(self, frozen, rank=8):
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.A = torch.nn.Parameter(
            torch.randn(rank, frozen.in_features) / frozen.in_features**0.5
        )
        self.B = torch.nn.Parameter(torch.zeros(frozen.out_features, rank))

    def forward(self, x):
        return self.frozen(x) + x @ self.A.t() @ self.B.t()


def with_adapters(model, four_bits):
    model = copy.deepcopy(model).requires_grad_(False)
    if four_bits:
        refq4.quantize_model(model, quant_type="nf4", progress=False)
    torch.manual_seed(1)
    for name in ("read", "think", "say"):
        setattr(model, name, LoRA(getattr(model, name)))
    return model


# %% [markdown]
# The text to learn is the Zen of Python, which `import this` prints. We train twice: once with frozen weights of 32
# bits, once with 4 bits.

# %% tags=["timing"]
import codecs
import contextlib
import io

with contextlib.redirect_stdout(io.StringIO()):
    import this

zen = codecs.decode(this.s, "rot13").encode()
pieces = windows(b" " * CONTEXT + zen)

models = {
    "LoRA on 32 bits": with_adapters(base, four_bits=False),
    "LoRA on 4 bits": with_adapters(base, four_bits=True),
}
before = {name: loss_on(model, pieces).item() for name, model in models.items()}
frozen = models["LoRA on 4 bits"].read.frozen.weight.clone()
curves = {
    name: train(model, pieces, steps=200, rate=1e-2) for name, model in models.items()
}
after = {name: loss_on(model, pieces).item() for name, model in models.items()}

assert torch.equal(models["LoRA on 4 bits"].read.frozen.weight, frozen)
assert all(after[name] < 0.1 < 2 < before[name] for name in models)
picture.table(
    ["", "loss before", "loss after"],
    [[name, f"{before[name]:.3f}", f"{after[name]:.3f}"] for name in models],
)

# %% tags=["timing"]
figure, axes = picture.canvas(height=3.2)
axes.axhline(
    before["LoRA on 4 bits"],
    color=picture.GREY,
    linestyle="dashed",
    label="4 bits, no adapters",
)
for (name, losses), colour, style in zip(
    curves.items(), (picture.VERMILION, picture.BLUE), ("-", "--"), strict=True
):
    axes.plot(losses, color=colour, linestyle=style, label=name)
axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
axes.legend()
picture.show(
    figure,
    "Loss against step: with adapters it falls from above 2 to near 0, on 4-bit "
    "weights as on 32-bit ones.",
)

# %% [markdown]
# The two curves are almost the same: the adapters learn the text beside 4-bit weights as well as beside 32-bit
# weights, and no bit of the 4-bit weights has changed. How do the models continue three words?


# %% tags=["timing"]
def go_on(model, text, count):
    text = b" " * CONTEXT + text
    with torch.no_grad():
        for _ in range(count):
            text += bytes(
                [model(torch.tensor([list(text[-CONTEXT:])])).argmax().item()]
            )
    return text[CONTEXT:].decode(errors="replace")


print("before:", go_on(base, b"Beautiful is better", 60).strip(), "\n")
print("after: ", go_on(models["LoRA on 4 bits"], b"Beautiful is better", 120))
assert "Simple is better than complex." in go_on(
    models["LoRA on 4 bits"], b"Beautiful is better", 120
)

# %% [markdown]
# ## What it saves
#
# Training needs memory not only for weights. For each trained weight there are also a gradient and two running means
# that Adam keeps: together with the weight, these are four fp32 numbers, or 16 bytes per weight. Frozen weights need
# only their own bytes. We count the memory for this model:

# %%
learning = sum(
    p.numel() for p in models["LoRA on 4 bits"].parameters() if p.requires_grad
)
matrices = sum(getattr(base, name).weight.numel() for name in ("read", "think", "say"))
packed_bytes = sum(
    module.weight.nbytes + module.quant_state.nbytes()
    for module in models["LoRA on 4 bits"].modules()
    if isinstance(module, refq4.nn.Linear4bit)
)
bars = {
    "all weights learn": (4 * matrices, 12 * matrices),
    "LoRA on 32 bits": (4 * matrices, 16 * learning),
    "LoRA on 4 bits (QLoRA)": (packed_bytes, 16 * learning),
}
for name, parts in bars.items():
    print(f"{name}: {sum(parts):,} bytes")

figure, axes = picture.canvas(height=1.9)
for row, parts in enumerate(bars.values()):
    axes.barh(
        row,
        parts[0] / 1e6,
        color=picture.BLUE,
        height=0.6,
        label="the matrices" if row == 0 else None,
    )
    axes.barh(
        row,
        parts[1] / 1e6,
        left=parts[0] / 1e6,
        color=picture.VERMILION,
        height=0.6,
        label="what learning adds" if row == 0 else None,
    )
axes.set(yticks=range(3), yticklabels=bars, xlabel="MB")
axes.invert_yaxis()
axes.grid(axis="y", visible=False)
figure.legend(loc="outside upper right", ncols=2)
picture.show(
    figure,
    "Memory to train: full training by far the most, LoRA less than a third, QLoRA a "
    "fraction of that.",
)

# %% [markdown]
# In such a small model, the adapters of rank 8, with their gradients and means, take more memory than the packed
# matrices. Matrices grow with the square of the width, adapters only with the width: in a layer of 4096 × 4096,
# adapters of rank 8 have 0.4 % of the number of weights.
#
# **Summary:** the weights stay frozen, the gradient is computed through them by decoding them once more, and only a
# few small matrices in full precision are trained.

# %% [markdown]
# ## Exercises
#
# Put your answer in place of each `...`, run the cell, and read what it says. The solutions are folded.
#
# **7.1** Compute the gradient of the input from the gradient of the output [M, N] and the layer.

# %% tags=["exercise"]
from support import exercises


def gradient(grad_y, layer): ...


exercises.check("7.1", gradient)

# %% [markdown]
# <details><summary>A solution to 7.1</summary>
#
# ```python
# from refq4.functional import dequantize_4bit
#
#
# def gradient(grad_y, layer):
#     return grad_y @ dequantize_4bit(layer.weight, layer.quant_state)
# ```
#
# </details>

# %% [markdown]
# **7.2** LoRA of rank 8 beside a layer of 384 in_features and 1536 out_features: how many numbers are trained?

# %% tags=["exercise"]
answer = ...
exercises.check("7.2", answer)

# %% [markdown]
# <details><summary>A solution to 7.2</summary>
#
# ```python
# answer = 8 * 384 + 1536 * 8
# ```
#
# </details>

# %% [markdown]
# **Next:** [one token or many](08_one_token_or_many.ipynb)
