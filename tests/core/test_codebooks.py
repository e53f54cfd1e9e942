"""The sixteen values: derived here, published elsewhere, equal to the last bit; and the rule that picks one."""

from __future__ import annotations

import math

import pytest
import torch

import refq4
import refq4.functional as F
from refq4 import codebooks
from refq4.codebooks import Codebook, code_from_values, codebook_names, create_dynamic_map, get_codebook
from refq4.internals.dynamic_map import _dynamic_map_values
from refq4.internals.rounding import next_below
from refq4.testing import assert_same_bits

NF4_PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
NF4_THRESHOLDS_PUBLISHED = [
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
    -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
    0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
]  # fmt: skip
FP4_PUBLISHED = [0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0]
FP4_PIVOTS_PUBLISHED = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]


@pytest.fixture(autouse=True)
def shelf(monkeypatch):
    """What a test registers is gone afterwards."""
    monkeypatch.setattr(codebooks, "_BOOKS", dict(codebooks._BOOKS))


def fp32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_nf4_is_the_published_table_to_the_last_bit():
    assert_same_bits(fp32(get_codebook("nf4").values), fp32(NF4_PUBLISHED))


def test_nf4_thresholds_are_the_published_ones_to_the_last_bit():
    assert_same_bits(fp32(get_codebook("nf4").thresholds), fp32(NF4_THRESHOLDS_PUBLISHED))


def test_fp4_is_the_published_table_over_12_to_the_last_bit():
    assert_same_bits(fp32(get_codebook("fp4").values), fp32(FP4_PUBLISHED) / 12)


def test_fp4_thresholds_are_the_published_pivots_on_either_side_of_zero():
    thresholds = fp32(get_codebook("fp4").thresholds)
    pivots = fp32(FP4_PIVOTS_PUBLISHED)
    below = torch.nextafter(-pivots.flip(0), fp32(-math.inf))
    just_below_zero = fp32([-(2.0**-149)])
    assert_same_bits(thresholds, torch.cat([below, just_below_zero, pivots]))


def test_the_dynamic_map_has_its_published_landmarks():
    table = create_dynamic_map()
    assert (table.numel(), int((table == 0).sum()), float(table.max())) == (256, 1, 1.0)
    assert table.diff().min() > 0
    assert float(table[0]) == pytest.approx(-0.99296875, abs=1e-7)
    assert float(table[128]) == pytest.approx(5.5e-7, rel=1e-6)
    assert sorted(-table[:127]) == sorted(table[128:255].tolist()), "symmetric but for the 1.0 at the end"


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [({"signed": False}, 255), ({"max_exponent_bits": 5}, 255), ({"total_bits": 6, "max_exponent_bits": 4}, 63)],
    ids=["unsigned", "five decades", "six bits"],
)
def test_other_dynamic_maps_fill_the_rest_with_zeros(settings, numbers):
    table = create_dynamic_map(**settings)
    assert table.numel() == 256
    assert int((table != 0).sum()) == numbers


@pytest.mark.parametrize(("bits", "exponents"), [(9, 7), (1, 1), (4, 7), (8, 0)])
def test_an_impossible_dynamic_map_is_refused(bits, exponents):
    with pytest.raises(ValueError, match=f"total_bits={bits}, max_exponent_bits={exponents}"):
        create_dynamic_map(total_bits=bits, max_exponent_bits=exponents)


def test_the_other_formats_are_what_their_names_say():
    published = {
        "e2m1": (6, [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]),
        "int4": (7, [*range(7, -1, -1), *range(0, -8, -1)]),
        "iq4nl": (127, [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]),
    }
    for name, (unit, values) in published.items():
        assert [round(unit * v, 5) for v in get_codebook(name).values] == values
    assert get_codebook("af4").values[0] == 1.0
    assert get_codebook("af4").values[8] == 0.0


@pytest.mark.reference_only("what it checks is the same for every backend")
def test_tables_are_single_precision_whatever_the_default_is():
    before, single = torch.get_default_dtype(), _dynamic_map_values(True, 7, 8)
    torch.set_default_dtype(torch.float64)
    try:
        assert F.create_dynamic_map(True, 3, 8).dtype == F.get_4bit_type("nf4").dtype == torch.float32
        assert _dynamic_map_values(True, 7, 8) == single
    finally:
        torch.set_default_dtype(before)


# --- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", codebook_names())
def test_every_value_encodes_to_a_code_that_decodes_to_it(name):
    book = get_codebook(name)
    assert [book.values[code] for code in book.encode(book.values)] == list(book.values)


@pytest.mark.parametrize("name", codebook_names())
def test_thresholds_ascend_and_separate_the_sorted_values(name):
    book = get_codebook(name)
    values = [book.values[code] for code in book.order]
    assert values == sorted(book.values)
    for low, threshold, high in zip(values, book.thresholds, values[1:], strict=False):
        assert low <= threshold <= high or threshold == next_below(low) == -(2.0**-149)


