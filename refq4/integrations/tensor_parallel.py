"""Tensor parallelism: each process of a group holds a part of every 4-bit weight, and multiplies by it.

    column   [N, K] -> [N/P, K]    rows: each process computes N/P of the outputs     x whole, y in parts
    row      [N, K] -> [N, K/P]    columns: each multiplies K/P of the inputs         x in parts, y a sum over processes

What a part holds is in ``parts.py``. This file needs torch alone: styles for ``parallelize_module``, and the forward
of a layer that is divided. The plans of transformers' models are in ``parallel_plans.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from ..nn import Linear4bit
from ..nn.parametrize import held_4bit
from ..params import Params4bit
from .parts import Split, divide_bias, divided, split_later, splits

__all__ = ["ColwiseParallel4bit", "RowwiseParallel4bit", "whole_state_dict"]


class ColwiseParallel4bit(ColwiseParallel):
    """torch's ``ColwiseParallel`` for 4-bit layers: each process holds a part of the rows of [N, K].

    Every process must have the layer's whole weight, quantised, when ``parallelize_module`` is called; it keeps its
    part. A layer that is not in 4 bits is left to torch. Arguments are those of torch's class.

    Raises:
        RuntimeError: the layer has not been quantised.
        ValueError: N does not divide by the number of processes, or a block would be cut.

    Example:
        >>> plan = {"up": ColwiseParallel4bit(), "down": RowwiseParallel4bit()}
        >>> plan["up"].use_local_output
        True
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, Linear4bit):
            return super()._apply(module, device_mesh)
        return _parallelize(module, 0, device_mesh, self)


class RowwiseParallel4bit(RowwiseParallel):
    """torch's ``RowwiseParallel`` for 4-bit layers: each process holds a part of the columns of [N, K].

    As :class:`ColwiseParallel4bit`. The bias is added once, to the sum.

    Raises:
        RuntimeError: the layer has not been quantised.
        ValueError: K does not divide by the number of processes, or a block would be cut.

    Example:
        >>> RowwiseParallel4bit(use_local_output=False).use_local_output
        False
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, Linear4bit):
            return super()._apply(module, device_mesh)
        return _parallelize(module, 1, device_mesh, self)


def whole_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict of a model whose 4-bit weights are divided, put together again: the bytes that were divided.

    All processes must call it, and each gets the whole, what was divided on the CPU. DTensors are left as they are.

    Example:
        >>> model = nn.Sequential(Linear4bit(64, 8, bias=False, quant_type="nf4")).to("cpu")
        >>> sorted(whole_state_dict(model))[:2]
        ['0.weight', '0.weight.absmax']
    """
    entries = model.state_dict()
    for name, module in model.named_modules():
        for own, split in splits(module).items():
            owner = f"{name}." if name else ""
            held: Any = held_4bit(module, own) or module
            whole = split.put_together(getattr(held, "original" if held is not module else own)).to("cpu")
            assert whole.quant_state is not None
            entries[f"{owner}{own}"] = whole.data
            entries |= {f"{owner}{own}.{part}": t for part, t in whole.quant_state.as_dict(packed=True).items()}
            if isinstance(module, Linear4bit) and module.bias is not None and split.dim == 0:
                entries[f"{owner}bias"] = split.gathered(module.bias.detach(), outer=split.parts).cpu()
    return entries


# --- the forward of a divided layer -----------------------------------------------------------------------------------


def _parallelize(layer: Linear4bit, dim: int, mesh: DeviceMesh, style: Any) -> nn.Module:
    if layer.quant_state is None or not isinstance(layer.weight, Params4bit):
        raise RuntimeError(
            f"this {type(layer).__name__} has not been quantised: call .to(device) on the model first, which quantises"
        )
    if splits(layer):
        raise RuntimeError(f"this {type(layer).__name__} is divided among processes already")
    split = Split("weight", layer.weight_shape, dim, mesh)
    split.check(layer.weight.blocksize)
    split_later(layer, "weight", split)
    layer.weight = divided(layer, "weight", layer.weight)
    divide_bias(layer)
    parallelize_forward(layer, style)
    return layer


def parallelize_forward(layer: Any, style: Any) -> None:
    """Give a divided layer its forward, with the layouts of a parallel style of torch or of transformers.

    Inputs and results are tensors of the process, or DTensors.
    """
    layer.__dict__.pop("forward", None)
    split, local = splits(layer)["weight"], layer.forward
    row, mesh = split.dim == 1, split.mesh
    wanted, made = (Shard(-1), Partial()) if row else (Replicate(), Shard(-1))
    of_input = _one(getattr(style, "input_layouts", None), wanted)
    of_output = _one(getattr(style, "output_layouts", None), Replicate() if row else made)
    keeps_local = getattr(style, "use_local_output", True)

    def forward(x: Tensor) -> Tensor:
        bias = layer._parameters["bias"] if row else None
        x = _arriving(x, mesh, of_input, wanted)
        if bias is None:
            return _leaving(local(x), mesh, made, of_output, keeps_local)
        layer._parameters["bias"] = None  # each process would add it
        try:
            y = local(x)
        finally:
            layer._parameters["bias"] = bias
        return _leaving(y, mesh, made, of_output, keeps_local, bias)

    layer.forward = forward


def parallelize_experts(module: Any, mesh: DeviceMesh) -> None:
    """Give experts their forward whose weights are divided one by one: gate and up by rows, down by columns."""
    module.__dict__.pop("forward", None)
    local = module.forward

    def forward(*inputs: Tensor) -> Tensor:
        inputs = tuple(_arriving(x, mesh, Replicate(), Replicate()) for x in inputs)
        return _leaving(local(*inputs), mesh, Partial(), Replicate(), True)

    module.forward = forward


def _arriving(x: Tensor, mesh: DeviceMesh, layout: Placement, wanted: Placement) -> Tensor:
    """What a process computes with, of an input in a layout: a tensor of its own."""
    parts = wanted != Replicate()
    if not isinstance(x, DTensor):
        if layout == wanted and (parts or not (torch.is_grad_enabled() and x.requires_grad)):
            return x  # without a DTensor, which takes longer than a small product
        x = DTensor.from_local(x, mesh, [layout], run_check=False)
    if x.placements != (wanted,):
        x = x.redistribute(placements=[wanted])
    return x.to_local(grad_placements=x.placements if parts else [Partial()])  # by a part of y: a part of a sum


def _leaving(
    y: Tensor, mesh: DeviceMesh, made: Placement, wanted: Placement, keeps_local: bool, bias: Tensor | None = None
) -> Tensor:
    """What a process made, in the layout that is wanted; then a bias is added."""
    if keeps_local and wanted == made:
        return y
    if keeps_local and made == Partial() and wanted == Replicate() and not y.requires_grad:
        dist.all_reduce(y, group=mesh.get_group())
        return y if bias is None else y + bias.to(y.dtype)
    whole: Any = DTensor.from_local(y, mesh, [made], run_check=False).redistribute(placements=[wanted])
    if bias is not None:
        whole = whole + DTensor.from_local(bias.to(y.dtype), mesh, [Replicate()], run_check=False)
    result: Tensor = whole.to_local() if keeps_local else whole
    return result


def _one(layouts: Any, otherwise: Placement) -> Placement:
    """The layout on a mesh of one dimension: torch has a tuple of one, transformers as a rule the layout itself."""
    found: Placement = layouts[0] if isinstance(layouts, tuple) else layouts
    return otherwise if layouts is None else found
