"""The values that a 4-bit weight can have, and the rule that chooses one of them.

A *codebook* is sixteen fp32 values. Quantising scales a block of weights into [-1, 1] and replaces each
weight by the index (the *code*) of one of the sixteen; dequantising looks the value up again. Nothing else in
refq4 knows what NF4 or FP4 is: a codebook is data, and every backend takes any codebook.

Each format here is computed from its definition, so that a reader can see the definition. The tests compare the
results with the published tables, to the last bit.

    name    sixteen values                                   picked by
    ------  -----------------------------------------------  ------------------------------------------
    nf4     quantiles of the normal distribution             nearest value
    fp4     1 sign, 2 exponent, 1 mantissa bit (inverted)    bitsandbytes' CUDA pivots, sign from x < 0
    e2m1    OCP MX FP4: 0 .5 1 1.5 2 3 4 6, over 6           nearest, ties to the smaller magnitude
    int4    -7 ... 7, over 7                                 nearest value
    af4     Yoshida's AbnormalFloat for blocks of 64         nearest value
    iq4nl   the non-linear table of llama.cpp's IQ4_NL       nearest value

The rule is the same for all of them, so that a kernel needs one loop and no format names:

    values sorted       v0      v1      v2   ...      v14     v15
    thresholds              t0      t1       ...          t14
    rank = how many thresholds lie below x (x > t);   code = order[rank]

A NaN is not greater than any threshold, so its rank is 0. A rule that needs ``x >= t``
writes the fp32 number just below t.

The 8-bit *dynamic map* is the same idea with 256 values; double quantisation stores the blocks' scales with it. It has
a file of its own, ``refq4/internals/dynamic_map.py``, and is imported from here.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from .internals.dynamic_map import create_dynamic_map
from .internals.rounding import fp32, midpoints, next_below

__all__ = [
    "Code",
    "Codebook",
    "codebook_names",
    "create_dynamic_map",
    "create_fp4_map",
    "create_normal_map",
    "get_codebook",
    "register_codebook",
]


class Code(NamedTuple):
    """A codebook as the tensors a backend computes with, all on one device.

    ``values`` fp32 [C], indexed by code; ``thresholds`` fp32 [C-1], ascending; ``order`` uint8 [C], rank to code.
    C is 16 for a 4-bit weight and 256 (or fewer) for the 8-bit stage.

    Example:
        >>> code = get_codebook("nf4").on("cpu")
        >>> code.values.shape, code.thresholds.shape, code.zero_code()
        (torch.Size([16]), torch.Size([15]), 7)
    """

    values: Tensor
    thresholds: Tensor
    order: Tensor

    def zero_code(self) -> int:
        """The code of 0.0, which an all-zero block and the padding nibble store."""
        rank = int((self.thresholds < 0).sum())
        return int(self.order[rank])


@dataclass(frozen=True)
class Codebook:
    """Sixteen values and the thresholds between them.

    Args:
        name: a short lower-case identifier; it becomes part of the state-dict key
            (``quant_state.bitsandbytes__<name>``).
        values: 16 finite numbers, in code order: ``values[c]`` is what code ``c`` decodes to. Rounded to fp32.
        thresholds: 15 ascending numbers between the sorted values; by default their midpoints, so that the nearest
            value wins and a tie goes to the lower one.
        description: one line for ``info`` and the docs.

    Raises:
        ValueError: the name is not an identifier, or values or thresholds are not as described above.

    Example:
        >>> from refq4.codebooks import Codebook
        >>> signs = Codebook("signs", [-1.0] * 8 + [1.0] * 8)
        >>> signs.encode([-0.3, 0.3])
        [0, 15]
    """

    name: str
    values: tuple[float, ...]
    thresholds: tuple[float, ...] = ()
    description: str = field(default="", compare=False)

    def __init__(
        self, name: str, values: Iterable[float], thresholds: Iterable[float] | None = None, description: str = ""
    ) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"a codebook's name is lower-case letters, digits and '_', got {name!r}")
        values = tuple(fp32(v) for v in values)
        if len(values) != 16 or not all(map(math.isfinite, values)):
            raise ValueError(f"codebook {name!r} needs 16 finite fp32 values, got {len(values)}: {values}")
        thresholds = midpoints(sorted(values)) if thresholds is None else tuple(fp32(t) for t in thresholds)
        if len(thresholds) != 15 or not all(a <= b for a, b in pairwise(thresholds)):
            raise ValueError(f"codebook {name!r} needs 15 ascending thresholds, got {thresholds}")
        # frozen: there is no other assignment
        self.__dict__.update(name=name, values=values, thresholds=thresholds, description=description)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Rank to code: ``order[r]`` is the code of the r-th smallest value.

        Equal values keep the higher code first: that is the negative zero of the sign-magnitude formats.
        """
        return tuple(sorted(range(16), key=lambda code: (self.values[code], -code)))

    def encode(self, scaled: Iterable[float]) -> list[int]:
        """Return the codes of numbers that are scaled into [-1, 1]: the rule, one number at a time."""
        return [self.order[sum(fp32(x) > t for t in self.thresholds)] for x in scaled]

    def on(self, device: torch.device | str) -> Code:
        """Return the codebook as tensors on ``device`` (they are cached: do not change them)."""
        return _code_on(self, torch.device(device))


