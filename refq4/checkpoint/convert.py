"""quantize_checkpoint: a model directory in, a directory in bitsandbytes' 4-bit format out, in bounded memory.

    MODEL_DIR/model-0000i-of-0000n.safetensors   ->   the same names, 4-bit weights and what stands beside them
    MODEL_DIR/model.safetensors.index.json       ->   rewritten
    MODEL_DIR/config.json                        ->   with a quantization_config: transformers loads it by itself
    tokenizer and all other small files          ->   copied; weights in other formats are left out

Each tensor goes through memory in pieces of 8 M elements: quantised, written to its place, then read back and decoded
to measure its error. Everything is written to a hidden directory beside OUT_DIR, which gets its name at the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..codebooks import get_codebook
from ..functional import DEFAULT_BLOCKSIZE
from ..internals.checks import check_blocksize, check_storage
from ..internals.scale_search import check_way
from ..models.formats import Formats, check_formats, check_used
from ..models.patterns import HEAD
from ..models.report import QuantizationReport
from ..registry import requested_backend, use_backend
from . import places
from .architecture import what_is_amiss
from .selection import OTHER, Output, Selection, select
from .tensors import FLOATS, Entry, SafetensorsReader
from .weights import Converter, Settings

__all__ = ["CheckpointReport", "all_entries", "progress_bar", "quantize_checkpoint", "write_index"]

_KNOWN_TO_BITSANDBYTES = ("nf4", "fp4")


@dataclass
class CheckpointReport(QuantizationReport):
    """What :func:`quantize_checkpoint` did.

    Attributes:
        files: the weight files written.
        bytes_before, bytes_after: of all weight files.
        left_out: files of the model directory that were not copied: weights in other formats.
        guessed: whether the layers' names decided, for an architecture that nobody could be asked about.
        dry_run: whether this is only what would be: nothing was written, and the sizes are planned.

    Example:
        >>> CheckpointReport(bytes_before=4096, bytes_after=1152).text().splitlines()[-1]
        '0.0 MB became 0.0 MB, 3.56 times smaller'
    """

    files: list[str] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    left_out: list[str] = field(default_factory=list)
    guessed: bool = False
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        keys = ("files", "bytes_before", "bytes_after", "left_out", "guessed", "dry_run")
        return super().to_dict() | {key: getattr(self, key) for key in keys}

    def _parts(self) -> Iterator[Any]:
        yield from super()._parts()
        ratio = self.bytes_before / max(self.bytes_after, 1)
        became = "would become" if self.dry_run else "became"
        yield f"{self.bytes_before / 1e6:,.1f} MB {became} {self.bytes_after / 1e6:,.1f} MB, {ratio:.2f} times smaller"
        if self.guessed:
            yield "layers were chosen by their names: transformers, or an architecture it knows, is missing"
        if self.left_out:
            yield f"not copied, weights in another format: {', '.join(self.left_out)}"


def quantize_checkpoint(
    model_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    quant_type: str = "nf4",
    compress_statistics: bool = True,
    compute_dtype: torch.dtype | None = None,
    quant_storage: torch.dtype = torch.uint8,
    blocksize: int | None = None,
    scales: str = "absmax",
    include: Iterable[str] = (),
    skip: Iterable[str] = (),
    embeddings: bool = False,
    head: bool = False,
    dtype: torch.dtype | None = None,
    formats: Formats | None = None,
    backend: str | None = None,
    measure: bool = True,
    force: bool = False,
    progress: bool = True,
    dry_run: bool = False,
) -> CheckpointReport:
    """Quantise the linear layers of a safetensors checkpoint on disk, in bounded memory, whatever its size.

    The result is what transformers saves for a model that bitsandbytes quantised, bit for bit as ``quantize_4bit`` on
    the same backend. Nothing appears under ``out_dir`` before all of it is written; an interrupt leaves no trace.

    Args:
        model_dir: a directory with ``model.safetensors``, or several files and their index.
        out_dir: made; a directory beside it is renamed to it at the end.
        quant_type, compress_statistics, quant_storage, blocksize, scales: as in ``quantize_4bit``.
        compute_dtype: written into config.json; that of the weights if None.
        include: patterns of module names (see :func:`refq4.quantize_model`): these linear layers only, output layers
            too where a pattern names one. By default all but the output layers and what shares their weight.
        skip: patterns of module names to leave alone.
        embeddings: also the tables, with plain scales; only refq4 loads such a file. Needs transformers.
        head: also the output layers. Needs transformers. What shares its weight with another module stays as it is.
        dtype: fp32, fp16 or bf16, of all other floats and of what the layers decode to; as they are if None.
        formats: what is different for some layers; as in :func:`refq4.quantize_model`.
        backend: overrides the backend in effect.
        measure: decode each layer again and report its error.
        force: replace ``out_dir`` if it is a model directory.
        progress: show a progress bar (on a terminal).
        dry_run: choose and check, and write nothing: the report says what would be quantised, and how large it gets.

    Returns:
        A :class:`CheckpointReport`.

    Raises:
        FileNotFoundError: no such directory, or no safetensors file in it.
        FileExistsError: ``out_dir`` is there and ``force`` is not set.
        ValueError: a damaged file, a model that is quantised already, nothing to quantise, NaN or infinity in a weight
            (the message names its key), a pattern that matches nothing, too little disk, or wrong settings.

    Example:
        >>> import tempfile, torch, safetensors.torch
        >>> full, packed = (Path(tempfile.mkdtemp(), name) for name in ("model", "model-nf4"))
        >>> full.mkdir()
        >>> safetensors.torch.save_file({"up.weight": torch.randn(64, 64)}, full / "model.safetensors")
        >>> report = quantize_checkpoint(full, packed, progress=False)
        >>> [layer.name for layer in report.layers], sorted(path.name for path in packed.iterdir())
        (['up'], ['model.safetensors'])
    """
    source, target = Path(model_dir), Path(out_dir)
    check_storage(quant_storage)
    blocksize = check_blocksize(DEFAULT_BLOCKSIZE if blocksize is None else blocksize)
    formats = check_formats(formats or {})
    if dtype is not None and dtype not in FLOATS.values():
        raise ValueError(f"dtype must be torch.float32, torch.float16 or torch.bfloat16, got {dtype}")
    settings = Settings(
        get_codebook(quant_type).name,
        compress_statistics,
        quant_storage,
        blocksize,
        measure,
        check_way(scales),
        formats,
        dtype,
    )
    places.check_places(source, target, force)
    with ExitStack() as stack:
        stack.enter_context(use_backend(requested_backend(backend)))
        readers = [stack.enter_context(SafetensorsReader(path)) for path in places.weight_files(source)]
        entries = all_entries(readers)
        config = places.read_json(source / "config.json") if (source / "config.json").is_file() else None
        _check_not_quantised(entries, config, source)
        selection = select(entries, source, tuple(include), tuple(skip), embeddings, head)
        if not selection.chosen:
            raise ValueError(
                f"nothing to quantise in {source}: {selection.left or 'no matrix of floats named *.weight'}"
            )
        check_used(formats, (name for output in selection.chosen for name in output.names))
        if not include and not skip:
            _check_share(selection, source)
        report = CheckpointReport(left=selection.left, guessed=selection.guessed)
        report.bytes_before = sum(reader.path.stat().st_size for reader in readers)
        bar = stack.enter_context(progress_bar(readers, f"quantising to {quant_type}", progress and not dry_run))
        homes = {key: reader for reader in readers for key in reader.entries}
        converter = Converter(settings, selection, report, bar.update, homes)
        report.bytes_after = sum(map(converter.planned_size, readers))
        places.check_room(target.parent, report.bytes_after)
        if dry_run:
            converter.report_plan(readers)
            report.files, report.dry_run = sorted(reader.path.name for reader in readers), True
            return report
        partial = stack.enter_context(places.directory_beside(target))
        keys = {reader.path.name: converter.convert(reader, partial / reader.path.name) for reader in readers}
        write_index(source, partial, keys)
        if config is not None:
            compute_dtype = compute_dtype or dtype or _dtype_of_weights(config, selection.chosen)
            config["quantization_config"] = _quantization_config(settings, compute_dtype, selection)
            if dtype is not None:
                config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
            (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            _check_it_loads(source, partial)
        report.left_out = places.copy_others(source, partial)
        report.files = sorted(keys)
        report.bytes_after = sum((partial / name).stat().st_size for name in keys)
        places.move_into_place(partial, target)
    return report


def all_entries(readers: list[SafetensorsReader]) -> dict[str, Entry]:
    """The tensors of some files by key; a ValueError if one is in two of them."""
    entries: dict[str, Entry] = {}
    for reader in readers:
        if twice := sorted(entries.keys() & reader.entries.keys()):
            raise ValueError(f"{twice[0]} is in {reader.path.name} and in another file, too")
        entries |= reader.entries
    return entries


def _check_not_quantised(entries: dict[str, Entry], config: dict[str, Any] | None, source: Path) -> None:
    method = (config or {}).get("quantization_config")
    if method:
        name = method.get("quant_method", "some method") if isinstance(method, dict) else method
        raise ValueError(f"{source} is quantised already, says its config.json: by {name}")
    packed = next((key for key in entries if ".quant_state.bitsandbytes__" in key), None)
    if packed is not None:
        raise ValueError(f"{source} is quantised already: it holds {packed}; refq4 inspect shows it")


def _check_share(selection: Selection, source: Path) -> None:
    """That most of what could be in 4 bits will be."""
    chosen = sum(output.entry.numel for output in selection.chosen)
    if 2 * chosen >= selection.could:
        return
    name, why = next((name, why) for name, why in selection.left.items() if why not in (HEAD, OTHER))
    raise ValueError(
        f"{source}: only {chosen / selection.could:.0%} of the {selection.could:,} weights in linear layers and "
        f"experts would be in 4 bits; the rest would stay as it is ({name}: {why}). Name the layers that you want with "
        f"include (--include '*' for all that can be) to quantise them anyway"
    )


def _check_it_loads(source: Path, partial: Path) -> None:
    """That transformers finds a place for each tensor that was written, and a tensor for each place."""
    before, after = what_is_amiss(source), what_is_amiss(partial)
    new = {name: what for name, what in (after or {}).items() if name not in (before or {})}
    if new:
        name, what = next(iter(new.items()))
        raise ValueError(
            f"{source}: what was written would not load, so it is not kept: {name}: {what} ({len(new)} such tensors). "
            f"This is an error of refq4: please report it, with the config.json"
        )


def progress_bar(readers: list[SafetensorsReader], label: str, shown: bool) -> Any:
    """A bar over the bytes of some files, on a terminal."""
    from tqdm.auto import tqdm

    total = sum(entry.nbytes for reader in readers for entry in reader.entries.values())
    settings = {"total": total, "unit": "B", "unit_scale": True, "unit_divisor": 1000}
    return tqdm(desc=label, disable=None if shown else True, **settings)


def write_index(source: Path, partial: Path, keys: dict[str, list[str]]) -> None:
    """The index of the new files, where the model has one."""
    if not (source / places.INDEX).is_file():
        return
    index = places.read_json(source / places.INDEX)
    total = 0
    for name in keys:
        with SafetensorsReader(partial / name) as written:  # and with that, what was written is a valid file
            total += sum(entry.nbytes for entry in written.entries.values())
    index["metadata"] = (index.get("metadata") or {}) | {"total_size": total}
    index["weight_map"] = dict(sorted((key, name) for name, there in keys.items() for key in there))
    (partial / places.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _dtype_of_weights(config: dict[str, Any], chosen: list[Output]) -> torch.dtype:
    """The dtype that the model's config names, else that of most weights."""
    named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    if isinstance(named, torch.dtype):
        return named
    dtypes = [output.entry.dtype for output in chosen]
    return FLOATS[max(sorted(set(dtypes)), key=dtypes.count)]


def _quantization_config(settings: Settings, compute_dtype: torch.dtype, selection: Selection) -> dict[str, Any]:
    """As transformers writes it for bitsandbytes; a codebook or a class that bitsandbytes lacks is for refq4 alone."""
    types = {settings.of(output).quant_type for output in selection.chosen}
    known = types <= set(_KNOWN_TO_BITSANDBYTES) and not selection.own
    theirs = {"load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True, "_load_in_8bit": False}
    ours = {"blocksize": settings.blocksize, "embeddings": any(output.table for output in selection.chosen)}
    return {
        "quant_method": "bitsandbytes" if known else "refq4",
        "bnb_4bit_quant_type": settings.quant_type,
        "bnb_4bit_use_double_quant": settings.nested,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": str(settings.storage).removeprefix("torch."),
        "llm_int8_skip_modules": selection.skip_modules,
    } | (theirs if known else ours)
