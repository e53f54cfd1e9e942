"""Kernels of a few lines of PTX, for the tests of the emulator: the text around a body, and its launch."""

from __future__ import annotations

import struct

import numpy as np
import torch
from refq4_cuda import emulator
from refq4_cuda.launch import Launch, Variant


def kernel(
    body: str, *tensors: torch.Tensor, threads: int = 32, blocks: int = 1, shared: int = 0
) -> tuple[str, Launch]:
    """PTX and launch: %at0, %at1, ... are the tensors' addresses, %r0 is the thread's number in the grid."""
    loads = "\n".join(f"ld.param.u64 %at{i}, [p+{8 * i}];" for i in range(len(tensors)))
    text = f"""
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry hand(
    .param .align 8 .b8 p[{8 * len(tensors)}]
)
{{
    .reg .pred %p<8>;
    .reg .b16 %h<32>;
    .reg .b32 %r<32>;
    .reg .f32 %f<32>;
    .reg .b64 %rd<32>;
    .reg .b64 %at<16>;
    .shared .align 16 .b8 room[1024];
    {loads}
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mad.lo.s32 %r0, %r1, {threads}, %r0;
    {body}
    ret;
}}
"""
    arguments = struct.pack(f"{len(tensors)}Q", *(t.data_ptr() for t in tensors))
    return text, Launch(Variant("hand.ptx", "hand", ()), (blocks, 1, 1), (threads, 1, 1), shared, arguments, tensors)


def run(body: str, *tensors: torch.Tensor, **sizes: int) -> emulator.Report:
    return emulator.run(*kernel(body, *tensors, **sizes))


def compute(instruction: str, result: str, *operands: np.ndarray) -> np.ndarray:
    """One instruction on one thread per element: ``{0}`` is the result, ``{1}``, ``{2}``, ... the operands."""
    count = len(operands[0])
    padded = [torch.from_numpy(np.resize(o, -(-count // 64) * 64).view(f"i{o.itemsize}")) for o in operands]
    out = torch.zeros(len(padded[0]), dtype=getattr(torch, f"int{8 * np.dtype(result).itemsize}"))
    names, lines = [], []
    for i, tensor in enumerate([out, *padded]):
        size = tensor.element_size()
        names.append({2: "%h", 4: "%r", 8: "%rd"}[size] + str(10 + i))
        lines.append(f"mul.wide.s32 %rd{i}, %r0, {size}; add.s64 %rd{i}, %at{i}, %rd{i};")
        if i:
            lines.append(f"ld.global.b{8 * size} {names[i]}, [%rd{i}];")
    lines.append(instruction.format(*names) + f" st.global.b{8 * out.element_size()} [%rd0], {names[0]};")
    run("\n".join(lines), out, *padded, threads=64, blocks=len(out) // 64)
    return out.numpy().view(result)[:count]
