"""What the tests of the CUDA kernels in the emulator share: operands, launches, and rows of a covering design."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import pytest
import torch
from refq4_cuda import emulator, launch
from refq4_cuda.geometry import Variant
from refq4_cuda.nvrtc import compile_variant
from torch import Tensor

from refq4.codebooks import code_from_values, create_dynamic_map, get_codebook
from refq4.reference import ReferenceBackend
from refq4.state import QuantState

REFERENCE = ReferenceBackend()
DTYPES = ("float32", "bfloat16", "float16")
MULTIPROCESSORS = 132


def require_nvrtc() -> None:
    """Skip the module where the compiler is missing; the reason says how to get it."""
    from refq4_cuda.bindings import CudaError, nvrtc_version

    try:
        nvrtc_version()
    except CudaError as error:
        pytest.skip(f"the kernels can't be compiled: {error}", allow_module_level=True)


@cache
def ptx_of(variant: Variant, arch: int) -> str:
    """The PTX of a kernel as it is in the repository."""
    return compile_variant(variant, arch, "ptx").data.decode()


def run(launches: Sequence[launch.Launch], arch: int, seed: int | None = None) -> None:
    """Every launch, one after the other, with all checks."""
    for one in launches:
        emulator.run(ptx_of(one.variant, arch), one, seed=seed)


@dataclass(frozen=True)
class Operands:
    """One product's operands: x [M, K], the packed weight of [N, K] and its state, bias [N] or None."""

    x: Tensor
    packed: Tensor
    state: QuantState
    bias: Tensor | None


@cache
def quantised(n: int, k: int, blocksize: int, name: str = "nf4", nested: bool = False) -> tuple[Tensor, QuantState]:
    """A random weight, quantised by the reference; any blocksize."""
    W = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)) * 0.05
    code = get_codebook(name).on("cpu")
    packed, absmax = REFERENCE.quantize_4bit(W, code, blocksize)
    if not nested:
        return packed, QuantState(absmax, (n, k), code.values, blocksize, name, torch.float32)
    offset, dynamic = absmax.mean(), code_from_values(create_dynamic_map())
    q, absmax2 = REFERENCE.quantize_blockwise(absmax - offset, dynamic, 256)
    scales = QuantState(absmax2, code=dynamic.values, blocksize=256, dtype=torch.float32)
    return packed, QuantState(q, (n, k), code.values, blocksize, name, torch.float32, offset, scales)


def operands(
    m: int, n: int, k: int, blocksize: int, dtype: str, nested: bool = False, bias: bool = False, name: str = "nf4"
) -> Operands:
    """The same numbers for the same arguments, on every machine."""
    generator = torch.Generator().manual_seed(m)
    packed, state = quantised(n, k, blocksize, name, nested)
    kind = getattr(torch, dtype)
    x = torch.randn(m, k, generator=generator).to(kind)
    return Operands(x, packed, state, torch.randn(n, generator=generator).to(kind) if bias else None)


def multiply(given: Operands, arch: int, rung: str | None = None, multiprocessors: int = MULTIPROCESSORS) -> Tensor:
    """The product by the kernel that a GPU of that architecture would take (or by the rung that is named)."""
    weight = given.state.packed_weight(given.packed)
    y = poisoned((given.x.shape[0], weight.shape[0]), given.x.dtype)
    plan = launch.product(given.x, weight, given.bias, y, arch, multiprocessors, rung)
    if plan is not None:
        run(plan, arch)
        return y
    decoded = poisoned(weight.shape, given.x.dtype)  # above the cross-over: what the backend does
    run(launch.dequantize_4bit(weight, decoded, arch), arch)
    return torch.nn.functional.linear(given.x, decoded, given.bias)


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A result that is NaN, or 0xAA, wherever nothing is written."""
    return torch.full(tuple(shape), float("nan") if dtype.is_floating_point else 0xAA, dtype=dtype)


def assert_same_numbers(got: Tensor, wanted: Tensor) -> None:
    """Bit for bit, except that any NaN equals any other."""
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    nan = wanted.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got[~nan].view(kind), wanted[~nan].view(kind))


def covering(factors: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Rows in which any two values of any two factors meet at least once: far fewer than the full product.

    Greedy: a row starts with a pair that has not met yet and takes, factor by factor, the value that meets most of what
    is still apart. Of equals the earliest is taken, so put cheap values first.

    Example:
        >>> len(list(covering({"a": (1, 2, 3), "b": (1, 2, 3), "c": (1, 2, 3)}))) < 27
        True
    """
    apart = {
        frozenset([(f, v), (g, w)]): None for f, g in combinations(factors, 2) for v in factors[f] for w in factors[g]
    }  # a dict, because it keeps its order
    while apart:
        row = dict(sorted(next(iter(apart)), key=lambda item: list(factors).index(item[0])))
        for factor in factors:
            if factor not in row:
                row[factor] = max(
                    factors[factor],
                    key=lambda value: sum(frozenset([(factor, value), other]) in apart for other in row.items()),
                )
        for pair in combinations(row.items(), 2):
            apart.pop(frozenset(pair), None)
        yield {factor: row[factor] for factor in factors}
