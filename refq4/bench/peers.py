"""Who refq4 is measured against: each peer turns the same weights into a function of (x, layer), where they are.

on the CPU

refq4                   Linear4bit in eval mode: the whole layer, on the backend's own layout if it has one
refq4 canonical         Linear4bit in training mode: the stored layout, as in training
bitsandbytes packed     Linear4bit in eval mode, its fastest CPU path
bitsandbytes plain      Linear4bit in training mode: dequantise, then multiply
torch bf16, torch fp32  nn.functional.linear on the unquantised weight
torch int4              torch._weight_int4pack_mm_for_cpu, groups of 64
onnxruntime             MatMulNBits, 4 bits, blocks of 64, its fp32 kernel (x is cast): needs onnxruntime and onnx
openvino                i4 weights, groups of 64, fp16 scales; computes in bf16 where it can: needs openvino
llama.cpp q4_0 int8     q4_0: blocks of 32, fp16 scales; rounds activations to int8: needs llama-cpp-python

on a GPU

refq4                   Linear4bit in eval mode
bitsandbytes            Linear4bit in eval mode
torch bf16              nn.functional.linear on the unquantised weight: cuBLAS
dequantize + torch      refq4's dequantise of the whole weight, then torch.mm
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..functional import dequantize_4bit, quantize_4bit
from ..nn import Linear4bit
from ..registry import use_backend
from .ggml import Q4Products

__all__ = [
    "DEVICE_DTYPES",
    "GPU_PEERS",
    "PEERS",
    "Peer",
    "Product",
    "hub_kernel",
    "peer_quantiser",
    "peer_rearranger",
    "random_weights",
]

DEVICE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BLOCKSIZE = 64
Product = Callable[[Tensor, int], object]


@dataclass(frozen=True)
class Peer:
    """A name, and what makes its product from a backend's name, the weights and a dtype.

    ``usual`` ones are measured unless others are named.
    """

    name: str
    make: Callable[[str, list[Tensor], torch.dtype], Product]
    usual: bool = True


def random_weights(n: int, k: int, layers: int, device: str = "cpu") -> list[Tensor]:
    """``layers`` bf16 weights [n, k], normal like trained ones."""
    generator = torch.Generator(device).manual_seed(0)
    return [(torch.randn(n, k, generator=generator, device=device) * k**-0.5).bfloat16() for _ in range(layers)]


def _refq4(train: bool) -> Callable[[str, list[Tensor], torch.dtype], Product]:
    def make(backend: str, weights: list[Tensor], dtype: torch.dtype) -> Product:
        settings = {"compute_dtype": dtype, "quant_type": "nf4", "compress_statistics": False}
        layers = []
        with use_backend("auto"):  # a backend may be measured that doesn't quantise; forward is what is timed
            for weight in weights:
                n, k = weight.shape
                layer = Linear4bit(k, n, bias=False, **settings)  # type: ignore[arg-type]
                layer.weight.data = weight
                layers.append(layer.to(weight.device).train(train))
        return lambda x, i: layers[i](x)

    return make


def _bitsandbytes(train: bool) -> Callable[[str, list[Tensor], torch.dtype], Product]:
    def make(backend: str, weights: list[Tensor], dtype: torch.dtype) -> Product:
        import bitsandbytes as bnb

        layers: list[Any] = []
        for weight in weights:
            n, k = weight.shape
            layer = bnb.nn.Linear4bit(
                k, n, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=False
            )
            layer.load_state_dict({"weight": weight})
            layers.append(layer.to(weight.device).train(train))
        return lambda x, i: layers[i](x)

    return make


def _torch_linear(dtype: torch.dtype) -> Callable[[str, list[Tensor], torch.dtype], Product]:
    def make(backend: str, weights: list[Tensor], _: torch.dtype) -> Product:
        layers = [weight.to(dtype) for weight in weights]
        return lambda x, i: torch.nn.functional.linear(x.to(dtype), layers[i])

    return make


def _dequantize_and_multiply(backend: str, weights: list[Tensor], dtype: torch.dtype) -> Product:
    packed = [quantize_4bit(weight, quant_type="nf4", backend=backend) for weight in weights]

    def run(x: Tensor, i: int) -> Tensor:
        return torch.mm(x, dequantize_4bit(*packed[i], backend=backend).to(x.dtype).t())

    return run


def _torch_int4(backend: str, weights: list[Tensor], dtype: torch.dtype) -> Product:
    n, k = weights[0].shape
    codes = [torch.randint(0, 15, (n, k), dtype=torch.int32) for _ in weights]
    layers = [torch._convert_weight_to_int4pack_for_cpu(code, 1) for code in codes]
    scales = torch.rand(k // BLOCKSIZE, n, 2, dtype=dtype)
    return lambda x, i: torch._weight_int4pack_mm_for_cpu(x, layers[i], BLOCKSIZE, scales)


def _onnxruntime(backend: str, weights: list[Tensor], dtype: torch.dtype) -> Product:
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    n, k = weights[0].shape
    sessions = []
    for _ in weights:
        codes = np.random.randint(0, 256, (n, k // BLOCKSIZE, BLOCKSIZE // 2), dtype=np.uint8)
        scales = np.random.rand(n * k // BLOCKSIZE).astype(np.float32)
        node = helper.make_node(
            "MatMulNBits", ["x", "B", "scales"], ["y"], domain="com.microsoft", N=n, K=k, bits=4, block_size=BLOCKSIZE
        )
        graph = helper.make_graph(
            [node],
            "product",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", k])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", n])],
            [numpy_helper.from_array(codes, "B"), numpy_helper.from_array(scales, "scales")],
        )
        imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=8)
        sessions.append(onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"]))
    return lambda x, i: sessions[i].run(None, {"x": x.float().numpy()})


def _openvino(backend: str, weights: list[Tensor], dtype: torch.dtype) -> Product:
    import numpy as np
    import openvino as ov
    from openvino import opset13 as op

    n, k = weights[0].shape
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": {torch.bfloat16: "bf16", torch.float16: "f16"}.get(dtype, "f32"),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # else activations are rounded to int8
    }
    requests, core = [], ov.Core()
    for _ in weights:
        packed = np.random.randint(0, 256, n * k // 2, dtype=np.uint8)
        codes = op.constant(ov.Tensor(packed, ov.Shape([n, k // BLOCKSIZE, BLOCKSIZE]), ov.Type.i4))
        scales = op.constant(np.random.rand(n, k // BLOCKSIZE, 1).astype(np.float16))
        scaled = op.multiply(op.convert(codes, "f16"), scales)
        whole = op.convert(op.reshape(scaled, np.array([n, k]), special_zero=False), "f32")
        x = op.parameter([-1, k], np.float32)
        model = ov.Model([op.matmul(x, whole, transpose_a=False, transpose_b=True)], [x])
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        requests.append((request, packed))  # the constant has no memory of its own
    return lambda x, i: requests[i][0].infer([x.float().numpy()], share_inputs=True, share_outputs=True)


def _llama_cpp(backend: str, weights: list[Tensor], dtype: torch.dtype) -> Product:
    return Q4Products(weights)


PEERS = (
    Peer("refq4", _refq4(train=False)),
    Peer("refq4 canonical", _refq4(train=True)),
    Peer("bitsandbytes packed", _bitsandbytes(train=False)),
    Peer("bitsandbytes plain", _bitsandbytes(train=True), usual=False),
    Peer("torch bf16", _torch_linear(torch.bfloat16)),
    Peer("torch fp32", _torch_linear(torch.float32), usual=False),
    Peer("torch int4", _torch_int4),
    Peer("onnxruntime", _onnxruntime, usual=False),
    Peer("openvino", _openvino, usual=False),
    Peer("llama.cpp q4_0 int8", _llama_cpp, usual=False),
)
GPU_PEERS = (
    Peer("refq4", _refq4(train=False)),
    Peer("bitsandbytes", _bitsandbytes(train=False)),
    Peer("torch bf16", _torch_linear(torch.bfloat16)),
    Peer("dequantize + torch", _dequantize_and_multiply),
)


# --- the ops around the product; empty where bitsandbytes is not installed ------------------------------------------


def peer_quantiser(A: Tensor) -> dict[str, Callable[[int], object]]:
    """bitsandbytes' quantiser on A [N, K]."""
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        return {}
    return {"bitsandbytes": lambda _: bnb.quantize_4bit(A, quant_type="nf4")}


def hub_kernel() -> str:
    """Whether bitsandbytes has the CPU kernel that it asks the model hub for, on processors with AVX-512 BF16.

    It goes on without that kernel, and may then be slower than it could be.
    """
    try:
        from bitsandbytes.backends.cpu import ops
    except ImportError:
        return "bitsandbytes is not installed"
    if not hasattr(ops, "gemm_4bit_forward_kernel"):
        return "not asked for on this processor"
    return "absent" if ops.gemm_4bit_forward_kernel is None else "present"


def peer_rearranger(A: Tensor) -> dict[str, Callable[[int], object]]:
    """bitsandbytes' packing for its CPU kernel, of A [N, K] quantised."""
    try:
        import bitsandbytes.functional as bnb

        pack = bnb._convert_weight_packed_for_cpu
    except (ImportError, AttributeError):
        return {}
    packed, state = bnb.quantize_4bit(A.bfloat16(), quant_type="nf4")

    def run(_: int) -> object:
        import copy

        return pack(packed.clone(), copy.deepcopy(state))

    return {"bitsandbytes": run}
