"""What a product needs besides its tensors: a code rounded to 16 bits, and room for sums on their way.

The tensor cores multiply 16-bit numbers. What is rounded is not each weight but the code's sixteen values, and here is
room to choose: any factor c on the table can be divided out of the fp32 sums again. :func:`rounded_table` takes the c
at which the sixteen round best. For FP4 (c = 1.5) and the integer codes nothing is lost at all.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

__all__ = ["rounded_table", "workspace"]

_STEPS = 1536  # candidates 1 + i/1536: 12/8 for FP4 and 7/4 for int4 are among them, exactly
_tables: dict[tuple[int, torch.dtype], tuple[weakref.ref[Tensor], int, Tensor]] = {}
_workspaces: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


def rounded_table(code: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 [17] on the code's device: the sixteen values times c, rounded to ``dtype``, and 1/c.

    Kept for as long as the code tensor lives unchanged. Computed by torch on the device, so nothing waits for it.

    Example:
        >>> from refq4.codebooks import get_codebook
        >>> table = rounded_table(get_codebook("fp4").on("cpu").values, torch.bfloat16)
        >>> (12 * table[:4] * table[16]).tolist()
        [0.0, 0.0625, 8.0, 12.0]
    """
    key = (id(code), dtype)
    version = 0 if code.is_inference() else code._version
    known = _tables.get(key)
    if known is not None and known[0]() is code and known[1] == version:
        return known[2]
    table = _make_table(code, dtype)
    _tables[key] = (weakref.ref(code, lambda _: _tables.pop(key, None)), version, table)
    return table


def _make_table(code: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        values = code.detach().double()
        factors = 1 + torch.arange(_STEPS, dtype=torch.float64, device=code.device) / _STEPS
        scaled = (values * factors[:, None]).float()
        error = (scaled.to(dtype).double() / factors[:, None] - values).square().sum(dim=1)
        best = error.argmin(dim=0, keepdim=True)
        inverse = factors[best].reciprocal()
        return torch.cat([scaled[best].reshape(-1).to(dtype).double(), inverse]).float()


def workspace(device: torch.device, sums: int, tiles: int) -> tuple[Tensor, Tensor]:
    """Room for ``sums`` fp32 numbers, and ``tiles`` counters that are zero and are left at zero by the kernel.

    Kernels on one stream run one after the other and share theirs. A captured graph may be replayed beside anything,
    so it gets its own.
    """
    if device.type != "cuda":
        return _new_workspace(device, sums, tiles)
    if torch.cuda.is_current_stream_capturing():
        return _new_workspace(device, sums, tiles)
    index = torch.cuda.current_device() if device.index is None else device.index
    key = (index, torch._C._cuda_getCurrentRawStream(index))
    known = _workspaces.get(key)
    if known is None or known[0].numel() < sums or known[1].numel() < tiles:
        _workspaces[key] = known = _new_workspace(device, 2 * sums, max(2 * tiles, 1024))
    return known


def _new_workspace(device: torch.device, sums: int, tiles: int) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(sums, dtype=torch.float32, device=device),
        torch.zeros(tiles, dtype=torch.int32, device=device),
    )
