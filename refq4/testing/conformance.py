"""What each check asks of a backend, and what counts as the same. Compare with ``refq4/backend.py``, the contract.

    check                  the question                                                            same means
    ---------------------  ----------------------------------------------------------------------  --------------
    quantize_4bit          packed bytes and absmax of a tensor                                     bit for bit
    dequantize_4bit        packed bytes decoded, plain or nested scales                            bit for bit
    quantize_blockwise     8-bit codes and absmax                                                  bit for bit
    dequantize_blockwise   8-bit codes decoded                                                     bit for bit
    gemv_4bit, gemm_4bit   x @ W.t() + bias on the canonical layout                                error budget
    grouped_gemm_4bit      each row times its own expert's weight, stored as [E, N, K] and [E, K, N]       error budget
    own layout             prepare_weight, restore_weight; products on the prepared weight         bits; budget
    forward                Linear4bit: every step's decision, the result, nothing changed          equal; budget
    backward               grad of activations and bias                                            error budget
    state dict             quantise, infer, save, load, infer again                                bit for bit
    embedding              rows of Embedding4bit                                                   bit for bit

Each check runs on the backend by name (strictly), and asserts from the trace that this backend computed. The functions
that ask are in ``ask_ops.py`` and ``ask_layers.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

from ..backend import BackendUnsupportedError
from ..registry import check_usable
from .ask_layers import ask_backward, ask_embedding, ask_forward, ask_state_dict
from .ask_ops import (
    ask_dequantize_4bit,
    ask_dequantize_blockwise,
    ask_grouped,
    ask_own_layout,
    ask_product,
    ask_quantize_4bit,
    ask_quantize_blockwise,
)
from .asked import Asked, NoSuchThing, Outcome
from .cases import Case

__all__ = ["CHECKS", "Check", "Outcome", "check"]


def check(case: Case, backend: str, against: str = "reference") -> Outcome:
    """Run one case on one backend. A wrong result raises no error: the outcome says what was wrong.

    Args:
        case: from :func:`refq4.testing.catalogue`, or your own.
        backend: a registered name.
        against: the backend to compare with, whose error gives the budget.

    Raises:
        UnknownBackendError, BackendUnavailableError: either name can't be used here.
        ValueError: no such check.

    Example:
        >>> check(Case("gemv_4bit", k=65, dtype="bfloat16"), "reference").status
        'same'
    """
    question = CHECKS.get(case.check)
    if question is None:
        raise ValueError(f"unknown check {case.check!r}; known: {', '.join(CHECKS)}")
    engines = [check_usable(name) for name in (backend, against)]
    devices = engines[0].devices if engines[0] is not None else ("cpu",)
    outcome = Outcome(case)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd K or fp16 input is meant here
            question.ask(Asked(case, outcome, backend, against, "cpu" if "cpu" in devices else devices[0]))
    except NoSuchThing as nothing:
        outcome.status, outcome.message = "no such thing", str(nothing)
    except BackendUnsupportedError as refusal:
        asked = any(f"backend {name!r} can't run" in str(refusal) for name in (backend, against))
        outcome.status, outcome.message = "refused" if asked else "differs", str(refusal)
        outcome.message += "" if asked else ' (can_run had accepted the call, so under "auto" it would fail)'
    except AssertionError as difference:
        outcome.status, outcome.message = "differs", str(difference)
        outcome.hint = getattr(difference, "hint", "")
    except Exception as error:
        outcome.status, outcome.message = "differs", f"raised {type(error).__name__}: {error}"
    return outcome


@dataclass(frozen=True)
class Check:
    """A question: the function that asks it, the fields of a case it does not look at, and what it sums.

    ``sums`` says that products are formed, whose numbers must not leave the dtype's range; ``layers`` that a layer
    quantises the weight, which refuses NaN and infinities.
    """

    ask: Callable[[Asked], None]
    ignores: tuple[str, ...] = ()
    sums: bool = False
    layers: bool = False


_NO_PRODUCT = ("m", "bias", "activations")

CHECKS = {
    "quantize_4bit": Check(ask_quantize_4bit, (*_NO_PRODUCT, "nested", "storage")),
    "dequantize_4bit": Check(ask_dequantize_4bit, (*_NO_PRODUCT, "storage")),
    "quantize_blockwise": Check(ask_quantize_blockwise, (*_NO_PRODUCT, "code", "nested", "storage")),
    "dequantize_blockwise": Check(ask_dequantize_blockwise, (*_NO_PRODUCT, "code", "nested", "storage")),
    "gemv_4bit": Check(ask_product, ("m", "storage"), sums=True),
    "gemm_4bit": Check(ask_product, ("storage",), sums=True),
    "grouped_gemm_4bit": Check(ask_grouped, ("storage",), sums=True, layers=True),
    "own layout": Check(ask_own_layout, ("storage",), sums=True),
    "forward": Check(ask_forward, sums=True, layers=True),
    "backward": Check(ask_backward, ("storage",), sums=True),
    "state dict": Check(ask_state_dict, sums=True, layers=True),
    "embedding": Check(ask_embedding, (*_NO_PRODUCT, "nested"), layers=True),
}
"""What can be asked, by name: ``Case.check``, ``verify(checks=...)`` and ``--check`` take these names.

Example:
    >>> list(CHECKS)[:2]
    ['quantize_4bit', 'dequantize_4bit']
"""
