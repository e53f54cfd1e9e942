"""Loads, stores, atomics, copies (cp.async), and what there is around them: addresses, fences, hints.

ld.volatile.global.L1::evict_first.v4.b32 {%r1, ...}, [%rd1+16];
   '- strong  '- space (none: generic)     '- how many, and of which type; hints on caches change nothing here
atom.relaxed.gpu.global.add.f32 %f1, [%rd1], %f2;       red: the same without a result
     '- order and scope: every atomic here is as strong as there is

Atomics are made one lane after the other, in the order of lanes; each gets what it found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .errors import EmulatorError, Fault
from .floating import decode, encode
from .memory import LOCAL_WINDOW, SHARED_WINDOW, WINDOWS, unsigned
from .parse import width_of
from .semantics import Known, Row, dtype_of, family, known, on_lanes, pure

if TYPE_CHECKING:
    from .batch import Batch

__all__: list[str] = []

# --- addresses --------------------------------------------------------------------------------------------------------

for _space, _window in (WINDOWS | {"shared::cta": SHARED_WINDOW}).items():
    _end = {0: SHARED_WINDOW, SHARED_WINDOW: LOCAL_WINDOW, LOCAL_WINDOW: (1 << 63) - 1}[_window]
    pure(f"isspacep.{_space}", "pred = s64")(lambda a, start=_window, end=_end: (a >= start) & (a < end))
    pure(f"cvta.{_space}.u64", "s64 = s64")(lambda a, start=_window: a + start)
    pure(f"cvta.to.{_space}.u64", "s64 = s64")(lambda a, start=_window: a - start)
pure("cvta.const.u64", "u64 = u64")(lambda a: a)


# --- loads and stores -------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """What an opcode of a load, store or atomic says: memory, type, how many, whether it is volatile or ordered."""

    space: str = "generic"
    many: int = 1
    strong: bool = False
    operation: str = ""
    hint: tuple[str, ...] = ()


_SPACES = {"global": "global", "shared": "shared", "local": "local", "const": "global", "param": "param"}
_STRONG = {"volatile", "relaxed", "acquire", "release", "mmio"}
_SILENT = {"weak", "nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "cta", "cluster", "gpu", "sys", "acq_rel", "noftz"}


def _form(modifiers: list[str]) -> Form | None:
    """The form, or None if a modifier is none of those known."""
    form = Form()
    for modifier in modifiers:
        if (space := modifier.partition("::")[0]) in _SPACES:
            form = form._replace(space=_SPACES[space])
        elif modifier in ("v2", "v4"):
            form = form._replace(many=int(modifier[1]))
        elif modifier in _STRONG:
            form = form._replace(strong=True)
        elif modifier in _OPERATIONS:
            form = form._replace(operation=modifier)
        elif modifier == "L2::cache_hint":
            form = form._replace(hint=("any",))
        elif modifier not in _SILENT and not modifier.startswith(("L1::", "L2::")):
            return None
    return form


@family("ld", "ldu")
def _load(parts: list[str]) -> Known | None:
    _, *modifiers, kind = parts
    form = _form(modifiers)
    if form is None or form.operation or not re.fullmatch(r"[busf](8|16|32|64)", kind):
        return None
    kind = kind if kind in ("f32", "f64") or kind[0] == "s" else "u" + kind[1:]  # extended by the sign, or by 0
    space, many, strong, dtype = form.space, form.many, form.strong, dtype_of(kind)

    def function(m: Batch, s: Any, address: Row, *hint: Any) -> Any:
        values = m.spaces[space].read(address, s, dtype.itemsize, many, strong).view(dtype)
        return values if many == 1 else list(values.T)

    return Known((kind,) * many, ("address", *form.hint), function, on_lanes=True)


@family("st")
def _store(parts: list[str]) -> Known | None:
    _, *modifiers, kind = parts
    form = _form(modifiers)
    if form is None or form.operation or not re.fullmatch(r"[busf](8|16|32|64)", kind):
        return None
    space, many, strong = form.space, form.many, form.strong

    def function(m: Batch, s: Any, address: Row, *rows: Row) -> None:
        values = rows[0] if many == 1 else np.stack(rows[:many], axis=1)
        m.spaces[space].write(address, s, values.view(unsigned[values.itemsize]), strong)

    kind = kind if kind in ("f32", "f64") else "u" + kind[1:]  # bits are bits
    return Known((), ("address", *[kind] * many, *form.hint), function, on_lanes=True)


# --- atomics ----------------------------------------------------------------------------------------------------------

_OPERATIONS: dict[str, Callable[..., Row]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "cas": lambda old, compare, new: np.where(old == compare, new, old),
    "inc": lambda old, limit: np.where(old >= limit, 0, old + 1),
    "dec": lambda old, limit: np.where((old == 0) | (old > limit), limit, old - 1),
}


@family("atom", "red")
def _atomic(parts: list[str]) -> Known | None:
    name, *modifiers, kind = parts
    form = _form(modifiers)
    if form is None or not form.operation:
        return None
    if kind.startswith(("f", "bf")) and form.operation not in ("add", "min", "max"):
        return None
    space, size, compute, half = form.space, width_of(kind), _OPERATIONS[form.operation], kind.removesuffix("x2")
    dtype = "" if half in ("f16", "bf16") else f"{kind[0].replace('b', 'u').replace('s', 'i')}{size}"

    def on_bits(*rows: Row) -> Row:
        if dtype:
            return compute(*(row.view(dtype) for row in rows)).astype(dtype).view(rows[0].dtype)
        return encode(compute(*(decode(row, half) for row in rows)), half).view(rows[0].dtype)

    def function(m: Batch, s: Any, address: Row, *rows: Row) -> Row:
        lanes, rows = m.lanes[s], rows[: len(rows) - len(form.hint)]
        found = np.empty(len(lanes), unsigned[size])
        for some in _turns(address):
            operands = (row[some] for row in rows)
            found[some] = m.spaces[space].update(address[some], lanes[some], size, on_bits, *operands)
        return found

    bits = f"u{8 * size}"
    values = (bits,) * (2 if form.operation == "cas" else 1)
    return Known((bits,) if name == "atom" else (), ("address", *values, *form.hint), function, on_lanes=True)


def _turns(address: np.ndarray) -> Iterator[np.ndarray]:
    """The lanes in groups that have no address in common, each lane after those before it at its address."""
    left = np.arange(len(address))
    while len(left):
        first = np.sort(np.unique(address[left], return_index=True)[1])
        yield left[first]
        left = np.delete(left, first)


# --- cp.async ---------------------------------------------------------------------------------------------------------


@family("cp")
def _copy(parts: list[str]) -> Known | None:
    """``cp.async [shared], [global], bytes {, bytes to read}``: what is not read is filled with zeros."""
    if not re.fullmatch(r"cp\.async\.c[ag]\.shared(::cta)?\.global(\.L2::\w+)*", ".".join(parts)):
        return None
    hint = "L2::cache_hint" in parts

    def function(m: Batch, s: Any, to: Row, start: Row, size: int, *given: Row) -> None:
        lanes = m.lanes[s]
        given = given[: len(given) - hint]
        read = np.minimum(given[0], size) if given else np.full(len(lanes), size)
        data = np.zeros((len(lanes), size), np.uint8)
        if (some := read == size).any():
            data[some] = m.memory.read(start[some], lanes[some], 4, size // 4).reshape(-1, size // 4).view(np.uint8)
        if (some := (read > 0) & (read < size)).any():
            m.memory.require_aligned(start[some], lanes[some], size)
            for i in range(size):
                if (some := (read > i) & (read < size)).any():
                    data[some, i] = m.memory.read(start[some] + i, lanes[some], 1, 1)
        m.shared.copy(to, s, data)

    return known(f" = address address int u32?{' any' * hint}", function, on_lanes=True)


on_lanes("cp.async.commit_group", " = ")(lambda m, s: m.shared.commit(s))
on_lanes("cp.async.wait_group", " = int")(lambda m, s, newest: m.shared.wait(s, newest))
on_lanes("cp.async.wait_all", " = ")(lambda m, s: m.shared.wait(s, None))


# --- fences and hints: here every write is seen at once; what a missing fence does, only hardware shows ---------------

for _opcode in ("membar.cta", "membar.gl", "membar.sys", "fence.proxy.async", "fence.proxy.async.shared::cta",
                *(f"fence.{order}.{at}" for order in ("sc", "acq_rel") for at in ("cta", "cluster", "gpu", "sys")),
                *(f"prefetch.{space}L{level}" for space in ("", "global.") for level in (1, 2)),
                "nanosleep.u32", "applypriority.global.L2::evict_normal", "griddepcontrol.wait",
                "griddepcontrol.launch_dependents"):  # fmt: skip
    pure(_opcode, " = any? any?")(lambda *ignored: None)
for _level in ("evict_last", "evict_first", "evict_normal", "evict_unchanged"):
    pure(f"createpolicy.fractional.L2::{_level}.b64", "u64 = any? any?")(lambda *ignored: 0)


@on_lanes("trap", " = ")
def _(m: Batch, s: Any) -> None:
    raise Fault(EmulatorError, m.lanes[s], "executes trap", "look for an assertion in the source that does not hold")
