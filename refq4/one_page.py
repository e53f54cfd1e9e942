"""The 4-bit linear layer on one page: NF4, blocks of 64, double quantisation; quantise, pack, decode, multiply.

It imports nothing of refq4. Every other file generalises, checks or speeds up one of these functions, and a test holds
the two to the same bits (``tests/core/test_one_page.py``):

    nf4_code, dynamic_code -> codebooks.py      quantize, dequantize -> reference.py      the packing -> layout.py
    Linear4bit -> state.py (what it keeps), params.py and nn (the module), pipeline.py (the call)

Shapes: M tokens, N out_features, K in_features, B = N*K/64 blocks. QLoRA (Dettmers et al. 2023), section 3.
"""

from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

__all__ = ["Linear4bit"]

BLOCK, NESTED_BLOCK = 64, 256


def nf4_code() -> Tensor:
    """fp32 [16], ascending: quantiles of the normal distribution, 7 negative, a zero, 8 positive; the largest is 1."""
    quantile = NormalDist().inv_cdf  # 0.9677083 is where bitsandbytes puts the outermost one
    positive = [quantile(p) for p in torch.linspace(0.9677083, 0.5, 9).tolist()[:-1]]
    negative = [-quantile(p) for p in torch.linspace(0.9677083, 0.5, 8).tolist()[:-1]]
    values = torch.tensor(sorted([*negative, 0.0, *positive]))
    return values / values.max()


def dynamic_code() -> Tensor:
    """fp32 [256], ascending: the 8-bit map of the scales; seven decades, each with twice the steps of the one below."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        means = 10 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values))


def quantize(x: Tensor, code: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """x fp32, whole blocks -> (index of the nearest value of ``code`` uint8 [numel], absmax fp32 [blocks])."""
    x = x.reshape(-1, block)
    absmax = x.abs().amax(dim=1)
    scaled = (x * (1 / absmax)[:, None]).nan_to_num(0).clamp(-1, 1)  # a block of zeros stays zeros
    midpoints = ((code[1:].double() + code[:-1].double()) / 2).float()
    return torch.bucketize(scaled, midpoints).to(torch.uint8).reshape(-1), absmax


def dequantize(codes: Tensor, absmax: Tensor, code: Tensor, block: int) -> Tensor:
    """The inverse: code[codes] times the scale of each block, fp32 [numel]."""
    return (code[codes.int()].reshape(-1, block) * absmax[:, None]).reshape(-1)


class Linear4bit(nn.Module):
    """y = x @ W.T + bias, where W [N, K] is kept in 4.127 bits a weight: 4 of code, 8/64 + 32/(64*256) of scale.

    Example:
        >>> Linear4bit(torch.randn(8, 64))(torch.randn(2, 64)).shape
        torch.Size([2, 8])
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.shape, self.bias, self.code, self.code2 = weight.shape, bias, nf4_code(), dynamic_code()
        codes, absmax = quantize(weight, self.code, BLOCK)
        self.packed = codes[0::2] << 4 | codes[1::2]  # [N*K/2]: two codes a byte, the first in the high half
        self.offset = absmax.mean()  # double quantisation: each scale minus the mean, in 8 bits
        whole_blocks = pad(absmax - self.offset, (0, -absmax.numel() % NESTED_BLOCK))
        q, self.absmax2 = quantize(whole_blocks, self.code2, NESTED_BLOCK)
        self.q = q[: absmax.numel()]  # uint8 [B]

    def weight(self) -> Tensor:
        """W [N, K], decoded."""
        q = pad(self.q, (0, -self.q.numel() % NESTED_BLOCK))
        absmax = dequantize(q, self.absmax2, self.code2, NESTED_BLOCK)[: self.q.numel()] + self.offset
        codes = torch.stack([self.packed >> 4, self.packed & 15], dim=1).reshape(-1)
        return dequantize(codes, absmax, self.code, BLOCK).view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]: the weight is decoded for the call, then dropped."""
        return linear(x, self.weight().to(x.dtype), self.bias)
