"""The ops of the 4-bit layer as ``torch.ops.refq4.*``: what they are called with, and what shapes they give.

    schema     flat tensors and numbers, which is what torch's dispatcher understands; a weight is the six of ``WEIGHT``
    fake       shapes and dtypes only: torch.compile, torch.export; the operations of a product, to be counted
    kernel     refq4/internals/dispatch.py: the checks, and the backend
    gradient   refq4/autograd.py, with the rule for vmap

The backend travels as a plain string, the last positional argument. So a compiler sees through an op, backward keeps
forward's backend, and a graph can be told to use another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import layout
from ..backend import Nested, PackedWeight, PreparedWeight
from .checks import checked

__all__ = ["Weight", "flatten", "implement", "implement_on_weight", "library", "unflatten"]

Weight = PackedWeight | PreparedWeight
F = TypeVar("F", bound=Callable[..., Any])

# Library.define and impl: about 3 µs a call on the way through, torch.library.custom_op about 12.
library = torch.library.Library("refq4", "DEF")  # type: ignore[no-untyped-call]

# tensors    canonical   packed, absmax, code; with double quantisation also absmax, code and offset of the scales
#            otherwise   what the backend's prepare_weight gave
WEIGHT = "Tensor[] tensors, str layout, SymInt[] shape, int blocksize, str quant_type, int blocksize2"
CANONICAL = "canonical"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def flatten(weight: Weight) -> tuple[Any, ...]:
    """The six arguments that a weight is to an op: its tensors, and what they are."""
    if isinstance(weight, PreparedWeight):
        return list(weight.tensors), weight.layout, weight.shape, weight.blocksize, weight.quant_type, 0
    *second, blocksize2 = weight.nested or (0,)
    tensors = [weight.packed, weight.absmax, weight.code, *second]
    return tensors, CANONICAL, weight.shape, weight.blocksize, weight.quant_type, blocksize2


def unflatten(*flat: Any) -> Weight:
    """The weight of those six and the op's backend, which can read it if the layout is its own; taken as it is."""
    tensors, layout_name, shape, blocksize, quant_type, blocksize2, backend = flat
    if layout_name != CANONICAL:
        return PreparedWeight(backend, layout_name, tuple(tensors), tuple(shape), blocksize, quant_type)
    if len(tensors) != (6 if blocksize2 else 3):
        raise ValueError(
            f"a weight in the canonical layout is three tensors, or six if its scales are quantised (in blocks of "
            f"blocksize2), got {len(tensors)} and blocksize2 = {blocksize2}"
        )
    packed, absmax, code, *second = tensors
    nested = Nested._make((*second, blocksize2)) if second else None
    return PackedWeight(packed, absmax, code, blocksize, tuple(shape), quant_type, nested)


def implement(name: str) -> Callable[[F], F]:
    """Make the decorated function the kernel of an op, for tensors that hold numbers; its name is then the op's.

    Calling the op goes through torch's dispatcher, as calling ``torch.ops.refq4.<name>`` does.
    """

    def with_kernel(kernel: F) -> F:
        library.impl(name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        op: F = getattr(torch.ops.refq4, name).default
        return op

    return with_kernel


def implement_on_weight(name: str, at: int, check: Callable[[Weight], Weight] = checked) -> Callable[[F], F]:
    """The same for a kernel whose argument number ``at`` is a weight; its name then takes what the kernel does.

    On the way the weight is flattened, put together again and checked, and a backend that was resolved goes as a name.
    """

    def with_kernel(kernel: F) -> Any:
        @implement(name)
        def op(*args: Any) -> Any:
            weight = unflatten(*args[at : at + 6], args[-1])
            return kernel(*args[:at], check(weight), *args[at + 6 :])

        def call(*args: Any) -> Any:
            backend = args[-1] if isinstance(args[-1], str) else args[-1].backend.name
            return op(*args[:at], *flatten(args[at]), *args[at + 1 : -1], backend)

        return call

    return with_kernel


# --- the ops, each with its fake ------------------------------------------------------------------------------------


def _define(*names: str, takes: str, gives: str = "Tensor") -> Callable[[F], F]:
    """Define ops; the decorated function is their fake: what they give, without its numbers."""

    def with_fake(fake: F) -> F:
        for name in names:
            library.define(f"{name}({takes}) -> {gives}", tags=_TAGS)  # type: ignore[no-untyped-call]
            torch.library.register_fake(f"refq4::{name}", fake, lib=library)
        return fake

    return with_fake


@_define(
    "quantize_4bit",
    takes="Tensor A, int blocksize, str quant_type, bool allow_nonfinite, str backend, *, Tensor? absmax=None",
    gives="(Tensor, Tensor)",
)
def _quantize_4bit(A: Tensor, blocksize: int, *_: Any, absmax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    packed = A.new_empty(layout.packed_bytes(A.numel()), dtype=torch.uint8)
    return packed, A.new_empty(layout.block_count(A.numel(), blocksize), dtype=torch.float32)


@_define("dequantize_4bit", takes=f"{WEIGHT}, ScalarType dtype, str backend")
def _dequantize_4bit(tensors: list[Tensor], layout_name: str, shape: list[int], *args: Any) -> Tensor:
    return tensors[0].new_empty(shape, dtype=args[-2])


@_define("quantize_blockwise", takes="Tensor A, Tensor code, int blocksize, str backend", gives="(Tensor, Tensor)")
def _quantize_blockwise(A: Tensor, code: Tensor, blocksize: int, backend: str) -> tuple[Tensor, Tensor]:
    blocks = layout.block_count(A.numel(), blocksize)
    return A.new_empty(A.shape, dtype=torch.uint8), A.new_empty(blocks, dtype=torch.float32)


@_define(
    "dequantize_blockwise",
    takes="Tensor q, Tensor absmax, Tensor code, int blocksize, ScalarType dtype, str backend",
)
def _dequantize_blockwise(q: Tensor, *args: Any) -> Tensor:
    return q.new_empty(q.shape, dtype=args[-2])


@_define("gemv_4bit", "gemm_4bit", takes=f"Tensor A, {WEIGHT}, Tensor? bias, str backend")
def _product(A: Tensor, tensors: list[Tensor], layout_name: str, shape: list[int], *_: Any) -> Tensor:
    return A.new_empty((*A.shape[:-1], shape[0]))


@_define("grad_input_4bit", takes=f"Tensor grad, {WEIGHT}, str backend")
def _grad_input(grad: Tensor, tensors: list[Tensor], layout_name: str, shape: list[int], *_: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], shape[1]))


@_define("grouped_gemm_4bit", takes=f"Tensor x, {WEIGHT}, Tensor? bias, Tensor offsets, bool transposed, str backend")
def _grouped(x: Tensor, tensors: list[Tensor], layout_name: str, shape: list[int], *args: Any) -> Tensor:
    transposed = args[-2]
    return x.new_empty(x.shape[0], shape[2 if transposed else 1])


@_define("restore_weight", takes=f"{WEIGHT}, str backend")
def _restore_weight(tensors: list[Tensor], layout_name: str, shape: list[int], *_: Any) -> Tensor:
    return tensors[0].new_empty(layout.packed_bytes(math.prod(shape)), dtype=torch.uint8)


@register_flop_formula([torch.ops.refq4.gemv_4bit, torch.ops.refq4.gemm_4bit, torch.ops.refq4.grad_input_4bit])
def _flops(A: torch.Size, *_: Any, out_shape: torch.Size, **others: Any) -> int:
    """Operations of a product, for ``torch.utils.flop_counter``: K multiplications and additions for each result."""
    return 2 * math.prod(out_shape) * A[-1]
