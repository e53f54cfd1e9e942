"""Who refq4 is measured against: each peer turns the same weights into a function of (x, layer).

refq4                   the backend's prepared layout, as a model at inference uses it
refq4 canonical         the same without rearranging: training, one-off calls
bitsandbytes packed     Linear4bit in eval mode, its fastest CPU path
bitsandbytes plain      Linear4bit in training mode: dequantise, then multiply
torch bf16, torch fp32  nn.functional.linear on the unquantised weight
torch int4              torch._weight_int4pack_mm_for_cpu, groups of 64
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backend import Backend, PackedWeight, PreparedWeight
from .codebooks import get_codebook

__all__ = ["PEERS", "Peer", "random_weights"]

BLOCKSIZE = 64
Product = Callable[[Tensor, int], object]


@dataclass(frozen=True)
class Peer:
    """A name, and what makes its product from the weights; ``usual`` ones are measured unless others are named."""

    name: str
    make: Callable[[Backend, list[Tensor], torch.dtype], Product]
    usual: bool = True


def random_weights(n: int, k: int, layers: int) -> list[Tensor]:
    """``layers`` bf16 weights [n, k], normal like trained ones."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, k, generator=generator) * k**-0.5).bfloat16() for _ in range(layers)]


def _quantise(backend: Backend, weights: list[Tensor]) -> list[PackedWeight]:
    code = get_codebook("nf4").on("cpu")
    made = []
    for weight in weights:
        packed, absmax = backend.quantize_4bit(weight, code, BLOCKSIZE)
        made.append(PackedWeight(packed, absmax, code.values, BLOCKSIZE, tuple(weight.shape), "nf4"))
    return made


def _refq4(backend: Backend, weights: list[Tensor], dtype: torch.dtype) -> Product:
    layers: list[PackedWeight | PreparedWeight] = [
        backend.prepare_weight(weight) or weight for weight in _quantise(backend, weights)
    ]
    return lambda x, i: backend.gemm_4bit(x, layers[i], None)


def _refq4_canonical(backend: Backend, weights: list[Tensor], dtype: torch.dtype) -> Product:
    layers = _quantise(backend, weights)
    return lambda x, i: backend.gemm_4bit(x, layers[i], None)


def _bitsandbytes(train: bool) -> Callable[[Backend, list[Tensor], torch.dtype], Product]:
    def make(backend: Backend, weights: list[Tensor], dtype: torch.dtype) -> Product:
        import bitsandbytes as bnb

        layers: list[Any] = []
        for weight in weights:
            n, k = weight.shape
            layer = bnb.nn.Linear4bit(
                k, n, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=False
            )
            layer.load_state_dict({"weight": weight})
            layers.append(layer.to("cpu").train(train))
        return lambda x, i: layers[i](x)

    return make


def _torch_linear(dtype: torch.dtype) -> Callable[[Backend, list[Tensor], torch.dtype], Product]:
    def make(backend: Backend, weights: list[Tensor], _: torch.dtype) -> Product:
        layers = [weight.to(dtype) for weight in weights]
        return lambda x, i: torch.nn.functional.linear(x.to(dtype), layers[i])

    return make


def _torch_int4(backend: Backend, weights: list[Tensor], dtype: torch.dtype) -> Product:
    n, k = weights[0].shape
    codes = [torch.randint(0, 15, (n, k), dtype=torch.int32) for _ in weights]
    layers = [torch._convert_weight_to_int4pack_for_cpu(code, 1) for code in codes]
    scales = torch.rand(k // BLOCKSIZE, n, 2, dtype=dtype)
    return lambda x, i: torch._weight_int4pack_mm_for_cpu(x, layers[i], BLOCKSIZE, scales)


PEERS = (
    Peer("refq4", _refq4),
    Peer("refq4 canonical", _refq4_canonical),
    Peer("bitsandbytes packed", _bitsandbytes(train=False)),
    Peer("bitsandbytes plain", _bitsandbytes(train=True), usual=False),
    Peer("torch bf16", _torch_linear(torch.bfloat16)),
    Peer("torch fp32", _torch_linear(torch.float32), usual=False),
    Peer("torch int4", _torch_int4),
)
