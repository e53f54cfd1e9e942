"""transformers' mixtures of experts on packed weights.

    gate_up_proj, down_proj [E, N, K]     one parameter for all experts, in 4 bits (refq4/nn/parametrize.py)
    "refq4"                               the experts function that multiplies by the packed bytes of both
    config._experts_implementation        the name of the function that a model's experts call

transformers lets a model choose among functions that compute its experts (``use_experts_implementation``). Those of its
own read ``self.gate_up_proj``, and so decode all experts for each call. Experts with a forward of their own (Llama 4,
DBRX) go on reading, and decode.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..internals.grouped import grouped_gemm_4bit
from ..models.experts import IMPLEMENTATION
from ..nn.parametrize import held_4bit, packed_parameter
from ..params import Params4bit
from ..state import QuantState

__all__ = ["packed_experts_forward"]

_OTHERWISE = "grouped_mm"  # transformers' own default


def packed_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of one layer, each multiplied by its packed weights.

    Experts that aren't in 4 bits, or that carry another parametrisation on a parameter, are computed by transformers;
    adapters of peft's LoRA are added to the packed product.

    Args:
        self: the module of the experts, of a class under ``use_experts_implementation``.
        hidden_states: [M, H].
        top_k_index: [M, k], the experts of each token.
        top_k_weights: [M, k], how much each of them counts.

    Returns:
        [M, H] in the dtype of ``hidden_states``.

    Example:
        >>> from types import SimpleNamespace
        >>> from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
        >>> from refq4.models.experts import quantize_experts
        >>> config = {"num_experts": 4, "hidden_size": 64, "moe_intermediate_size": 32, "hidden_act": "silu"}
        >>> experts = Qwen3MoeExperts(SimpleNamespace(**config, _experts_implementation=IMPLEMENTATION))
        >>> for name in ("gate_up_proj", "down_proj"):
        ...     _ = nn.init.normal_(getattr(experts, name))
        ...     _ = quantize_experts(experts, name, quant_type="nf4")
        >>> experts(torch.randn(3, 64), torch.tensor([[0, 1], [1, 3], [2, 0]]), torch.full((3, 2), 0.5)).shape
        torch.Size([3, 64])
    """
    up, down = _operands(self, "gate_up_proj" if self.has_gate else "up_proj"), _operands(self, "down_proj")
    if up is None or down is None:
        decoding: Tensor = ALL_EXPERTS_FUNCTIONS[_OTHERWISE](self, hidden_states, top_k_index, top_k_weights)
        return decoding
    top_k, experts, weights = top_k_index.shape[-1], top_k_index.reshape(-1), top_k_weights.reshape(-1)
    if self._is_expert_parallel:  # what belongs to other processes has an index past the end, and must not count
        weights = weights.masked_fill(experts >= self.num_experts, 0.0)
        experts = experts.clamp(max=self.num_experts - 1)
    by_expert, order = torch.sort(experts, stable=True)
    offsets = torch.searchsorted(by_expert, torch.arange(self.num_experts + 1, device=by_expert.device))
    alone = hidden_states.shape[0] == 1  # one generated token: every row is a copy of it, and each small op costs time
    rows = _product(self, up, hidden_states.expand(top_k, -1) if alone else hidden_states[order // top_k], offsets)
    rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
    rows = _product(self, down, rows, offsets)
    if self.has_post_expert_norm:
        rows = self.post_expert_norm(rows)
    weighted: Tensor = rows * weights.index_select(0, order).unsqueeze(-1)
    if not alone:
        weighted = weighted[torch.argsort(order)]
    return weighted.view(-1, top_k, weighted.shape[-1]).sum(dim=1).to(hidden_states.dtype)


def choose_implementation(module: nn.Module) -> None:
    """Let the experts of a transformers model call :func:`packed_experts_forward`, unless the user chose another."""
    if packed_parameter(module, "down_proj") is not None:
        _choose(module, IMPLEMENTATION, instead_of=_OTHERWISE)


def forget_implementation(module: nn.Module) -> None:
    """After decoding, let them call transformers' own function again."""
    _choose(module, _OTHERWISE, instead_of=IMPLEMENTATION)


def _choose(module: nn.Module, wanted: str, *, instead_of: str) -> None:
    config: Any = getattr(module, "config", None)
    decorated = hasattr(module, "_is_expert_parallel")  # a module whose forward asks its config
    if decorated and getattr(config, "_experts_implementation", None) == instead_of:
        config._experts_implementation_internal = wanted  # of this config alone, none below it


class LowRank(nn.Module):
    """Behind packed bytes: what an adapter adds to each expert, ``scaling * left @ right``.

    Args:
        left, right: [E, N, r] and [E, r, K], or [E, K, r] and [E, r, N] where the weight is stored [E, K, N].
    """

    def __init__(self, left: Tensor, right: Tensor, scaling: float) -> None:
        super().__init__()
        self.left, self.right, self.scaling = left, right, scaling

    def forward(self, decoded: Tensor) -> Tensor:
        """The decoded experts with it added, for whoever reads the parameter."""
        left, right = self.left.to(decoded.dtype), self.right.to(decoded.dtype)
        matrices = decoded.view(left.shape[0], left.shape[1], right.shape[2])
        return torch.baddbmm(matrices, left, right, alpha=self.scaling).view(decoded.shape)

    def product(self, rows: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
        """[T, K] -> [T, N]: what it adds to each row's product."""
        first, second = (self.left, self.right) if transposed else (self.right.mT, self.left.mT)
        parts = torch.split(rows, offsets.diff().tolist())
        low = [part @ first[e].to(part.dtype) @ second[e].to(part.dtype) for e, part in enumerate(parts) if len(part)]
        return self.scaling * torch.cat(low)


class _Operands(NamedTuple):
    """A parameter in 4 bits: its name, its packed bytes and their state, and the adapters behind them."""

    name: str
    weight: Tensor  # a Params4bit, until something rebuilds it as a plain parameter
    state: QuantState
    deltas: list[LowRank]


def _operands(module: Any, name: str) -> _Operands | None:
    """None unless a parameter is packed bytes, and nothing but adapters behind them."""
    held: Any = held_4bit(module, name)
    if held is None:
        return None
    decoding, *deltas = held
    if decoding.quant_state is None or not all(isinstance(top, LowRank) for top in deltas):
        return None
    return _Operands(name, held.original, decoding.quant_state, deltas)


def _product(module: Any, operands: _Operands, rows: Tensor, offsets: Tensor) -> Tensor:
    name, weight, state, deltas = operands
    bias = getattr(module, f"{name}_bias").to(rows.dtype) if module.has_bias else None
    if module.training and isinstance(weight, Params4bit):  # backward reads the stored bytes; FSDP gathered these
        weight = weight.readable()
    transposed: bool = module.is_transposed
    y = grouped_gemm_4bit(rows, weight, state, offsets, bias, transposed=transposed)
    for delta in deltas:
        y = y + delta.product(rows, offsets, transposed)
    return y


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, packed_experts_forward)
