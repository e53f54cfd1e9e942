"""A prepared kernel: what decode.py makes of a parsed one, and batch.py and schedule.py run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .parse import Kernel

if TYPE_CHECKING:
    from .batch import Batch

__all__ = ["FLOAT", "SIGNED", "UNSIGNED", "Program", "Step", "selection"]

Step = Callable[["Batch", Any], None]
UNSIGNED, SIGNED, FLOAT = 0, 1, 2  # the three ways to read a row


def selection(lanes: np.ndarray) -> Any:
    """Sorted lanes as a slice where they follow one another, which costs numpy no copy, else as they are."""
    first, last = int(lanes[0]), int(lanes[-1])
    return slice(first, last + 1) if last - first + 1 == len(lanes) else lanes


@dataclass
class Program:
    """A prepared kernel.

    Attributes:
        steps: one function per instruction; None for jumps and exits, which the scheduler does itself.
        ends: for each instruction, the end of its basic block.
        gather: for instructions that need company (barriers, shuffles, mma), who must be there.
        targets: for jumps, where to; several for brx.idx, whose index is in the slot ``chosen_by``.
        guards: for jumps, exits and what needs company, the slot of the predicate and whether it is negated.
        slots: the width in bytes of each slot that has a row of its own (0 for a predicate).
        constants: slot -> an array with the one value.
        specials: slot of each special register that is used.
        names: the slot of each register and special register.
        watched: slots of the registers that are watched for reads before writes, and their names.
        grain: the finest access to each memory, in bytes.
        local: bytes of local memory per thread.
        arrays: the module's own arrays: their memory, and what is in it when a launch begins.
        running: held by a launch, whose arrays they are until it ends.
    """

    kernel: Kernel
    steps: list[Step | None] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    gather: dict[int, Callable[[Batch, Any], np.ndarray | None]] = field(default_factory=dict)
    targets: dict[int, list[int]] = field(default_factory=dict)
    chosen_by: dict[int, int] = field(default_factory=dict)
    guards: dict[int, tuple[int, bool]] = field(default_factory=dict)
    slots: list[int] = field(default_factory=list)
    constants: dict[int, np.ndarray] = field(default_factory=dict)
    specials: dict[str, int] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    watched: dict[int, str] = field(default_factory=dict)
    static_shared: int = 0
    local: int = 0
    arrays: dict[str, tuple[np.ndarray, bytes]] = field(default_factory=dict)
    grain: dict[str, int] = field(default_factory=dict)
    running: Any = field(default_factory=threading.RLock)

    @cached_property
    def owned(self) -> dict[int, list[int]]:
        """The slots that have a row of their own, by width."""
        owned: dict[int, list[int]] = {}
        for slot, width in enumerate(self.slots):
            if slot not in self.constants:
                owned.setdefault(width, []).append(slot)
        return owned
