"""What the emulator can find wrong: one family of errors, each message with the place and the next thing to look at.

Memory, synchronisation and instructions raise a :class:`Fault` where they notice something: they know the lanes, not
the place. The scheduler knows the place and turns it into one of the public errors, all an :class:`EmulatorError`.
"""

from __future__ import annotations

import numpy as np

__all__ = [
    "AccessError",
    "ConvergenceError",
    "EmulatorError",
    "Fault",
    "LaunchError",
    "RaceError",
    "RunawayError",
    "UninitialisedError",
    "UnknownInstructionError",
]


class EmulatorError(RuntimeError):
    """The family of all errors below."""


class UnknownInstructionError(EmulatorError):
    """The PTX holds an instruction that this emulator does not know; it knows those that the kernels use."""


class LaunchError(EmulatorError):
    """The launch does not fit the kernel: its arguments, its grid or its shared memory."""


class AccessError(EmulatorError):
    """Memory outside every buffer, outside shared memory, or at an address that is not aligned."""


class UninitialisedError(EmulatorError):
    """A register or a byte of shared memory was read that nobody has written, or that cp.async is still writing."""


class RaceError(EmulatorError):
    """Two threads touch the same memory, one of them writing, and no barrier orders the two."""


class ConvergenceError(EmulatorError):
    """Threads that must arrive together at a barrier, a shuffle or an mma do not."""


class RunawayError(EmulatorError):
    """The kernel does not come to an end."""


class Fault(Exception):  # noqa: N818 (it is caught, named and raised as one of the errors above)
    """Something wrong, without its place.

    Args:
        kind: the public error it will become.
        lanes: the batch's lanes at fault; the first one is named.
        what: what happened, as the end of a sentence that starts with the thread's name.
        look: what to look for in the source.
        other: the instruction that made the other access of a race, where it is known.
    """

    def __init__(
        self, kind: type[EmulatorError], lanes: np.ndarray, what: str, look: str, other: int | None = None
    ) -> None:
        super().__init__(what)
        self.kind, self.lanes, self.what, self.look, self.other = kind, lanes, what, look, other
