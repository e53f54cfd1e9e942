"""The Triton backend without a GPU: its PTX runs in the emulator, and its code for AMD's GPUs compiles."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import refq4
from refq4.testing import Case, check
from refq4.testing.isolation import isolated_registry

pytest.importorskip("refq4_cuda", reason="the package refq4_cuda is not installed: pip install -e .")
refq4_triton = pytest.importorskip("refq4_triton", reason="the package refq4_triton is not installed: pip install -e .")
HAS_TRITON = refq4_triton.TritonEmulatorBackend().available()
needs_triton = pytest.mark.skipif(HAS_TRITON is not None, reason=str(HAS_TRITON))
ONES = [
    Case("quantize_4bit", k=127, blocksize=64, weights="normal"),
    Case("quantize_4bit", k=1000, blocksize=100, weights="ramp", dtype="bfloat16"),
    Case("dequantize_4bit", k=127, blocksize=64, weights="normal", nested=True, dtype="float16"),
    Case("quantize_blockwise", k=300, blocksize=256, weights="normal"),
    Case("dequantize_blockwise", k=300, blocksize=256, weights="normal", dtype="bfloat16"),
    Case("gemv_4bit", m=1, n=9, k=130, blocksize=64, weights="normal", nested=True, bias=True, dtype="bfloat16"),
    Case("gemm_4bit", m=5, n=33, k=96, blocksize=64, weights="normal", bias=True, dtype="float16"),
    Case("gemm_4bit", m=18, n=40, k=65, blocksize=32, weights="normal", dtype="float32"),
    Case("gemm_4bit", m=16, n=32, k=2048, blocksize=64, weights="normal", dtype="float32"),
]


@pytest.fixture(autouse=True)
def emulated():
    """Whatever is installed: the tests find the backend that lies beside them."""
    with isolated_registry():
        refq4.register_backend(refq4_triton.TritonEmulatorBackend(), replace=True)
        yield


@needs_triton
@pytest.mark.parametrize("case", ONES, ids=str)
def test_it_agrees_with_the_reference(case):
    result = check(case, backend="triton-emulator")
    assert str(result).endswith("same"), result


@needs_triton
@pytest.mark.parametrize("value", [float("inf"), 3e38])
def test_an_infinity_stays_one(value):
    torch.manual_seed(0)
    layer, x = refq4.nn.LinearNF4(64, 32, bias=False).to("cpu").eval(), torch.randn(2, 64)
    x[0, 3] = value
    x[0, 4] = value if value == 3e38 else x[0, 4]
    results = {}
    for name in ("reference", "triton-emulator"):
        with refq4.use_backend(name), torch.no_grad():
            results[name] = layer(4 * x)
    wanted, got = results["reference"], results["triton-emulator"]
    assert wanted[0].isinf().any()
    assert torch.equal(got.isinf(), wanted.isinf())
    assert torch.equal(got.isnan(), wanted.isnan())


@needs_triton
@pytest.mark.slow
def test_it_passes_the_quick_verification():
    report = refq4.testing.verify("triton-emulator", depth="quick", progress=False)
    assert report.agrees, str(report)


@needs_triton
def test_a_layer_computes_through_it_and_the_trace_names_its_kernel():
    x = torch.ones(3, 64)
    with refq4.use_backend("triton-emulator"), refq4.trace() as trace, torch.no_grad():
        layer = refq4.nn.LinearNF4(64, 8).to("cpu")
        y = layer(x)
    assert "gemm" in str(trace)
    with refq4.use_backend("reference"), torch.no_grad():
        assert torch.allclose(y, layer(x), atol=1e-5)


@needs_triton
@pytest.mark.parametrize("target", ["gfx942", "gfx1100"])
@pytest.mark.parametrize("name", ["dequantize", "gemm"])
def test_its_kernels_compile_for_amd(name, target):
    made = compiled_as_for_bf16(name, target)
    assert made.asm["hsaco"][:4] == b"\x7fELF"
    assert target in made.asm["amdgcn"]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942", "gfx1100"])
@pytest.mark.parametrize("name", ["dequantize", "dequantize_bytes", "block_absmax", "block_codes", "gemv", "gemm"])
def test_every_kernel_compiles_for_every_target(name, target):
    assert compiled_as_for_bf16(name, target).asm["hsaco" if target.startswith("gfx") else "ptx"]


def compiled_as_for_bf16(name: str, target: str):
    """A kernel with the types that a bf16 layer with double quantisation gives it."""
    from refq4_triton import emulated

    weight = ("*u8", "*fp32", "*u8", "i32", "*fp32", "*fp32", "*fp32", "i32")
    types, tile = {
        "dequantize": (("*bf16", "i32", *weight), {"BLOCK": 256}),
        "dequantize_bytes": (("*fp32", "i32", "*u8", "*fp32", "i32", "*fp32", "i32"), {"BLOCK": 256}),
        "block_absmax": (("*fp32", "*bf16", "i32", "i32"), {"CHUNK": 256}),
        "block_codes": (
            ("*u8", "*bf16", "i32", "*fp32", "i32", "*fp32", "*u8", "i32", "i32"),
            {"PACKED": True, "LEVELS": 4, "BLOCK": 256},
        ),
        "gemv": (("*bf16", "*bf16", "*bf16", "i32", "i32", *weight), {"BN": 8, "BK": 128}),
        "gemm": (("*bf16", "*bf16", "*bf16", "i32", "i32", "i32", *weight), {"BM": 16, "BN": 32, "BK": 32}),
    }[name]
    return emulated.compiled(name, types, (), tuple(tile.items()), target)


@needs_triton
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.where(element % 2 == 0, byte >> 4, byte & 15)", "tl.where(element % 2 == 1, byte >> 4, byte & 15)"),
        ("mask = element < numel\n    value = decoded", "mask = element <= numel\n    value = decoded"),
        ("element // blocksize, mask, absmax, nested", "(element - 1) // blocksize, mask, absmax, nested"),
    ],
    ids=["the low nibble first", "no mask for the last element", "the scale of the element before"],
)
def test_a_planted_bug_is_seen(old, new, tmp_path, monkeypatch):
    """In a copy of the kernels: the emulator names it, or the numbers differ."""
    from refq4_triton import emulated, kernels

    source = (tmp_path / "kernels.py").absolute()
    text = Path(kernels.__file__).read_text()
    assert old in text, "the kernel has changed: change the bug, too"
    source.write_text(text.replace(old, new, 1))
    spec = importlib.util.spec_from_file_location("kernels_with_a_bug", source)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    monkeypatch.setattr(emulated, "kernels", copy)
    emulated.compiled.cache_clear()
    result = check(Case("dequantize_4bit", k=128, blocksize=64, weights="normal"), backend="triton-emulator")
    emulated.compiled.cache_clear()
    assert not str(result).endswith("same")


# --- what it says where it can't ------------------------------------------------------------------------------------


def test_without_a_gpu_it_names_the_three_makers_and_the_emulator(monkeypatch):
    backend = refq4_triton.TritonBackend()
    monkeypatch.setattr("refq4_triton.backend.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    told = backend.available()
    for word in ("NVIDIA", "ROCm", "XPU", "https://pytorch.org", "triton-emulator"):
        assert word in told
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    assert backend.available() is None


def test_without_triton_the_remedy_is_the_extra(monkeypatch):
    monkeypatch.setattr("refq4_triton.backend.find_spec", lambda name: None)
    for backend in (refq4_triton.TritonBackend(), refq4_triton.TritonEmulatorBackend()):
        assert "Triton is not installed: pip install" in backend.available()


def test_what_it_can_not_take_is_a_reason():
    backend = refq4_triton.TritonEmulatorBackend()
    call = refq4.backend.Call("gemm_4bit", "cpu", torch.float64, m=2, n=8, k=64, blocksize=64, codebook="nf4")
    assert "not compute in torch.float64" in backend.can_run(call)
    large = call._replace(dtype=torch.float32, n=2**20, k=2**12)
    assert "32 bits" in backend.can_run(large)
    assert backend.can_run(call._replace(dtype=torch.float32)) is None
    assert "it computes on cuda and xpu" in refq4_triton.TritonBackend().can_run(large)


def test_on_amd_and_intel_the_cuda_backend_names_this_one(monkeypatch):
    from refq4_cuda import bindings

    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert bindings.why_no_gpu().endswith("use the backend triton, which computes there")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    assert "Intel" in bindings.why_no_gpu()


def test_importing_it_imports_no_triton():
    # torch imports it by itself, where it is installed, when refq4 registers its ops
    code = "import sys, refq4; before = 'triton' in sys.modules; import refq4_triton; "
    code += "refq4_triton.TritonBackend().available(); print('triton' in sys.modules and not before)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
