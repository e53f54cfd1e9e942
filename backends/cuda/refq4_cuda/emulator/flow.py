"""What can be known about a kernel before it runs: where control goes, and which registers are surely written.

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
    others = instruction.flat[results_of(instruction) :]
    read = [o.base if isinstance(o, Address) else o.removeprefix("!") for o in others]
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
    ends = block_ends(kernel)
    known: dict[int, set[str]] = {0: set()}  # block start -> registers surely written on entry
    work = [0]
    while work:
        start = work.pop()
        sure = known[start].union(*(written_registers(i) for i in kernel.code[start : ends[start]] if not i.guard))
        for successor in _successors(kernel, ends[start]):
            before = known.get(successor)
            both = set(sure) if before is None else before & sure
            if both != before:
                known[successor] = both
                work.append(successor)
    doubtful: set[str] = set()
    for start, sure in known.items():
        for one in kernel.code[start : ends[start]]:
            doubtful.update(name for name in read_registers(one) if name not in sure)
            sure.update(() if one.guard else written_registers(one))
    return doubtful & kernel.registers.keys()


_SPACES = {"param", "global", "shared", "local", "const"}


def grain(kernel: Kernel, space: str) -> int:
    """The smallest access to a memory, in bytes: what the race check counts in."""
    sizes = [16]
    for instruction in kernel.code:
        family, *modifiers = instruction.opcode.split(".")
        spaces = {modifier.partition("::")[0] for modifier in modifiers} & _SPACES
        if family in ("ld", "ldu", "st", "atom", "red") and spaces <= {space}:
            sizes.append(width_of(modifiers[-1]))
        elif instruction.opcode.startswith("cp.async.c") and len(instruction.operands) > 2:
            sizes.append(int(str(instruction.operands[2]), 0) if space == "shared" else 4)
    return min(sizes)


def _successors(kernel: Kernel, end: int) -> list[int]:
    last = kernel.code[end - 1]
    targets = [at for at in targets_of(kernel, last) if at < len(kernel.code)] if is_branch(last) else []
    falls_through = not (is_branch(last) or is_exit(last)) or last.guard is not None
    return targets + ([end] if falls_through and end < len(kernel.code) else [])
