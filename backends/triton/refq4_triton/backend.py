"""The Triton backend, and the same backend without a GPU: two classes that differ in where a launch goes.

    tensors  --->  kernel, grid, arguments  --->  TritonBackend          Triton's own launcher, on a GPU
                                            '-->  TritonEmulatorBackend  the kernel's PTX, on CPU tensors (emulated.py)

This file allocates the results and chooses tiles; what is computed is in ``kernels.py``.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from refq4.backend import Backend, BackendUnsupportedError, Call, Nested, PackedWeight, PreparedWeight
from refq4.codebooks import Code
from refq4.internals.remedies import install
from refq4.layout import block_count, packed_bytes

__all__ = ["TritonBackend", "TritonEmulatorBackend"]

_BLOCK, _CHUNK = 256, 256  # elements, or bytes of codes, per program
_MOST = 2**31  # elements are counted in 32 bits


class TritonBackend(Backend):
    """Triton kernels on torch's CUDA, ROCm and XPU tensors."""

    name = "triton"
    priority = 5
    devices: tuple[str, ...] = ("cuda", "xpu")
    description = "kernels in Triton, one file, for NVIDIA's, AMD's and Intel's GPUs"

    def available(self) -> str | None:
        if (missing := _why_no_triton()) is not None:
            return missing
        if torch.cuda.is_available() or torch.xpu.is_available():
            return None
        return (
            f"torch {torch.__version__} finds no GPU: for one of NVIDIA, AMD (ROCm) or Intel (XPU) install the build "
            "of torch that is made for it, from https://pytorch.org; without a GPU, the backend triton-emulator runs "
            "the same kernels"
        )

    def can_run(self, call: Call) -> str | None:
        if (reason := super().can_run(call)) is not None:
            return reason
        if call.layout != "canonical":
            return f"it reads the layout canonical only, not {call.layout}"
        if max(call.n * call.k, call.m * call.k, call.m * call.n) >= _MOST:
            return "it counts elements in 32 bits, and a tensor has 2**31 or more"
        return None

    def launch(self, name: str, grid: tuple[int, ...], *args: Tensor | int | None, **tile: int) -> None:
        """Run a kernel of ``kernels.py`` on the device of the first argument."""
        from . import kernels

        first = args[0]
        assert isinstance(first, Tensor)
        with torch.get_device_module(first.device).device(first.device):
            getattr(kernels, name)[grid](*args, **tile, enable_fp_fusion=False)

    # --- quantising and dequantising ----------------------------------------------------------------------------------

    def quantize_4bit(
        self, A: Tensor, code: Code, blocksize: int, absmax: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty(packed_bytes(A.numel()), dtype=torch.uint8, device=A.device)
        return out, self._quantize(A, code, blocksize, out, absmax, packed=True)

    def quantize_blockwise(self, A: Tensor, code: Code, blocksize: int) -> tuple[Tensor, Tensor]:
        out = torch.empty(A.shape, dtype=torch.uint8, device=A.device)
        return out, self._quantize(A, code, blocksize, out, None, packed=False)

    def _quantize(
        self, A: Tensor, code: Code, blocksize: int, out: Tensor, given: Tensor | None, packed: bool
    ) -> Tensor:
        blocks = block_count(A.numel(), blocksize)
        absmax = torch.empty(blocks, dtype=torch.float32, device=A.device) if given is None else given.clone()
        if A.numel() == 0:
            return absmax
        if given is None:
            self.launch("block_absmax", (blocks,), absmax, A, A.numel(), blocksize, CHUNK=_CHUNK)
        pad = code.zero_code() if packed and A.numel() % 2 else 0
        length = code.order.numel()
        self.launch(
            "block_codes", (_tiles(out.numel(), _BLOCK),), out, A, A.numel(), absmax, blocksize, code.thresholds,
            code.order, length, pad, PACKED=packed, LEVELS=4 if length <= 16 else 8, BLOCK=_BLOCK,
        )  # fmt: skip
        return absmax

    def dequantize_4bit(self, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
        if out.numel():
            self.launch(
                "dequantize", (_tiles(out.numel(), _BLOCK),), out, out.numel(), *_arguments(weight), BLOCK=_BLOCK
            )
        return out

    def dequantize_blockwise(
        self, q: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
    ) -> Tensor:
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
        if out.numel():
            grid = (_tiles(out.numel(), _BLOCK),)
            self.launch(
                "dequantize_bytes", grid, out, out.numel(), q, code, code.numel(), absmax, blocksize, BLOCK=_BLOCK
            )
        return out

    # --- products -----------------------------------------------------------------------------------------------------

    def gemv_4bit(self, x: Tensor, weight: PackedWeight | PreparedWeight, bias: Tensor | None) -> Tensor:
        return self.gemm_4bit(x, weight, bias)

    def gemm_4bit(self, x: Tensor, weight: PackedWeight | PreparedWeight, bias: Tensor | None) -> Tensor:
        if isinstance(weight, PreparedWeight):
            raise BackendUnsupportedError(f"backend {self.name!r} reads the canonical layout, not {weight.layout!r}")
        (m, k), n = x.shape, weight.shape[0]
        y = x.new_empty((m, n))
        if x.numel() == 0 or y.numel() == 0:
            return y.zero_() if bias is None else y.copy_(bias)
        if m == 1:
            self.launch("gemv", (_tiles(n, 8),), y, x, bias, n, k, *_arguments(weight), BN=8, BK=128)
        else:
            tile = 16 if m <= 16 else 32 if m <= 32 else 64
            grid, depth = (_tiles(m, tile), _tiles(n, 32)), 16 if x.dtype == torch.float32 else 32
            self.launch("gemm", grid, y, x, bias, m, n, k, *_arguments(weight), BM=tile, BN=32, BK=depth)
        return y

    # --- what the trace shows -----------------------------------------------------------------------------------------

    def kernel(self, call: Call) -> str:
        if call.op.startswith("quantize"):
            return "block_absmax + block_codes"
        if call.op.startswith("dequantize"):
            return "dequantize" if call.op.endswith("4bit") else "dequantize_bytes"
        return "gemv" if call.m == 1 else "gemm"

    def info(self) -> dict[str, Any]:
        import triton

        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        gpus += [torch.xpu.get_device_name(i) for i in range(torch.xpu.device_count())]
        return {"gpus": gpus, "triton": triton.__version__}


class TritonEmulatorBackend(TritonBackend):
    """The same kernels' PTX on CPU tensors, checked at every access; slow, and taken by name only."""

    name = "triton-emulator"
    priority = -1
    devices = ("cpu",)
    description = "the Triton kernels' PTX, interpreted and checked; slow, and taken by name only"

    def available(self) -> str | None:
        if (missing := _why_no_triton()) is not None:
            return missing
        if find_spec("numpy") is None:
            return f"the emulator computes with numpy, which is not installed: {install('triton')}"
        if find_spec("refq4_cuda") is None:
            return f"the emulator is part of the package refq4_cuda, which is not installed: {install('triton')}"
        return None

    def launch(self, name: str, grid: tuple[int, ...], *args: Tensor | int | None, **tile: int) -> None:
        from . import emulated

        emulated.run(name, grid, args, tile)

    def info(self) -> dict[str, Any]:
        import triton

        from . import emulated

        return {"architecture": f"sm_{emulated.ARCH}", "triton": triton.__version__}


def _why_no_triton() -> str | None:
    if find_spec("triton") is not None:
        return None
    return (
        f"Triton is not installed: {install('triton')}; torch's builds for CUDA, ROCm and XPU bring one of their own "
        "(it runs on Linux, and on Windows with XPU)"
    )


def _tiles(length: int, tile: int) -> int:
    return -(-length // tile)


def _arguments(weight: PackedWeight) -> tuple[Tensor | int | None, ...]:
    """A weight as ``kernels.decoded`` takes it."""
    nested: Nested | None = weight.nested
    second: tuple[Tensor | int | None, ...] = (None, None, None, 1)
    if nested is not None:
        second = (nested.absmax, nested.code, nested.offset, nested.blocksize)
    return (weight.packed, weight.code, weight.absmax, weight.blocksize, *second)
