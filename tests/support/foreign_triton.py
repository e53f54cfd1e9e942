"""Triton kernels for the emulator, compiled to PTX without a GPU; ``TRITON_CASES`` has a function for each.

Of bitsandbytes' wheel, the Triton kernels for 4 bits are compiled and judged as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl
from foreign import near, same, uniform, whole
from refq4_cuda.emulator import run_ptx
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from refq4.functional import dequantize_4bit, quantize_4bit

TRITON_CASES: dict[str, Callable[[int], None]] = {}


def case(check: Callable[[int], None]) -> Callable[[int], None]:
    TRITON_CASES[check.__name__] = check
    return check


@cache
def compiled(kernel, arch: int, signature: tuple, constants: tuple, warps: int = 4, stages: int = 3):
    fixed = dict(constants)
    source = ASTSource(kernel, signature=dict(signature) | dict.fromkeys(fixed, "constexpr"), constexprs=fixed)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def launch(kernel, arch: int, grid: tuple, signature: dict[str, str], args: list, **constants: int) -> None:
    """Compile and run; Triton's own two scratch pointers are null."""
    made = compiled(kernel, arch, tuple(signature.items()), tuple(constants.items()))
    threads = made.metadata.num_warps * 32
    run_ptx(made.asm["ptx"], made.metadata.name, grid, (threads, 1, 1), [*args, 0, 0], shared=made.metadata.shared)


@triton.jit
def _softmax(x, y, n, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + tl.program_id(0) * n + i, mask=i < n, other=-float("inf"))
    v = tl.exp(v - tl.max(v, 0))
    tl.store(y + tl.program_id(0) * n + i, v / tl.sum(v, 0), mask=i < n)


@case
def triton_softmax(arch: int) -> None:
    x = uniform(3, 200)
    y = torch.full_like(x, float("nan"))
    launch(_softmax, arch, (3, 1, 1), {"x": "*fp32", "y": "*fp32", "n": "i32"}, [x, y, 200], B=256)
    near(y, x.double().softmax(1))


@triton.jit
def _layer_norm(x, w, b, y, n, eps, B: tl.constexpr):
    i = tl.arange(0, B)
    row, m = tl.program_id(0) * n, i < n
    v = tl.load(x + row + i, mask=m, other=0.0).to(tl.float32)
    centred = tl.where(m, v - tl.sum(v, 0) / n, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / n + eps)
    out = centred * scale * tl.load(w + i, mask=m) + tl.load(b + i, mask=m)
    tl.store(y + row + i, out.to(tl.bfloat16), mask=m)


@case
def triton_layer_norm(arch: int) -> None:
    x, w, b = uniform(3, 200).bfloat16(), uniform(200, seed=1), uniform(200, seed=2)
    y = torch.full_like(x, float("nan"))
    signature = {"x": "*bf16", "w": "*fp32", "b": "*fp32", "y": "*bf16", "n": "i32", "eps": "fp32"}
    launch(_layer_norm, arch, (3, 1, 1), signature, [x, w, b, y, 200, 1e-5], B=256)
    near(y.float(), torch.nn.functional.layer_norm(x.double(), (200,), w.double(), b.double()), 1e-2)


@triton.jit
def _matmul(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rm, rn = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    sums = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        left = tl.load(a + rm[:, None] * K + k + rk[None, :], mask=(rm[:, None] < M) & (k + rk[None, :] < K), other=0.0)
        right = tl.load(b + (k + rk[:, None]) * N + rn, mask=(rn[None, :] < N) & (k + rk[:, None] < K), other=0.0)
        sums = tl.dot(left, right, sums)
    tl.store(c + rm[:, None] * N + rn[None, :], sums, mask=(rm[:, None] < M) & (rn[None, :] < N))


@case
def triton_matmul(arch: int) -> None:
    a, b = uniform(20, 80).bfloat16(), uniform(80, 40, seed=1).bfloat16()
    c = torch.full((20, 40), float("nan"))
    signature = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "M": "i32", "N": "i32", "K": "i32"}
    launch(_matmul, arch, (1, 2, 1), signature, [a, b, c, 20, 40, 80], BM=32, BN=32, BK=32)
    near(c, a.double() @ b.double())


