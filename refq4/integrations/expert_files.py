"""How transformers' loader and saver deal with packed experts; the quantiser in ``transformers.py`` calls this.

file, full precision     experts.0.w1.weight, ... -> transformers' own merge -> [E, N, K] -> packed
file, packed             experts.gate_up_proj, experts.gate_up_proj.absmax, ...           -> RestoreExperts
file, packed by expert   experts.0.w1.weight, experts.0.w1.weight.absmax, ...             -> MergePacked
                         (what bitsandbytes wrote while transformers 4 had a linear layer for each expert)
saved                    experts.gate_up_proj, experts.gate_up_proj.absmax, ...: never taken apart again
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightTransform,
)

from .. import layout
from ..internals.blockwise import decode_scales
from ..internals.holder import Holds4bitWeight
from ..nn.parametrize import PackedParameter, decode_parameter_4bit, parametrize
from ..params import Params4bit
from ..state import QuantState
from .checks import check_described
from .experts import choose_implementation, forget_implementation
from .parts import divided

__all__: list[str] = []  # for the module beside it


def packed(weight: Tensor, settings: dict[str, Any]) -> Params4bit:
    """A weight of fused experts [E, N, K], in 4 bits, with the settings of ``Params4bit``."""
    return Params4bit(weight, **settings).to(weight.device)


def conversions(converters: list[WeightTransform], names: set[str], beside: list[str]) -> list[WeightTransform]:
    """transformers' conversions for a packed checkpoint, with those of the experts before them.

    Args:
        converters: what the model's architecture wants.
        names: of the expert weights that may be packed.
        beside: what stands beside a packed weight in a file: "absmax", ...
    """
    tails = sorted({".".join(name.split(".")[-2:]) for name in names})
    fused: list[WeightTransform] = []
    for tail in tails:
        entries = [tail, *(f"{tail}.{part}" for part in beside)]
        patterns = {rf"(?<!\w){re.escape(entry)}$": entry.removeprefix(tail) for entry in entries}
        fused.append(WeightConverter(list(patterns), tail, [RestoreExperts(patterns)]))
    merged: list[WeightTransform] = []
    for converter in converters:
        whole = isinstance(converter, WeightConverter) and len(converter._original_target_patterns) == 1
        if whole and _makes(converter, names):  # what is taken apart was packed in pieces
            sources = list(converter._original_source_patterns)
            found = [f"{source}{part}" for source in sources for part in ("", *(f".{part}" for part in beside))]
            converter = converter.copy(
                found, converter._original_target_patterns, operations=[MergePacked(sources, converter)]
            )
        merged.append(converter)
    return fused + merged


def refuse_offloaded(model: nn.Module, names: Iterable[str]) -> None:
    """Raise a ValueError if the loader has left expert weights elsewhere: what is brought back has no quant state."""
    for name in sorted(names):
        if model.get_parameter(name).is_meta:
            raise ValueError(
                f"{name}: experts in 4 bits can't be offloaded to disk or to another memory; give a device_map "
                f"in which they stay where they compute"
            )


def settle(model: nn.Module) -> None:
    """After loading, or after :func:`refq4.quantize_model`: packed experts multiply by their bytes, and are saved so.

    transformers undoes its conversions when it saves, and would cut packed bytes as if they were a matrix.
    """
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, Params4bit) and not isinstance(module, Holds4bitWeight):
                parametrize(module, name, parameter)
        choose_implementation(module)
    for part in model.modules():
        known: Any = getattr(part, "_weight_conversions", None)
        names = _packed_names(part) if isinstance(part, PreTrainedModel) else set()
        if known is None and names:
            made = get_model_conversion_mapping(part, add_legacy=False)
            known = [conversion for conversion in made if not isinstance(conversion, PrefixChange)]
        if known is not None:
            kept: Any = [original for original in map(_original, known) if not _makes(original, names)]
            part._weight_conversions = kept


def decode_all(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Give every packed parameter its decoded values, in ``dtype``."""
    for name in _packed_names(model):
        owner, _, param_name = name.rpartition(".")
        module = model.get_submodule(owner)
        decode_parameter_4bit(module, param_name, dtype)
        forget_implementation(module)


