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
from .selection import Output, Selection
from .tensors import FLOATS, NAMES, PIECE, Entry, Plan, SafetensorsReader, SafetensorsWriter

__all__ = ["Converter", "Settings"]

_FIELDS = {"compress_statistics": "nested"}


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

    def of(self, output: Output) -> Settings:
        """Those of one weight; a table has plain scales, so that a look-up need not decode them all."""
        other = {_FIELDS.get(name, name): value for name, value in format_of(self.formats, *output.names).items()}
        return replace(self, **other | ({"nested": False} if output.table else {}))


@dataclass
class Converter:
    """Converts file after file and fills a report.

    Attributes:
        report: gets a line for each quantised weight.
        advance: called with the number of bytes that were read.
        homes: key -> the file that holds it, of all files.
    """

    settings: Settings
    selection: Selection
    report: QuantizationReport
    advance: Callable[[int], object]
    homes: dict[str, SafetensorsReader] = field(default_factory=dict)

    def planned_size(self, reader: SafetensorsReader) -> int:
        """Bytes of tensors that :meth:`convert` will write, but for a few hundred for each weight."""
        return sum(nbytes for _, _, nbytes in self._plan(reader).values())

    def report_plan(self, readers: list[SafetensorsReader]) -> None:
        """Fill the report with what :meth:`convert` would do, errors not measured."""
        for output in (output for reader in readers for output in self._outputs(reader)):
            entry = output.entry
            if not output.quantise:
                self.report.other += entry.numel
                continue
            size = sum(nbytes for _, _, nbytes in self._plan_weight(output).values())
            name = entry.key.removesuffix(".weight")
            self.report.layers.append(LayerReport(name, tuple(_shape(output)), 8 * size / entry.numel, float("nan")))

    def convert(self, reader: SafetensorsReader, path: Path) -> list[str]:
        """Write the file ``path``; returns its keys.

        Raises:
            ValueError: a weight holds NaN or infinity; the message names its key.
        """
        planned, outputs = self._plan(reader), self._outputs(reader)
        late = [self._json_key(output) for output in outputs if output.quantise]
        metadata = {"format": "pt"} | reader.metadata
        ahead = read_ahead(self._reads(reader))
        with SafetensorsWriter(path, planned, late, metadata) as writer, closing(ahead) as pieces:
            for output in outputs:
                if output.quantise:
                    self._quantise(pieces, writer, output)
                else:
                    self._copy(pieces, writer, output.entry)
        return [*planned, *late]

    def _outputs(self, reader: SafetensorsReader) -> list[Output]:
        return [output for key in reader.entries for output in self.selection.outputs[key]]

    # --- what will be written -----------------------------------------------------------------------------------------

    def _plan(self, reader: SafetensorsReader) -> Plan:
        planned: Plan = {}
        for output in self._outputs(reader):
            planned |= self._plan_weight(output) if output.quantise else output.entry.plan(self.settings.rest)
        return planned

    def _plan_weight(self, output: Output) -> Plan:
        settings, key, numel = self.settings.of(output), output.entry.key, output.entry.numel
        storage, blocks = settings.storage, layout.block_count(numel, settings.blocksize)
        elements = -(-layout.packed_bytes(numel) // storage.itemsize)
        planned: Plan = {
            key: (NAMES[storage], (elements, 1), elements * storage.itemsize),
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

    def _json_key(self, output: Output) -> str:
        return f"{output.entry.key}.quant_state.bitsandbytes__{self.settings.of(output).quant_type}"

    # --- what will be read --------------------------------------------------------------------------------------------

    def _reads(self, reader: SafetensorsReader) -> Iterator[Tensor]:
        """All pieces of a file that :meth:`convert` asks for, in that order: of a weight twice if it is measured.

        They go into two buffers in turn: a piece is gone when the next but one is read.
        """
        rooms = cycle([torch.empty(4 * PIECE, dtype=torch.uint8) for _ in range(2)])  # of the widest dtype
        made_of: tuple[str, ...] = ()
        made: dict[str, Tensor] = {}
        for output in self._outputs(reader):
            entry, whole = output.entry, None
            if output.made is not None:
                if output.made.keys != made_of:
                    made_of, made = output.made.keys, output.made.convert(self._whole)
                whole = made.pop(output.made.parameter)
            elif output.transposed:  # GPT-2's layers are small
                whole = reader.tensor(entry.key).view(entry.shape)
            if whole is not None:
                whole = (whole.T if output.transposed else whole).reshape(-1)
            if output.quantise or entry.casts(self.settings.rest):
                for _ in range(2 if output.quantise and self.settings.measure else 1):
                    for start in range(0, entry.numel, PIECE):
                        stop = start + PIECE
                        yield reader.tensor(entry.key, start, stop, next(rooms)) if whole is None else whole[start:stop]
            elif whole is None:
                yield from reader.pieces(entry.key, rooms)
            elif entry.nbytes:
                yield whole.view(torch.uint8)

    def _whole(self, key: str) -> Tensor:
        """A tensor of any of the files."""
        reader = self.homes[key]
        return reader.tensor(key).view(reader.entries[key].shape)

    # --- one tensor ---------------------------------------------------------------------------------------------------

    def _copy(self, pieces: Iterator[Tensor], writer: SafetensorsWriter, entry: Entry) -> None:
        at = read = 0
        while read < entry.nbytes:
            piece = next(pieces)
            kept = piece.to(self.settings.rest) if entry.casts(self.settings.rest) else piece
            writer.write(entry.key, kept, at)
            at, read = at + kept.nbytes, read + piece.nbytes
            self.advance(piece.nbytes)
        self.report.other += entry.numel

    def _quantise(self, pieces: Iterator[Tensor], writer: SafetensorsWriter, output: Output) -> None:
        entry = output.entry
        settings, scales = self.settings.of(output), list[Tensor]()
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
        state = self._state(torch.cat(scales), output)
        for name, tensor in state.as_dict(packed=True).items():
            (writer.add if "quant_state" in name else writer.write)(f"{entry.key}.{name}", tensor)
        self.report.layers.append(self._measured(pieces, writer, output, state))

    def _state(self, scales: Tensor, output: Output) -> QuantState:
        settings = self.settings.of(output)
        code, dtype = get_4bit_type(settings.quant_type), settings.rest or FLOATS[output.entry.dtype]
        state = QuantState(scales, _shape(output), code, settings.blocksize, settings.quant_type, dtype)
        if settings.nested:
            state.absmax, state.offset, state.state2 = quantize_scales(scales)
        return state

    def _measured(
        self, pieces: Iterator[Tensor], writer: SafetensorsWriter, output: Output, state: QuantState
    ) -> LayerReport:
        entry = output.entry
        _, _, stored = self._plan_weight(output)[entry.key]
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


def _shape(output: Output) -> torch.Size:
    """Of the weight as its layer has it: [N, K]."""
    return torch.Size(output.entry.shape[::-1] if output.transposed else output.entry.shape)
