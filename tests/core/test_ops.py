"""The ops between functions and backends: the straight way, the way of a torch op, and what an op promises on meta.

The meta device serves as the second device that a machine without a GPU lacks: what is dropped on the way shows there
as a tensor on the CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loopback import SWAPPED, Loopback, Recorder
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import refq4
import refq4.functional as F
from refq4.autograd import MatMul4Bit
from refq4.backend import PreparedWeight
from refq4.internals import dispatch, schemas
from refq4.nn import LinearNF4
from refq4.reference import ReferenceBackend
from refq4.testing.isolation import isolated_registry

pytestmark = pytest.mark.reference_only("it names its engine itself")
A = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(params=[False, True], ids=["canonical layout", "own layout"])
def recorder(request):
    with isolated_registry():
        yield refq4.register_backend(Recorder(request.param))


@pytest.fixture
def layer() -> LinearNF4:
    torch.manual_seed(1)
    return LinearNF4(128, 8, compress_statistics=True).to("cpu").eval()


# --- the way to a backend ---------------------------------------------------------------------------------------------


class Ops(TorchDispatchMode):
    """Keeps the ops that the dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Nothing(TorchFunctionMode):
    """Stands in the way, and changes nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    """A tensor with a class of its own."""


def through_the_dispatcher(backend: Recorder) -> bool:
    return any(file.endswith("torch/_ops.py") for file in backend.called_from)


def test_an_ordinary_product_goes_straight_to_the_backend(recorder, layer):
    with torch.no_grad(), refq4.use_backend("recorder"):
        layer(A)
    assert not through_the_dispatcher(recorder)


@pytest.mark.parametrize("what", ["dispatch mode", "function mode", "profiler", "tracing", "vmap", "subclass"])
def test_whatever_acts_on_ops_sees_the_product_as_one_and_the_result_stays(recorder, layer, what):
    layer.requires_grad_(False)
    with torch.no_grad(), refq4.use_backend("recorder"):
        wanted = layer(A)
        product = torch.ops.refq4.gemm_4bit
        if what == "dispatch mode":
            with Ops() as mode:
                got = layer(A)
            assert product.default in mode.seen
        elif what == "function mode":
            with Nothing():
                got = layer(A)
        elif what == "profiler":
            with torch.autograd.profiler.profile() as profile:
                got = layer(A)
            assert f"refq4::{product.__name__}" in {event.name for event in profile.function_events}
        elif what == "tracing":
            weight = layer.weight._form.prepared if recorder.own_layout else None
            packed = layer.quant_state.packed_weight(layer.weight.stored())

            def run(x: torch.Tensor) -> torch.Tensor:
                if weight is not None:
                    return dispatch.product("gemm_4bit", x, weight, layer.bias, "recorder")
                return dispatch.product("gemm_4bit", x, packed, layer.bias, "recorder")

            got = torch.jit.trace(run, A, check_trace=False)(A)
        elif what == "vmap":
            got = torch.vmap(layer)(A.view(2, 4, 128)).view(8, 8)
        else:
            got = layer(A.as_subclass(Subclass)).as_subclass(torch.Tensor)
    assert through_the_dispatcher(recorder)
    assert torch.equal(got, wanted)


def test_a_gradient_wanted_for_the_bias_alone_takes_the_way_that_tracks_it():
    B, state = F.quantize_4bit(A, quant_type="nf4")
    bias = torch.zeros(8, requires_grad=True)

    class Foreign(Loopback):
        """What autograd can't look into, as a kernel in C is."""

        name = "foreign"

        def gemm_4bit(self, x: Any, weight: Any, bias: Any) -> torch.Tensor:
            return super().gemm_4bit(x, weight, bias).detach()

    with isolated_registry():
        refq4.register_backend(Foreign())
        dispatch.product("gemm_4bit", A, state.packed_weight(B), bias, "foreign").sum().backward()
    assert torch.equal(bias.grad, torch.full((8,), 8.0))


def test_forward_mode_follows_the_bias_alone_and_vmap_keeps_the_backend(recorder):
    B, state = F.quantize_4bit(A, quant_type="nf4")
    bias, tangent = torch.randn(8), torch.randn(8)
    _, got = torch.func.jvp(lambda b: MatMul4Bit.apply(A, B, None, b, state), (bias,), (tangent,))
    assert torch.equal(got, tangent.expand(8, 8))
    with refq4.trace() as t:
        torch.func.vmap(lambda a: MatMul4Bit.apply(a, B, None, None, state, "recorder"))(A)
    assert {op.backend for op in t.ops} == {"recorder"}


