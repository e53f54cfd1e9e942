"""Reading the emulator's traces in notebook 10: the values in a line's registers, and the way that one value came."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from refq4_cuda.emulator import ThreadTrace
from refq4_cuda.emulator.tracing import Line

__all__ = ["addresses", "bits", "floats", "made_from"]

REGISTER = re.compile(r"%[a-z]+\d+")


def bits(text: str, which: int = 0) -> np.ndarray:
    """uint32 [32]: what a warp's lanes have in the n-th register of ``Line.reads`` or ``Line.writes``."""
    words = _values(text, which)
    return np.array([int(word, 0) & 0xFFFFFFFF for word in words], np.uint32)


def floats(text: str, which: int = 0) -> np.ndarray:
    """fp32 [32]: the same where the instruction takes the register for a floating-point number."""
    return np.array(_values(text, which), np.float32)


def addresses(text: str) -> list[int]:
    """[32]: where the lanes' addresses point, in bytes from the beginning of their tensor."""
    found = [int(byte) for byte in re.findall(r"\] \+ (\d+)", text)]
    return found if len(found) > 1 else found * 32


def made_from(trace: ThreadTrace, last: Line) -> list[Line]:
    """The lines in which a value came about that ``last`` reads, in order: each one wrote what a later one read."""
    lines = trace.lines[: trace.lines.index(last) + 1]
    wanted, way = set(_registers(last.reads)), [last]
    for line in reversed(lines[:-1]):
        written = _registers(line.writes)
        if wanted & set(written):
            wanted = (wanted - set(written)) | set(_registers(line.reads))
            way.append(line)
    return way[::-1]


def _registers(text: str) -> list[str]:
    return [line.split(" = ")[0] for line in text.splitlines() if " = " in line and REGISTER.match(line)]


def _values(text: str, which: int) -> Sequence[str]:
    value = text.splitlines()[which].split(" = ")[1]
    return value.strip("[]").split() if value.startswith("[") else [value] * 32
