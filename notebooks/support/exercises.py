"""The exercises at the end of each notebook, and what checks an answer to them.

    exercises.check("2.1", answer)      "2.1 is right", or what is not right yet

An answer is a value or a function. Each check asks the library itself (quantise, decode, trace, ``verify``, the
emulator), so it holds for every right answer and not for one way to write it. The solutions stand folded in the
notebooks; ``tests/docs/test_exercises.py`` tries each of them, and a wrong answer to each.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import refq4
from refq4.codebooks import Codebook, get_codebook
from refq4.functional import dequantize_4bit, quantize_4bit
from refq4.reference import ReferenceBackend
from refq4.testing import verify

__all__ = ["CHECKS", "Verdict", "check"]


@dataclass(frozen=True)
class Verdict:
    """What was said of an answer; shows itself at the end of a cell."""

    right: bool
    words: str

    def __repr__(self) -> str:
        return self.words


class OpenError(Exception):
    """There is no answer yet."""


CHECKS: dict[str, Callable[[Any], None]] = {}


def check(number: str, answer: Any) -> Verdict:
    """Say whether an answer is right, and what is wrong with one that is not."""
    try:
        if answer is ... or (isinstance(answer, list | tuple) and ... in answer):
            raise OpenError
        CHECKS[number](answer)
    except OpenError:
        return Verdict(False, f"{number} is open: put your answer in place of the ...")
    except Exception as error:
        return Verdict(False, f"{number} is not right yet: {error or type(error).__name__}")
    return Verdict(True, f"{number} is right")


def exercise(number: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Enter a check under its number."""

    def enter(function: Callable[[Any], None]) -> Callable[[Any], None]:
        CHECKS[number] = function
        return function

    return enter


def ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the reader's function; one that gives nothing is not written yet."""
    given = function(*arguments)
    if given is None or given is ...:
        raise OpenError
    return given


def same(got: Any, wanted: Any, why: str) -> None:
    """Raise an AssertionError unless both are equal, tensors bit for bit."""
    equal = torch.equal(got, wanted) if isinstance(wanted, Tensor) and isinstance(got, Tensor) else got == wanted
    if not equal:
        raise AssertionError(f"{why} (your answer: {got})")


def near(got: float, wanted: float, why: str, share: float = 0.01) -> None:
    """Raise an AssertionError unless a number is within a share of the right one."""
    if not abs(got - wanted) <= share * abs(wanted):
        raise AssertionError(f"{why} (your answer: {got})")


def normal(*shape: int, seed: int = 0) -> Tensor:
    """The same normal numbers each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- 1 to 5: the format ---------------------------------------------------------------


@exercise("1.1")
def bits_at_32(answer: float) -> None:
    """Bits per weight in blocks of 32."""
    packed, state = quantize_4bit(normal(64, 64), blocksize=32, quant_type="nf4")
    stored = 8 * (packed.nbytes + state.absmax.nbytes) / 4096
    same(answer, stored, "count the code, and the scale's share")


@exercise("1.2")
def decode_by_hand(decode: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Codes [n], one scale for each 64 and the table, to weights [n]."""
    W = normal(3, 64)
    packed, state = quantize_4bit(W, quant_type="nf4")
    codes = refq4.layout.unpack(packed.flatten(), W.numel())
    got = ask(decode, codes, state.absmax, state.code)
    wanted = dequantize_4bit(packed, state).flatten()
    same(got, wanted, "a weight is its code's value times its block's scale")


