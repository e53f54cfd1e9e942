"""What devices have room for: shared memory and registers. A device tells its own; here is what is published."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ARCHITECTURES", "LEAST", "THREADS", "Limits", "no_room", "published"]

THREADS = 256  # of a CTA, in every kernel


class Limits(NamedTuple):
    """What a device has room for: bytes of shared memory in a CTA and in a multiprocessor, registers in a CTA.

    A device tells its own (``driver.py``).
    """

    cta: int
    multiprocessor: int
    registers: int = 65536


_LIMITS = {
    75: Limits(64 << 10, 64 << 10),
    **dict.fromkeys((80, 87), Limits(163 << 10, 164 << 10)),
    **dict.fromkeys((86, 88, 89, 120, 121), Limits(99 << 10, 100 << 10)),
    **dict.fromkeys((90, 100, 103, 110), Limits(227 << 10, 228 << 10)),
}
ARCHITECTURES = tuple(sorted(_LIMITS))  # what NVRTC 13.0 compiles for


LEAST = Limits(20 << 10, 20 << 10, THREADS * 128)  # what every kernel wants that serves where others don't


def no_room(limits: Limits) -> str | None:
    """Why no plan fits into a device, or None: the naive rung, quantising and decoding take any shape, if they fit.

    Example:
        >>> no_room(published(90)) is None, no_room(Limits(48 << 10, 48 << 10, registers=4096))
        (True, 'the kernels need 32768 registers in a CTA, and the device has 4096')
    """
    if limits.registers < LEAST.registers:
        return f"the kernels need {LEAST.registers} registers in a CTA, and the device has {limits.registers}"
    if limits.cta < LEAST.cta:
        return f"the kernels need {LEAST.cta} bytes of shared memory in a CTA, and the device allows {limits.cta}"
    return None


def published(arch: int) -> Limits:
    """The limits in the CUDA C++ Programming Guide, for planning without a device; a later architecture has 99 KB.

    Example:
        >>> published(121).cta
        101376
    """
    return _LIMITS.get(arch, _LIMITS[120])
