"""Refq4Config: the settings of a quantised transformers model, under the names of ``BitsAndBytesConfig``.

    from_pretrained(..., quantization_config=Refq4Config(...))   quantise while loading        what the user asks for
    config.json                                                  "quantization_config": {...}  what a checkpoint says
    from_pretrained(quantised, quantization_config=...)          the two together              for_checkpoint below

What the settings do to a model is in ``refq4/integrations/transformers.py``.
"""

from __future__ import annotations

import difflib
import inspect
from enum import StrEnum
from typing import Any, Self

import torch
from transformers import BitsAndBytesConfig

from ..codebooks import get_codebook
from ..functional import DEFAULT_BLOCKSIZE
from ..internals.checks import check_blocksize, check_storage, warn_caller
from ..internals.scale_search import check_way
from ..models.formats import Formats, check_formats, format_of

__all__ = ["METHOD", "Refq4Config"]


class Method(StrEnum):
    """How transformers and diffusers name a way to quantise: a word that has a ``value``."""

    REFQ4 = "refq4"


METHOD = Method.REFQ4
"""``"quant_method"`` in a config.json, and the name under which transformers knows the quantiser.

Example:
    >>> Refq4Config().to_dict()["quant_method"] == METHOD
    True
"""

# Fields of BitsAndBytesConfig that are about its 8-bit layers, with the value that says "not in use".
_EIGHT_BIT = {
    "load_in_8bit": False,
    "llm_int8_threshold": 6.0,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_enable_fp32_cpu_offload": False,
}
# What a config.json holds besides the arguments.
_ONLY_IN_FILES = ("quant_method", "_load_in_4bit", "_load_in_8bit")
_OF_THE_WEIGHTS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage")
_KNOWN_TO_BITSANDBYTES = ("nf4", "fp4")


