"""Every argument gets where it is meant to go: short forms pass on all of theirs, and a backend is told the whole call.

An argument that is accepted and dropped makes no noise: the default does nearly the same. So each test here gives every
argument a value that is not its default, and looks at the other end.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loopback import Loopback

import refq4
import refq4.functional as F
from refq4 import autograd, codebooks
from refq4.backend import OPS, Call, PackedWeight
from refq4.internals import dispatch
from refq4.internals.blockwise import slice_state
from refq4.reference import ReferenceBackend
from refq4.testing.isolation import isolated_registry

pytestmark = pytest.mark.reference_only("it names its engine itself")

A = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))


class Recorder(Loopback):
    """Keeps each call it is told of, and holds the core to what it promises of the tensors."""

    name = "recorder"
    priority = -1  # so that it runs where it was named, and nowhere else

    def __init__(self, own_layout: bool = False) -> None:
        super().__init__(own_layout)
        self.calls: list[Call] = []

    def can_run(self, call: Call) -> str | None:
        self.calls.append(call)
        return None

    def gemv_4bit(self, x: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
        self._promised(x, weight)
        return super().gemv_4bit(x, weight, bias)

    def gemm_4bit(self, x: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
        self._promised(x, weight)
        return super().gemm_4bit(x, weight, bias)

    def dequantize_4bit(self, weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
        assert weight.packed.is_contiguous()
        assert weight.absmax.is_contiguous()
        return super().dequantize_4bit(weight, dtype)

    def _promised(self, x: torch.Tensor, weight: Any) -> None:
        assert x.dim() == 2
        assert x.is_contiguous()
        if isinstance(weight, PackedWeight):
            assert weight.packed.is_contiguous()
            assert weight.absmax.is_contiguous()


@pytest.fixture
def recorder():
    with isolated_registry():
        yield refq4.register_backend(Recorder())


def ran(t: refq4.trace) -> list[tuple[str, str]]:
    return [(op.op, op.backend) for op in t.ops]


# --- functions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_the_short_forms_of_quantising_pass_every_argument_on(recorder, name):
    wanted, state = F.quantize_4bit(A, None, None, 128, True, name, torch.bfloat16)
    out, absmax = torch.empty_like(wanted), torch.empty_like(state.absmax)
    with refq4.trace() as t:
        got, same = getattr(F, f"quantize_{name}")(A, absmax, out, 128, True, torch.bfloat16, backend="recorder")
    assert got is out
    assert same.absmax is absmax
    assert same == state
    assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))
    assert ran(t) == [("quantize_4bit", "recorder"), ("quantize_blockwise", "recorder")]


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_decoding_without_a_state_takes_every_argument_in_its_place(recorder, name):
    packed, state = F.quantize_4bit(A, blocksize=128, quant_type=name)
    full = F.dequantize_4bit(packed, state)
    short = getattr(F, f"dequantize_{name}")
    for decode, kind in ((F.dequantize_4bit, (name,)), (short, ())):
        out = torch.empty(8, 128, dtype=torch.bfloat16)
        with refq4.trace() as t:
            assert decode(packed, None, state.absmax, out, 128, *kind, backend="recorder") is out
        assert torch.equal(out, full.bfloat16())
        assert ran(t) == [("dequantize_4bit", "recorder")]
        with refq4.trace() as t:
            assert torch.equal(decode(packed, state, backend="recorder"), full)
        assert ran(t) == [("dequantize_4bit", "recorder")]


def test_decoding_without_a_state_takes_blocks_of_64_if_nothing_is_said():
    packed, state = F.quantize_4bit(A, blocksize=64, quant_type="nf4")
    out = torch.empty(8, 128)
    F.dequantize_4bit(packed, None, state.absmax, out, quant_type="nf4")
    assert torch.equal(out, F.dequantize_4bit(packed, state))


def test_the_eight_bit_functions_take_every_argument_in_its_place(recorder):
    code = torch.linspace(-1, 1, 100)
    wanted, state = F.quantize_blockwise(A, code, blocksize=64, nested=True)
    out, absmax = torch.empty_like(wanted), torch.empty_like(state.absmax)
    with refq4.trace() as t:
        got, same = F.quantize_blockwise(A, code, absmax, out, 64, True, backend="recorder")
    assert got is out
    assert same.absmax is absmax
    assert same == state
    assert same.state2.blocksize == 64
    assert ran(t) == [("quantize_blockwise", "recorder")] * 2
    decoded = torch.empty(8, 128)
    with refq4.trace() as t:
        assert F.dequantize_blockwise(got, state, out=decoded, backend="recorder") is decoded
    assert ran(t) == [("dequantize_blockwise", "recorder")] * 2
    assert torch.equal(decoded, F.dequantize_blockwise(got, state))
    plain, state = F.quantize_blockwise(A, code, blocksize=64)
    with refq4.trace() as t:
        got = F.dequantize_blockwise(plain, None, state.absmax, code, decoded, 64, backend="recorder")
    assert got is decoded
    assert torch.equal(decoded, F.dequantize_blockwise(plain, state))
    assert ran(t) == [("dequantize_blockwise", "recorder")]


def test_eight_bit_codes_have_two_to_256_values():
    for numel in (2, 256):
        F.quantize_blockwise(A, torch.linspace(-1, 1, numel))
    for code in (torch.zeros(1), torch.zeros(257), torch.zeros(2, 2), torch.zeros(4, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"code must be fp32 \[2 to 256\]"):
            F.quantize_blockwise(A, code)


def test_an_empty_tensor_has_a_mean_scale_of_zero():
    for _, state in (
        F.quantize_4bit(torch.empty(0, 64), compress_statistics=True),
        F.quantize_blockwise(torch.empty(0, 64), nested=True),
    ):
        assert state.offset.shape == ()
        assert float(state.offset) == 0.0


def test_a_product_takes_every_argument_in_its_place(recorder):
    B, state = F.quantize_4bit(A, quant_type="nf4")
    bias, out = torch.randn(8), torch.empty(3, 8)
    x = torch.randn(3, 128)
    with torch.no_grad(), refq4.trace() as t:
        assert F.matmul_4bit(x, B, state, out, bias, backend="recorder") is out
        assert F.gemv_4bit(x, B, out[:3], state=state, backend="recorder").data_ptr() == out.data_ptr()
        for shape in ((1, 128), (128,), (1, 1, 128)):
            F.gemv_4bit(x[0].view(shape), B, state=state, backend="recorder")
    assert ran(t) == [("gemm_4bit", "recorder")] * 2 + [("gemv_4bit", "recorder")] * 3


def test_a_product_over_no_features_is_the_bias(recorder):
    B, state = F.quantize_4bit(torch.empty(4, 0), quant_type="nf4")
    bias = torch.randn(4)
    for grad in (False, True):
        y = F.matmul_4bit(torch.empty(3, 0, requires_grad=grad), B, state, bias=bias, backend="recorder")
        assert torch.equal(y, bias.expand(3, 4))


def test_out_is_refused_where_the_gradient_of_the_bias_alone_is_wanted():
    B, state = F.quantize_4bit(A, quant_type="nf4")
    bias = torch.randn(8, requires_grad=True)
    with pytest.raises(ValueError, match="out="):
        F.matmul_4bit(torch.randn(3, 128), B, state, torch.empty(3, 8), bias)


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [refq4.nn.LinearNF4, refq4.nn.LinearFP4], ids=lambda cls: cls.__name__)
def test_the_short_linear_classes_pass_every_argument_on(cls):
    quant_type = cls.__name__.removeprefix("Linear").lower()
    layer = cls(128, 8, False, torch.float16, False, torch.bfloat16, "meta", blocksize=128)
    assert (layer.in_features, layer.out_features, layer.bias) == (128, 8, None)
    assert (layer.compute_dtype, layer.compute_type_is_set) == (torch.float16, True)
    assert settings(layer) == (128, False, quant_type, torch.bfloat16, True)
    assert cls(128, 8).bias is not None
    assert cls(128, 8, compress_statistics=True).weight.compress_statistics


@pytest.mark.parametrize("cls", [refq4.nn.EmbeddingNF4, refq4.nn.EmbeddingFP4], ids=lambda cls: cls.__name__)
def test_the_short_embedding_classes_pass_every_argument_on(cls):
    quant_type = cls.__name__.removeprefix("Embedding").lower()
    layer = cls(8, 128, torch.float16, torch.bfloat16, "meta")
    assert (layer.num_embeddings, layer.embedding_dim, layer.dtype) == (8, 128, torch.float16)
    assert settings(layer) == (64, False, quant_type, torch.bfloat16, True)


def settings(layer: torch.nn.Module) -> tuple[Any, ...]:
    w = layer.weight
    return w.blocksize, w.compress_statistics, w.quant_type, w.quant_storage, w.is_meta


@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "double quantisation"])
def test_a_weight_is_quantised_with_all_of_its_settings(nested):
    weight = refq4.nn.Params4bit(
        A, blocksize=128, compress_statistics=nested, quant_type="nf4", quant_storage=torch.float16
    ).to("cpu")
    wanted, state = F.quantize_4bit(A, None, None, 128, nested, "nf4", torch.float16)
    assert weight.quant_state == state
    assert torch.equal(weight.data.view(torch.uint8), wanted.view(torch.uint8))


def test_a_weight_that_goes_to_meta_is_on_meta_with_its_dtype_and_settings():
    moved = refq4.nn.Params4bit(A, blocksize=256, quant_type="af4").to("meta", torch.float16)
    assert (moved.is_meta, moved.dtype, moved.blocksize, moved.quant_type) == (True, torch.float16, 256, "af4")
    assert moved.shape == A.shape
    assert not moved.bnb_quantized


def test_moving_takes_keywords_as_well_as_positions():
    weight = refq4.nn.Params4bit(A.clone(), quant_type="nf4")
    assert weight.to(dtype=torch.bfloat16).dtype == torch.bfloat16
    quantised = weight.to(device="cpu", dtype=torch.float16)
    assert quantised.bnb_quantized
    assert quantised.quant_state.dtype == torch.float16


def test_a_piece_that_ends_inside_a_row_or_a_block_has_no_state():
    _, state = F.quantize_4bit(A, blocksize=256, quant_type="nf4")  # two rows of 128 are a block
    assert slice_state(state, 0, 256).shape == (2, 128)
    for start, stop in ((0, 200), (256, 300), (128, 256), (0, 384), (128, 384)):
        assert slice_state(state, start, stop) is None, (start, stop)
    assert slice_state(state, 512, 1024).absmax.tolist() == state.absmax[2:].tolist()


# --- what a backend is told -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "double quantisation"])
def test_a_backend_is_told_all_of_each_call(recorder, nested):
    x, bias = torch.randn(2, 3, 128, dtype=torch.bfloat16), torch.randn(8, dtype=torch.bfloat16)
    with torch.no_grad(), refq4.use_backend("recorder"):
        B, state = F.quantize_4bit(A.half(), blocksize=32, compress_statistics=nested, quant_type="nf4")
        F.dequantize_4bit(B, state)
        F.matmul_4bit(x, B, state, bias=bias)
        F.matmul_4bit(x[:1, :1], B, state, bias=bias)
        q, blockwise = F.quantize_blockwise(A.bfloat16(), blocksize=256)
        F.dequantize_blockwise(q, blockwise)
    half, bf16, single = torch.float16, torch.bfloat16, torch.float32
    scales = [Call("quantize_blockwise", "cpu", single, 1, 1, 32, 256, "256 values")] if nested else []
    assert recorder.calls == [
        Call("quantize_4bit", "cpu", half, 1, 1, 1024, 32, "nf4"),
        *scales,
        Call("dequantize_4bit", "cpu", half, 1, 1, 1024, 32, "nf4", nested),
        Call("gemm_4bit", "cpu", bf16, 6, 8, 128, 32, "nf4", nested),
        Call("gemv_4bit", "cpu", bf16, 1, 8, 128, 32, "nf4", nested),
        Call("quantize_blockwise", "cpu", bf16, 1, 1, 1024, 256, "256 values"),
        Call("dequantize_blockwise", "cpu", bf16, 1, 1, 1024, 256, "256 values"),
    ]


@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "double quantisation"])
def test_a_backend_is_asked_for_its_layout_with_the_call_that_comes(recorder, nested):
    recorder.own_layout = True
    layer = refq4.nn.LinearNF4(128, 8, compute_dtype=torch.bfloat16, compress_statistics=nested, blocksize=32)
    layer.to("cpu").eval()
    with torch.no_grad(), refq4.use_backend("recorder"):
        for shape in ((2, 3, 128), (1, 1, 128), (128,)):
            recorder.calls.clear()
            layer(torch.randn(shape))
            op, tokens = ("gemm_4bit", 6) if len(shape) == 3 and shape[0] == 2 else ("gemv_4bit", 1)
            assert recorder.calls == [Call(op, "cpu", torch.bfloat16, tokens, 8, 128, 32, "nf4", nested)]


def test_a_state_without_a_name_is_called_custom(recorder):
    B, state = F.quantize_4bit(A, quant_type="nf4")
    state.quant_type = None
    layer = refq4.nn.LinearNF4(128, 8, compress_statistics=False).to("cpu").eval()
    layer.weight.quant_state.quant_type = None
    recorder.calls.clear()
    with torch.no_grad(), refq4.use_backend("recorder"):
        F.dequantize_4bit(B, state)
        layer(torch.randn(3, 128))
    assert {call.code for call in recorder.calls} == {"custom"}


@pytest.mark.parametrize("own_layout", [False, True], ids=["canonical layout", "own layout"])
@pytest.mark.parametrize("shape", [(128,), (1, 128), (3, 128), (2, 3, 128), (1, 1, 128)], ids=str)
def test_backends_get_contiguous_rows_and_give_back_any_shape(recorder, shape, own_layout):
    recorder.own_layout = own_layout
    layer = refq4.nn.LinearNF4(128, 8).to("cpu").eval()
    x = torch.randn(shape)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    with torch.no_grad(), refq4.use_backend("recorder"):
        y = layer(strided)
    with torch.no_grad(), refq4.use_backend("reference"):
        assert torch.equal(y, layer(x))
    assert y.shape == (*shape[:-1], 8)


@pytest.mark.parametrize("own_layout", [False, True], ids=["canonical layout", "own layout"])
def test_a_single_number_and_no_number_are_products_too(recorder, own_layout):
    recorder.own_layout = own_layout
    layer = refq4.nn.LinearNF4(1, 4).to("cpu").eval()
    with torch.no_grad(), refq4.use_backend("recorder"):
        with nullcontext() if own_layout else pytest.warns(UserWarning, match="in_features 1 is not a multiple"):
            y = layer(torch.full((1, 1), 3.0))
        assert layer(torch.empty(0, 1)).shape == (0, 4)
    weight = F.dequantize_4bit(layer.weight.stored(), layer.weight.quant_state)
    assert torch.equal(y, torch.nn.functional.linear(torch.full((1, 1), 3.0), weight.view(4, 1), layer.bias))


def test_scales_that_are_not_contiguous_are_made_so(recorder):
    B, state = F.quantize_4bit(A, quant_type="nf4")
    wanted = F.dequantize_4bit(B, state)
    state.absmax = torch.stack([state.absmax, state.absmax], dim=1)[:, 0]
    packed = torch.stack([B, B], dim=-1)[..., 0]
    assert not state.absmax.is_contiguous()
    x = torch.randn(3, 128)
    assert torch.equal(F.dequantize_4bit(packed, state, backend="recorder"), wanted)
    y = F.matmul_4bit(x, packed, state, backend="recorder")
    assert torch.equal(y, torch.nn.functional.linear(x, wanted))


# --- gradients and vmap -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [(), (3,), (2, 3)], ids=str)
def test_a_bias_per_batch_entry_is_added_to_its_own_entry(tokens):
    B, state = F.quantize_4bit(A, quant_type="nf4")
    weight = F.dequantize_4bit(B, state)
    x, bias = torch.randn(5, *tokens, 128), torch.randn(5, 8)
    got = torch.func.vmap(lambda a, b: F.matmul_4bit(a, B, state, bias=b))(x, bias)
    wanted = torch.stack([torch.nn.functional.linear(a, weight, b) for a, b in zip(x, bias, strict=True)])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_raw_op_adds_a_bias_per_batch_entry_to_its_own_entry():
    B, state = F.quantize_4bit(A, quant_type="nf4")
    weight, decoded = state.packed_weight(B), F.dequantize_4bit(B, state)
    x, bias = torch.randn(5, 2, 3, 128), torch.randn(5, 8)
    got = torch.func.vmap(lambda a, b: dispatch.product("gemm_4bit", a, weight, b, "reference"))(x, bias)
    wanted = torch.stack([torch.nn.functional.linear(a, decoded, b) for a, b in zip(x, bias, strict=True)])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_bias_gradient_has_the_biass_shape_and_dtype_before_autograd_could_mend_it():
    ctx = SimpleNamespace(op="gemm_4bit", bias_dtype=torch.bfloat16)
    for shape, tokens in (((8,), 1), ((3, 8), 3), ((2, 3, 8), 6)):
        _, grad = autograd._gradients(ctx, torch.ones(shape), False, True)
        assert torch.equal(grad, torch.full((8,), float(tokens), dtype=torch.bfloat16))


# --- devices and kernels ----------------------------------------------------------------------------------------------


def test_the_weight_alone_goes_to_cuda_or_says_that_there_is_none():
    weight = refq4.nn.Params4bit(A.clone(), quant_type="nf4")
    if torch.cuda.is_available():
        assert weight.cuda().is_cuda
    else:
        with pytest.raises((AssertionError, RuntimeError)):
            weight.cuda()


def test_the_tables_of_a_codebook_are_ordinary_tensors_even_if_inference_asked_first():
    codebooks._code_on.cache_clear()
    with torch.inference_mode():
        book = codebooks.get_codebook("af4").on("cpu")
    assert not any(t.is_inference() for t in book)
    assert [t.dtype for t in book] == [torch.float32, torch.float32, torch.uint8]


def test_the_reference_names_what_it_does():
    named = {op: ReferenceBackend().kernel(Call(op, "cpu", torch.float32, 1, 1, 64, 64, "nf4")) for op in OPS}
    products = dict.fromkeys(("gemv_4bit", "gemm_4bit"), "dequantize + linear")
    assert named == dict.fromkeys(OPS, "PyTorch") | products


def test_a_name_like_no_other_gets_the_list_and_no_suggestion():
    with pytest.raises(refq4.UnknownBackendError, match=r"^unknown backend 'zzzzzz'\. Known: "):
        refq4.set_backend("zzzzzz")
