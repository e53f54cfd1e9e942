"""What holds for all inputs: hypothesis looks for one for which it doesn't, and shrinks it."""

from __future__ import annotations

import itertools

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import refq4.functional as F
from refq4 import layout
from refq4.codebooks import Codebook, codebook_names, get_codebook
from refq4.reference import ReferenceBackend
from refq4.state import BLOCKSIZES
from refq4.testing import assert_same_bits

NAMES = codebook_names()
HAS_UNIT = [n for n in NAMES if {-1.0, 1.0} <= set(get_codebook(n).values)]  # both ends decode exactly

blocksizes = st.sampled_from(BLOCKSIZES[:4])
names = st.sampled_from(NAMES)
# away from fp32's ends, so that products of powers of two below stay normal
numbers = st.one_of(st.just(0.0), st.floats(2.0**-30, 2.0**30, width=32), st.floats(-(2.0**30), -(2.0**-30), width=32))
weights = hnp.arrays(np.float32, st.integers(1, 300), elements=numbers).map(torch.from_numpy)


def quantise(A: torch.Tensor, name: str, blocksize: int, nested: bool = False):
    return F.quantize_4bit(A, quant_type=name, blocksize=blocksize, compress_statistics=nested)


def codes_of(A: torch.Tensor, name: str, blocksize: int = 32) -> torch.Tensor:
    packed, _ = quantise(A, name, blocksize)
    return layout.unpack(packed.view(-1), A.numel())


def plainly(A: torch.Tensor, book: Codebook, blocksize: int) -> tuple[list[int], list[float]]:
    """The definition, one number at a time in Python, sharing no code with the reference but the codebook."""
    codes, scales = [], []
    for block in A.reshape(-1).split(blocksize):
        absmax = np.float32(max(abs(np.float32(x)) for x in block.tolist()))
        with np.errstate(all="ignore"):
            inverse = np.float32(1) / absmax
        inverse = inverse if np.isfinite(inverse) else np.float32(0)
        scaled = [float(np.clip(np.float32(x) * inverse, np.float32(-1), np.float32(1))) for x in block.tolist()]
        codes += book.encode(scaled)
        scales.append(float(absmax))
    return codes, scales


# --- quantise and decode ----------------------------------------------------------------------------------------------


@given(weights, names, blocksizes)
def test_codes_and_scales_are_those_of_the_definition(A, name, blocksize):
    packed, state = quantise(A, name, blocksize)
    codes, scales = plainly(A, get_codebook(name), blocksize)
    assert layout.unpack(packed.view(-1), A.numel()).tolist() == codes
    assert state.absmax.tolist() == scales


@pytest.mark.parametrize("name", NAMES)
def test_weights_at_a_threshold_are_scaled_by_the_reciprocal_not_divided(name):
    """Both roundings of x / absmax differ by a unit in the last place at most, so only weights that scale to within
    one of a threshold can tell them apart: for 200 scales, each threshold's neighbours are quantised."""
    book = get_codebook(name)
    scales = torch.rand(200, generator=torch.Generator().manual_seed(0)) + 1.0
    near = scales.unsqueeze(1) * torch.tensor(book.thresholds)
    A = torch.cat(
        [scales.unsqueeze(1), near, near.nextafter(torch.tensor(-9.0)), torch.zeros(200, 33)], dim=1
    )  # [200, 64]
    codes, _ = plainly(A, book, 64)
    divided = book.encode((A / scales.unsqueeze(1)).clamp(-1, 1).view(-1).tolist())
    assert sum(a != b for a, b in zip(codes, divided, strict=True)) > 50  # the weights do tell the two apart
    assert codes_of(A, name, 64).tolist() == codes


@given(weights, st.lists(st.floats(-1, 1, width=32), min_size=16, max_size=16), blocksizes)
def test_any_sixteen_values_make_a_codebook(A, values, blocksize):
    book = Codebook("any", values)
    packed, absmax = ReferenceBackend().quantize_4bit(A, book.on("cpu"), blocksize)
    codes, scales = plainly(A, book, blocksize)
    assert layout.unpack(packed, A.numel()).tolist() == codes
    assert absmax.tolist() == scales


