"""What can be known about a kernel before it runs: where control goes, which registers are surely written, and for
how long each one's value is needed.

A register that every path writes before it is read needs no check while the kernel runs, and nearly all are of that
kind. The few others (written under a predicate, or on one path only) are watched lane by lane.
"""

from __future__ import annotations

from .parse import Address, Instruction, Kernel, width_of
from .semantics import find, results_of

__all__ = [
    "block_ends",
    "grain",
    "is_branch",
    "is_exit",
    "live_ranges",
    "read_registers",
    "splits",
    "targets_of",
    "watched",
    "written_registers",
]


def is_branch(instruction: Instruction) -> bool:
    """A jump."""
    return instruction.opcode in ("bra", "bra.uni", "brx.idx", "brx.idx.uni")


def is_exit(instruction: Instruction) -> bool:
    """The end of a thread."""
    return instruction.opcode in ("ret", "ret.uni", "exit")


def written_registers(instruction: Instruction) -> list[str]:
    """The registers that an instruction writes: its first operands."""
    return [str(name) for name in instruction.flat[: results_of(instruction)] if name != "_"]


def read_registers(instruction: Instruction) -> list[str]:
    """The guard, and every name among the other operands."""
    read = [
        o.base if isinstance(o, Address) else o.removeprefix("!") for o in instruction.flat[results_of(instruction) :]
    ]
    return [instruction.guard, *read] if instruction.guard else read


def targets_of(kernel: Kernel, instruction: Instruction) -> list[int]:
    """Where a jump may lead; ``brx.idx`` chooses from a list."""
    last = str(instruction.operands[-1])
    return [kernel.labels[name] for name in kernel.tables.get(last, [last])]


def splits(instruction: Instruction) -> bool:
    """Whether the lanes whose predicate does not hold go on behind it by themselves."""
    return instruction.guard is not None and (found := find(instruction)) is not None and found.meets is not None


def block_ends(kernel: Kernel) -> list[int]:
    """For each instruction, the index just after its basic block: the next label's, or after the next jump."""
    starts = set(kernel.labels.values())
    ends = [0] * len(kernel.code)
    end = len(kernel.code)
    for pc in reversed(range(len(kernel.code))):
        one = kernel.code[pc]
        if is_branch(one) or is_exit(one) or splits(one) or pc + 1 in starts:
            end = pc + 1
        ends[pc] = end
    return ends


def watched(kernel: Kernel) -> set[str]:
    """The registers that some path may read before it has written them (a forward dataflow over basic blocks)."""
    bit = {name: 1 << i for i, name in enumerate(kernel.registers)}
    reads = [_mask(read_registers(i), bit) for i in kernel.code]
    writes = [0 if i.guard else _mask(written_registers(i), bit) for i in kernel.code]
    ends = block_ends(kernel)
    everything = (1 << len(bit)) - 1
    known: dict[int, int] = {0: 0}  # block start -> registers surely written on entry
    work = [0]
    while work:
        start = work.pop()
        sure = known[start]
        for pc in range(start, ends[start]):
            sure |= writes[pc]
        for successor in _successors(kernel, ends[start]):
            before = known.get(successor, everything)
            if successor not in known or before & sure != before:
                known[successor] = before & sure
                work.append(successor)
    doubtful = 0
    for start, sure in known.items():
        for pc in range(start, ends[start]):
            doubtful |= reads[pc] & ~sure
            sure |= writes[pc]
    return {name for name, mask in bit.items() if doubtful & mask}


def live_ranges(kernel: Kernel) -> dict[str, tuple[int, int]]:
    """For each register in use, the first and the last instruction between which its value matters to some thread.

    A backward dataflow over basic blocks; what lies between the two counts as needed, whether it is or not.
    """
    bit = {name: 1 << i for i, name in enumerate(kernel.registers)}
    reads = [_mask(read_registers(i), bit) for i in kernel.code]
    writes = [_mask(written_registers(i), bit) for i in kernel.code]
    ends = block_ends(kernel)
    starts = [pc for pc in range(len(ends)) if pc == 0 or ends[pc - 1] == pc]
    needed = dict.fromkeys(starts, 0)  # block start -> registers whose values matter there
    changed = True
    while changed:
        changed = False
        for start in reversed(starts):
            now = _needed_after(kernel, ends[start], needed)
            for pc in reversed(range(start, ends[start])):
                now = (now if kernel.code[pc].guard else now & ~writes[pc]) | reads[pc]  # a guarded write leaves lanes
            changed |= now != needed[start]
            needed[start] = now
    places = [(pc, reads[pc] | writes[pc]) for pc in range(len(ends))]
    places += [(start, needed[start]) for start in starts]
    places += [(ends[start] - 1, _needed_after(kernel, ends[start], needed)) for start in starts]
    ranges: dict[str, tuple[int, int]] = {}
    names = list(kernel.registers)
    for pc, mask in places:
        while mask:
            name = names[mask.bit_length() - 1]
            mask ^= bit[name]
            first, last = ranges.get(name, (pc, pc))
            ranges[name] = min(first, pc), max(last, pc)
    return ranges


def _needed_after(kernel: Kernel, end: int, needed: dict[int, int]) -> int:
    mask = 0
    for successor in _successors(kernel, end):
        mask |= needed[successor]
    return mask


def grain(kernel: Kernel, space: str) -> int:
    """The smallest access to a memory, in bytes: what the race check counts in."""
    sizes = [16]
    for instruction in kernel.code:
        family, *modifiers = instruction.opcode.split(".")
        elsewhere = {m.partition("::")[0] for m in modifiers} & {"param", "global", "shared", "local", "const"} - {
            space
        }
        if family in ("ld", "ldu", "st", "atom", "red") and not elsewhere:
            sizes.append(width_of(modifiers[-1]))
        elif instruction.opcode.startswith("cp.async.c") and len(instruction.operands) > 2:
            sizes.append(int(str(instruction.operands[2]), 0) if space == "shared" else 4)
    return min(sizes)


def _mask(names: list[str], bit: dict[str, int]) -> int:
    mask = 0
    for name in names:
        mask |= bit.get(name, 0)
    return mask


def _successors(kernel: Kernel, end: int) -> list[int]:
    last = kernel.code[end - 1]
    targets = [at for at in targets_of(kernel, last) if at < len(kernel.code)] if is_branch(last) else []
    falls_through = not (is_branch(last) or is_exit(last)) or last.guard is not None
    return targets + ([end] if falls_through and end < len(kernel.code) else [])
