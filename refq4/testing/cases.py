"""The catalogue: the test cases for a backend, as data.

A *case* names a check (``refq4/testing/conformance.py``), sizes, dtypes and a recipe for the numbers. It holds no
tensors: it prints as one line of Python that makes the same tensors again anywhere, which is how a failure is
reported, and its fields can be made smaller one by one, which is how a failure is shrunk.

    Case("gemv_4bit", n=7, k=65, dtype="bfloat16", blocksize=32)
      |     |           |                              |
      |     the check   what is not said is the simplest: M = N = 1, fp32, nf4, plain scales, no bias
      operands()  ->  W [n, k], x [m, k], bias [n], from a generator with the case's seed

The sizes are chosen for the places where kernels break: one and its neighbours, vector widths and their neighbours,
tiles' edges, K no multiple of the blocksize. The catalogue draws from all combinations with a fixed seed, after the
curated cases that have caught something before.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..codebooks import get_codebook

__all__ = ["DEPTHS", "Case", "Operands", "catalogue", "simpler"]

M = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65)
N = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 130)
K = (1, 2, 3, 31, 32, 33, 63, 64, 65, 96, 127, 128, 130, 192, 256, 257, 320, 512)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = ("float32", "bfloat16", "float16")
STORAGES = ("uint8", "bfloat16", "float16", "float32")
CODES = ("nf4", "fp4", "e2m1", "int4", "af4", "iq4nl")
WEIGHTS = ("normal", "outliers", "zero blocks", "thresholds", "ramp", "tiny", "huge", "not finite")
ACTIVATIONS = ("normal", "ones", "one-hot", "strided", "large")

# Cases of each check at each depth. The sizes keep a case at a millisecond or so on the reference.
DEPTHS = {"quick": 40, "normal": 160, "deep": 640}


class Operands(NamedTuple):
    """W fp32/fp16/bf16 [n, k]; x [m, k] and bias [n] (or None) in the case's dtype."""

    W: Tensor
    x: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Case:
    """One test case for a backend.

    Args:
        check: what is asked: a name in ``refq4.testing.CHECKS``.
        m, n, k: tokens, out_features, in_features.
        dtype: of the activations, or of what is quantised or decoded to.
        code: a codebook's name.
        blocksize: of the weight.
        nested: double quantisation.
        bias: whether there is one.
        storage: the dtype under which packed bytes are stored.
        weights: the recipe of the weight's numbers (below).
        activations: the recipe of the activations' numbers (below).
        seed: of the generator.

    Recipes of weights:

    - "normal": drawn from N(0, 1).
    - "outliers": the same, with five elements or so times 100.
    - "zero blocks": the same, with every other block all zeros.
    - "thresholds": the codebook's thresholds and the fp32 next to them on either side, with an absmax of 1.
    - "ramp": 1/numel, 2/numel, ... 1.
    - "tiny": down to where 1/absmax overflows (in fp16, and for products, as small as the sums can follow).
    - "huge": up to an eighth of the dtype's range (for products, as large as the sums can follow).
    - "not finite": "normal" with a NaN and an infinity (for products and layers, "outliers" instead).

    Recipes of activations:

    - "normal": drawn from N(0, 1).
    - "ones": all 1, so that a product is a sum of weights.
    - "one-hot": a single 1 in each row, so that a product is a weight.
    - "strided": "normal", not contiguous, with NaN in between that nobody may read.
    - "large": "normal" times 300.

    Example:
        >>> case = Case("gemv_4bit", k=3, weights="ramp", activations="ones")
        >>> case
        Case('gemv_4bit', k=3, weights='ramp', activations='ones')
        >>> case.operands().W
        tensor([[0.3333, 0.6667, 1.0000]])
    """

    check: str
    m: int = 1
    n: int = 1
    k: int = 64
    dtype: str = "float32"
    code: str = "nf4"
    blocksize: int = 64
    nested: bool = False
    bias: bool = False
    storage: str = "uint8"
    weights: str = "normal"
    activations: str = "normal"
    seed: int = 0

    def __repr__(self) -> str:
        said = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)[1:] if getattr(self, f.name) != f.default)
        return f"Case({', '.join([repr(self.check), *said])})"

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch's."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def settings(self) -> dict[str, Any]:
        """The arguments of ``quantize_4bit`` that make this case's weight."""
        return {
            "quant_type": self.code,
            "blocksize": self.blocksize,
            "compress_statistics": self.nested,
            "quant_storage": getattr(torch, self.storage),
        }

    def operands(self, device: str = "cpu") -> Operands:
        """The tensors, the same on every machine."""
        generator = torch.Generator().manual_seed(self.seed)
        W = _weights(self, generator).to(self.torch_dtype)
        x = _activations(self, generator)
        bias = torch.randn(self.n, generator=generator).to(self.torch_dtype) if self.bias else None
        return Operands(W.to(device), x.to(device), None if bias is None else bias.to(device))


