"""Turning the linear layers of a model that is in memory into 4-bit ones.

For a model on disk that need not fit into memory: ``refq4/checkpoint``.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from ..internals.checks import warn_caller
from ..nn import Linear4bit
from .linears import is_linear, nearest, read_by_owner
from .patterns import Asked, Rule, as_rule, chosen, first_match
from .report import QuantizationReport, layer_report

__all__ = ["quantize_model"]

_HEAD = ("lm_head",)
Model = TypeVar("Model", bound=nn.Module)


def quantize_model(
    model: Model,
    *,
    quant_type: str = "nf4",
    compress_statistics: bool = True,
    compute_dtype: torch.dtype | None = None,
    quant_storage: torch.dtype = torch.uint8,
    blocksize: int | None = None,
    include: Rule = "*",
    skip: Rule = _HEAD,
    progress: bool = True,
    report: QuantizationReport | None = None,
) -> Model:
    """Replace the ``nn.Linear`` layers of a model by quantised :class:`~refq4.nn.Linear4bit` ones, in place.

    Layer by layer: at no time does the model exist twice, and an interrupt (Ctrl-C) leaves a model that works, with
    the layers done so far in 4 bits; call it again to go on. ``copy.deepcopy`` it first to keep the original.

    Left alone, whatever the rules say: subclasses of ``nn.Linear``, whose owners use them in other ways (the output of
    ``nn.MultiheadAttention``; Falcon's own class is taken), layers whose weight the module around them reads as a
    matrix (Mamba's ``dt_proj``) or keeps in fp32, and layers that share their weight with another module (tied to an
    embedding, say).

    A model of transformers gets the config of what was done: ``save_pretrained`` writes it, and ``from_pretrained``
    loads the model back.

    Args:
        model: any module; it is changed. A bare ``nn.Linear`` is returned converted.
        quant_type, compress_statistics, compute_dtype, quant_storage, blocksize: as in ``Linear4bit``.
        include: the layers meant. A pattern, several, or a function of (name, layer) that returns a bool. A pattern is
            a glob over a run of parts of the dotted name: ``"mlp"``, ``"layers.[0-3].*_proj"``.
        skip: of those, the layers to leave alone; as ``include``.
        progress: show a progress bar (on a terminal).
        report: filled with bits and error of each layer, and with what was left alone and why. It costs a decoding of
            each layer.

    Returns:
        The model.

    Raises:
        ValueError: nothing was converted; the message says what the model holds instead. Or a weight holds NaN or
            infinity; the message names the layer.

    Warns:
        UserWarning: a pattern to skip matches no module.

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
        >>> refq4.quantize_model(model, skip=lambda name, layer: layer.out_features < 8, progress=False)
        Traceback (most recent call last):
        ValueError: no nn.Linear to quantise in this Sequential: 2 (skipped: the predicate says so)
    """
    from tqdm.auto import tqdm

    from ..integrations.later import adopt, connect

    places, left = _choose(model, include, skip)
    if not places:
        why = ", ".join(f"{name or 'itself'} ({reason})" for name, reason in list(left.items())[:5])
        raise ValueError(f"no nn.Linear to quantise in this {type(model).__name__}{': ' if why else ''}{why}")
    settings = {
        "quant_type": quant_type,
        "compress_statistics": compress_statistics,
        "compute_dtype": compute_dtype,
        "quant_storage": quant_storage,
        "blocksize": blocksize,
    }
    if report is not None:
        report.left |= left
        report.other += sum(parameter.numel() for parameter in model.parameters())
    for names in tqdm(places, desc=f"quantising to {quant_type}", unit="layer", disable=None if progress else True):
        linear = model.get_submodule(names[0])
        assert isinstance(linear, nn.Linear)
        try:
            layer = Linear4bit.from_linear(linear, **settings)
        except ValueError as error:
            raise ValueError(f"{names[0]}: {error}") from None
        if report is not None:
            _add_to(report, names[0], linear, layer)
        if names == [""]:
            return layer  # type: ignore[return-value]  # the model was one bare nn.Linear
        for name in names:
            model.set_submodule(name, layer)
    adopt(model, settings)
    connect("peft")
    return model


def _choose(model: nn.Module, include: Rule, skip: Rule) -> tuple[list[list[str]], dict[str, str]]:
    """The layers to quantise, each with all the names it goes by, and name -> why another linear is left alone."""
    wanted, unwanted = as_rule(include), as_rule(skip)
    _check_matches(model, unwanted)
    reserved = read_by_owner(model) | _kept_in_fp32(model)
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    places: dict[int, list[str]] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in places:
            places[id(module)].append(name)
        elif isinstance(module, nn.Linear) and not isinstance(module, Linear4bit):
            others = [other for other in owners[id(module.weight)] if other != name]
            why = reserved.get(name) or _why_not(name, module, wanted, unwanted)
            if why is None and others:
                why = f"shares its weight with {others[0]}"
            if why is None:
                places[id(module)] = [name]
            else:
                left[name] = why
    return list(places.values()), left


def _why_not(name: str, module: nn.Linear, include: Asked, skip: Asked) -> str | None:
    if not is_linear(module):
        return f"a {type(module).__name__}, whose owner uses it in ways of its own"
    if not chosen(include, name, module):
        return "not among those to include"
    if not chosen(skip, name, module):
        return None
    return "skipped: the predicate says so" if callable(skip) else f"skipped: it matches {first_match(name, skip)!r}"


def _kept_in_fp32(model: nn.Module) -> dict[str, str]:
    """What a model of transformers says of its layers; loading it back goes by that, too."""
    patterns: Any = getattr(model, "_keep_in_fp32_modules", None) or ()
    names = (name for name, _ in model.named_modules() if first_match(name, patterns))
    return dict.fromkeys(names, "kept in fp32 by its architecture")


def _check_matches(model: nn.Module, skip: Asked) -> None:
    names = [name for name, _ in model.named_modules()]
    for pattern in () if callable(skip) or skip == _HEAD else skip:
        if not any(first_match(name, [pattern]) for name in names):
            warn_caller(f"skip: {pattern!r} matches no module of this {type(model).__name__}{nearest(pattern, names)}")


def _add_to(report: QuantizationReport, name: str, linear: nn.Linear, layer: Linear4bit) -> None:
    if layer.quant_state is None:  # a layer on the meta device waits for its weight
        return
    report.layers.append(layer_report(name, linear.weight, layer.weight, layer.quant_state))
    report.other -= linear.weight.numel()
