"""MatMul4Bit and the ops' gradients: every transform torch has, against a plain linear on the decoded weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import refq4
import refq4.functional as F
from refq4.autograd import MatMul4Bit
from refq4.internals import dispatch, schemas
from refq4.reference import ReferenceBackend
from refq4.testing import assert_same_bits
from refq4.testing.isolation import isolated_registry


@pytest.fixture(params=[False, True], ids=["plain scales", "double quantisation"])
def packed(request):
    return F.quantize_4bit(torch.randn(6, 96), quant_type="nf4", blocksize=32, compress_statistics=request.param)


def plain(state, B, dtype=torch.float64):
    weight = state.copy()
    weight.dtype = torch.float32
    weight = F.dequantize_4bit(B, weight).to(dtype)
    return lambda A, bias=None: nn.functional.linear(A, weight, bias)


SHAPES = [(96,), (3, 96), (2, 3, 96), (2, 1, 3, 96)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s)}-D input")
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "double quantisation"])
def test_gradients_pass_gradcheck_to_second_order_on_the_exact_path(nested, shape, with_bias):
    weight = torch.randn(4, 40)  # small, for differences are taken in each direction; blocks of 32 straddle its rows
    B, state = F.quantize_4bit(weight, quant_type="nf4", blocksize=32, compress_statistics=nested)
    A = torch.randn((*shape[:-1], 40), dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True) if with_bias else None
    args = (A, bias) if with_bias else (A,)

    def product(A, bias=None):
        return MatMul4Bit.apply(A, B, None, bias, state)

    torch.autograd.gradcheck(product, args, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(product, args)


@pytest.mark.reference_only("it compares bits with torch's own linear")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s)}-D input")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_equal_those_of_a_plain_linear_on_the_decoded_weight(packed, shape, dtype):
    B, state = packed
    A, bias = torch.randn(shape, dtype=dtype), torch.randn(6, dtype=dtype)
    grads = []
    for product in (lambda a, b: F.matmul_4bit(a, B, state, bias=b), plain(state, B, dtype)):
        a, b = A.clone().requires_grad_(), bias.clone().requires_grad_()
        y = product(a, b)
        (y.sin() if dtype == torch.float32 else y).sum().backward()
        grads.append((a.grad, b.grad))
    for mine, theirs in zip(*grads, strict=True):
        assert_same_bits(mine, theirs) if dtype == torch.float32 else torch.testing.assert_close(mine, theirs)


def test_the_bias_gradient_sums_over_all_leading_dimensions(packed):
    B, state = packed
    bias = torch.zeros(6, requires_grad=True)
    F.matmul_4bit(torch.randn(2, 3, 4, 96), B, state, bias=bias).sum().backward()
    assert_same_bits(bias.grad, torch.full((6,), 24.0))


def test_the_frozen_weight_gets_no_gradient():
    layer = refq4.nn.LinearNF4(64, 8).to("cpu")
    layer(torch.randn(3, 64)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


def test_an_empty_batch_has_empty_and_zero_gradients(packed):
    B, state = packed
    A, bias = torch.randn(0, 96, requires_grad=True), torch.zeros(6, requires_grad=True)
    y = F.matmul_4bit(A, B, state, bias=bias)
    assert y.shape == (0, 6)
    y.sum().backward()
    assert A.grad.shape == (0, 96)
    assert_same_bits(bias.grad, torch.zeros(6))


def test_a_bias_of_another_dtype_gets_its_gradient_in_its_own(packed):
    B, state = packed
    bias = torch.zeros(6, dtype=torch.float32, requires_grad=True)
    F.matmul_4bit(torch.randn(2, 96).bfloat16().requires_grad_(), B, state, bias=bias).sum().backward()
    assert bias.grad.dtype == torch.float32


def test_activation_checkpointing_gives_the_same_gradients():
    layer = refq4.nn.LinearNF4(64, 64).to("cpu")
    x = torch.randn(3, 64)
    grads = []
    for run in (lambda a: checkpoint(layer, a, use_reentrant=False), layer):
        a = x.clone().requires_grad_()
        run(a).square().sum().backward()
        grads.append(a.grad)
    assert_same_bits(*grads)


@pytest.mark.reference_only("it compares bits with torch's own linear")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype_like_a_plain_linear(packed, dtype):
    B, state = packed
    A, bias = torch.randn(3, 96, requires_grad=True), torch.randn(6, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = F.matmul_4bit(A, B, state, bias=bias)
        wanted = plain(state, B, torch.float32)(A, bias)
    assert y.dtype == wanted.dtype == dtype
    torch.testing.assert_close(y, wanted)
    y.float().sum().backward()
    assert (A.grad.dtype, bias.grad.dtype) == (torch.float32, torch.float32)


def test_autocast_inside_a_layer_still_answers_in_the_inputs_dtype():
    layer, x = refq4.nn.LinearNF4(64, 8).to("cpu"), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.float32


def test_autocast_leaves_fp64_alone(packed):
    B, state = packed
    with torch.autocast("cpu", torch.bfloat16):
        assert F.matmul_4bit(torch.randn(2, 96).double(), B, state).dtype == torch.float64


# --- torch.func -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [(), (2,)], ids=["one token", "two tokens"])
def test_torch_func_transforms_agree_with_a_plain_linear(packed, tokens):
    B, state = packed
    exact = plain(state, B)
    A, bias = torch.randn(*tokens, 96).double(), torch.randn(6).double()

    def mine(a, b):
        return F.matmul_4bit(a, B, state, bias=b)

    for transform in (torch.func.jacrev, torch.func.jacfwd):
        for argnum in (0, 1):
            torch.testing.assert_close(transform(mine, argnum)(A, bias), transform(exact, argnum)(A, bias))
    torch.testing.assert_close(
        torch.func.hessian(lambda a: mine(a, bias).sin().sum())(A),
        torch.func.hessian(lambda a: exact(a, bias).sin().sum())(A),
    )
    batch, biases = torch.randn(4, *tokens, 96).double(), torch.randn(4, 6).double()
    for dims in ((0, None), (None, 0), (0, 0)):
        args = (batch if dims[0] == 0 else A, biases if dims[1] == 0 else bias)
        torch.testing.assert_close(torch.vmap(mine, dims)(*args), torch.vmap(exact, dims)(*args))
        grad = torch.vmap(torch.func.grad(lambda a, b: mine(a, b).sin().sum(), (0, 1)), dims)(*args)
        wanted = torch.vmap(torch.func.grad(lambda a, b: exact(a, b).sin().sum(), (0, 1)), dims)(*args)
        torch.testing.assert_close(grad, wanted)


def test_a_batched_backward_of_an_eager_call_is_the_gradients_one_by_one(packed):
    B, state = packed
    A, rows = torch.randn(3, 96, requires_grad=True), torch.randn(5, 3, 6)
    y = MatMul4Bit.apply(A, B, None, None, state)
    (batched,) = torch.autograd.grad(y, A, rows, retain_graph=True, is_grads_batched=True)
    one_by_one = [torch.autograd.grad(y, A, row, retain_graph=True)[0] for row in rows]
    torch.testing.assert_close(batched, torch.stack(one_by_one))


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_batched_forward_derivative_by_the_bias_alone_is_that_of_torch(packed, tokens):
    B, state = packed
    A, bias = torch.randn(tokens, 96), torch.randn(6)
    jacobian = torch.autograd.functional.jacobian(
        lambda b: refq4.matmul_4bit(A, B, state, bias=b), bias, vectorize=True, strategy="forward-mode"
    )
    assert torch.equal(jacobian, torch.eye(6).expand(tokens, 6, 6))


def test_an_operand_that_outlived_a_transform_is_multiplied_by_what_it_stands_for(packed):
    B, state = packed
    A, kept = torch.randn(3, 96), []
    torch.func.grad(lambda a: (kept.append(a), a.sum())[1])(A)
    assert torch._C._functorch.is_dead_tensor_wrapper(kept[0])
    assert_same_bits(MatMul4Bit.apply(kept[0], B, None, None, state), MatMul4Bit.apply(A, B, None, None, state))


def test_vmap_over_weights_says_to_loop(packed):
    B, state = packed
    many, A = torch.stack([B, B]), torch.randn(1, 96)
    for product in (
        lambda b: MatMul4Bit.apply(A, b, None, None, state),
        lambda b: F.gemv_4bit(A, b, state=state),
    ):
        with pytest.raises(NotImplementedError, match="loop over them"):
            torch.vmap(product)(many)


def test_matmul4bit_refuses_out_and_a_missing_state(packed):
    B, state = packed
    A = torch.randn(2, 96)
    with pytest.raises(ValueError, match="out="):
        MatMul4Bit.apply(A, B, torch.empty(2, 6), None, state)
    with pytest.raises(ValueError, match="needs the quant_state"):
        MatMul4Bit.apply(A, B)


def test_backward_keeps_the_backend_of_forward():
    from loopback import Loopback

    with isolated_registry():
        backend = refq4.register_backend(Loopback())
        B, state = F.quantize_4bit(torch.randn(6, 64), backend="reference")
        A = torch.randn(2, 64, requires_grad=True)
        with refq4.use_backend("loopback"):
            y = F.matmul_4bit(A, B, state)
        refq4.set_backend("reference")
        y.sum().backward()  # on autograd's own thread for a GPU; the choice travels with the graph either way
        assert backend.seen["dequantize_4bit"] == 1


class WithGradient(ReferenceBackend):
    """The reference, with a gradient of its own that adds up one row of the weight after the other."""

    name = "with-gradient"
    refuses: tuple[int, ...] = ()

    def can_run(self, call):
        return (
            "not so many tokens" if call.op == "grad_input_4bit" and call.m in self.refuses else super().can_run(call)
        )

    def grad_input_4bit(self, grad, weight):
        assert grad.is_contiguous()
        assert grad.ndim == 2
        rows = self.dequantize_4bit(weight, grad.dtype)
        return sum(grad[:, n : n + 1] * rows[n] for n in range(rows.shape[0]))


@pytest.mark.parametrize("leading", [(2,), (2, 3), ()], ids=["[M, K]", "[2, 3, K]", "[K]"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "as an op"])
def test_a_backend_with_a_gradient_of_its_own_computes_it_and_the_trace_says_so(leading, compiled):
    with isolated_registry():
        backend = refq4.register_backend(WithGradient())
        B, state = F.quantize_4bit(torch.randn(6, 64), backend="reference")
        A = torch.randn(*leading, 64, requires_grad=True)
        grad = torch.randn(6, *leading).movedim(0, -1)  # not contiguous
        with refq4.trace() as t:
            if compiled:
                flat = schemas.flatten(state.packed_weight(B))
                got = torch.ops.refq4.grad_input_4bit.default(grad, *flat, "with-gradient")
            else:
                (got,) = torch.autograd.grad(refq4.matmul_4bit(A, B, state, backend="with-gradient"), A, grad)
        torch.testing.assert_close(got, grad @ F.dequantize_4bit(B, state))
        assert t.ops[-1].op == "grad_input_4bit"
        assert t.ops[-1].call == f"grad_input_4bit(M={A.numel() // 64}, N=6, K=64, float32 on cpu, fp4, blocksize 64)"
        backend.refuses = (A.numel() // 64,)
        with refq4.trace() as t:
            (decoded,) = torch.autograd.grad(refq4.matmul_4bit(A, B, state, backend="with-gradient"), A, grad)
        torch.testing.assert_close(decoded, got)
        assert t.ops[-1].op == "dequantize_4bit"


@pytest.mark.parametrize("op", ["gemv_4bit", "gemm_4bit"])
def test_the_raw_op_has_the_same_gradients(packed, op):
    B, state = packed
    flat = schemas.flatten(state.packed_weight(B))
    A = torch.randn(1, 96, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda a, b: getattr(torch.ops.refq4, op)(a, *flat, b, "auto"), (A, bias))


@pytest.mark.reference_only("its backend is named in it")
def test_forward_mode_goes_through_an_inference_layer_whose_weight_is_in_an_own_layout(packed):
    from loopback import Loopback

    with isolated_registry():
        refq4.register_backend(Loopback(own_layout=True))
        layer = refq4.nn.Linear4bit(64, 8, bias=False, quant_type="nf4").to("cpu").eval()
        x, tangent = torch.randn(1, 64), torch.randn(1, 64)
        with refq4.use_backend("loopback"):
            y = layer(x)
            got, moved = torch.func.jvp(layer, (x,), (tangent,))
            with forward_ad.dual_level():
                dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
            torch.testing.assert_close(got, y)
            torch.testing.assert_close(moved, layer(tangent))
            assert_same_bits(dual.tangent, moved)


@pytest.mark.reference_only("its backend is named in it")
def test_an_eager_product_meets_every_mode_that_looks_at_ops(packed):
    B, state = packed
    A = torch.randn(2, 96)

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    weight = state.packed_weight(B)
    alone = dispatch.product("gemm_4bit", A, weight, None, "reference")
    with Seen():
        watched = dispatch.product("gemm_4bit", A, weight, None, "reference")
    assert "refq4.gemm_4bit.default" in names
    assert_same_bits(watched, alone)
    wanted = dispatch.product("gemm_4bit", A.clone().requires_grad_(), weight, None, "reference")
    assert wanted.requires_grad
    bias = torch.zeros(6, requires_grad=True)
    assert dispatch.product("gemm_4bit", A, weight, bias, "reference").requires_grad


# --- a result is a tensor of its own ----------------------------------------------------------------------------------

SHAPES = pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 64), (2, 3, 64), (2, 1, 3, 64)], ids=str)


@SHAPES
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "double quantisation"])
def test_in_place_ops_after_a_layer_work_and_differentiate_as_after_nn_linear(shape, training, nested):
    layer = refq4.nn.LinearNF4(64, 8, compress_statistics=nested).to("cpu").train(training)
    plain = torch.nn.Linear(64, 8)
    plain.weight.data = F.dequantize_4bit(layer.weight, layer.quant_state)
    plain.bias.data = layer.bias.detach().clone()
    x, results = torch.randn(shape), []
    for linear in (layer, plain):
        norm = torch.nn.LayerNorm(64)
        torch.nn.Sequential(norm, linear, torch.nn.ReLU(inplace=True))(x).sum().backward()
        y = linear(norm(x))
        y += 1
        y.mul_(2).sin().sum().backward()
        results.append((y.detach(), norm.weight.grad, linear.bias.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@SHAPES
def test_no_result_is_a_view_with_a_gradient_or_without(shape):
    B, state = F.quantize_4bit(torch.randn(8, 64), quant_type="nf4")
    layer = refq4.nn.LinearNF4(64, 8).to("cpu")
    for wanted in (True, False):
        A = torch.randn(shape, requires_grad=wanted)
        calls = [
            lambda A: F.matmul_4bit(A, B, state),
            layer.train(),
            layer.eval(),
            torch.compile(layer, backend="eager"),
        ]
        for call in calls:
            assert call(A)._base is None
    torch.compiler.reset()  # a layer compiled for many shapes is compiled no more, in any later test


class Foreign(ReferenceBackend):
    """Returns what ``change`` makes of each product."""

    name = "foreign"

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.change = change

    def gemv_4bit(self, *args: Any) -> torch.Tensor:
        return self.change(super().gemv_4bit(*args))

    def gemm_4bit(self, *args: Any) -> torch.Tensor:
        return self.change(super().gemm_4bit(*args))


@SHAPES
@pytest.mark.parametrize("rows_and_columns", [(5, 0), (0, 5)], ids=["rows", "columns"])
def test_a_part_of_what_a_backend_allocated_is_a_result_as_any_other(shape, rows_and_columns):
    rows, columns = rows_and_columns
    pad = torch.nn.ConstantPad2d((0, columns, 0, rows), 9.0)
    refq4.register_backend(Foreign(lambda y: pad(y)[: y.shape[0], : y.shape[1]]))
    B, state = F.quantize_4bit(torch.randn(8, 64), quant_type="nf4")
    A = torch.randn(shape, requires_grad=True)
    y, wanted = (refq4.matmul_4bit(A, B, state, backend=name) for name in ("foreign", "reference"))
    torch.testing.assert_close(y, wanted)
    y += 1
    y.sin().sum().backward()
    assert A.grad is not None


@SHAPES
@pytest.mark.parametrize(
    "change", [lambda y: y[:0], lambda y: torch.cat([y, y]), lambda y: y[:, 1:], lambda y: y.flatten()],
    ids=["no rows", "too many rows", "a column too few", "flat"],
)  # fmt: skip
def test_a_result_of_another_shape_is_refused_and_never_filled_up_or_cut(shape, change):
    refq4.register_backend(Foreign(change))
    B, state = F.quantize_4bit(torch.randn(8, 64), quant_type="nf4")
    with pytest.raises(ValueError, match=r"the backend gave \[.* for \[\d+, 8\]: refq4 verify"):
        refq4.matmul_4bit(torch.randn(shape), B, state, backend="foreign")


def test_backward_on_the_cpu_multiplies_by_the_stored_bytes_and_decodes_no_whole_weight():
    packed, state = F.quantize_4bit(torch.randn(48, 128), quant_type="nf4", compress_statistics=True)
    x = torch.randn(5, 128, requires_grad=True)
    with refq4.trace() as t:
        y = refq4.matmul_4bit(x, packed, state, backend="cpu")
        y.sum().backward()
    assert [op.op for op in t.ops] == ["gemm_4bit", "grad_input_4bit"]
    wanted = torch.ones(5, 48).double() @ F.dequantize_4bit(packed, state).double()
    assert (x.grad.double() - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("features", [128, 47, 0], ids=["K instead of N", "N - 1", "none"])
def test_a_gradient_of_another_size_is_refused_before_a_backend_reads_it(features, backend):
    packed, state = F.quantize_4bit(torch.randn(48, 128), quant_type="nf4")
    flat = schemas.flatten(state.packed_weight(packed))
    with pytest.raises(ValueError, match="grad's last dimension must be 48"):
        torch.ops.refq4.grad_input_4bit(torch.ones(3, features), *flat, backend)
