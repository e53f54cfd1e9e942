"""Rounding to fp32, one Python number at a time: what the values and thresholds of a codebook are made with."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from itertools import pairwise

import torch

__all__ = ["fp32", "midpoints", "next_below"]


def fp32(x: float) -> float:
    """``x`` rounded to the nearest fp32 number (and inf where it is out of range)."""
    return float(struct.unpack("f", struct.pack("f", x))[0])  # in native mode, which does not raise


def next_below(x: float) -> float:
    """The largest fp32 number below ``x``."""
    return float(torch.nextafter(torch.tensor(x), torch.tensor(-math.inf)))


def midpoints(ascending: Sequence[float]) -> tuple[float, ...]:
    """Midpoints of neighbours, exact in fp64, then one rounding to fp32."""
    return tuple(fp32((a + b) / 2) for a, b in pairwise(ascending))
