"""What becomes of each tensor of a file in a model of transformers: which parameter it is, and whether in 4 bits.

    file                              transformers' rules        model                       fate
    encoder.layer.0.fc.weight         renamed                    layers.0.fc.weight          4 bits
    attn.qkv.weight                   renamed, cut in three      attn.q.weight, .k, .v       4 bits each
    experts.0.up.weight, 1.up, ...    stacked                    experts.gate_up_proj        as it is
    lm_head.weight                    as it is                   lm_head.weight              as it is

Both ways into a model ask here: the loader (``transformers.py``), and ``refq4.checkpoint`` for files on disk. The rules
are those of ``get_model_conversion_mapping``; ``route`` follows them as ``convert_and_load_state_dict_in_model`` does,
without data. To put another kind of parameter into 4 bits, ``candidates`` has to list it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import load_state_dict
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from ..models.experts import expert_weights, routers
from ..models.linears import is_linear, read_by_owner
from ..models.patterns import EXPERTS, HEAD, unambiguous
from ..models.tables import CHANGES

__all__: list[str] = []  # for the loader beside it, and refq4.checkpoint

FP32 = "kept in fp32 by its architecture"
NEW = "not in the checkpoint"
PLAIN = "in full precision in the checkpoint"
ROUTER = "it chooses experts"
SKIPPED = "named in llm_int8_skip_modules"
TIED = "shares its weight with another module, to which transformers ties it again"
BESIDE = ".quant_state.bitsandbytes__"


@dataclass
class Group:
    """Tensors of a file that become parameters together: one, or what a converter of transformers takes.

    Attributes:
        target: the parameter, or the first of several.
        converter: makes the parameters of the tensors; None if one tensor becomes one parameter.
        sources: key in the file -> the converter's pattern that it matches.
        parts: parameter -> shape.
    """

    target: str
    converter: WeightConverter | None = None
    sources: dict[str, str] = field(default_factory=dict)
    parts: dict[str, torch.Size] = field(default_factory=dict)

    def convert(self, model: PreTrainedModel, tensor: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The parameters by name, of the tensors that ``tensor`` gives for the keys."""
        if self.converter is None:
            return {self.target: tensor(next(iter(self.sources)))}
        converter = deepcopy(self.converter)
        for key, pattern in self.sources.items():
            converter.add_tensor(self.target, key, pattern, tensor(key))
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass
class Route:
    """Where the tensors of a checkpoint go.

    Attributes:
        groups: the tensors that become parameters, in transformers' order.
        unknown: keys that no parameter is made of; transformers ignores them.
        renamings: the rules for names that were used, the other way round: how a parameter is called in the file.
        quantised: parameters that are in 4 bits in the file.
    """

    groups: list[Group] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    renamings: list[WeightRenaming] = field(default_factory=list)
    quantised: set[str] = field(default_factory=set)
    _of: dict[str, Group] = field(default_factory=dict)

    def shape(self, parameter: str) -> torch.Size | None:
        """Shape of a parameter as the file has it, or None if it has none."""
        return self._of[parameter].parts[parameter] if parameter in self._of else None

    def keys(self, parameter: str) -> list[str]:
        """The keys of the file that a parameter is made of."""
        return list(self._of[parameter].sources) if parameter in self._of else []

    def name_in_file(self, parameter: str) -> str:
        """The name under which transformers saves a parameter that no converter takes apart."""
        return str(apply_renamings(parameter, self.renamings))


