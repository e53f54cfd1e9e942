"""The CPU backend: refq4's ops on the C kernels in ``kernels/``.

This file turns tensors into pointers and nothing else; what is computed is said in ``refq4/backend.py``, how, in the
kernel files. Each op is one C call, which runs without the interpreter's lock on as many threads as torch uses.
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
from typing import Any

import torch
from torch import Tensor

from refq4.backend import (
    Backend,
    BackendUnavailableError,
    BackendUnsupportedError,
    Call,
    Nested,
    PackedWeight,
    PreparedWeight,
)
from refq4.codebooks import Code
from refq4.internals.buildcache import CacheError
from refq4.layout import block_count, packed_bytes

from . import build
from .arguments import declare, weight_struct
from .calibrate import LARGEST_M, Winners, calibrated, winner
from .experts import NO_KERNEL, kernels_by_rows
from .kernels import DTYPES, TILES, ProductKernel, addresses, candidates, forced, grad_input_kernel
from .threads import borrow_torch_threads
from .tiles import Tiles, addressed, as_arguments, struct_of, tiled, untiled

__all__ = ["CpuBackend"]

# What finding, compiling and loading the kernels can end with.
_UNUSABLE = (build.BuildError, CacheError, OSError, ValueError)


class CpuBackend(Backend):
    """C kernels compiled on first use: AVX-512, AVX2, NEON (the first and the last with BF16) or plain C."""

    name = "cpu"
    priority = 10
    description = "C kernels compiled on first use: AVX-512 and NEON, with and without BF16, AVX2, plain C"

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._library: build.Library | None = None
        self._addresses: dict[str, int] = {}  # of the library's product kernels
        self._threads = ""
        self._forced: ProductKernel | None = None  # by the environment, when the library was loaded
        self._winners: Winners | None = None
        self._chosen: dict[tuple[Any, ...], ProductKernel] = {}
        self._by_rows: dict[tuple[Any, ...], bytes] = {}

    # --- what it can do ---------------------------------------------------------------------------------------

    def available(self) -> str | None:
        if os.name != "posix" or sys.byteorder != "little":
            return "its kernels are written for POSIX threads (not Windows) and little-endian memory; use the reference"
        try:
            forced()
            self._loaded()  # compiled, too: what does not compile here is found before a call relies on it
        except _UNUSABLE as error:
            return str(error)
        return None

    def can_run(self, call: Call) -> str | None:
        if (reason := super().can_run(call)) is not None:
            return reason
        if call.layout not in ("canonical", TILES):
            return f"it reads the layouts canonical and {TILES}, not {call.layout}"
        if self._library is None:
            self.library()
        if self._forced is not None and call.op in ("gemv_4bit", "gemm_4bit"):
            features = self.library().tier.features
            return self._forced.refuses(features, call.dtype, call.m, call.k, call.blocksize, call.layout)
        return None

    def kernel(self, call: Call) -> str:
        tier, m = self.library().tier, -(-call.m // call.experts)  # as if all experts had as many
        if call.op == "grad_input_4bit" or call.transposed:
            row = call.n if call.transposed else call.k
            name = grad_input_kernel(tier.features, call.dtype, row, call.blocksize)
        elif call.op in ("gemv_4bit", "gemm_4bit", "grouped_gemm_4bit"):
            name = self._kernel_for(call.dtype, m, call.k, call.blocksize, call.layout).name
        else:
            rung = next(
                (f"2_{feature}" for feature in ("avx512", "avx2", "neon") if feature in tier.features), "1_scalar"
            )
            in_c = call.op not in ("quantize_4bit", "dequantize_4bit")
            name = f"{call.op.partition('_')[0]}_{'1_scalar' if in_c else rung}"
        name += " for each expert" * (call.op == "grouped_gemm_4bit")
        return f"{name} (emulated)" if tier.emulated else name

    def info(self) -> dict[str, Any]:
        library = self.library()
        return {
            "tier": str(library.tier),
            "tiers": build.supported_tiers(),
            "processor": build.processor_name(),
            "compiler": library.compiler.version,
            "library": str(library.path),
            "calibration": self._calibration(),
            "threads": f"{torch.get_num_threads()} ({self._threads}'s pool)",
        }

    def limits(self, repeats: int = 7) -> dict[str, float]:
        """What this machine does at best with torch's thread count (``kernels/limits.c``): medians.

        Returns:
            ``read_gb_s`` from main memory, ``fma_gflop_s`` in fp32, ``dot_gflop_s`` in bf16; 0 without the instruction.
        """
        buffer = torch.empty(256 << 20, dtype=torch.uint8)
        self.library().functions.refq4_ask_for_large_pages(buffer.data_ptr(), buffer.numel())  # as under tiles
        buffer.fill_(1)
        arguments = buffer.data_ptr(), buffer.numel(), torch.get_num_threads()
        measure = self.library().functions.refq4_limit
        names = ("read_gb_s", "fma_gflop_s", "dot_gflop_s")
        return {
            name: statistics.median(measure(what, *arguments) for _ in range(repeats))
            for what, name in enumerate(names)
        }

    def library(self) -> build.Library:
        """The compiled tier; the first call compiles it.

        Raises:
            BackendUnavailableError: it can't be compiled or loaded.
        """
        if self._library is not None:
            return self._library
        try:
            return self._loaded()
        except _UNUSABLE as error:
            raise BackendUnavailableError(f"backend 'cpu': {error}") from error

    def _loaded(self) -> build.Library:
        with self._lock:
            if self._library is None:
                library = build.load()
                declare(library.functions)
                self._addresses = addresses(library)
                self._threads = borrow_torch_threads(library.functions)
                self._forced = forced()
                self._library = library
            return self._library

    # --- quantising and dequantising --------------------------------------------------------------------------

    def quantize_4bit(
        self, A: Tensor, code: Code, blocksize: int, absmax: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty(packed_bytes(A.numel()), dtype=torch.uint8)
        return out, self._quantize(A, code, blocksize, out, packs=True, given=absmax)

    def quantize_blockwise(self, A: Tensor, code: Code, blocksize: int) -> tuple[Tensor, Tensor]:
        out = torch.empty(A.shape, dtype=torch.uint8)
        return out, self._quantize(A, code, blocksize, out, packs=False)

    def _quantize(
        self, A: Tensor, code: Code, blocksize: int, out: Tensor, packs: bool, given: Tensor | None = None
    ) -> Tensor:
        A, order, thresholds = A.contiguous(), code.order.contiguous(), code.thresholds.contiguous()
        absmax = torch.empty(block_count(A.numel(), blocksize), dtype=torch.float32)
        scales = None if given is None else given.contiguous()
        pad = code.zero_code() if packs and A.numel() % 2 else 0
        self.library().functions.refq4_quantize(
            A.data_ptr(), DTYPES[A.dtype], A.numel(), blocksize, thresholds.data_ptr(), order.data_ptr(),
            order.numel(), pad, None if scales is None else scales.data_ptr(), absmax.data_ptr(), out.data_ptr(), packs,
            torch.get_num_threads(),
        )  # fmt: skip
        return absmax

    def dequantize_4bit(self, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        out = torch.empty(weight.shape, dtype=dtype)
        self.dequantize_into(weight, out)
        return out

    def dequantize_into(self, weight: PackedWeight, out: Tensor) -> None:
        """``dequantize_4bit`` into contiguous memory at hand: the system zeroes each fresh page, which takes longer."""
        self._dequantize(weight.packed, 4, weight.code, weight.blocksize, weight.absmax, weight.nested, out)

    def dequantize_blockwise(
        self, q: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
    ) -> Tensor:
        out = torch.empty(q.shape, dtype=dtype)
        self._dequantize(q, 8, code, blocksize, absmax, None, out)
        return out

    def _dequantize(
        self, codes: Tensor, bits: int, code: Tensor, blocksize: int, absmax: Tensor, nested: Nested | None, out: Tensor
    ) -> None:
        codes, code, absmax = codes.contiguous(), code.contiguous(), absmax.contiguous()
        self.library().functions.refq4_dequantize(
            weight_struct(codes, code, blocksize, absmax, nested), bits, out.numel(), out.data_ptr(), DTYPES[out.dtype],
            torch.get_num_threads(),
        )  # fmt: skip

    # --- products ---------------------------------------------------------------------------------------------

    def gemv_4bit(self, x: Tensor, weight: PackedWeight | PreparedWeight, bias: Tensor | None) -> Tensor:
        return self._product(x, weight, bias)

    def gemm_4bit(self, x: Tensor, weight: PackedWeight | PreparedWeight, bias: Tensor | None) -> Tensor:
        return self._product(x, weight, bias)

    def grad_input_4bit(self, grad: Tensor, weight: PackedWeight) -> Tensor:
        (n, k), library = weight.shape, self.library()
        name = grad_input_kernel(library.tier.features, grad.dtype, k, weight.blocksize)
        grad_x = torch.empty((grad.shape[0], k), dtype=grad.dtype)
        status = library.functions.refq4_product(
            self._addresses[name], grad.data_ptr(), None, grad_x.data_ptr(), DTYPES[grad.dtype],
            grad.shape[0], k, n, None, struct_of(weight), torch.get_num_threads(),
        )  # fmt: skip
        if status != 0:
            raise MemoryError(f"refq4's CPU kernel {name} found no scratch memory for {list(grad.shape)}, K={k}")
        return grad_x

    def grouped_gemm_4bit(
        self, x: Tensor, weight: PackedWeight | PreparedWeight, bias: Tensor | None, offsets: Tensor, transposed: bool
    ) -> Tensor:
        n, k = weight.shape[:0:-1] if transposed else weight.shape[1:]
        functions, y = self.library().functions, torch.empty(x.shape[0], n, dtype=x.dtype)
        layout, tiles, as_struct = as_arguments(weight)

        def address(rows: int) -> int:
            if transposed:
                return self._addresses[grad_input_kernel(self.library().tier.features, x.dtype, n, weight.blocksize)]
            return self._addresses[self._kernel_for(x.dtype, rows, k, weight.blocksize, layout).name]

        key = (x.dtype, n if transposed else k, weight.blocksize, layout, transposed)
        if key not in self._by_rows:
            self._by_rows[key] = kernels_by_rows(address)
        status = functions.refq4_grouped(
            self._by_rows[key], LARGEST_M, offsets.data_ptr(), weight.shape[0], x.data_ptr(),
            None if bias is None else bias.data_ptr(), y.data_ptr(), DTYPES[x.dtype], n, k, tiles, as_struct,
            torch.get_num_threads(),
        )  # fmt: skip
        if status == NO_KERNEL:
            address(int(offsets.diff().max()))  # raises, and says why
        if status != 0:
            raise MemoryError(f"refq4's CPU kernels found no scratch memory for {x.shape[0]} rows, N={n}, K={k}")
        return y

    def _product(
        self,
        x: Tensor,
        weight: PackedWeight | PreparedWeight,
        bias: Tensor | None,
        kernel: ProductKernel | None = None,
        threads: int = 0,
    ) -> Tensor:
        """One product, with the kernel named or the one that :meth:`_kernel_for` chooses; torch's threads if 0."""
        n, k = weight.shape
        m, dtype = x.shape[0], x.dtype
        y = torch.empty(m, n, dtype=dtype)  # a tuple would take half as long again
        if m == 0 or n == 0:
            return y
        x = x if x.is_contiguous() else x.contiguous()
        if type(weight) is not PackedWeight:
            if kernel is None:
                kernel = self._kernel_for(dtype, m, k, weight.blocksize, weight.layout)
            if type(weight) is not Tiles:
                weight = addressed(weight)
            tiles, as_struct = weight.tiles, weight.code
        else:
            if kernel is None:
                kernel = self._kernel_for(dtype, m, k, weight.blocksize, "canonical")
            tiles, as_struct = None, struct_of(weight)
        status = (self._library or self.library()).functions.refq4_product(
            self._addresses[kernel.name], x.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(),
            DTYPES[dtype], m, n, k, tiles, as_struct, threads or torch.get_num_threads(),
        )  # fmt: skip
        if status != 0:
            raise MemoryError(f"refq4's CPU kernel {kernel.name} found no scratch memory for M={m}, N={n}, K={k}")
        return y

    def _kernel_for(self, dtype: torch.dtype, m: int, k: int, blocksize: int, layout: str) -> ProductKernel:
        key = (dtype, m if m < LARGEST_M else LARGEST_M, k, blocksize, layout)
        if key not in self._chosen:
            self._chosen[key] = self._choose(dtype, m, k, blocksize, layout)
        return self._chosen[key]

    def _choose(self, dtype: torch.dtype, m: int, k: int, blocksize: int, layout: str) -> ProductKernel:
        features = self.library().tier.features
        asked = self._forced
        if asked is not None:
            if (reason := asked.refuses(features, dtype, m, k, blocksize, layout)) is not None:
                raise BackendUnsupportedError(f"backend 'cpu': {reason}")
            return asked
        able = candidates(features, dtype, m, k, blocksize, layout)
        if not able:
            raise BackendUnsupportedError(f"backend 'cpu': no kernel of tier {self.library().tier} reads {layout}")
        fastest = winner(self._calibration(), dtype, m, layout)
        return next((kernel for kernel in able if kernel.name == fastest), able[0])

    def _calibration(self) -> Winners:
        if self._winners is None:
            with self._lock:
                library = self.library()
                self._winners = {} if library.tier.emulated else calibrated(library, self.prepare_weight, self._product)
        return self._winners

    # --- the tile layout --------------------------------------------------------------------------------------

    def prepare_weight(self, weight: PackedWeight) -> PreparedWeight | None:
        """Tiles (``kernels/tiles.h``), or None where no kernel of this tier reads them or rows and blocks don't fit."""
        return None if self.library().tier.name == "c" else tiled(self.library().functions, weight)

    def restore_weight(self, prepared: PreparedWeight) -> PackedWeight:
        return untiled(self.library().functions, prepared)
