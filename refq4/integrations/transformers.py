"""transformers on refq4's layers: import this module, then use ``from_pretrained`` and ``save_pretrained`` as usual.

    from refq4.integrations.transformers import Refq4Config
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=Refq4Config(bnb_4bit_quant_type="nf4"))

    full precision     file -> one tensor at a time -> Quantise      -> Linear4bit     never two copies of the model
    quantised          file -> weight, weight.absmax, ... -> Restore -> Linear4bit     of refq4 or of bitsandbytes

transformers finds the quantiser by name (``register_quantizer``) and asks it which modules to replace before loading,
what to do with each tensor, and how to go back. Its loader, in ``transformers/core_model_loading.py``, changes from
version to version; those that were tried are in ``versions.py``. The config class is in ``config.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from . import versions

versions.check("transformers", "transformers")
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.modeling_utils import local_torch_dtype
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from ..codebooks import codebook_names
from ..functional import dequantize_4bit
from ..internals.checks import warn_caller
from ..models.formats import check_used
from ..models.tables import empty_table, share_tables
from ..nn import Embedding4bit, Linear4bit
from ..params import Params4bit
from . import expert_files, fates, methods, parallel_plans
from .checks import check_skipped
from .config import METHOD, Refq4Config
from .conversions import Quantise, Restore
from .instead import instead_of
from .later import connect
from .parts import is_divided
from .tensor_parallel import whole_state_dict

__all__ = ["Refq4Config", "Refq4Quantizer"]

Layer = TypeVar("Layer", Linear4bit, Embedding4bit)


class Refq4Quantizer(HfQuantizer):
    """The class that transformers uses to load, save and dequantise a model; users only need :class:`Refq4Config`.

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
        self._experts: set[str] = set()  # fused expert weights that are or will be in 4 bits
        self._conv1d: set[str] = set()  # layers of GPT-2's kind: [K, N] in a full-precision file, and when dequantised
        self._shapes: Mapping[str, Sequence[int]] | None = None  # of the tensors of the checkpoint
        self._way: fates.Route | None = None  # where they go
        self._taken_apart: set[tuple[str, ...]] = set()  # patterns of converters that made 4-bit weights

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

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self._shapes = fates.shapes_in(checkpoint_files)

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """The rules by which tensors are renamed, ``key_mapping`` of the user included: they say what the file has."""
        if self._shapes is not None:
            self._way = fates.route(model, self._shapes, weight_conversions)
            if not self._way.groups:
                raise ValueError(
                    f"the checkpoint holds no parameter of a {type(model).__name__}, which needs "
                    f"{next(iter(model.state_dict()))}, for example; the file has {min(self._shapes or ['nothing'])}. "
                    f"Load it with another class, or pass key_mapping={{...}} with the names that differ"
                )
        self._replace_layers(model)
        model.hf_quantizer = self  # transformers sets it after loading; parallel_plans.py asks it before
        if self.pre_quantized:
            beside = [name.removeprefix("weight.") for name in self.serialized_names["weight"][1:]]
            weight_conversions = expert_files.conversions(weight_conversions, self._experts, beside)
        rules: list[Any] = super().update_weight_conversions(weight_conversions, model)
        return rules

    def _replace_layers(self, model: PreTrainedModel) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            check_skipped(model, config.llm_int8_skip_modules or (), self._way)
        choice = fates.choose(
            model,
            config.llm_int8_skip_modules,
            self._way,
            self.pre_quantized,
            config.skip_besides,
            config.embeddings,
            config.head,
        )
        if not self.pre_quantized:
            config = fates.with_names_of_what_is_left(config, model, choice)
            self.quantization_config = model.config.quantization_config = config
        chosen = [name for name, why in choice.items() if why is None]
        if not self.pre_quantized:
            check_used(config.formats, (called for name in chosen for called in fates.names_of(name, self._way)))
        for name in chosen:
            owner = name.rpartition(".")[0]
            module = model.get_submodule(owner)
            if isinstance(module, Conv1D):
                self._conv1d.add(owner)
            if isinstance(module, nn.Linear | Conv1D):
                model.set_submodule(owner, self._empty_layer(module, self.settings(name)))
            elif isinstance(module, nn.Embedding):
                model.set_submodule(owner, self._awaiting(empty_table(module, self.settings(name))))
            else:
                self._experts.add(name)
        if not chosen:
            warn_caller(f"no layer of this {type(model).__name__} is in 4 bits: none is linear, or all are skipped")

    def settings(self, parameter: str) -> dict[str, Any]:
        """How a parameter is quantised, as in ``quantize_4bit``."""
        return self.quantization_config.of(*fates.names_of(parameter, self._way))

    def _empty_layer(self, module: nn.Module, settings: dict[str, Any]) -> Linear4bit:
        """A 4-bit layer on the meta device."""
        weight: Any = module.weight
        n, k = weight.T.shape if isinstance(module, Conv1D) else weight.shape
        with torch.device("meta"), local_torch_dtype(weight.dtype):
            layer = Linear4bit(
                k,
                n,
                module.bias is not None,
                self.quantization_config.bnb_4bit_compute_dtype,
                **settings,
            )
        return self._awaiting(layer)

    def _awaiting(self, layer: Layer) -> Layer:
        """Bytes from a file have its dtype already: the loader casts to it."""
        if self.pre_quantized:
            storage = self.quantization_config.bnb_4bit_quant_storage
            layer.weight = nn.Parameter(layer.weight.data.to(storage), requires_grad=False)
        return layer.requires_grad_(False)

    # --- while loading: each tensor ---------------------------------------------------------------------------------

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return (isinstance(module, Linear4bit | Embedding4bit) and name == "weight") or param_name in self._experts

    def get_quantize_ops(self) -> ConversionOps:
        return Quantise(self)

    @property
    def serialized_names(self) -> dict[str, list[str]]:  # of a parameter, and of what stands beside it in a file
        beside = ["absmax", "quant_map", "nested_absmax", "nested_quant_map"]
        beside += [f"quant_state.bitsandbytes__{name}" for name in codebook_names()]
        return {"weight": ["weight", *(f"weight.{name}" for name in beside)]}

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> Any:
        """Without what stands beside a weight that is tied to a 4-bit table: transformers leaves out that weight."""
        weights = dict(model.named_parameters(remove_duplicate=False))
        divided = is_divided(model)
        tied = tuple(f"{name}." for name in model.all_tied_weights_keys if isinstance(weights.get(name), Params4bit))
        if not tied and not divided:
            return super().get_state_dict_and_metadata(model)
        entries = whole_state_dict(model) if divided else model.state_dict()
        return {key: value for key, value in entries.items() if not key.startswith(tied)}, {}

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": Restore}

    # --- after loading, and back ------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        expert_files.refuse_offloaded(model, self._experts)
        expert_files.settle(model)
        share_tables(model)
        parallel_plans.settle(model)
        model.is_loaded_in_4bit = True  # asked for by peft's prepare_model_for_kbit_training, and by Trainer
        model._weight_conversions = [  # what was quantised in pieces can't be put together again when saving
            rule for rule in model._weight_conversions if tuple(rule.source_patterns) not in self._taken_apart
        ]
        connect("peft")
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        if is_divided(model):
            raise ValueError(
                "this process holds a part of the model's 4-bit weights, and can't decode the whole: "
                "save_pretrained it, and dequantize() what one process loads"
            )
        # save_pretrained makes a string of the dtype in a model's config
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        expert_files.decode_all(model, wanted)
        for name, module in list(model.named_modules()):
            if isinstance(module, Linear4bit):
                model.set_submodule(name, self._full_precision(module, name in self._conv1d, wanted))
            elif isinstance(module, Embedding4bit):
                rows = dequantize_4bit(module.weight, module.quant_state).to(wanted)
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


# --- what transformers has to be told besides -------------------------------------------------------------------------

register_quantization_config(METHOD)(Refq4Config)
register_quantizer(METHOD)(Refq4Quantizer)
instead_of(AutoHfQuantizer, "merge_quantization_configs")(methods.refq4_has_a_say)
instead_of(AutoHfQuantizer, "from_config")(methods.takes_bitsandbytes_place)
instead_of(PreTrainedModel, "num_parameters")(methods.counts_weights)
instead_of(PreTrainedModel, "resize_token_embeddings")(methods.resizes_rows)
