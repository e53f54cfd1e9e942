"""refq4: the 4-bit linear layer of bitsandbytes (QLoRA's NF4 and FP4), taken apart.

    run it      layer = refq4.nn.LinearNF4(4096, 4096).to("cpu");  layer(x)
    watch it    with refq4.trace() as t: layer(x);  print(t)
    swap it     refq4.set_backend("cpu");  refq4.compare(layer, x)

Read it in this order; the folders can wait:

    one_page                     the whole layer
    codebooks layout state       what is stored
    functional                   quantise, decode
    backend reference            the contract, and its plainest body
    pipeline matmul autograd     one call: seven steps, one dispatch, one gradient
    params nn                    the parameter, the layers
    trace registry               what happened in a call; which backend computes
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


def _is_the_command() -> bool:
    """Whether this is ``python -m refq4`` or the script ``refq4``: both run this file before a line of their own."""
    program = os.path.basename(sys.argv[0]) if sys.argv else ""
    if program == "-m":  # what was to be run is in no argv until it has been imported
        return sys.orig_argv[-len(sys.argv)] in ("refq4", "-mrefq4")
    return os.path.splitext(program)[0] == "refq4"


if _is_the_command():
    from .cli import begin

    begin()  # --help and a wrong command line end here: what follows imports torch, which takes a second

from . import autograd, backend, codebooks, functional, nn
from .backend import BackendUnavailableError, BackendUnsupportedError, UnknownBackendError
from .codebooks import Codebook, get_codebook, register_codebook
from .functional import QuantState, matmul_4bit
from .registry import (
    backend_info,
    get_backend,
    list_backends,
    register_backend,
    set_backend,
    unregister_backend,
    use_backend,
)
from .trace import trace

if TYPE_CHECKING:
    from . import checkpoint, testing
    from .models.prepare import prepare, restore
    from .models.quantize_model import quantize_model
    from .tools.evaluate import evaluate
    from .tools.explain import compare, explain

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
    "evaluate",
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

_ON_FIRST_USE = {  # the module in which a name is; importing refq4 loads only the layer
    "checkpoint": ".checkpoint",
    "compare": ".tools.explain",
    "evaluate": ".tools.evaluate",
    "explain": ".tools.explain",
    "prepare": ".models.prepare",
    "quantize_model": ".models.quantize_model",
    "restore": ".models.prepare",
    "testing": ".testing",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_ON_FIRST_USE[name], __name__)
    found = getattr(module, name, module)  # the two packages stand for themselves
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_FIRST_USE})
