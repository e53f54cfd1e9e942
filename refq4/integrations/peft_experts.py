"""LoRA on fused experts in 4 bits, which peft knows as ``target_parameters``; ``peft.py`` imports this.

find     a packed parameter is one of the module's ``parametrizations``, where peft looks for full names only
train    peft adds its delta to the decoded weight, so that layer decodes its experts in each call
merge    W4' = quantise(decode(W4) + delta); peft would add to a decoded copy, and lose the adapter
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.utils.parametrize as P
from accelerate import init_empty_weights
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, check_adapters_to_merge
from peft.utils import _get_submodules
from torch import Tensor, nn

from ..nn.parametrize import PackedParameter, held_4bit
from .experts import LowRank
from .instead import instead_of
from .peft import decoded, requantised

__all__: list[str] = []  # peft makes these


@instead_of(BaseTuner, "_inject_parameters")
def _finds_packed(
    original: Any, self: Any, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
) -> list[str]:
    """``BaseTuner._inject_parameters``: the end of a packed parameter's name is enough, as for any other.

    Wrappers of one module are nested in the order of its parameters: an adapter's file depends on it.
    """
    given, packed = peft_config.target_parameters, []
    for name, module in list(model.named_modules()):
        plain = name.replace("parametrizations.", "").replace("base_layer.", "")
        if isinstance(module, PackedParameter) and any(f".{plain}".endswith(f".{target}") for target in given):
            packed.append(plain)
    for plain in packed:
        owner, _, name = plain.rpartition(".")
        parent, target, target_name = _get_submodules(model, owner)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            self._create_and_replace(
                peft_config,
                adapter_name,
                _wrapper_of(target, name) or target,
                target_name,
                parent,
                current_key=plain,
                parameter_name=name,
            )
    peft_config.target_parameters = [target for target in given if target not in packed]
    try:
        return [*packed, *original(self, peft_config, model, adapter_name, low_cpu_mem_usage)]
    finally:
        peft_config.target_parameters = given


def _wrapper_of(module: Any, name: str) -> Any:
    """The wrapper that an earlier adapter has put around this parameter."""
    while isinstance(module, ParamWrapper):
        if module.parameter_name == name:
            return module
        module = module.base_layer
    return None


@instead_of(ParamWrapper, "get_param")
def _describes_packed(original: Any, self: Any) -> Tensor:
    """``ParamWrapper.get_param``, of which peft reads shape, dtype and device: nothing is decoded for that."""
    held = _held(self)
    if held is None:
        return original(self)  # type: ignore[no-any-return]
    state = held.quant_state
    return torch.empty(1, dtype=state.dtype, device=held.original.device).expand(held.weight_shape)


@instead_of(ParamWrapper, "_activate_lora")
@contextmanager
def _adds_to_packed(original: Any, self: Any, active_adapters: list[str]) -> Iterator[None]:
    """``ParamWrapper._activate_lora``: during a forward pass the delta stands behind the packed bytes."""
    held = _held(self)
    if held is None:
        with original(self, active_adapters):
            yield
        return
    deltas = [_delta(self, name) for name in active_adapters if name in self.lora_A]
    held.extend(deltas)
    try:
        with P.cached():
            yield
    finally:
        for _ in deltas:
            del held[-1]


def _delta(wrapper: Any, adapter: str) -> LowRank:
    """What peft's A [r E, K] and B [N, r E] of an adapter say, expert by expert, in the layout of the parameter."""
    experts, a, b = wrapper.num_experts, wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    a = a.reshape(experts, -1, a.shape[-1])  # [E, r, in]
    b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)  # [E, out, r]
    out_first = wrapper._did_swap_in_out_features or len(wrapper.get_param().shape) == 2
    left, right = (b, a) if out_first else (a.mT, b.mT)
    return LowRank(left, right, wrapper.scaling[adapter])


def _held(wrapper: Any) -> Any:
    """The packed parameter that peft has wrapped; None if it is another one."""
    return held_4bit(wrapper.get_base_layer(), wrapper.parameter_name)


@instead_of(ParamWrapper, "merge")
def _merges_packed(original: Any, self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """``ParamWrapper.merge``."""
    held = _held(self)
    if held is None:
        original(self, safe_merge, adapter_names)
        return
    names = [adapter for adapter in check_adapters_to_merge(self, adapter_names) if adapter in self.lora_A]
    if not names:
        return
    before = held.original if self.__dict__.get("_unmerged") is None else self._unmerged
    target = decoded(before)
    for adapter in (*self.merged_adapters, *names):
        target = _delta(self, adapter)(target)
    fresh, self.merge_error = requantised(before, target.detach())
    held.original, held.quant_state = fresh, fresh.quant_state
    self.__dict__["_unmerged"] = before  # no parameter of the wrapper
    self.merged_adapters.extend(names)


@instead_of(ParamWrapper, "unmerge")
def _unmerges_packed(original: Any, self: Any) -> None:
    """``ParamWrapper.unmerge``: the bytes are what they were."""
    before, held = self.__dict__.pop("_unmerged", None), _held(self)
    if before is None or held is None:
        original(self)
        return
    held.original = before.to(held.original.device)  # the model may have moved
    held.quant_state, self.merge_error = held.original.quant_state, None
    self.merged_adapters.clear()
