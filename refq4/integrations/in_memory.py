"""A transformers model that ``refq4.quantize_model`` quantised in memory, made to save and reload."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..models.patterns import EXPERTS, unambiguous
from ..nn import Embedding4bit, Linear4bit
from . import fates
from .config import METHOD, Refq4Config
from .transformers import Refq4Quantizer

__all__: list[str] = []  # for quantize_model


def adopt(model: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Give a model whose layers ``quantize_model`` replaced what one that ``from_pretrained`` quantised has."""
    if not isinstance(getattr(model, "hf_quantizer", None), Refq4Quantizer | None):
        return  # part of it belongs to another method
    ours = {name for name, module in model.named_modules() if isinstance(module, Linear4bit | Embedding4bit)}
    embeddings = any(isinstance(module, Embedding4bit) for module in model.modules())
    could = fates.candidates(model, pre_quantized=True, embeddings=embeddings)
    left = {name.removesuffix(".weight") for name, why in could.items() if why != EXPERTS}
    config = Refq4Config(
        bnb_4bit_quant_type=settings["quant_type"],
        bnb_4bit_compute_dtype=settings["compute_dtype"] or model.dtype,
        bnb_4bit_use_double_quant=settings["compress_statistics"],
        bnb_4bit_quant_storage=settings["quant_storage"],
        llm_int8_skip_modules=unambiguous(left, ours),
        blocksize=settings["blocksize"],
        scales=settings["scales"],
        embeddings=embeddings,
        head=settings["head"],
        formats=settings["formats"],
    )
    model.hf_quantizer = Refq4Quantizer(config, pre_quantized=True)
    model.hf_quantizer._conv1d = {
        name for name, module in model.named_modules() if module.__dict__.get("source_cls") is Conv1D
    }
    model.config.quantization_config = config
    model.is_quantized, model.quantization_method, model.is_loaded_in_4bit = True, METHOD, True
