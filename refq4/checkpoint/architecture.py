"""What transformers makes of a checkpoint: asked of the model itself, built without memory.

    ask_transformers   which parameter each tensor becomes, and which of them could be in 4 bits: before quantising
    what_is_amiss      what transformers' own loader misses or can't place: afterwards, and for ``inspect``

Both want a ``config.json`` whose architecture the installed transformers knows. The rules are in
``refq4/integrations/fates.py``, for the loader and for files alike.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import places
from .tensors import Entry, SafetensorsReader

if TYPE_CHECKING:
    from ..integrations.fates import Route

__all__ = ["UNKNOWN", "Architecture", "ask_transformers", "no_progress_bar", "what_is_amiss"]

UNKNOWN = "the model has no parameter of this name"

_OURS = ("bitsandbytes", "refq4")


@dataclass
class Architecture:
    """A model on the meta device, and what a checkpoint's tensors become in it.

    Attributes:
        way: where the tensors go.
        choice: parameters that could be in 4 bits -> why they stay as they are, or None.
        transposed: those of them that are stored as [K, N].
        tables: those of them that are embeddings.
    """

    model: Any
    way: Route
    choice: dict[str, str | None]
    transposed: set[str]
    tables: set[str]

    def is_plain(self, parameter: str) -> bool:
        """Whether a parameter is the weight of a layer of which bitsandbytes makes one of its own."""
        from transformers.pytorch_utils import Conv1D

        module = self.model.get_submodule(parameter.rpartition(".")[0])
        return parameter.endswith("weight") and (type(module) is nn.Linear or isinstance(module, Conv1D))


def ask_transformers(
    directory: Path, entries: Mapping[str, Entry], embeddings: bool = False, head: bool = False
) -> Architecture | None:
    """The architecture that a directory's config.json names, or None where nobody can be asked.

    Args:
        embeddings, head: whether tables and output layers could be in 4 bits, too.

    Raises:
        ValueError: transformers' own conversion of the tensors fails.
    """
    model = _build(directory)
    if model is None:
        return None
    from transformers.pytorch_utils import Conv1D

    from ..integrations import fates

    way = fates.route(model, {key: entry.shape for key, entry in entries.items()})
    choice = fates.choose(model, None, way, embeddings=embeddings, head=head)
    conv1d = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return Architecture(model, way, choice, conv1d & choice.keys(), tables & choice.keys())


def what_is_amiss(directory: Path) -> dict[str, str] | None:
    """Name -> what is wrong with it, after transformers' loader has gone through a directory without reading data.

    None where nobody can be asked, or the checkpoint is of a method that is not refq4's.
    """
    model = _build(directory)
    if model is None:
        return None
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    from ..integrations.transformers import Refq4Config, Refq4Quantizer

    stored = places.read_json(directory / "config.json").get("quantization_config")
    quantizer = None
    files = places.weight_files(directory)
    if stored is not None:
        if not isinstance(stored, dict) or stored.get("quant_method") not in _OURS or stored.get("load_in_8bit"):
            return None
        quantizer = Refq4Quantizer(Refq4Config.for_checkpoint(stored), pre_quantized=True)
        quantizer.preprocess_model(model, checkpoint_files=[str(path) for path in files])
    with ExitStack() as stack:
        readers = [stack.enter_context(SafetensorsReader(path)) for path in files]
        state = {key: entry.described() for reader in readers for key, entry in reader.entries.items()}
    try:
        mapping = get_model_conversion_mapping(model, None, quantizer)
    except ValueError as error:  # nothing fits
        return {"config.json": str(error)}
    settings = LoadStateDictConfig(device_map={"": "meta"}, hf_quantizer=quantizer, weight_mapping=mapping)
    with no_progress_bar():
        info, _ = convert_and_load_state_dict_in_model(model, state, settings)
    model._adjust_missing_and_unexpected_keys(info)
    amiss = dict.fromkeys(info.unexpected_keys, UNKNOWN)
    amiss |= dict.fromkeys(info.missing_keys - _tied(model), "missing: the model needs a parameter of this name")
    amiss |= {
        name: f"has the shape {list(held)}, and the model needs {list(wanted)}"
        for name, held, wanted in info.mismatched_keys
    }
    if quantizer is not None:
        lost = _packed(quantizer._way.unknown if quantizer._way is not None else [], state)
        amiss |= dict.fromkeys(lost, "in 4 bits, and the model has no layer of this name")
    errors = {name: text.partition("\nError")[0].splitlines()[-1] for name, text in info.conversion_errors.items()}
    return dict(sorted((amiss | errors).items()))


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keep transformers from showing its own bar while it loads."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _build(directory: Path) -> Any:
    """The model that the config.json names, on the meta device; None where there is none, or transformers lacks it."""
    if not (directory / "config.json").is_file() or importlib.util.find_spec("transformers") is None:
        return None
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        model_class = getattr(transformers, (config.architectures or [""])[0])
        with ExitStack() as as_from_pretrained_does:
            for context in model_class.get_init_context(torch.float32, False, False, None):
                as_from_pretrained_does.enter_context(context)
            return model_class(config)
    except (AttributeError, ImportError, KeyError, OSError, StrictDataclassError, TypeError, ValueError):
        return None  # a class of its own, code from a hub, or an older transformers: the names decide


def _tied(model: Any) -> set[str]:
    """Parameters that need no tensor: they are the same as another."""
    return {name for pair in model.all_tied_weights_keys.items() for name in pair}


def _packed(keys: list[str], state: Mapping[str, Any]) -> list[str]:
    states = {key.partition(".quant_state.")[0] for key in state if ".quant_state." in key}
    return [key for key in keys if key in states]
