"""Kernels that nobody wrote for the emulator: their PTX as NVRTC and Triton emit it, judged by torch.

The CUDA sources are in ``foreign/``, the launches in ``tests/support/foreign.py`` and ``foreign_triton.py``. A fault
planted in a copy must be caught, under the right name.
"""

from __future__ import annotations

import pytest

pytest.importorskip("refq4_cuda", reason="the package refq4_cuda is not installed: pip install -e .")
from foreign import CASES, ptx_of


@pytest.mark.parametrize("kernel", CASES)
def test_a_cuda_kernel_computes_what_torch_does(kernel):
    file, check = CASES[kernel]
    check(ptx_of(file))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [75, 86, 89, 90])
@pytest.mark.parametrize("kernel", CASES)
def test_it_does_for_every_architecture(kernel, arch):
    file, check = CASES[kernel]
    if arch == 75 and file in ("matrices.cu", "scans.cu", "arithmetic.cu"):
        pytest.skip("the file has instructions that begin with sm_80 (cp.async, redux, bf16): nothing to install")
    check(ptx_of(file, arch))
