"""What can be said of the CUDA kernels without running them: they compile, spill nothing, and cost what they may.

Each kernel's hot loop is counted from the machine code and held to the budget in the kernel's own header. A counted
budget is no timing; but what makes a kernel slower by a careless change (a spill, a division, a generic load, an
address worked out again for every weight) shows in it, on a machine without a GPU.
"""

from __future__ import annotations

import ctypes
import re

import pytest

pytest.importorskip("refq4_cuda", reason="the package refq4_cuda is not installed: pip install -e .")
pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-python is not installed: pip install -e '.[test]'")
from refq4_cuda import arguments, sass
from refq4_cuda.geometry import ARCHITECTURES, LEAST, THREADS, Variant, ring_variant
from refq4_cuda.launch import all_variants
from refq4_cuda.nvrtc import CompileError, compile_variant, kernel_directory

pytestmark = pytest.mark.reference_only("it compiles kernels and runs none")

FILES = sorted(path.name for path in kernel_directory().glob("*.cu"))
RING, GRADIENT = "gemm_4bit_4_ring.cu", "grad_input_4bit_2_tensor_core.cu"
NOT_GROUPED = {"dequantize.cu", "quantize_1_naive.cu", "quantize_2_vectorised.cu"}
# Of a thread, as geometry.py plans with them; of the rest, as little as every device has.
REGISTERS = {RING: 256, "gemm_4bit_3_tensor_core.cu": 128, "gemv_4bit_2_vectorised.cu": 256, GRADIENT: 192}
SHARED = {GRADIENT: 36 << 10}  # static, as gradient.py plans with it


def variants(file: str, arch: int) -> list[Variant]:
    return [variant for variant in all_variants(arch) if variant.file == file]


def code_of(variant: Variant, arch: int) -> list[sass.Instruction]:
    try:
        return sass.disassemble(compile_variant(variant, arch).path)[variant.entry]
    except sass.ToolMissingError as missing:
        pytest.skip(str(missing))


# Left to the sweep: siblings, with the same machine code as the architecture before, and three whose neighbours have
# the same limits, though ptxas allocates registers for each anew.
SWEPT = (86, 87, 88, 89, 100, 103, 110, 121)
EACH = [pytest.param(arch, False, marks=pytest.mark.slow if arch in SWEPT else ()) for arch in ARCHITECTURES]
EACH += [pytest.param(arch, True, marks=() if arch in (75, 120) else pytest.mark.slow) for arch in ARCHITECTURES]


