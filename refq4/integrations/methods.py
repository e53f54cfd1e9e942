"""Functions of transformers that have to know of refq4: who loads a checkpoint, and what packed bytes are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import BitsAndBytesConfig

from ..internals.checks import warn_caller
from ..nn import Embedding4bit, Linear4bit
from . import later
from .config import METHOD, Refq4Config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__: list[str] = []  # transformers.py puts them in place


def refq4_has_a_say(original: Any, cls: Any, quantization_config: Any, quantization_config_from_args: Any) -> Any:
    """``AutoHfQuantizer.merge_quantization_configs``, which decides who loads a quantised checkpoint.

    transformers goes by the checkpoint alone, and takes one with ``load_in_4bit`` for bitsandbytes'. Here refq4 loads
    what refq4 saved, and what bitsandbytes saved if a Refq4Config is passed or :func:`later.serve_bitsandbytes` was
    called. Where it is left to bitsandbytes, a warning says so once.
    """
    stored, given = quantization_config, quantization_config_from_args
    if not isinstance(stored, dict):
        stored = stored.to_dict()
    given = _served(given)
    in_4_bits = bool(stored.get("load_in_4bit")) and stored.get("quant_method") != METHOD
    if in_4_bits and given is None and later.served:
        given = Refq4Config(saved_for="bitsandbytes")
    ours = stored.get("quant_method") == METHOD and given is None
    if ours or isinstance(given, Refq4Config):
        return Refq4Config.for_checkpoint(stored, given)
    if in_4_bits and given is None and not later.told:
        later.told = True
        warn_caller(
            "this checkpoint of bitsandbytes gets bitsandbytes' own layers, which refq4.set_backend and "
            "refq4.trace don't reach; pass quantization_config=Refq4Config() to from_pretrained for refq4's"
        )
    return original(cls, quantization_config, quantization_config_from_args)


def takes_bitsandbytes_place(original: Any, cls: Any, quantization_config: Any, **kwargs: Any) -> Any:
    """``AutoHfQuantizer.from_config``, which makes the quantiser: refq4's for bitsandbytes' 4 bits, if so chosen."""
    return original(cls, _served(quantization_config), **kwargs)


def _served(config: Any) -> Any:
    """A config of bitsandbytes in 4 bits as one of refq4, if refq4 takes its place; any other as it is."""
    if not later.served:
        return config
    if isinstance(config, dict) and config.get("load_in_4bit") and config.get("quant_method") != METHOD:
        config = BitsAndBytesConfig.from_dict(config)
    if isinstance(config, BitsAndBytesConfig) and not isinstance(config, Refq4Config) and config.load_in_4bit:
        return Refq4Config.of_bitsandbytes(config)
    return config


def counts_weights(
    original: Any, self: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """``PreTrainedModel.num_parameters``, which needs bitsandbytes to see that a byte holds two weights."""
    if getattr(self, "quantization_method", None) != METHOD:
        return original(self, only_trainable, exclude_embeddings)  # type: ignore[no-any-return]
    left_out = {id(m.weight) for m in self.modules() if exclude_embeddings and isinstance(m, nn.Embedding)}
    counted = (p for p in self.parameters() if id(p) not in left_out and (p.requires_grad or not only_trainable))
    return sum(p.quant_state.shape.numel() if getattr(p, "quant_state", None) else p.numel() for p in counted)


def resizes_rows(
    original: Any, self: PreTrainedModel, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
) -> Any:
    """``PreTrainedModel.resize_token_embeddings``, which makes a head of the dtype that the old one's weight has."""
    table, head = self.get_input_embeddings(), self.get_output_embeddings()
    packed = head if isinstance(head, Linear4bit) else table
    if isinstance(packed, Linear4bit | Embedding4bit) and new_num_tokens is not None:
        if new_num_tokens == packed.weight_shape[0]:
            return table  # by the bytes, transformers would think it of another size
        what = "output layer" if packed is head else "embedding"
        raise ValueError(
            f"the {what} of this {type(self).__name__} is in 4 bits, and packed bytes get no new rows: "
            f"resize before quantising, or leave that layer in full precision (llm_int8_skip_modules, skip)"
        )
    return original(self, new_num_tokens, *args, **kwargs)