class RestoreExperts(ConversionOps):
    """The packed experts of one parameter and what stands beside them -> a Params4bit, checked as any file is.

    One that comes alone is in full precision: bitsandbytes, as of 0.50, leaves fused experts so.

    Args:
        patterns: what the loader calls an entry -> what follows the parameter's name in its key (".absmax").
    """

    hf_quantizer = True  # the loader looks for this attribute, and then casts nothing to the model's dtype

    def __init__(self, patterns: dict[str, str]) -> None:
        self.patterns = patterns

    def convert(
        self,
        input_dict: dict[str, Any],
        target_patterns: list[str],
        *,
        model: PreTrainedModel,
        full_layer_name: str,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        parts = {self.patterns[pattern]: only(value) for pattern, value in input_dict.items()}
        values = parts.pop("", None)
        if values is None:
            raise ValueError(f"{full_layer_name}: missing, though {', '.join(sorted(parts))} are there")
        return {target_patterns[0]: _restored(values, parts, model, full_layer_name)}

    @property
    def reverse_op(self) -> ConversionOps:
        return self  # never run: settle() takes the conversion out before anything is saved


class MergePacked(ConversionOps):
    """Experts that were packed one by one -> the fused parameter: their bytes and their scales, side by side.

    Scales that were quantised themselves are decoded: 256 of them share a scale, across what is put together here.

    Args:
        sources: patterns of the experts' weights.
        original: the architecture's own conversion. Its operations put decoded weights together; here they put together
            a row of bytes for each expert.
    """

    hf_quantizer = True

    def __init__(self, sources: list[str], original: WeightConverter) -> None:
        self.sources, self.original, self.operations = sources, original, original.operations

    def convert(
        self,
        input_dict: dict[str, Any],
        target_patterns: list[str],
        *,
        model: PreTrainedModel,
        full_layer_name: str,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        weights = {source: input_dict[source] for source in self.sources if source in input_dict}
        if weights.keys() == input_dict.keys():
            whole = self._put_together(weights, target_patterns)
            return {target_patterns[0]: _restored(whole, {}, model, full_layer_name)}
        states = {source: self._states(source, input_dict, full_layer_name) for source in weights}
        first = next(iter(states.values()))[0]
        self._check(states, first, full_layer_name)
        rows: dict[str, list[Tensor]] = {}
        scales, shapes = dict(rows), dict(rows)
        for source, of_source in states.items():
            sizes = [state.geometry()[0] for state in of_source]
            pairs = zip(weights[source], of_source, sizes, strict=True)
            rows[source] = [layout.from_storage(w, size.numel()).view(_lines(s), -1) for w, s, size in pairs]
            scales[source] = [decode_scales(state).view(_lines(state), -1) for state in of_source]
            shapes[source] = [torch.empty(size, device="meta") for size in sizes]
        dtype = next(iter(weights.values()))[0].dtype
        together = layout.to_storage(self._put_together(rows, target_patterns).flatten(), dtype)
        absmax = self._put_together(scales, target_patterns).flatten()
        shape = self._put_together(shapes, target_patterns).shape
        state = QuantState(absmax, shape, first.code, first.blocksize, first.quant_type, first.dtype)
        return {target_patterns[0]: _restored(together, state.as_dict(packed=True), model, full_layer_name)}

    @property
    def reverse_op(self) -> ConversionOps:
        return self  # as RestoreExperts

    def _put_together(self, tensors: dict[str, list[Tensor]], target_patterns: list[str]) -> Tensor:
        found: dict[str, Any] = dict(tensors)
        for operation in self.operations:
            found = operation.convert(found, source_patterns=self.sources, target_patterns=target_patterns)
        return only(found[target_patterns[0]])

    def _states(self, source: str, entries: dict[str, Any], name: str) -> list[QuantState]:
        beside = {key.removeprefix(source): values for key, values in entries.items() if key.startswith(f"{source}.")}
        counts = {len(values) for values in (entries[source], *beside.values())}
        if not beside or len(counts) != 1:
            raise ValueError(
                f"{name}: of the experts {source!r} some are packed and some are not, or entries are missing"
            )
        return [
            QuantState.from_dict({part: values[i] for part, values in beside.items()}, packed=packed)
            for i, packed in enumerate(entries[source])
        ]

    def _check(self, states: dict[str, list[QuantState]], first: QuantState, name: str) -> None:
        for operation in self.operations:
            stacks = isinstance(operation, MergeModulelist) and operation.dim == 0
            if not (stacks or (isinstance(operation, Concatenate) and operation.dim == 1)):
                raise ValueError(
                    f"{name}: its experts are packed one by one, and {operation!r} can't put packed bytes together; "
                    f"quantise the model again from full precision"
                )
        for state in (state for of_source in states.values() for state in of_source):
            shape, blocksize = state.geometry()
            if (state.quant_type, blocksize) != (first.quant_type, first.blocksize):
                raise ValueError(f"{name}: its experts are packed in different ways, {first} and {state}")
            if shape.numel() // _lines(state) % blocksize:
                raise ValueError(
                    f"{name}: an expert of shape {list(shape)} ends within a block of {blocksize}, so that packed "
                    f"experts can't be put together; quantise the model again from full precision"
                )


def _lines(state: QuantState) -> int:
    """How many experts a tensor of the file holds: as a rule one."""
    shape, _ = state.geometry()
    return shape[0] if len(shape) == 3 else 1


def _restored(values: Tensor, beside: dict[str, Tensor], model: PreTrainedModel, name: str) -> Tensor:
    parameter: Tensor = model.get_parameter(name)
    if not beside:
        return values.to(parameter.dtype)
    parts = {f"{name}.{part.lstrip('.')}": tensor for part, tensor in beside.items()}
    if values.is_meta:  # names and sizes are checked, not data: refq4.checkpoint
        check_described(name, values, parts, parameter.numel())
        return parameter
    weight = Params4bit.from_prequantized(values, parts)
    assert weight.quant_state is not None
    if weight.quant_state.shape != parameter.shape:
        raise ValueError(f"{name}: the checkpoint holds {weight.quant_state}, the model needs {list(parameter.shape)}")
    owner, _, own = name.rpartition(".")
    return divided(model.get_submodule(owner), own, weight)


def _makes(conversion: WeightTransform, names: set[str]) -> bool:
    """Whether a conversion, or its reverse, is about one of these parameters."""
    if not isinstance(conversion, WeightConverter):
        return False
    targets = tuple(conversion.target_patterns)
    return isinstance(conversion.operations[0], RestoreExperts) or any(name.endswith(targets) for name in names)


def _original(conversion: WeightTransform) -> WeightTransform:
    """What a conversion of this file stands for."""
    operation = conversion.operations[0] if isinstance(conversion, WeightConverter) else None
    return operation.original if isinstance(operation, MergePacked) else conversion


def _packed_names(model: nn.Module) -> set[str]:
    return {
        name.replace(".parametrizations.", ".").removeprefix("parametrizations.")
        for name, module in model.named_modules()
        if isinstance(module, PackedParameter)
    }


def only(value: Any) -> Tensor:
    """The one tensor of a list of one; the loader collects what several files may hold."""
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor
