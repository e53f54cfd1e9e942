"""dequantize_checkpoint: a directory of 4-bit weights in, a plain safetensors directory out, in bounded memory.

    MODEL_DIR/model.safetensors   packed weights and what stands beside them   ->   the same names, matrices of floats
    MODEL_DIR/config.json         with a quantization_config                   ->   without
    tokenizer and all other small files                                        ->   copied

What was quantised does not come back: the floats are the values that the 4-bit layers compute with. They are for tools
that read plain safetensors, and for merging adapters. Each weight goes through memory in pieces, and OUT_DIR appears
whole or not at all, as for ``quantize_checkpoint``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..functional import dequantize_4bit
from ..internals.blockwise import slice_state
from ..internals.format import WEIGHT_DTYPES
from ..internals.shown import Shown
from ..registry import requested_backend, use_backend
from ..state import QuantState
from . import places
from .architecture import ask_transformers
from .convert import all_entries, progress_bar, write_index
from .inspection import groups
from .sources import FromSafetensors
from .tensors import NAMES, PIECE, Entry, Plan, SafetensorsReader, SafetensorsWriter

__all__ = ["DequantizationReport", "dequantize_checkpoint"]


@dataclass
class DequantizationReport(Shown):
    """What :func:`dequantize_checkpoint` did.

    Attributes:
        layers: the weights that were in 4 bits, each with its dtype now.
        files: the weight files written.
        bytes_before, bytes_after: of all weight files.
        left_out: files of the model directory that were not copied: weights in other formats.

    Example:
        >>> report = DequantizationReport({"up": "bfloat16"}, ["model.safetensors"], 1152000, 4096000)
        >>> print(str(report).strip())
        1 layer out of 4 bits, now in bfloat16: 1.2 MB became 4.1 MB
    """

    layers: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    left_out: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)

    def _parts(self) -> Iterator[Any]:
        dtypes = " and ".join(sorted(set(self.layers.values())))
        sizes = f"{self.bytes_before / 1e6:,.1f} MB became {self.bytes_after / 1e6:,.1f} MB"
        plural = "s" * (len(self.layers) != 1)
        yield f"{len(self.layers)} layer{plural} out of 4 bits, now in {dtypes}: {sizes}"
        if self.left_out:
            yield f"not copied, weights in another format: {', '.join(self.left_out)}"


def dequantize_checkpoint(
    model_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    force: bool = False,
    progress: bool = True,
) -> DequantizationReport:
    """Decode the 4-bit weights of a checkpoint on disk, in bounded memory: the result is a plain model directory.

    Nothing appears under ``out_dir`` before all of it is written; an interrupt leaves no trace.

    Args:
        model_dir: a directory that refq4 or bitsandbytes quantised.
        out_dir: made; a directory beside it is renamed to it at the end.
        dtype: fp32, fp16 or bf16, of the decoded weights and of all other floats. If None, each decoded weight has the
            dtype that it had before it was quantised, and the others stay as they are.
        backend: overrides the backend in effect.
        force: replace ``out_dir`` if it is a model directory.
        progress: show a progress bar (on a terminal).

    Returns:
        A :class:`DequantizationReport`.

    Raises:
        FileNotFoundError: no such directory, or no safetensors file in it.
        FileExistsError: ``out_dir`` is there and ``force`` is not set.
        ValueError: a damaged file, nothing in 4 bits, another method's weights, too little disk, or a wrong dtype.

    Example:
        >>> import tempfile, torch, safetensors.torch
        >>> from refq4.checkpoint import quantize_checkpoint
        >>> root = Path(tempfile.mkdtemp())
        >>> (root / "model").mkdir()
        >>> weights = {"up.weight": torch.randn(64, 64)}
        >>> safetensors.torch.save_file(weights, root / "model" / "model.safetensors")
        >>> _ = quantize_checkpoint(root / "model", root / "model-nf4", progress=False)
        >>> dequantize_checkpoint(root / "model-nf4", root / "model-again", progress=False).layers
        {'up': 'float32'}
    """
    source, target = Path(model_dir), Path(out_dir)
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype must be torch.float32, torch.float16 or torch.bfloat16, got {dtype}")
    places.check_places(source, target, force)
    with ExitStack() as stack:
        stack.enter_context(use_backend(requested_backend(backend)))
        readers = [stack.enter_context(SafetensorsReader(path)) for path in places.weight_files(source)]
        config = places.read_json(source / "config.json") if (source / "config.json").is_file() else None
        _check_method(config, source)
        model = _Packed(readers, dtype, _transposed(source, all_entries(readers)))
        if not model.states:
            raise ValueError(f"nothing to dequantise in {source}: no tensor in it is a 4-bit weight")
        places.check_room(target.parent, sum(nbytes for r in readers for _, _, nbytes in model.plan(r).values()))
        partial = stack.enter_context(places.directory_beside(target))
        bar = stack.enter_context(progress_bar(readers, "decoding", progress))
        keys = {reader.path.name: model.decode(reader, partial / reader.path.name, bar.update) for reader in readers}
        write_index(source, partial, keys)
        if config is not None:
            text = json.dumps(_plain(config, dtype), indent=2, sort_keys=True) + "\n"
            (partial / "config.json").write_text(text, encoding="utf-8")
        report = DequantizationReport(model.dtypes(), sorted(keys), left_out=places.copy_others(source, partial))
        report.bytes_before = sum(reader.path.stat().st_size for reader in readers)
        report.bytes_after = sum((partial / name).stat().st_size for name in keys)
        places.move_into_place(partial, target)
    return report


class _Packed:
    """The tensors of a quantised checkpoint, by key, wherever a weight's own tensors are: shards may part them.

    Attributes:
        states: the quant state of each packed weight, whole: a hundredth of the weight, or an eighth.
        beside: keys of what stands beside packed weights, which no plain file has.
    """

    def __init__(self, readers: list[SafetensorsReader], dtype: torch.dtype | None, transposed: set[str]) -> None:
        self.dtype, self.transposed = dtype, transposed
        source = FromSafetensors(readers)
        beside = {key: others for key, others in groups(list(all_entries(readers))).items() if others}
        self.beside = {key for others in beside.values() for key in others}
        self.states = {key: _state(source, key, others) for key, others in beside.items()}

    def dtypes(self) -> dict[str, str]:
        """The dtype that each decoded weight has, by the name of its layer."""
        return {
            key.removesuffix(".weight"): str(self._dtype(state)).removeprefix("torch.")
            for key, state in self.states.items()
        }

    def _dtype(self, state: QuantState) -> torch.dtype:
        return self.dtype or state.dtype or torch.float32

    def plan(self, reader: SafetensorsReader) -> Plan:
        """What :meth:`decode` will write."""
        planned: Plan = {}
        for key, entry in reader.entries.items():
            if key in self.beside:
                continue
            if key in self.states:
                state = self.states[key]
                dtype, shape = self._dtype(state), state.geometry()[0]
                turned = tuple(shape)[::-1] if key in self.transposed else tuple(shape)
                planned[key] = NAMES[dtype], turned, shape.numel() * dtype.itemsize
            else:
                planned |= entry.plan(self.dtype)
        return planned

    def decode(self, reader: SafetensorsReader, path: Path, advance: Callable[[int], object]) -> list[str]:
        """Write the file ``path``; returns its keys."""
        planned = self.plan(reader)
        with SafetensorsWriter(path, planned, [], {"format": "pt"} | reader.metadata) as writer:
            for key in planned:
                at = 0
                for piece in self._pieces(reader, key):
                    writer.write(key, piece, at)
                    at += piece.numel() * piece.itemsize
                advance(reader.entries[key].nbytes)
        return list(planned)

    def _pieces(self, reader: SafetensorsReader, key: str) -> Iterator[Tensor]:
        """The floats of one tensor, in order."""
        entry = reader.entries[key]
        if key in self.transposed and key in self.states:  # GPT-2's layers are small: whole
            whole = torch.cat(list(self._decoded(reader, key)))
            yield whole.view(self.states[key].geometry()[0]).T.reshape(-1)
        elif key in self.states:
            yield from self._decoded(reader, key)
        else:
            for start in range(0, entry.numel, PIECE):
                piece = reader.tensor(key, start, start + PIECE)
                yield piece.to(self.dtype) if entry.casts(self.dtype) else piece

    def _decoded(self, reader: SafetensorsReader, key: str) -> Iterator[Tensor]:
        flat, itemsize = self.states[key].copy(), reader.entries[key].itemsize
        numel = flat.geometry()[0].numel()
        flat.shape, flat.dtype = torch.Size((numel,)), self._dtype(flat)
        for start in range(0, numel, PIECE):
            stop = min(start + PIECE, numel)
            section = slice_state(flat, start, stop)
            assert section is not None, "PIECE is a multiple of what a cut must be"
            packed = reader.tensor(key, start // 2 // itemsize, -(-stop // 2 // itemsize)).view(torch.uint8)
            yield dequantize_4bit(packed[: (stop - start + 1) // 2].view(-1, 1), section).view(-1)


def _state(source: FromSafetensors, key: str, beside: list[str]) -> QuantState:
    packed = source.described(key)
    if packed is None:
        raise ValueError(f"{key}: the packed weight is missing, and what belongs to one is there: {', '.join(beside)}")
    state = QuantState.from_dict({entry: source.tensor(entry) for entry in beside})
    state.check_packed(packed, key)
    return state


def _check_method(config: dict[str, Any] | None, source: Path) -> None:
    method = (config or {}).get("quantization_config")
    if not method:
        return
    fields = method if isinstance(method, dict) else {"quant_method": method}
    name, bits = fields.get("quant_method"), " in 8 bits" if fields.get("load_in_8bit") else ""
    if name not in ("bitsandbytes", "refq4") or bits:
        raise ValueError(f"{source} was quantised{bits} by {name}: only 4-bit weights of refq4 and bitsandbytes decode")


def _transposed(source: Path, entries: dict[str, Entry]) -> set[str]:
    """Keys of the weights that a plain file of this architecture holds as [K, N]: GPT-2's ``Conv1D``."""
    architecture = ask_transformers(source, entries)
    if architecture is None:
        return set()
    return {key for parameter in architecture.transposed for key in architecture.way.keys(parameter)}


def _plain(config: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """The config of the same model in full precision."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if dtype is not None:
        plain["torch_dtype" if "torch_dtype" in plain else "dtype"] = str(dtype).removeprefix("torch.")
    return plain