def test_vmap_adds_a_bias_per_batch_entry_to_a_product_on_an_own_layout(layer):
    B, state = F.quantize_4bit(A, quant_type="nf4")
    x, bias = torch.randn(5, 2, 128), torch.randn(5, 8)
    with isolated_registry(), torch.no_grad():
        prepared = refq4.register_backend(Recorder(own_layout=True)).prepare_weight(state.packed_weight(B))
        got = torch.vmap(lambda a, b: dispatch.product("gemm_4bit", a, prepared, b, "recorder"))(x, bias)
    wanted = torch.stack(
        [nn.functional.linear(a, F.dequantize_4bit(B, state), b) for a, b in zip(x, bias, strict=True)]
    )
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_reference_reads_no_layout_but_the_canonical():
    prepared = PreparedWeight("recorder", SWAPPED, (A,), (8, 128), 64, "nf4")
    with pytest.raises(refq4.BackendUnsupportedError, match="reads the canonical layout only, not 'nibbles swapped'"):
        ReferenceBackend().gemm_4bit(A, prepared, None)


# --- what ops promise before they run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_every_op_says_on_meta_what_shapes_and_dtypes_it_will_give(dtype, layer):
    B, state = F.quantize_4bit(A, quant_type="nf4")
    weight, x = state.packed_weight(B), A.to(dtype).view(2, 4, 128)
    q, scales = dispatch.quantize_blockwise(x, F.create_dynamic_map(), 64, "reference")
    with isolated_registry(), torch.no_grad():
        prepared = refq4.register_backend(Recorder(own_layout=True)).prepare_weight(weight)
        own = schemas.flatten(prepared)
        calls = [
            (torch.ops.refq4.quantize_4bit, (x, 64, "nf4", False, "reference")),
            (torch.ops.refq4.quantize_blockwise, (x, F.create_dynamic_map(), 64, "reference")),
            (torch.ops.refq4.dequantize_blockwise, (q, scales, F.create_dynamic_map(), 64, dtype, "reference")),
            (torch.ops.refq4.dequantize_4bit, (*schemas.flatten(weight), dtype, "reference")),
            (torch.ops.refq4.gemm_4bit, (x, *schemas.flatten(weight), None, "reference")),
            (torch.ops.refq4.gemv_4bit, (x[:1, :1], *schemas.flatten(weight), None, "reference")),
            (torch.ops.refq4.gemm_4bit, (x, *own, None, "recorder")),
            (torch.ops.refq4.restore_weight, (*own, "recorder")),
            (torch.ops.refq4.grad_input_4bit, (x[..., :8], *schemas.flatten(weight), "reference")),
        ]  # fmt: skip
        for op, args in calls:
            on_meta = tree_map_only(torch.Tensor, lambda t: t.to("meta"), args)
            promised, given = (tree_leaves(op(*of)) for of in (on_meta, args))
            assert all(tensor.is_meta for tensor in promised)
            assert [(t.shape, t.dtype) for t in promised] == [(t.shape, t.dtype) for t in given], op


def test_the_gradient_in_half_precision_is_rounded_once_where_torch_has_no_fast_product(monkeypatch):
    monkeypatch.setattr(dispatch, "_SLOW_ON_CPU", HALVES)
    B, state = F.quantize_4bit(A, quant_type="nf4")
    for dtype in HALVES:
        grad_y = torch.randn(4, 8).to(dtype)
        grad = dispatch.grad_input(grad_y, state.packed_weight(B), "reference")
        assert torch.equal(grad, (grad_y.float() @ F.dequantize_4bit(B, state).to(dtype).float()).to(dtype))


def test_the_reference_decodes_eight_bits_where_the_codes_are():
    q, absmax = torch.zeros(64, dtype=torch.uint8, device="meta"), torch.ones(1, device="meta")
    code = torch.ones(256, device="meta")
    assert ReferenceBackend().dequantize_blockwise(q, absmax, code, 64, torch.float32).is_meta


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64)], ids=["one token", "several", "a batch"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_flop_counter_sees_a_product_and_its_gradient_as_those_of_a_plain_layer(backend, shape):
    from torch.utils.flop_counter import FlopCounterMode

    def flops(layer: nn.Module, gradient: bool) -> int:
        x = torch.ones(shape, requires_grad=gradient)
        with FlopCounterMode(display=False) as counter:
            y = layer(x)
            if gradient:
                y.sum().backward()
        return counter.get_total_flops()

    plain = nn.Linear(64, 48).requires_grad_(False)
    with refq4.use_backend(backend):
        layer = refq4.nn.LinearNF4(64, 48, compute_dtype=torch.float32).to("cpu").requires_grad_(False)
        for training in (True, False):
            layer.train(training)
            for gradient in (False, True):
                assert flops(layer, gradient) == flops(plain, gradient) > 0
        with torch.no_grad():
            layer(torch.ones(shape))
        assert layer.weight.prepared is (backend == "cpu")
        assert flops(layer, False) == flops(plain, False)
