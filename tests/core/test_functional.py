"""The functions: the shapes and strides that they take, what they refuse and how, what they write and leave alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import refq4
import refq4.functional as F
from refq4.backend import Backend
from refq4.testing import assert_same_bits, assert_within_budget

NESTED = pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "double quantisation"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
A = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))


def packed(n: int = 8, k: int = 64, nested: bool = False, **settings):
    return F.quantize_4bit(torch.randn(n, k), quant_type="nf4", compress_statistics=nested, **settings)


# --- shapes and codes -------------------------------------------------------------------------------------------------


@NESTED
@DTYPES
@pytest.mark.parametrize("k", [1, 3, 33, 63, 65, 96, 127, 200], ids=lambda k: f"K={k}")
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.filterwarnings("ignore:in_features")
def test_any_k_works_even_or_odd_whatever_the_blocksize(k, tokens, dtype, nested):
    B, state = packed(7, k, nested)
    x = torch.randn(tokens, k, dtype=dtype)
    assert_within_budget(F.matmul_4bit(x, B, state), x, B, state)


@pytest.mark.parametrize("n", [1, 2, 31, 33, 50], ids=lambda n: f"N={n}")
def test_any_n_works(n):
    B, state = packed(n)
    x, bias = torch.randn(3, 64), torch.randn(n)
    assert_within_budget(F.matmul_4bit(x, B, state, bias=bias), x, B, state, bias)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)], ids=str)
def test_an_empty_batch_gives_an_empty_result(shape):
    layer = refq4.nn.LinearNF4(64, 8).to("cpu")
    for mode in (layer.train(), layer.eval()):
        assert mode(torch.randn(shape)).shape == (*shape[:-1], 8)


@pytest.mark.parametrize(
    "view",
    [lambda x: x.t().contiguous().t(), lambda x: torch.randn(6, 64)[::2], lambda x: torch.randn(3, 128)[:, ::2],
     lambda x: torch.randn(64).expand(3, 64), lambda x: torch.randn(4, 3, 64).transpose(0, 1),
     lambda x: torch.randn(1, 128)[:, 64:]],
    ids=["transposed", "every second row", "every second column", "expanded", "3-D transposed", "the second half"],
)  # fmt: skip
def test_activations_of_any_strides_work_and_are_left_alone(view):
    B, state = packed()
    x = view(torch.randn(3, 64))
    before = x.clone()
    assert_within_budget(F.matmul_4bit(x, B, state), x, B, state)
    assert_same_bits(x, before)


def test_packed_weights_of_any_strides_work_and_are_left_alone():
    B, state = packed()
    x = torch.randn(3, 64)
    wide = torch.stack([B, torch.full_like(B, 0xAB)], dim=1)  # every second byte is another's
    sliced = wide[:, 0]
    assert not sliced.is_contiguous()
    for stored in (sliced, sliced.t(), torch.cat([B, B])[len(B) :]):
        assert_within_budget(F.matmul_4bit(x, stored, state), x, B, state)
        assert_same_bits(F.dequantize_4bit(stored.reshape(-1, 1), state), F.dequantize_4bit(B, state))
    assert (wide[:, 1] == 0xAB).all()


def test_weights_of_any_strides_quantise_as_their_contiguous_copies():
    for weight in (
        torch.randn(64, 8).t(),
        torch.randn(16, 64)[::2],
        torch.randn(8, 128)[:, 1::2],
        torch.ones(64).expand(8, 64),
    ):
        mine, state = F.quantize_4bit(weight, quant_type="nf4")
        theirs, wanted = F.quantize_4bit(weight.contiguous(), quant_type="nf4")
        assert_same_bits(mine, theirs)
        assert state == wanted


@NESTED
@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 64), (2, 3, 5), (0,), (4, 0), (2, 2, 2, 9)], ids=str)
def test_any_shape_quantises_and_comes_back_in_shape(shape, nested):
    A = torch.randn(shape)
    B, state = F.quantize_4bit(A, quant_type="nf4", compress_statistics=nested)
    decoded = F.dequantize_4bit(B, state)
    assert decoded.shape == A.shape
    assert decoded.isfinite().all()


def test_a_single_packed_byte_is_not_taken_for_a_transposed_row():
    B, state = F.quantize_4bit(torch.tensor([[1.0, -1.0]]), quant_type="nf4")
    assert B.shape == (1, 1)
    assert_same_bits(F.dequantize_4bit(B, state), torch.tensor([[1.0, -1.0]]))


def test_nested_8_bit_states_and_foreign_codes_round_trip():
    x = torch.randn(10_000)
    q, state = F.quantize_blockwise(x, blocksize=64, nested=True)
    assert state.nested
    assert float((F.dequantize_blockwise(q, state) - x).abs().max()) < 0.1
    code = torch.linspace(-1, 1, 17)
    q, state = F.quantize_blockwise(torch.linspace(-1, 1, 17), code=code, blocksize=32)
    assert q.tolist() == list(range(17))
    assert_same_bits(F.dequantize_blockwise(q, absmax=state.absmax, code=code, blocksize=32), code)


# --- defaults, and the meta device ------------------------------------------------------------------------------------


@pytest.mark.reference_only("what it checks is the same for every backend")
def test_what_is_not_said_is_plain_scales_a_shape_of_torch_and_the_lowest_priority():
    for quantize in (F.quantize_4bit, F.quantize_nf4, F.quantize_fp4):
        assert not quantize(A)[1].nested
    assert isinstance(F.QuantState(torch.ones(16), shape=[8, 128]).shape, torch.Size)
    assert Backend.priority == 1


@pytest.mark.reference_only("what it checks is the same for every backend")
def test_what_is_made_on_meta_is_there_with_its_tables():
    packed, state = F.quantize_4bit(A.to("meta"), quant_type="nf4")
    assert all(t.is_meta for t in (packed, state.absmax, state.code))
    assert F.get_4bit_type("nf4", device="meta").is_meta


# --- what is refused, and how -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 65), (3, 63), (1, 1), (65,)], ids=str)
def test_a_wrong_last_dimension_is_refused_with_both_shapes(shape):
    layer = refq4.nn.LinearNF4(64, 8).to("cpu")
    with pytest.raises(ValueError, match=r"the weight is \[N, K\] = \[8, 64\]: A's last dimension must be 64"):
        layer(torch.randn(shape))
    B, state = packed()
    with pytest.raises(ValueError, match="must be 64"):
        F.gemv_4bit(torch.randn(shape), B, state=state)


def test_a_scalar_activation_is_refused():
    B, state = packed(1, 1)
    with pytest.raises(ValueError, match="last dimension"):
        F.matmul_4bit(torch.tensor(1.0), B, state)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64], ids=str)
def test_activations_that_are_no_floats_are_refused(dtype):
    layer = refq4.nn.LinearNF4(64, 8).to("cpu")
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(TypeError, match=rf"must be a tensor of float32.*got {name} \[2, 64\]; cast it first"):
        layer(torch.ones(2, 64, dtype=dtype))
    B, state = packed()
    with pytest.raises(TypeError, match="cast it first"):
        F.matmul_4bit(torch.ones(2, 64, dtype=dtype), B, state)


def test_fp64_activations_take_the_exact_path():
    layer = refq4.nn.LinearNF4(64, 8, bias=False).to("cpu")
    x = torch.randn(3, 64, dtype=torch.float64)
    y = layer(x)
    assert y.dtype == torch.float64
    assert_same_bits(y, nn.functional.linear(x, F.dequantize_4bit(layer.weight, layer.quant_state).double()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_weights_of_another_dtype_are_refused(dtype):
    for quantise in (F.quantize_4bit, F.quantize_blockwise):
        with pytest.raises(TypeError, match="A must be a tensor of float32, float16, bfloat16, got"):
            quantise(torch.ones(64).to(dtype))
    with pytest.raises(TypeError, match=r"got \[1.0, 2.0\]"):
        F.quantize_4bit([1.0, 2.0])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"blocksize": 48}, r"blocksize must be one of \[32, 64, .*4096\], got 48"),
        ({"blocksize": 16}, "got 16"),
        ({"blocksize": 8192}, "got 8192"),
        ({"quant_type": "nf44"}, "unknown quant_type 'nf44'; did you mean 'nf4'"),
        (
            {"quant_storage": torch.int32},
            "quant_storage must be one of uint8, bfloat16, float16, float32, got torch.int32",
        ),
        ({"out": torch.empty(31, 1, dtype=torch.uint8)}, r"out= must be uint8 \[32, 1\] on cpu, got uint8 \[31, 1\]"),
        ({"out": torch.empty(32, 1)}, r"got float32 \[32, 1\]"),
        ({"absmax": torch.empty(2)}, r"absmax= must be float32 \[1\]"),
        ({"absmax": torch.empty(1), "compress_statistics": True}, r"absmax= must be uint8 \[1\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_settings_say_what_was_given_and_what_is_wanted(settings, says):
    given = {k: v.clone() for k, v in settings.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(ValueError, match=says):
        F.quantize_4bit(torch.randn(64), **{"quant_type": "nf4"} | settings)
    for key, value in given.items():
        assert_same_bits(settings[key], value, "what is refused is not written to")


def test_a_missing_state_or_scale_is_named():
    B, state = packed()
    with pytest.raises(ValueError, match="needs a quant_state, or absmax and out together"):
        F.dequantize_4bit(B)
    with pytest.raises(ValueError, match="needs 8 float32 elements in absmax"):
        F.dequantize_4bit(B, absmax=torch.ones(7), out=torch.empty(8, 64))
    with pytest.raises(ValueError, match="needs state="):
        F.gemv_4bit(torch.randn(1, 64), B)
    with pytest.raises(TypeError, match="quant_state must be the QuantState"):
        F.matmul_4bit(torch.randn(1, 64), B, None)
    with pytest.raises(ValueError, match="needs a weight of two dimensions"):
        F.matmul_4bit(torch.randn(1, 64), *F.quantize_4bit(torch.randn(2, 2, 64)))
    with pytest.raises(ValueError, match="packs into 256 uint8 elements"):
        F.matmul_4bit(torch.randn(1, 64), B[:-1], state)
    with pytest.raises(ValueError, match=r"bias has shape \[9\]"):
        F.matmul_4bit(torch.randn(1, 64), B, state, bias=torch.zeros(9))
    with pytest.raises(ValueError, match="A is on cpu, the weight on meta"):
        F.matmul_4bit(torch.randn(1, 64), B, state.copy().to("meta"))
    with pytest.raises(ValueError, match="quant_state or absmax"):
        F.dequantize_blockwise(torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(TypeError, match="decodes uint8 codes"):
        F.dequantize_blockwise(torch.zeros(4), absmax=torch.ones(1))
    with pytest.raises(ValueError, match="has no code or no blocksize"):
        F.dequantize_blockwise(torch.zeros(4, dtype=torch.uint8), F.QuantState(torch.ones(1)))
    with pytest.raises(ValueError, match="code must be fp32"):
        F.quantize_blockwise(torch.ones(4), code=torch.zeros(300))
    with pytest.raises(NotImplementedError, match="unknown quant_type"):
        F.get_4bit_type("nf44")
    with pytest.raises(NotImplementedError, match="blocks of 64"):
        F.get_4bit_type("af4", blocksize=128)


@pytest.mark.reference_only("what it checks is the same for every backend")
def test_a_wrong_tensor_to_fill_is_named():
    q, state = F.quantize_blockwise(A, blocksize=64)
    for name, call in {
        "absmax": lambda wrong: F.quantize_blockwise(A, absmax=wrong, blocksize=64),
        "out": lambda wrong: F.quantize_blockwise(A, out=wrong, blocksize=64),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name}= must be"):
            call(torch.zeros(3))
    with pytest.raises(ValueError, match=r"^out= must be"):
        F.dequantize_blockwise(q, state, out=torch.zeros(3))
    B, state = F.quantize_4bit(A, quant_type="nf4")
    with pytest.raises(TypeError, match=r"^A "):
        F.matmul_4bit(torch.ones(3, 128, dtype=torch.int32), B, state)
    with pytest.raises(TypeError, match=r"^A "):
        F.gemv_4bit(torch.ones(1, 128, dtype=torch.int32), B, state=state)


@pytest.mark.reference_only("what it checks is the same for every backend")
def test_what_is_missing_to_decode_is_said():
    B, state = F.quantize_4bit(A, quant_type="nf4")
    for absmax, out in ((state.absmax, None), (None, torch.empty(8, 128)), (None, None)):
        with pytest.raises(ValueError, match="absmax"):
            F.dequantize_4bit(B, None, absmax, out)
    q, blockwise = F.quantize_blockwise(A, blocksize=64)
    for name in ("code", "blocksize"):
        lacking = blockwise.copy()
        setattr(lacking, name, None)
        with pytest.raises(ValueError, match="has no code or no blocksize"):
            F.dequantize_blockwise(q, lacking)


# --- what is written, and what is left alone --------------------------------------------------------------------------


def test_out_and_absmax_are_written_and_used():
    weight = torch.randn(4, 64)
    wanted, wanted_state = F.quantize_4bit(weight, quant_type="nf4")
    out, absmax = torch.empty_like(wanted), torch.empty(4)
    got, state = F.quantize_4bit(weight, absmax, out, quant_type="nf4")
    assert got is out
    assert state.absmax is absmax
    assert_same_bits(out, wanted)
    assert_same_bits(absmax, wanted_state.absmax)
    decoded = torch.empty(4, 64)
    assert F.dequantize_4bit(out, absmax=absmax, out=decoded, quant_type="nf4") is decoded
    assert_same_bits(decoded, F.dequantize_4bit(wanted, wanted_state))
    again = torch.empty(4, 64)
    assert F.dequantize_nf4(out, state, out=again) is again
    assert_same_bits(again, decoded)
    q, _ = F.quantize_blockwise(weight, absmax=torch.empty(1), out=torch.empty(4, 64, dtype=torch.uint8))
    assert_same_bits(q, F.quantize_blockwise(weight)[0])
    y = torch.empty(1, 4)
    assert F.gemv_4bit(torch.randn(1, 64), out, y, state=state) is y


def test_quantising_and_multiplying_never_change_what_they_are_given():
    weight, x, bias = torch.randn(8, 96), torch.randn(3, 96), torch.randn(8)
    before = [t.clone() for t in (weight, x, bias)]
    B, state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    kept, kept_state = B.clone(), copy.deepcopy(state)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        F.matmul_4bit(x.to(dtype), B, state, bias=bias)
    F.dequantize_4bit(B, state)
    for now, then in zip((weight, x, bias), before, strict=True):
        assert_same_bits(now, then)
    assert_same_bits(B, kept)
    assert state == kept_state
