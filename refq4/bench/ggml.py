"""llama.cpp's product on a CPU: libggml of the package llama-cpp-python, called through ctypes.

It computes what llama.cpp computes for a linear layer in q4_0, in the same way:

    weight [N, K]   4 bits, blocks of 32 along K with an fp16 scale; rearranged for the processor's int8 dot products
                    where ggml has a buffer type that does so (CPU_REPACK with AVX2, AVX-512 or NEON)
    x [M, K]        fp32, rounded to int8 in blocks of 32 by each call
    product [M, N]  fp32, a graph with one mul_mat; ggml names shapes the other way round: (K, N), (K, M), (N, M)

ggml ends the process when something is not as it expects. So the first product is a small one in another process, which
runs this file as a program: a package that has changed is left out with a sentence. This file imports only torch.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from ctypes import CDLL, CFUNCTYPE, POINTER, Structure, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Q4Products", "library"]

F32, Q4_0, BLOCK = 0, 2, 32  # of enum ggml_type; weights in a block of q4_0
GRAPH = 16  # room for a graph's tensors, which are three


class Q4Products:
    """The products with weights [N, K], in q4_0, on as many threads as torch has when this is made.

    Raises:
        ImportError: llama-cpp-python is missing, or its libggml is not as expected.
        NotImplementedError: K is not a multiple of 32.
    """

    def __init__(self, weights: list[Tensor], path: Path | None = None) -> None:
        self._n, self._k = weights[0].shape
        if self._k % BLOCK:
            raise NotImplementedError(f"q4_0 has blocks of {BLOCK} along K, and K is {self._k}")
        self._ggml = _functions(path or library())
        self._close, self._close_plan, self._m = ExitStack(), ExitStack(), 0
        weakref.finalize(self, self._close.close)
        self._backend = self._ggml.ggml_backend_cpu_init()
        self._close.callback(self._ggml.ggml_backend_free, self._backend)
        self._ggml.ggml_backend_cpu_set_n_threads(self._backend, torch.get_num_threads())
        if not any(self._place(weights, buffer_type) for buffer_type in self._buffer_types()):
            raise ImportError(f"libggml multiplies no q4_0 weight {tuple(weights[0].shape)} on this processor")
        self._close.callback(self._close_plan.close)

    def __call__(self, x: Tensor, i: int) -> Tensor:
        """The product [M, N] of x [M, K] with the weight i, in memory that the next call overwrites."""
        if x.shape[0] != self._m:
            self._plan(x.shape[0])
        self._x.copy_(x)
        if status := self._ggml.ggml_backend_graph_compute(self._backend, self._graphs[i]):
            raise RuntimeError(f"ggml_backend_graph_compute returned the status {status}")
        return self._y

    def quantize(self, weight: Tensor) -> Tensor:
        """Bytes [N, K / 32, 18] of weight [N, K]: an fp16 scale, then 16 bytes with weights j and j + 16."""
        source = weight.float().contiguous()
        stored = torch.empty(self._n, self._k // BLOCK, self._ggml.ggml_row_size(Q4_0, BLOCK), dtype=torch.uint8)
        self._ggml.ggml_quantize_chunk(Q4_0, source.data_ptr(), stored.data_ptr(), 0, self._n, self._k, None)
        return stored

    def _buffer_types(self) -> Iterator[Any]:
        """Those that llama.cpp asks for a CPU, in its order: the rearranging ones, then the plain one."""
        registry = self._ggml.ggml_backend_cpu_reg()
        if listed := self._ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts"):
            types = CFUNCTYPE(POINTER(c_void_p), c_void_p)(listed)(self._ggml.ggml_backend_reg_dev_get(registry, 0))
            yield from itertools.takewhile(bool, map(types.__getitem__, itertools.count()))  # a null pointer ends them
        yield self._ggml.ggml_backend_cpu_buffer_type()

    def _place(self, weights: list[Tensor], buffer_type: Any) -> bool:
        """Whether ggml multiplies weights in a buffer of this type; if so, they are in one."""
        ggml = self._ggml
        with ExitStack() as undo:
            context = self._context(undo, len(weights) + 2, 0)
            tensors = [ggml.ggml_new_tensor_2d(context, Q4_0, self._k, self._n) for _ in weights]
            if not (buffer := ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)):
                return False
            undo.callback(ggml.ggml_backend_buffer_free, buffer)
            product = ggml.ggml_mul_mat(context, tensors[0], ggml.ggml_new_tensor_2d(context, F32, self._k, 1))
            if not ggml.ggml_backend_supports_op(self._backend, product):
                return False
            for tensor, weight in zip(tensors, weights, strict=True):
                stored = self.quantize(weight)
                ggml.ggml_backend_tensor_set(tensor, stored.data_ptr(), 0, stored.numel())
            self.buffer_type, self._weights = ggml.ggml_backend_buft_name(buffer_type).decode(), tensors
            self._close.push(undo.pop_all())
        return True

    def _plan(self, m: int) -> None:
        """A graph for each weight, for m tokens; x and the product are torch's memory."""
        ggml, undo = self._ggml, self._close_plan
        undo.close()
        self._m, self._graphs = m, []
        self._x, self._y = torch.empty(m, self._k), torch.empty(m, self._n)
        context = self._context(undo, len(self._weights) + 1, len(self._weights))
        x = ggml.ggml_new_tensor_2d(context, F32, self._k, m)
        products = [ggml.ggml_mul_mat(context, weight, x) for weight in self._weights]
        for memory, tensors in ((self._x, [x]), (self._y, products)):
            buffer = ggml.ggml_backend_cpu_buffer_from_ptr(memory.data_ptr(), memory.nbytes)
            undo.callback(ggml.ggml_backend_buffer_free, buffer)
            for tensor in tensors:
                ggml.ggml_backend_tensor_alloc(buffer, tensor, memory.data_ptr())
        for product in products:
            self._graphs.append(ggml.ggml_new_graph_custom(context, GRAPH, False))
            ggml.ggml_build_forward_expand(self._graphs[-1], product)

    def _context(self, undo: ExitStack, tensors: int, graphs: int) -> Any:
        """Memory for the descriptions of so many tensors and graphs."""
        ggml = self._ggml
        size = tensors * ggml.ggml_tensor_overhead() + graphs * ggml.ggml_graph_overhead_custom(GRAPH, False)
        context = ggml.ggml_init(_Settings(size, None, True))
        undo.callback(ggml.ggml_free, context)
        return context


