"""What a language model loses in NF4 and in its neighbours: integers, GPTQ, AWQ, GGUF's Q4_0 and MXFP4.

    python scripts/models/neighbours.py DIR TEXT     DIR is a model in full precision, with a tokenizer
                              --sequences N          measured on the text's first N pieces of 256 tokens (8)

All are written here from their papers and specifications, GPTQ and AWQ in their plainest form: asymmetric integers, a
scale and a zero point for 128 weights. These two look at the text's *last* 4 N pieces. Every format is decoded to fp32
and put back into the model: what is measured is the format, not a kernel.

    GPTQ    arXiv 2210.17323, section 3        round a column, then move what the others can still make good
    AWQ     arXiv 2306.00978, section 3.2      multiply the columns of large activations before rounding, divide after
    Q4_0    llama.cpp, ggml/src/ggml-quants.c  16 steps between the largest weight and its opposite
    MXFP4   OCP Microscaling Formats (MX) v1.0, sections 5 and 6
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from settings import language_model, parser
from torch import Tensor, nn

from refq4.functional import dequantize_4bit, quantize_4bit

GROUP = 128
Format = Callable[[Tensor, Tensor], Tensor]  # W [N, K], H [K, K], the mean of x x' -> W as it is decoded, [N, K]


def main() -> None:
    options = parser(__doc__).parse_args()
    language_model(options.model, options.text, options.sequences, in_formats)


def in_formats(full: Any, seen: list[Tensor]) -> Iterator[tuple[str, str, float, Any]]:
    layers = {name: m for name, m in full.model.named_modules() if isinstance(m, nn.Linear)}
    moments = second_moments(full, layers, seen)
    for name, (bits, decoded) in FORMATS.items():
        small, error = copy.deepcopy(full), 0.0
        with torch.no_grad():
            for key, layer in layers.items():
                W = layer.weight.detach()
                new = decoded(W, moments[key])
                error += float((new - W).norm() / W.norm()) / len(layers)
                small.model.get_submodule(key).weight.copy_(new)
        yield name, f"{bits:.2f}", error, small


def second_moments(model: Any, layers: dict[str, nn.Module], seen: list[Tensor]) -> dict[str, Tensor]:
    """By a layer's name: the mean of x x' [K, K] over what the layer is given."""
    sums: dict[str, Tensor] = {}

    def add(key: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            sums[key] = sums.get(key, 0) + x.T @ x

        return hook

    hooks = [layer.register_forward_pre_hook(add(key)) for key, layer in layers.items()]
    with torch.no_grad():
        for ids in seen:
            model.model(ids[None])  # without the head: its logits are not wanted
    for hook in hooks:
        hook.remove()
    return {key: total / sum(len(ids) for ids in seen) for key, total in sums.items()}


def scale_and_zero(W: Tensor) -> tuple[Tensor, Tensor]:
    """W [N, G] -> scale [N, 1] in fp16's precision and zero point [N, 1], 0 to 15, of one group."""
    low, high = W.amin(1, keepdim=True).clamp(max=0), W.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).half().float().clamp(min=6e-8)
    return scale, (-low / scale).round().clamp(0, 15)


def rounded(W: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return ((W / scale + zero).round().clamp(0, 15) - zero) * scale


def integers(W: Tensor, H: Tensor) -> Tensor:
    """Each group by itself, to the nearest."""
    parts = [rounded(group, *scale_and_zero(group)) for group in W.split(GROUP, dim=1)]
    return torch.cat(parts, dim=1)


def gptq(W: Tensor, H: Tensor) -> Tensor:
    """Column after column, each rounding error spread over the columns that are left, by the inverse of H."""
    W, K = W.clone(), W.shape[1]
    H = H + 0.01 * H.diagonal().mean() * torch.eye(K)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for start in range(0, K, GROUP):
        end = min(start + GROUP, K)
        scale, zero = scale_and_zero(W[:, start:end])
        errors = torch.empty(len(W), end - start)
        for k in range(start, end):
            new = rounded(W[:, k : k + 1], scale, zero)
            error = (W[:, k : k + 1] - new) / U[k, k]
            W[:, k + 1 : end] -= error @ U[k : k + 1, k + 1 : end]
            W[:, k : k + 1], errors[:, k - start : k - start + 1] = new, error
        W[:, end:] -= errors @ U[start:end, end:]
    return W


def awq(W: Tensor, H: Tensor) -> Tensor:
    """Columns times s, a power of how large their activations are; of ten powers the one with the smallest error."""
    size = H.diagonal().sqrt().clamp(min=1e-4)
    best, least = W, torch.inf
    for power in torch.linspace(0, 0.9, 10):
        s = (size**power).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        new = integers(W * s, H) / s
        error = float(((new - W) @ H * (new - W)).sum())
        if error < least:
            best, least = new, error
    return best


def nf4(nested: bool) -> Format:
    def decoded(W: Tensor, H: Tensor) -> Tensor:
        return dequantize_4bit(*quantize_4bit(W, quant_type="nf4", blocksize=64, compress_statistics=nested))

    return decoded


def q4_0(W: Tensor, H: Tensor) -> Tensor:
    """A scale in fp16 for 32 weights; 16 steps of which the first, -8, is the largest weight, whatever its sign."""
    x = W.reshape(-1, 32)
    largest = x.gather(1, x.abs().argmax(1, keepdim=True))
    step = largest / -8
    codes = torch.where(step == 0, 0.0, x / step + 8.5).floor().clamp(0, 15)
    return ((codes - 8) * step.half().float()).view_as(W)


def mxfp4(W: Tensor, H: Tensor) -> Tensor:
    """A power of two for 32 weights, so that the largest lies between 4 and 8; the nearest E2M1, which ends at 6."""
    x = W.reshape(-1, 32)
    scale = 2 ** (x.abs().amax(1, keepdim=True).clamp(min=2.0**-125).log2().floor() - 2)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nearest = values[torch.bucketize((x / scale).abs(), (values[1:] + values[:-1]) / 2)]
    return (nearest.copysign(x) * scale).view_as(W)


FORMATS: dict[str, tuple[float, Format]] = {
    "NF4, blocks of 64, double quantisation": (4 + 8 / 64 + 32 / (64 * 256), nf4(nested=True)),
    "NF4, blocks of 64": (4 + 32 / 64, nf4(nested=False)),
    "integers, groups of 128, to the nearest": (4 + 20 / GROUP, integers),
    "GPTQ, groups of 128": (4 + 20 / GROUP, gptq),
    "AWQ, groups of 128": (4 + 20 / GROUP, awq),
    "GGUF Q4_0, blocks of 32": (4 + 16 / 32, q4_0),
    "MXFP4, blocks of 32": (4 + 8 / 32, mxfp4),
}

if __name__ == "__main__":
    main()
