"""What transformers' loader and saver do with the tensors of 4-bit layers: quantise them, or take them as they are.

    full precision     a tensor of the file                  -> Quantise -> the packed weight of its layer
    quantised          weight, weight.absmax, ... of a file  -> Restore  -> the weight of its layer
    saved                                                       Keep

The quantiser in ``transformers.py`` hands these to transformers; experts have their own (``expert_files.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizers_utils import get_module_from_name

from ..nn import Embedding4bit, Linear4bit
from ..params import Params4bit
from . import expert_files, fates
from .checks import check_described
from .parts import divided

if TYPE_CHECKING:
    from .transformers import Refq4Quantizer

__all__: list[str] = []  # for transformers.py


class Quantise(ConversionOps):
    """A full-precision tensor as it comes from the file -> the packed weight of its layer."""

    def __init__(self, hf_quantizer: Refq4Quantizer) -> None:
        self.hf_quantizer = hf_quantizer  # the loader reads this attribute

    def convert(
        self, input_dict: dict[str, Any], *, model: PreTrainedModel, source_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        self.hf_quantizer._taken_apart.add(tuple(source_patterns))
        return {name: self._quantised(model, name, expert_files.only(value)) for name, value in input_dict.items()}

    def _quantised(self, model: PreTrainedModel, name: str, weight: Tensor) -> Tensor:
        layer, _ = get_module_from_name(model, name)
        if name.removesuffix(".weight") in self.hf_quantizer._conv1d:
            weight = weight.T.contiguous()
        with fates.named_as_in_the_file(self.hf_quantizer._way, name):
            if name in self.hf_quantizer._experts:
                return divided(
                    layer, name.rpartition(".")[2], expert_files.packed(weight, self.hf_quantizer.settings(name))
                )
            return _settled(layer, divided(layer, "weight", layer.weight._like(weight, None).to(weight.device)))


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
        with fates.named_as_in_the_file(self.hf_quantizer._way, full_layer_name):
            return self._restored(input_dict, model, full_layer_name)

    def _restored(self, input_dict: dict[str, Any], model: PreTrainedModel, full_layer_name: str) -> dict[str, Any]:
        layer, _ = get_module_from_name(model, full_layer_name)
        if not isinstance(layer, Linear4bit | Embedding4bit):
            if len(input_dict) > 1:
                raise ValueError(
                    f"{full_layer_name}: quantised in the checkpoint, but llm_int8_skip_modules, given or in its "
                    f"config, names this {type(layer).__name__}: leave it out, or quantise from full precision again"
                )
            return input_dict
        own = full_layer_name.removesuffix("weight")
        parts = {f"{own}{name}": expert_files.only(value) for name, value in input_dict.items()}
        packed = parts.pop(full_layer_name, None)
        if packed is None:
            raise ValueError(f"{full_layer_name}: missing, though {', '.join(parts)} are there")
        if not parts:
            raise ValueError(
                f"{full_layer_name}: the entries beside it are missing ({full_layer_name}.absmax, ...); if it is not "
                f"quantised, add {own.removesuffix('.')!r} to llm_int8_skip_modules in config.json"
            )
        if packed.is_meta:  # names and sizes are checked, not data: refq4.checkpoint
            check_described(full_layer_name, packed, parts, layer.weight_shape.numel())
            return {"weight": _settled(layer, layer.weight)}
        weight = Params4bit.from_prequantized(packed, parts, module=layer)
        # What stays where the loader sends the bytes to disk: accelerate brings them back into a copy of this one.
        layer.weight = weight._like(weight.data.to("meta"), weight.quant_state)
        return {"weight": _settled(layer, divided(layer, "weight", weight))}

    @property
    def reverse_op(self) -> ConversionOps:
        return Keep()


class Keep(ConversionOps):
    """When saving: a state dict of refq4's layers is what a file holds already."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return input_dict


def _settled(layer: nn.Module, weight: Params4bit) -> Params4bit:
    """``weight``, with its layer marked: over one that it thinks new, transformers writes random numbers."""
    setattr(layer, "_is_hf_initialized", True)  # noqa: B010 (an attribute that the class does not know)
    return weight