def route(
    model: PreTrainedModel, shapes: Mapping[str, Sequence[int]], mapping: list[WeightTransform] | None = None
) -> Route:
    """Follow the tensors of a checkpoint into a model whose layers are not replaced yet.

    Args:
        model: on the meta device, or not.
        shapes: key -> shape, of all files of the checkpoint.
        mapping: the rules for names, if they are not transformers' own.

    Raises:
        ValueError: transformers' own conversion fails; the message names the keys.
    """
    mapping = get_model_conversion_mapping(model) if mapping is None else mapping
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    packed = {key.partition(BESIDE)[0] for key in shapes if BESIDE in key}
    shapes = dict.fromkeys(packed, (0,)) | dict(shapes)  # one that is missing is looked for all the same
    found, groups = Route(), dict[str, Group]()
    for key in sorted(shapes, key=dot_natural_key):
        if any(key.startswith(f"{base}.") for base in _prefixes(key) & packed):
            continue
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        if name not in known:
            found.unknown.append(key)
            continue
        group = groups.setdefault(name, Group(name, of_pattern.get(pattern)))
        group.sources[key] = pattern or key
        if key in packed:
            found.quantised.add(name)
    found.groups = list(groups.values())
    found.renamings = [rule.reverse_transform() for rule in renamings[::-1] if rule.was_used()]
    for group in found.groups:
        if packed & group.sources.keys():  # their bytes say nothing of shapes
            group.parts = {group.target: known[group.target].shape}
        else:
            group.parts = _parts(group, model, shapes)
        found._of |= dict.fromkeys(group.parts, group)
    return found


def _prefixes(key: str) -> set[str]:
    """What a key may stand beside: ``a.weight.quant_state.bitsandbytes__nf4`` and ``a.weight.absmax``: ``a.weight``."""
    first = key.rpartition(".")[0]
    return {first, first.rpartition(".")[0]}


def _parts(group: Group, model: PreTrainedModel, shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Size]:
    try:
        made = group.convert(model, lambda key: torch.empty(tuple(shapes[key]), device="meta"))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        keys = ", ".join(list(group.sources)[:3])
        raise ValueError(f"transformers can't make {group.target} of {keys}: {error}") from None
    return {name: tensor.shape for name, tensor in made.items()}