def catalogue(checks: tuple[str, ...], depth: str = "normal") -> list[Case]:
    """The cases of some checks, curated ones first, no two alike.

    Args:
        checks: names in ``refq4.testing.CHECKS``.
        depth: "quick", "normal" or "deep".

    Raises:
        ValueError: another depth.

    Example:
        >>> cases = catalogue(("gemv_4bit",), "quick")
        >>> len(cases), len(set(cases))
        (40, 40)
    """
    if depth not in DEPTHS:
        raise ValueError(f"depth must be one of {', '.join(DEPTHS)}, got {depth!r}")
    return [case for check in checks for case in _of_check(check, DEPTHS[depth])]


def _of_check(check: str, wanted: int) -> list[Case]:
    cases = dict.fromkeys(case for case in _curated(check))
    draw = random.Random(check)  # the same cases on every run and machine
    while len(cases) < wanted:
        cases[_drawn(check, draw)] = None
    return list(cases)[:wanted]


def _curated(check: str) -> Iterator[Case]:
    """Small cases in which one thing at a time is not the simplest."""
    plain = Case(check, n=4)
    yield plain
    values: tuple[Any, ...]
    for field, values in {
        "code": CODES,
        "weights": WEIGHTS,
        "dtype": DTYPES,
        "blocksize": (32, 4096),
        "k": (1, 63, 65, 96),
        "m": (2, 17),
        "nested": (True,),
        "bias": (True,),
        "activations": ACTIVATIONS,
        "storage": STORAGES,
    }.items():
        for value in values:
            changes: dict[str, Any] = {field: value}
            yield normal(replace(plain, **changes))
    yield normal(Case(check, m=2, n=300, k=64, nested=True, blocksize=32, dtype="bfloat16"))  # two nested blocks
    yield normal(Case(check, m=2, n=5, k=96, nested=True, bias=True, dtype="float16"))  # blocks straddle rows


def _drawn(check: str, draw: random.Random) -> Case:
    often = draw.random() < 0.7  # most cases take ordinary numbers, so that sizes and settings get their share
    return normal(
        Case(
            check,
            m=draw.choice(M),
            n=draw.choice(N),
            k=draw.choice(K),
            dtype=draw.choice(DTYPES),
            code=draw.choice(CODES if draw.random() < 0.4 else CODES[:2]),
            blocksize=draw.choice(BLOCKSIZES if draw.random() < 0.5 else BLOCKSIZES[:2]),
            nested=draw.random() < 0.4,
            bias=draw.random() < 0.5,
            storage=draw.choice(STORAGES if draw.random() < 0.3 else STORAGES[:1]),
            weights="normal" if often else draw.choice(WEIGHTS),
            activations="normal" if often else draw.choice(ACTIVATIONS),
            seed=draw.randrange(1000),
        )
    )


def normal(case: Case) -> Case:
    """The case without what its check does not look at, so that no two cases differ in name only."""
    from .conformance import CHECKS

    question = CHECKS[case.check]
    changes: dict[str, Any] = {name: Case.__dataclass_fields__[name].default for name in question.ignores}
    if case.weights == "not finite":
        changes["nested"] = False  # a NaN scale makes the mean of all scales a NaN: nothing left to compare
        if question.layers or question.sums:
            changes["weights"] = "outliers"
    if case.activations == "large" and case.dtype == "float16":
        changes["activations"] = "normal"  # out of range, or not, by a rounding: no engine's fault
    return replace(case, **changes)


