"""Which parameters of a model are fused experts, and which linear layers choose between them.

    experts.gate_up_proj [E, 2I, H], experts.down_proj [E, H, I]     one parameter holds a weight of all experts: 4 bits
    gate, router                                                     which experts a token goes to: full precision

A mixture-of-experts model has most of its weights in such parameters, and nothing that looks for ``nn.Linear`` sees
them. No library is asked: a parameter is known by its shape, its name and its owner's class.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..nn.parametrize import parametrize
from ..params import Params4bit

__all__ = ["IMPLEMENTATION", "expert_names", "expert_weights", "quantize_experts", "routers"]

IMPLEMENTATION = "refq4"  # config._experts_implementation of models whose experts multiply by packed bytes

# What models call the weights of experts, one parameter for all experts.
_NAMES = {"gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "v1", "w13"}
_FLAT = {"w1", "w2", "v1"}  # DBRX: the experts stacked in the first dimension, [E * I, H]
_ROUTER_NAMES = {"gate", "router"}
_ROUTER_CLASSES = ("Router", "Gating")


def expert_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every fused expert weight of a model that is in full precision: its dotted name, its owner, its name there.

    Example:
        >>> import torch
        >>> model = nn.Module()
        >>> model.experts = nn.Module()
        >>> model.experts.gate_up_proj = nn.Parameter(torch.randn(4, 32, 64))
        >>> model.experts.gate_up_proj_bias = nn.Parameter(torch.randn(4, 32))
        >>> [name for name, _, _ in expert_weights(model)]
        ['experts.gate_up_proj']
    """
    for name, module in model.named_modules():
        for param_name in expert_names(module):
            yield f"{name}.{param_name}".lstrip("."), module, param_name


def expert_names(module: nn.Module) -> list[str]:
    """The names of a module's own parameters that are fused expert weights.

    A parameter of three dimensions with a name that experts' weights have; in a class whose name says that it holds
    experts, any parameter of three dimensions that is no bias. Those of one module have the same first dimension.

    Example:
        >>> import torch
        >>> module = nn.Module()
        >>> module.down_proj, module.scale = nn.Parameter(torch.ones(4, 8, 8)), nn.Parameter(torch.ones(4))
        >>> expert_names(module)
        ['down_proj']
    """
    holds_experts = "Expert" in type(module).__name__
    shapes = {
        name: parameter.shape
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point() and not isinstance(parameter, Params4bit) and "bias" not in name
    }
    fused = [
        name
        for name, shape in shapes.items()
        if len(shape) == 3 and min(shape[1:]) > 1 and (holds_experts or name in _NAMES)
    ]
    if holds_experts and not fused and shapes.keys() >= _FLAT:
        fused = [name for name, shape in shapes.items() if name in _FLAT and len(shape) == 2]
    return fused if len({shapes[name][0] for name in fused}) == 1 else []


def routers(model: nn.Module) -> set[str]:
    """The dotted names of the linear layers that choose experts; a wrong choice costs more than their few bits save.

    They are those in a class that says so (``SwitchTransformersTop1Router``), and those that are, or lie in, what is
    called "gate" or "router" beside experts.

    Example:
        >>> import torch
        >>> block = nn.ModuleDict({"gate": nn.Linear(64, 4), "experts": nn.Module()})
        >>> block["experts"].down_proj = nn.Parameter(torch.randn(4, 64, 64))
        >>> routers(block), routers(nn.ModuleDict({"gate": nn.Linear(64, 4)}))
        ({'gate'}, set())
    """
    found: set[str] = set()
    for name, module in model.named_modules():
        children = dict(module.named_children())
        choosing = [
            child for child in children if child in _ROUTER_NAMES and any("experts" in name for name in children)
        ]
        if any(word in type(module).__name__ for word in _ROUTER_CLASSES):
            choosing = list(children)
        for child in choosing:
            for below, layer in children[child].named_modules():
                if isinstance(layer, nn.Linear):
                    found.add(".".join(part for part in (name, child, below) if part))
    return found


def quantize_experts(module: nn.Module, param_name: str, **settings: Any) -> Params4bit:
    """Put one fused expert weight into 4 bits; its owner reads it decoded, or multiplies by the packed bytes.

    Args:
        module: the owner of the parameter; it is changed.
        param_name: the parameter's name in it.
        settings: ``quant_type``, ``compress_statistics``, ``quant_storage``, ``blocksize``, ``scales``, as in
            ``Params4bit``.

    Raises:
        ValueError: it holds NaN or infinity.

    Example:
        >>> import torch
        >>> experts = nn.Module()
        >>> experts.down_proj = nn.Parameter(torch.randn(4, 32, 64))
        >>> quantize_experts(experts, "down_proj", quant_type="nf4").shape
        torch.Size([4096, 1])
    """
    values = getattr(module, param_name).data
    packed = Params4bit(values, **settings).to(values.device)
    parametrize(module, param_name, packed)
    return packed
