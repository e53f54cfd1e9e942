"""inspect_checkpoint: what a weight file holds, how its codes and scales are spread, and what is wrong with it.

Safetensors (a file, or a model directory with all of its files) and torch's own format (``.pt``, ``.pth``, ``.bin``).
The entries of each 4-bit weight go through ``QuantState.from_dict``, the checks that loading makes; here a failure is
not the end but a line in the report. Data is read in pieces: a file need not fit into memory.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import layout
from ..internals.blockwise import decode_scales
from ..internals.shown import Shown
from ..models.patterns import first_match
from ..models.report import bits_per_weight
from ..state import QuantState
from . import places
from .architecture import UNKNOWN, what_is_amiss
from .sources import FromSafetensors, FromTorch, Source
from .tensors import FLOATS, SafetensorsReader

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["CheckpointContents", "Problem", "TensorReport", "groups", "inspect_checkpoint"]

BINS = 16
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_BARS = " ▁▂▃▄▅▆▇█"
_STATE = ".quant_state.bitsandbytes__"
_BESIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_ROWS_SHOWN = 40


@dataclass
class Problem:
    """Something wrong with one tensor: loading refuses it, or it holds what no weight should."""

    key: str
    what: str


@dataclass
class TensorReport:
    """One tensor. For a 4-bit weight ``shape`` is [N, K], and there are counts.

    Attributes:
        format: the codebook's name, with ", double quantisation" where the scales are quantised; else the dtype.
        bits: a weight, scales included.
        codes: how often each of the 16 codes occurs.
        scales: counts of the scales (absmax) in 16 equal bins from the least to the largest.
        scale_range: those two.
        blocksize: weights that share a scale.
    """

    key: str
    format: str
    shape: tuple[int, ...]
    bits: float
    nbytes: int
    codes: list[int] | None = None
    scales: list[int] | None = None
    scale_range: tuple[float, float] | None = None
    blocksize: int | None = None

    @property
    def quantised(self) -> bool:
        """Whether it is a 4-bit weight."""
        return self.codes is not None


@dataclass
class CheckpointContents(Shown):
    """What :func:`inspect_checkpoint` found. Prints as a table, shows as HTML in Jupyter.

    Attributes:
        path: what was asked for.
        format: "safetensors" or "torch".
        tensors: in the order of the file; the entries beside a 4-bit weight are part of it.
        problems: what is wrong; empty for a sound file.
        limit: rows shown.

    Example:
        >>> CheckpointContents("model.safetensors", "safetensors").to_dict()["problems"]
        []
    """

    path: str
    format: str
    tensors: list[TensorReport] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    limit: int = _ROWS_SHOWN

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "path": self.path,
            "format": self.format,
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "problems": [asdict(problem) for problem in self.problems],
        }

    def _parts(self) -> Iterator[RenderableType]:
        from ..internals.verbatim import words

        small = [tensor for tensor in self.tensors if tensor.quantised]
        size, small_size = (sum(tensor.nbytes for tensor in some) for some in (self.tensors, small))
        yield words(
            (self.path, "bold"),
            f": {self.format}, {len(self.tensors)} tensors, {size / 1e6:,.2f} MB; "
            f"{len(small)} of them in 4 bits, {small_size / 1e6:,.2f} MB",
        )
        for (kind, blocksize), count in Counter((tensor.format, tensor.blocksize) for tensor in small).items():
            yield words(f"{count} in {kind}, blocks of {blocksize}")
        if small:
            yield words(f"{8 * small_size / sum(prod(tensor.shape) for tensor in small):.3f} bits per 4-bit weight")
            wide = [tensor.key for tensor in self.tensors if not tensor.quantised and len(tensor.shape) == 2]
            kinds = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", key) for key in wide)
            if wide:
                yield words("not in 4 bits: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
        if self.tensors:
            yield self._table()
        if len(self.tensors) > self.limit:
            yield f"and {len(self.tensors) - self.limit} more: --limit, --match, --json"
        for problem in self.problems:
            yield words(("wrong", "bold red"), f"  {problem.key}: {problem.what}")
        yield "nothing is wrong" if not self.problems else f"{len(self.problems)} wrong"

    def _table(self) -> Any:
        from rich.table import Table

        table = Table()
        table.add_column("tensor", overflow="fold")
        table.add_column("format")
        for column in ("shape", "bits", "kB"):
            table.add_column(column, justify="right")
        table.add_column("codes 0 to 15", no_wrap=True)
        table.add_column("absmax", no_wrap=True)
        for tensor in self.tensors[: self.limit]:
            shown = [tensor.key, tensor.format, str(list(tensor.shape)), f"{tensor.bits:.3g}"]
            shown.append(f"{tensor.nbytes / 1e3:,.1f}")
            if tensor.codes is not None and tensor.scales is not None and tensor.scale_range is not None:
                low, high = tensor.scale_range
                shown += [bars(tensor.codes), f"{low:.2g} {bars(tensor.scales)} {high:.2g}"]
            table.add_row(*shown)
        return table


def bars(counts: list[int]) -> str:
    """A histogram in one line of text; a count of 0 is a blank, any other has a bar.

    Example:
        >>> bars([0, 1, 50, 100])
        ' ▁▄█'
    """
    top = max(counts, default=0) or 1
    return "".join(_BARS[0 if not count else max(1, round(8 * count / top))] for count in counts)


def inspect_checkpoint(path: str | os.PathLike[str], match: str | None = None) -> CheckpointContents:
    """Look into a weight file, or into all safetensors files of a model directory.

    Args:
        path: a ``.safetensors`` file, a file of ``torch.save``, or a directory. Where its ``config.json`` names an
            architecture that transformers knows, the report says, too, what the loader would miss or could not place.
        match: only tensors whose dotted name matches this pattern (see :func:`refq4.quantize_model`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file as a whole can't be read; what is wrong with a single tensor goes into the report.

    Example:
        >>> import tempfile, torch, safetensors.torch
        >>> from refq4.nn import LinearNF4
        >>> path = Path(tempfile.mkdtemp()) / "layer.safetensors"
        >>> safetensors.torch.save_file(LinearNF4(64, 8, bias=False).to("cpu").state_dict(), path)
        >>> contents = inspect_checkpoint(path)
        >>> [(tensor.key, tensor.format, tensor.shape) for tensor in contents.tensors], contents.problems
        ([('weight', 'nf4, double quantisation', (8, 64))], [])
    """
    path = Path(path)
    with ExitStack() as stack:
        source: Source
        if path.is_file() and path.suffix in TORCH_SUFFIXES:
            kind, source = "torch", FromTorch(path)
        else:
            kind = "safetensors"
            files = places.weight_files(path) if path.is_dir() else [path]
            source = FromSafetensors([stack.enter_context(SafetensorsReader(file)) for file in files])
        contents = CheckpointContents(str(path), kind)
        for key, beside in groups(source.keys()).items():
            if match is None or first_match(key, [match]):
                _look_at(source, key, beside, contents)
    if path.is_dir():
        seen = {problem.key for problem in contents.problems}
        for key, what in (what_is_amiss(path) or {}).items():
            if key not in seen and what != UNKNOWN:  # transformers ignores what it has no place for
                contents.problems.append(Problem(key, what))
    return contents


# --- one tensor -------------------------------------------------------------------------------------------------------


def groups(keys: list[str]) -> dict[str, list[str]]:
    """Each tensor with the entries beside it; a packed weight that is missing is a group of its entries alone."""
    possible = {*keys, *(key.partition(_STATE)[0] for key in keys if _STATE in key)}
    groups: dict[str, list[str]] = {}
    for key in keys:
        ending = next((ending for ending in _BESIDE if key.endswith(ending)), "")
        base = key.partition(_STATE)[0].removesuffix(ending)
        if base == key or base not in possible:
            groups.setdefault(key, [])
        else:
            groups.setdefault(base, []).append(key)
    return groups


def _look_at(source: Source, key: str, beside: list[str], contents: CheckpointContents) -> None:
    if not beside:
        _look_at_plain(source, key, contents)
        return
    packed = source.described(key)
    if packed is None:
        what = f"there is no packed weight, but what belongs to one: {', '.join(beside)}"
        contents.problems.append(Problem(key, what))
    try:
        state = QuantState.from_dict({entry: source.tensor(entry) for entry in beside})
        if packed is not None:
            state.check_packed(packed, key)  # a description is enough: its bytes are not read for this
    except ValueError as error:
        contents.problems.append(Problem(key, str(error)))
        return
    if packed is not None:
        contents.tensors.append(_quantised(source, key, packed, state))


def _quantised(source: Source, key: str, packed: Tensor, state: QuantState) -> TensorReport:
    shape, _ = state.geometry()
    counts = torch.zeros(256, dtype=torch.int64)
    left, last = layout.packed_bytes(shape.numel()), 0  # what fills up the storage dtype is not counted
    for piece in source.pieces(key):
        used = piece[:left]
        counts += torch.bincount(used, minlength=256)
        left -= used.numel()
        last = int(used[-1]) if used.numel() else last
    codes = (counts.view(16, 16).sum(1) + counts.view(16, 16).sum(0)).tolist()
    if shape.numel() % 2:
        codes[last & 0xF] -= 1
    scales = decode_scales(state, "reference").float()
    low, high = (float(scales.min()), float(scales.max())) if scales.numel() else (0.0, 0.0)
    histogram = torch.histc(scales, BINS, low, high).int().tolist() if scales.numel() else [0] * BINS
    nested = ", double quantisation" if state.nested else ""
    size = packed.numel() * packed.itemsize + state.nbytes()
    bits = bits_per_weight(packed, state)
    return TensorReport(
        key, f"{state.quant_type}{nested}", tuple(shape), bits, size, codes, histogram, (low, high), state.blocksize
    )


def _look_at_plain(source: Source, key: str, contents: CheckpointContents) -> None:
    tensor = source.described(key)
    assert tensor is not None
    name = source.dtype_name(key)
    size = tensor.numel() * tensor.itemsize
    contents.tensors.append(TensorReport(key, name, tuple(tensor.shape), 8.0 * tensor.itemsize, size))
    if tensor.dtype == torch.uint8 and tensor.dim() == 2 and tensor.shape[1] == 1 and key.endswith("weight"):
        what = "packed bytes without the entries beside them (absmax, quant_map, quant_state): they can't be decoded"
        contents.problems.append(Problem(key, what))
    if tensor.dtype in (*FLOATS.values(), torch.float64):
        nan = sum(int(piece.isnan().sum()) for piece in source.pieces(key, as_bytes=False))
        if nan:
            contents.problems.append(Problem(key, f"holds {nan} NaN"))
