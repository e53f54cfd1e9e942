"""Why bitsandbytes answers otherwise: each difference held to what ``docs/differences.md`` says of it.

A case that differs is explained only if *every* number that differs is what some entry of that page says it is: the
code that its rule for FP4 gives for that scaled value, the entry of the 8-bit map that is nearest to a value in the
same bin, the zero with the other sign. For that the case is asked again, against a judge that is the reference with
bitsandbytes' own answer wherever an entry accounts for it:

    peer's answer == reference's   ->  that
    they differ, all accounted for ->  the peer's, and the entries' names are noted
    anything else                  ->  the reference's: the case differs still, and stays unexplained

Not here: what the entries say to readers, and the tests that show each (``tests/peer/test_differences.py``).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import layout
from ..backend import PackedWeight, PreparedWeight
from ..codebooks import Code
from ..reference import ReferenceBackend, nested_absmax
from ..registry import register_backend
from .cases import Case
from .conformance import check
from .isolation import isolated_registry
from .peer import BitsandbytesBackend, type_of

__all__ = ["ENTRIES", "explain"]

ZERO_BLOCKS = "Zero blocks store the code of zero"
TINY_BLOCKS = "Scales below 1e-38 are used as they are"
FP4_RULE = "FP4 follows the CUDA rule on every device"
SHORT_BLOCK = "A short last block multiplies by the reciprocal"
NEAREST = "Nested scales take the nearest entry"
NOT_FINITE = "NaN and infinity are refused unless allowed"
NOT_FINITE_8_BIT = "A NaN spoils the scale of its block in the 8 bit stage too"
STRADDLING = "Blocks that straddle rows decode correctly"
ONE_ZERO = "FP4 has one zero"
SUBNORMAL = "Decoded numbers below 1e-38 are not zero in bf16"
ENTRIES = (
    ZERO_BLOCKS, TINY_BLOCKS, FP4_RULE, SHORT_BLOCK, NEAREST, NOT_FINITE, NOT_FINITE_8_BIT, STRADDLING, ONE_ZERO,
    SUBNORMAL,
)  # fmt: skip

LEAST = 1e-38  # what bitsandbytes takes for the scale of a block whose scale is smaller
BIN = 2 / 65535  # between the scaled values that its table for the 8-bit stage knows
QUANTISING = ("quantize_4bit", "quantize_blockwise", "state dict")
Claims = Iterator[tuple[str, Tensor]]  # an entry's name, and the elements it accounts for


def explain(case: Case) -> str | None:
    """The names of the entries that account for all that differs in a case, joined by "; ", or None.

    Example:
        >>> explain(Case("quantize_4bit", weights="normal")) is None  # nothing differs, so nothing is accounted for
        True
    """
    judge = _Judge(case.check in QUANTISING)
    with isolated_registry():
        register_backend(judge)
        same = check(case, "bitsandbytes", against=judge.name).status == "same"
    return "; ".join(sorted(judge.noted, key=ENTRIES.index)) if same and judge.noted else None


class _Judge(ReferenceBackend):
    """The reference, with bitsandbytes' answers where they differ as the page says. ``noted``: the entries met."""

    name = "bitsandbytes as docs/differences.md describes it"
    priority = -1

    def __init__(self, quantises: bool) -> None:
        self.quantises = quantises  # whether quantising is what is asked, or only how the operands are made
        self.noted: set[str] = set()
        self.peer = BitsandbytesBackend()

    def quantize_4bit(  # type: ignore[override]  # bitsandbytes takes no absmax
        self, A: Tensor, code: Code, blocksize: int
    ) -> tuple[Tensor, Tensor]:
        mine = super().quantize_4bit(A, code, blocksize)
        if not self.quantises:
            return mine
        theirs, x = self.peer.quantize_4bit(A, code, blocksize), A.reshape(-1).float()
        codes = [layout.unpack(packed, x.numel()) for packed, _ in (mine, theirs)]
        fits = self._fits(codes[0], codes[1], _claims_on_codes(x, mine[1], code, blocksize, codes[1]))
        fits &= self._fits(mine[1], theirs[1], _claims_on_scales(mine[1], theirs[1], x.numel() % blocksize))
        return theirs if fits else mine

    def quantize_blockwise(self, A: Tensor, code: Code, blocksize: int) -> tuple[Tensor, Tensor]:
        mine = super().quantize_blockwise(A, code, blocksize)
        if not self.quantises or code.values.numel() != 256:
            return mine
        theirs, x = self.peer.quantize_blockwise(A, code, blocksize), A.reshape(-1).float()
        nan = _by_block(~x.isfinite(), len(mine[1]), blocksize)
        each = mine[1].repeat_interleave(blocksize)[: x.numel()]
        q, p = (codes.view(-1) for codes, _ in (mine, theirs))
        fits = self._fits(q, p, _claims_on_8_bit_codes(x, each, nan, code, blocksize, q, p))
        fits &= self._fits(mine[1], theirs[1], iter([(NOT_FINITE_8_BIT, nan)]))
        return theirs if fits else mine

    def dequantize_4bit(self, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        mine, theirs = super().dequantize_4bit(weight, dtype), self.peer.dequantize_4bit(weight, dtype)
        theirs = theirs.view(mine.shape)
        return theirs if self._fits(mine, theirs, _claims_on_decoded(weight, mine, theirs)) else mine

    def gemm_4bit(self, x: Tensor, weight: PackedWeight | PreparedWeight, bias: Tensor | None) -> Tensor:
        assert isinstance(weight, PackedWeight)
        return torch.nn.functional.linear(x, self.dequantize_4bit(weight, x.dtype), bias)

    def _fits(self, mine: Tensor, theirs: Tensor, claims: Claims) -> bool:
        """Whether each difference in bits is claimed by an entry; notes the entries that claim one."""
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return False
        differs = _bits(mine) != _bits(theirs)
        differs &= ~(mine.isnan() & theirs.isnan())
        left, met = differs.clone(), set()
        for name, where in claims:
            if bool((left & where).any()):
                met.add(name)
                left &= ~where
        if bool(left.any()):
            return False
        self.noted |= met
        return True


# --- what each entry accounts for -----------------------------------------------------------------------------------


def _claims_on_codes(x: Tensor, absmax: Tensor, code: Code, blocksize: int, theirs: Tensor) -> Claims:
    """Codes 4-bit [numel]. The peer's rule: nearest value, midpoints in fp32, a tie goes to the lower value."""
    values, order = code.values.sort()
    midpoints = (values[:-1] + values[1:]) / 2

    def gives(scaled: Tensor) -> Tensor:
        return order[torch.bucketize(scaled.clamp(-1, 1), midpoints)] == theirs

    scale = absmax.repeat_interleave(blocksize)[: x.numel()]
    in_short = torch.arange(x.numel()) >= x.numel() // blocksize * blocksize
    floor = scale.clamp(min=LEAST)
    yield NOT_FINITE, (x * (1 / scale)).isnan() & (scale != 0) & (theirs == order[-1])
    yield TINY_BLOCKS, (scale < LEAST) & torch.where(in_short, gives(x / floor), gives(x * (1 / floor)))
    fp4 = type_of(code.values) == "fp4"
    yield FP4_RULE, gives(x * (1 / scale)) & fp4
    yield SHORT_BLOCK, in_short & gives(x / scale)


def _claims_on_scales(mine: Tensor, theirs: Tensor, short: int) -> Claims:
    last = torch.zeros_like(mine, dtype=torch.bool)
    last[-1:] = bool(short)
    yield TINY_BLOCKS, last & (mine < LEAST) & (theirs == LEAST)


def _claims_on_8_bit_codes(
    x: Tensor, scale: Tensor, nan: Tensor, code: Code, blocksize: int, mine: Tensor, theirs: Tensor
) -> Claims:
    yield NOT_FINITE_8_BIT, nan.repeat_interleave(blocksize)[: x.numel()]
    yield ZERO_BLOCKS, ~(1 / scale).isfinite()
    scaled = (x * (1 / scale)).clamp(-1, 1).double()
    nearest, other = [(scaled - code.values[q.int()].double()).abs() for q in (mine, theirs)]
    yield NEAREST, (nearest <= other) & (other <= nearest + BIN)


def _claims_on_decoded(weight: PackedWeight, mine: Tensor, theirs: Tensor) -> Claims:
    yield ONE_ZERO, (mine == 0) & (theirs == 0)
    if mine.dtype == torch.bfloat16:
        yield SUBNORMAL, (mine.abs() < torch.finfo(mine.dtype).tiny) & (theirs == 0)
    k = weight.shape[-1]
    if k % 16 == 0 and k % weight.blocksize and torch.backends.cpu.get_cpu_capability() == "AVX512":
        yield STRADDLING, _other_scale(weight, theirs)


def _other_scale(weight: PackedWeight, theirs: Tensor) -> Tensor:
    """Where a decoded value is the right code times the scale of some block of the tensor."""
    codes = layout.unpack(weight.packed, theirs.numel()).view(theirs.shape)
    nested = weight.nested
    scales = weight.absmax if nested is None else nested_absmax(weight.absmax, nested)
    found = torch.zeros(theirs.shape, dtype=torch.bool)
    for c, value in enumerate(weight.code):
        others = (value * scales).to(theirs.dtype)
        found |= (codes == c) & (torch.isin(theirs, others) | (theirs.isnan() & others.isnan().any()))
    return found


def _by_block(flags: Tensor, blocks: int, blocksize: int) -> Tensor:
    """[numel] -> [blocks]: whether any element of a block has the flag."""
    return torch.nn.functional.pad(flags, (0, blocks * blocksize - flags.numel())).view(blocks, blocksize).any(1)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.itemsize])
