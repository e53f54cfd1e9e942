"""transformers on refq4's layers: import this module, then use ``from_pretrained`` and ``save_pretrained`` as ever.

    from refq4.integrations.transformers import Refq4Config
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=Refq4Config(bnb_4bit_quant_type="nf4"))

    full precision     file -> one tensor at a time -> Quantise      -> Linear4bit     never two copies of the model
    quantised          file -> weight, weight.absmax, ... -> Restore -> Linear4bit     of refq4 or of bitsandbytes

transformers finds the quantiser by name (``register_quantizer``) and asks it which modules to replace before loading,
what to do with each tensor, and how to go back. Its loader, in ``transformers/core_model_loading.py``, changes from
version to version; those that were tried are in ``versions.py``. The config class is in ``config.py``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..internals import remedies
from . import versions

try:  # a clear word where it is missing or too old
    import transformers  # noqa: F401

    versions.check("transformers")
except ImportError as error:
    raise ImportError(f"this needs transformers: {remedies.install('transformers')} ({error})") from error
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from ..codebooks import codebook_names
from ..functional import dequantize_4bit
from ..internals.checks import warn_caller
from ..models.linears import is_linear, nearest, read_by_owner
from ..nn import Linear4bit
from ..params import Params4bit
from . import methods
from .config import METHOD, Refq4Config
from .later import connect

__all__ = ["Refq4Config", "Refq4Quantizer"]


class Refq4Quantizer(HfQuantizer):
    """What transformers asks while it loads, saves and dequantises a model; users meet :class:`Refq4Config` only.

    Args:
        quantization_config: how the layers are to be, or how they are in the checkpoint.
        kwargs: what transformers passes on, ``pre_quantized`` above all: whether the file holds 4-bit weights already.

    Example:
        >>> AutoHfQuantizer.from_config(Refq4Config(), pre_quantized=False).is_trainable
        True
    """

    requires_calibration = False
    quantized_element_size = 0.5  # bytes a weight, for planning a device map
    quantization_config: Refq4Config

    def __init__(self, quantization_config: Refq4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._conv1d: set[str] = set()  # layers of GPT-2's kind: [K, N] in a full-precision file, and when dequantised

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top, that is

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def update_device_map(self, device_map: Any) -> Any:
        if device_map is not None:
            return device_map
        return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Asked of the device map that was given, and of the one that "auto" came to."""
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "part of the model is to stay on disk, in full precision, and would be quantised again in each call: "
                "quantise it without this device_map, save_pretrained it, and load that with it"
            )

    # --- before loading: which modules become 4-bit layers ----------------------------------------------------------

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized:
            _check_skipped(model, self.quantization_config.llm_int8_skip_modules or ())
            self._leave_alone(model, read_by_owner(model))
        config = self.quantization_config
        skip = self.get_modules_to_not_convert(model, config.llm_int8_skip_modules, model._keep_in_fp32_modules)
        skip += config.skip_besides
        tied = {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
        replaced = 0
        for name, module in list(model.named_modules()):
            conv1d = isinstance(module, Conv1D)
            if not (conv1d or is_linear(module)) or name in tied or not should_convert_module(name, skip):
                continue
            if conv1d:
                self._conv1d.add(name)
            model.set_submodule(name, self._empty_layer(module))
            replaced += 1
        if not replaced:
            warn_caller(f"no layer of this {type(model).__name__} is in 4 bits: none is linear, or all are skipped")

    def _leave_alone(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        """Add names to the skipped modules that a saved config lists, in a config of the model's own."""
        if not names:
            return
        config = copy.copy(self.quantization_config)
        others = self.get_modules_to_not_convert(model, config.llm_int8_skip_modules)
        config.llm_int8_skip_modules = sorted({*others, *names})
        self.quantization_config = model.config.quantization_config = config

    def _empty_layer(self, module: nn.Module) -> Linear4bit:
        """A 4-bit layer on the meta device. Bytes from a file have its dtype already: the loader casts to it."""
        config = self.quantization_config
        weight: Any = module.weight
        n, k = weight.T.shape if isinstance(module, Conv1D) else weight.shape
        with torch.device("meta"):
            layer = Linear4bit(
                k,
                n,
                module.bias is not None,
                config.bnb_4bit_compute_dtype,
                config.bnb_4bit_use_double_quant,
                config.bnb_4bit_quant_type,
                config.bnb_4bit_quant_storage,
                blocksize=config.blocksize,
            )
        if self.pre_quantized:
            layer.weight = nn.Parameter(layer.weight.data.to(config.bnb_4bit_quant_storage), requires_grad=False)
        return layer.requires_grad_(False)

    # --- while loading: each tensor ---------------------------------------------------------------------------------

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Linear4bit) and name == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        return Quantise(self)

    @property
    def serialized_names(self) -> dict[str, list[str]]:  # of a parameter, and of what stands beside it in a file
        beside = ["absmax", "quant_map", "nested_absmax", "nested_quant_map"]
        beside += [f"quant_state.bitsandbytes__{name}" for name in codebook_names()]
        return {"weight": ["weight", *(f"weight.{name}" for name in beside)]}

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": Restore}

    # --- after loading, and back ------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model.is_loaded_in_4bit = True  # asked for by peft's prepare_model_for_kbit_training, and by Trainer
        connect("peft")
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # save_pretrained makes a string of the dtype in a model's config
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, module in list(model.named_modules()):
            if isinstance(module, Linear4bit):
                model.set_submodule(name, self._full_precision(module, name in self._conv1d, wanted))
        return model

    def _full_precision(self, layer: Linear4bit, conv1d: bool, dtype: torch.dtype | None) -> nn.Module:
        weight = dequantize_4bit(layer.weight, layer.quant_state).to(dtype)
        n, k = weight.shape
        with torch.device("meta"):
            plain = Conv1D(n, k) if conv1d else nn.Linear(k, n, layer.bias is not None)
        plain.weight = nn.Parameter(weight.T.contiguous() if conv1d else weight)
        plain.bias = layer.bias
        return plain.train(layer.training)


class Quantise(ConversionOps):
    """A full-precision tensor as it comes from the file -> the packed weight of its layer."""

    def __init__(self, hf_quantizer: Refq4Quantizer) -> None:
        self.hf_quantizer = hf_quantizer  # the loader reads this attribute

    def convert(self, input_dict: dict[str, Any], *, model: PreTrainedModel, **kwargs: Any) -> dict[str, Tensor]:
        ((name, value),) = input_dict.items()
        layer, _ = get_module_from_name(model, name)
        weight = _only(value)
        if name.removesuffix(".weight") in self.hf_quantizer._conv1d:
            weight = weight.T.contiguous()
        return {name: _settled(layer, layer.weight._like(weight, None).to(weight.device))}


class Restore(ConversionOps):
    """The packed weight and the tensors beside it -> the weight of their layer, checked as any file is.

    transformers sends every parameter called ``weight`` through here; those of embeddings and norms come alone, and
    pass.
    """

    def __init__(self, hf_quantizer: Refq4Quantizer) -> None:
        self.hf_quantizer = hf_quantizer  # the loader reads this attribute

    def convert(
        self, input_dict: dict[str, Any], *, model: PreTrainedModel, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Any]:
        layer, _ = get_module_from_name(model, full_layer_name)
        if not isinstance(layer, Linear4bit):
            if len(input_dict) > 1:
                raise ValueError(
                    f"{full_layer_name}: quantised in the checkpoint, but llm_int8_skip_modules, given or in its "
                    f"config, names this {type(layer).__name__}: leave it away, or quantise from full precision again"
                )
            return input_dict
        own = full_layer_name.removesuffix("weight")
        parts = {f"{own}{name}": _only(value) for name, value in input_dict.items()}
        packed = parts.pop(full_layer_name, None)
        if packed is None:
            raise ValueError(f"{full_layer_name}: missing, though {', '.join(parts)} are there")
        if not parts:
            raise ValueError(
                f"{full_layer_name}: the entries beside it are missing ({full_layer_name}.absmax, ...); if it is not "
                f"quantised, add {own.removesuffix('.')!r} to llm_int8_skip_modules in config.json"
            )
        weight = Params4bit.from_prequantized(packed, parts, module=layer)
        # What stays where the loader sends the bytes to disk: accelerate brings them back into a copy of this one.
        layer.weight = weight._like(weight.data.to("meta"), weight.quant_state)
        return {"weight": _settled(layer, weight)}

    @property
    def reverse_op(self) -> ConversionOps:
        return Keep()


class Keep(ConversionOps):
    """When saving: a state dict of refq4's layers is what a file holds already."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return input_dict


def _only(value: Any) -> Tensor:
    """The one tensor of a list of one; the loader collects what several files may hold."""
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor


def _settled(layer: Linear4bit, weight: Params4bit) -> Params4bit:
    """``weight``, with its layer marked: over one that it thinks new, transformers writes random numbers."""
    setattr(layer, "_is_hf_initialized", True)  # noqa: B010 (an attribute that the class does not know)
    return weight


def _check_skipped(model: PreTrainedModel, names: Iterable[str]) -> None:
    there = [name for name, _ in model.named_modules()]
    for name in names:
        if all(should_convert_module(other, [name]) for other in there):
            hint = nearest(name, there)
            warn_caller(f"llm_int8_skip_modules: {name!r} is no module of this {type(model).__name__}{hint}")


# --- what transformers has to be told besides -------------------------------------------------------------------------


def _refq4_has_a_say(original: Callable[..., Any]) -> Callable[..., Any]:
    """``AutoHfQuantizer.merge_quantization_configs``, which decides who loads a quantised checkpoint.

    transformers goes by the checkpoint alone, and takes one with ``load_in_4bit`` for bitsandbytes'. Here refq4 loads
    what refq4 saved, and what bitsandbytes saved if a Refq4Config is passed.
    """

    @functools.wraps(original)
    def merge(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        stored, given = quantization_config, quantization_config_from_args
        if not isinstance(stored, dict):
            stored = stored.to_dict()
        ours = stored.get("quant_method") == METHOD and not isinstance(given, BitsAndBytesConfig)
        if ours or isinstance(given, Refq4Config):
            return Refq4Config.for_checkpoint(stored, given)
        return original(quantization_config, quantization_config_from_args)

    return merge


register_quantization_config(METHOD)(Refq4Config)
register_quantizer(METHOD)(Refq4Quantizer)
AutoHfQuantizer.merge_quantization_configs = staticmethod(_refq4_has_a_say(AutoHfQuantizer.merge_quantization_configs))
PreTrainedModel.num_parameters = methods.counts_weights(PreTrainedModel.num_parameters)
PreTrainedModel.resize_token_embeddings = methods.resizes_rows(PreTrainedModel.resize_token_embeddings)