@triton.jit
def _pipelined(a, b, c, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rm, rn, rk = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    sums = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        left = tl.load(a + rm[:, None] * K + k + rk[None, :])
        right = tl.load(b + (k + rk[:, None]) * BN + rn[None, :])
        sums = tl.dot(left, right, sums)
    tl.store(c + rm[:, None] * BN + rn[None, :], sums)


@case
def triton_pipelined(arch: int) -> None:
    """Whole tiles and known strides: from sm_80 on, cp.async in several stages."""
    a, b, c = uniform(16, 128).half(), uniform(128, 16, seed=1).half(), torch.full((16, 16), float("nan"))
    divisible = {"a": "*fp16", "b": "*fp16", "c": "*fp32"}
    launch(_pipelined, arch, (1, 1, 1), divisible, [a, b, c], K=128, BM=16, BN=16, BK=32)
    near(c, a.double() @ b.double())


@triton.jit
def _cumsum(x, y, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.cumsum(tl.load(x + i, mask=i < n, other=0), 0), mask=i < n)


@case
def triton_cumsum(arch: int) -> None:
    x = whole(400)
    y = torch.full_like(x, -1)
    launch(_cumsum, arch, (1, 1, 1), {"x": "*i32", "y": "*i32", "n": "i32"}, [x, y, 400], B=512)
    same(y, x.cumsum(0, dtype=torch.int32))


@triton.jit
def _histogram(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.atomic_add(y + tl.arange(0, 64), tl.histogram(tl.load(x + i, mask=i < n, other=63), 64))


@case
def triton_histogram(arch: int) -> None:
    x, y = whole(500, high=63), torch.zeros(64, dtype=torch.int32)
    launch(_histogram, arch, (2, 1, 1), {"x": "*i32", "y": "*i32", "n": "i32"}, [x, y, 500], B=256)
    wanted = torch.bincount(x, minlength=64).int()
    wanted[63] += 12  # what lies behind the end counts there
    same(y, wanted)


@triton.jit
def _transpose(x, y, M, N, B: tl.constexpr):
    i, j = tl.program_id(0) * B + tl.arange(0, B), tl.program_id(1) * B + tl.arange(0, B)
    v = tl.load(x + i[:, None] * N + j[None, :], mask=(i[:, None] < M) & (j[None, :] < N))
    tl.store(y + j[:, None] * M + i[None, :], tl.trans(v), mask=(j[:, None] < N) & (i[None, :] < M))


@case
def triton_transpose(arch: int) -> None:
    x = uniform(40, 50).half()
    y = torch.full((50, 40), float("nan"), dtype=torch.float16)
    signature = {"x": "*fp16", "y": "*fp16", "M": "i32", "N": "i32"}
    launch(_transpose, arch, (2, 2, 1), signature, [x, y, 40, 50], B=32)
    same(y, x.t().contiguous())


@triton.jit
def _sort(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.sort(tl.load(x + i)))


@case
def triton_sort(arch: int) -> None:
    x = whole(128, high=50)
    y = torch.full_like(x, -1)
    launch(_sort, arch, (1, 1, 1), {"x": "*i32", "y": "*i32"}, [x, y], B=128)
    same(y, x.sort()[0])


@triton.jit
def _argmin(x, y, z, n, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + tl.program_id(0) * n + i, mask=i < n, other=float("inf"))
    tl.store(y + tl.program_id(0), tl.argmin(v, 0))
    tl.atomic_max(z, tl.max(tl.where(i < n, v, 0.0), 0))


@case
def triton_argmin(arch: int) -> None:
    x, y, z = uniform(3, 200), torch.full((3,), -1, dtype=torch.int32), torch.zeros(1)
    launch(_argmin, arch, (3, 1, 1), {"x": "*fp32", "y": "*i32", "z": "*fp32", "n": "i32"}, [x, y, z, 200], B=256)
    same(y, x.argmin(1).int())
    same(z[0], x.max())


@triton.jit
def _attention(q, k, v, o, n, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    rm, rd = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    Q = tl.load(q + rm[:, None] * D + rd[None, :], mask=rm[:, None] < n, other=0.0)
    top, total = tl.full((BM,), -float("inf"), tl.float32), tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, D), tl.float32)
    for at in range(0, n, BN):
        r = at + tl.arange(0, BN)
        K = tl.load(k + r[None, :] * D + rd[:, None], mask=r[None, :] < n, other=0.0)
        p = tl.where(r[None, :] < n, tl.dot(Q, K) * scale, -float("inf"))
        new = tl.maximum(top, tl.max(p, 1))
        shrink, p = tl.exp2(top - new), tl.exp2(p - new[:, None])
        total = total * shrink + tl.sum(p, 1)
        V = tl.load(v + r[:, None] * D + rd[None, :], mask=r[:, None] < n, other=0.0)
        sums = tl.dot(p.to(tl.float16), V, sums * shrink[:, None])
        top = new
    tl.store(o + rm[:, None] * D + rd[None, :], (sums / total[:, None]).to(tl.float16), mask=rm[:, None] < n)


@case
def triton_attention(arch: int) -> None:
    q, k, v = (uniform(40, 32, seed=i).half() for i in range(3))
    o = torch.full_like(q, float("nan"))
    signature = dict.fromkeys("qkvo", "*fp16") | {"n": "i32", "scale": "fp32"}
    launch(_attention, arch, (2, 1, 1), signature, [q, k, v, o, 40, 1.4427 / 32**0.5], D=32, BM=32, BN=32)
    wanted = (q.double() @ k.double().t() / 32**0.5).softmax(1) @ v.double()
    near(o.float(), wanted, 5e-3)


@triton.jit
def _gelu(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + i, mask=i < n)
    tl.store(y + i, 0.5 * v * (1 + tl.erf(v * 0.70710678)), mask=i < n)


@case
def triton_gelu(arch: int) -> None:
    x = uniform(400)
    y = torch.full_like(x, float("nan"))
    launch(_gelu, arch, (2, 1, 1), {"x": "*fp32", "y": "*fp32", "n": "i32"}, [x, y, 400], B=256)
    near(y, torch.nn.functional.gelu(x.double()))


# --- bitsandbytes' own, from its wheel --------------------------------------------------------------------------------


def peer_dequantized(quant_type: str, numel: int, arch: int = 80) -> tuple[Tensor, Tensor]:
    """What the wheel's Triton kernel makes of a weight, and what refq4's reference does."""
    from bitsandbytes.backends.triton import kernels_4bit as peer

    w = uniform(numel // 64, 64)
    packed, state = quantize_4bit(w, quant_type=quant_type, blocksize=64, backend="reference")
    out = torch.full((numel,), float("nan"), dtype=torch.float16)
    kernel = peer.dequant_nf4_kernel if quant_type == "nf4" else peer.dequant_fp4_kernel
    signature = {"a_ptr": "*u8", "c_ptr": "*fp16", "absmax_ptr": "*fp32", "num_paired_elements": "i32",
                 "num_output_elements": "i32"}  # fmt: skip
    args = [packed, out, state.absmax, numel // 2, numel]
    launch(kernel, arch, (-(-numel // 512), 1, 1), signature, args, QUANT_BLOCK=64, SPLIT_SIZE=256)
    return out, dequantize_4bit(packed, state, backend="reference").half().view(-1)


def peer_quantized(quant_type: str, w: Tensor, arch: int = 80) -> tuple[Tensor, Tensor]:
    """The packed bytes and absmax that the wheel's Triton kernel makes of whole blocks of 64."""
    from bitsandbytes.backends.triton import kernels_4bit as peer

    numel, blocks = w.numel(), w.numel() // 64
    packed, absmax = torch.zeros(numel // 2, dtype=torch.uint8), torch.zeros(blocks)
    kernel = peer.quantize_nf4_blockwise_kernel if quant_type == "nf4" else peer.quantize_fp4_blockwise_kernel
    signature = {"A_ptr": "*fp32", "absmax_ptr": "*fp32", "out_ptr": "*u8"}
    signature |= {"n_elements": "i32", "absmax_elements": "i32"}
    args = [w, absmax, packed, numel, blocks]
    launch(kernel, arch, (-(-blocks // 4), 1, 1), signature, args, BLOCK_SIZE=64, SPLIT_NUM_BLOCKS=4)
    return packed, absmax