class Refq4Config(BitsAndBytesConfig):
    """4-bit layers of refq4 in a transformers model; every field and default is that of ``BitsAndBytesConfig``.

    Args:
        load_in_4bit: must be True (the only default that differs from bitsandbytes).
        bnb_4bit_quant_type: a codebook's name ("fp4", "nf4", ...).
        bnb_4bit_compute_dtype: dtype of the products, or its name; if None, the checkpoint's, else float32.
        bnb_4bit_use_double_quant: double quantisation of the scales.
        bnb_4bit_quant_storage: dtype the packed bytes are stored under, or its name; uint8 if None.
        llm_int8_skip_modules: names of modules that stay as they are; if None, the output head and tied weights.
        blocksize: elements per block; 64 if None (not in bitsandbytes).
        scales: "absmax", or "search" for a smaller error in the same format (not in bitsandbytes).
        embeddings: also quantise the tables, as Embedding4bit with plain scales; not if they share a weight (likewise).
        head: also quantise the output head, unless it shares its weight (likewise) or is in ``llm_int8_skip_modules``.
        formats: different settings for some layers, by patterns of their names: ``{"mlp": {"blocksize": 128}}``
            (likewise); see :func:`refq4.quantize_model`.
        saved_for: "refq4" or "bitsandbytes", the method that ``save_pretrained`` writes; a program that knows only
            bitsandbytes loads the latter. refq4 loads both.
        others: fields for 8-bit layers, accepted with their defaults: every checkpoint of bitsandbytes has them.

    Raises:
        ValueError: an unknown field, an 8-bit field in use, or a value that no 4-bit layer can have.
        TypeError: a field of the wrong type.

    Example:
        >>> Refq4Config(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16").bnb_4bit_compute_dtype
        torch.bfloat16
    """

    def __init__(
        self,
        *,
        load_in_4bit: bool = True,
        bnb_4bit_quant_type: str = "fp4",
        bnb_4bit_compute_dtype: torch.dtype | str | None = None,
        bnb_4bit_use_double_quant: bool = False,
        bnb_4bit_quant_storage: torch.dtype | str | None = None,
        llm_int8_skip_modules: list[str] | None = None,
        blocksize: int | None = None,
        scales: str = "absmax",
        embeddings: bool = False,
        head: bool = False,
        formats: Formats | None = None,
        saved_for: str = "refq4",
        **others: Any,
    ) -> None:
        _check_others(others)
        if load_in_4bit is not True:
            raise ValueError(f"load_in_4bit={load_in_4bit!r}: refq4 has 4-bit layers only; leave the config out")
        super().__init__(
            load_in_4bit=True,
            bnb_4bit_quant_type=bnb_4bit_quant_type,
            bnb_4bit_compute_dtype=_dtype("bnb_4bit_compute_dtype", bnb_4bit_compute_dtype),
            bnb_4bit_use_double_quant=bnb_4bit_use_double_quant,
            bnb_4bit_quant_storage=_dtype("bnb_4bit_quant_storage", bnb_4bit_quant_storage),
            llm_int8_skip_modules=llm_int8_skip_modules,
        )
        get_codebook(bnb_4bit_quant_type)  # raises for an unknown one
        check_storage(self.bnb_4bit_quant_storage)
        self.quant_method = METHOD
        self.blocksize = check_blocksize(DEFAULT_BLOCKSIZE if blocksize is None else blocksize)
        self.scales = check_way(scales)
        self.embeddings, self.head, self.formats = bool(embeddings), bool(head), check_formats(formats or {})
        self.saved_for = self._check_saved_for(saved_for)
        self.skip_besides: list[str] = []  # what was given for a checkpoint, besides its own list
        self._compute_dtype_given = bnb_4bit_compute_dtype is not None

    @classmethod
    def of_bitsandbytes(cls, config: BitsAndBytesConfig) -> Self:
        """The same settings as a config of bitsandbytes, and files that it reads; its 8-bit fields are dropped.

        Raises:
            ValueError: it is not for 4 bits.

        Example:
            >>> theirs = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
            >>> Refq4Config.of_bitsandbytes(theirs).to_dict()["quant_method"]
            'bitsandbytes'
        """
        own = {key: value for key, value in config.to_diff_dict().items() if key not in _EIGHT_BIT}
        return cls(**own | {"load_in_4bit": config.load_in_4bit, "saved_for": "bitsandbytes"})

    @classmethod
    def for_checkpoint(cls, stored: dict[str, Any], given: Self | None = None) -> Self:
        """The config of a quantised checkpoint of refq4 or bitsandbytes.

        How the weights are stored is the checkpoint's to say; the compute dtype is the user's, if one was given. A
        module that the user wants skipped must be in full precision there: a packed one is refused when it is loaded.

        Args:
            stored: "quantization_config" of its config.json.
            given: what the user passed to ``from_pretrained``.

        Raises:
            ValueError: the checkpoint was quantised by another method, or in 8 bits.

        Warns:
            UserWarning: ``given`` asks for weights that the checkpoint doesn't hold.
        """
        named = stored.get("quant_method") or ("bitsandbytes" if stored.get("load_in_4bit") else None)
        method = str(getattr(named, "value", named))
        if method not in (METHOD, "bitsandbytes") or not stored.get("load_in_4bit", method == METHOD):
            bits = " in 8 bits" if stored.get("load_in_8bit") else ""
            raise ValueError(
                f"this checkpoint was quantised by {method}{bits}; refq4 loads 4-bit checkpoints of refq4 and "
                f"bitsandbytes, and quantises models in full precision"
            )
        config = cls(**{key: value for key, value in stored.items() if key not in _EIGHT_BIT})
        if given is not None:
            differ = [name for name in _OF_THE_WEIGHTS if getattr(given, name) != getattr(config, name)]
            if differ and given.to_diff_dict().keys() & set(differ):
                held = ", ".join(f"{name}={getattr(config, name)}" for name in differ)
                warn_caller(f"the checkpoint is quantised already, and its own settings are used: {held}")
            config.skip_besides = given.llm_int8_skip_modules or []
            if given.saved_for != METHOD and (unknown := config._unknown_to_bitsandbytes()):
                warn_caller(f"bitsandbytes does not know {unknown}, so the model will be saved as refq4's")
            else:
                config.saved_for = given.saved_for
            if given._compute_dtype_given:
                config.bnb_4bit_compute_dtype = given.bnb_4bit_compute_dtype
        return config

    def of(self, *names: str) -> dict[str, Any]:
        """How one weight is quantised, by the names that it goes by, as in ``quantize_4bit``.

        Example:
            >>> Refq4Config(formats={"mlp": {"blocksize": 128}}).of("layers.0.mlp.up_proj")["blocksize"]
            128
        """
        settings = {
            "quant_type": self.bnb_4bit_quant_type,
            "compress_statistics": self.bnb_4bit_use_double_quant,
            "quant_storage": self.bnb_4bit_quant_storage,
            "blocksize": self.blocksize,
            "scales": self.scales,
        }
        return settings | format_of(self.formats, *names)

    def to_dict(self) -> dict[str, Any]:
        """What goes into a config.json.

        With ``load_in_4bit`` beside it, transformers hands the checkpoint to bitsandbytes where refq4's integration is
        not imported; for a codebook that bitsandbytes lacks, and for tables, it is left out.
        """
        fields = {
            "quant_method": str(METHOD),
            "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
            "bnb_4bit_compute_dtype": _name(self.bnb_4bit_compute_dtype),
            "bnb_4bit_use_double_quant": self.bnb_4bit_use_double_quant,
            "bnb_4bit_quant_storage": _name(self.bnb_4bit_quant_storage),
            "llm_int8_skip_modules": self.llm_int8_skip_modules,
            "blocksize": self.blocksize,
            "scales": self.scales,
            "embeddings": self.embeddings,
            "head": self.head,
            "formats": self.formats,
        }
        if self.saved_for != METHOD:
            theirs = {key: value for key, value in fields.items() if key.startswith(("bnb_", "llm_"))}
            return theirs | {"quant_method": self.saved_for, "load_in_4bit": True}
        return fields | ({"load_in_4bit": True} if not self._unknown_to_bitsandbytes() else {})

    def _unknown_to_bitsandbytes(self) -> str:
        """What its loader can't read, empty if it can."""
        types = {self.bnb_4bit_quant_type, *(own.get("quant_type", "nf4") for own in self.formats.values())}
        foreign = sorted(types - set(_KNOWN_TO_BITSANDBYTES))
        return f"the type {foreign[0]}" if foreign else "embeddings in 4 bits" if self.embeddings else ""

    def _check_saved_for(self, library: str) -> str:
        if library not in (METHOD, "bitsandbytes"):
            raise ValueError(f'saved_for={library!r}: it must be "refq4" or "bitsandbytes"')
        if library != METHOD and (unknown := self._unknown_to_bitsandbytes()):
            raise ValueError(f"saved_for={library!r}: bitsandbytes does not know {unknown}; leave saved_for out")
        return library

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields that are not at their defaults."""
        defaults = Refq4Config().to_dict()
        return {key: value for key, value in self.to_dict().items() if value != defaults.get(key)}

    def quantization_method(self) -> str:
        """The codebook's name."""
        return str(self.bnb_4bit_quant_type)


def _check_others(others: dict[str, Any]) -> None:
    known = [name for name in inspect.signature(Refq4Config).parameters if name != "others"]
    for name, value in others.items():
        if name in _EIGHT_BIT:
            if value != _EIGHT_BIT[name]:
                raise ValueError(f"{name}={value!r} is about 8-bit layers, and refq4 has 4-bit ones; leave it out")
        elif name not in _ONLY_IN_FILES:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"Refq4Config has no field {name!r}: {hint}")


def _dtype(name: str, given: torch.dtype | str | None) -> torch.dtype | str | None:
    """What BitsAndBytesConfig parses; it would take any attribute of torch for a dtype."""
    if isinstance(given, str) and not isinstance(getattr(torch, given.removeprefix("torch."), None), torch.dtype):
        raise ValueError(f"{name}={given!r} is not a dtype of torch; 'bfloat16' or torch.bfloat16, for example")
    return given.removeprefix("torch.") if isinstance(given, str) else given


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
