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

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any, TypeVar

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
from ..models.formats import format_of
from ..models.tables import empty_table
from ..nn import Embedding4bit, Linear4bit
from ..params import Params4bit
from .config import METHOD, Refq4Config

__all__ = ["Refq4Config", "Refq4Quantizer"]

Layer = TypeVar("Layer", bound=nn.Module)


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

    # --- before loading: which modules become 4-bit layers ----------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, device_map: Any = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "part of the model is to stay on disk, in full precision, and would be quantised again in each call: "
                "quantise it without this device_map, save_pretrained it, and load that with it"
            )
        config = self.quantization_config
        chosen = [] if config.head and config.llm_int8_skip_modules is None else config.llm_int8_skip_modules
        skip = self.get_modules_to_not_convert(model, chosen, model._keep_in_fp32_modules)
        tied = {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
        for name, module in list(model.named_modules()):
            conv1d, table = isinstance(module, Conv1D), config.embeddings and type(module) is nn.Embedding
            wanted = conv1d or table or type(module) is nn.Linear
            if not wanted or name in tied or not should_convert_module(name, skip):
                continue
            if conv1d:
                self._conv1d.add(name)
            model.set_submodule(name, self._empty_table(name, module) if table else self._empty_layer(name, module))

    def _settings(self, name: str) -> dict[str, Any]:
        config = self.quantization_config
        settings = {
            "quant_type": config.bnb_4bit_quant_type,
            "compress_statistics": config.bnb_4bit_use_double_quant,
            "blocksize": config.blocksize,
            "scales": config.scales,
        }
        return settings | {"quant_storage": config.bnb_4bit_quant_storage} | format_of(name, config.formats)

    def _empty_table(self, name: str, module: Any) -> Embedding4bit:
        """A 4-bit table on the meta device, with what the model may ask of its embedding."""
        return self._awaiting(empty_table(module, self._settings(name)))

    def _empty_layer(self, name: str, module: nn.Module) -> Linear4bit:
        """A 4-bit layer on the meta device."""
        weight: Any = module.weight
        n, k = weight.T.shape if isinstance(module, Conv1D) else weight.shape
        with torch.device("meta"):
            layer = Linear4bit(
                k,
                n,
                module.bias is not None,
                self.quantization_config.bnb_4bit_compute_dtype,
                **self._settings(name),
            )
        return self._awaiting(layer)

    def _awaiting(self, layer: Layer) -> Layer:
        """Bytes from a file have its dtype already: the loader casts to it."""
        if self.pre_quantized:
            storage = self.quantization_config.bnb_4bit_quant_storage
            weight: Any = layer.weight
            layer.weight = nn.Parameter(weight.data.to(storage), requires_grad=False)
        return layer.requires_grad_(False)

    # --- while loading: each tensor ---------------------------------------------------------------------------------

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Linear4bit | Embedding4bit) and name == "weight"

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
        if "peft" in sys.modules:
            importlib.import_module("refq4.integrations.peft")
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, Linear4bit):
                model.set_submodule(name, self._full_precision(module, name in self._conv1d, dtype))
            elif isinstance(module, Embedding4bit):
                rows = dequantize_4bit(module.weight, module.quant_state).to(dtype)
                table = nn.Embedding(rows.shape[0], rows.shape[1], module.padding_idx, _weight=rows)
                model.set_submodule(name, table.train(module.training))
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
        if not isinstance(layer, Linear4bit | Embedding4bit):
            if len(input_dict) > 1:
                raise ValueError(
                    f"{full_layer_name}: quantised in the checkpoint, but its config names this {type(layer).__name__} "
                    f"among the skipped modules"
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


def _settled(layer: nn.Module, weight: Params4bit) -> Params4bit:
    """``weight``, with its layer marked: over one that it thinks new, transformers writes random numbers."""
    setattr(layer, "_is_hf_initialized", True)  # noqa: B010 (an attribute that the class does not know)
    return weight


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


def _counts_weights(original: Callable[..., int]) -> Callable[..., int]:
    """``PreTrainedModel.num_parameters``, which needs bitsandbytes to see that a byte holds two weights."""

    @functools.wraps(original)
    def num_parameters(self: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        if getattr(self, "quantization_method", None) != METHOD:
            return original(self, only_trainable, exclude_embeddings)
        left_out = {id(m.weight) for m in self.modules() if exclude_embeddings and isinstance(m, nn.Embedding)}
        counted = (p for p in self.parameters() if id(p) not in left_out and (p.requires_grad or not only_trainable))
        return sum(p.quant_state.shape.numel() if getattr(p, "quant_state", None) else p.numel() for p in counted)

    return num_parameters


register_quantization_config(METHOD)(Refq4Config)
register_quantizer(METHOD)(Refq4Quantizer)
AutoHfQuantizer.merge_quantization_configs = staticmethod(_refq4_has_a_say(AutoHfQuantizer.merge_quantization_configs))
PreTrainedModel.num_parameters = _counts_weights(PreTrainedModel.num_parameters)
