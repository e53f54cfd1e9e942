"""transformers' tensor-parallel and expert-parallel plans on 4-bit weights.

    from_pretrained(path, quantization_config=Refq4Config(...), tp_plan="auto")     torchrun --nproc-per-node 2 ...

    the plan says                             what is divided
    q_proj: colwise, o_proj: rowwise          a part of the rows or columns of [N, K]
    experts.gate_up_proj: packed_colwise      the same for gate and up, [E, 2I, H]
    experts.down_proj: grouped_gemm           a part of the experts

transformers makes each weight that it divides a DTensor without data, and its loader then reads parts of tensors of
the file. A packed weight has another shape, and scales beside it. So its DTensor is looked at for what is to be
divided, and taken away again before anything is loaded; the loader then reads whole tensors, one after the other, and
each process keeps its part.

What transformers puts around a forward goes by the DTensors that it finds there, and is replaced
(``parallelize_forward``, ``parallelize_experts``). Only experts that are divided whole keep what it puts around them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

from ..nn import Embedding4bit, Linear4bit
from .config import METHOD
from .instead import instead_of
from .parts import Split, divide_bias, is_divided, split_later, splits
from .tensor_parallel import parallelize_experts, parallelize_forward

if TYPE_CHECKING:
    from .transformers import Refq4Quantizer

__all__: list[str] = []  # for transformers.py

_DISPATCHES = "ep_dispatch_experts"


@instead_of(PreTrainedModel, "maybe_distribute_model")
def divides_whole_blocks(
    original: Any, cls: type[PreTrainedModel], model: PreTrainedModel, distributed_config: Any, meshes: Any
) -> Any:
    """``maybe_distribute_model`` of transformers' models, called with the layers in place and nothing loaded."""
    if meshes is None or getattr(model, "quantization_method", None) != METHOD:
        return original(cls, model, distributed_config, meshes)
    _check_sizes(distributed_config)
    weights = list(_weights_in_4_bits(model))
    held = {(module, own): module._parameters[own] for _, module, own in weights}
    held |= {(m, "bias"): m._parameters["bias"] for _, m, _ in weights if isinstance(m, Linear4bit)}
    for (module, own), parameter in held.items():  # plain ones, for transformers to divide
        if parameter is not None:
            plain = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            module._parameters[own] = nn.Parameter(plain, requires_grad=False)
    model = original(cls, model, distributed_config, meshes)
    placed: list[tuple[str, nn.Module, str, Any]] = [
        (name, module, own, module._parameters[own]) for name, module, own in weights
    ]
    for (module, own), parameter in held.items():
        module._parameters[own] = parameter
    for name, module, own, placeholder in placed:
        if isinstance(module, Embedding4bit):
            module.__dict__.pop("forward", None)  # each process looks up in the whole table
        elif isinstance(placeholder, DTensor):
            _split(model, name, module, own, placeholder)
    return model


def settle(model: PreTrainedModel) -> None:
    """After loading: the biases, and the heads that share the table of an embedding, which is not divided."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Linear4bit) and splits(module)]
    for module in layers:
        if module.quant_state is not None and module.quant_state.shape == splits(module)["weight"].shape:
            del module.__dict__["forward"], module.__dict__["_refq4_splits"]
        else:
            divide_bias(module)


@instead_of(PreTrainedModel, "save_distributed_checkpoint")
def saves_no_parts(original: Any, self: Any, model_to_save: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """``save_distributed_checkpoint``, which would take this process's part for the whole."""
    if is_divided(model_to_save):
        raise ValueError(
            "distributed_checkpoint=True can't save 4-bit weights that are divided among processes: leave it out, "
            "and save_pretrained puts them together"
        )
    return original(self, model_to_save, *args, **kwargs)


def _check_sizes(config: Any) -> None:
    if config.fsdp_size * getattr(config, "dp_replicate_size", 1) > 1 or config.pp_size > 1:
        raise ValueError(
            "from_pretrained divides 4-bit weights by tp_size and ep_size alone: leave fsdp_size, dp_replicate_size "
            "and pp_size at 1, or load the model without distributed_config and call fully_shard on it"
        )


def _weights_in_4_bits(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, str]]:
    quantizer: Refq4Quantizer = model.hf_quantizer
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit | Embedding4bit):
            yield f"{name}.weight", module, "weight"
    for name in sorted(quantizer._experts):  # a set: in the same order in all processes
        owner, _, own = name.rpartition(".")
        yield name, model.get_submodule(owner), own


def _split(model: PreTrainedModel, name: str, module: nn.Module, own: str, placeholder: DTensor) -> None:
    (placement,), mesh, shape = placeholder.placements, placeholder.device_mesh, placeholder.shape
    owner = name.rpartition(".")[0]
    rule = _rule_of(model.tp_plan, owner)
    dim: Any = getattr(placement, "dim", None)
    if dim is None:
        raise ValueError(f"{name}: {rule!r} in tp_plan wants a DTensor that is not divided, and 4-bit weights are none")
    split = Split(name, shape, dim % len(shape), mesh, getattr(placement, "split_factor", 1))
    split.check(model.hf_quantizer.settings(name)["blocksize"])
    split_later(module, own, split)
    if isinstance(module, Linear4bit):
        if rule is None:
            raise ValueError(f"{name}: a tp_plan for a 4-bit layer names the layer, {owner!r}, not its weight alone")
        parallelize_forward(module, ALL_PARALLEL_STYLES[rule])
    elif split.dim == 0:
        if (rule := _rule_of(model.ep_plan, owner)) != _DISPATCHES:
            raise ValueError(f"{name}: {_DISPATCHES!r} is the rule in ep_plan for 4-bit experts, not {rule!r}")
    elif getattr(module, "has_bias", False):
        raise ValueError(f"{name}: 4-bit experts with a bias are divided whole (ep_size) or not at all (tp_plan)")
    elif rule == "moe_tp_experts" and len(splits(module)) == 1:  # once, by the first of its weights
        parallelize_experts(module, mesh)


def _rule_of(plan: dict[str, str], module_name: str) -> Any:
    """The style of a module in a model's plan, which has ``*`` for the numbers of layers."""
    return plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", module_name))