def simpler(case: Case) -> Iterator[Case]:
    """The same case with one field simpler, the greatest step first: what shrinking tries."""
    shrunk: dict[str, Iterable[Any]] = {
        "weights": _before(case.weights, ("ramp", *WEIGHTS)),
        "activations": _before(case.activations, ("ones", *ACTIVATIONS)),
        "code": _before(case.code, CODES),
        "dtype": _before(case.dtype, DTYPES),
        "nested": _before(case.nested, (False, True)),
        "bias": _before(case.bias, (False, True)),
        "storage": _before(case.storage, STORAGES),
        "seed": _before(case.seed, (0,)),
        "blocksize": _before(case.blocksize, BLOCKSIZES),
        "m": _smaller(case.m),
        "n": _smaller(case.n),
        "k": _smaller(case.k),
    }
    for field, values in shrunk.items():
        for value in values:
            changed = normal(replace(case, **{field: value}))
            if changed != case:
                yield changed


def _before(now: Any, order: tuple[Any, ...]) -> tuple[Any, ...]:
    """What stands before a value in an order of simplicity."""
    return order[: order.index(now)] if now in order else order


def _smaller(size: int) -> list[int]:
    return sorted(s for s in {1, 2, size // 2, size - 1} if 0 < s < size)


# --- recipes ----------------------------------------------------------------------------------------------------------


def _weights(case: Case, generator: torch.Generator) -> Tensor:
    n, k = case.n, case.k
    W = torch.randn(n, k, generator=generator)
    flat = W.view(-1)
    if case.weights == "outliers":
        flat[:: max(flat.numel() // 5, 1)] *= 100
    elif case.weights == "zero blocks":
        for start in range(0, flat.numel(), 2 * case.blocksize):
            flat[start : start + case.blocksize] = 0
    elif case.weights == "thresholds":
        near = torch.tensor(get_codebook(case.code).thresholds)
        sides = torch.cat([near.nextafter(torch.tensor(-9.0)), near, near.nextafter(torch.tensor(9.0))])
        flat[:] = sides[torch.randint(len(sides), flat.shape, generator=generator)]
        flat[:: case.blocksize] = 1.0  # each block's largest, so that the thresholds are met as they are
    elif case.weights == "ramp":
        flat[:] = torch.arange(1, flat.numel() + 1) / flat.numel()
    elif case.weights in ("tiny", "huge"):
        flat *= _scale(case)
    elif case.weights == "not finite":
        for i, value in zip((0, flat.numel() // 2), (float("nan"), float("inf")), strict=True):
            flat[i] = value
    return W


def _scale(case: Case) -> float:
    """Down to subnormal scales and up to the dtype's range, or for a product as far as its sums can follow."""
    from .conformance import CHECKS

    sums, half = CHECKS[case.check].sums, case.dtype == "float16"
    if case.weights == "tiny":
        return 1e-6 if half else 1e-30 if sums else 1e-39
    return 10.0 if sums and half else 1e30 if sums else torch.finfo(case.torch_dtype).max / 8


def _activations(case: Case, generator: torch.Generator) -> Tensor:
    shape = (case.m, case.k)
    x = torch.randn(*shape, generator=generator)
    if case.activations == "ones":
        x = torch.ones(shape)
    elif case.activations == "one-hot":
        x = torch.zeros(shape)
        x[torch.arange(case.m), torch.randint(case.k, (case.m,), generator=generator)] = 1.0
    elif case.activations == "large":
        x *= 300
    x = x.to(case.torch_dtype)
    if case.activations == "strided":
        wide = torch.full((case.m, 2 * case.k), float("nan"), dtype=x.dtype)
        wide[:, ::2] = x
        x = wide[:, ::2]
    return x
