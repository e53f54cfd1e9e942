"""Which layers are meant: by a pattern on the dotted name, or by asking a function.

A pattern is a glob over a run of dotted parts: ``lm_head``, ``layers.1`` (not ``layers.11``), ``*_proj``,
``layers.[0-3].mlp``, ``encoder.*.dense``. It matches a name that holds such a run anywhere, so that a part names all
that lies below it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

__all__ = ["EXPERTS", "HEAD", "Asked", "Rule", "as_rule", "chosen", "first_match", "unambiguous"]

# Why a weight stays as it is.
HEAD = "the output layer, or tied to an embedding"
EXPERTS = "experts that transformers holds in one tensor"

Asked = tuple[str, ...] | Callable[[str, nn.Module], bool]  # a rule that can be asked more than once
Rule = str | Iterable[str] | Callable[[str, nn.Module], bool]


def as_rule(rule: Rule) -> Asked:
    """The rule in a form that can be asked more than once: one pattern alone and an iterator become a tuple.

    Example:
        >>> as_rule("lm_head"), as_rule(["a", "b"])
        (('lm_head',), ('a', 'b'))
    """
    if callable(rule):
        return rule
    return (rule,) if isinstance(rule, str) else tuple(rule)


def first_match(name: str, patterns: Iterable[str]) -> str | None:
    """The first of the patterns that matches a dotted name.

    Example:
        >>> first_match("model.layers.1.mlp.up_proj", ["lm_head", "layers.1"])
        'layers.1'
        >>> first_match("model.layers.11.mlp.up_proj", ["lm_head", "layers.1"]) is None
        True
    """
    return next((pattern for pattern in patterns if fnmatchcase(f".{name}.", f"*.{pattern}.*")), None)


def chosen(rule: Asked, name: str, module: nn.Module) -> bool:
    """Whether a rule means this module: its predicate says so, or one of its patterns matches the name."""
    return bool(rule(name, module)) if callable(rule) else first_match(name, rule) is not None


def unambiguous(left: Iterable[str], taken: Iterable[str]) -> list[str]:
    """Names for transformers' list of modules to skip, which reads them as regular expressions and as suffixes.

    Args:
        left: the modules to skip.
        taken: modules that none of the names may mean.

    Example:
        >>> unambiguous({"proj", "lm_head"}, {"layers.0.proj"})
        ['^proj$', 'lm_head']
    """
    others = list(taken)

    def also_means_another(name: str) -> bool:
        return any(other.endswith(name) or re.match(rf"(?:{name})(?:(?<=\.)|(?=\.|$))", other) for other in others)

    return sorted(rf"^{re.escape(name)}$" if also_means_another(name) else name for name in left)
