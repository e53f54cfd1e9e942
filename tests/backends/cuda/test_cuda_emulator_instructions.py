"""Instructions that other people's kernels use and refq4's do not, against exact arithmetic.

``test_cuda_emulator.py`` has the ones that refq4's own kernels use.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

pytest.importorskip("refq4_cuda", reason="the package refq4_cuda is not installed: pip install -e .")
from ptx import compute, kernel, run
from refq4_cuda import emulator

RNG = np.random.default_rng(1)
MASK = 0xFFFFFFFF
EDGES = np.array([0, 1, 2, 31, 32, 0x7FFFFFFF, 0x80000000, 0xDEADBEEF, 0xFFFFFFFF, 0x00FF00FF], "u4")
WIDE = np.array([0, 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 0xDEADBEEF12345678], "u8")


def floats(count: int, kind: str = "f4") -> np.ndarray:
    """Numbers of very different sizes."""
    return (RNG.standard_normal(count) * 2.0 ** RNG.integers(-30, 30, count)).astype(kind)


def pairs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.meshgrid(values, values)
    return a.ravel().copy(), b.ravel().copy()


def signed(v: int, bits: int = 32) -> int:
    return v - (1 << bits) if v >> (bits - 1) & 1 else v


# --- integers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_the_high_half_of_a_product_is_exact(kind):
    bits = int(kind[1:])
    a, b = pairs(EDGES if bits == 32 else WIDE)
    values = [
        (signed(x, bits) * signed(y, bits) if kind[0] == "s" else x * y) >> bits & ((1 << bits) - 1)
        for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    assert compute(f"mul.hi.{kind} {{0}}, {{1}}, {{2}};", f"u{bits // 8}", a, b).tolist() == values


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_a_field_is_cut_out_and_a_signed_one_extended(kind):
    bits = int(kind[1:])
    places, lengths = np.array([0, 1, 8, 31, 32, 63, 200], "u4"), np.array([0, 1, 7, 32, 64, 255], "u4")
    grid = np.meshgrid(EDGES if bits == 32 else WIDE, places, lengths)
    value, position, length = (x.ravel().copy() for x in grid)
    wanted = []
    for v, p, n in zip(value.tolist(), position.tolist(), length.tolist(), strict=True):
        there = signed(v, bits) if kind[0] == "s" else v
        field = there >> min(p, bits) & ((1 << min(n, bits)) - 1)
        if kind[0] == "s" and n:
            top = there >> min(p + n - 1, bits - 1) & 1
            field |= -top << min(n, bits)
        wanted.append(field & ((1 << bits) - 1))
    got = compute(f"bfe.{kind} {{0}}, {{1}}, {{2}}, {{3}};", f"u{bits // 8}", value, position, length)
    assert got.tolist() == wanted


@pytest.mark.parametrize("bits", [32, 64])
def test_bits_are_counted_reversed_and_found(bits):
    values = EDGES if bits == 32 else WIDE
    ints, size = values.tolist(), f"u{bits // 8}"
    assert compute(f"popc.b{bits} {{0}}, {{1}};", "u4", values).tolist() == [v.bit_count() for v in ints]
    turned = [int(f"{v:0{bits}b}"[::-1], 2) for v in ints]
    assert compute(f"brev.b{bits} {{0}}, {{1}};", size, values).tolist() == turned
    assert compute(f"bfind.u{bits} {{0}}, {{1}};", "u4", values).tolist() == [v.bit_length() - 1 & MASK for v in ints]
    magnitudes = [v if v >> (bits - 1) == 0 else ~v & ((1 << bits) - 1) for v in ints]
    found = [m.bit_length() - 1 & MASK for m in magnitudes]
    assert compute(f"bfind.s{bits} {{0}}, {{1}};", "u4", values).tolist() == found
    shifts = [bits - m.bit_length() if m else MASK for m in magnitudes]
    assert compute(f"bfind.shiftamt.s{bits} {{0}}, {{1}};", "u4", values).tolist() == shifts


@pytest.mark.parametrize("table", [0x00, 0x96, 0xE8, 0xCA, 0xFF])
def test_lop3_looks_every_bit_up(table):
    a, b, c = (RNG.integers(0, 2**32, 99, dtype="u4") for _ in range(3))
    wanted = [
        sum((table >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | (z >> i & 1)) & 1) << i for i in range(32))
        for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    assert compute(f"lop3.b32 {{0}}, {{1}}, {{2}}, {{3}}, {table:#x};", "u4", a, b, c).tolist() == wanted


def test_funnel_shifts_wrap_or_clamp():
    by = np.array([0, 1, 31, 32, 33, 255], "u4")
    low, high = (np.full_like(by, v) for v in (0xDEADBEEF, 0x12345678))
    both = 0x12345678DEADBEEF
    for direction in "lr":
        for mode, shift in (("wrap", lambda n: n & 31), ("clamp", lambda n: min(n, 32))):
            wanted = [(both << shift(n) >> 32 if direction == "l" else both >> shift(n)) & MASK for n in by.tolist()]
            got = compute(f"shf.{direction}.{mode}.b32 {{0}}, {{1}}, {{2}}, {{3}};", "u4", low, high, by)
            assert got.tolist() == wanted


def test_saturating_sums_and_dot_products_of_bytes():
    a, b = pairs(EDGES)
    wanted = [
        min(max(signed(x) + signed(y), -(2**31)), 2**31 - 1) & MASK for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    assert compute("add.sat.s32 {0}, {1}, {2};", "u4", a, b).tolist() == wanted
    for left in ("s32", "u32"):
        for right in ("s32", "u32"):
            dots = [
                sum(
                    (signed(p, 8) if left == "s32" else p) * (signed(q, 8) if right == "s32" else q)
                    for p, q in zip(int(x).to_bytes(4, "little"), int(y).to_bytes(4, "little"), strict=True)
                ) + 7 & MASK
                for x, y in zip(a, b, strict=True)
            ]  # fmt: skip
            assert compute(f"dp4a.{left}.{right} {{0}}, {{1}}, {{2}}, 7;", "u4", a, b).tolist() == dots


@pytest.mark.parametrize("kind", ["u32", "u64"])
def test_long_sums_and_products_carry(kind):
    bits = int(kind[1:])
    a, b = pairs(EDGES if bits == 32 else WIDE)
    c, d, r = ("%r20", "%r21", "%r22") if bits == 32 else ("%rd20", "%rd21", "%rd22")
    mask = (1 << 2 * bits) - 1
    long = f"not.b{bits} {c}, {{1}}; shr.{kind} {d}, {{2}}, 1;"  # (c, a) and (d, b): two numbers of twice the width
    texts = {
        "add": f"add.cc.{kind} {r}, {{1}}, {{2}}; addc.{kind} {{0}}, {c}, {d};",
        "sub": f"sub.cc.{kind} {r}, {{1}}, {{2}}; subc.{kind} {{0}}, {c}, {d};",
        "mad": f"mad.lo.cc.{kind} {r}, {{1}}, {{2}}, {c}; madc.hi.{kind} {{0}}, {{1}}, {{2}}, {d};",
    }
    for name, text in texts.items():
        wanted = []
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            top, half = ~x & ((1 << bits) - 1), y >> 1
            one, two = top << bits | x, half << bits | y
            exact = {"add": one + two, "sub": one - two, "mad": x * y + (half << bits | top)}[name]
            wanted.append((exact & mask) >> bits)
        assert compute(long + text, f"u{bits // 8}", a, b).tolist() == wanted, name


def test_setp_with_two_results_and_a_negated_predicate():
    a, b = np.array([1, 2, 3, 3], "u4"), np.array([2, 2, 2, 9], "u4")
    text = "setp.gt.u32 %p1, {1}, 2; setp.lt.and.u32 %p2|%p3, {1}, {2}, !%p1; selp.u32 {0}, 1, 0, %p2;"
    assert compute(text + "@%p3 add.u32 {0}, {0}, 2;", "u4", a, b).tolist() == [1, 2, 0, 0]


# --- floating point ---------------------------------------------------------------------------------------------------


def rounded(exact: Fraction, mode: str) -> np.float32:
    """An exact number in fp32 by the definition of the mode."""
    near = np.float32(float(exact))
    around = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    below = max(x for x in around if Fraction(float(x)) <= exact)
    above = min(x for x in around if Fraction(float(x)) >= exact)
    if mode == "rz":
        mode = "rm" if exact > 0 else "rp"
    return below if mode == "rm" else above


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding_is_exact(mode):
    a, b, c = floats(300), floats(300), floats(300)
    c[:100] = -(a * b)[:100]  # cancellation
    exact = {
        "add": ("{1}, {2}", lambda x, y, z: x + y),
        "mul": ("{1}, {2}", lambda x, y, z: x * y),
        "div": ("{1}, {2}", lambda x, y, z: x / y),
        "fma": ("{1}, {2}, {3}", lambda x, y, z: x * y + z),
    }
    for name, (operands, formula) in exact.items():
        wanted = [rounded(formula(*(Fraction(float(v)) for v in row)), mode) for row in zip(a, b, c, strict=True)]
        got = compute(f"{name}.{mode}.f32 {{0}}, {operands};", "f4", a, b, c)
        assert got.tolist() == [float(w) for w in wanted], name


def test_fma_in_fp64_rounds_once():
    a, b = floats(500, "f8"), floats(500, "f8")
    c = np.where(np.arange(500) % 2 == 0, -(a * b), floats(500, "f8"))
    wanted = [
        float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(*(v.tolist() for v in (a, b, c)), strict=True)
    ]
    assert compute("fma.rn.f64 {0}, {1}, {2}, {3};", "f8", a, b, c).tolist() == wanted


def half(exact: Fraction, kind: str) -> float:
    """An exact number in fp16 or bf16, ties to even."""
    digits, least = (11, -24) if kind == "f16" else (8, -133)
    if exact == 0:
        return 0.0
    exponent = math.frexp(float(exact))[1]
    unit = Fraction(2) ** max(exponent - digits, least)
    return float(round(exact / unit) * unit)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_halves_are_rounded_once(kind):
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    a, b, c = (torch.from_numpy(RNG.standard_normal(600) * 2.0 ** RNG.integers(-5, 5, 600)).to(dtype) for _ in range(3))
    c[::3] = (a * b)[::3] * 2.0**-9  # sums that lie near a tie
    exact = [
        Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    bits = [t.view(torch.int16).numpy().view("u2") for t in (a, b, c)]
    got = compute(f"fma.rn.{kind} {{0}}, {{1}}, {{2}}, {{3}};", "u2", *bits)
    assert torch.from_numpy(got.view("i2")).view(dtype).tolist() == [half(e, kind) for e in exact]
    packed = [b.view("u4") for b in bits]
    assert (compute(f"fma.rn.{kind}x2 {{0}}, {{1}}, {{2}}, {{3}};", "u4", *packed).view("u2") == got).all()


@pytest.mark.parametrize("name", ["ex2", "lg2", "sin", "cos", "tanh", "rcp", "rsqrt", "sqrt"])
def test_approximations_are_within_the_bound_of_the_hardware(name):
    x = np.abs(RNG.standard_normal(400)).astype("f4") + np.float32(0.01)
    exact = {"ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "rcp": np.reciprocal,
             "rsqrt": lambda v: 1 / np.sqrt(v), "sqrt": np.sqrt}[name](x.astype("f8"))  # fmt: skip
    for form in (f"{name}.approx.f32", f"{name}.approx.ftz.f32")[: 1 if name == "tanh" else 2]:
        assert (
            np.abs(compute(f"{form} {{0}}, {{1}};", "f4", x) - exact) <= np.spacing(np.abs(exact).astype("f4"))
        ).all()


def test_ftz_makes_zeros_of_subnormals_and_sat_keeps_from_0_to_1():
    tiny, one = np.array([1e-40, -1e-40, 0.5, 3.0, -2.0, np.nan], "f4"), np.ones(6, "f4")
    product = compute("mul.ftz.f32 {0}, {1}, {2};", "f4", tiny, one)
    assert product[:5].tolist() == [0.0, -0.0, 0.5, 3.0, -2.0]
    assert np.signbit(product[1])
    assert compute("mul.rn.f32 {0}, {1}, {2};", "f4", tiny, one)[0] == tiny[0]
    assert compute("fma.rn.sat.f32 {0}, {1}, {2}, {1};", "f4", tiny, one).tolist()[2:] == [1.0, 1.0, 0.0, 0.0]


# --- conversions ------------------------------------------------------------------------------------------------------


def test_floats_become_integers_rounded_and_clamped():
    x = np.array([0.5, 1.5, -0.5, -1.5, 2.7, -2.7, 3e9, -3e9, 1e20, np.inf, -np.inf, np.nan], "f4")
    wanted = {
        "rni.s32": [0, 2, 0, -2, 3, -3, 2**31 - 1, -(2**31), 2**31 - 1, 2**31 - 1, -(2**31), 0],
        "rzi.s32": [0, 1, 0, -1, 2, -2, 2**31 - 1, -(2**31), 2**31 - 1, 2**31 - 1, -(2**31), 0],
        "rmi.s32": [0, 1, -1, -2, 2, -3, 2**31 - 1, -(2**31), 2**31 - 1, 2**31 - 1, -(2**31), 0],
        "rpi.u32": [1, 2, 0, 0, 3, 0, 3000000000, 0, 2**32 - 1, 2**32 - 1, 0, 0],
    }
    for form, values in wanted.items():
        got = compute(f"cvt.{form}.f32 {{0}}, {{1}};", "i4" if "s32" in form else "u4", x)
        assert got.tolist() == values, form
    wide = compute("cvt.rzi.s64.f64 {0}, {1};", "i8", x.astype("f8"))
    assert wide.tolist()[6:] == [3 * 10**9, -3 * 10**9, 2**63 - 1, 2**63 - 1, -(2**63), -(2**63)]


def test_integers_become_floats_in_every_rounding():
    x = np.array([16777217, -16777217, 2**31 - 1, 5], "i4")
    for mode in ("rz", "rm", "rp"):
        wanted = [float(rounded(Fraction(v), mode)) for v in x.tolist()]
        assert compute(f"cvt.{mode}.f32.s32 {{0}}, {{1}};", "f4", x).tolist() == wanted
    assert compute("cvt.rn.f64.u64 {0}, {1};", "f8", WIDE).tolist() == [float(v) for v in WIDE.tolist()]
    assert compute("cvt.sat.s8.s32 {0}, {1};", "i4", np.array([300, -300, 5], "i4")).tolist() == [127, -128, 5]


def test_floats_become_narrower_ones():
    x = floats(500)
    t = torch.from_numpy(x)
    assert (compute("cvt.rn.bf16.f32 {0}, {1};", "i2", x) == t.bfloat16().view(torch.int16).numpy()).all()
    cut = compute("cvt.rz.bf16.f32 {0}, {1};", "u2", x)
    assert (cut == x.view("u4") >> 16).all()
    assert (
        compute("cvt.rn.f32.f64 {0}, {1};", "f4", x.astype("f8") * (1 + 2.0**-40))
        == (x.astype("f8") * (1 + 2.0**-40)).astype("f4")
    ).all()
    pair = compute("cvt.rn.relu.bf16x2.f32 {0}, {1}, {2};", "u4", x, -x)
    high = torch.from_numpy(np.maximum(x, 0)).bfloat16().view(torch.int16).numpy().view("u2")
    assert (pair >> 16 == high).all()
    assert (
        compute("cvt.rna.tf32.f32 {0}, {1};", "u4", np.array([1 + 2.0**-11, 1.0], "f4")).view("f4") == [1 + 2.0**-10, 1]
    ).all()


# --- together ---------------------------------------------------------------------------------------------------------


def test_a_predicated_shuffle_parts_the_lanes_and_joins_them_again():
    out = torch.zeros(32, dtype=torch.int32)
    body = (
        "setp.lt.s32 %p1, %r0, 16; mov.u32 %r2, 99; @%p1 shfl.sync.bfly.b32 %r2, %r0, 1, 31, 65535; bar.warp.sync -1;"
    )
    run(body + "mul.wide.s32 %rd1, %r0, 4; add.s64 %rd1, %at0, %rd1; st.global.u32 [%rd1], %r2;", out)
    assert out.tolist() == [i ^ 1 for i in range(16)] + [99] * 16


def test_a_numbered_barrier_that_too_few_reach_is_named():
    with pytest.raises(emulator.ConvergenceError, match="for the rest, which never comes"):
        run("setp.lt.s32 %p1, %r0, 32; @%p1 bra OUT; bar.sync 1, 64;\nOUT:\n", threads=64)


def test_matrices_are_stored_and_loaded_in_blocks():
    out = torch.zeros(32, dtype=torch.int32)
    body = (
        "and.b32 %r2, %r0, 7; shl.b32 %r2, %r2, 4; mov.u64 %rd1, room; cvt.u32.u64 %r3, %rd1; add.u32 %r2, %r2, %r3;"
        "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r2], {%r0}; bar.warp.sync -1;"
        "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r4}, [%r2];"
        "mul.wide.s32 %rd2, %r0, 4; add.s64 %rd2, %at0, %rd2; st.global.u32 [%rd2], %r4;"
    )
    run(body, out)
    matrix = torch.arange(32, dtype=torch.int32).view(torch.int16).view(8, 8)
    assert torch.equal(out.view(torch.int16).view(8, 8), matrix.t())


def test_a_switch_jumps_through_its_table():
    out = torch.zeros(32, dtype=torch.int32)
    body = (
        "and.b32 %r2, %r0, 3; bra.uni GO;\nTABLE:\n.branchtargets A, B, C, D;\nGO:\nbrx.idx %r2, TABLE;\n"
        "A:\nmov.u32 %r3, 10; bra END;\nB:\nmov.u32 %r3, 11; bra END;\n"
        "C:\nmov.u32 %r3, 12; bra END;\nD:\nmov.u32 %r3, 13;\n"
        "END:\nmul.wide.s32 %rd2, %r0, 4; add.s64 %rd2, %at0, %rd2; st.global.u32 [%rd2], %r3;"
    )
    run(body, out)
    assert out.tolist() == [10 + i % 4 for i in range(32)]


@pytest.mark.parametrize(
    ("operation", "kind", "start", "values", "wanted"),
    [
        ("inc", "u32", 2, 3, [2, 3, 0, 1]),
        ("dec", "u32", 1, 3, [1, 0, 3, 2]),
        ("min", "s32", 5, -7, [5, -7, -7, -7]),
        ("xor", "b32", 0, 1, [0, 1, 0, 1]),
        ("exch", "b32", 9, 4, [9, 4, 4, 4]),
    ],
)
def test_atomics_give_each_lane_what_it_found(operation, kind, start, values, wanted):
    memory, out = torch.full((1,), start, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    body = f"atom.relaxed.gpu.global.{operation}.{kind} %r2, [%at0], {values}; mul.wide.s32 %rd2, %r0, 4;"
    run(body + "add.s64 %rd2, %at1, %rd2; st.global.u32 [%rd2], %r2;", memory, out, threads=4)
    assert out.tolist() == wanted


def test_atomic_sums_of_halves_and_generic_addresses():
    memory = torch.zeros(2, dtype=torch.float16)
    run("mov.u32 %r2, 0x3C003800; red.global.add.noftz.f16x2 [%at0], %r2;", memory, threads=5)
    assert memory.tolist() == [2.5, 5.0]
    out = torch.zeros(1, dtype=torch.int32)
    body = "mov.u64 %rd1, room; cvta.shared.u64 %rd2, %rd1; st.u32 [%rd2], 7; atom.add.u32 %r2, [%rd2], 5;"
    run(body + "ld.u32 %r3, [%rd2]; isspacep.shared %p1, %rd2; @%p1 st.u32 [%at0], %r3;", out, threads=1)
    assert out.tolist() == [12]


# --- questions to a warp or a block -----------------------------------------------------------------------------------

STORE = "mul.wide.s32 %rd2, %r0, 4; add.s64 %rd2, %at0, %rd2; st.global.u32 [%rd2], %r2;"


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("eq", lambda lane: 1 << lane),
        ("lt", lambda lane: (1 << lane) - 1),
        ("le", lambda lane: (2 << lane) - 1),
        ("gt", lambda lane: MASK & ~((2 << lane) - 1)),
        ("ge", lambda lane: MASK & ~((1 << lane) - 1)),
    ],
)
def test_lane_masks_name_the_lanes_on_one_side(name, bits):
    out = torch.zeros(64, dtype=torch.int32)
    run(f"mov.u32 %r2, %lanemask_{name};" + STORE, out, threads=64)
    assert [v & MASK for v in out.tolist()] == [bits(thread % 32) for thread in range(64)]


def test_activemask_names_the_lanes_that_got_there_together():
    out = torch.zeros(32, dtype=torch.int32)
    run("mov.u32 %r2, 0; setp.lt.s32 %p1, %r0, 5; @%p1 activemask.b32 %r2;" + STORE, out)
    assert out.tolist() == [0b11111] * 5 + [0] * 27


def test_elect_names_the_lowest_of_the_lanes_in_the_mask():
    out = torch.zeros(32, dtype=torch.int32)
    body = "mov.u32 %r2, 99; setp.ge.s32 %p1, %r0, 7; @!%p1 bra OUT; elect.sync %r2|%p2, 0xFFFFFF80; "
    run(body + "@%p2 add.u32 %r2, %r2, 1000;\nOUT:\n" + STORE, out)
    assert out.tolist() == [99] * 7 + [1007] + [7] * 24


@pytest.mark.parametrize(
    ("operation", "answers"),
    [("popc.u32 %r2,", (40, 0)), ("and.pred %p2,", (0, 0)), ("or.pred %p2,", (1, 0))],
    ids=["popc", "and", "or"],
)
def test_a_barrier_with_a_question_counts_or_joins_the_whole_blocks_answers(operation, answers):
    out = torch.zeros(128, dtype=torch.int32)  # 40 of the first block's 64 threads say yes, none of the second's
    body = f"setp.lt.s32 %p1, %r0, 40; bar.red.{operation} 0, %p1; "
    run(body + "selp.u32 %r2, 1, 0, %p2;" * ("%p2" in operation) + STORE, out, threads=64, blocks=2)
    assert out.tolist() == [answers[0]] * 64 + [answers[1]] * 64


def test_a_barrier_with_a_question_to_the_negation_of_a_predicate_is_one_all_agree_on():
    out = torch.zeros(64, dtype=torch.int32)
    body = "setp.lt.s32 %p1, %r0, 0; barrier.red.and.pred %p2, 0, !%p1; selp.u32 %r2, 1, 0, %p2;"
    run(body + STORE, out, threads=64)
    assert out.tolist() == [1] * 64


def test_a_barrier_with_a_question_is_a_barrier():
    out = torch.zeros(64, dtype=torch.int32)
    body = (
        "mov.u64 %rd1, room; mul.wide.s32 %rd2, %r0, 4; add.s64 %rd3, %rd1, %rd2; add.s64 %rd4, %at0, %rd2;"
        "st.shared.u32 [%rd3], %r0; setp.ge.s32 %p1, %r0, 0; bar.red.and.pred %p2, 0, %p1; xor.b32 %r2, %r0, 32;"
        "mul.wide.s32 %rd5, %r2, 4; add.s64 %rd5, %rd1, %rd5; ld.shared.u32 %r3, [%rd5]; st.global.u32 [%rd4], %r3;"
    )
    for seed in (None, 1, 2):
        emulator.run(*kernel(body, out.zero_(), threads=64), seed=seed)
        assert out.tolist() == [i ^ 32 for i in range(64)]


def test_a_question_at_another_barrier_than_the_blocks_is_refused():
    with pytest.raises(emulator.EmulatorError, match="asks at barrier 1, and the emulator knows"):
        run("setp.lt.s32 %p1, %r0, 40; bar.red.popc.u32 %r2, 1, %p1;", threads=64)
