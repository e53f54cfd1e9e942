"""Compiling the CPU kernels, by what goes wrong: no compiler, damaged libraries, tiers that the processor lacks."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import BUSY

from refq4.backend import BackendUnavailableError, Call, PackedWeight
from refq4.codebooks import get_codebook
from refq4.internals.buildcache import CacheError

pytest.importorskip("refq4_cpu", reason="the package refq4_cpu is not installed")
import cpu_tiers
from refq4_cpu import CpuBackend, build, calibrate
from refq4_cpu.arguments import WEIGHT_FIELDS, declare
from refq4_cpu.kernels import GRAD_INPUT_KERNELS, PRODUCT_KERNELS, ProductKernel, addresses


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REFQ4_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- compiling ------------------------------------------------------------------------------------------------------

_needs_compiler = pytest.mark.skipif(
    CpuBackend().available() is not None, reason=f"the CPU backend is not available: {CpuBackend().available()}"
)

MULTIPLY = """
import torch
from refq4.codebooks import get_codebook
from refq4_cpu import CpuBackend
code = get_codebook("nf4").on("cpu")
packed, absmax = CpuBackend().quantize_4bit(torch.linspace(-1, 1, 4096), code, 64)
print(int(packed.sum()))
"""


def _start(**environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MULTIPLY], env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@_needs_compiler
def test_two_processes_at_once_compile_one_library(empty_cache: Path) -> None:
    both = [_start(REFQ4_CPU_TIER="c"), _start(REFQ4_CPU_TIER="c")]
    (out_a, err_a), (out_b, err_b) = (process.communicate(timeout=BUSY) for process in both)
    assert [process.returncode for process in both] == [0, 0], err_a + err_b
    assert out_a == out_b
    assert (err_a + err_b).count("compiling the c kernels") == 1
    assert len(list((empty_cache / "cpu").glob("refq4_cpu-c-*.so"))) == 1


@_needs_compiler
def test_a_truncated_library_is_compiled_again(empty_cache: Path) -> None:
    first = _start(REFQ4_CPU_TIER="c").communicate(timeout=BUSY)
    (library,) = (empty_cache / "cpu").glob("refq4_cpu-c-*.so")
    library.write_bytes(library.read_bytes()[:4096])
    second = _start(REFQ4_CPU_TIER="c").communicate(timeout=BUSY)
    third = _start(REFQ4_CPU_TIER="c").communicate(timeout=BUSY)
    assert first[0] == second[0] == third[0]
    assert "compiling" in second[1]
    assert "compiling" not in third[1]


def test_without_a_compiler_the_backend_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build, "_zig", list)
    build._cpu_features.cache_clear()
    reason = CpuBackend().available()
    build._cpu_features.cache_clear()
    assert reason is not None
    assert reason.startswith("there is no C compiler (looked for $CC, cc, gcc, clang)")
    assert "apt install gcc" in reason


def test_a_wrong_cc_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    reason = CpuBackend().available()
    assert reason == "the environment variable CC='no-such-compiler -m64' names no C compiler that starts"


@pytest.mark.parametrize("variable", ["CC", "REFQ4_CPU_CFLAGS"])
def test_quotes_that_do_not_close_are_named_with_the_variable(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "gcc '-O2")
    with pytest.raises(build.BuildError, match=f"environment variable {variable}=.*No closing quotation"):
        build.words_of(variable)


@_needs_compiler
def test_where_nothing_can_be_kept_beside_the_library_it_is_calibrated_for_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> Path:
        raise CacheError("can't write to the cache")

    monkeypatch.setattr(calibrate, "cached", refuse)
    backend = CpuBackend()
    assert backend.info()["calibration"], "measured, though not kept"


@_needs_compiler
def test_a_compiler_error_is_shown_with_the_command(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFQ4_CPU_CFLAGS", "-Dmin64=syntax(error")
    build._load.cache_clear()
    with pytest.raises(build.BuildError, match=r"(?s)CPU kernels failed.*error.*The command was.*library\.c"):
        build.load(build.Tier("c"))


@_needs_compiler
def test_a_compile_that_failed_is_not_tried_again(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REFQ4_CPU_TIER", "c")
    monkeypatch.setenv("REFQ4_CPU_CFLAGS", "-Dmin64=syntax(error")
    build._load.cache_clear()
    reasons = [CpuBackend().available() for _ in range(2)]
    with pytest.raises(BackendUnavailableError, match=r"(?s)CPU kernels failed.*The command was") as failure:
        CpuBackend().library()
    assert reasons == [str(failure.value).removeprefix("backend 'cpu': ")] * 2
    assert capfd.readouterr().err.count("compiling the c kernels") == 1
    monkeypatch.delenv("REFQ4_CPU_CFLAGS")
    assert CpuBackend().available() is None, "other flags are another compile"


IN_A_LAYER = """
import torch, refq4
layer = refq4.nn.LinearNF4(64, 32).to("cpu").eval()
with refq4.trace() as t:
    layer(torch.randn(1, 64)), layer(torch.randn(1, 64))
