"""refq4: the 4-bit linear layer of bitsandbytes (QLoRA's NF4 and FP4), taken apart.

read it     one_page -> codebooks -> layout -> state -> reference -> pipeline -> nn       (files, in reading order)
run it      layer = refq4.nn.LinearNF4(4096, 4096).to("cpu");  layer(x)
watch it    with refq4.trace() as t: layer(x);  print(t)
swap it     refq4.set_backend("cpu");  refq4.compare(layer, x)
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import autograd, backend, codebooks, functional, nn
from .backend import BackendUnavailableError, BackendUnsupportedError, UnknownBackendError
from .codebooks import Codebook, get_codebook, register_codebook
from .functional import QuantState, matmul_4bit
from .models.prepare import prepare, restore
from .models.quantize_model import quantize_model
from .registry import (
    backend_info,
    get_backend,
    list_backends,
    register_backend,
    set_backend,
    unregister_backend,
    use_backend,
)
from .tools.explain import compare, explain
from .trace import trace

if TYPE_CHECKING:
    from . import checkpoint, testing

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "BackendUnsupportedError",
    "Codebook",
    "QuantState",
    "UnknownBackendError",
    "autograd",
    "backend",
    "backend_info",
    "checkpoint",
    "codebooks",
    "compare",
    "explain",
    "functional",
    "get_backend",
    "get_codebook",
    "list_backends",
    "matmul_4bit",
    "nn",
    "prepare",
    "quantize_model",
    "register_backend",
    "register_codebook",
    "restore",
    "set_backend",
    "testing",
    "trace",
    "unregister_backend",
    "use_backend",
]

_ON_FIRST_USE = ("checkpoint", "testing")  # importing refq4 stays quick


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
