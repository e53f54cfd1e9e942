"""diffusers on refq4's layers: import this module, then load one model of a pipeline in 4 bits, on any device.

    from refq4.integrations.diffusers import Refq4Config
    model = UNet2DConditionModel.from_pretrained(path, subfolder="unet", quantization_config=Refq4Config(...))

    full precision     file -> one tensor at a time -> Params4bit                    -> Linear4bit
    quantised          file -> weight, weight.absmax, ... -> from_prequantized       -> Linear4bit

The quantiser for bitsandbytes in diffusers 0.42 does not work without a GPU; the files are the same. The loader of
diffusers asks a quantiser, found by name, which modules to replace and what to do with each tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import versions

versions.check("diffusers", "diffusers")
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from safetensors import safe_open

from ..functional import dequantize_4bit
from ..internals.checks import warn_caller
from ..models.formats import check_used
from ..nn import Linear4bit
from ..params import Params4bit
from . import methods
from .config import METHOD, Refq4Config
from .instead import instead_of

__all__ = ["Refq4Config", "Refq4DiffusersQuantizer"]


class Refq4DiffusersQuantizer(DiffusersQuantizer):
    """The class that diffusers uses to load, save and dequantise a model; users only need :class:`Refq4Config`.

    All linear layers become 4-bit layers, except those that ``llm_int8_skip_modules`` or the model's class names. In a
    quantised checkpoint, the packed ones do.

    Args:
        quantization_config (Refq4Config): how the layers are to be, or how they are in the checkpoint.
        kwargs (Any): what diffusers passes on, ``pre_quantized`` above all: whether the file holds 4-bit weights.

    Example:
        >>> auto.DiffusersAutoQuantizer.from_config(Refq4Config(), pre_quantized=False).is_trainable
        True
    """

    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = True  # adapters on top, that is
    supports_parallel_loading = False
    quantization_config: Refq4Config

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Asked of the device map that was given, and of the one that "auto" came to."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("part of the model is to stay on disk, where packed weights can't: leave device_map out")

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """The names of parameters alone; what stands beside a packed one belongs to it."""
        packed = {key.removesuffix(".absmax") for key in loaded_keys if key.endswith("weight.absmax")}
        owners = {key: f"{key.rpartition('weight.')[0]}weight" for key in loaded_keys}
        self._beside = {name: {key for key in loaded_keys if owners[key] == name} for name in packed}
        self._files = checkpoint_files
        return [key for key in loaded_keys if owners[key] not in packed] + sorted(packed)

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Of one file: without what stands beside a packed weight, which is kept for when the weight comes."""
        owned = set().union(*self._beside.values()) - self._beside.keys()
        self._at_hand = {key: value for key, value in state_dict.items() if key in owned}
        return {key: value for key, value in state_dict.items() if key not in owned}

    def _process_model_before_weight_loading(
        self, model: nn.Module, keep_in_fp32_modules: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        if config.embeddings:
            raise ValueError("embeddings=True is for transformers' models; a model of diffusers keeps its tables")
        self.modules_to_not_convert = [*(config.llm_int8_skip_modules or []), *(keep_in_fp32_modules or [])]
        names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        if self.pre_quantized:
            names = [name for name in names if f"{name}.weight" in self._beside]
        else:
            names = [name for name in names if not self._skipped(name)]
            check_used(config.formats, names)
        for name in names:
            model.set_submodule(name, self._empty_layer(model.get_submodule(name), name))
        if not names:
            warn_caller(f"no layer of this {type(model).__name__} is in 4 bits: none is linear, or all are skipped")
        model.config.quantization_config = config  # type: ignore[union-attr]

    def _skipped(self, name: str) -> bool:
        """As diffusers does for bitsandbytes: a part of the name, or the beginning of it."""
        parts = name.split(".")
        return any(skip in parts or name.startswith(f"{skip}.") for skip in self.modules_to_not_convert)

    def _empty_layer(self, module: Any, name: str) -> Linear4bit:
        settings, compute = self.quantization_config.of(name), self.quantization_config.bnb_4bit_compute_dtype
        with torch.device("meta"):
            layer = Linear4bit(module.in_features, module.out_features, module.bias is not None, compute, **settings)
        return layer.to(module.weight.dtype).requires_grad_(False)

    # --- while loading: each tensor ---------------------------------------------------------------------------------

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Any, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        owner, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(owner), Linear4bit)

    def check_quantized_param_shape(self, *args: Any, **kwargs: Any) -> bool:
        return True  # create_quantized_param compares shapes, and says which is which

    def create_quantized_param(  # type: ignore[override]
        self,
        model: nn.Module,
        param_value: Any,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        layer: Any = model.get_submodule(param_name.rpartition(".")[0])
        try:
            if self.pre_quantized:
                beside = self._read_beside(param_name)
                layer.weight = Params4bit.from_prequantized(
                    state_dict[param_name], beside, device=target_device, module=layer
                )  # param_value was cast to a dtype of numbers, and these are bytes
            else:
                layer.weight = layer.weight._like(param_value, None).to(target_device)
        except ValueError as error:
            raise ValueError(f"{param_name}: {error}") from None

    def _read_beside(self, param_name: str) -> dict[str, Any]:
        """What belongs to a packed weight; the end of a file may have parted them."""
        wanted = self._beside.get(param_name, set()) - {param_name}
        found = {key: self._at_hand[key] for key in wanted & self._at_hand.keys()}
        for file in self._files if len(found) < len(wanted) else ():
            with safe_open(file, framework="pt") as opened:
                found |= {key: opened.get_tensor(key) for key in (wanted - found.keys()) & set(opened.keys())}
        return found

    # --- after loading, and back ------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return model

    def _dequantize(self, model: Any) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, Linear4bit):
                weight = dequantize_4bit(module.weight, module.quant_state)
                with torch.device("meta"):
                    plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
                plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), module.bias
                model.set_submodule(name, plain.train(module.training))
        kept = {key: value for key, value in model.config.items() if key != "quantization_config"}
        model._internal_dict = FrozenDict(kept)  # type: ignore[no-untyped-call]  # what ``model.config`` gives
        return model


auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = Refq4Config
auto.AUTO_QUANTIZER_MAPPING[METHOD] = Refq4DiffusersQuantizer
instead_of(auto.DiffusersAutoQuantizer, "merge_quantization_configs")(methods.refq4_has_a_say)
