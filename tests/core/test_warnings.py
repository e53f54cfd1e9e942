"""A warning points at the line of the caller, however many layers of refq4 and torch lie between."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch

import refq4
import refq4.functional as F
from refq4 import nn
from refq4.internals.checks import warn_caller


def straddling_function():
    return refq4.matmul_4bit(torch.ones(1, 100), *F.quantize_4bit(torch.ones(8, 100)))


def straddling_layer():
    return nn.LinearNF4(100, 8).to("cpu")(torch.ones(1, 100))


def k_by_n_function():
    return refq4.matmul_4bit(torch.ones(3, 64), *F.quantize_4bit(torch.ones(64, 96)))


def fp16_layer():
    return nn.LinearNF4(64, 8).to("cpu")(torch.ones(1, 64, dtype=torch.float16))


def fp16_layer_in_a_model():
    return torch.nn.Sequential(nn.LinearNF4(64, 8)).to("cpu")(torch.ones(1, 64, dtype=torch.float16))


def nonfinite_function():
    return F.quantize_4bit(torch.full((64,), torch.nan), compress_statistics=True, allow_nonfinite=True)


def embedding():
    return nn.Embedding4bit(10, 100)


def embedding_of_a_type():
    return nn.EmbeddingNF4(10, 100)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(straddling_function, id="blocks that straddle rows, from matmul_4bit"),
        pytest.param(straddling_layer, id="blocks that straddle rows, from a layer"),
        pytest.param(k_by_n_function, id="a weight quantised as K by N"),
        pytest.param(fp16_layer, id="fp16 input, from a layer"),
        pytest.param(fp16_layer_in_a_model, id="fp16 input, from a layer in a model"),
        pytest.param(nonfinite_function, id="NaN in a weight quantised twice"),
        pytest.param(embedding, id="an embedding of rows that are no whole blocks"),
        pytest.param(embedding_of_a_type, id="the same, from a subclass"),
    ],
)
def test_warning_points_at_the_callers_line(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    lines, first = inspect.getsourcelines(call)
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, first + len(lines) - 1)]


@pytest.mark.reference_only("what it checks is the same for every backend")
def test_a_warning_points_at_the_first_line_outside_the_package():
    with pytest.warns(UserWarning, match="mind") as caught:
        warn_caller("mind")
    assert caught[0].filename == __file__
