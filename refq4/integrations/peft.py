"""peft on refq4's layers, as on bitsandbytes': import this module, or let refq4 load the model; then use peft as usual.

    prepare_model_for_kbit_training(model); model = get_peft_model(model, LoraConfig(...))
    forward          y = base(x) + B(A(x)) * scaling       the base layer's 4-bit weight is frozen
    merge            W4' = quantise(decode(W4) + sum of B @ A * scaling)      one rounding, whose error is measured
    unmerge          W4, the very bytes: they are kept while an adapter is merged (half a byte a weight)

peft finds the class for a layer in ``LoraModel._create_new_module``, which knows bitsandbytes by name and offers no
registry; for every other ``nn.Linear`` it would merge by adding to the weight, which packed bytes don't survive.

Its other methods take a refq4 layer for a plain one. They train, and merging them is refused here, but for those in
``peft_others.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from . import versions

versions.check("peft", "transformers")
from peft.tuners.lora import LoraConfig, LoraModel
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import ModulesToSaveWrapper, integrations

from ..functional import dequantize_4bit
from ..internals.checks import warn_caller
from ..models.report import in_fp32
from ..nn import Linear4bit
from ..params import Params4bit
from .instead import instead_of
from .parts import is_divided, whole_sizes

__all__ = ["LoraLinear4bit", "merge_errors"]

ROUNDED = (
    "a merged weight is rounded to 4 bits again; merge_errors(model) tells how far off each is, and unmerging "
    "brings the stored bytes back. To keep all of an adapter, merge it into the model in full precision"
)


class LoraLinear4bit(Linear):
    """A LoRA adapter around a :class:`refq4.nn.Linear4bit`; peft makes these.

    Attributes:
        merge_error: |W4' - W| / |W| of the weight W that was merged, and of what 4 bits made of it; None if unmerged.

    Example:
        >>> from peft import get_peft_model
        >>> layer = Linear4bit(64, 64, quant_type="nf4").to("cpu")
        >>> adapted = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"]))
        >>> type(adapted.base_model.model[0])
        <class 'refq4.integrations.peft.LoraLinear4bit'>
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        with whole_sizes(base_layer):
            super().__init__(base_layer, adapter_name, config, **kwargs)
        self.fan_in_fan_out = False  # GPT-2's layers are turned round when they are quantised
        self.merge_error: float | None = None
        self._unmerged: tuple[Params4bit, Tensor | None] | None = None  # weight and bias

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """base(x) + B(A(x)) * scaling, as peft computes it, on a processor in an order that takes less time.

        [..., r] is scaled instead of the result [..., N]. B [N, r] is transposed to [r, N] first: with rows as short
        as r, MKL takes two to four times as long for the gradients of B and of what B multiplies.
        """
        names = [name for name in self.active_adapters if name in self.lora_A]
        special = args or kwargs or self.disable_adapters or self.merged or torch.is_autocast_enabled("cpu")
        if special or not x.is_cpu or not all(self._is_plain(name) for name in names):
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        result: Tensor = self.base_layer(x)
        dtype = result.dtype
        for name in names:
            x = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
            inner = self.lora_A[name](self.lora_dropout[name](x)) * self.scaling[name]
            result = result + inner @ self.lora_B[name].weight.t().contiguous()
        return result.to(dtype)

    def _is_plain(self, name: str) -> bool:
        """Whether an adapter's B is a matrix of this process alone, and calling it does no more than multiply by it.

        A bias, a variant of LoRA, a hook (FSDP sets one) or another forward (accelerate's loads the matrix for the
        call) does more.
        """
        B = self.lora_B[name]
        hooks = B._forward_hooks or B._forward_pre_hooks or B._backward_hooks or B._backward_pre_hooks
        special = self.lora_bias[name] or name in self.lora_variant or hooks or "forward" in B.__dict__
        plain = type(B) is nn.Linear and type(B.weight) is nn.Parameter and not special
        plain = plain and B.weight.dtype != torch.float16  # A(x) times a large scaling may overflow in it
        return plain and not nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the base layer's weight.

        Args:
            safe_merge: as in peft; a merged weight with NaN or infinity is refused in either case, and nothing changed.
            adapter_names: the active ones if None.

        Raises:
            ValueError: the merged weight holds NaN or infinity; or an adapter that is not plain LoRA (DoRA, ...) meets
                another one.

        Warns:
            UserWarning: the merged weight is rounded to 4 bits.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        layer = self.get_base_layer()
        if not names:
            return
        if not isinstance(layer, Linear4bit):  # model.dequantize() has been here
            super().merge(safe_merge, names)
            return
        merged = [*self.merged_adapters, *names]
        special = [name for name in merged if name in self.lora_variant]
        if special and len(merged) > 1:
            raise ValueError(
                f"adapter {special[0]!r} is not plain LoRA, and is merged alone or not at all; got {merged}"
            )
        weight, bias = self._unmerged or (layer.weight, layer.bias)
        target = self._merged_weight(weight, names if special else merged)
        merged_bias = self._merged_bias(bias, merged)
        self.merge_error = requantise(layer, weight, target)
        self._unmerged = weight, bias
        layer.bias = merged_bias  # type: ignore[assignment]  # None, where nn.Linear has None
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Remove all merged adapters: weight and bias are as before, bit for bit."""
        if self._unmerged is None:
            super().unmerge()
            return
        layer: Any = self.get_base_layer()
        weight, bias = self._unmerged
        layer.weight = weight.to(layer.weight.device)  # the model may have moved
        layer.bias = None if bias is None else nn.Parameter(bias.to(layer.weight.device), bias.requires_grad)
        layer.quant_state = layer.weight.quant_state
        self._unmerged, self.merge_error = None, None
        self.merged_adapters.clear()

    def _merged_weight(self, weight: Params4bit, names: Iterable[str]) -> Tensor:
        """fp32 [N, K]: the decoded weight with adapters added."""
        merged = decoded(weight)
        for name in names:
            if name in self.lora_variant:
                merged = self.lora_variant[name].merge_safe(self, name, merged)
            else:
                merged = merged + self.get_delta_weight(name).float()
        return merged.detach()

    def _merged_bias(self, bias: Tensor | None, names: Iterable[str]) -> nn.Parameter | None:
        extra = [self.lora_B[name].bias * self.scaling[name] for name in names if self.lora_bias[name]]
        if bias is None and extra:
            raise ValueError("lora_bias=True and a base layer without a bias can't be merged")
        if bias is None:
            return None
        return nn.Parameter(sum(extra, bias).detach().to(bias.dtype), requires_grad=bias.requires_grad)


def merge_errors(model: nn.Module) -> dict[str, float]:
    """Return the error of 4 bits for each merged layer, |W4 - W| / |W|; empty if nothing is merged.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> layer = Linear4bit(64, 64, quant_type="nf4").to("cpu")
        >>> merge_errors(get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"])))
        {}
    """
    errors = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            keeper = getattr(module, "quantization_backend", None) or module
            errors[name] = getattr(keeper, "merge_error", None)
    return {name: error for name, error in errors.items() if error is not None}


def decoded(weight: Params4bit) -> Tensor:
    assert weight.quant_state is not None
    return in_fp32(weight.stored(), weight.quant_state)


def requantise(layer: Linear4bit, like: Params4bit, target: Tensor) -> float:
    """Give ``layer`` the weight ``target`` [N, K], as :func:`requantised` makes it; returns the error."""
    layer.weight, error = requantised(like, target)
    layer.quant_state = layer.weight.quant_state
    return error


def requantised(like: Params4bit, target: Tensor) -> tuple[Params4bit, float]:
    """``target`` quantised with the settings of ``like``, and the error.

    Raises:
        ValueError: it holds NaN or infinity.

    Warns:
        UserWarning: adapters lose precision in 4 bits.
    """
    assert like.quant_state is not None
    if not bool(target.isfinite().all()):
        raise ValueError("the merged weight holds NaN or infinity; an adapter seems to be broken")
    warn_caller(ROUNDED)
    fresh = like._like(target, None)
    fresh.bnb_quantized = False
    fresh = fresh.to(target.device)
    assert fresh.quant_state is not None
    fresh.quant_state.dtype = like.quant_state.dtype
    return fresh, float((decoded(fresh) - target).norm() / target.norm().clamp(min=torch.finfo(torch.float32).tiny))


# --- what peft has to be told ----------------------------------------------------------------------------------------


def adapts_refq4(tuner: type[BaseTuner], ours: type[nn.Module]) -> None:
    """Let a tuner know refq4's layers, which get adapters of the class ``ours``; a config's own classes come first."""

    @instead_of(tuner, "_create_new_module")
    def create(original: Any, config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        custom = tuple(getattr(config, "_custom_modules", None) or ())
        if isinstance(base, Linear4bit) and not isinstance(base, custom):
            return ours(target, adapter_name, config, **kwargs)
        return original(config, adapter_name, target, **kwargs)  # type: ignore[no-any-return]


adapts_refq4(LoraModel, LoraLinear4bit)


@instead_of(integrations, "dequantize_bnb_weight", "peft")
def _decodes_refq4(original: Any, weight: nn.Parameter, state: Any = None) -> Any:
    """It takes every ``Params4bit`` for one of bitsandbytes."""
    if isinstance(weight, Params4bit) and weight.quant_state is not None:
        return dequantize_4bit(weight.stored(), weight.quant_state)
    return original(weight, state)


@instead_of(BaseTuner, "_check_merge_allowed")
def _merges_what_it_can(original: Any, self: BaseTuner) -> None:
    """Before anything is merged."""
    original(self)
    if is_divided(self.model):
        raise ValueError(
            "this process holds a part of the model's 4-bit layers, and adapters are merged into whole ones: save "
            "the adapter, and merge it where one process holds the model; nothing was merged"
        )
    for name, module in self.model.named_modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), Linear4bit):
            can = isinstance(module, LoraLinear4bit) or getattr(module, "quantization_backend", None) is not None
            if not can and type(module).__module__.startswith(("peft.", "refq4.")):
                raise ValueError(
                    f"{name}: {type(self).__name__.removesuffix('Model')} adapters can't be merged into refq4's "
                    f"4-bit layers. Keep them beside the model, or decode it first: model.dequantize(); nothing "
                    f"was merged"
                )


@instead_of(ModulesToSaveWrapper, "update")
def _saves_what_can_be_trained(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """It copies a module to train the copy."""
    for module in self.original_module.modules():
        if isinstance(module, Linear4bit):
            raise ValueError(
                f"modules_to_save: {module} is in 4 bits, and packed codes can't be trained. Leave it in full "
                f"precision when the model is quantised (llm_int8_skip_modules, skip), or name it in target_modules"
            )
    return original(self, *args, **kwargs)


with suppress(ImportError):  # peft before 0.21
    from . import peft_others  # noqa: F401
from . import peft_experts, peft_parallel  # noqa: F401 (they need what is above)
