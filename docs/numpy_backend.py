"""A backend in numpy: the whole contract of ``refq4.backend.Backend`` in under a hundred lines, to start yours from.

python docs/numpy_backend.py                 verify it against the reference
python docs/numpy_backend.py --plant-a-bug   the same with one bug, to see how it is found
                             --quick         with a quarter of the questions
"""

import sys

import numpy as np
import torch

import refq4
from refq4.backend import Backend
from refq4.testing import verify


class NumpyBackend(Backend):
    """Each op as its docstring in ``refq4/backend.py`` asks for it."""

    name = "numpy"
    description = "the tutorial's: every op in numpy"

    # Step 1 of quantising: a scale for each block. Step 2: the rank of each scaled weight among the thresholds.
    def quantize_blockwise(self, A, code, blocksize):
        x = blocks_of(A.reshape(-1).float().numpy(), blocksize)
        absmax = np.abs(x).max(axis=1, initial=0)
        with np.errstate(all="ignore"):
            inverse = np.float32(1) / absmax
            inverse = np.where(np.isfinite(inverse), inverse, np.float32(0))
            scaled = np.clip(x * inverse[:, None], np.float32(-1), np.float32(1))
        rank = np.searchsorted(code.thresholds.numpy(), scaled, side="left")  # thresholds below x; ties go down
        rank[np.isnan(scaled)] = 0
        codes = code.order.numpy()[rank].reshape(-1)[: A.numel()]
        return torch.from_numpy(codes).view(A.shape), torch.from_numpy(absmax)

    # Two codes a byte, the first in the high nibble; an odd one is followed by the code of 0.0.
    def quantize_4bit(self, A, code, blocksize):
        codes, absmax = self.quantize_blockwise(A.reshape(-1), code, blocksize)
        codes = np.append(codes.numpy(), [np.uint8(code.zero_code())] * (A.numel() % 2)).astype(np.uint8)
        return torch.from_numpy(codes[0::2] << 4 | codes[1::2]), absmax

    # Decoding: a look-up times the block's scale in fp32, rounded once at the end (torch rounds to bf16, numpy can't).
    def dequantize_blockwise(self, q, absmax, code, blocksize, dtype):
        scales = absmax.numpy().repeat(blocksize)[: q.numel()]
        with np.errstate(all="ignore"):
            values = code.numpy()[q.reshape(-1).numpy()] * scales
        return torch.from_numpy(values).to(dtype).view(q.shape)

    def dequantize_4bit(self, weight, dtype):
        packed, absmax = weight.packed.numpy(), weight.absmax
        codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: int(np.prod(weight.shape))]
        if weight.nested is not None:  # double quantisation: the scales are 8-bit codes with scales of their own
            second = weight.nested
            absmax = self.dequantize_blockwise(absmax, second.absmax, second.code, second.blocksize, torch.float32)
            absmax = absmax + second.offset
        flat = self.dequantize_blockwise(torch.from_numpy(codes), absmax, weight.code, weight.blocksize, dtype)
        return flat.view(weight.shape)

    # Products: decoded in fp32, summed in fp32, rounded to the activations' dtype.
    def gemm_4bit(self, x, weight, bias):
        W = self.dequantize_4bit(weight, torch.float32).numpy()
        y = x.float().numpy() @ W.T
        return torch.from_numpy(y if bias is None else y + bias.float().numpy()).to(x.dtype)

    gemv_4bit = gemm_4bit


class BuggyBackend(NumpyBackend):
    """The same with a bug that any of us could write: the offset of the nested scales is left out."""

    name = "buggy"

    def dequantize_4bit(self, weight, dtype):
        if weight.nested is not None:
            weight = weight._replace(nested=weight.nested._replace(offset=torch.zeros(())))
        return super().dequantize_4bit(weight, dtype)


def blocks_of(flat, blocksize):
    """[blocks, blocksize], the last one filled up with zeros."""
    return np.append(flat, np.zeros(-len(flat) % blocksize, np.float32)).reshape(-1, blocksize)


if __name__ == "__main__":
    backend = refq4.register_backend(BuggyBackend() if "--plant-a-bug" in sys.argv else NumpyBackend())
    report = verify(backend.name, depth="quick" if "--quick" in sys.argv else "normal")
    print(report)
    sys.exit(not report.agrees)