@lru_cache(maxsize=256)
def _code_on(book: Codebook, device: torch.device) -> Code:
    with torch.inference_mode(False):
        return Code(
            torch.tensor(book.values, dtype=torch.float32, device=device),
            torch.tensor(book.thresholds, dtype=torch.float32, device=device),
            torch.tensor(book.order, dtype=torch.uint8, device=device),
        )


def code_from_values(values: Tensor) -> Code:
    """The rule "the nearest value wins, a tie goes to the lower one" for the 8-bit stage.

    Args:
        values: fp32 [C] with 2 <= C <= 256, finite, in any order.
    """
    ascending, order = values.detach().cpu().sort(stable=True)
    middles = (ascending[:-1].double() + ascending[1:].double()) / 2
    nearest = middles.float()
    # Rounded *down* to fp32: for fp32 x, x > threshold then says exactly whether x is nearer the upper value.
    thresholds = torch.where(nearest > middles, nearest.nextafter(nearest.new_tensor(-math.inf)), nearest)
    return Code(values, thresholds.to(values.device), order.to(values.device, torch.uint8))


# --- the formats ----------------------------------------------------------------------------------------------------


def create_normal_map(offset: float = 0.9677083) -> Tensor:
    """NF4: sixteen quantiles of the normal distribution, rescaled so that the largest is 1.

    Weights of a trained layer are close to normal. Values at equally spaced *probabilities* are then used about
    equally often, which is what "information-theoretically optimal" means in the QLoRA paper (section 3).
    One value must be exactly 0 (padding and pruned weights), so the two halves are spaced separately: eight steps
    from ``offset`` down to 1/2 on the positive side, seven on the negative one.

        probability   1-offset ......... 1/2 ............. offset
        value            -1  (7 values)   0   (8 values)      1

    ``offset`` is the mean of 1 - 1/32 and 1 - 1/30: half a step in from either end, since the normal distribution's
    own ends are infinite. Mirrors ``create_normal_map`` of bitsandbytes; the probabilities are spaced in fp32 as
    they are there, which the published digits show.

    Returns:
        fp32 [16], ascending.

    Example:
        >>> create_normal_map()[6:10]
        tensor([-0.0911,  0.0000,  0.0796,  0.1609])
    """
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in torch.linspace(offset, 0.5, 9).tolist()[:-1]]
    negative = [-quantile(p) for p in torch.linspace(offset, 0.5, 8).tolist()[:-1]]
    values = torch.tensor(sorted([*negative, 0.0, *positive]), dtype=torch.float32)
    return values / values.max()


def create_fp4_map() -> list[float]:
    """bitsandbytes' FP4: a sign bit, two exponent bits, one mantissa bit, in its own order, over 12.

        bit     3      2 1        0
              [sign][exponent][mantissa]      exponent e = 1, 2, 3:  2**(4 - e) * (1 + m / 2)
                                              exponent e = 0:        m / 16

    So a *larger* exponent field is a *smaller* number (e = 1 holds 8 and 12, e = 3 holds 2 and 3), and e = 0 is the
    zero with one subnormal, 0.0625, far below the rest. Mirrors ``get_4bit_type("fp4")`` of bitsandbytes, in which
    the negative zero (code 8) is stored as 0.0.

    Returns:
        16 fp32 numbers in code order.

    Example:
        >>> [round(12 * v, 4) for v in create_fp4_map()[:8]]
        [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
    """
    magnitudes = [(m / 16 if e == 0 else 2.0 ** (4 - e) * (1 + m / 2)) for e in range(4) for m in range(2)]
    return [fp32(v / 12) for v in magnitudes] + [fp32(0.0 - v / 12) for v in magnitudes]