@given(weights, names, blocksizes)
def test_decoding_is_code_times_scale_rounded_once(A, name, blocksize):
    packed, state = quantise(A, name, blocksize)
    codes, scales = plainly(A, get_codebook(name), blocksize)
    values = get_codebook(name).values
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state.dtype = dtype
        exact = [np.float32(values[c]) * np.float32(scales[i // blocksize]) for i, c in enumerate(codes)]
        assert_same_bits(F.dequantize_4bit(packed, state), torch.tensor(np.array(exact)).to(dtype))


@given(
    st.binary(max_size=70).map(lambda b: torch.tensor([*b], dtype=torch.uint8)), st.sampled_from(layout.STORAGE_DTYPES)
)
def test_storage_holds_the_bytes_in_their_order_and_then_zeros(packed, dtype):
    stored = layout.to_storage(packed, dtype)
    held = stored.view(-1).view(torch.uint8).tolist()
    assert stored.dtype == dtype
    assert stored.shape == (-(-packed.numel() // dtype.itemsize), 1)
    assert held == packed.tolist() + [0] * (-packed.numel() % dtype.itemsize)


@given(weights, st.sampled_from(HAS_UNIT), blocksizes)
def test_a_decoded_tensor_quantises_to_itself(A, name, blocksize):
    """Idempotence. The largest element decodes to exactly +-absmax where the codebook has both +1 and -1, so a decoded
    block has the same scale again; its values are then code * absmax, which scale back to within an fp32 rounding of
    the code, far from any threshold."""
    packed, state = quantise(A, name, blocksize)
    decoded = F.dequantize_4bit(packed, state)
    again, state_again = quantise(decoded, name, blocksize)
    assert_same_bits(state_again.absmax, state.absmax)
    assert_same_bits(F.dequantize_4bit(again, state_again).abs(), decoded.abs())
    assert_same_bits(F.dequantize_4bit(again, state_again) + 0.0, decoded + 0.0)  # the two zeros of fp4 are one


@given(weights, names, blocksizes, st.integers(-40, 40))
def test_a_power_of_two_changes_scales_and_nothing_else(A, name, blocksize, exponent):
    """Scale invariance: multiplying by 2**n is exact, so it moves to absmax, away from overflow and subnormals."""
    packed, state = quantise(A, name, blocksize)
    scaled, scaled_state = quantise(A * 2.0**exponent, name, blocksize)
    assert_same_bits(scaled, packed)
    assert_same_bits(scaled_state.absmax, state.absmax * 2.0**exponent)


@given(weights, names)
def test_within_a_block_a_larger_weight_never_decodes_to_a_smaller_number(A, name):
    A = A[:32]
    decoded = F.dequantize_4bit(*quantise(A, name, 32))
    assert (decoded[A.argsort(stable=True)].diff() >= 0).all()


@given(weights, names, blocksizes)
def test_the_error_is_at_most_half_the_widest_gap_times_absmax(A, name, blocksize):
    """Plus two fp32 roundings of scaling, and the short ends: iq4nl stops at 113/127, below absmax."""
    book = get_codebook(name)
    ordered = sorted(book.values)
    gaps = [(b - a) / 2 for a, b in itertools.pairwise(ordered)]
    bound = max(*gaps, 1 - ordered[-1], 1 + ordered[0])
    packed, state = quantise(A, name, blocksize)
    scales = state.absmax.repeat_interleave(blocksize)[: A.numel()]
    error = (F.dequantize_4bit(packed, state).double() - A.double()).abs()
    assert (error <= scales.double() * (bound + 4e-7)).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_threshold_is_held_from_both_sides(name):
    """At a threshold the lower code, one fp32 step above it the upper. Next to a 1.0, a scaled value is itself."""
    book = get_codebook(name)
    thresholds = torch.tensor(book.thresholds)
    above = torch.nextafter(thresholds, torch.tensor(float("inf")))
    for side, ranks in ((thresholds, range(15)), (above, range(1, 16))):
        for x, rank in zip(side.tolist(), ranks, strict=True):
            expected = max(r for r in range(16) if r == 0 or book.thresholds[r - 1] < x)
            assert expected == rank or book.thresholds[rank - 1 : rank + 1].count(book.thresholds[rank - 1]) > 1
            block = torch.tensor([1.0, x] + [0.0] * 30)
            assert int(codes_of(block, name)[1]) == book.order[expected], (name, x)


# --- bytes ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 15), max_size=70), st.sampled_from(layout.STORAGE_DTYPES), st.booleans())
def test_packing_and_storing_round_trip(codes, dtype, transposed):
    packed = layout.pack(torch.tensor(codes, dtype=torch.uint8), pad_code=7)
    stored = layout.to_storage(packed, dtype)
    assert stored.shape == (-(-packed.numel() // dtype.itemsize), 1)
    back = layout.from_storage(stored.t() if transposed else stored, len(codes))
    assert layout.unpack(back, len(codes)).tolist() == codes
    if len(codes) % 2:
        assert int(packed[-1]) & 15 == 7


def test_the_first_of_a_pair_is_in_the_high_nibble():
    assert layout.pack(torch.tensor([1, 2], dtype=torch.uint8), 0).tolist() == [0x12]


@given(weights, names, st.sampled_from(layout.STORAGE_DTYPES))
def test_the_storage_dtype_changes_no_bit(A, name, dtype):
    plain, state = quantise(A, name, 64)
    stored, other = F.quantize_4bit(A, quant_type=name, quant_storage=dtype)
    assert stored.dtype == dtype
    assert_same_bits(layout.from_storage(stored, A.numel()), plain.view(-1))
    assert_same_bits(F.dequantize_4bit(stored, other), F.dequantize_4bit(plain, state))


@given(weights, names)
def test_an_odd_tail_is_padded_with_the_code_of_zero(A, name):
    assume(A.numel() % 2)
    packed, _ = quantise(A, name, 64)
    assert int(packed[-1, 0]) & 15 == get_codebook(name).encode([0.0])[0]


# --- the 8-bit stage --------------------------------------------------------------------------------------------------


@given(weights, st.sampled_from([32, 256, 4096]))
def test_the_8_bit_stage_takes_the_exactly_nearest_entry_and_a_tie_goes_down(A, blocksize):
    q, state = F.quantize_blockwise(A, blocksize=blocksize)
    table = F.create_dynamic_map().double()
    for codes, block, absmax in zip(q.split(blocksize), A.split(blocksize), state.absmax, strict=True):
        scaled = (block * (1 / absmax) if absmax else block * 0).clamp(-1, 1).double()
        distance = (scaled.unsqueeze(1) - table).abs()
        assert_same_bits(codes, distance.argmin(dim=1).to(torch.uint8))


@given(weights)
def test_8_bits_decode_to_table_times_scale(A):
    q, state = F.quantize_blockwise(A, blocksize=64)
    scales = state.absmax.repeat_interleave(64)[: A.numel()]
    assert_same_bits(F.dequantize_blockwise(q, state), F.create_dynamic_map()[q.long()] * scales)


@given(weights)
def test_double_quantisation_is_the_mean_taken_off_8_bits_and_the_mean_put_back(A):
    _, plain = quantise(A, "nf4", 32)
    packed, nested = quantise(A, "nf4", 32, nested=True)
    assert_same_bits(nested.offset, plain.absmax.mean())
    q, second = F.quantize_blockwise(plain.absmax - plain.absmax.mean(), blocksize=256)
    assert_same_bits(nested.absmax, q)
    assert nested.state2 == second
    scales = F.dequantize_blockwise(q, second) + nested.offset
    plain.absmax = scales
    assert_same_bits(F.dequantize_4bit(packed, nested), F.dequantize_4bit(packed, plain))


# --- pieces and shapes ------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 5), st.booleans(), st.sampled_from([32, 64]))
def test_pieces_decode_to_the_rows_of_the_whole(pieces, rows, nested, blocksize):
    import refq4

    weight = torch.randn(pieces * rows, 64, generator=torch.Generator().manual_seed(rows))
    whole = refq4.nn.Params4bit(weight, quant_type="nf4", blocksize=blocksize, compress_statistics=nested).to("cpu")
    decoded = F.dequantize_4bit(whole, whole.quant_state)
    for piece, wanted in zip(torch.chunk(whole, pieces), decoded.split(rows), strict=True):
        assert_same_bits(F.dequantize_4bit(piece, piece.quant_state), wanted)


@given(st.lists(st.integers(0, 7), max_size=4), names, st.booleans())
def test_any_shape_is_read_flat_and_comes_back_in_shape(shape, name, nested):
    A = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    packed, state = quantise(A, name, 32, nested)
    flat, flat_state = quantise(A.reshape(-1), name, 32, nested)
    assert_same_bits(packed, flat)
    decoded = F.dequantize_4bit(packed, state)
    assert decoded.shape == A.shape
    assert_same_bits(decoded.reshape(-1), F.dequantize_4bit(flat, flat_state))
