"""What quantising did to a model: bits and error of each layer, the worst of them, and what was left alone and why.

Filled by :func:`refq4.quantize_model` and by :func:`refq4.checkpoint.quantize_checkpoint`, layer by layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..functional import dequantize_4bit
from ..internals.blockwise import slice_state
from ..internals.shown import Shown
from ..state import QuantState

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["LayerReport", "QuantizationReport", "finite", "in_fp32", "layer_report", "squared_error"]

WORST_SHOWN = 10
_SECTION = 2**22  # elements decoded at once
_CHUNK = 2**18  # of those, held in fp32 at once: they stay in the cache between the steps
_OTHERS_SHOWN = 5


@dataclass
class LayerReport:
    """One layer in one format: bits a weight (scales included) and the relative error ``|W - W4| / |W|``."""

    name: str
    shape: tuple[int, ...]
    bits: float
    error: float

    @property
    def numel(self) -> int:
        """Weights in the layer."""
        return math.prod(self.shape)


@dataclass
class QuantizationReport(Shown):
    """What was quantised, how well, and what was left alone. Prints as a table, shows as HTML in Jupyter.

    Attributes:
        layers: the quantised ones, in the order of the model.
        left: name -> why it was left alone, of layers that could have been quantised.
        other: weights and other numbers outside the quantised layers.

    Example:
        >>> import torch, refq4
        >>> model, report = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 4)), QuantizationReport()
        >>> _ = refq4.quantize_model(model, skip="1", compress_statistics=False, report=report, progress=False)
        >>> [layer.name for layer in report.layers], report.left, round(report.bits, 3)
        (['0'], {'1': "skipped: it matches '1'"}, 4.625)
    """

    layers: list[LayerReport] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    other: int = 0

    @property
    def quantised(self) -> int:
        """How many weights are in 4 bits now."""
        return sum(layer.numel for layer in self.layers)

    @property
    def bits(self) -> float:
        """Bits a weight over all quantised layers, scales included; NaN where there are none."""
        total = sum(layer.bits * layer.numel for layer in self.layers)
        return total / self.quantised if self.quantised else math.nan

    @property
    def error(self) -> float:
        """Mean relative error of a layer; NaN where none was measured."""
        return sum(layer.error for layer in self.layers) / len(self.layers) if self.layers else math.nan

    def worst(self, count: int = WORST_SHOWN) -> list[LayerReport]:
        """The layers with the largest relative error, the worst first."""
        return sorted(self.layers, key=lambda layer: (not math.isnan(layer.error), -layer.error))[:count]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data; what was not measured is None, since JSON has no NaN."""
        layers = [asdict(layer) | {"error": finite(layer.error)} for layer in self.layers]
        figures = {"bits": finite(self.bits), "mean_error": finite(self.error), "quantised": self.quantised}
        return figures | {"other": self.other, "layers": layers, "left": dict(self.left)}

    def _parts(self) -> Iterator[RenderableType]:
        from rich.table import Table

        error = "" if math.isnan(self.error) else f", mean relative error of a layer {self.error:.4f}"
        yield (
            f"{len(self.layers)} layers, {_count(self.quantised)} of {_count(self.quantised + self.other)} numbers, "
            f"now take {self.bits:.3f} bits each{error}"
        )
        worst = self.worst()
        shown = "the layers" if len(worst) == len(self.layers) else f"the {len(worst)} layers with the largest error"
        table = Table(title=shown, title_justify="left", title_style="bold")
        table.add_column("layer", overflow="fold")
        for column in ("[N, K]", "bits", "|W - W4| / |W|"):
            table.add_column(column, justify="right")
        for layer in worst:
            measured = "not measured" if math.isnan(layer.error) else f"{layer.error:.4f}"
            table.add_row(layer.name, str(list(layer.shape)), f"{layer.bits:.3f}", measured)
        if worst:
            yield table
        for why, names in self._left_by_reason().items():
            others = f" and {len(names) - _OTHERS_SHOWN} more" if len(names) > _OTHERS_SHOWN else ""
            yield f"left alone ({why}): {', '.join(names[:_OTHERS_SHOWN])}{others}"

    def _left_by_reason(self) -> dict[str, list[str]]:
        reasons: dict[str, list[str]] = {}
        for name, why in self.left.items():
            reasons.setdefault(why, []).append(name)
        return reasons


def layer_report(name: str, weight: Tensor, packed: Tensor, state: QuantState) -> LayerReport:
    """Bits and error of one quantised weight.

    Args:
        weight: [N, K], what was quantised.
        packed: its packed bytes in any storage dtype.
        state: its quant state.
    """
    error, norm = squared_error(weight, packed, state)
    return LayerReport(name, tuple(weight.shape), bits_per_weight(packed, state), relative(error, norm))


def bits_per_weight(packed: Tensor, state: QuantState) -> float:
    """Bits a weight takes with its share of scales, code and offset; infinite where there are no weights."""
    size = packed.numel() * packed.itemsize + state.nbytes()
    return 8 * size / state.geometry()[0].numel() if state.geometry()[0].numel() else math.inf


def relative(squared_error: float, squared_norm: float) -> float:
    """``|W - W4| / |W|`` from the two squared sums; 0 for a weight of zeros that stays one."""
    if squared_norm == 0:
        return 0.0 if squared_error == 0 else math.inf
    return math.sqrt(squared_error / squared_norm)


def squared_error(weight: Tensor, packed: Tensor, state: QuantState) -> tuple[float, float]:
    """``(|W - W4|², |W|²)``, in pieces, so that no second copy of the weight is made in full precision.

    Args:
        weight: any shape, what was quantised.
        packed: its packed bytes in any storage dtype.
        state: its quant state.
    """
    flat = state.copy()
    flat.shape = torch.Size((weight.numel(),))  # blocks run over the flattened tensor: any multiple of one is a cut
    canonical, exact = flat.packed_weight(packed), weight.detach().reshape(-1)
    error = norm = 0.0
    for start in range(0, weight.numel(), _SECTION):
        stop = min(start + _SECTION, weight.numel())
        section = slice_state(flat, start, stop)
        assert section is not None, "_SECTION is a multiple of every blocksize"
        decoded = dequantize_4bit(canonical.packed[start // 2 : (stop + 1) // 2], section)
        for first in range(0, stop - start, _CHUNK):
            wanted = exact[start + first : min(start + first + _CHUNK, stop)].float()
            off = decoded[first : first + _CHUNK].float() - wanted
            error += float(off.dot(off))
            norm += float(wanted.dot(wanted))
    return error, norm


def in_fp32(packed: Tensor, state: QuantState) -> Tensor:
    """A packed weight decoded to fp32, whatever dtype its state names."""
    exact = state.copy()
    exact.dtype = torch.float32
    return dequantize_4bit(packed, exact)


def finite(value: Any) -> Any:
    """The value, or None for a float that JSON does not have: NaN, infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _count(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
