"""Which tensors of a checkpoint become 4-bit weights, so that transformers puts a 4-bit layer in the same places.

A file knows names and shapes only. For a few common decoders they say it all. Else, where the directory has a
``config.json`` whose architecture the installed transformers knows, the model is built without memory (on the meta
device) and asked: linear layers, GPT-2's ``Conv1D`` (stored transposed), output heads, tied weights, what must stay in
fp32. Otherwise the names decide.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from ..models.patterns import first_match
from .architecture import EXPERTS, FUSED, HEAD, ask_transformers
from .places import read_json
from .tensors import FLOATS, Entry

__all__ = ["Selection", "select"]

# Decoders of which the names say everything, as a test makes transformers confirm: its import takes seconds.
NAMES_SUFFICE = ("gemma", "llama", "mistral", "qwen2", "qwen3")
# The last part of the names of tables and output layers: for when the architecture can't be asked.
_BY_NAME = {
    "an embedding": ("*embed*", "*_emb", "wte", "wpe", "shared", "relative_attention_bias"),
    HEAD: ("lm_head", "embed_out", "output", "decoder", "classifier", "score", "qa_outputs"),
}


@dataclass
class Selection:
    """What is to become of each matrix.

    Attributes:
        chosen: keys of the weights to quantise.
        transposed: those of them that are stored as [K, N].
        tables: those of them that are embeddings.
        left: module name -> why its matrix stays as it is.
        skip_modules: names for ``llm_int8_skip_modules``: those, and output layers that have no tensor of their own.
        guessed: whether the names decided for a model of unknown architecture.
    """

    chosen: set[str] = field(default_factory=set)
    transposed: set[str] = field(default_factory=set)
    tables: set[str] = field(default_factory=set)
    left: dict[str, str] = field(default_factory=dict)
    skip_modules: list[str] = field(default_factory=list)
    guessed: bool = False


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
        include: patterns of module names; these linear layers only, output layers too where a pattern names one. Empty:
            all but the output layers and what shares their weight.
        skip: patterns of module names to leave alone.
        embeddings, head: also the tables, also the output layers; not those that share their weight.

    Raises:
        ValueError: a pattern matches no matrix of the checkpoint; or ``embeddings`` or ``head``, and transformers can't
            be asked which those are.
    """
    matrices = {
        key.removesuffix(".weight"): key
        for key, entry in entries.items()
        if key.endswith(".weight") and len(entry.shape) == 2 and entry.dtype in FLOATS and entry.numel
    }
    for pattern in (*include, *skip):
        if not any(first_match(name, [pattern]) for name in matrices):
            raise ValueError(f"the pattern {pattern!r} matches none of the {len(matrices)} matrices of the checkpoint")
    by_names = _names_suffice(directory) and not (embeddings or head)
    architecture = None if by_names else ask_transformers(directory)
    if embeddings or head:
        if architecture is None:
            raise ValueError(
                f"which are the embeddings and the head of {directory}, and what they share, is asked of transformers, "
                f"which is missing or does not know the architecture"
            )
        architecture.take(embeddings, head)
    found = Selection(guessed=architecture is None and not by_names)
    modules = {name: name if architecture is None else architecture.module_name(name) for name in matrices}
    for name, key in matrices.items():
        why = _why_not_by_name(name) if architecture is None else architecture.why_not(modules[name])
        if include and why in (None, HEAD):
            why = None if first_match(name, include) else "not among those to include"
        skipped_by = first_match(name, skip)
        if why is None and skipped_by is not None:
            why = f"skipped: it matches {skipped_by!r}"
        if why is not None:
            found.left[name] = why
            continue
        found.chosen.add(key)
        if architecture is not None and modules[name] in architecture.transposed:
            found.transposed.add(key)
        if architecture is not None and modules[name] in architecture.taken:
            found.tables.add(key)
    chosen = {modules[key.removesuffix(".weight")] for key in found.chosen}
    left = {modules[name] for name in found.left}
    if architecture is None:
        left.add("lm_head")  # tied, it has no tensor of its own
    else:  # transformers replaces linear layers only: no need to name tables
        left = (left & (architecture.linears | architecture.fp32 | architecture.taken)) | architecture.heads
    found.skip_modules = _unambiguous(left - chosen, chosen)
    return found


def _names_suffice(directory: Path) -> bool:
    if not (directory / "config.json").is_file():
        return False
    config = read_json(directory / "config.json")
    architectures = config.get("architectures")
    causal = isinstance(architectures, list) and all(str(name).endswith("ForCausalLM") for name in architectures)
    return causal and config.get("model_type") in NAMES_SUFFICE


def _why_not_by_name(name: str) -> str | None:
    if first_match(name, [EXPERTS]):
        return FUSED
    last = name.rpartition(".")[2]
    return next((why for why, patterns in _BY_NAME.items() if any(fnmatchcase(last, p) for p in patterns)), None)


def _unambiguous(left: set[str], chosen: set[str]) -> list[str]:
    """Names for transformers' list of modules to skip, which reads them as regular expressions and as suffixes."""

    def also_means_a_chosen_one(name: str) -> bool:
        return any(other.endswith(name) or re.match(rf"(?:{name})(?:(?<=\.)|(?=\.|$))", other) for other in chosen)

    return sorted(rf"^{re.escape(name)}$" if also_means_a_chosen_one(name) else name for name in left)
