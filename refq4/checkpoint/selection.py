"""What becomes of each tensor of a checkpoint, so that transformers puts a 4-bit layer in the same places.

    of the file                    written instead
    up_proj.weight                 up_proj.weight, up_proj.weight.absmax, ...      quantised
    norm.weight                    norm.weight                                     copied
    qkv.weight                     q.weight, q.weight.absmax, ..., k, v            taken apart, and each piece quantised

Where the directory has a ``config.json`` whose architecture the installed transformers knows, the model is built
without memory (on the meta device) and asked. Otherwise the names and shapes decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from torch import Tensor

from ..models.patterns import EXPERTS, HEAD, first_match, unambiguous
from .architecture import Architecture, ask_transformers
from .tensors import FLOATS, Entry

__all__ = ["OTHER", "Made", "Output", "Selection", "select"]

OTHER = "not the weight of a linear layer"
_AN_EXPERT = "experts.[0-9]*"
# The last part of the names of tables and output layers: for when the architecture can't be asked.
_BY_NAME = {
    "an embedding": ("*embed*", "*_emb", "wte", "wpe", "shared", "relative_attention_bias"),
    HEAD: ("lm_head", "embed_out", "output", "decoder", "classifier", "score", "qa_outputs"),
}


@dataclass(frozen=True)
class Made:
    """A tensor that transformers' converter makes of one or several of the file.

    Attributes:
        keys: of the file.
        parameter: which of those that ``convert`` returns it is.
        convert: from a function that gives the tensor of a key.
    """

    keys: tuple[str, ...]
    parameter: str
    convert: Callable[[Callable[[str], Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Output:
    """One tensor to write: in full precision as its entry says, or quantised with what stands beside it.

    Attributes:
        entry: key, dtype and shape before it is quantised.
        quantise: or copy.
        transposed: it is stored as [K, N].
        table: it is an embedding.
        names: all that it is called, in the file and in the model, without ``.weight``.
        made: how it comes about, if it is not simply read.
    """

    entry: Entry
    quantise: bool = False
    transposed: bool = False
    table: bool = False
    names: tuple[str, ...] = ()
    made: Made | None = None


@dataclass
class Selection:
    """What is to become of each tensor.

    Attributes:
        outputs: key of the file -> what is written in its place: nothing, if it goes into what another one becomes.
        left: name -> why its matrix stays as it is.
        skip_modules: names for ``llm_int8_skip_modules``: the layers left alone.
        guessed: whether the names decided for a model of unknown architecture.
        own: whether some layers are of a class of their own, or experts, which bitsandbytes does not replace.
        could: weights in linear layers and experts, without output layers.
    """

    outputs: dict[str, list[Output]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    skip_modules: list[str] = field(default_factory=list)
    guessed: bool = False
    own: bool = False
    could: int = 0

    @property
    def chosen(self) -> list[Output]:
        """What is quantised."""
        return [output for outputs in self.outputs.values() for output in outputs if output.quantise]


@dataclass
class _Weight:
    """One that could be in 4 bits: what it is called (without ``.weight``), why it stays as it is or None, its size."""

    names: list[str]
    why: str | None
    numel: int
    table: bool = False

    @property
    def name(self) -> str:
        """As the file has it; of what several of its tensors become, as the model has it."""
        return self.names[-1] if len(self.names) <= 2 else self.names[0]


def select(
    entries: dict[str, Entry],
    directory: Path,
    include: tuple[str, ...],
    skip: tuple[str, ...],
    embeddings: bool = False,
    head: bool = False,
) -> Selection:
    """Choose among a checkpoint's tensors.

    Args:
        entries: all tensors of all files.
        directory: where the config.json is, if there is one.
        include: patterns of names, of the file or of the model: these linear layers only, output layers too where a
            pattern names one. Empty: all but the output layers and what shares their weight.
        skip: patterns of names of layers to leave alone.
        embeddings, head: also the tables, also the output layers; not those that share their weight.

    Raises:
        ValueError: a pattern matches no matrix of the checkpoint; transformers can't convert it; or ``embeddings`` or
            ``head``, and it can't be asked which those are.
    """
    architecture = ask_transformers(directory, entries, embeddings, head)
    if architecture is None and (embeddings or head):
        raise ValueError(
            f"which are the embeddings and the head of {directory}, and what they share, is asked of transformers, "
            f"which is missing or does not know the architecture"
        )
    matrices = [_plain(key) for key, entry in entries.items() if _is_matrix(entry)]
    weights = _by_names(entries) if architecture is None else _of_model(architecture)
    names = {*matrices, *(name for weight in weights.values() for name in weight.names)}
    for pattern in (*include, *skip):
        if not any(first_match(name, [pattern]) for name in names):
            raise ValueError(f"the pattern {pattern!r} matches none of the {len(matrices)} matrices of the checkpoint")
    for weight in weights.values():
        weight.why = _asked_for(weight, () if weight.table else include, skip)
    found = Selection(guessed=architecture is None)
    if architecture is None:
        left = {_plain(key) for key, weight in weights.items() if weight.why is not None}
        chosen = {_plain(key) for key in weights} - left
        left.add("lm_head")  # tied, it has no tensor of its own
        found.outputs = {
            key: [Output(entry, _plain(key) in chosen, names=(_plain(key),))] for key, entry in entries.items()
        }
    else:
        _alike(architecture, weights)
        found.outputs = _outputs(architecture, weights, entries)
        linears = {name: why for name, why in architecture.choice.items() if why != EXPERTS}
        chosen = {_plain(name) for name in linears if name in weights and weights[name].why is None}
        left = {_plain(name) for name in linears} - chosen
        found.own = any(not architecture.is_plain(name) for name, weight in weights.items() if weight.why is None)
    found.skip_modules = unambiguous(left - chosen, chosen)
    of_layers = {name for weight in weights.values() for name in weight.names}
    found.left = {name: OTHER for name in matrices if name not in of_layers}
    found.left |= {weight.name: weight.why for weight in weights.values() if weight.why is not None}
    found.could = sum(weight.numel for weight in weights.values() if weight.why != HEAD and weight.numel)
    return found


def _plain(key: str) -> str:
    return key.removesuffix(".weight")


def _is_matrix(entry: Entry) -> bool:
    return entry.key.endswith(".weight") and len(entry.shape) == 2 and entry.dtype in FLOATS and entry.numel > 0


def _asked_for(weight: _Weight, include: tuple[str, ...], skip: tuple[str, ...]) -> str | None:
    """Why a weight stays as it is, once the patterns were heard."""
    why = weight.why
    if include and why in (None, HEAD):
        why = None if any(first_match(name, include) for name in weight.names) else "not among those to include"
    skipped_by = next(filter(None, (first_match(name, skip) for name in weight.names)), None)
    return f"skipped: it matches {skipped_by!r}" if why is None and skipped_by is not None else why


# --- by names and shapes ----------------------------------------------------------------------------------------------


def _by_names(entries: dict[str, Entry]) -> dict[str, _Weight]:
    """The matrices of a file; what is a table counts for nothing."""
    found = {}
    for key, entry in entries.items():
        if _is_matrix(entry):
            why = _why_not_by_name(_plain(key))
            found[key] = _Weight([_plain(key)], why, entry.numel if why in (None, EXPERTS) else 0)
    return found


def _why_not_by_name(name: str) -> str | None:
    if first_match(name, [_AN_EXPERT]):
        return EXPERTS
    last = name.rpartition(".")[2]
    return next((why for why, patterns in _BY_NAME.items() if any(fnmatchcase(last, p) for p in patterns)), None)


# --- by the model -----------------------------------------------------------------------------------------------------


def _of_model(architecture: Architecture) -> dict[str, _Weight]:
    """The parameters that could be in 4 bits and of which the file has something."""
    found = {}
    for name, why in architecture.choice.items():
        shape = architecture.way.shape(name)
        if shape is not None:
            names = [_plain(name), *map(_plain, architecture.way.keys(name))]
            found[name] = _Weight(names, why, shape.numel(), name in architecture.tables)
    return found


def _alike(architecture: Architecture, weights: dict[str, _Weight]) -> None:
    """The pieces of one tensor stay as they are if one of them does: transformers asks about the first of them only."""
    for group in architecture.way.groups:
        pieces = [weights[name] for name in group.parts if name in weights]
        if why := next((piece.why for piece in pieces if piece.why is not None), None):
            for piece in pieces:
                piece.why = piece.why or why


def _outputs(
    architecture: Architecture, weights: dict[str, _Weight], entries: dict[str, Entry]
) -> dict[str, list[Output]]:
    """What is written for each key. A converter that makes a 4-bit weight is applied wherever it fits, others never."""
    way = architecture.way
    chosen = {name for name, weight in weights.items() if weight.why is None}
    used = [group.converter for group in way.groups if group.converter is not None and chosen & group.parts.keys()]
    applied = {tuple(converter.source_patterns) for converter in used}
    outputs = {key: [Output(entry)] for key, entry in entries.items()}

    def output(entry: Entry, name: str, made: Made | None = None) -> Output:
        called = tuple(weights[name].names) if name in weights else ()
        return Output(entry, name in chosen, name in architecture.transposed, name in architecture.tables, called, made)

    for group in way.groups:
        keys = tuple(group.sources)
        first = entries[keys[0]]
        if group.converter is None:
            if group.target in chosen:
                outputs[keys[0]] = [output(first, group.target)]
            continue
        if tuple(group.converter.source_patterns) not in applied:
            continue
        outputs |= {key: [] for key in keys}
        outputs[keys[0]] = [
            output(
                _entry(way.name_in_file(name), first, shape),
                name,
                Made(keys, name, partial(group.convert, architecture.model)),
            )
            for name, shape in group.parts.items()
        ]
    return outputs


def _entry(key: str, of: Entry, shape: tuple[int, ...]) -> Entry:
    """A tensor that is in no file, of the dtype of one that is."""
    return Entry(key, of.dtype, tuple(shape), 0, math.prod(shape) * of.itemsize)
