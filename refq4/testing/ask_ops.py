"""The checks that ask one op at a time: quantise, decode, multiply, on the canonical layout and on the backend's own.

What they ask and what counts as the same: the table in ``conformance.py``. Each compares the backend that is asked with
the one that counts as right, on the same operands.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..codebooks import create_dynamic_map
from ..functional import quantize_4bit
from ..internals import dispatch
from ..internals.grouped import grouped_gemm_4bit
from ..internals.scale_search import takes_scales
from ..matmul import describe
from ..registry import check_usable
from .asked import Asked, ExplainedError, NoSuchThing, one_nan
from .budget import assert_same_bits, error_budget, grouped_budget
from .diagnose import diagnose_product, diagnose_quantised


def ask_quantize_4bit(asked: Asked) -> None:
    """Packed bytes and absmax of a tensor."""
    case = asked.case
    allowed = case.weights == "not finite"
    got, wanted = asked.both(lambda by: dispatch.quantize_4bit(asked.W, case.blocksize, case.code, allowed, by))
    assert_same_bits(one_nan(got[1]), one_nan(wanted[1]), "absmax")
    try:
        assert_same_bits(got[0], wanted[0], "packed bytes")
    except AssertionError as difference:
        where, hint = diagnose_quantised(got[0], wanted[0], asked.W, wanted[1], case)
        raise ExplainedError(f"{difference}{where}", hint) from None
    engine = check_usable(asked.backend)
    if engine is not None and takes_scales(type(engine).quantize_4bit):
        _ask_quantize_with_scales(asked, 0.8 * wanted[1], allowed)


def _ask_quantize_with_scales(asked: Asked, absmax: Tensor, allowed: bool) -> None:
    """The same with scales given, smaller than the largest magnitudes, so that values are clamped."""
    case = asked.case
    ask = partial(dispatch.quantize_4bit, asked.W, case.blocksize, case.code, allowed, absmax=absmax)
    got, wanted = asked.both(ask)
    assert_same_bits(one_nan(got[1]), one_nan(absmax), "absmax, which was given")
    assert_same_bits(got[0], wanted[0], "packed bytes, with absmax given")


def ask_dequantize_4bit(asked: Asked) -> None:
    """Packed bytes decoded, with plain or nested scales."""
    B, state = asked.quantised()
    weight = state.packed_weight(B)
    got, wanted = asked.both(lambda by: dispatch.dequantize_4bit(weight, asked.case.torch_dtype, by))
    assert_same_bits(one_nan(got), one_nan(wanted), "decoded weight")


def ask_quantize_blockwise(asked: Asked) -> None:
    """8-bit codes and absmax."""
    code = create_dynamic_map().to(asked.device)
    got, wanted = asked.both(lambda by: dispatch.quantize_blockwise(asked.W, code, asked.case.blocksize, by))
    assert_same_bits(one_nan(got[1]), one_nan(wanted[1]), "absmax")
    assert_same_bits(got[0], wanted[0], "8-bit codes")


def ask_dequantize_blockwise(asked: Asked) -> None:
    """8-bit codes decoded."""
    case, code = asked.case, create_dynamic_map().to(asked.device)
    q, absmax = dispatch.quantize_blockwise(asked.W, code, case.blocksize, asked.against)
    ask = partial(dispatch.dequantize_blockwise, q, absmax, code, case.blocksize, case.torch_dtype)
    got, wanted = asked.both(ask)
    assert_same_bits(one_nan(got), one_nan(wanted), "decoded values")


def ask_product(asked: Asked) -> None:
    """A product on the canonical layout."""
    case = asked.case
    B, state = asked.quantised()
    with asked.answering():
        got = dispatch.product(case.check, asked.x, state.packed_weight(B), asked.bias, asked.backend)
    budget = error_budget(asked.x, B, state, asked.bias, backend=asked.against)
    asked.product_within(budget, got, "product", lambda: diagnose_product(got, budget, asked.x, B, state, asked.bias))


def ask_grouped(asked: Asked) -> None:
    """A product for each of three experts, the second without rows; then one on the same bytes stored transposed."""
    case, m = asked.case, asked.case.m
    W = torch.stack([asked.W, asked.W.flip(0), -asked.W])
    B, state = quantize_4bit(W, **case.settings(), backend=asked.against)
    offsets = [0, m // 2, m // 2, m]
    bias = None if asked.bias is None else torch.stack([asked.bias, -asked.bias, asked.bias.flip(0)])
    the_other_way = torch.randn(m, case.n, generator=torch.Generator().manual_seed(case.seed)).to(asked.x)
    for transposed, x, added in ((False, asked.x, bias), (True, the_other_way, None)):
        with asked.answering():
            got = grouped_gemm_4bit(
                x, B, state, torch.tensor(offsets), added, transposed=transposed, backend=asked.backend
            )
        budget = grouped_budget(x, B, state, offsets, added, transposed, asked.against)
        stored = "[E, K, N]" if transposed else "[E, N, K]"
        asked.product_within(budget, got, f"grouped product with the weight stored as {stored}", lambda: "")


def ask_own_layout(asked: Asked) -> None:
    """prepare_weight and restore_weight, and a product on the prepared weight."""
    B, state = asked.quantised()
    engine = check_usable(asked.backend)
    weight = state.packed_weight(B)
    prepared = engine.prepare_weight(weight) if engine is not None else None
    if engine is None or prepared is None:
        raise NoSuchThing("it reads this weight in the canonical layout")
    with asked.answering():
        op = describe(asked.x, state, asked.x.dtype, gradient=False, own_layout=True)[1].op
        got = dispatch.product(op, asked.x, prepared, asked.bias, prepared.backend)
    budget = error_budget(asked.x, B, state, asked.bias, backend=asked.against)
    hint = lambda: diagnose_product(got, budget, asked.x, B, state, asked.bias)  # noqa: E731
    asked.product_within(budget, got, "product on the prepared weight", hint)
    restored = engine.restore_weight(prepared)
    assert_same_bits(restored.packed, weight.packed, "packed bytes after prepare and restore")
    assert_same_bits(restored.absmax, weight.absmax, "absmax after prepare and restore")
    assert_same_bits(restored.code, weight.code, "code after prepare and restore")