@pytest.mark.parametrize(("x", "code"), [(-0.0, 0), (0.0, 0), (1e-30, 0), (-1e-30, 8), (0.0859375, 1), (-0.0859375, 9)])
def test_fp4_takes_the_sign_from_x_below_zero_and_a_tie_to_the_smaller_magnitude(x, code):
    assert get_codebook("fp4").encode([x]) == [code]


def test_nan_is_greater_than_nothing():
    for name in codebook_names():
        book = get_codebook(name)
        assert book.encode([math.nan]) == [book.order[0]]


def test_the_zero_code_is_the_code_of_zero():
    for name in codebook_names():
        book = get_codebook(name)
        assert [book.on("cpu").zero_code()] == book.encode([0.0])


def test_thresholds_do_not_depend_on_the_device_on_which_new_tensors_are_made():
    values = create_dynamic_map()
    wanted = code_from_values(values)
    with torch.device("meta"):  # as torch.set_default_device("cuda") does
        for got, expected in zip(code_from_values(values), wanted, strict=True):
            assert torch.equal(got, expected)


def test_the_8_bit_rule_is_the_exactly_nearest_entry_and_a_tie_goes_down():
    code = code_from_values(create_dynamic_map())
    x = torch.cat([code.thresholds, torch.nextafter(code.thresholds, fp32(math.inf)), torch.randn(1000).clamp(-1, 1)])
    rank = torch.bucketize(x, code.thresholds)
    exact = (x.double().unsqueeze(1) - code.values.double()).abs()
    got = exact.gather(1, code.order[rank].long().unsqueeze(1)).squeeze(1)
    assert_same_bits(got, exact.min(dim=1).values)
    ties = (exact == exact.min(dim=1, keepdim=True).values).sum(dim=1) == 2
    assert ties.any()
    assert_same_bits(code.order[rank][ties], exact[ties].argmin(dim=1).to(torch.uint8))


# --- the shelf --------------------------------------------------------------------------------------------------------


def test_a_registered_codebook_is_used_by_name_everywhere():
    refq4.register_codebook(Codebook("steps", [(2 * i - 15) / 15 for i in range(16)], description="even steps"))
    packed, state = refq4.functional.quantize_4bit(torch.linspace(-1, 1, 32), quant_type="steps", blocksize=32)
    assert_same_bits(state.code, fp32([(2 * i - 15) / 15 for i in range(16)]))
    assert float((refq4.functional.dequantize_4bit(packed, state) - torch.linspace(-1, 1, 32)).abs().max()) <= 1 / 15
    assert refq4.QuantState.from_dict(state.as_dict(packed=True)) == state


def test_a_name_is_replaced_only_on_request():
    other = Codebook("nf4", range(16))
    with pytest.raises(ValueError, match="'nf4' is registered with other values; pass replace=True"):
        refq4.register_codebook(other)
    assert refq4.register_codebook(get_codebook("nf4")) == get_codebook("nf4")
    assert refq4.register_codebook(other, replace=True) is get_codebook("nf4")


@pytest.mark.parametrize("name", ["nf5", "", None, 4])
def test_an_unknown_codebook_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"unknown quant_type .*Known: af4, e2m1, fp4"):
        get_codebook(name)


def test_the_nearest_name_is_suggested():
    with pytest.raises(ValueError, match="did you mean 'nf4'"):
        get_codebook("nf44")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("NF4", range(16)), "lower-case"),
        (("x y", range(16)), "lower-case"),
        (("short", range(8)), "needs 16 finite fp32 values, got 8"),
        (("nan", [math.nan, *range(15)]), "needs 16 finite"),
        (("huge", [1e39, *range(15)]), "needs 16 finite"),
        (("few", range(16), range(14)), "needs 15 ascending thresholds"),
        (("unsorted", range(16), reversed(range(15))), "needs 15 ascending thresholds"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_codebook_that_is_none_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        Codebook(*arguments)


def test_tensors_of_a_codebook_are_made_once_per_device():
    book = get_codebook("nf4")
    with torch.inference_mode():
        first = book.on("cpu")
    assert first is book.on(torch.device("cpu"))
    assert not first.values.is_inference()


@pytest.mark.reference_only("what it checks is the same for every backend")
def test_values_beyond_fp32_are_infinite_in_their_own_direction_and_no_codebook():
    for value in (1e39, -1e39):
        book = [value if i == (15 if value > 0 else 0) else (i - 7) / 8 for i in range(16)]
        with pytest.raises(ValueError, match="-inf" if value < 0 else r"[^-]inf|finite"):
            Codebook("far", book)
    assert get_codebook("int4").encode([1e39, -1e39]) == get_codebook("int4").encode([1.0, -1.0])
