"""Turning the linear layers and the fused experts of a model that is in memory into 4-bit ones.

For a model on disk that need not fit into memory: ``refq4/checkpoint``.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..internals.checks import warn_caller
from ..nn import Embedding4bit, Linear4bit
from .experts import expert_names, quantize_experts, routers
from .formats import Formats, check_formats, check_used, format_of
from .linears import as_linear, is_conv1d, is_linear, nearest, read_by_owner
from .patterns import Asked, Rule, as_rule, chosen, first_match
from .report import QuantizationReport, layer_report
from .tables import cast_rest, quantize_tables

__all__ = ["quantize_model"]

_HEAD = ("lm_head",)
Model = TypeVar("Model", bound=nn.Module)


class _Place(NamedTuple):
    """A weight to quantise: of a linear layer, with all the names that the layer goes by, or a parameter of experts."""

    names: list[str]
    module: nn.Module
    param_name: str


def quantize_model(
    model: Model,
    *,
    quant_type: str = "nf4",
    compress_statistics: bool = True,
    compute_dtype: torch.dtype | None = None,
    quant_storage: torch.dtype = torch.uint8,
    blocksize: int | None = None,
    scales: str = "absmax",
    include: Rule = "*",
    skip: Rule | None = None,
    embeddings: bool = False,
    head: bool = False,
    dtype: torch.dtype | None = None,
    formats: Formats | None = None,
    progress: bool = True,
    report: QuantizationReport | None = None,
) -> Model:
    """Replace the ``nn.Linear`` layers of a model by quantised :class:`~refq4.nn.Linear4bit` ones, in place.

    GPT-2's ``Conv1D`` is one of them, a linear layer whose weight is stored as [K, N].

    The fused experts of a mixture-of-experts model, parameters [E, N, K] that no linear layer holds, are packed as
    well (:func:`refq4.nn.parametrize.replace_parameter_4bit`).

    It goes layer by layer: the model never exists twice, and an interrupt (Ctrl-C) leaves a model that works, with the
    layers done so far in 4 bits; call it again to continue. ``copy.deepcopy`` the model first to keep the original.

    These are never quantised: subclasses of ``nn.Linear``, whose owners use them in other ways (the output of
    ``nn.MultiheadAttention``; Falcon's own class is quantised), layers whose weight the module around them reads as a
    matrix (Mamba's ``dt_proj``) or keeps in fp32, layers that share their weight with another module (tied to an
    embedding, say), and the routers that choose experts.

    The settings are written into the config of a model of transformers: ``save_pretrained`` writes it, and
    ``from_pretrained`` loads the model.

    Args:
        model: any module; it is changed. A bare ``nn.Linear`` is returned converted.
        quant_type, compress_statistics, compute_dtype, quant_storage, blocksize, scales: as in ``Linear4bit``.
        include: the layers to quantise. A pattern, several, or a function of (name, layer) that returns a bool. A
            pattern is a glob for parts of the dotted name: ``"mlp"``, ``"layers.[0-3].*_proj"``. The name of a fused
            expert weight is the parameter's (``"layers.0.mlp.experts.down_proj"``), its layer the parameter's owner.
        skip: of those, the layers to keep in full precision; as ``include``. ``"lm_head"`` by default, or nothing
            with ``head``.
        embeddings: also the tables, as :class:`~refq4.nn.Embedding4bit` with plain scales (``skip`` applies to them).
        head: also quantise the output head. If it shares a table's weight, ``embeddings`` is needed as well.
        dtype: cast the parameters that stay as they are: norms, biases, skipped layers. Buffers do not change.
        formats: patterns of names -> what of quant_type, compress_statistics, blocksize and scales is different there:
            ``{"mlp": {"blocksize": 128}}``. Where two patterns match, the later one holds.
        progress: show a progress bar (on a terminal).
        report: is filled with bits and error of each layer, and with the skipped layers and why. Each layer is decoded
            once for it.

    Returns:
        The model.

    Raises:
        ValueError: nothing was quantised; the message says what the model has instead. Or a weight holds NaN or
            infinity; the message names the layer.

    Warns:
        UserWarning: a pattern to skip matches no module.

    Example:
        >>> import torch, refq4
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
        >>> refq4.quantize_model(model, skip=["2"], progress=False)
        Sequential(
          (0): Linear4bit(in_features=64, out_features=64, bias=True, nf4, blocksize=64, ...)
          (1): ReLU()
          (2): Linear(in_features=64, out_features=4, bias=True)
        )
        >>> refq4.quantize_model(model, skip=lambda name, layer: layer.out_features < 8, progress=False)
        Traceback (most recent call last):
        ValueError: no nn.Linear to quantise in this Sequential: 2 (skipped: the predicate says so)
    """
    from tqdm.auto import tqdm

    from ..integrations.later import adopt, connect

    formats = check_formats(formats or {})
    unwanted = as_rule(skip if skip is not None else () if head else _HEAD)
    if skip is not None:
        _check_matches(model, unwanted)
    places, left = _choose(model, as_rule(include), unwanted)
    check_used(formats, [*(place.names[0] for place in places), *(_tables(model) if embeddings else ())])
    if not places and not (embeddings and _tables(model)):
        why = ", ".join(f"{name or 'itself'} ({reason})" for name, reason in list(left.items())[:5])
        raise ValueError(f"no nn.Linear to quantise in this {type(model).__name__}{': ' if why else ''}{why}")
    settings = {
        "quant_type": quant_type,
        "compress_statistics": compress_statistics,
        "compute_dtype": compute_dtype,
        "quant_storage": quant_storage,
        "blocksize": blocksize,
        "scales": scales,
    }
    if report is not None:
        report.left |= left
        report.other += sum(parameter.numel() for parameter in model.parameters())
    has_experts = any(not (isinstance(place.module, nn.Linear) or is_conv1d(place.module)) for place in places)
    places.reverse()
    shown = None if progress else True
    try:
        for _ in tqdm(range(len(places)), desc=f"quantising to {quant_type}", unit="layer", disable=shown):
            place = places.pop()  # so that nothing holds a layer that has been replaced
            layer = _quantise(place, settings | format_of(formats, place.names[0]), report)
            if layer is None:
                continue
            if place.module is model:
                return layer  # type: ignore[return-value]  # the model was one bare nn.Linear
            for name in place.names:
                model.set_submodule(name, layer)
    finally:
        if "transformers" in sys.modules and has_experts:
            from ..integrations.expert_files import settle

            settle(model)
    if embeddings:
        left_tables = quantize_tables(
            model, head, lambda name: settings | format_of(formats, name), partial(chosen, unwanted), report
        )
        if report is not None:
            report.left |= left_tables
            report.left = {name: why for name, why in report.left.items() if not _is_4bit(model, name)}
    if dtype is not None:
        cast_rest(model, dtype)
    adopt(model, settings | {"head": head, "formats": formats})
    connect("peft")
    return model


def _tables(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Embedding]


def _is_4bit(model: nn.Module, name: str) -> bool:
    return isinstance(dict(model.named_modules()).get(name), Linear4bit | Embedding4bit)


def _quantise(place: _Place, settings: dict[str, Any], report: QuantizationReport | None) -> Linear4bit | None:
    """The layer that takes the place of a linear one; experts keep their module, and change in it."""
    linear, layer = as_linear(place.module), None
    before = getattr(place.module, place.param_name) if linear is None else linear.weight
    try:
        if linear is not None:
            layer = Linear4bit.from_linear(linear, **settings)
            layer.__dict__["source_cls"] = type(place.module)  # what dequantising gives back
        of_weight = {key: value for key, value in settings.items() if key != "compute_dtype"}
        after = quantize_experts(place.module, place.param_name, **of_weight) if layer is None else layer.weight
    except ValueError as error:
        raise ValueError(f"{place.names[0]}: {error}") from None
    if report is not None:
        _add_to(report, place.names[0], before, after)
    return layer


def _choose(model: nn.Module, wanted: Asked, unwanted: Asked) -> tuple[list[_Place], dict[str, str]]:
    """The weights to quantise, and name -> why another one is left alone."""
    choosing = routers(model)
    reserved = read_by_owner(model) | _kept_in_fp32(model) | dict.fromkeys(choosing, "it chooses experts")
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    places: dict[int, _Place] = {}
    left: dict[str, str] = {}
    for owner, module in model.named_modules(remove_duplicate=False):
        linear = is_conv1d(module) or (isinstance(module, nn.Linear) and not isinstance(module, Linear4bit))
        for param_name in ["weight"] if linear else expert_names(module):
            weight = getattr(module, param_name)
            name = owner if linear else f"{owner}.{param_name}".lstrip(".")
            if id(weight) in places and places[id(weight)].module is module:
                places[id(weight)].names.append(name)
                continue
            others = [other for other in owners[id(weight)] if other != owner]
            why = reserved.get(name) or _why_not(name, module, wanted, unwanted)
            if why is None and others:
                why = f"shares its weight with {others[0]}"
            if why is None:
                places[id(weight)] = _Place([name], module, param_name)
            else:
                left[name] = why
    return list(places.values()), left


def _why_not(name: str, module: nn.Module, include: Asked, skip: Asked) -> str | None:
    if isinstance(module, nn.Linear) and not is_linear(module):
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
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    for pattern in () if callable(skip) else skip:
        if not any(first_match(name, [pattern]) for name in names):
            warn_caller(f"skip: {pattern!r} matches no module of this {type(model).__name__}{nearest(pattern, names)}")


def _add_to(report: QuantizationReport, name: str, before: Tensor, after: Any) -> None:
    if after.quant_state is None:  # a weight on the meta device waits for its values
        return
    report.layers.append(layer_report(name, before, after, after.quant_state))
    report.other -= before.numel()