# FP4's pivots between neighbouring magnitudes, as bitsandbytes' CUDA quantiser spells them (kQuantize in csrc):
# decimals cut short, so not quite the midpoints 1/384, 11/128, 5/24, 7/24, 5/12, 7/12, 5/6. The digits are the
# definition: a checkpoint's bytes depend on them.
FP4_PIVOTS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)


def sign_magnitude_thresholds(pivots: Sequence[float]) -> list[float]:
    """Thresholds for "sign from x < 0; the magnitude goes up where \\|x\\| > pivot".

    On the negative side "up in magnitude" is "down in value", so a tie must stay with the *higher* value there:
    ``x >= -pivot``, written as ``x > nextbelow(-pivot)``. The zero gets the same treatment: ``x >= 0`` is +0.

    Example:
        >>> sign_magnitude_thresholds([0.5])[2]
        0.5
    """
    up = [fp32(p) for p in pivots]
    down = [next_below(-p) for p in reversed(up)]
    return [*down, next_below(0.0), *up]


# Yoshida, "NF4 isn't information theoretically optimal (and that's good)", 2023: derived for a small expected absolute
# error of blocks of 64 normal weights (where NF4's, measured in notebook 2, is a little smaller still). There is no
# closed form: the published digits are the definition.
_AF4_POSITIVE = (1.0, 0.72424863, 0.55496234, 0.42563882, 0.31675666, 0.21961274, 0.12934483, 0.04273164, 0.0)
_AF4_NEGATIVE = (-0.04934812, -0.14982478, -0.25607552, -0.3736951, -0.51243739, -0.69441008, -1.0)
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


_SIGNED_E2M1 = [v / 6 for v in _E2M1] + [0.0 - v / 6 for v in _E2M1]
_E2M1_PIVOTS = [(a + b) / 12 for a, b in pairwise(_E2M1)]


# --- the shelf ------------------------------------------------------------------------------------------------------

_BOOKS = {
    book.name: book
    for book in (
        Codebook("nf4", create_normal_map().tolist(), description="quantiles of the normal distribution (QLoRA)"),
        Codebook(
            "fp4",
            create_fp4_map(),
            sign_magnitude_thresholds(FP4_PIVOTS),
            "bitsandbytes' 4-bit float: sign, 2 exponent bits, 1 mantissa bit",
        ),
        Codebook("e2m1", _SIGNED_E2M1, sign_magnitude_thresholds(_E2M1_PIVOTS), "OCP microscaling FP4 (E2M1)"),
        Codebook("int4", [i / 7 for i in (*range(7, -1, -1), *range(0, -8, -1))], description="integers -7 ... 7"),
        Codebook("af4", _AF4_POSITIVE + _AF4_NEGATIVE, description="AbnormalFloat for blocks of 64 (Yoshida 2023)"),
        Codebook("iq4nl", [v / 127 for v in _IQ4_NL], description="the non-linear table of llama.cpp's IQ4_NL"),
    )
}


def register_codebook(book: Codebook, *, replace: bool = False) -> Codebook:
    """Register a codebook, so that ``quant_type=book.name`` works in every function and layer.

    Raises:
        ValueError: the name is taken by other values and ``replace`` is not set.

    Example:
        >>> from refq4.codebooks import Codebook, register_codebook
        >>> book = register_codebook(Codebook("ramp", [(2 * i - 15) / 15 for i in range(16)]))
        >>> "ramp" in codebook_names()
        True
    """
    known = _BOOKS.get(book.name)
    if known is not None and known != book and not replace:
        raise ValueError(f"codebook {book.name!r} is registered with other values; pass replace=True to replace it")
    _BOOKS[book.name] = book
    return book


def get_codebook(name: str) -> Codebook:
    """Return the codebook of that name.

    Raises:
        ValueError: there is no such codebook; the message lists the nearest names.

    Example:
        >>> get_codebook("nf4").values[7]
        0.0
    """
    try:
        return _BOOKS[name]
    except (KeyError, TypeError):
        near = difflib.get_close_matches(str(name), _BOOKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown quant_type {name!r}{hint} Known: {', '.join(sorted(_BOOKS))}") from None


def codebook_names() -> list[str]:
    """Return the names of all registered codebooks, sorted.

    Example:
        >>> {"fp4", "nf4"} <= set(codebook_names())
        True
    """
    return sorted(_BOOKS)
