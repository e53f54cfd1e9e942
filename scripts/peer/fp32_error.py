"""Whose fp32 product is how far from the exact one, by the measure of bitsandbytes' own ``test_gemv_4bit``.

    python scripts/peer/fp32_error.py

The operands are that test's "fc2" of dim 1024: one token times a weight [1024, 4096] in NF4 or FP4. Its measure is the
mean distance over sqrt(dim), of which it allows 2.4e-8, taken from torch's own product. Here every product is measured
from the fp64 product of the same decoded weight as well, and so is that exact product, rounded to fp32 once.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

import refq4
import refq4.functional as F

DIM, TOKENS = 1024, 10


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).abs().mean()) / math.sqrt(DIM)


def main() -> None:
    import bitsandbytes.functional as peer

    torch.manual_seed(0)
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for i in range(TOKENS):
        x, W = torch.randn(1, 4 * DIM), torch.randn(DIM, 4 * DIM) / math.sqrt(DIM)
        settings = {"quant_type": ("nf4", "fp4")[i % 2], "compress_statistics": i % 4 > 1}
        for name, functional in (("refq4", F), ("bitsandbytes", peer)):
            packed, state = functional.quantize_4bit(W, **settings)
            decoded = functional.dequantize_4bit(packed, state)
            exact, linear = x.double() @ decoded.double().t(), torch.nn.functional.linear(x, decoded)
            if name == "refq4":
                y = F.gemv_4bit(x, packed.t(), state=state, backend="cpu")
                products = {"torch's linear": linear, "exact, rounded once": exact.float(), "refq4 cpu": y}
            else:
                packs = peer.has_avx512bf16()
                if packs:
                    packed, state = peer._convert_weight_packed_for_cpu(packed, state)
                y = peer.gemv_4bit(x, packed if packs else packed.t(), state=state)
                products = {f"bitsandbytes{', packed' if packs else ''}": y}
            for product, result in products.items():
                found[product].append((distance(result, exact), distance(result, linear)))
    print(f"mean distance / sqrt({DIM}), {TOKENS} tokens, tier {refq4.backend_info('cpu')['tier']}")
    print(f"{'':24}from the exact product   from torch's linear")
    for product, distances in found.items():
        a, b = (sum(column) / TOKENS for column in zip(*distances, strict=True))
        print(f"{product:24}{a:22.2e} {b:21.2e}")


if __name__ == "__main__":
    main()