print(t.text(width=1000))
try:
    refq4.set_backend("cpu")
except refq4.backend.BackendUnavailableError as error:
    print("by name:", error)
"""


@_needs_compiler
def test_where_the_kernels_do_not_compile_auto_takes_the_reference_and_says_why(empty_cache: Path) -> None:
    environment = {**os.environ, "REFQ4_CPU_TIER": "c", "REFQ4_CPU_CFLAGS": "-Dmin64=syntax(error"}
    environment.pop("REFQ4_BACKEND", None)
    done = subprocess.run([sys.executable, "-c", IN_A_LAYER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("compiling the c kernels") == 1
    assert "passed over cpu: compiling the CPU kernels failed" in done.stdout
    assert "by name: backend 'cpu' is not available: compiling the CPU kernels failed" in done.stdout


# --- macOS, as far as another system can show it ----------------------------------------------------------------------


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the platform module says on an Apple M2."""
    monkeypatch.setattr(build.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(build.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(build, "cpu_features", lambda: 7 << 4)
    monkeypatch.delenv(build.TIER_VARIABLE, raising=False)


@pytest.mark.usefixtures("mac")
def test_on_a_mac_the_best_tier_is_compiled_for_its_processor() -> None:
    tier = build.chosen_tier()
    assert (str(tier), build.supported_tiers()) == ("neon_bf16", ["neon_bf16", "neon_fhm", "neon", "c"])
    flags = build.compiler_flags(tier)
    assert "-mcpu=native" in flags
    assert [flag for flag in flags if flag.startswith("-D")] == [
        "-DREFQ4_NEON",
        "-DREFQ4_NEON_FHM",
        "-DREFQ4_NEON_BF16",
    ]
    assert "-mcpu=native" not in build.compiler_flags(build.Tier("neon_bf16", emulated=True))


def test_elsewhere_a_library_runs_on_every_processor_of_its_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache may lie in a home that several machines share."""
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert not [flag for flag in build.compiler_flags(build.Tier("neon_bf16")) if "native" in flag]


@pytest.mark.usefixtures("mac")
def test_apples_compiler_takes_every_flag() -> None:
    """``-###`` prints what clang would start. An unknown flag is an error; a processor called native is the host's."""
    if shutil.which("clang") is None:
        pytest.skip("there is no clang to ask: on Debian and Ubuntu, `apt-get install clang`")
    flags = ["-mcpu=apple-m1" if flag == "-mcpu=native" else flag for flag in build.compiler_flags(build.chosen_tier())]
    command = [
        "clang",
        "--target=arm64-apple-macosx13",
        "-###",
        "-Werror",
        *flags,
        "-shared",
        "library.c",
        "-o",
        "x.so",
    ]
    done = subprocess.run(command, cwd=build.kernel_directory(), capture_output=True, text=True, check=False)
    assert (done.returncode, "error:" in done.stderr) == (0, False), done.stderr[-2000:]
    assert "-dylib" in done.stderr
    done = subprocess.run([*command, "--no-such-flag"], cwd=build.kernel_directory(), capture_output=True, check=False)
    assert done.returncode != 0, "the question can be answered with no"


# --- tiers that the processor lacks ---------------------------------------------------------------------------------


@pytest.fixture
def bare_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with no instruction beyond those of every compiler's default."""
    monkeypatch.setattr(build, "cpu_features", lambda: 0)
    monkeypatch.delenv(build.TIER_VARIABLE, raising=False)
    monkeypatch.delenv(build.EMULATE_VARIABLE, raising=False)


@_needs_compiler
@pytest.mark.usefixtures("bare_processor")
def test_a_tier_that_the_processor_lacks_is_refused_and_the_refusal_says_how_to_emulate_it(monkeypatch) -> None:
    monkeypatch.setenv(build.TIER_VARIABLE, "avx512")
    for value in (None, "", "0"):
        if value is not None:
            monkeypatch.setenv(build.EMULATE_VARIABLE, value)
        assert CpuBackend().available() == (
            "the environment variable REFQ4_CPU_TIER='avx512': this machine can't run that tier, only c. "
            "To run it emulated, which is slow, set REFQ4_CPU_EMULATE=1"
        )
    monkeypatch.setenv(build.EMULATE_VARIABLE, "yes")
    assert CpuBackend().available() == "the environment variable REFQ4_CPU_EMULATE='yes' is neither '0' nor '1'"


@_needs_compiler
@pytest.mark.usefixtures("bare_processor")
def test_no_tier_is_emulated_that_was_not_named(monkeypatch) -> None:
    monkeypatch.setenv(build.EMULATE_VARIABLE, "1")
    assert build.chosen_tier() == build.Tier("c")
    monkeypatch.setenv(build.TIER_VARIABLE, "c")
    assert build.chosen_tier() == build.Tier("c")


@_needs_compiler
@pytest.mark.usefixtures("bare_processor")
def test_without_simde_an_emulated_tier_names_the_package(monkeypatch) -> None:
    monkeypatch.setenv(build.TIER_VARIABLE, "avx2")
    monkeypatch.setenv(build.EMULATE_VARIABLE, "1")
    monkeypatch.setattr(build, "_finds_simde", lambda command: False)
    assert CpuBackend().available() == (
        "the tier 'avx2' can't be emulated: the compiler finds no <simde/x86/avx512.h>. Install SIMDe's headers, on "
        "Debian and Ubuntu with `apt-get install libsimde-dev`"
    )


@_needs_compiler
@pytest.mark.usefixtures("bare_processor")
def test_an_emulated_tier_says_so_everywhere_and_is_not_calibrated(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv(build.TIER_VARIABLE, "avx2")
    monkeypatch.setenv(build.EMULATE_VARIABLE, "1")
    cpu_tiers.require("avx2", request)
    backend = CpuBackend()
    info = backend.info()
    assert (info["tier"], info["tiers"], info["calibration"]) == ("avx2 (emulated)", ["c"], {})
    assert "refq4_cpu-avx2-emulated-" in info["library"]
    call = Call("gemm_4bit", "cpu", torch.float32, 4, 64, 128, 64, "nf4")
    assert backend.kernel(call) == "gemm_4bit_2_avx2 (emulated)"
    call = Call("quantize_4bit", "cpu", torch.float32, 1, 64, 128, 64, "nf4")
    assert backend.kernel(call) == "quantize_2_avx2 (emulated)"


@_needs_compiler
def test_an_emulated_tier_gives_the_bits_of_the_processor(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Sums included: a fused multiply-add is emulated as one. Compared where the processor has AVX2 to compare with."""
    tiers = [build.Tier("avx2", emulated=True), cpu_tiers.require("avx2", request)]
    code, results = get_codebook("nf4").on("cpu"), []
    random = torch.Generator().manual_seed(0)
    A, x = torch.randn(48, 512, generator=random), torch.randn(7, 512, generator=random)
    for tier in tiers:
        monkeypatch.setattr(build, "chosen_tier", lambda tier=tier: tier)
        backend, found = CpuBackend(), []
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            packed, absmax = backend.quantize_4bit(A.to(dtype), code, 64)
            weight = PackedWeight(packed, absmax, code.values, 64, (48, 512), "nf4")
            found += [packed, absmax, backend.dequantize_4bit(weight, dtype)]
            for kernel in PRODUCT_KERNELS:
                for m in (1, 7):
                    if kernel.refuses(tier.features, dtype, m, 512, 64, "canonical") is None:
                        found.append(backend._product(x[:m].to(dtype), weight, None, kernel))
        results.append(found)
    assert len(results[0]) == 9 + 8 + 11 + 8, "bits, and the products of each kernel that takes the dtype"
    assert all(torch.equal(emulated, native) for emulated, native in zip(*results, strict=True))


@_needs_compiler
def test_unknown_tiers_kernels_and_pools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFQ4_CPU_TIER", "avx1024")
    assert "REFQ4_CPU_TIER='avx1024' is not a tier; known: avx512_bf16" in (CpuBackend().available() or "")
    monkeypatch.setenv("REFQ4_CPU_TIER", "c")
    monkeypatch.setenv("REFQ4_CPU_KERNEL", "gemm_9")
    assert "REFQ4_CPU_KERNEL='gemm_9' is not a kernel; known: gemv_4bit_1_scalar" in (CpuBackend().available() or "")
    monkeypatch.delenv("REFQ4_CPU_KERNEL")
    monkeypatch.setenv("REFQ4_CPU_THREADS", "many")
    with pytest.raises(RuntimeError, match="REFQ4_CPU_THREADS='many'"):
        CpuBackend().library()


@_needs_compiler
def test_the_processors_bits_agree_with_what_the_system_reports() -> None:
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        pytest.skip("this system has no /proc/cpuinfo to compare with")
    has = {"avx2": "avx2" in flags, "avx512": "avx512vl" in flags, "avx512_bf16": "avx512_bf16" in flags, "c": True}
    has |= {"neon": "asimd" in flags, "neon_fhm": "asimdfhm" in flags, "neon_bf16": {"asimdfhm", "bf16"} <= flags}
    assert build.supported_tiers() == [tier for tier in build.TIERS if has[tier]]


@_needs_compiler
@pytest.mark.parametrize("tier", list(build.TIERS))
def test_every_tier_compiles_also_where_it_cannot_run(tier: str) -> None:
    """A change made on a machine with AVX2 must not break the sources of AVX-512, nor those of NEON."""
    emulated = not cpu_tiers.native(tier)
    if emulated and (missing := build.emulation_lacks()) is not None:
        pytest.skip(missing)
    library = build.load(build.Tier(tier, emulated))  # loading runs none of it
    assert all(hasattr(library.functions, f"refq4_{name}") for name in ("product", "quantize", "dequantize", "tile"))
    declare(library.functions)
    kernels = (*PRODUCT_KERNELS, *GRAD_INPUT_KERNELS)
    found, has = addresses(library), {kernel.name for kernel in kernels if kernel.feature in library.tier.features}
    assert set(found) == has, "each kernel of the tier is found by its name"
    assert len(set(found.values())) == len(found)
    assert all(
        (library.functions.refq4_kernel(kernel.name.encode()) is None) == (kernel.name not in has) for kernel in kernels
    )


@_needs_compiler
def test_a_library_that_came_with_the_wheel_is_taken_if_it_was_made_of_the_sources_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, built = tmp_path / "kernels", tmp_path / "built"
    shutil.copytree(build.kernel_directory(), kernels)
    built.mkdir()
    shutil.copy(build.load(build.Tier("c")).path, built / "refq4_cpu-c.so")
    monkeypatch.setattr(build, "kernel_directory", lambda: kernels)
    (built / "sources").write_text(build.cache_key(*build._sources()))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("REFQ4_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    build._load.cache_clear()
    library = build.load(build.Tier("c"))
    assert library.path == built / "refq4_cpu-c.so"
    assert library.functions.refq4_kernel(b"gemm_4bit_1_scalar") is not None
    assert library.compiler.version == "none: it came with the wheel"
    (kernels / "refq4.h").write_text("/* edited */")
    build._load.cache_clear()
    with pytest.raises(build.BuildError, match="there is no C compiler"):
        build.load(build.Tier("c"))


@_needs_compiler
def test_a_kernel_that_the_library_lacks_is_an_error_when_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    misspelt = ProductKernel("gemm_4bit_1_scaler")
    monkeypatch.setattr("refq4_cpu.kernels.PRODUCT_KERNELS", (*PRODUCT_KERNELS, misspelt))
    assert "has no kernel gemm_4bit_1_scaler, which refq4_cpu/kernels.py lists" in (CpuBackend().available() or "")
    with pytest.raises(BackendUnavailableError, match=r"must stand in the table of kernels/library\.c under that name"):
        CpuBackend().library()


@_needs_compiler
def test_python_packs_a_weight_as_the_compiler_lays_it_out() -> None:
    formats = ["@" + "".join(letter for _, letter in WEIGHT_FIELDS[:i]) for i in range(len(WEIGHT_FIELDS) + 1)]
    lines = [
        f'_Static_assert(offsetof(Weight, {name}) == {struct.calcsize(f"{before}0{letter}")}, "{name}");'
        for (name, letter), before in zip(WEIGHT_FIELDS, formats, strict=False)
    ]
    lines.append(f'_Static_assert(sizeof(Weight) == {struct.calcsize(formats[-1])}, "size");')
    assert _syntax_errors("\n".join(lines)) == ""
    # The comparison itself can fail:
    assert "packed" in _syntax_errors('_Static_assert(offsetof(Weight, packed) == 8, "packed");')


def _syntax_errors(lines: str) -> str:
    """What the compiler says to C lines after refq4.h; empty if it accepts them."""
    command = [*build.find_compiler().command, "-std=gnu11", "-w", "-fsyntax-only", "-I", str(build.kernel_directory())]
    source = f'#include "refq4.h"\n{lines}\n'
    done = subprocess.run([*command, "-x", "c", "-"], input=source, capture_output=True, text=True, check=False)
    return done.stderr


# --- kernel files that can be opened alone ---------------------------------------------------------------------------

SOURCES = sorted(path.name for path in build.kernel_directory().glob("*.[ch]"))


def _compile_line(name: str) -> list[str]:
    """The command at the top of a kernel file, as words."""
    head = (build.kernel_directory() / name).read_text().partition("*/")[0]
    (line,) = re.findall(r"^ \* (cc .*)$", head, re.MULTILINE)
    return shlex.split(line)


@_needs_compiler
@pytest.mark.parametrize("name", SOURCES)
def test_each_kernel_file_compiles_alone_by_the_line_at_its_top(name: str, tmp_path: Path) -> None:
    words = _compile_line(name)
    assert words[-1] == name
    flags = words[1:-1]
    named = next((tier for tier in build.TIERS if f"-DREFQ4_{tier.upper()}" in flags), "c")
    if not cpu_tiers.native(named):  # the same file against SIMDe's versions of the instructions
        flags = [flag for flag in flags if not flag.startswith("-m")] + ["-DREFQ4_EMULATED"]
    if "-DREFQ4_EMULATED" in flags and (missing := build.emulation_lacks()) is not None:
        pytest.skip(missing)
    compiler = [*build.find_compiler().command, *flags, "-Werror", "-fsyntax-only"]
    done = subprocess.run([*compiler, name], cwd=build.kernel_directory(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", SOURCES)
def test_the_compile_line_has_the_flags_of_its_tier(name: str) -> None:
    flags = _compile_line(name)[1:-1]
    named = next((tier for tier in build.TIERS if tier != "c" and tier in name), None)
    assert named is None or f"-DREFQ4_{named.upper()}" in flags
    allowed = build.Tier(named or ("avx2" if name in ("library.c", "simd.h") else "c")).flags
    assert {flag for flag in flags if flag.startswith(("-m", "-DREFQ4"))} <= {*allowed, "-DREFQ4_EMULATED"}


@pytest.mark.parametrize("name", SOURCES)
def test_no_macro_is_longer_than_three_lines(name: str) -> None:
    text = (build.kernel_directory() / name).read_text()
    macros = re.findall(r"^#define(?:.*\\\n)*.*$", text, re.MULTILINE)
    assert [macro for macro in macros if macro.count("\n") > 2] == []


# --- threads --------------------------------------------------------------------------------------------------------

THREADS = """
import os, threading
import torch
from refq4.backend import PackedWeight
from refq4.codebooks import get_codebook
from refq4_cpu import CpuBackend

torch.set_num_threads(2)
backend, code = CpuBackend(), get_codebook("nf4").on("cpu")
packed, absmax = backend.quantize_4bit(torch.randn(512, 512), code, 64)
weight = PackedWeight(packed, absmax, code.values, 64, (512, 512), "nf4")
x = torch.randn(16, 512)
expected = backend.gemm_4bit(x, weight, None)

wrong = []
def work():
    for _ in range(50):
        if not torch.equal(backend.gemm_4bit(x, weight, None), expected):
            wrong.append(1)
crowd = [threading.Thread(target=work) for _ in range(6)]
[t.start() for t in crowd]; [t.join() for t in crowd]
assert not wrong, "concurrent callers disagree"

child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(backend.gemm_4bit(x, weight, None), expected) else 3)
assert os.waitpid(child, 0)[1] == 0, "the child of a fork can't multiply"
assert torch.equal(backend.gemm_4bit(x, weight, None), expected)
print("clean")
"""


@_needs_compiler
@pytest.mark.parametrize("pool", ["torch", "own"])
def test_concurrent_callers_and_a_forked_child_get_the_same_bits(pool: str) -> None:
    environment = {**os.environ, "REFQ4_CPU_THREADS": pool}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", THREADS], env=environment, capture_output=True, text=True, timeout=BUSY,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "clean"


@_needs_compiler
def test_both_pools_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    code, results = get_codebook("nf4").on("cpu"), []
    A, x = torch.randn(300, 256), torch.randn(20, 256).bfloat16()
    for pool in ("torch", "own", "torch"):
        monkeypatch.setenv("REFQ4_CPU_THREADS", pool)
        backend = CpuBackend()
        assert pool in backend.info()["threads"] or pool == "torch"
        packed, absmax = backend.quantize_4bit(A, code, 64)
        results.append(backend.gemm_4bit(x, PackedWeight(packed, absmax, code.values, 64, (300, 256), "nf4"), None))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
