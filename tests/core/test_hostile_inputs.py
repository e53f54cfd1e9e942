"""Inputs that must not crash, corrupt anything, or be silently wrong."""

from __future__ import annotations

import copy
import threading
from functools import partial

import pytest
import torch
from loopback import Loopback
from threads import faults_of
from torch import nn

import refq4
import refq4.functional as F
from refq4 import layout
from refq4.codebooks import codebook_names, get_codebook
from refq4.testing import assert_same_bits, assert_within_budget

NESTED = pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "double quantisation"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def packed(n: int = 8, k: int = 64, nested: bool = False, **settings):
    return F.quantize_4bit(torch.randn(n, k), quant_type="nf4", compress_statistics=nested, **settings)


def nan_at(*index: int, value: float = float("nan"), n: int = 8, k: int = 64) -> torch.Tensor:
    weight = torch.randn(n, k)
    weight[index] = value
    return weight


# --- shapes -----------------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="has 8 fp32 scales, got"):
        F.dequantize_4bit(B, absmax=torch.ones(7), out=torch.empty(8, 64))
    with pytest.raises(ValueError, match="needs state="):
        F.gemv_4bit(torch.randn(1, 64), B)
    with pytest.raises(TypeError, match="quant_state must be the QuantState"):
        F.matmul_4bit(torch.randn(1, 64), B, None)
    with pytest.raises(ValueError, match="wants a weight of two dimensions"):
        F.matmul_4bit(torch.randn(1, 64), *F.quantize_4bit(torch.randn(2, 2, 64)))
    with pytest.raises(ValueError, match="packs into 256 uint8 elements"):
        F.matmul_4bit(torch.randn(1, 64), B[:-1], state)
    with pytest.raises(ValueError, match=r"bias has shape \[9\]"):
        F.matmul_4bit(torch.randn(1, 64), B, state, bias=torch.zeros(9))
    with pytest.raises(ValueError, match="A is on cpu, the weight's quant_state on meta"):
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


def test_nested_8_bit_states_and_foreign_codes_round_trip():
    x = torch.randn(10_000)
    q, state = F.quantize_blockwise(x, blocksize=64, nested=True)
    assert state.nested
    assert float((F.dequantize_blockwise(q, state) - x).abs().max()) < 0.1
    code = torch.linspace(-1, 1, 17)
    q, state = F.quantize_blockwise(torch.linspace(-1, 1, 17), code=code, blocksize=32)
    assert q.tolist() == list(range(17))
    assert_same_bits(F.dequantize_blockwise(q, absmax=state.absmax, code=code, blocksize=32), code)


# --- NaN, infinity, zero, overflow ------------------------------------------------------------------------------------


