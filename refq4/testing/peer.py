"""bitsandbytes behind refq4's backend contract, so that the differential kit can ask it what it asks any engine.

    pip install bitsandbytes==0.50.2
    python -m refq4 verify --backend bitsandbytes

Each method below calls the operator of the installed bitsandbytes that does the job there, on the CPU, with nothing
put right: what comes out is what its users get. This is a test instrument, not an engine to run a model on: ``auto``
never takes it, and refq4 never needs it. Where it differs, ``refq4/testing/peer_differences.py`` says by which entry
of ``docs/differences.md``.

    refq4's op               bitsandbytes 0.50
    ----------------------   -----------------------------------------------------------------------------
    quantize_4bit            torch.ops.bitsandbytes.quantize_4bit
    dequantize_4bit          dequantize_blockwise for nested scales, then dequantize_4bit
    quantize_blockwise       quantize_blockwise             (the map is copied: builds up to 0.49 write to it)
    dequantize_blockwise     dequantize_blockwise
    gemv_4bit, gemm_4bit     gemm_4bit, as its matmul_4bit does

Not asked: the layout in which it keeps a weight after the first inference on a CPU with AVX-512 BF16. It rounds the
scales, so it can't give back what it got, which a backend's own layout must; three entries of the page are about it.
"""

from __future__ import annotations

import importlib
import logging
import sys
from contextlib import AbstractContextManager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backend import (
    Backend,
    BackendUnavailableError,
    BackendUnsupportedError,
    Call,
    PackedWeight,
    PreparedWeight,
)
from ..codebooks import Code, get_codebook

if TYPE_CHECKING:
    from .cases import Case

__all__ = ["BitsandbytesBackend", "quiet_bitsandbytes", "type_of"]

OLDEST = (0, 50)  # the first with the operator gemm_4bit
REMEDY = "pip install bitsandbytes==0.50.2"
TYPES = ("nf4", "fp4")


class BitsandbytesBackend(Backend):
    """The installed bitsandbytes, on the CPU."""

    name = "bitsandbytes"
    priority = -1
    description = "the installed bitsandbytes, to be compared with; by name only"

    def available(self) -> str | None:
        try:
            found = version("bitsandbytes")
        except PackageNotFoundError:
            return f"bitsandbytes is not installed: {REMEDY}"
        if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
            return f"bitsandbytes {found} has no operator gemm_4bit, which came with 0.50: {REMEDY}"
        return None

    def can_run(self, call: Call) -> str | None:
        if call.op in ("quantize_blockwise", "dequantize_blockwise"):
            if call.codebook != "256 values":
                return f"its 8-bit stage reads a map of 256 entries, not of {call.codebook}"
        elif call.codebook not in TYPES:
            return f"it knows the types {' and '.join(TYPES)}, not {call.codebook}"
        return super().can_run(call)

    def kernel(self, call: Call) -> str:
        return f"bitsandbytes::{call.op}"

    def info(self) -> dict[str, Any]:
        return {"version": version("bitsandbytes")}

    def known_difference(self, case: Case) -> str | None:
        """The entries of docs/differences.md that explain why a case differs, or None if they don't."""
        from .peer_differences import explain

        return explain(case)

    # --- ops --------------------------------------------------------------------------------------------------------

    def quantize_4bit(  # type: ignore[override]  # bitsandbytes takes no absmax
        self, A: Tensor, code: Code, blocksize: int
    ) -> tuple[Tensor, Tensor]:
        kind = type_of(code.values)
        packed, absmax = _ops().quantize_4bit.default(A, blocksize, kind, torch.uint8)
        return packed.view(-1), absmax

    def dequantize_4bit(self, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        arguments = weight.blocksize, type_of(weight.code), weight.shape, dtype
        with _eagerly():
            return _tensor(_ops().dequantize_4bit.default(_column(weight), _scales(weight), *arguments))

    def quantize_blockwise(self, A: Tensor, code: Code, blocksize: int) -> tuple[Tensor, Tensor]:
        q, absmax = _ops().quantize_blockwise.default(A, code.values.clone(), blocksize)
        return q, absmax

    def dequantize_blockwise(
        self, q: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
    ) -> Tensor:
        return _tensor(_ops().dequantize_blockwise.default(q, absmax, code, blocksize, dtype))

    def gemm_4bit(self, x: Tensor, weight: PackedWeight | PreparedWeight, bias: Tensor | None) -> Tensor:
        assert isinstance(weight, PackedWeight), "it has no layout of its own here"
        kind, ops = type_of(weight.code), _ops()
        second: tuple[Tensor | None, Tensor | None, Tensor | None]
        if weight.nested is None:
            second, scales = (None, None, None), weight.absmax
        else:
            second, scales = (weight.absmax, weight.nested.code, weight.nested.offset), weight.nested.absmax
            if weight.nested.blocksize != 256:
                raise BackendUnsupportedError("bitsandbytes multiplies nested scales in blocks of 256 only")
        with _eagerly():
            y = ops.gemm_4bit.default(x, _column(weight), weight.shape, scales, weight.blocksize, kind, bias, *second)
        return _tensor(y)

    gemv_4bit = gemm_4bit


@cache
def _ops() -> Any:
    """``torch.ops.bitsandbytes``, which importing bitsandbytes fills."""
    try:
        quiet_bitsandbytes()
    except Exception as error:
        raise BackendUnavailableError(f"bitsandbytes is installed but can't be imported ({error}): {REMEDY}") from error
    return torch.ops.bitsandbytes


def quiet_bitsandbytes() -> ModuleType:
    """bitsandbytes as its wheel is: kept from fetching another kernel from a hub, and from saying that it could not."""
    log = logging.getLogger("bitsandbytes")
    level, absent = log.level, object()
    fetcher = sys.modules.get("kernels", absent)
    log.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # importing it fails
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        log.setLevel(level)
        del sys.modules["kernels"]
        if fetcher is not absent:
            sys.modules["kernels"] = fetcher  # type: ignore[assignment]


@cache
def _tables() -> dict[str, Tensor]:
    return {kind: torch.tensor(get_codebook(kind).values) for kind in TYPES}


def type_of(values: Tensor) -> str:
    """The type whose table these are: bitsandbytes decodes with its own, whatever the state says."""
    for kind, table in _tables().items():
        if torch.equal(values, table):
            return kind
    raise BackendUnsupportedError("bitsandbytes decodes with its own tables of nf4 and fp4, and this code is neither")


def _column(weight: PackedWeight) -> Tensor:
    return weight.packed.view(-1, 1)


def _scales(weight: PackedWeight) -> Tensor:
    """The fp32 scales, as its dequantize_4bit gets them."""
    nested = weight.nested
    if nested is None:
        return weight.absmax
    arguments = nested.absmax, nested.code, nested.blocksize, torch.float32
    return _tensor(_ops().dequantize_blockwise.default(weight.absmax, *arguments)) + nested.offset


def _eagerly() -> AbstractContextManager[None]:
    """Its fallback for long blocks and odd rows is compiled anew for each shape: the same numbers, seconds later."""
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


def _tensor(result: Any) -> Tensor:
    assert isinstance(result, Tensor)
    return result
