"""What a product needs besides its tensors: a factor at which its code rounds well.

The tensor cores multiply 16-bit numbers. What is rounded is not each weight but the code's sixteen values, and here is
room to choose: any factor c on the table can be divided out of the fp32 sums again. :func:`table_factor` gives the c at
which the sixteen round best. For FP4 (at c = 1.5, say) and the integer codes nothing is lost at all. All weights of a
code are rounded alike, so for activations that have a mean the mean of the errors counts as well as their size.

c travels in the kernel's argument, and the kernel multiplies the code that it reads, so there is no table that a CUDA
graph's private pool could own or that another stream could read too early.
"""

from __future__ import annotations

from functools import cache

import torch

from refq4.codebooks import codebook_names, get_codebook

__all__ = ["table_factor"]

_STEPS = 1536  # candidates 1 + i/1536: 12/8 for FP4 and 7/4 for int4 are among them, exactly


@cache
def table_factor(codebook: str, dtype: torch.dtype) -> float:
    """c for the codebook of that name, an fp32 number; 1.0 for a name that is not registered.

    Chosen by the name, so that no value on the device has to be read. A code that differs from the codebook whose name
    it has is rounded less well, and no worse than by the dtype.

    Example:
        >>> table_factor("nf4", torch.bfloat16), table_factor("mine", torch.bfloat16)
        (1.4361978769302368, 1.0)
    """
    if codebook not in codebook_names():
        return 1.0
    values = torch.tensor(get_codebook(codebook).values, dtype=torch.float32)
    factors = (1 + torch.arange(_STEPS, dtype=torch.float64) / _STEPS).float()[:, None]
    rounded = (values * factors).to(dtype).double()  # as the kernel does it; what follows is exact enough to compare
    error = rounded / factors.double() - values.double()
    often = 4 - 3 * values.double().abs().clamp(max=1)  # in a normal weight large codes are rare
    often /= often.sum()
    cost = error.square() @ often + 16 * (error @ often).square()  # as in a row of 16 constant activations
    return float(factors[cost.argmin()])
