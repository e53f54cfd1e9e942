"""The CUDA backend, and the same backend without a GPU: two classes that differ in where a launch goes.

    tensors  --->  launch.py: a plan  --->  CudaBackend          driver.py: a cubin, on torch's stream
                   (variant, grid,    '-->  CudaEmulatorBackend  emulator: PTX from the same source, read line by line,
                    argument bytes)                              on CPU tensors, fed the same argument bytes

This file allocates the results and asks for plans; what is computed is said in ``refq4/backend.py``, how, in the
kernel files, and which kernel with which grid, in ``launch.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refq4.backend import Backend, Call, Nested, PackedWeight, PreparedWeight
from refq4.codebooks import Code, get_codebook
from refq4.internals.buildcache import CacheError, cache_directory
from refq4.internals.remedies import install
from refq4.layout import block_count, packed_bytes

from . import driver, emulated, launch, stored
from .bindings import CudaError, dotted, driver_version, nvrtc_version, why_no_gpu
from .experts import expert, grouped_product
from .geometry import Limits, no_room
from .stored import StoredWeight

__all__ = ["CudaBackend", "CudaEmulatorBackend"]


Processor = driver.Device | emulated.Emulated  # what runs launches, and tells a plan what it has room for


class PlannedBackend(Backend):
    """All ops, on a processor that the subclass names."""

    def processor(self, device: torch.device) -> Processor:
        """Where tensors on ``device`` are computed with."""
        raise NotImplementedError

    def can_run(self, call: Call) -> str | None:
        if call.device not in self.devices:  # no processor is asked for
            return self.wrong_device(call)
        try:
            return _refusal(self, call, self.processor(torch.device(call.device)))
        except CudaError as error:
            return str(error)

    # --- quantising and dequantising ----------------------------------------------------------------------------------

    def quantize_4bit(
        self, A: Tensor, code: Code, blocksize: int, absmax: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty(packed_bytes(A.numel()), dtype=torch.uint8, device=A.device)
        return out, self._quantize(A, code, blocksize, out, packs=True, given=absmax)

    def quantize_blockwise(self, A: Tensor, code: Code, blocksize: int) -> tuple[Tensor, Tensor]:
        out = torch.empty(A.shape, dtype=torch.uint8, device=A.device)
        return out, self._quantize(A, code, blocksize, out, packs=False)

    def _quantize(
        self, A: Tensor, code: Code, blocksize: int, out: Tensor, packs: bool, given: Tensor | None = None
    ) -> Tensor:
        if given is None:
            absmax = torch.empty(block_count(A.numel(), blocksize), dtype=torch.float32, device=A.device)
        else:
            absmax = given.clone(memory_format=torch.contiguous_format)
        if A.numel():
            processor, measures = self.processor(A.device), given is None
            processor.run(
                launch.quantize(A.contiguous(), code, blocksize, packs, out, absmax, processor.arch, measures)
            )
        return absmax

    def dequantize_4bit(self, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
        if out.numel():
            processor = self.processor(out.device)
            processor.run(launch.dequantize_4bit(weight, out, processor.arch))
        return out

    def dequantize_blockwise(
        self, q: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
    ) -> Tensor:
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
        if out.numel():
            if code.numel() < 256:  # the kernel reads a whole table, whatever codes there are
                code = torch.nn.functional.pad(code, (0, 256 - code.numel()))
            processor = self.processor(out.device)
            processor.run(launch.dequantize_blockwise(q, absmax, code, blocksize, out, processor.arch))
        return out

    # --- products -----------------------------------------------------------------------------------------------------

    def gemm_4bit(self, x: Tensor, weight: PackedWeight | PreparedWeight, bias: Tensor | None) -> Tensor:
        y = x.new_empty((x.shape[0], weight.shape[0]))
        if 0 in x.shape or 0 in y.shape:
            return y.zero_() if bias is None else y.copy_(bias)
        processor = self.processor(x.device)
        if type(weight) is StoredWeight:
            plan = stored.product(x, weight, bias, y, processor)
        else:
            weight = stored.packed_again(weight)
            arch, multiprocessors = processor.arch, processor.multiprocessors
            plan = launch.product(x, weight, bias, y, arch, multiprocessors, limits=processor.limits)
        if plan is None:
            return self.dequantize_and_multiply(x, weight, bias, y)
        processor.run(plan)
        return y

    gemv_4bit = gemm_4bit

    def prepare_weight(self, weight: PackedWeight) -> PreparedWeight | None:
        """The same bytes with their launches beside them (``stored.py``); None for experts, whose products differ."""
        return stored.stored(self.name, weight) if len(weight.shape) == 2 else None

    def restore_weight(self, prepared: PreparedWeight) -> PackedWeight:
        return stored.packed_again(prepared)

    def dequantize_and_multiply(
        self,
        x: Tensor,
        weight: PackedWeight | PreparedWeight,
        bias: Tensor | None,
        y: Tensor,
        transposed: bool = False,
    ) -> Tensor:
        """Many tokens: decode once, and let torch multiply.

        The workspace is torch's to reuse. One kept here would be shared by streams that run at the same time, and
        would be freed or grown under a CUDA graph that remembers its address.
        """
        decoded = self.dequantize_4bit(stored.packed_again(weight), x.dtype)
        factor = decoded if transposed else decoded.t()
        if bias is None:
            return torch.mm(x, factor, out=y)
        return torch.addmm(bias, x, factor, out=y)

    def grad_input_4bit(self, grad: Tensor, weight: PackedWeight) -> Tensor:
        grad_x = grad.new_empty((grad.shape[0], weight.shape[1]))
        processor = self.processor(grad.device)
        plan = launch.product(grad, weight, None, grad_x, *_of(processor), transposed=True)
        if plan is None:
            return self.dequantize_and_multiply(grad, weight, None, grad_x, transposed=True)
        processor.run(plan)
        return grad_x

    def grouped_gemm_4bit(
        self, x: Tensor, weight: PackedWeight | PreparedWeight, bias: Tensor | None, offsets: Tensor, transposed: bool
    ) -> Tensor:
        weight = stored.packed_again(weight)
        y = x.new_empty((x.shape[0], weight.shape[2 if transposed else 1]))
        processor = self.processor(x.device)
        plan = grouped_product(x, weight, bias, offsets, y, *_of(processor), transposed)
        if plan is not None:
            processor.run(plan)
            return y
        for e, (first, stop) in enumerate(pairwise(offsets.tolist())):
            if first < stop:
                rows, added = slice(first, stop), None if bias is None else bias[e]
                self.dequantize_and_multiply(x[rows], expert(weight, e), added, y[rows], transposed)
        return y

    def tune(self, shapes: Sequence[tuple[int, int]] = (), tokens: Sequence[int] = ()) -> Iterator[str]:
        """What ``refq4 tune`` calls: measure the cross-over to decoding on this device and keep it, telling lines."""
        from .tune import SHAPES, TOKENS, tune

        device = torch.device(self.devices[0])
        return tune(self, device, shapes or SHAPES, tokens or TOKENS, keeps=device.type == "cuda")

    # --- what the trace shows -----------------------------------------------------------------------------------------

    def kernel(self, call: Call) -> str:
        plan = _plan_without_data(call, self.processor(torch.device(call.device)))
        names = ["dequantize", "torch.matmul"] if plan is None else [Path(one.variant.file).stem for one in plan]
        return " + ".join(dict.fromkeys(names)) + " for each expert" * (call.op == "grouped_gemm_4bit")


@lru_cache(maxsize=4096)
def _refusal(backend: PlannedBackend, call: Call, processor: Processor) -> str | None:
    """Why the call can't be run there, or None: asked in every forward, and the same each time."""
    if (reason := Backend.can_run(backend, call)) is not None:
        return reason
    if call.layout.partition(",")[0] not in ("canonical", stored.LAYOUT):
        return f"it reads the layouts canonical and stored, not {call.layout}"
    return processor.problem or no_room(processor.limits)