@exercise("2.1")
def codebook_for_uniform_weights(values: list[float]) -> None:
    """Sixteen values that beat NF4 on uniform weights."""
    W = torch.rand(256, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    refq4.register_codebook(Codebook("exercise", list(values)), replace=True)

    def error(quant_type: str) -> float:
        decoded = dequantize_4bit(*quantize_4bit(W, quant_type=quant_type))
        return float((decoded - W).norm() / W.norm())

    mine, nf4 = error("exercise"), error("nf4")
    if not mine < 0.9 * nf4:
        raise AssertionError(f"it errs by {mine:.4f}, NF4 by {nf4:.4f}: a tenth less, please")


@exercise("2.2")
def nearest_code(nearest: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Scaled weights and the sorted values, to codes; a tie goes down."""
    values = torch.tensor(get_codebook("nf4").values)
    middles = torch.tensor(get_codebook("nf4").thresholds)
    x = torch.cat([middles, values, normal(100).clamp(-1, 1)])
    wanted = (x[:, None] > middles).sum(1)
    same(ask(nearest, x, values).tolist(), wanted.tolist(), "count the midpoints below x")


@exercise("3.1")
def scales_of_blocks(scales: Callable[[Tensor, int], Tensor]) -> None:
    """The scale of each block, of a short last one too."""
    for shape, blocksize in (((4, 64), 64), ((5, 100), 64), ((3,), 32)):
        W = normal(*shape)
        wanted = quantize_4bit(W, blocksize=blocksize, quant_type="nf4")[1].absmax
        same(ask(scales, W, blocksize), wanted, f"wrong for {shape} in blocks of {blocksize}")


@exercise("3.2")
def beside_an_outlier(answer: float) -> None:
    """To what 0.7 decodes beside a 10."""
    W = torch.full((1, 64), 0.7)
    W[0, 5] = 10.0
    decoded = dequantize_4bit(*quantize_4bit(W, quant_type="nf4"))[0, 0].item()
    near(answer, decoded, "scale it by 10, and take the nearest value")


@exercise("4.1")
def nested_scales(scales: Callable[[Any], Tensor]) -> None:
    """The fp32 scales out of a state with double quantisation."""
    W = normal(64, 512)
    packed, state = quantize_4bit(W, quant_type="nf4", compress_statistics=True)
    first = refq4.layout.unpack(packed.flatten(), W.numel())[::64].long()
    wanted = dequantize_4bit(packed, state).flatten()[::64]
    got = ask(scales, state)
    same(state.code[first] * got, wanted, "the weights decode to something else")


@exercise("4.2")
def bits_nested(answer: float) -> None:
    """Bits per weight with blocks of 128 and double quantisation."""
    W = torch.zeros(256 * 128)
    packed, state = quantize_4bit(W, blocksize=128, quant_type="nf4", compress_statistics=True)
    stored = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    near(answer, 8 * stored / W.numel(), "three parts: code, scale, scale of scales", 1e-5)


@exercise("5.1")
def two_codes(unpack: Callable[[int], tuple[int, int]]) -> None:
    """The two codes of a byte, in the order of the weights."""
    for byte in (0x12, 0xF7, 0x80):
        wanted = refq4.layout.unpack(torch.tensor([byte], dtype=torch.uint8), 2).tolist()
        same(list(ask(unpack, byte)), wanted, f"byte {byte:#04x} holds {wanted}")


@exercise("5.2")
def bytes_of_scales(answer: int) -> None:
    """The length of the nested scales of a layer."""
    layer = refq4.nn.LinearNF4(300, 1000, bias=False, compress_statistics=True).to("cpu")
    wanted = layer.state_dict()["weight.absmax"].numel()
    same(answer, wanted, "a byte for each block, and the last one may be short")


# --- 6 to 8: a call -------------------------------------------------------------------


@exercise("6.1")
def paths(answer: list[str]) -> None:
    """The paths of four calls, on the reference."""
    layer = refq4.nn.LinearNF4(64, 8).to("cpu").eval()
    odd = refq4.nn.LinearNF4(100, 8, compute_dtype=torch.float32).to("cpu").eval()
    calls = [(layer, normal(1, 64)), (layer, normal(1, 1, 64)), (layer, normal(2, 64))]
    calls.append((odd, normal(1, 100)))
    for i, (of, x) in enumerate(calls):
        taken = quietly(of, x)[5].choice
        same(answer[i], taken, f"call {i + 1} takes another path")


@exercise("6.2")
def as_the_input(answer: tuple[Any, Tensor]) -> None:
    """A layer and an input for which step 4 says "as the input"."""
    layer, x = answer
    same(quietly(layer, x)[3].choice, "as the input", "step 4 decided otherwise")


def quietly(layer: Any, x: Tensor) -> list[Any]:
    """The steps of a call on the reference, without its warnings."""
    import warnings

    with warnings.catch_warnings(), refq4.use_backend("reference"), refq4.trace() as t:
        warnings.simplefilter("ignore")
        layer(x)
    return list(t.calls[0].steps)


@exercise("7.1")
def gradient_of_x(gradient: Callable[[Tensor, Any], Tensor]) -> None:
    """The gradient of the input, from that of the output and the layer."""
    layer = refq4.nn.LinearNF4(64, 8).to("cpu").train()
    x, grad_y = normal(3, 64).requires_grad_(), normal(3, 8, seed=1)
    layer(x).backward(grad_y)
    torch.testing.assert_close(ask(gradient, grad_y, layer), x.grad)


@exercise("7.2")
def parameters_of_lora(answer: int) -> None:
    """What LoRA of rank 8 trains beside a layer of 1536 x 384."""
    A, B = torch.empty(8, 384), torch.empty(1536, 8)
    same(answer, A.numel() + B.numel(), "two matrices, and the layer itself is frozen")


@exercise("8.1")
def where_they_cross(answer: float) -> None:
    """The M at which reading and multiplying take the same time."""
    reads, multiplies = (4 / 8 + 4 / 64) / 100e9, 2 / 1000e9
    near(answer, reads / multiplies, "seconds a weight: bytes / 100e9, M * 2 / 1000e9", 0.02)


@exercise("8.2")
def decoded_to_memory(answer: float) -> None:
    """How many times the bytes MatMul4Bit of 0.49.1 moves."""
    packed = 4 / 8 + 4 / 64
    near(answer, (packed + 2 + 2) / packed, "packed bytes in, bf16 out, bf16 in again", 0.02)


# --- 9 to 13: engines, agreement, models ----------------------------------------------


@exercise("9.1")
def order_of_shifts(answer: list[int]) -> None:
    """Which shifts of a little-endian dword bring down k = 0 to 7 in order."""
    codes = torch.arange(8, dtype=torch.uint8)
    (dword,) = refq4.layout.pack(codes, 0).numpy().view("<u4")
    got = [int(dword) >> 4 * shift & 15 for shift in answer]
    same(got, codes.tolist(), "these shifts bring down other codes")


@exercise("9.2")
def joined(join: Callable[[int, int], float]) -> None:
    """A bf16 number from its two bytes."""
    for value in (1.0, -0.6953125, 0.0791015625):
        bits = int(torch.tensor(value).bfloat16().view(torch.int16)) & 0xFFFF
        same(ask(join, bits >> 8, bits & 255), value, "upper byte first, then << 16")


@exercise("10.1")
def holder(lane: Callable[[int, int], int]) -> None:
    """The lane that holds row r, column k of A in mma.m16n8k16."""
    for number in range(32):
        g, t = divmod(number, 4)
        for r in (g, g + 8):
            for k in (2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9):
                same(ask(lane, r, k), number, f"row {r}, column {k} lies in lane {number}")


@exercise("10.2")
def race(answer: str) -> None:
    """The emulator's error for a kernel without a barrier."""
    from refq4_cuda import emulator, launch
    from refq4_cuda.nvrtc import compile_variant

    packed, state = quantize_4bit(normal(16, 512), quant_type="nf4", backend="reference")
    x, y = normal(1, 512).bfloat16(), torch.full((1, 16), math.nan).bfloat16()
    (one,) = launch.product(x, state.packed_weight(packed), None, y, 80, 4, rung="tensor_core")
    with planted("gemm_4bit_3_tensor_core.cu", BARRIER, BARRIER.splitlines()[0] + "\n"):
        ptx = compile_variant(one.variant, 80, "ptx").data.decode()
    try:
        emulator.run(ptx, one)
    except emulator.EmulatorError as error:
        same(answer, type(error).__name__, "the emulator says something else")
    else:
        raise AssertionError("the planted race was not found")


BARRIER = "    make_table(table, p);\n    __syncthreads();\n"


@contextmanager
def planted(file: str, old: str, new: str):
    """Let the compiler read a copy of the CUDA kernels with one replacement in it."""
    from refq4_cuda import nvrtc

    kept = nvrtc.kernel_directory
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(kept(), f"{folder}/kernels"))
        source = (copy / file).read_text()
        assert source.count(old) == 1, f"{file} has moved on"
        (copy / file).write_text(source.replace(old, new))
        nvrtc.kernel_directory = lambda: copy
        try:
            yield
        finally:
            nvrtc.kernel_directory = kept


@exercise("11.1")
def closed(agrees: Callable[[Tensor, Tensor, float], bool]) -> None:
    """A comparison that NaN does not pass."""
    one = torch.ones(3)
    spoilt = torch.tensor([1.0, math.nan, 1.0])
    for got, bound, wanted in ((one, 0.0, True), (one + 1, 0.5, False), (spoilt, 0.5, False)):
        given = ask(agrees, got, one, bound)
        same(bool(given), wanted, f"{got.tolist()} against ones, allowed {bound}")


@exercise("11.2")
def unit(answer: float) -> None:
    """A unit in the last place of bf16, at 3.0."""
    neighbour = torch.tensor(3.0).bfloat16().view(torch.int16) + 1
    wanted = float(neighbour.view(torch.bfloat16)) - 3.0
    same(answer, wanted, "how far is the next bf16 number? It has eight bits of mantissa")


@exercise("12.1")
def a_gemv(gemv: Callable[..., Tensor]) -> None:
    """gemv_4bit of a backend of the reader's own, asked forty questions."""

    class Exercise(ReferenceBackend):
        name = "exercise"

        def gemv_4bit(self, x, weight, bias):
            if weight.nested is not None:  # plain scales are enough for an exercise
                second = weight.nested
                decode = self.dequantize_blockwise
                scales = decode(weight.absmax, second.absmax, second.code, 256, torch.float32)
                weight = weight._replace(absmax=scales + second.offset, nested=None)
            return ask(gemv, x, weight, bias)

    refq4.register_backend(Exercise(), replace=True)
    report = verify("exercise", depth="quick", checks=("gemv_4bit",), progress=False)
    if any("OpenError" in failure.message for failure in report.failures):
        raise OpenError
    if not report.agrees:
        raise AssertionError(report.failures[0].message)


@exercise("12.2")
def which_bug(answer: str) -> None:
    """What is wrong with a backend, from what verify says of it."""

    class Exercise(ReferenceBackend):
        name = "exercise"

        def dequantize_4bit(self, weight, dtype):
            packed = (weight.packed << 4) | (weight.packed >> 4)
            return super().dequantize_4bit(weight._replace(packed=packed), dtype)

        def gemm_4bit(self, x, weight, bias):
            decoded = self.dequantize_4bit(weight, x.dtype)
            return torch.nn.functional.linear(x, decoded, bias)

        gemv_4bit = gemm_4bit

    refq4.register_backend(Exercise(), replace=True)
    report = verify("exercise", depth="quick", checks=("gemm_4bit",), progress=False)
    hints = [failure.hint for failure in report.failures]
    if len(answer) < 4 or not any(answer in hint for hint in hints):
        raise AssertionError(f"verify says: {hints[0]}")


@exercise("13.1")
def gigabytes(answer: float) -> None:
    """The size of Llama 2 7B in 4 bits, the rest in bf16."""
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    near(answer, (6.476e9 * bits / 8 + 0.262e9 * 2) / 1e9, "count both parts, in bytes")


@exercise("13.2")
def perplexity(answer: float) -> None:
    """By how many percent perplexity grows with a loss that grows by 0.02 nats."""
    near(answer, 100 * (math.exp(0.02) - 1), "perplexity is e to the loss")
