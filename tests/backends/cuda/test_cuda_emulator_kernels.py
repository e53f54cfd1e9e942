"""The CUDA kernels as NVRTC compiles them, run in the emulator: bits where bits are promised, the budget elsewhere.

The settings are covering designs: any two values of any two factors (tokens, blocksize, architecture, ...) meet in one
test. Everything the emulator checks (bounds, races, barriers, unwritten data) is checked on the way.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("refq4_cuda", reason="the package refq4_cuda is not installed: pip install -e .")
import cuda_cases as cases
from refq4_cuda import launch
from refq4_cuda.emulator.flow import is_branch, is_exit
from refq4_cuda.emulator.parse import parse
from refq4_cuda.emulator.semantics import find
from refq4_cuda.geometry import RUNGS

from refq4.backend import PackedWeight
from refq4.codebooks import code_from_values, codebook_names, create_dynamic_map, get_codebook
from refq4.testing.budget import assert_same_bits, assert_within_budget

cases.require_nvrtc()

ARCHITECTURES = (80, 75, 90, 100)
TOKENS = (1, *range(2, 18), 31, 32, 33, 64, 127, 128)
POWERS = (64, 32, 128, 256, 512, 1024, 2048, 4096)
ODD = (7, 48, 100)

# K and a blocksize that divides it: what the fast kernels serve
ALIGNED = ((64, 64), (96, 32), (64, 32), (256, 128), (2304, 64), (2304, 256), (4096, 64), (4096, 32), (512, 512),
           (4096, 128), (4096, 1024), (2048, 2048), (4096, 4096))  # fmt: skip
FAST = list(
    cases.covering(
        {
            "m": TOKENS,
            "k_blocksize": ALIGNED,
            "arch": ARCHITECTURES,
            "dtype": ("bfloat16", "float16", "float32"),
            "n": (7, 1, 33, 130),
            "nested": (False, True),
            "bias": (False, True),
            "code": ("nf4", "fp4", "int4"),
            "rung": (None, None, "tensor_core", "vectorised"),
            "multiprocessors": (132, 4),
        }
    )
)
ANY_SHAPE = list(
    cases.covering(
        {
            "m": TOKENS,
            "k": (1, 63, 64, 65, 96, 127, 2304, 4096),
            "blocksize": (*POWERS, *ODD),
            "arch": ARCHITECTURES,
            "dtype": ("bfloat16", "float16", "float32"),
            "n": (1, 7, 33, 130),
            "nested": (False, True),
            "bias": (False, True),
        }
    )
)
STORED = list(
    cases.covering(
        {
            "numel": (1, 2, 31, 63, 64, 65, 1000, 2049, 4097, 20_001),
            "blocksize": (*POWERS, *ODD),
            "arch": ARCHITECTURES,
            "dtype": cases.DTYPES,
            "code": tuple(codebook_names()),
            "nested": (False, True),
        }
    )
)


def sentence(row: dict[str, Any]) -> str:
    """A row as the name of a test."""
    k, blocksize = row["k_blocksize"] if "k_blocksize" in row else (row.get("k"), row["blocksize"])
    size = f"{row['numel']} elements" if "numel" in row else f"M={row['m']} N={row['n']} K={k}"
    extras = f"{' nested' * row['nested']}{' with bias' * row.get('bias', False)}"
    rung = f" by the rung {row['rung']}" if row.get("rung") else ""
    spread = f" on {row['multiprocessors']} multiprocessors" if row.get("multiprocessors", 132) != 132 else ""
    code = f" {row['code']}" if "code" in row else ""
    return f"{size}, {row['dtype']}{code} in blocks of {blocksize}{extras}, sm_{row['arch']}{spread}{rung}"


@pytest.mark.parametrize("row", FAST, ids=sentence)
def test_products_of_aligned_weights_keep_the_error_budget(row):
    k, blocksize = row["k_blocksize"]
    given = cases.operands(row["m"], row["n"], k, blocksize, row["dtype"], row["nested"], row["bias"], row["code"])
    y = cases.multiply(given, row["arch"], _served(given, row), row["multiprocessors"])
    assert_within_budget(y, given.x, given.packed, given.state, given.bias)


@pytest.mark.parametrize("row", ANY_SHAPE, ids=sentence)
def test_products_of_any_shape_and_blocksize_keep_the_error_budget(row):
    given = cases.operands(row["m"], row["n"], row["k"], row["blocksize"], row["dtype"], row["nested"], row["bias"])
    y = cases.multiply(given, row["arch"])
    assert_within_budget(y, given.x, given.packed, given.state, given.bias)


@pytest.mark.parametrize("row", STORED, ids=sentence)
def test_quantising_and_dequantising_give_the_references_bits(row):
    arch, blocksize, dtype = row["arch"], row["blocksize"], getattr(torch, row["dtype"])
    code = get_codebook(row["code"]).on("cpu")
    A = (torch.randn(row["numel"], generator=torch.Generator().manual_seed(row["numel"])) * 0.1).to(dtype)
    wanted, scales = cases.REFERENCE.quantize_4bit(A, code, blocksize)
    packed, absmax = cases.poisoned(wanted.shape, wanted.dtype), cases.poisoned(scales.shape, scales.dtype)
    cases.run(launch.quantize(A, code, blocksize, True, packed, absmax, arch), arch)
    assert_same_bits(packed, wanted)
    assert_same_bits(absmax, scales)
    absmax = 0.8 * scales  # given, and smaller than the largest magnitudes: values are clamped
    wanted, _ = cases.REFERENCE.quantize_4bit(A, code, blocksize, absmax)
    packed = cases.poisoned(wanted.shape, wanted.dtype)
    cases.run(launch.quantize(A, code, blocksize, True, packed, absmax, arch, measures=False), arch)
    assert_same_bits(packed, wanted)
    assert_same_bits(absmax, 0.8 * scales)
    stored, state = cases.quantised(1, row["numel"], blocksize, row["code"], row["nested"])
    weight = state.packed_weight(stored)
    out = cases.poisoned(weight.shape, dtype)
    cases.run(launch.dequantize_4bit(weight, out, arch), arch)
    assert_same_bits(out, cases.REFERENCE.dequantize_4bit(weight, dtype))


@pytest.mark.parametrize("blocksize", [7, 32], ids="blocks of {}".format)
def test_scales_past_the_first_nested_block_are_found(blocksize):
    k = 63 if blocksize == 7 else 64
    given = cases.operands(1, 160, k, blocksize, "float32", nested=True)
    assert given.state.absmax.numel() > 256
    assert_within_budget(cases.multiply(given, 80), given.x, given.packed, given.state, given.bias)
    weight = given.state.packed_weight(given.packed)
    out = cases.poisoned(weight.shape, torch.float32)
    cases.run(launch.dequantize_4bit(weight, out, 80), 80)
    assert_same_bits(out, cases.REFERENCE.dequantize_4bit(weight, torch.float32))


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize("blocksize", [64, 256, 48])
def test_the_eight_bit_stage_gives_the_references_bits(blocksize, arch):
    code = code_from_values(create_dynamic_map())
    A = torch.randn(3, 777, generator=torch.Generator().manual_seed(2))
    q, scales = cases.REFERENCE.quantize_blockwise(A, code, blocksize)
    codes, absmax = cases.poisoned(q.shape, q.dtype), cases.poisoned(scales.shape, scales.dtype)
    cases.run(launch.quantize(A, code, blocksize, False, codes, absmax, arch), arch)
    assert_same_bits(codes, q)
    assert_same_bits(absmax, scales)
    for name in cases.DTYPES:
        dtype = getattr(torch, name)
        out = cases.poisoned(q.shape, dtype)
        cases.run(launch.dequantize_blockwise(q, scales, code.values, blocksize, out, arch), arch)
        assert_same_bits(out, cases.REFERENCE.dequantize_blockwise(q, scales, code.values, blocksize, dtype))


@pytest.mark.parametrize("arch", [75, 100], ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("blocksize", [64, 48], ids="blocks of {}".format)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_zeros_subnormals_infinities_and_nans_are_stored_as_the_reference_stores_them(name, blocksize, dtype, arch):
    nan, infinity, mixed = float("nan"), float("inf"), torch.linspace(-1, 1, 64)
    rows = [torch.full((64,), v) for v in (0.0, -0.0, 1e-45, 3e-39, 1e-38, 6e-8, infinity, nan, 3e38)]
    rows += [mixed.index_fill(0, torch.tensor([17]), v) for v in (nan, infinity, -infinity, 1e-42)]
    last = mixed[:63].index_fill(0, torch.tensor([5]), nan)  # an odd length: the half byte beside the last code is 0's
    A = torch.cat([*rows, mixed * 1e-40, mixed * 1e-38, mixed, last]).to(getattr(torch, dtype))
    code = get_codebook(name).on("cpu")
    wanted, scales = cases.REFERENCE.quantize_4bit(A, code, blocksize)
    packed, absmax = cases.poisoned(wanted.shape, wanted.dtype), cases.poisoned(scales.shape, scales.dtype)
    cases.run(launch.quantize(A, code, blocksize, True, packed, absmax, arch), arch)
    assert_same_bits(packed, wanted)
    cases.assert_same_numbers(absmax, scales)


@pytest.mark.parametrize("arch", [75, 80], ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halfway_between_two_half_precision_numbers_the_even_one_is_stored(dtype, arch):
    ulp = torch.finfo(getattr(torch, dtype)).eps
    scales = 1 + ulp * torch.tensor([0.5, 1.5, 2.5, 3.5, 0.75, 1.25])
    codes = torch.arange(256, dtype=torch.uint8).repeat(6)  # NF4's last code is 1.0: those are the scales themselves
    weight = PackedWeight(codes, scales, get_codebook("nf4").on("cpu").values, 512, (6, 512), "nf4")
    wanted = cases.REFERENCE.dequantize_4bit(weight, getattr(torch, dtype))
    assert ((wanted.float() - scales[:, None]).abs() == ulp / 2).any(dim=1).tolist() == [True] * 4 + [False] * 2
    out = cases.poisoned((6, 512), wanted.dtype)
    cases.run(launch.dequantize_4bit(weight, out, arch), arch)
    assert_same_bits(out, wanted)


@pytest.mark.parametrize("rung", RUNGS)
def test_no_order_of_the_warps_changes_a_bit(rung):
    given = cases.operands(5, 33, 512, 64, "float16", nested=True, bias=True)
    weight = given.state.packed_weight(given.packed)
    results = []
    for seed in (None, 1, 2, 3):
        y = cases.poisoned((5, 33), torch.float16)
        cases.run(launch.product(given.x, weight, given.bias, y, 80, 132, rung), 80, seed)
        results.append(y)
    for y in results[1:]:
        assert_same_bits(y, results[0])


def test_the_emulator_knows_every_instruction_of_every_kernel():
    used = {}  # on the oldest and the newest; the tests above run on those between, and would stop at an unknown one
    for arch in (min(ARCHITECTURES), max(ARCHITECTURES)):
        for variant in launch.all_variants(arch):
            for instruction in parse(cases.ptx_of(variant, arch), variant.entry).code:
                if not (is_branch(instruction) or is_exit(instruction)):
                    used[instruction.opcode] = instruction
    generic = {opcode for opcode in used if re.match(r"(ld|st)\.[^.]*\d$|(ld|st)\.v[24]", opcode)}
    assert not generic, f"of no known memory, so slower than one of global or shared memory: {sorted(generic)}"
    unknown = {opcode for opcode, instruction in used.items() if find(instruction) is None}
    assert not unknown, f"unknown: {sorted(unknown)}"


def test_a_design_lets_every_pair_of_values_meet():
    for design in (FAST, ANY_SHAPE, STORED):
        for f, g in [(f, g) for f in design[0] for g in design[0] if f < g]:
            met = {(row[f], row[g]) for row in design}
            wanted = {(a[f], b[g]) for a in design for b in design}
            assert met == wanted, (f, g)


def _served(given: cases.Operands, row: dict[str, Any]) -> str | None:
    """The rung that the row names, where it serves the product."""
    weight = given.state.packed_weight(given.packed)
    y = torch.empty(given.x.shape[0], weight.shape[0], dtype=given.x.dtype)
    try:
        launch.product(given.x, weight, given.bias, y, row["arch"], row["multiprocessors"], row["rung"])
    except ValueError:
        return None
    return row["rung"]
