"""What other libraries are told of a model that refq4 has quantised, in whatever order a program imports things.

    connect("peft")     peft is imported already     refq4.integrations.peft now
                        it is not                    refq4.integrations.peft as soon as it has been imported

    adopt(model, ...)   the model is one of transformers: it gets what from_pretrained would have given it

So peft works on such a model without a word, ``save_pretrained`` writes its config, and a program that imports neither
library does not pay for it: that takes seconds.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn

from ..internals.checks import warn_caller

__all__: list[str] = []  # for what makes a model's layers

served = False  # whether a BitsAndBytesConfig in 4 bits means refq4
told = False  # whether a user knows that a checkpoint of bitsandbytes without Refq4Config gets bitsandbytes' layers


def connect(library: str) -> None:
    """Import ``refq4.integrations.<library>`` now if the library is imported, else when it is.

    Warns:
        UserWarning: the library is there, but not in a version that the integration takes.

    Example:
        >>> connect("peft")
    """
    if library in sys.modules:
        _integrate(library)
    elif not any(isinstance(finder, _Waiting) and finder.library == library for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting(library))


def serve_bitsandbytes() -> None:
    """Let refq4 take what a program asks of bitsandbytes: a ``BitsAndBytesConfig`` in 4 bits, and its checkpoints.

    For the whole process, and not undone: it is for programs that one can't edit (``refq4 run --bitsandbytes``).

    Example:
        >>> from refq4.integrations.later import serve_bitsandbytes
    """
    global served
    served = True


def adopt(model: nn.Module, settings: dict[str, Any]) -> None:
    """Let a transformers model whose layers were quantised in memory save and reload as one that was loaded so.

    Any other module is left as it is.

    Args:
        settings: of the layers, as in ``Linear4bit``, and ``head`` and ``formats`` of ``quantize_model``.

    Warns:
        UserWarning: transformers is there, but not in a version that the integration takes.

    Example:
        >>> adopt(nn.Linear(8, 8), {})
    """
    library = sys.modules.get("transformers.modeling_utils")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return
    try:
        from . import in_memory
    except ImportError as error:
        warn_caller(f"save_pretrained will not write how this {type(model).__name__} is quantised: {error}")
    else:
        in_memory.adopt(model, settings)


def _integrate(library: str) -> None:
    try:
        importlib.import_module(f"refq4.integrations.{library}")
    except ImportError as error:
        warn_caller(f"{library} does not know refq4's layers, so it trains on them at most: {error}")


class _Waiting(MetaPathFinder):
    """Finds the library as ever, and lets its loader integrate afterwards; it goes when the library is imported.

    To look for the library, as programs do to see whether it is there, imports nothing and ends nothing.
    """

    def __init__(self, library: str) -> None:
        self.library = library
        self._asking = False  # the others, for the library

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.library or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            self._integrate_after(spec.loader)
        return spec

    def _integrate_after(self, loader: Any) -> None:
        """Let the loader, an object of this one search, integrate once the library is executed."""
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # so that no trace is left in the module, which keeps its loader
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            execute(module)
            _integrate(module.__name__)

        loader.exec_module = exec_module
