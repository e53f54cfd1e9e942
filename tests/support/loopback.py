"""A backend for tests: computes with the reference, counts every op that reaches it, and keeps weights its own way.

Its layout swaps the two nibbles of each byte. Whoever reads the prepared bytes as canonical ones gets wrong numbers,
so a product that comes out right shows that layout and reader belong together.
"""

from __future__ import annotations

import traceback
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from refq4.backend import Nested, PackedWeight, PreparedWeight
from refq4.reference import ReferenceBackend

SWAPPED = "nibbles swapped"


class Loopback(ReferenceBackend):
    name = "loopback"
    priority = 50
    description = "counts what reaches it"

    def __init__(self, own_layout: bool = False) -> None:
        self.own_layout = own_layout
        self.seen: Counter[str] = Counter()

    def kernel(self, call: Any) -> str:
        return f"loopback {call.op}"

    def quantize_4bit(self, *args: Any) -> Any:
        self.seen["quantize_4bit"] += 1
        return ReferenceBackend().quantize_4bit(*args)

    def dequantize_4bit(self, *args: Any) -> Any:
        self.seen["dequantize_4bit"] += 1
        return ReferenceBackend().dequantize_4bit(*args)

    def quantize_blockwise(self, *args: Any) -> Any:
        self.seen["quantize_blockwise"] += 1
        return ReferenceBackend().quantize_blockwise(*args)

    def dequantize_blockwise(self, *args: Any) -> Any:
        self.seen["dequantize_blockwise"] += 1
        return ReferenceBackend().dequantize_blockwise(*args)

    def gemv_4bit(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        self.seen["gemv_4bit"] += 1
        assert x.shape[0] == 1, "gemv_4bit is for one token"
        return ReferenceBackend().gemv_4bit(x, self._canonical(weight), bias)

    def gemm_4bit(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        self.seen["gemm_4bit"] += 1
        return ReferenceBackend().gemm_4bit(x, self._canonical(weight), bias)

    def prepare_weight(self, weight: PackedWeight) -> PreparedWeight | None:
        if not self.own_layout:
            return None
        self.seen["prepare_weight"] += 1
        nested = weight.nested
        second = () if nested is None else (nested.absmax, nested.code, nested.offset)
        tensors = (_swap(weight.packed), weight.absmax, weight.code, *second)
        return PreparedWeight(self.name, SWAPPED, tensors, weight.shape, weight.blocksize, weight.quant_type)

    def restore_weight(self, prepared: PreparedWeight) -> PackedWeight:
        packed, absmax, code, *second = prepared.tensors
        nested = Nested(*second, 256) if second else None
        return PackedWeight(
            _swap(packed), absmax, code, prepared.blocksize, prepared.shape, prepared.quant_type, nested
        )

    def _canonical(self, weight: PackedWeight | PreparedWeight) -> PackedWeight:
        if isinstance(weight, PackedWeight):
            return weight
        self.seen["prepared product"] += 1
        assert weight.layout == SWAPPED
        return self.restore_weight(weight)


class Recorder(Loopback):
    """Notes from where it was called; runs only where it is named."""

    name = "recorder"
    priority = -1
    called_from: frozenset[str] = frozenset()

    def gemm_4bit(self, x: Any, weight: Any, bias: Any) -> torch.Tensor:
        self.called_from |= {frame.filename for frame in traceback.extract_stack()}
        return super().gemm_4bit(x, weight, bias)


def _swap(packed: Tensor) -> Tensor:
    return torch.bitwise_or(packed << 4, packed >> 4)