@functools.cache
def library() -> Path:
    """The file of libggml's CPU backend in llama-cpp-python, after a product with it in another process.

    Raises:
        ImportError: there is none, or the product failed.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None:
        raise ImportError("llama-cpp-python is not installed: pip install llama-cpp-python (it compiles llama.cpp)")
    folders = [Path(folder, "lib") for folder in spec.submodule_search_locations or ()]
    found = sorted(file for folder in folders for file in folder.glob("libggml-cpu.*"))
    if not found:
        raise ImportError("llama-cpp-python has no libggml-cpu in llama_cpp/lib: install a build with one CPU backend")
    trial = [sys.executable, "-P", __file__, str(found[0])]
    quiet = os.environ | {"GGML_NO_BACKTRACE": "1"}
    done = subprocess.run(trial, capture_output=True, text=True, errors="replace", env=quiet)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise ImportError(f"llama-cpp-python's libggml failed in a first product ({said[0]}): try version 0.3.36")
    return found[0]


class _Settings(Structure):
    """``struct ggml_init_params``."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_Log = CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_SILENT = _Log(lambda level, text, data: None)
_FUNCTIONS: dict[str, tuple[Any, ...]] = {  # result, arguments
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_buft_name": (c_char_p, c_void_p),
    "ggml_backend_cpu_buffer_from_ptr": (c_void_p, c_void_p, c_size_t),
    "ggml_backend_cpu_buffer_type": (c_void_p,),
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_reg": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
    "ggml_backend_free": (None, c_void_p),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_reg_dev_get": (c_void_p, c_void_p, c_size_t),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_supports_op": (c_bool, c_void_p, c_void_p),
    "ggml_backend_tensor_alloc": (c_int, c_void_p, c_void_p, c_void_p),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_free": (None, c_void_p),
    "ggml_graph_overhead_custom": (c_size_t, c_size_t, c_bool),
    "ggml_init": (c_void_p, _Settings),
    "ggml_log_set": (None, _Log, c_void_p),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_quantize_chunk": (c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    "ggml_row_size": (c_size_t, c_int, c_int64),
    "ggml_tensor_overhead": (c_size_t,),
}


@functools.cache
def _functions(path: Path) -> CDLL:
    try:
        ggml = CDLL(str(path))
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(ggml, name)
            function.restype, function.argtypes = result, arguments
        ggml.ggml_log_set(_SILENT, None)  # else a line for each weight
    except (OSError, AttributeError) as error:
        raise ImportError(f"{error}") from error
    return ggml


if __name__ == "__main__":
    weight, x = torch.randn(64, 128), torch.randn(3, 128)
    exact = x @ weight.t()
    error = (Q4Products([weight], Path(sys.argv[1]))(x, 0) - exact).norm() / exact.norm()
    if not error < 0.2:  # 4 bits in blocks of 32 leave 0.08
        sys.exit(f"the product is {error:.0%} off")
