"""A backend runs an op: the one place where the choice is resolved, the backend called and the trace told.

Both files of ops call it (``refq4/internals/dispatch.py`` for the product, ``refq4/internals/codec.py`` for quantising
and decoding), after they have checked the operands.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from .. import registry
from ..backend import Call
from ..registry import Resolved
from ..trace import OpRecord, current

__all__ = ["run_op"]


def run_op(describe: Callable[[], Call], backend: str | Resolved, op: str, *operands: Any) -> Any:
    """Let the backend compute, and tell the trace; an error in the middle says whose it was."""
    found = registry.resolve(describe(), backend) if isinstance(backend, str) else backend
    listener = current()
    start = time.perf_counter_ns() if listener is not None else 0
    try:
        result = getattr(found.backend, op)(*operands)
    except Exception as error:
        error.add_note(f"raised while backend {found.backend.name!r} ran {describe()}")
        raise
    if listener is not None:
        micros, call = (time.perf_counter_ns() - start) / 1e3, describe()
        name, kernel = found.backend.name, found.backend.kernel(call)
        listener.op(OpRecord(call.op, name, kernel, str(call), list(found.passed_over), micros))
    return result
