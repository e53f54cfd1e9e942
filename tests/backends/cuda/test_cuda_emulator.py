"""The emulator's instructions, one by one, against numpy, torch and exact arithmetic.

Each kernel here is a few lines of PTX: what it computes is known without the emulator. What the emulator refuses is in
``test_cuda_emulator_checks.py``; the project's kernels run in ``test_cuda_emulator_kernels.py``, copies of them with a
bug in ``test_cuda_emulator_faults.py``.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch

pytest.importorskip("refq4_cuda", reason="the package refq4_cuda is not installed: pip install -e .")
from ptx import compute, kernel, run
from refq4_cuda.emulator.decode import prepare

RNG = np.random.default_rng(0)
SPECIAL_F32 = np.array(
    [0.0, -0.0, 1.0, -1.0, 1.5, 0.1, 1e-45, -1e-45, 1.1754942e-38, 3.4e38, -3.4e38, 65504.0, 65520.0, 5.96e-8, 2.98e-8,
     np.inf, -np.inf, np.nan, 16777216.0], np.float32
)  # fmt: skip
SPECIAL_U32 = np.array([0, 1, 2, 7, 31, 32, 33, 63, 64, 255, 256, 0x7FFFFFFF, 0x80000000, 0xDEADBEEF, 0xFFFFFFFF], "u4")


def assert_same(got: np.ndarray, wanted: np.ndarray) -> None:
    """Bit for bit, NaNs included."""
    kind = f"u{wanted.itemsize}"
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got.view(kind), wanted.view(kind))


def pairs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.meshgrid(values, values)
    return a.ravel().copy(), b.ravel().copy()


def hardware_nan(values: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values), np.uint32(0x7FFFFFFF).view("f4"), values).astype("f4")


# --- integers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opcode", ["shl.b32", "shr.u32", "shr.s32"])
def test_shifts_by_more_than_the_width_are_clamped(opcode):
    a, by = pairs(SPECIAL_U32)
    got = compute(f"{opcode} {{0}}, {{1}}, {{2}};", "u4", a, by)
    signed = opcode.endswith("s32")
    wanted = [
        int(x) << int(n) & 0xFFFFFFFF
        if opcode.startswith("shl")
        else (int(np.int32(x.view("i4"))) if signed else int(x)) >> int(n) & 0xFFFFFFFF
        for x, n in zip(a, np.minimum(by, 64), strict=True)
    ]
    assert_same(got, np.array(wanted, "u4"))


@pytest.mark.parametrize("opcode", ["shl.b32", "shr.u32", "shr.s32"])
def test_a_shift_by_a_number_is_a_shift_by_a_register_that_holds_it(opcode):
    for amount in (0, 7, 31, 32, 200):
        by = np.full_like(SPECIAL_U32, amount)
        register = compute(f"{opcode} {{0}}, {{1}}, {{2}};", "u4", SPECIAL_U32, by)
        assert_same(compute(f"{opcode} {{0}}, {{1}}, {amount};", "u4", SPECIAL_U32), register)


@pytest.mark.parametrize(("opcode", "result"), [("mul.wide.u32", "u8"), ("mul.wide.s32", "i8")])
def test_wide_products_keep_all_64_bits(opcode, result):
    a, b = pairs(SPECIAL_U32)
    kind = "i4" if result == "i8" else "u4"
    wanted = np.array([int(x) * int(y) for x, y in zip(a.view(kind), b.view(kind), strict=True)], result)
    assert_same(compute(f"{opcode} {{0}}, {{1}}, {{2}};", result, a, b), wanted)


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_division_and_remainder_go_towards_zero(kind):
    dtype = f"{kind[0].replace('s', 'i')}{int(kind[1:]) // 8}"
    values = np.array([1, 2, 3, 7, 100, 2**31 - 1, *([-1, -7, -100, -(2**31)] if kind[0] == "s" else [])]).astype(dtype)
    a, b = pairs(values)
    exact = [abs(int(x)) // abs(int(y)) * (-1 if (x < 0) != (y < 0) else 1) for x, y in zip(a, b, strict=True)]
    quotient = np.array(exact).astype(dtype)
    assert_same(compute(f"div.{kind} {{0}}, {{1}}, {{2}};", dtype, a, b), quotient)
    assert_same(compute(f"rem.{kind} {{0}}, {{1}}, {{2}};", dtype, a, b), a - quotient * b)


def test_prmt_picks_bytes_and_repeats_signs():
    a, b, selector = (RNG.integers(0, 2**32, 999, dtype="u4") for _ in range(3))
    wanted = []
    for x, y, s in zip(a.tolist(), b.tolist(), selector.tolist(), strict=True):
        eight = x.to_bytes(4, "little") + y.to_bytes(4, "little")
        nibbles = [s >> 4 * i & 15 for i in range(4)]
        chosen = [(255 if eight[n & 7] & 128 else 0) if n & 8 else eight[n & 7] for n in nibbles]
        wanted.append(int.from_bytes(bytes(chosen), "little"))
    assert_same(compute("prmt.b32 {0}, {1}, {2}, {3};", "u4", a, b, selector), np.array(wanted, "u4"))


def test_bfi_inserts_a_field_and_loses_what_sticks_out():
    positions, lengths = pairs(np.array([0, 1, 8, 16, 31, 32, 40, 255], "u4"))
    field, into = (RNG.integers(0, 2**32, len(lengths), dtype="u4") for _ in range(2))
    wanted = []
    for f, i, p, n in zip(field.tolist(), into.tolist(), positions.tolist(), lengths.tolist(), strict=True):
        mask = ((1 << n) - 1) << p & 0xFFFFFFFF
        wanted.append((f << p & mask) | (i & ~mask))
    assert_same(
        compute("bfi.b32 {0}, {1}, {2}, {3}, {4};", "u4", field, into, positions, lengths), np.array(wanted, "u4")
    )
    for at, many in ((0, 8), (5, 4), (28, 8), (0, 32), (40, 3)):
        numbers = compute(f"bfi.b32 {{0}}, {{1}}, {{2}}, {at}, {many};", "u4", field, into)
        same = (np.full_like(field, at), np.full_like(field, many))
        assert_same(numbers, compute("bfi.b32 {0}, {1}, {2}, {3}, {4};", "u4", field, into, *same))


@pytest.mark.parametrize("size", [4, 8])
def test_leading_zeros_are_counted_up_to_the_last_bit(size):
    edges = [0, 1, 2**32 - 1, 2**31, 2**31 - 1, *([2**64 - 1, 2**63, 2**53 + 1, 2**32] if size == 8 else [])]
    values = np.array([*edges, *(1 << i for i in range(8 * size))], f"u{size}")
    wanted = np.array([8 * size - int(v).bit_length() for v in values], "u4")
    assert_same(compute(f"clz.b{8 * size} {{0}}, {{1}};", "u4", values), wanted)


@pytest.mark.parametrize("source", ["u16", "s16", "u32", "s32"])
def test_conversions_extend_by_the_sources_sign(source):
    size = int(source[1:]) // 8
    values = np.array([0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF], f"u{size}")
    wanted = values.view(f"{source[0].replace('s', 'i')}{size}").astype("i8")
    assert_same(compute(f"cvt.s64.{source} {{0}}, {{1}};", "i8", values), wanted)


def test_halves_join_with_the_first_part_low_and_split_the_same_way():
    words = RNG.integers(0, 2**32, 64, dtype="u4")
    swap = "mov.b32 {{%h1, %h2}}, {1}; mov.b32 {0}, {{%h2, %h1}};"
    assert_same(compute(swap, "u4", words), words << np.uint32(16) | words >> np.uint32(16))


# --- floating point ---------------------------------------------------------------------------------------------------


def nearest_f32(exact: Fraction) -> np.float32:
    """The fp32 number nearest to a fraction, ties to even: decided by exact comparison among three neighbours."""
    with np.errstate(over="ignore"):
        middle = np.float32(float(exact))
    near = [np.nextafter(middle, np.float32(-np.inf)), middle, np.nextafter(middle, np.float32(np.inf))]
    return min(near, key=lambda c: (abs(Fraction(float(c)) - exact), int(c.view("u4")) & 1))


def test_fma_rounds_once_even_where_two_roundings_would_differ():
    # products a hair beside the middle of two fp32 numbers, moved by a c that fp64 can't hold beside them
    one = np.float32(1)
    a = np.concatenate([RNG.standard_normal(1500), np.full(500, 1 + 2.0**-12)]).astype("f4")
    b = np.concatenate([RNG.standard_normal(1500), np.full(500, 1 + 2.0**-12)]).astype("f4")
    c = np.concatenate([RNG.standard_normal(1500), RNG.choice([-1, 1], 500) * 2.0 ** RNG.uniform(-140, -50, 500)])
    c = c.astype("f4")
    a = np.append(a, [one, np.float32(2.0**-75), np.float32(2.0**-100)]).astype("f4")
    b = np.append(b, [one, np.float32(2.0**-75), np.float32(1.5)]).astype("f4")
    c = np.append(c, [-one, np.float32(2.0**-149), np.float32(2.0**-126)]).astype("f4")
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    wanted = np.array([nearest_f32(e) for e in exact])
    twice = (a.astype("f8") * b + c).astype("f4")
    assert (twice != wanted).any(), "the values are too easy: two roundings pass too"
    assert_same(compute("fma.rn.f32 {0}, {1}, {2}, {3};", "f4", a, b, c), wanted)


@pytest.mark.parametrize(
    ("opcode", "function"), [("add.rn.f32", np.add), ("mul.rn.f32", np.multiply), ("sub.f32", np.subtract)]
)
def test_arithmetic_keeps_subnormals_and_gives_the_hardwares_nan(opcode, function):
    a, b = pairs(SPECIAL_F32)
    with np.errstate(all="ignore"):
        wanted = hardware_nan(function(a, b))
    assert_same(compute(f"{opcode} {{0}}, {{1}}, {{2}};", "f4", a, b), wanted)


def test_rcp_is_rounded_correctly():
    values = np.concatenate([SPECIAL_F32, RNG.standard_normal(500).astype("f4")])
    with np.errstate(all="ignore"):
        wanted = hardware_nan((1.0 / values.astype("f8")).astype("f4"))
    assert_same(compute("rcp.rn.f32 {0}, {1};", "f4", values), wanted)


@pytest.mark.parametrize("opcode", ["min", "max"])
def test_a_number_wins_against_nan_and_plus_zero_is_above_minus_zero(opcode):
    a, b = pairs(SPECIAL_F32)

    def key(v):
        return (float(v), not np.signbit(v))

    wanted = []
    for x, y in zip(a, b, strict=True):
        numbers = [v for v in (x, y) if not np.isnan(v)]
        wanted.append({"min": min, "max": max}[opcode](numbers, key=key) if numbers else np.float32(np.nan))
    assert_same(compute(f"{opcode}.f32 {{0}}, {{1}}, {{2}};", "f4", a, b), hardware_nan(np.array(wanted, "f4")))


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons_with_a_nan_are_false_and_the_unordered_ones_true(name):
    a, b = pairs(SPECIAL_F32)
    nan = np.isnan(a) | np.isnan(b)
    compare = {"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater",
               "ge": "greater_equal"}[name]  # fmt: skip
    plain = getattr(np, compare)(a, b)
    select = "selp.u32 {0}, 1, 0, %p1;"
    got = compute(f"setp.{name}.f32 %p1, {{1}}, {{2}}; {select}", "u4", a, b)
    assert_same(got, (plain & ~nan).astype("u4"))
    got = compute(f"setp.{name}u.f32 %p1, {{1}}, {{2}}; {select}", "u4", a, b)
    assert_same(got, (plain | nan).astype("u4"))


def test_the_rarer_ways_to_compare_and_to_multiply():
    a, b = pairs(SPECIAL_F32)
    less = a < b
    assert_same(compute("set.lt.u32.f32 {0}, {1}, {2};", "u4", a, b), np.where(less, 2**32 - 1, 0).astype("u4"))
    assert_same(compute("set.lt.f32.f32 {0}, {1}, {2};", "f4", a, b), less.astype("f4"))
    assert_same(compute("testp.finite.f32 %p1, {1}; selp.u32 {0}, 1, 0, %p1;", "u4", a), np.isfinite(a).astype("u4"))
    x, y = pairs(SPECIAL_U32)
    wanted = np.where(y.view("i4") >= 0, x, ~x)
    assert_same(compute("not.b32 %r1, {1}; slct.u32.s32 {0}, {1}, %r1, {2};", "u4", x, y.view("i4")), wanted)
    low = np.uint32(2**24 - 1)
    assert_same(compute("mul24.lo.u32 {0}, {1}, {2};", "u4", x, y), (x & low) * (y & low))
    assert_same(compute("cnot.b32 {0}, {1};", "u4", x), (x == 0).astype("u4"))


def every_rounding() -> np.ndarray:
    """Every bf16 number, and beside each the values at which its rounding from fp32 changes."""
    high = np.arange(2**16, dtype="u4") << np.uint32(16)
    return np.concatenate([high, high + np.uint32(0x7FFF), high + np.uint32(0x8000), high + np.uint32(0x8001)]).view(
        "f4"
    )


def test_cvt_to_bf16_rounds_every_number_as_torch_does_and_the_first_operand_is_the_high_half():
    values = every_rounding()
    with np.errstate(invalid="ignore"):
        bits = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view("u2")
    bits = np.where(np.isnan(values), np.uint16(0x7FFF), bits)
    got = compute("cvt.rn.bf16x2.f32 {0}, {1}, {2};", "u4", values, values[::-1].copy())
    assert_same(got, bits.astype("u4") << np.uint32(16) | bits[::-1])


def test_cvt_to_fp16_rounds_subnormals_to_even():
    halves = np.arange(2**16, dtype="u2").view("f2").astype("f4")
    finite = np.sort(halves[np.isfinite(halves)])
    middle = ((finite[1:].astype("f8") + finite[:-1]) / 2).astype("f4")
    values = np.concatenate([halves, middle, np.nextafter(middle, np.float32(9)), SPECIAL_F32])
    wanted = torch.from_numpy(values).half().view(torch.int16).numpy().view("u2")
    wanted = np.where(np.isnan(values), np.uint16(0x7FFF), wanted)
    assert_same(compute("cvt.rn.f16.f32 {0}, {1};", "u2", values), wanted)
    got = compute("cvt.rn.f16x2.f32 {0}, {1}, {2};", "u4", values, values[::-1].copy())
    assert_same(got, wanted.astype("u4") << np.uint32(16) | wanted[::-1])


def test_every_fp16_number_becomes_the_same_fp32_number():
    bits = np.arange(2**16, dtype="u2")
    assert_same(compute("cvt.f32.f16 {0}, {1};", "f4", bits), hardware_nan(bits.view("f2").astype("f4")))


# --- a warp together --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bfly", "down", "up", "idx"])
def test_shuffles_move_values_and_say_which_lanes_got_their_own(mode):
    lanes = np.arange(32)
    clamp = 0 if mode == "up" else 31
    for by in (0, 1, 5, 16, 31):
        source = {"bfly": lanes ^ by, "down": lanes + by, "up": lanes - by, "idx": np.full(32, by)}[mode]
        inside = (source >= 0) & (source < 32)
        values = RNG.integers(0, 2**32, 64, dtype="u4")
        got = compute(
            f"shfl.sync.{mode}.b32 %r2|%p1, {{1}}, {by}, {clamp}, -1; selp.u32 %r3, 1, 0, %p1; "
            "mul.wide.u32 {0}, %r2, 2; cvt.u64.u32 %rd9, %r3; add.s64 {0}, {0}, %rd9;",
            "u8", values,
        )  # fmt: skip
        moved = values.reshape(2, 32)[:, np.where(inside, source, lanes)].ravel()
        assert_same(got, moved.astype("u8") * np.uint64(2) + np.tile(inside, 2).astype("u8"))


@pytest.mark.parametrize(("dtype", "k"), list(product(["f16", "bf16"], [8, 16])))
def test_mma_multiplies_matrices_laid_out_as_the_ptx_manual_draws_them(dtype, k):
    A, B = RNG.integers(-8, 9, (16, k)), RNG.integers(-8, 9, (k, 8))
    C = RNG.standard_normal((16, 8)).astype("f4")
    torch_type = torch.float16 if dtype == "f16" else torch.bfloat16

    def bits(matrix):
        return torch.from_numpy(matrix).to(torch_type).view(torch.int16).numpy().view("u2").astype("u4")

    a_bits, b_bits = bits(A), bits(B)
    # PTX manual, "Matrix Fragments for mma.m16n8k16": groupID = lane / 4, threadID_in_group = lane % 4
    a = np.array([[[a_bits[g + 8 * (i % 2), 2 * t + 8 * (i // 2) + h] for h in (0, 1)] for i in range(k // 4)]
                  for g in range(8) for t in range(4)])  # fmt: skip
    b = np.array([[[b_bits[2 * t + 8 * i + h, g] for h in (0, 1)] for i in range(k // 8)]
                  for g in range(8) for t in range(4)])  # fmt: skip
    c = np.array([[C[g + 8 * (i // 2), 2 * t + i % 2] for i in range(4)] for g in range(8) for t in range(4)], "f4")
    words = [(m[..., 0] | m[..., 1] << np.uint32(16)).astype("u4").reshape(-1) for m in (a, b)]
    tensors = [torch.from_numpy(w.view("i4")) for w in words] + [torch.from_numpy(c)]
    out = torch.zeros(32, 4)
    reads = "".join(
        f"mul.wide.s32 %rd0, %r0, {4 * n}; add.s64 %rd0, %at{i}, %rd0;"
        + "".join(f"ld.global.b32 {name}{first + j}, [%rd0+{4 * j}];" for j in range(n))
        for i, (n, name, first) in enumerate([(k // 4, "%r", 10), (k // 8, "%r", 20), (4, "%f", 0)])
    )
    a_list, b_list = (", ".join(f"%r{first + j}" for j in range(n)) for n, first in ((k // 4, 10), (k // 8, 20)))
    body = (
        f"{reads} mma.sync.aligned.m16n8k{k}.row.col.f32.{dtype}.{dtype}.f32 {{%f4, %f5, %f6, %f7}}, {{{a_list}}}, "
        f"{{{b_list}}}, {{%f0, %f1, %f2, %f3}}; mul.wide.s32 %rd0, %r0, 16; add.s64 %rd0, %at3, %rd0; "
        "st.global.v4.f32 [%rd0], {%f4, %f5, %f6, %f7};"
    )
    run(body, *tensors, out)
    wanted = (A.astype("f8") @ B + C).astype("f4")
    got = out.numpy().reshape(8, 4, 2, 2).transpose(2, 0, 1, 3).reshape(16, 8)
    assert_same(np.ascontiguousarray(got), wanted)


# --- registers that share a row ---------------------------------------------------------------------------------------


def test_registers_that_are_not_needed_together_share_a_row():
    chain = "".join(f"add.u32 %r{i}, %r{i - 1}, 1;" for i in range(3, 30))
    text, _ = kernel(f"mov.u32 %r2, 7; {chain} st.global.u32 [%at0], %r29;", torch.zeros(1, dtype=torch.int32))
    names = prepare(text, "hand").names
    assert len({names[f"%r{i}"] for i in range(2, 30)}) == 2  # what an instruction reads, and what it writes


LOOP = """
mov.u32 %r2, 5;                     // what the guarded write below leaves to the lanes that it passes over
mov.u32 %r3, 0;
mov.u32 %r4, 0;
again:
setp.eq.u32 %p1, %r0, 3;
@%p1 mov.u32 %r2, 100;
add.u32 %r4, %r4, %r2;              // the last use, but for the next round
add.u32 %r5, %r3, 1;                // a register that is needed only from here
mov.u32 %r3, %r5;
setp.lt.u32 %p2, %r3, 3;
@%p2 bra again;
mul.wide.u32 %rd0, %r0, 4;
add.s64 %rd0, %at0, %rd0;
st.global.u32 [%rd0], %r4;
"""


def test_a_value_outlives_a_round_of_a_loop_and_a_write_that_only_some_lanes_make():
    out = torch.zeros(32, dtype=torch.int32)
    run(LOOP, out)
    assert out.tolist() == [15] * 3 + [300] + [15] * 28
