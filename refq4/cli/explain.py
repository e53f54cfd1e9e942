"""``refq4 explain NxK``: the seven steps of one call of a layer made on the spot."""

from __future__ import annotations

import argparse
import warnings
from typing import Any

from . import imports, options
from .console import show

__all__ = ["add"]


def add(commands: Any) -> None:
    """The subcommand."""
    command = commands.add_parser(
        "explain",
        help="show the seven steps of one call, for a shape, a dtype and a backend",
        description="Make a random layer of weight [N, K], run M tokens through it, and show each step of the second "
        "call with its decision and its reason, the error against fp64, and the bytes moved. Both sides of the error "
        "use the same 4-bit weight, so it is the rounding of the kernel, and of casts in steps 5 and 7 if there are "
        "any; what 4 bits cost a model is measured by 'eval' and 'tour'.",
        epilog=options.examples(
            "python -m refq4 explain 4096x11008",
            "python -m refq4 explain 4096x4096 --tokens 16 --dtype bfloat16 --backend cpu",
            "python -m refq4 explain 100x100 --quant-type fp4 --bias --json",
        ),
    )
    command.add_argument("shape", metavar="NxK", type=options.shape, help="out_features x in_features, e.g. 4096x11008")
    command.add_argument(
        "--tokens", type=options.tokens, default=1, metavar="M", help="tokens in the call (%(default)s)"
    )
    command.add_argument(
        "--dtype", choices=options.DTYPES, default="float32", help="dtype of the activations (%(default)s)"
    )
    command.add_argument("--bias", action="store_true", help="the layer has a bias")
    command.add_argument("--seed", type=int, default=0, help="seed of the random weight and tokens (%(default)s)")
    options.add_format(command, compute_dtype="that of the tokens")
    options.add_backend(command)
    imports.add(command)
    options.add_json(command)
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import torch

    from ..nn import Linear4bit
    from ..registry import requested_backend, use_backend
    from ..tools.explain import explain

    imports.run(arguments.imports)
    (n, k), m = arguments.shape, arguments.tokens
    torch.manual_seed(arguments.seed)
    with use_backend(requested_backend(arguments.backend)), warnings.catch_warnings():
        layer = Linear4bit(
            k,
            n,
            arguments.bias,
            arguments.compute_dtype and options.dtype(arguments.compute_dtype),
            arguments.nested,
            arguments.quant_type,
            options.dtype(arguments.storage),
            blocksize=arguments.blocksize,
        )
        warnings.simplefilter("ignore")  # a slower path stands in the steps, with its reason
        report = explain(layer.to("cpu").eval(), torch.randn(m, k).to(options.dtype(arguments.dtype)))
    show(report, arguments)
    return 0
