"""Checks at the boundary: what users hand to the public functions, looked at once, with errors that say what to do."""

from __future__ import annotations

import sys
import warnings

import torch
from torch import Tensor

from . import layout
from .state import BLOCKSIZES, WEIGHT_DTYPES
from .trace import show

ACTIVATION_DTYPES = (*WEIGHT_DTYPES, torch.float64)


def check_floats(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """A TypeError unless ``tensor`` is a dense tensor of one of the dtypes."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be a tensor of {wanted}, got {show(tensor)}; cast it first")
    if tensor.layout != torch.strided:
        layout_name = str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, got a {layout_name} one; call .to_dense()")


def check_blocksize(blocksize: int) -> int:
    """The blocksize, or a ValueError if it is none of the eight."""
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {list(BLOCKSIZES)}, got {blocksize!r}")
    return int(blocksize)


def check_storage(dtype: torch.dtype) -> None:
    """A ValueError unless packed bytes can be stored under ``dtype``."""
    if dtype not in layout.STORAGE_DTYPES:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in layout.STORAGE_DTYPES)
        raise ValueError(f"quant_storage must be one of {wanted}, got {dtype!r}")


def check_scales(absmax: Tensor, shape: torch.Size, blocksize: int) -> None:
    """A ValueError unless ``absmax`` has one fp32 scale for each block of ``shape``."""
    blocks = layout.block_count(shape.numel(), blocksize)
    if absmax.numel() != blocks or absmax.dtype != torch.float32:
        raise ValueError(f"shape {list(shape)} at blocksize {blocksize} has {blocks} fp32 scales, got {show(absmax)}")


def check_codes(q: Tensor, code: Tensor) -> None:
    """A ValueError unless every uint8 code has its entry in ``code``; backends look them up without asking."""
    if code.dtype != torch.float32 or code.dim() != 1:
        raise ValueError(f"code must be fp32 [2 to 256], got {show(code)}")
    if code.numel() < 256 and q.numel() and not q.is_meta and not torch.compiler.is_compiling():
        largest = int(q.max())
        if largest >= code.numel():
            raise ValueError(f"code has {code.numel()} entries, and the largest of the codes to decode is {largest}")


def write_into(name: str, given: Tensor | None, result: Tensor) -> Tensor:
    """``result``, or ``given`` with the result copied into it."""
    if given is None:
        return result
    if given.shape != result.shape or given.dtype != result.dtype or given.device != result.device:
        raise ValueError(f"{name}= must be {show(result)} on {result.device}, got {show(given)} on {given.device}")
    return given.copy_(result)


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning that points at the caller's own line: the nearest one outside refq4 and torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("refq4", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