@NESTED
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_infinity_in_a_weight_are_refused_with_the_place(value, nested):
    weight = nan_at(3, 5, value=value)
    with pytest.raises(
        ValueError, match=r"has a NaN or an infinity: 1 of 8 blocks of 64 .* block 3 \(elements 192 to 255"
    ):
        F.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    with pytest.raises(ValueError, match="NaN or an infinity"):
        refq4.nn.Params4bit(weight, compress_statistics=nested).to("cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_allowed_nan_and_infinity_spoil_their_block_and_no_other(value, name):
    weight = nan_at(3, 5, value=value)
    decoded = F.dequantize_4bit(*F.quantize_4bit(weight, quant_type=name, allow_nonfinite=True))
    clean = weight.clone()
    clean[3] = 0
    rest = F.dequantize_4bit(*F.quantize_4bit(clean, quant_type=name))
    keep = [row for row in range(8) if row != 3]
    assert_same_bits(decoded[keep], rest[keep])
    assert not decoded[3].isfinite().all()


@pytest.mark.parametrize("name", codebook_names())
def test_an_allowed_nan_stores_the_code_of_the_lowest_value_and_its_neighbours_that_of_zero(name):
    book = get_codebook(name)
    for value in (float("nan"), float("inf")):
        weight = nan_at(0, 5, value=value, n=1)
        B, _ = F.quantize_4bit(weight, quant_type=name, allow_nonfinite=True)
        codes = layout.unpack(B.view(-1), 64).tolist()
        assert codes.pop(5) == book.order[0]
        assert set(codes) == {book.on("cpu").zero_code()}


def test_allowed_nan_with_double_quantisation_spoils_everything_and_says_so():
    with pytest.warns(UserWarning, match="every element will decode to NaN"):
        B, state = F.quantize_4bit(nan_at(3, 5), quant_type="nf4", compress_statistics=True, allow_nonfinite=True)
    assert F.dequantize_4bit(B, state).isnan().all()


@pytest.mark.parametrize("tokens", [1, 3])
def test_nan_in_an_activation_stays_in_its_token(tokens):
    B, state = packed()
    x = torch.randn(tokens, 64)
    x[0, 7] = float("nan")
    y = F.matmul_4bit(x, B, state)
    assert y[0].isnan().all()
    assert y[1:].isfinite().all()


@NESTED
@pytest.mark.parametrize("name", ["nf4", "fp4", "e2m1", "int4", "af4"])
def test_an_all_zero_block_decodes_to_zero(name, nested):
    weight = torch.randn(8, 64)
    weight[2] = 0
    weight[3] = -0.0
    B, state = F.quantize_4bit(weight, quant_type=name, compress_statistics=nested)
    decoded = F.dequantize_4bit(B, state)
    assert (decoded[2:4] == 0).all()
    assert (decoded[4:] != 0).any(dim=1).all()
    assert (
        F.dequantize_4bit(*F.quantize_4bit(torch.zeros(8, 64), quant_type=name, compress_statistics=nested)) == 0
    ).all()


@pytest.mark.parametrize("tiny", [2.0**-149, 2.0**-130, 2.0**-128], ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_a_block_whose_reciprocal_overflows_decodes_to_zero(tiny, name):
    B, state = F.quantize_4bit(torch.full((1, 64), -tiny), quant_type=name)
    assert float(state.absmax) == tiny
    assert (F.dequantize_4bit(B, state) == 0).all()


def test_the_smallest_block_with_a_finite_reciprocal_decodes_to_itself():
    weight = torch.full((1, 64), 2.0**-126)
    assert_same_bits(F.dequantize_4bit(*F.quantize_4bit(weight, quant_type="nf4")), weight)


@pytest.mark.reference_only("an engine whose weights stay fp32 has no overflow there")
def test_fp16_overflow_is_what_a_plain_fp16_linear_gives():
    weight = torch.full((4, 64), 60000.0, dtype=torch.bfloat16)
    weight[1] = 1e6  # beyond fp16 altogether
    B, state = F.quantize_4bit(weight, quant_type="nf4")
    x = torch.ones(2, 64, dtype=torch.float16)
    x[1] = 0
    y = F.matmul_4bit(x, B, state)
    state.dtype = torch.float32
    wanted = nn.functional.linear(x, F.dequantize_4bit(B, state).half())
    assert_same_bits(y.isnan(), wanted.isnan())
    assert_same_bits(y.isinf(), wanted.isinf())
    assert y[0].isinf().all()
    assert y[1, 1].isnan()


def test_the_largest_fp32_weights_quantise():
    huge = torch.finfo(torch.float32).max
    weight = torch.tensor([[huge, -huge, huge / 2, 0.0] * 16])
    decoded = F.dequantize_4bit(*F.quantize_4bit(weight, quant_type="nf4"))
    assert_same_bits(decoded[0, :2], weight[0, :2])
    assert decoded.isfinite().all()


# --- sharing, copying, switching --------------------------------------------------------------------------------------


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


@pytest.mark.reference_only("it compares bits of backends that share their arithmetic")
def test_threads_share_a_layer_while_another_switches_backends():
    refq4.register_backend(Loopback(own_layout=True))
    layer = refq4.nn.LinearNF4(64, 8).to("cpu").eval()
    inputs = [torch.randn(1 + i % 3, 64) for i in range(8)]
    with torch.no_grad():
        wanted = [layer(x) for x in inputs]

    def work(x: torch.Tensor, y: torch.Tensor) -> None:
        with torch.no_grad():
            for _ in range(100):
                if not torch.equal(layer(x), y):
                    raise ValueError("another result")

    def switch(done: threading.Event) -> None:
        while not done.is_set():
            for name in ("loopback", "reference", "auto"):
                refq4.set_backend(name)

    jobs = [partial(work, *pair) for pair in zip(inputs, wanted, strict=True)]
    assert faults_of(jobs, meanwhile=switch) == []


def test_switching_the_backend_between_two_calls_keeps_the_result():
    own = refq4.register_backend(Loopback(own_layout=True))
    layer, x = refq4.nn.LinearNF4(64, 8).to("cpu").eval(), torch.randn(3, 64)
    with torch.no_grad():
        results = []
        for name in ("reference", "loopback", "reference", "loopback"):
            refq4.set_backend(name)
            results.append(layer(x))
    assert own.seen["prepared product"] == 2
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_deepcopy_before_or_after_quantising_is_independent(when):
    layer = refq4.nn.LinearNF4(64, 8)
    if when == "after":
        layer.to("cpu")
    twin = copy.deepcopy(layer).to("cpu")
    layer.to("cpu")
    x = torch.randn(3, 64)
    assert_same_bits(twin(x).detach(), layer(x).detach())
    with torch.no_grad():
        twin.weight.zero_()
    assert not torch.equal(twin(x), layer(x))


def test_an_interrupt_while_a_model_is_quantised_leaves_it_usable():
    class Interrupted(Loopback):
        def quantize_4bit(self, *args):
            quantised = super().quantize_4bit(*args)
            if self.seen["quantize_4bit"] == 2:  # Ctrl-C while the second layer is under way
                raise KeyboardInterrupt
            return quantised

    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    before = copy.deepcopy(model)
    refq4.register_backend(Interrupted())
    try:
        with refq4.use_backend("loopback"), pytest.raises(KeyboardInterrupt):
            refq4.quantize_model(model, progress=False)
    finally:
        refq4.unregister_backend("loopback")
    assert [type(layer).__name__ for layer in model] == ["Linear4bit", "Linear", "Linear"]
    for layer, untouched in zip(model[1:], before[1:], strict=True):
        assert_same_bits(layer.weight.detach(), untouched.weight.detach())
    x = torch.randn(2, 64)
    assert model(x).isfinite().all()
    refq4.quantize_model(model, progress=False)  # again: what was left
    whole = refq4.quantize_model(before, progress=False)
    assert_same_bits(model(x), whole(x))
