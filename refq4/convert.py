"""Turning a model's linear layers into 4-bit ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn

from .nn import Linear4bit

__all__ = ["quantize_model"]

Model = TypeVar("Model", bound=nn.Module)


def quantize_model(
    model: Model,
    *,
    quant_type: str = "nf4",
    compress_statistics: bool = True,
    compute_dtype: torch.dtype | None = None,
    quant_storage: torch.dtype = torch.uint8,
    blocksize: int | None = None,
    skip: Iterable[str] = ("lm_head",),
    progress: bool = True,
) -> Model:
    """Replace every ``nn.Linear`` of a model by a quantised :class:`~refq4.nn.Linear4bit`, in place.

    Layer by layer: at no time does the model exist twice. ``copy.deepcopy`` it first to keep the original.

    Args:
        model: any module; it is changed. A bare ``nn.Linear`` is returned converted.
        quant_type, compress_statistics, compute_dtype, quant_storage, blocksize: as in ``Linear4bit``.
        skip: a layer is left alone if one of these is its name or a part of its dotted name.
        progress: show a progress bar (on a terminal).

    Returns:
        The model.

    Raises:
        ValueError: nothing was converted; the message says what the model holds instead. Or a weight holds NaN or
            infinity; the message names the layer.

    Example:
        >>> import torch, refq4
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
        >>> refq4.quantize_model(model, skip=["2"], progress=False)
        Sequential(
          (0): Linear4bit(in_features=64, out_features=64, bias=True, nf4, blocksize=64, double quantisation, \
compute_dtype=None)
          (1): ReLU()
          (2): Linear(in_features=64, out_features=4, bias=True)
        )
    """
    from tqdm.auto import tqdm

    skipped = set(skip)
    names = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name not in skipped and not skipped & set(name.split("."))
    ]
    if not names:
        raise ValueError(f"no nn.Linear to quantise in this {type(model).__name__} outside skip={sorted(skipped)}")
    settings = {
        "quant_type": quant_type,
        "compress_statistics": compress_statistics,
        "compute_dtype": compute_dtype,
        "quant_storage": quant_storage,
        "blocksize": blocksize,
    }
    for name in tqdm(names, desc=f"quantising to {quant_type}", unit="layer", disable=None if progress else True):
        try:
            layer = Linear4bit.from_linear(model.get_submodule(name), **settings)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if not name:
            return layer  # type: ignore[return-value]  # the model was one bare nn.Linear
        model.set_submodule(name, layer)
    return model
