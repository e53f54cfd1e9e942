"""Who runs next. Lanes at the same instruction run together; of several groups, the one furthest behind goes first.

    groups      instruction 12: lanes 0-63     instruction 40: lanes 64-255     -> 12 runs until it reaches 40, or jumps
    waiting     instruction 55 (bar.sync): lanes 0-31                           -> until the rest of the block is there

"Furthest behind first" is what makes the two sides of a branch meet again. A group runs to the end of its basic block
without looking left or right: only at a label can another group join it.

With a seed, warps no longer run in step: each is a team of its own, and which team goes on, and for how long, is drawn
from the seed. The checks find a race in any order; a seed shows what the race does to the result.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .batch import Batch
from .errors import AccessError, ConvergenceError, EmulatorError, Fault, RunawayError
from .order import WARP
from .program import UNSIGNED, selection

__all__ = ["Scheduler"]

Watcher = Callable[[Batch, int, Any, bool], None]  # (batch, instruction, selection, after it ran?)
LIMIT = 20_000_000  # visits to basic blocks, far above any honest launch
_PATIENCE = 64
_SLICES = (1, 2, 3, 5, 10, 50)  # how many basic blocks a team may run before another has its turn


class Scheduler:
    """Runs one batch to its end."""

    def __init__(self, batch: Batch, counts: list[int], seed: int | None, watcher: Watcher | None = None) -> None:
        self.m, self.program, self.counts, self.watcher = batch, batch.program, counts, watcher
        self.draw = random.Random(seed) if seed is not None else None
        warps = batch.padded // WARP if self.draw else 1
        self.teams: list[dict[int, np.ndarray]] = [{} for _ in range(warps)]
        self.waiting: dict[int, np.ndarray] = {}
        self.visits = 0
        self._add(0, np.nonzero(batch.existing)[0])

    def run(self) -> None:
        """Until every thread has returned.

        Raises:
            EmulatorError: whatever was found wrong, with its place.
        """
        while True:
            ready = [team for team in self.teams if team]
            if not ready:
                if self.waiting and self._woken(every=True):  # some may have waited for lanes that have returned since
                    continue
                break
            if self.draw is None:
                self._run_team(ready[0], LIMIT)
            else:
                self._run_team(self.draw.choice(ready), self.draw.choice(_SLICES))
        if self.waiting:
            self._report_divergence()

    def _run_team(self, team: dict[int, np.ndarray], visits: int) -> None:
        while team and visits:
            visits -= 1
            # now and then the one furthest ahead: it may hold what the others spin for
            pc = min(team) if self.visits % _PATIENCE or len(team) == 1 else max(team)
            lanes = team.pop(pc)
            self._run_block(pc, lanes)
            if self.m.meetings.changed:
                self._woken(every=False)
            self.visits += 1
            if self.visits > LIMIT:
                raise self._error(
                    pc, Fault(RunawayError, lanes, "is still running", "look at the loop's condition and its step")
                )

    def _run_block(self, start: int, lanes: np.ndarray) -> None:
        """From ``start`` to the end of its basic block; then to wherever the lanes go."""
        m, steps, gather, counts, watcher = self.m, self.program.steps, self.program.gather, self.counts, self.watcher
        end = self.program.ends[start]
        s, many = selection(lanes), len(lanes)
        try:
            for pc in range(start, end):
                step = steps[pc]
                if step is None:
                    self._jump(pc, lanes, s)
                    return
                if pc in gather:
                    if pc in self.program.guards:
                        lanes = self._parted(pc, lanes, s)
                        s = selection(lanes) if len(lanes) else s
                    lanes = self._gathered(pc, lanes, s) if len(lanes) else lanes
                    if not len(lanes):
                        return
                    s, many = selection(lanes), len(lanes)
                counts[pc] += many
                m.order.instruction = pc
                if watcher:
                    watcher(m, pc, s, False)
                step(m, s)
                if watcher:
                    watcher(m, pc, s, True)
        except Fault as fault:
            raise self._error(pc, fault) from None
        self._add(end, lanes)

    def _gathered(self, pc: int, lanes: np.ndarray, s: Any) -> np.ndarray:
        """Of these lanes and those that wait at ``pc``, the ones whose company is complete; the others wait (on)."""
        if pc in self.waiting:
            _join(self.waiting, pc, lanes)
            lanes = self.waiting.pop(pc)
            s = selection(lanes)
        present: np.ndarray | None = self.program.gather[pc](self.m, s)
        if present is None:
            return lanes
        _join(self.waiting, pc, lanes[~present])
        complete: np.ndarray = lanes[present]
        return complete

    def _parted(self, pc: int, lanes: np.ndarray, s: Any) -> np.ndarray:
        """The lanes whose predicate holds; the others go on behind the instruction."""
        holds = self._holds(pc, s)
        if not holds.all():
            self._add(pc + 1, lanes[~holds])
        some: np.ndarray = lanes[holds]
        return some

    def _holds(self, pc: int, s: Any) -> np.ndarray:
        slot, negated = self.program.guards[pc]
        if slot in self.program.watched:
            self.m.require_written(slot, s)
        holds: np.ndarray = self.m.rows[UNSIGNED][slot][s] ^ negated
        return holds

    def _woken(self, every: bool) -> bool:
        """Let lanes that wait try again: those whose numbered barrier is complete, or (every) all of them."""
        woken = False
        for pc, lanes in list(self.waiting.items()):
            again = self.m.meetings.passes[lanes]
            if every:
                there = self.program.gather[pc](self.m, selection(lanes))
                again = np.ones(len(lanes), bool) if there is None else there
            if again.any():
                woken = True
                del self.waiting[pc]
                if not again.all():
                    self.waiting[pc] = lanes[~again]
                self._add(pc, lanes[again])
        self.m.meetings.changed = False
        return woken

    def _jump(self, pc: int, lanes: np.ndarray, s: Any) -> None:
        """A branch or an exit, taken by the lanes whose predicate holds."""
        self.counts[pc] += len(lanes)
        if self.watcher:
            self.watcher(self.m, pc, s, True)
        taken, staying = lanes, lanes[:0]
        if pc in self.program.guards:
            holds = self._holds(pc, s)
            taken, staying = (lanes, staying) if holds.all() else (lanes[holds], lanes[~holds])
        if len(staying):
            self._add(pc + 1, staying)
        if len(taken):
            if pc in self.program.chosen_by:
                self._choose(pc, taken)
            elif pc in self.program.targets:
                self._add(self.program.targets[pc][0], taken)
            else:
                self.m.live[taken] = False

    def _choose(self, pc: int, lanes: np.ndarray) -> None:
        """brx.idx: each lane to the label that its index chooses."""
        targets, index = self.program.targets[pc], self.m.rows[UNSIGNED][self.program.chosen_by[pc]][lanes]
        beyond = index >= len(targets)
        if beyond.any():
            what = f"jumps to label {int(index[beyond][0])} of {len(targets)}"
            raise Fault(AccessError, lanes[beyond], what, "look at the range of the switch")
        for k in np.unique(index):
            self._add(targets[int(k)], lanes[index == k])

    def _add(self, pc: int, lanes: np.ndarray) -> None:
        if pc >= len(self.program.steps):
            self.m.live[lanes] = False
            return
        if len(self.teams) == 1:
            parts: list[tuple[dict[int, np.ndarray], np.ndarray]] = [(self.teams[0], lanes)]
        else:
            warp = self.m.thread[lanes] // WARP
            parts = [(self.teams[w], lanes[warp == w]) for w in np.unique(warp)]
        for team, some in parts:
            _join(team, pc, some)

    # --- errors -----------------------------------------------------------------------------------------------------

    def _report_divergence(self) -> None:
        """Nobody can go on, and some lanes still wait for others."""
        m, code = self.m, self.program.kernel.code
        pc = min(self.waiting)
        lanes = self.waiting[pc]
        block, whole_block = m.block[lanes[0]], code[pc].opcode.startswith(("bar.sync", "bar.red", "barrier"))
        near = (m.block == block) if whole_block else (m.warp == m.warp[lanes[0]])
        absent = np.setdiff1d(np.nonzero(near & m.existing)[0], lanes)
        elsewhere = Counter("has returned" for lane in absent if not m.live[lane])
        for other, there in self.waiting.items():
            if other != pc:
                line = code[other].line
                elsewhere[f"waits at PTX line {line} ({code[other].text})"] += len(np.intersect1d(there, absent))
        rest = "; ".join(f"{count} thread(s): {what}" for what, count in elsewhere.items() if count)
        raise self._error(
            pc,
            Fault(
                ConvergenceError,
                lanes,
                f"waits with {int(near[lanes].sum()) - 1} others of its {'block' if whole_block else 'warp'} for the "
                f"rest, which never comes ({rest or 'they do not exist'})",
                "look for a barrier, shuffle or mma inside a branch or a loop that not every thread takes",
            ),
        )

    def _error(self, pc: int, fault: Fault) -> EmulatorError:
        (x, y, z), thread = self.m.where(int(fault.lanes[0]))
        others = f" (and {len(fault.lanes) - 1} more)" if len(fault.lanes) > 1 else ""
        return fault.kind(
            f"kernel {self.program.kernel.name}, {self._place(pc)}\n"
            f"block ({x}, {y}, {z}), thread {thread}{others} {fault.what}.\n"
            f"{'' if fault.other is None else f'The other access: {self._place(fault.other)}' + chr(10)}"
            f"{fault.look[0].upper()}{fault.look[1:]}."
        )

    def _place(self, pc: int) -> str:
        instruction = self.program.kernel.code[pc]
        source = f" ({instruction.source})" if instruction.source else ""
        return f"PTX line {instruction.line}{source}:  {instruction.text}"


def _join(groups: dict[int, np.ndarray], pc: int, lanes: np.ndarray) -> None:
    """Lanes, in order, to those at the same instruction, with which they have none in common."""
    groups[pc] = np.sort(np.concatenate((groups[pc], lanes))) if pc in groups else lanes


def batches(total: int, per_batch: int) -> Sequence[np.ndarray]:
    """The numbers of all blocks of a grid, in runs."""
    return [np.arange(start, min(start + per_batch, total)) for start in range(0, total, per_batch)]
