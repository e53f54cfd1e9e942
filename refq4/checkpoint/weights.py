"""One weight file of a checkpoint, converted: each tensor in pieces, quantised or copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from .. import layout
from ..functional import get_4bit_type, quantize_4bit
from ..internals.blockwise import quantize_scales, slice_state
from ..models.formats import Formats, format_of
from ..models.report import LayerReport, QuantizationReport, relative, squared_error
from ..state import NESTED_BLOCKSIZE, QuantState
from .ahead import read_ahead
from .selection import Selection
from .tensors import FLOATS, Entry, SafetensorsReader, SafetensorsWriter

__all__ = ["Converter", "Settings"]

_FIELDS = {"compress_statistics": "nested"}
PIECE = 2**23  # elements in memory at once: a multiple of every blocksize, of a nested block of those, and of eight
_FORMAT_NAMES = {dtype: name for name, dtype in FLOATS.items()} | {torch.uint8: "U8"}

Planned = dict[str, tuple[str, tuple[int, ...], int]]


@dataclass(frozen=True)
class Settings:
    """How weights are quantised.

    Attributes:
        measure: decode each again for the report.
        formats: what is different for some layers, by patterns of their names.
        rest: dtype of the floats that stay; as they are if None.
    """

    quant_type: str
    nested: bool
    storage: torch.dtype
    blocksize: int
    measure: bool
    scales: str = "absmax"
    formats: Formats = field(default_factory=dict)
    rest: torch.dtype | None = None

    def of(self, key: str, table: bool) -> Settings:
        """Those of one weight; a table has plain scales, so that a look-up need not decode them all."""
        other = {
            _FIELDS.get(name, name): value
            for name, value in format_of(key.removesuffix(".weight"), self.formats).items()
        }
        return replace(self, **other | ({"nested": False} if table else {}))

    def casts(self, entry: Entry) -> bool:
        """Whether a tensor that stays gets another dtype."""
        return self.rest is not None and FLOATS.get(entry.dtype, self.rest) != self.rest


@dataclass
class Converter:
    """Converts file after file and fills a report.

    Attributes:
        report: gets a line for each quantised weight.
        advance: called with the number of bytes that were read.
    """

    settings: Settings
    selection: Selection
    report: QuantizationReport
    advance: Callable[[int], object]

    def planned_size(self, reader: SafetensorsReader) -> int:
        """Bytes of tensors that :meth:`convert` will write, but for a few hundred for each weight."""
        return sum(nbytes for _, _, nbytes in self._plan(reader).values())

    def convert(self, reader: SafetensorsReader, path: Path) -> list[str]:
        """Write the file ``path``; returns its keys.

        Raises:
            ValueError: a weight holds NaN or infinity; the message names its key.
        """
        planned = self._plan(reader)
        late = [self._json_key(key) for key in reader.entries if key in self.selection.chosen]
        metadata = {"format": "pt"} | reader.metadata
        ahead = read_ahead(self._reads(reader))
        with SafetensorsWriter(path, planned, late, metadata) as writer, closing(ahead) as pieces:
            for key, entry in reader.entries.items():
                if key in self.selection.chosen:
                    self._quantise(pieces, writer, entry)
                else:
                    self._copy(pieces, writer, entry)
        return [*planned, *late]

    # --- what will be written -----------------------------------------------------------------------------------------

    def _plan(self, reader: SafetensorsReader) -> Planned:
        planned: Planned = {}
        for key, entry in reader.entries.items():
            if key in self.selection.chosen:
                planned |= self._plan_weight(key, entry.numel)
            elif self.settings.casts(entry) and self.settings.rest is not None:
                rest = self.settings.rest
                planned[key] = _FORMAT_NAMES[rest], entry.shape, entry.numel * rest.itemsize
            else:
                planned[key] = entry.dtype, entry.shape, entry.nbytes
        return planned

    def _plan_weight(self, key: str, numel: int) -> Planned:
        settings = self._of(key)
        storage, blocks = settings.storage, layout.block_count(numel, settings.blocksize)
        elements = -(-layout.packed_bytes(numel) // storage.itemsize)
        planned: Planned = {
            key: (_FORMAT_NAMES[storage], (elements, 1), elements * storage.itemsize),
            f"{key}.quant_map": ("F32", (16,), 64),
        }
        if not settings.nested:
            return planned | {f"{key}.absmax": ("F32", (blocks,), 4 * blocks)}
        blocks2 = layout.block_count(blocks, NESTED_BLOCKSIZE)
        return planned | {
            f"{key}.absmax": ("U8", (blocks,), blocks),
            f"{key}.nested_absmax": ("F32", (blocks2,), 4 * blocks2),
            f"{key}.nested_quant_map": ("F32", (256,), 1024),
        }

    def _json_key(self, key: str) -> str:
        return f"{key}.quant_state.bitsandbytes__{self._of(key).quant_type}"

    def _of(self, key: str) -> Settings:
        return self.settings.of(key, key in self.selection.tables)

    # --- what will be read --------------------------------------------------------------------------------------------

    def _reads(self, reader: SafetensorsReader) -> Iterator[Tensor]:
        """All pieces of a file that :meth:`convert` asks for, in that order: of a weight twice if it is measured.

        They go into two buffers in turn: a piece is gone when the next but one is read.
        """
        rooms = cycle([torch.empty(4 * PIECE, dtype=torch.uint8) for _ in range(2)])  # of the widest dtype
        for key, entry in reader.entries.items():
            if key not in self.selection.chosen:
                if self.settings.casts(entry):
                    yield from (reader.tensor(key, at, at + PIECE, next(rooms)) for at in range(0, entry.numel, PIECE))
                else:
                    yield from reader.pieces(key, rooms)
                continue
            turned = None
            if key in self.selection.transposed:  # GPT-2's layers are small: whole
                turned = reader.tensor(key).view(entry.shape).T.reshape(-1)
            for _ in range(2 if self.settings.measure else 1):
                for start in range(0, entry.numel, PIECE):
                    stop = start + PIECE
                    yield reader.tensor(key, start, stop, next(rooms)) if turned is None else turned[start:stop]

    # --- one tensor ---------------------------------------------------------------------------------------------------

    def _copy(self, pieces: Iterator[Tensor], writer: SafetensorsWriter, entry: Entry) -> None:
        at = read = 0
        while read < entry.nbytes:
            piece = next(pieces)
            kept = piece.to(self.settings.rest) if self.settings.casts(entry) else piece
            writer.write(entry.key, kept, at)
            at, read = at + kept.nbytes, read + piece.nbytes
            self.advance(piece.nbytes)
        self.report.other += entry.numel

    def _quantise(self, pieces: Iterator[Tensor], writer: SafetensorsWriter, entry: Entry) -> None:
        scales: list[Tensor] = []
        settings = self._of(entry.key)
        for start in range(0, entry.numel, PIECE):
            piece = next(pieces)
            try:
                packed, state = quantize_4bit(
                    piece,
                    blocksize=settings.blocksize,
                    quant_type=settings.quant_type,
                    quant_storage=settings.storage,
                    scales=settings.scales,
                )
            except ValueError as error:
                raise ValueError(f"{entry.key}, from element {start} of the flattened tensor: {error}") from None
            writer.write(entry.key, packed, start // 2)
            scales.append(state.absmax)
            self.advance(piece.numel() * piece.itemsize)
        state = self._state(torch.cat(scales), entry)
        for name, tensor in state.as_dict(packed=True).items():
            (writer.add if "quant_state" in name else writer.write)(f"{entry.key}.{name}", tensor)
        self.report.layers.append(self._measured(pieces, writer, entry, state))

    def _state(self, scales: Tensor, entry: Entry) -> QuantState:
        shape = torch.Size(entry.shape[::-1] if entry.key in self.selection.transposed else entry.shape)
        settings = self._of(entry.key)
        code, dtype = get_4bit_type(settings.quant_type), self.settings.rest or FLOATS[entry.dtype]
        state = QuantState(scales, shape, code, settings.blocksize, settings.quant_type, dtype)
        if settings.nested:
            state.absmax, state.offset, state.state2 = quantize_scales(scales)
        return state

    def _measured(
        self, pieces: Iterator[Tensor], writer: SafetensorsWriter, entry: Entry, state: QuantState
    ) -> LayerReport:
        _, _, stored = self._plan_weight(entry.key, entry.numel)[entry.key]
        bits = 8 * (stored + state.nbytes()) / entry.numel
        shape, _ = state.geometry()
        name, error, norm = entry.key.removesuffix(".weight"), 0.0, 0.0
        if not self.settings.measure:
            return LayerReport(name, tuple(shape), bits, float("nan"))
        flat = state.copy()
        flat.shape = torch.Size((entry.numel,))
        for start in range(0, entry.numel, PIECE):
            stop = min(start + PIECE, entry.numel)
            part = slice_state(flat, start, stop)
            assert part is not None, "PIECE is a multiple of what a cut must be"
            packed = writer.read(entry.key, start // 2, (stop + 1) // 2)
            of_piece, norm_of_piece = squared_error(next(pieces), packed, part)
            error, norm = error + of_piece, norm + norm_of_piece
        return LayerReport(name, tuple(shape), bits, relative(error, norm))