def shapes_in(files: Iterable[str | Path] | None) -> dict[str, Sequence[int]] | None:
    """Key -> shape, of files of safetensors or of torch; None where there is no file."""
    from safetensors import safe_open

    if not files:
        return None
    shapes: dict[str, Sequence[int]] = {}
    for file in map(str, files):
        if file.endswith(".safetensors"):
            with safe_open(file, "pt") as opened:
                shapes |= {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118 (no dict)
        else:
            shapes |= {key: value.shape for key, value in load_state_dict(file, map_location="meta").items()}
    return shapes


# --- in 4 bits, or not ------------------------------------------------------------------------------------------------


def choose(
    model: PreTrainedModel,
    skip: list[str] | None,
    way: Route | None,
    pre_quantized: bool = False,
    besides: Sequence[str] = (),
    embeddings: bool = False,
    head: bool = False,
) -> dict[str, str | None]:
    """Each parameter that could be in 4 bits -> why it stays as it is; None if it is to be in 4 bits.

    Args:
        model: whose layers are not replaced yet.
        skip: ``llm_int8_skip_modules``, by names of the model or of the file; None for the output layers, or with
            ``head`` for nothing.
        way: where the tensors of the checkpoint go; None if it is not known.
        pre_quantized: the file says what is in 4 bits.
        besides: more names like those of ``skip``.
        embeddings, head: whether tables and output layers are asked for; what shares its weight stays.
    """
    skipped = [*(skip or ()), *besides]
    heads = get_keys_to_not_convert(model) if skip is None and not head else []
    if not pre_quantized:  # bitsandbytes quantises an output layer with a bias
        heads = [_module_of(model, key) for key in heads]
    fp32 = list(model._keep_in_fp32_modules or ())
    pairs = model.all_tied_weights_keys.items()
    packed = way.quantised if pre_quantized and embeddings and way is not None else set()
    shared = {name for pair in pairs if packed & set(pair) for name in pair}  # in 4 bits in the file, once
    tied = {name for pair in pairs for name in pair} - shared
    choice: dict[str, str | None] = {}
    for name, kind in candidates(model, pre_quantized, embeddings).items():
        called = names_of(name, way)
        module = called[0]
        if not name.endswith("weight"):  # experts: a parameter of the module that is meant
            called.append(name.rpartition(".")[0])
        shape = way.shape(name) if way is not None else None
        why: str | None = None
        if name in tied or module in tied:
            why = TIED if embeddings or head else HEAD
        elif not should_convert_module(module, heads):
            why = HEAD
        elif not all(should_convert_module(either, skipped) for either in called):
            why = SKIPPED
        elif not should_convert_module(module, fp32):
            why = FP32
        elif way is not None and shape is None and name not in shared:
            why = NEW
        elif pre_quantized and way is not None and name not in way.quantised and shape == _shape(model, name):
            why = PLAIN
        choice[name] = why or kind
    return _alike(choice, way)


def names_of(parameter: str, way: Route | None) -> list[str]:
    """What a parameter is called in the model, and what its tensors are in the file; without ``.weight``."""
    keys = [] if way is None else way.keys(parameter)
    return list(dict.fromkeys(key.removesuffix(".weight") for key in (parameter, *keys)))


def candidates(model: PreTrainedModel, pre_quantized: bool = False, embeddings: bool = False) -> dict[str, str | None]:
    """The weights of linear layers, experts and embeddings by name -> why all such ones stay as they are, or None.

    Of a file that is quantised already, the file says what is in 4 bits.
    """
    reserved = {} if pre_quantized else read_by_owner(model) | dict.fromkeys(routers(model), ROUTER)
    packable = {name for name, _, _ in expert_weights(model)}
    found: dict[str, str | None] = {}
    for name, module in model.named_modules():
        if is_linear(module) or isinstance(module, Conv1D):
            found[f"{name}.weight" if name else "weight"] = reserved.get(name)
        elif embeddings and type(module) is nn.Embedding:
            found[f"{name}.weight"] = None if module.max_norm is None else CHANGES
        elif "experts" in name.rpartition(".")[2].lower() or "Experts" in type(module).__name__:
            weights = (f"{name}.{own}" for own, weight in module.named_parameters(recurse=False) if weight.dim() == 3)
            found |= {weight: EXPERTS for weight in weights if weight not in packable}
    return found | dict.fromkeys(packable)


def _alike(choice: dict[str, str | None], way: Route | None) -> dict[str, str | None]:
    """What one tensor becomes is in 4 bits as a whole or not at all: transformers asks about its first part only."""
    for group in way.groups if way is not None else []:
        reasons = [choice[name] for name in group.parts if choice.get(name) is not None]
        if reasons:
            choice |= {name: choice[name] or reasons[0] for name in group.parts if name in choice}
    return choice


def _module_of(model: PreTrainedModel, key: str) -> str:
    """The linear layer that the last parameter of a model, its bias, belongs to; any other key as it is."""
    module = key.removesuffix(".bias")
    held: Any = dict(model.named_modules()).get(module)
    return module if isinstance(held, nn.Linear | Conv1D) else key


def _shape(model: PreTrainedModel, parameter: str) -> torch.Size:
    shape: torch.Size = model.get_parameter(parameter).shape
    return shape


# --- what is said of it -----------------------------------------------------------------------------------------------


def with_names_of_what_is_left(config: Any, model: PreTrainedModel, choice: dict[str, str | None]) -> Any:
    """The config, or a copy that names the layers left alone where transformers by itself would replace one of them."""
    skip = config.llm_int8_skip_modules
    own_rule = list(skip or ()) if config.head or skip is not None else get_keys_to_not_convert(model)
    own_rule += list(model._keep_in_fp32_modules or ())
    linears = {name.removesuffix(".weight"): why for name, why in choice.items() if why != EXPERTS}
    left = {name for name, why in linears.items() if why is not None}
    if not any(should_convert_module(name, own_rule) for name in left):
        return config
    config = copy(config)
    config.llm_int8_skip_modules = unambiguous(left, linears.keys() - left)
    return config


@contextmanager
def named_as_in_the_file(way: Route | None, parameter: str) -> Iterator[None]:
    """Add to an error what a parameter is called in the file, where that is something else."""
    try:
        yield
    except ValueError as error:
        keys = [key for key in (way.keys(parameter) if way is not None else []) if key != parameter]
        raise ValueError(f"{error} (in the file: {', '.join(keys)})" if keys else str(error)) from None
