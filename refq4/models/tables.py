"""Embeddings in 4 bits, output heads that share their table, and the dtype of what is left: for ``quantize_model``.

    embeddings=True    nn.Embedding [V, D] -> Embedding4bit with plain scales: a look-up decodes the rows that it needs
    head=True          the output head too; one that shares a table's weight goes on sharing it, in 4 bits
    dtype=...          of the parameters that stay as they are: norms, biases, what was skipped

A shared table stays as it is stored: what a backend prepares for products, a look-up could not read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..internals.prepared import MOST_RESTORES
from ..nn import Embedding4bit, Linear4bit
from ..params import Params4bit
from .report import QuantizationReport, layer_report

__all__ = ["CHANGES", "cast_rest", "empty_table", "quantize_tables", "share_tables"]

CHANGES = "its look-ups change the table (max_norm)"


def quantize_tables(
    model: nn.Module,
    head: bool,
    settings_of: Callable[[str], dict[str, Any]],
    skipped: Callable[[str, nn.Module], bool],
    report: QuantizationReport | None,
) -> dict[str, str]:
    """Replace the embeddings of a model by 4-bit ones, in place.

    Args:
        head: whether a linear layer that shares a table's weight may share the 4-bit one.
        settings_of: how the table of a name is quantised; double quantisation is left out.
        skipped: which tables to leave alone.

    Returns:
        Name -> why an embedding was left alone.
    """
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    left: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Embedding) or isinstance(module, Embedding4bit):
            continue
        others = [other for other in users[id(module.weight)] if other != name]
        why = "skipped" if skipped(name, module) else _why_not(model, module, others, head)
        if why is not None:
            left[name] = why
            continue
        before = module.weight.detach()
        table = _table(module, settings_of(name))
        model.set_submodule(name, table)
        for other in others:
            model.set_submodule(other, _sharing(model.get_submodule(other), table))
        if report is not None and table.quant_state is not None:
            report.layers.append(layer_report(name, before, table.weight, table.quant_state))
            report.other -= before.numel()
    return left


def _why_not(model: nn.Module, module: nn.Embedding, others: list[str], head: bool) -> str | None:
    if type(module) is not nn.Embedding:
        return f"a {type(module).__name__}, whose owner uses it in ways of its own"
    if module.max_norm is not None:
        return CHANGES
    if any(type(model.get_submodule(other)) is not nn.Linear for other in others):
        return f"shares its weight with {others[0]}, which is not a linear layer"
    if others and not head:
        return f"shares its weight with {others[0]}, the output head: head=True takes both"
    return None


def empty_table(module: nn.Embedding, settings: dict[str, Any]) -> Embedding4bit:
    """A 4-bit table on the meta device for the weight of an embedding: its sizes, dtype and padding_idx."""
    quant_type, quant_storage = settings["quant_type"], settings["quant_storage"]
    sizes = module.num_embeddings, module.embedding_dim
    table = Embedding4bit(*sizes, module.weight.dtype, quant_type, quant_storage, device="meta")
    table.padding_idx = module.padding_idx
    table.weight = Params4bit(
        table.weight.data,
        blocksize=settings["blocksize"],
        compress_statistics=False,
        quant_type=quant_type,
        quant_storage=quant_storage,
        module=table,
        scales=settings["scales"],
    )
    return table


def _table(module: nn.Embedding, settings: dict[str, Any]) -> Embedding4bit:
    table, weight = empty_table(module, settings), module.weight.detach()
    table.weight = table.weight._like(weight, None).to(weight.device)
    return table.train(module.training)


def _sharing(linear: nn.Module, table: Embedding4bit) -> Linear4bit:
    """A linear layer with the table's weight, in place of one that shared it in full precision."""
    assert isinstance(linear, nn.Linear)
    weight = table.weight
    layer = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
        device="meta",
    )
    layer.bias = linear.bias
    _share(layer, weight)
    return layer.train(linear.training)


def _share(layer: Linear4bit, weight: Params4bit) -> None:
    weight._restores = MOST_RESTORES  # so that no product prepares what a look-up reads
    layer.weight, layer.quant_state = weight, weight.quant_state


def share_tables(model: nn.Module) -> None:
    """Settle the layers whose weight has become that of a 4-bit table, after both were loaded as one."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, Embedding4bit)}
    for module in model.modules():
        if isinstance(module, Linear4bit) and id(module.weight) in tables:
            _share(module, module.weight)


def cast_rest(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the floating-point parameters that are not in 4 bits, in place; buffers stay (rotary frequencies are fp32).

    4-bit tables give ``dtype``, too.
    """
    for module in model.modules():
        if isinstance(module, Embedding4bit):
            module.dtype = dtype
        for parameter in module.parameters(recurse=False):
            if not isinstance(parameter, Params4bit) and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
