"""The two ways in which bitsandbytes 0.50.2 computes a layer on a CPU, each to be had on every machine.

    canonical   the stored bytes, decoded and multiplied in the compute dtype: in fp32 as exact as ``nn.Linear``
    packed      on a CPU with AVX-512 BF16, in eval mode: the weight is rearranged in the live parameter, and the
                product is computed in bf16 whatever the compute dtype; below

Its layers ask the processor when they are made (``has_avx512bf16``), so the answer decides. Where the processor has no
AVX-512 BF16, the rearranging and the state are the peer's own Python all the same, and only its kernel is emulated.

The packed product of x [..., K] and the weight [N, K], its roundings marked:

    y = bf16( sum over blocks of  bf16(absmax) * sum in the block of bf16(x) * bf16(code) )

Products of two bf16 numbers are exact in fp32, and sums in fp32 err some 2^-20 of the largest term. What counts is
each ``bf16(...)``, up to 2^-9 of its argument: four roundings, none of which refq4 makes in fp32. How far they carry
through a model depends on the model. So :func:`packed_budget` measures it: refq4's model with exactly these roundings,
its largest error against fp64 doubled, as any backend's budget is (``refq4/testing/budget.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import refq4
from refq4 import layout
from refq4.reference import nested_absmax
from refq4.testing.budget import Budget

CANONICAL, PACKED = "canonical path", "packed path"
packed_path = pytest.mark.parametrize("peer_path", [PACKED], indirect=True)
both_paths = pytest.mark.parametrize("peer_path", [CANONICAL, PACKED], indirect=True)


def takes_packed_path(bnb: ModuleType) -> bool:
    """Whether the peer takes the packed path on this processor: its own answer."""
    return bool(bnb.functional.has_avx512bf16())


@contextmanager
def computing_on(bnb: ModuleType, path: str) -> Iterator[str]:
    """Layers that the peer makes here compute on ``path``."""
    native = takes_packed_path(bnb)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: path == PACKED)
        if path == PACKED and not native:
            patch.setattr(bnb.functional, "gemv_4bit", _emulated_kernel(bnb))
        yield path


def packed_budget(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> Budget:
    """How far the peer may be off on the packed path: see the top of the file.

    Args:
        model: on refq4, with a ``dequantize`` as transformers' models have it; dequantised afterwards.
        run: gives the fp32 result that is compared, with any model of that architecture.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refq4.nn.Linear4bit, "forward", _packed_forward)
        rounded = run(model)
    return Budget.of(run(model.dequantize(torch.float64).double()), rounded, torch.bfloat16)


def _packed_product(x: Tensor, codes: Tensor, absmax: Tensor, table: Tensor, blocksize: int) -> Tensor:
    """x [..., K] times codes [N, K] with absmax [N, K / blocksize], with the roundings of the packed path."""
    scales = absmax.bfloat16().float().repeat_interleave(blocksize, dim=1)
    weight = table.bfloat16().float()[codes.int()] * scales
    return (x.bfloat16().float() @ weight.T).bfloat16().to(x.dtype)


def _packed_forward(layer: refq4.nn.Linear4bit, x: Tensor) -> Tensor:
    state, (n, k) = layer.weight.quant_state, layer.weight_shape
    second = state.packed_weight(layer.weight).nested
    absmax = state.absmax if second is None else nested_absmax(state.absmax, second)
    codes = layout.unpack(layout.from_storage(layer.weight.stored(), n * k), n * k).view(n, k)
    a = x.to(layer.compute_dtype or x.dtype)
    y = _packed_product(a, codes, absmax.view(n, -1), state.code, state.blocksize)
    return (y if layer.bias is None else y + layer.bias.to(y.dtype)).to(x.dtype)


def _emulated_kernel(bnb: ModuleType) -> Callable[..., Tensor]:
    """In place of ``bitsandbytes.functional.gemv_4bit``: what it computes on a CPU with AVX-512 BF16."""

    def gemv_4bit(A: Tensor, B: Tensor, out: Tensor | None = None, state: object = None) -> Tensor:
        n, k = state.shape
        wanted = {"original_qshape": (n * k // 2, 1), "original_nested": False, "original_storage_type": None}
        packed, _ = bnb.functional._convert_weight_packed_for_cpu_inverse(B, SimpleNamespace(**vars(state) | wanted))
        codes = layout.unpack(packed.view(-1), n * k).view(n, k)
        return _packed_product(A, codes, state.absmax.T, state.code, state.blocksize)

    return gemv_4bit
