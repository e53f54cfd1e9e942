"""The checks that ask whole layers: forward with its decisions, backward, the state dict, the embedding.

What they ask and what counts as the same: the table in ``conformance.py``. The weight of a layer is quantised by the
backend that counts as right, except where quantising is part of the question.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import nn
from ..internals import dispatch
from ..matmul import matmul_4bit
from ..registry import use_backend
from ..state import QuantState
from ..trace import Trace, trace
from .asked import Asked, one_nan
from .budget import Budget, assert_same_bits, error_budget, product_budget
from .diagnose import diagnose_product


def ask_forward(asked: Asked) -> None:
    """A layer's output, the decision of every step, and that nothing it was given has changed."""
    layer = _layer(asked, asked.against)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    x = asked.x.clone()
    with torch.no_grad():
        with trace() as expected, use_backend(asked.against):
            reference = layer(asked.x)
        with asked.answering() as t, use_backend(asked.backend):
            got = layer(asked.x)
    _same_decisions(t, expected)
    budget = error_budget(asked.x, layer.weight.stored(), layer.weight.quant_state, layer.bias, backend=asked.against)
    assert_same_bits(reference, budget.reference, "the judge's layer and its product")
    stored, state = layer.weight.stored(), layer.weight.quant_state
    hint = lambda: diagnose_product(got, budget, asked.x, stored, state, layer.bias)  # noqa: E731
    asked.product_within(budget, got, "layer's output", hint)
    assert_same_bits(asked.x.contiguous(), x.contiguous(), "the caller's activations afterwards")
    for key, value in layer.state_dict().items():
        assert_same_bits(one_nan(value), one_nan(before[key]), f"state dict entry {key!r} after inference")


def _same_decisions(got: Trace, expected: Trace) -> None:
    """Steps 2 (the layout) and 6 (the path, which follows from the layout) are the backend's; the others are not."""
    for mine, theirs in zip(got.calls[0].steps, expected.calls[0].steps, strict=True):
        if mine.number not in (2, 6) and mine.choice != theirs.choice:
            raise AssertionError(f"step {mine.number} ({mine.name}) chose {mine.choice!r}, expected {theirs.choice!r}")


def ask_backward(asked: Asked) -> None:
    """The gradients of activations and bias."""
    B, state = asked.quantised()
    g = torch.randn(asked.case.m, asked.case.n, generator=torch.Generator().manual_seed(asked.case.seed + 1))
    g = g.to(asked.case.torch_dtype).to(asked.device)
    got, wanted = asked.both(lambda by: _gradients(asked, B, state, g, by))
    W = dispatch.dequantize_4bit(state.packed_weight(B), torch.float32, asked.against)
    budgets = [product_budget(g.double() @ W.double(), wanted[0], g, W.t())]
    if len(wanted) > 1:
        budgets.append(Budget.of(g.double().sum(0), wanted[1], wanted[1].dtype))
    for name, mine, budget in zip(("grad_A", "grad_bias"), got, budgets, strict=False):
        asked.product_within(budget, mine, name, str)


def _gradients(asked: Asked, B: Tensor, state: QuantState, g: Tensor, backend: str) -> list[Tensor]:
    x = asked.x.detach().clone().requires_grad_()
    bias = None if asked.bias is None else asked.bias.clone().requires_grad_()
    matmul_4bit(x, B, state, bias=bias, backend=backend).backward(g)  # type: ignore[no-untyped-call]
    return [t.grad for t in (x, bias) if t is not None and t.grad is not None]


def ask_state_dict(asked: Asked) -> None:
    """Quantise, infer, save, load, infer again."""
    with asked.answering():
        layer = _layer(asked, asked.backend)
    wanted = _layer(asked, asked.against).state_dict()
    with torch.no_grad(), use_backend(asked.backend):
        first = layer(asked.x)
        saved = {key: value.clone() for key, value in layer.state_dict().items()}
        for key, value in wanted.items():
            assert_same_bits(one_nan(saved[key]), one_nan(value), f"state dict entry {key!r}")
        loaded = _empty_layer(asked).to(asked.device)
        loaded.load_state_dict(saved)
        assert_same_bits(one_nan(loaded(asked.x)), one_nan(first), "output of the reloaded layer")


def ask_embedding(asked: Asked) -> None:
    """Rows of an embedding."""
    case = asked.case
    table = nn.Embedding4bit(case.n, case.k, quant_type=case.code, quant_storage=getattr(torch, case.storage))
    table.weight.blocksize = case.blocksize
    table.weight.data = asked.W.cpu()
    with use_backend(asked.against):
        table.to(asked.device)
        ids = torch.arange(case.n, device=asked.device).flip(0)
        wanted = table(ids)
    with asked.answering(), use_backend(asked.backend):
        got = table(ids)
    assert_same_bits(one_nan(got), one_nan(wanted), "rows")


def _empty_layer(asked: Asked) -> nn.Linear4bit:
    case = asked.case
    layer = nn.Linear4bit(
        case.k,
        case.n,
        bias=case.bias,
        compute_dtype=case.torch_dtype,
        compress_statistics=case.nested,
        quant_type=case.code,
        quant_storage=getattr(torch, case.storage),
    )
    layer.weight.blocksize = case.blocksize
    return layer.eval()


def _layer(asked: Asked, backend: str) -> nn.Linear4bit:
    layer = _empty_layer(asked)
    layer.weight.data = asked.W.cpu()
    if asked.bias is not None:
        layer.bias.data = asked.bias.cpu()
    with use_backend(backend):
        return layer.to(asked.device)
