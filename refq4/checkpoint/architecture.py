"""What transformers would do with each module of a checkpoint: asked of the model itself, built without memory."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..models.patterns import first_match

__all__ = ["EXPERTS", "FUSED", "HEAD", "Architecture", "ask_transformers"]

HEAD = "the output layer, or tied to an embedding"
EXPERTS = "experts.[0-9]*"
FUSED = "fused with other experts when transformers loads it"
_OTHER = "not the weight of a linear layer"
_TIED = "shares its weight with another module, to which transformers ties it again"
_FP32 = "kept in fp32 by its architecture"


@dataclass
class Architecture:
    """The modules of a model by name.

    Attributes:
        linears: those that transformers replaces by 4-bit layers.
        transposed: those of them that are stored as [K, N].
        heads: those that it leaves alone: output layers, and what is tied to another.
        fp32: those that the architecture keeps in fp32.
        tables: embeddings.
        takes_tables, taken: whether they were asked for (:meth:`take`), and those of them that get a 4-bit table.
        tied: modules that share their weight with another.
        prefix: of the base model, which a checkpoint's names may have or lack.
    """

    linears: set[str] = field(default_factory=set)
    transposed: set[str] = field(default_factory=set)
    heads: set[str] = field(default_factory=set)
    fp32: set[str] = field(default_factory=set)
    tables: set[str] = field(default_factory=set)
    takes_tables: bool = False
    taken: set[str] = field(default_factory=set)
    tied: set[str] = field(default_factory=set)
    prefix: str = ""

    def module_name(self, name: str) -> str:
        """The module that a checkpoint's name means: itself, with the base model's prefix, or without."""
        known = self.linears | self.heads | self.fp32 | self.tables
        return next(
            (n for n in (name, f"{self.prefix}.{name}", name.removeprefix(f"{self.prefix}.")) if n in known), name
        )

    def take(self, embeddings: bool, head: bool) -> None:
        """Let embeddings and output layers get 4-bit weights, too; not those that share their weight."""
        if head:
            free = self.heads - self.tied
            self.heads, self.linears = self.heads - free, self.linears | free
        if embeddings:
            self.takes_tables, self.taken = True, self.tables - self.tied

    def why_not(self, module: str) -> str | None:
        """Why a module keeps its matrix; None if it gets a 4-bit one."""
        if module in self.heads:
            return HEAD
        if module in self.fp32:
            return _FP32
        if module in self.linears or module in self.taken:
            return None
        if self.takes_tables and module in self.tables:
            return _TIED
        return FUSED if first_match(module, [EXPERTS]) else _OTHER


def ask_transformers(directory: Path) -> Architecture | None:
    """The architecture that a directory's config.json names, or None where nobody can be asked."""
    if not (directory / "config.json").is_file() or importlib.util.find_spec("transformers") is None:
        return None
    import transformers
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        model_class = getattr(transformers, (config.architectures or [""])[0])
        with torch.device("meta"):
            model = model_class(config)
        heads = get_keys_to_not_convert(model)
    except (AttributeError, ImportError, KeyError, OSError, TypeError, ValueError):
        return None  # a class of its own, code from a hub, or an older transformers: the names decide
    found = Architecture(prefix=model.base_model_prefix)
    found.tied = {key.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for key in pair}
    fp32 = list(model._keep_in_fp32_modules or ())
    for name, module in model.named_modules():
        if type(module) is nn.Embedding:
            found.tables.add(name)
        if not (type(module) is nn.Linear or isinstance(module, Conv1D)):
            continue
        if not should_convert_module(name, heads):
            found.heads.add(name)
        elif not should_convert_module(name, fp32):
            found.fp32.add(name)
        else:
            found.linears.add(name)
            found.transposed |= {name} if isinstance(module, Conv1D) else set()
    return found