def _of(processor: Processor) -> tuple[int, int, None, Limits]:
    """What a plan wants to know of it: architecture, multiprocessors, the rung (the best), limits."""
    return processor.arch, processor.multiprocessors, None, processor.limits


def _plan_without_data(call: Call, processor: Processor) -> list[launch.Launch] | None:
    """The plan of a call, from meta tensors: those have sizes, and addresses that pass for aligned."""
    empty = partial(torch.empty, device="meta")
    numel, shape = call.experts * call.n * call.k, (call.n, call.k)
    codes, scales = empty(packed_bytes(numel), dtype=torch.uint8), empty(0, dtype=torch.float32)
    A, code, arch = empty(call.k, dtype=call.dtype), get_codebook("nf4").on("cpu"), processor.arch
    nested = Nested(scales, scales, scales, 256) if call.nested else None
    weight = PackedWeight(codes, scales, code.values, call.blocksize, shape, call.codebook, nested)
    match call.op:
        case "quantize_4bit" | "quantize_blockwise":
            return launch.quantize(A, code, call.blocksize, call.op == "quantize_4bit", codes, scales, arch)
        case "dequantize_4bit":
            return launch.dequantize_4bit(weight, A, arch)
        case "dequantize_blockwise":
            return launch.dequantize_blockwise(codes, scales, scales, call.blocksize, A, arch)
    x, y = empty(call.m, call.k, dtype=call.dtype), empty(call.m, call.n, dtype=call.dtype)
    of_device = _of(processor)
    if call.op == "grouped_gemm_4bit":  # as if all experts had as many rows
        offsets = torch.arange(call.experts + 1) * call.m // call.experts
        weight = weight._replace(shape=(call.experts, *(shape[::-1] if call.transposed else shape)))
        return grouped_product(x, weight, None, offsets, y, *of_device, call.transposed)
    if call.op == "grad_input_4bit":  # which has the layer's N and K: the weight is [N, K], the terms N
        return launch.product(y, weight, None, x, *of_device, transposed=True)
    return launch.product(x, weight, None, y, *of_device)


