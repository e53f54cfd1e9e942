"""llama.cpp as a peer of the benchmark: q4_0 weights by int8 activations, or a sentence that says what is missing."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess

import pytest
import torch

from refq4 import cli
from refq4.bench import ggml

pytestmark = pytest.mark.reference_only("it is about another library")

PEER = "llama.cpp q4_0 int8"
SIZES = ["--shapes", "64x64", "--m", "1", "--rounds", "15", "--layers", "2", "--no-ops", "--threads", "1"]
COMMAND = ["bench", "--backend", "reference", *SIZES, "--peers"]


@pytest.fixture
def llama_cpp():
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed: pip install llama-cpp-python (it compiles llama.cpp)")


def decoded(stored: torch.Tensor) -> torch.Tensor:
    """The weight [N, K] of q4_0 bytes [N, K / 32, 18], as ggml describes the format."""
    scale = stored[..., :2].clone().view(torch.float16).float()
    codes = torch.cat([stored[..., 2:] & 15, stored[..., 2:] >> 4], dim=-1)
    return ((codes.float() - 8) * scale).flatten(1)


@pytest.mark.parametrize("n", [96, 100])  # 100 rows are not rearranged on any processor
def test_the_product_is_that_of_the_decoded_weight_up_to_int8_activations(llama_cpp, n):
    torch.manual_seed(0)
    k, weights = 256, [torch.randn(n, 256).bfloat16() for _ in range(2)]
    products = ggml.Q4Products(weights)
    for i, weight in enumerate(weights):
        w = decoded(products.quantize(weight))
        assert (w - weight).norm() < 0.1 * weight.norm()
        for m in (1, 3, 16, 1):
            x = torch.randn(m, k).bfloat16()
            y = products(x, i)
            assert y.dtype == torch.float32
            off = (y - x.float() @ w.t()).abs()
            # half a step of int8 for each activation, and its block's scale is rounded to fp16
            amax = x.float().abs().view(m, -1, 32).amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1)
            assert (off <= (amax / 254 + x.float().abs() * 2**-11) @ w.abs().t() + 1e-4).all()
            assert off.max() > 1e-3, "fp32 activations would come closer"


def test_rows_in_eights_are_rearranged_for_the_processor(llama_cpp):
    assert ggml.Q4Products([torch.randn(64, 64)]).buffer_type != "CPU"


def test_the_command_times_it(llama_cpp, capsys):
    assert cli.main([*COMMAND, PEER]) == 0
    assert f"{PEER} ms (x)" in capsys.readouterr().out


def test_k_without_whole_blocks_is_refused():
    with pytest.raises(NotImplementedError, match="blocks of 32 along K, and K is 48"):
        ggml.Q4Products([torch.randn(8, 48)])


# --- packages that are not as expected: one sentence, and the other peers go on ---------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder lib of a package llama_cpp that is found before an installed one."""
    folder = tmp_path / "llama_cpp" / "lib"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    ggml.library.cache_clear()
    yield folder
    ggml.library.cache_clear()


def test_without_the_package_the_command_says_how_to_get_it(package, monkeypatch, capsys):
    monkeypatch.setattr(ggml.importlib.util, "find_spec", lambda name: None)
    assert cli.main([*COMMAND, "torch bf16", PEER]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "torch bf16 ms (x)" in out
    assert f"{PEER}: ImportError: llama-cpp-python is not installed: pip install llama-cpp-python" in out


def test_a_package_without_the_library_says_so(package):
    with pytest.raises(ImportError, match="llama-cpp-python has no libggml-cpu in llama_cpp/lib"):
        ggml.library()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("void ggml_init(void) {}", "undefined symbol"),
        ("\n".join(f"void {name}(void) {{ __builtin_trap(); }}" for name in ggml._FUNCTIONS), "status -"),
    ],
    ids=["a function is missing", "it ends the process"],
)
def test_a_package_that_has_changed_says_what_failed(package, body, reason):
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("there is no C compiler here for a library: apt install gcc")
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", package / "libggml-cpu.so"]
    subprocess.run(command, input=body, text=True, check=True)
    with pytest.raises(ImportError, match=rf"failed in a first product \(.*{reason}.*\): try version") as raised:
        ggml.library()
    assert len(f"{raised.value}".splitlines()) == 1
