"""What quantising and decoding may hold in memory besides their operands."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROBE = """
import resource, sys, torch, refq4.functional as F
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.set_num_threads(2)
F.dequantize_4bit(*F.quantize_4bit(torch.randn(64, 64), compress_statistics=True))  # what loads on first use is loaded
A = torch.randn(4096, 4096)
start = peak()
packed, state = F.quantize_4bit(A, quant_type="nf4", compress_statistics=True, backend="reference")
quantised = peak()
F.dequantize_4bit(packed, state, backend="reference")
print(quantised - start, peak() - quantised)
"""


def test_quantising_a_large_matrix_holds_no_multiple_of_it():
    """A nearest-value search by broadcasting would hold 16 fp32 numbers a weight: 1 GiB here. Chunks hold a few MiB."""
    if not sys.platform.startswith("linux"):
        pytest.skip("peak memory is read from getrusage in Linux's units; run this on Linux")
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    quantise, decode = map(int, done.stdout.split())
    weights = 4096 * 4096
    assert quantise < 2 * weights + 64 * 2**20, "codes (1 byte a weight), packed (half a byte) and chunks"
    assert decode < 5 * weights + 64 * 2**20, "the fp32 result, codes, and chunks"