class CudaBackend(PlannedBackend):
    """CUDA C++ kernels on torch's CUDA tensors."""

    name = "cuda"
    priority = 10
    devices = ("cuda",)
    description = "CUDA C++ kernels compiled on first use by NVRTC, for Turing and newer"

    def available(self) -> str | None:
        try:
            cache_directory("cuda")
        except CacheError as error:
            return str(error)
        return why_no_gpu()

    def processor(self, device: torch.device) -> Processor:
        return driver.device(torch._C._cuda_getDevice() if device.index is None else device.index)

    def info(self) -> dict[str, Any]:
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return {
            "gpus": [f"{gpu.name} (sm_{gpu.major}{gpu.minor})" for gpu in gpus],
            "driver": f"CUDA {dotted(driver_version())}",
            **_tools(),
        }


class CudaEmulatorBackend(PlannedBackend):
    """The same kernels on CPU tensors, in the emulator: slow, checked at every access, and never chosen by "auto"."""

    name = "cuda-emulator"
    priority = -1
    devices = ("cpu",)
    description = "the CUDA kernels' PTX, interpreted and checked; slow, and taken by name only"

    def available(self) -> str | None:
        try:
            cache_directory("cuda")
            nvrtc_version()
            emulated.processor()
        except (CudaError, CacheError, ValueError) as error:
            return str(error)
        if find_spec("numpy") is None:
            return f"the emulator computes with numpy, which is not installed: {install('cuda')}"
        return None

    def processor(self, device: torch.device) -> Processor:
        return emulated.processor()

    def info(self) -> dict[str, Any]:
        return {"architecture": f"sm_{emulated.processor().arch}", **_tools()}


def _tools() -> dict[str, Any]:
    return {"nvrtc": dotted(nvrtc_version()), "cache": str(cache_directory("cuda"))}
