"""Prepare the weights of a whole model for inference before its first call, and restore them.

    refq4.prepare(model)     each 4-bit layer's weight in the layout that the backend in effect reads fastest
    refq4.restore(model)     the stored bytes again

You need not call these: the first inference of a layer prepares it, and code that reads its weight restores it. Call
them to choose the moment: before a model is compiled or measured, or before another program reads it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..internals.grouped import own_layout
from ..internals.holder import Holds4bitWeight
from ..internals.prepared import MOST_RESTORES, Preparable
from ..nn import Embedding4bit, Linear4bit
from ..nn.parametrize import held_4bit
from ..pipeline import choose_layout, recover_quant_state
from ..registry import requested_backend
from .experts import IMPLEMENTATION

__all__ = ["prepare", "restore"]


def prepare(model: nn.Module) -> int:
    """Prepare every 4-bit layer of a model that is in evaluation mode, and its packed experts.

    A layer that inference would leave as it is stored (something else owns its weight, or the backend has no layout of
    its own, or the weight is a table as well) stays so. One that was restored too often for inference to prepare it
    again is prepared.

    Returns:
        How many weights are prepared now, of layers and of experts.

    Raises:
        RuntimeError: a layer has not been quantised.

    Example:
        >>> import refq4
        >>> model = nn.Sequential(refq4.nn.LinearNF4(64, 8)).to("cpu").eval()
        >>> with refq4.use_backend("reference"):
        ...     refq4.prepare(model)
        0
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, Embedding4bit)}
    for layer in _layers(model):
        state, _ = recover_quant_state(layer)
        weight = layer.weight
        if isinstance(weight, Preparable):
            weight._restores = MOST_RESTORES if id(weight) in tables else 0
        x = torch.empty(1, layer.in_features, dtype=layer.compute_dtype or torch.float32, device=weight.device)
        choose_layout(layer, state, x)
    for held in _experts(model):
        held.original._restores = 0
        x = torch.empty(1, held.quant_state.shape[-1], dtype=held.quant_state.dtype, device=held.original.device)
        own_layout(held.original, held.quant_state, x, requested_backend(None))
    weights = [layer.weight for layer in _layers(model)] + [held.original for held in _experts(model)]
    return sum(isinstance(weight, Preparable) and weight.prepared for weight in weights)


def restore(model: nn.Module) -> int:
    """Give every layer of a model, and its packed experts, their stored bytes back.

    Returns:
        How many were prepared.

    Example:
        >>> import refq4
        >>> refq4.restore(nn.Sequential(refq4.nn.LinearNF4(64, 8)).to("cpu"))
        0
    """
    weights = [module._weight for module in model.modules() if isinstance(module, Holds4bitWeight)]
    prepared = [weight for weight in weights if isinstance(weight, Preparable) and weight.prepared]
    for weight in prepared:
        weight.restore()
        weight._restores = 0
    return len(prepared)


def _experts(model: nn.Module) -> list[Any]:
    """The packed experts that inference multiplies by as they are: decoded ones would be restored at each call."""
    found: list[Any] = []
    for module in model.modules():
        multiplied = getattr(getattr(module, "config", None), "_experts_implementation", None) == IMPLEMENTATION
        if multiplied and not module.training and not getattr(module, "is_transposed", True):
            names: Any = module._modules.get("parametrizations") or {}
            held = [held_4bit(module, name) for name in names]
            found += [each for each in held if each is not None and isinstance(each.original, Preparable)]
    return found


def _layers(model: nn.Module) -> list[Linear4bit]:
    return [module for module in model.modules() if isinstance(module, Linear4bit)]
