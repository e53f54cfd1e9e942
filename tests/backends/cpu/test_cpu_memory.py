"""Nothing outside an operand is read or written: operands laid against pages that fault, at every tail.

    | ... pages ... [operand] | page without rights |     and     | page without rights | [operand] ... pages ... |

Results lie against such pages too: ``torch.empty`` is replaced while the kernels run. A fault kills the process, so
each tier runs in its own, and the test reads its exit status. To run the same under AddressSanitizer and UBSan:

    REFQ4_CPU_CFLAGS="-fsanitize=address,undefined -fno-sanitize=alignment -fno-omit-frame-pointer -g" \\
    ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(cc -print-file-name=libasan.so) $(cc -print-file-name=libubsan.so)" \\
    pytest tests/backends/cpu/test_cpu_ops.py
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from patience import BUSY

pytest.importorskip("refq4_cpu", reason="the package refq4_cpu is not installed")
import cpu_tiers
from refq4_cpu import CpuBackend

if (reason := CpuBackend().available()) is not None:
    pytest.skip(f"the CPU backend is not available: {reason}", allow_module_level=True)

GUARDED = r"""
import ctypes, mmap, sys, warnings
import torch, refq4
from refq4.backend import Nested, PackedWeight
from refq4.codebooks import Code, code_from_values, create_dynamic_map, get_codebook
from refq4_cpu import CpuBackend

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
SHAPES = [(1, 32, 32), (5, 96, 32), (17, 64, 64), (35, 192, 64), (3, 256, 256), (66, 160, 32), (7, 77, 64), (3, 33, 32),
          (2, 100, 48)]
AT_END = True
kept = []
plain_empty = torch.empty

def room(nbytes):
    pages = -(-max(nbytes, 1) // PAGE)
    area = mmap.mmap(-1, (pages + 2) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for guard in (address, address + (pages + 1) * PAGE):
        assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), 0) == 0
    kept.append(area)
    return memoryview(area)[PAGE + (pages * PAGE - nbytes if AT_END else 0):][:nbytes]

def guarded_empty(*shape, dtype=torch.float32):
    size = torch.Size(shape[0] if isinstance(shape[0], (tuple, torch.Size)) else shape)
    if size.numel() == 0:
        return plain_empty(size, dtype=dtype)
    out = torch.frombuffer(room(size.numel() * dtype.itemsize), dtype=dtype).view(size)
    return out.fill_(0x7F if dtype is torch.uint8 else float("nan"))

def g(t):
    if t.dim() == 0:
        return guarded_empty(1, dtype=t.dtype).copy_(t)[0]
    return guarded_empty(t.shape, dtype=t.dtype).copy_(t)

if "beyond" in sys.argv:  # proof that the pages do fault
    t = g(torch.zeros(5)); ctypes.string_at(t.data_ptr(), 21)
backend, dynamic = CpuBackend(), code_from_values(create_dynamic_map())
dynamic = Code(*map(g, dynamic))
book = Code(*map(g, get_codebook("nf4").on("cpu")))
backend.kernel  # compiled before torch.empty changes
backend.info()
for AT_END in (True, False):
    torch.empty = guarded_empty
    for n, k, bs in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            A = g(torch.randn(n, k).to(dtype))
            packed, absmax = backend.quantize_4bit(A, book, bs)
            q, absmax2 = backend.quantize_blockwise(absmax, dynamic, 256)
            backend.dequantize_blockwise(q, absmax2, dynamic.values, 256, dtype)
            nested = Nested(absmax2, dynamic.values, g(torch.tensor(0.25)), 256)
            for w in (PackedWeight(packed, absmax, book.values, bs, (n, k), "nf4"),
                      PackedWeight(packed, q, book.values, bs, (n, k), "nf4", nested)):
                backend.dequantize_4bit(w, dtype)
                p = backend.prepare_weight(w)
                if p is not None:
                    backend.restore_weight(p)
                for m in (1, 2, 5, 8, 11):
                    x, bias = g(torch.randn(m, k).to(dtype)), g(torch.randn(n).to(dtype))
                    for operand in (w, p):
                        if operand is not None:
                            y = backend.gemm_4bit(x, operand, bias)
                            assert not y.isnan().any(), "an output was not written"
    torch.empty = plain_empty
    kept.clear()

# The same through the public layer, with every size that has another meaning there in place of K.
warnings.simplefilter("ignore")
refq4.set_backend("cpu")
for AT_END in (True, False):
    for n, k, bs in SHAPES[:5]:
        layer = refq4.nn.LinearNF4(k, n, blocksize=bs).to("cpu")
        state = layer.weight.quant_state
        state.absmax, state.code, layer.bias.data = g(state.absmax), g(state.code), g(layer.bias.data)
        for features in {k, n, k - 1, k + 1, bs, n * k // 2}:
            for shape in ((features,), (2, features), (1, 3, features)):
                x, right = g(torch.randn(shape)), features == k
                for call in (layer.train(), layer.eval(), torch.no_grad()(layer.eval()),
                             lambda x: refq4.functional.gemv_4bit(x, layer.weight, state=state)):
                    try:
                        y = call(x)
                    except ValueError:
                        assert not right
                    else:
                        assert right and not y.isnan().any(), (n, k, shape)
        kept.clear()
print("clean")
"""


def _run(tier: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | cpu_tiers.environment(tier)
    command = [sys.executable, "-c", GUARDED, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=BUSY, check=False)


@pytest.mark.parametrize("tier", cpu_tiers.TIERS)
def test_operands_against_guard_pages_do_not_fault(tier: str, request: pytest.FixtureRequest) -> None:
    cpu_tiers.require(tier, request)
    done = _run(tier)
    assert done.returncode == 0, f"exit status {done.returncode} (-11 is a fault)\n{done.stderr[-2000:]}"
    assert done.stdout.strip() == "clean"


def test_the_guard_pages_do_fault() -> None:
    assert _run("c", "beyond").returncode == -11
