"""Which modules are linear layers, and which of those a model does more with than to call them.

One answer for a model in memory, one that transformers loads, and one on disk.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn

__all__ = ["as_linear", "is_conv1d", "is_linear", "nearest", "read_by_owner"]

# Subclasses that models have for themselves, and that compute what nn.Linear does.
_OWN_CLASSES = ("FalconLinear",)

# Class of the owner -> layers whose weight its code reads as a matrix, or writes, which packed bytes are not.
_READ = {
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "DetrMHAttentionMap": ("k_proj",),
    "DisentangledSelfAttention": ("in_proj",),
    "FalconMambaMixer": ("dt_proj",),
    "JambaMambaMixer": ("dt_proj",),
    "MambaMixer": ("dt_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "MobileBertLMPredictionHead": ("dense",),
    "RwkvFeedForward": ("value",),
    "RwkvSelfAttention": ("output",),
    "WavLMAttention": ("k_proj", "v_proj", "q_proj", "out_proj"),
}


# The same for layers to whose dtype the code casts their input, which of packed bytes is uint8.
_CAST_TO = {
    "AXK2Indexer": ("weights_proj",),
    "DeepseekV32Indexer": ("weights_proj",),
    "Dots3NoteTextIndexer": ("weights_proj",),
    "Glm5NextTextIndexer": ("weights_proj",),
    "GlmMoeDsaIndexer": ("weights_proj",),
    "HYV4Indexer": ("weights_proj",),
    "HYV4VLIndexer": ("weights_proj",),
    "Kosmos2_5VisionMlp": ("wo",),
    "LongT5DenseActDense": ("wo",),
    "LongT5DenseGatedActDense": ("wo",),
    "MistralLarge4TextIndexer": ("weights_proj",),
    "NllbMoeDenseActDense": ("fc2",),
    "PocketTTSModel": ("audio_latent_proj", "audio_prompt_proj"),
    "SeamlessM4TFeedForwardNetwork": ("fc2",),
    "SeamlessM4Tv2FeedForwardNetwork": ("fc2",),
    "SwitchTransformersDenseActDense": ("wo",),
}


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a full-precision linear layer that a 4-bit one can stand for.

    Other subclasses of ``nn.Linear`` are not: their owners use them in ways of their own.

    Example:
        >>> is_linear(nn.Linear(8, 8)), is_linear(nn.MultiheadAttention(8, 1).out_proj)
        (True, False)
    """
    return type(module) is nn.Linear or (isinstance(module, nn.Linear) and type(module).__name__ in _OWN_CLASSES)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``, GPT-2's linear layer, whose weight is stored as [K, N].

    Example:
        >>> is_conv1d(nn.Linear(8, 8))
        False
    """
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def as_linear(module: nn.Module) -> nn.Linear | None:
    """A module as the full-precision ``nn.Linear`` that it is or stands for; None if it is none.

    Example:
        >>> layer = nn.Linear(8, 4)
        >>> as_linear(layer) is layer, as_linear(nn.ReLU())
        (True, None)
    """
    if isinstance(module, nn.Linear):
        return module
    if not is_conv1d(module):
        return None
    parameters = dict(module.named_parameters(recurse=False))
    k, n = parameters["weight"].shape
    linear = nn.Linear(k, n, device="meta", dtype=parameters["weight"].dtype)
    linear.weight = nn.Parameter(parameters["weight"].detach().T.contiguous(), requires_grad=False)
    linear.bias = parameters["bias"]
    return linear.train(module.training)


def read_by_owner(model: nn.Module) -> dict[str, str]:
    """Names of the layers whose weight is read or written by the code of the module around them, each with the reason.

    Example:
        >>> read_by_owner(nn.Sequential(nn.Linear(8, 8)))
        {}
    """
    return {
        f"{name}.{child}".removeprefix("."): f"its weight {reads} by the {type(module).__name__} around it"
        for table, reads in ((_READ, "is read as a matrix"), (_CAST_TO, "has its dtype read"))
        for name, module in model.named_modules()
        for child in table.get(type(module).__name__, ())
        if hasattr(module, child)
    }


def nearest(wanted: str, names: Iterable[str]) -> str:
    """A hint at the part of a dotted name that comes nearest to what was written; empty if none does.

    Example:
        >>> nearest("lm_haed", ["model.layers.0.q_proj", "lm_head"])
        '; did you mean lm_head?'
    """
    parts = dict.fromkeys(part for name in names for part in (name, *name.split(".")))
    near = difflib.get_close_matches(wanted, parts, n=1)
    return f"; did you mean {near[0]}?" if near else ""