@pytest.mark.parametrize(
    ("arch", "grouped"), EACH, ids=lambda v: f"sm_{v}" if v > 1 else "for experts" * v or "for one"
)
@pytest.mark.parametrize("file", FILES)
def test_every_variant_compiles_without_spills_and_without_a_stack(file: str, arch: int, grouped: bool) -> None:
    wanted = [variant for variant in variants(file, arch) if ("GROUPED" in variant.defines) == grouped]
    if grouped and file in NOT_GROUPED:
        assert not wanted
        return
    assert wanted or (file == RING and arch < 80), f"nothing launches {file} on sm_{arch}"
    for variant in wanted:
        found = sass.resources(compile_variant(variant, arch).log)
        assert variant.entry in found, f"{variant}: ptxas says nothing of it"
        used = found[variant.entry]
        assert (used.spills, used.stack) == (0, 0), f"{variant} on sm_{arch}: {used}"
        assert used.registers <= REGISTERS.get(file, LEAST.registers // THREADS), f"{variant} on sm_{arch}: {used}"
        shared = [int(size) for size in re.findall(r"(\d+) bytes smem", compile_variant(variant, arch).log)]
        assert max(shared, default=0) <= SHARED.get(file, LEAST.cta)


# What makes each kernel what it is, as opcodes that must be there (one of each row) and that must not.
LOCAL_MEMORY = (r"LDL", r"STL")
WIDE_LOAD = r"LDG\.E\.(LTC\S*\.)?128"
MARKS = {
    "dequantize.cu": [r"STG\.E\.128"],
    "quantize_2_vectorised.cu": [WIDE_LOAD, r"LDS\.(U\.)?64", r"SHFL"],
    "gemv_4bit_2_vectorised.cu": [WIDE_LOAD, r"FFMA"],
    "gemm_4bit_3_tensor_core.cu": [r"HMMA\.16(816|88)\.F32", WIDE_LOAD],
    "grad_input_4bit_1_tiled.cu": [r"FFMA", r"LDS\.(U\.)?128"],
    GRADIENT: [r"HMMA\.16(816|88)\.F32", r"LDG\.E\.(LTC\S*\.)?64", r"PRMT", r"STS\.128", WIDE_LOAD],
    RING: [r"HMMA\.16816\.F32", r"LDGSTS\.E\.BYPASS\S*\.128", r"LDGDEPBAR", r"PRMT", r"LDS\.64", WIDE_LOAD],
}


@pytest.mark.parametrize("arch", [75, 90], ids="sm_{}".format)
@pytest.mark.parametrize("file", MARKS)
def test_the_machine_code_has_what_the_kernel_is_about_and_no_local_memory(file: str, arch: int) -> None:
    for variant in variants(file, arch):
        if "GROUPED" in variant.defines:  # the same loop
            continue
        opcodes = [instruction.opcode for instruction in code_of(variant, arch)]
        assert not [o for o in opcodes if matches(LOCAL_MEMORY, o)], f"{variant} on sm_{arch} uses local memory"
        for mark in MARKS[file]:
            assert any(matches((mark,), o) for o in opcodes), f"{variant} on sm_{arch} has no {mark}"


def matches(patterns: tuple[str, ...], opcode: str) -> bool:
    return any(re.match(pattern, opcode) for pattern in patterns)


# --- performance without a clock ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "FP16"])
@pytest.mark.parametrize("tokens", sorted(sass.budgets(RING)), ids="{} tokens".format)
def test_the_ring_kernel_stays_within_the_budget_in_its_header_on_sm_90(tokens: int, dtype: str) -> None:
    instructions, alu = sass.budgets(RING)[tokens]
    found = counted(ring_variant(90, dtype, tokens), 90)
    assert found.instructions is not None
    assert found.alu is not None
    assert found.instructions <= instructions, f"{found.instructions} instructions per weight; budget {instructions}"
    assert found.alu <= alu, f"{found.alu} ALU operations per weight; budget {alu}"


@pytest.mark.parametrize("grouped", [False, True], ids=["one", "grouped"])
@pytest.mark.parametrize("tokens", sorted(sass.budgets(GRADIENT)), ids="{} tokens".format)
def test_the_gradients_kernel_stays_within_the_budget_in_its_header_on_sm_90(tokens: int, grouped: bool) -> None:
    (variant,) = (
        v
        for v in variants(GRADIENT, 90)
        if {"T_BF16", f"TOKENS={tokens}"} < {*v.defines, ""} and ("GROUPED" in v.defines) == grouped
    )
    instructions, alu = sass.budgets(GRADIENT)[tokens]
    found = counted(variant, 90)
    assert found.weights == 32
    assert found.instructions is not None
    assert found.alu is not None
    assert found.instructions <= instructions, f"{found.instructions} instructions per weight; budget {instructions}"
    assert found.alu <= alu, f"{found.alu} ALU operations per weight; budget {alu}"


def test_the_budgets_cover_every_ring_variant_and_are_no_laxer_than_what_was_asked_for() -> None:
    found = sass.budgets(RING)
    launched = {int(re.search(r"TOKENS=(\d+)", " ".join(v.defines))[1]) for v in variants(RING, 90)}  # type: ignore[index]
    assert set(found) == launched
    assert found[8][0] <= 3.3
    assert found[8][1] <= 1.8
    assert found[32][0] <= 5.0


@pytest.mark.parametrize("arch", [80, 90, 100], ids="sm_{}".format)
def test_the_ring_takes_less_than_half_the_instructions_of_any_rung_before_it(arch: int) -> None:
    rungs = ["gemv_4bit_1_naive.cu", "gemv_4bit_2_vectorised.cu", "gemm_4bit_3_tensor_core.cu", RING]
    first = [next(v for v in variants(file, arch) if "T_BF16" in v.defines) for file in rungs]
    costs = [counted(variant, arch).instructions or 0.0 for variant in first]
    assert costs[0] > 2 * costs[1]
    assert min(costs[:3]) > 2 * costs[3] > 0


def test_the_hot_loop_of_the_ring_is_the_one_with_the_look_ups() -> None:
    variant = ring_variant(90, "BF16", 8)
    loop, weights = sass.hot_loop(code_of(variant, 90), variant)
    look_ups = sum(instruction.opcode == "LDS" for instruction in loop)
    # Two weights a look-up; a loop that is another one, or a wrong count of weights, does not come out like this.
    assert weights == 128
    assert weights / 2 <= look_ups <= weights / 2 + 16


@pytest.mark.parametrize("arch", [80, 90, 100, 120], ids="sm_{}".format)
@pytest.mark.parametrize("tokens", [8, 64], ids="{} tokens".format)
def test_a_loop_within_the_loop_counts_as_often_as_it_runs(tokens: int, arch: int) -> None:
    variant = ring_variant(arch, "BF16", tokens)
    code = code_of(variant, arch)
    nest, (inner, weights) = sass.loop_nest(code, variant), sass.hot_loop(code, variant)
    assert sum(times * share for _, times, share in nest) == 128, "a stage of 2 KB, for 32 lanes"
    fetches = [times for one, times, _ in nest if one.name == "LDGSTS"]
    assert fetches == [1.0] * 4, "once for each stage, and inside the loop"
    if tokens == 64:
        assert {times for _, times, _ in nest} == {1.0, 2.0}
        assert sum(times for _, times, _ in nest) / 128 > len(inner) / weights
    found = counted(variant, arch)
    assert found.before + found.loop + found.after == found.size
    assert found.before > 300
    assert found.after > 300


def counted(variant: Variant, arch: int) -> sass.Count:
    try:
        return sass.count(variant, arch)
    except sass.ToolMissingError as missing:
        pytest.skip(str(missing))


# --- the arguments --------------------------------------------------------------------------------------------------

STRUCTS = [
    arguments.QuantizeArguments,
    arguments.DequantizeArguments,
    arguments.ProductArguments,
    arguments.GroupedArguments,
]


def layout_check(kind: type[ctypes.Structure], shift: int = 0) -> str:
    """C++ that compiles only if the compiler lays the struct out as ctypes does (__INTADDR__ is NVRTC's offsetof)."""
    name = kind.__name__
    lines = [f"static_assert(sizeof({name}) == {ctypes.sizeof(kind) + shift});"]
    for field, offset, field_type in arguments.flat_fields(kind):
        lines.append(f"static_assert(__INTADDR__(&(({name} *)0)->{field}) == {offset + shift});")
        lines.append(f"static_assert(sizeof((({name} *)0)->{field}) == {ctypes.sizeof(field_type)});")
    return "\n".join(lines)


@pytest.mark.parametrize("kind", STRUCTS, ids=lambda kind: kind.__name__)
def test_a_packed_argument_has_the_fields_where_the_compiler_expects_them(
    kind: type[ctypes.Structure], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    compile_text(f'#define T_FP32\n#include "device.cuh"\n{layout_check(kind)}', monkeypatch, tmp_path_factory)
    wrong = f'#define T_FP32\n#include "device.cuh"\n{layout_check(kind, shift=4)}'
    with pytest.raises(CompileError, match="static assert"):
        compile_text(wrong, monkeypatch, tmp_path_factory)


@pytest.mark.parametrize("kind", STRUCTS, ids=lambda kind: kind.__name__)
def test_packing_gives_the_bytes_that_ctypes_gives(kind: type[ctypes.Structure]) -> None:
    fields = arguments.flat_fields(kind)
    packed = arguments.packer(kind)(*range(1, len(fields) + 1))
    assert len(packed) == ctypes.sizeof(kind)
    for value, (name, offset, field_type) in enumerate(fields, start=1):
        assert field_type.from_buffer_copy(packed, offset).value == value, name


def compile_text(source: str, monkeypatch: pytest.MonkeyPatch, folders: pytest.TempPathFactory) -> None:
    """Compile a source that is not a kernel file, with the real headers, in a folder of its own."""
    folder = folders.mktemp("kernels")
    for header in kernel_directory().glob("*.cuh"):
        (folder / header.name).write_bytes(header.read_bytes())
    (folder / "layout.cu").write_text(source)
    with monkeypatch.context() as patched:
        patched.setattr("refq4_cuda.nvrtc.kernel_directory", lambda: folder)
        compile_variant(Variant("layout.cu", "", ()), 90, "ptx")
