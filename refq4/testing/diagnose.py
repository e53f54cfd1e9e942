"""From a wrong result to the likely bug: what would have given exactly these numbers?

A comparison says where two results differ. The person who reads it wants to know why, and most first versions of a
kernel go wrong in one of a dozen ways. Each way is a hypothesis that can be computed: the weight with its nibbles
swapped, with the offset of its scales forgotten, the product without its bias. If the result under test is what such
a hypothesis gives, the message says so. A product must also be much nearer to the hypothesis than to the right result:
in many cases a bug changes nothing, and then it explains nothing. An error just above its budget that no bug explains
is one of rounding, and the message says that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import layout
from ..codebooks import get_codebook
from ..internals.blockwise import decode_scales
from ..state import QuantState
from .budget import Budget
from .cases import Case

MUCH_NEARER, JUST_ABOVE = 4, 2  # times

__all__ = ["diagnose_product", "diagnose_quantised"]


def diagnose_quantised(got: Tensor, wanted: Tensor, W: Tensor, absmax: Tensor, case: Case) -> tuple[str, str]:
    """Two texts about packed bytes that differ: the first weight concerned, and a bug that explains all of them.

    Args:
        got, wanted: uint8 [ceil(numel/2)].
        W: the tensor that was quantised.
        absmax: fp32 [blocks], its scales.
        case: what was asked.
    """
    if got.shape != wanted.shape:
        return "", ""
    numel, book = W.numel(), get_codebook(case.code)
    mine, right = layout.unpack(got, numel), layout.unpack(wanted, numel)
    differ = (mine != right).nonzero().view(-1)
    if not len(differ):
        return "; all codes are right, but the spare low nibble of the last byte must hold the code of 0.0", ""
    i = int(differ[0])
    x, scale = float(W.reshape(-1)[i]), float(absmax[i // case.blocksize])
    inverse = 1.0 / absmax[i // case.blocksize].float()
    scaled = f"x * (1 / absmax) = {float(x * inverse):.9g}"
    if not inverse.isfinite():
        scaled = f"1 / absmax {'is NaN' if inverse.isnan() else 'overflows'}, so the scaled value is 0"
    where = (
        f"\nthe first of {len(differ)} wrong codes is element {i}, in block {i // case.blocksize}: x = {x!r}, "
        f"absmax = {scale!r}, {scaled}; got code {int(mine[i])} "
        f"({book.values[int(mine[i])]:.6g}), expected {int(right[i])} ({book.values[int(right[i])]:.6g})"
    )
    return where, _likely(_wrong_bytes(wanted, W, absmax, case), lambda bytes_: torch.equal(bytes_, got))


def diagnose_product(got: Tensor, budget: Budget, x: Tensor, B: Tensor, state: QuantState, bias: Tensor | None) -> str:
    """The bugs that would give this product, as a line, or "" if no known one does."""
    if got.shape != budget.oracle.shape or not got.numel():
        return ""
    size = float(got.double().abs().nan_to_num().max())
    close = size * (1e-4 if got.dtype == torch.float32 else 4 * torch.finfo(got.dtype).eps)
    error = (got.double() - budget.oracle).abs()
    close = min(close, float(error.max()) / MUCH_NEARER)
    products = _wrong_products(x.double(), B, state, bias)
    bug = _likely(products, lambda product: bool(((got.double() - product).abs() <= close).all()))
    share = float((error / budget.allowed).max())
    if bug or not 1 < share < JUST_ABOVE:
        return bug
    return f"no known bug gives this; at {share:.2f} of what is allowed, look at roundings and at the order of the sum"


def _likely(hypotheses: Iterator[tuple[str, Tensor]], fits: Callable[[Tensor], bool]) -> str:
    bugs = dict.fromkeys(bug for bug, result in hypotheses if fits(result))
    return f"this is what comes out if {', or if '.join(bugs)}" if bugs else ""


def _wrong_bytes(wanted: Tensor, W: Tensor, absmax: Tensor, case: Case) -> Iterator[tuple[str, Tensor]]:
    yield "the first element goes to the low nibble instead of the high one", (wanted << 4) | (wanted >> 4)
    codes = layout.unpack(wanted, W.numel())
    yield "the codes are shifted by one element", layout.pack(codes.roll(1), int(wanted[-1] & 15))
    yield "the codes are shifted by one element", layout.pack(codes.roll(-1), int(wanted[-1] & 15))

    book = get_codebook(case.code).on(W.device)
    x, spare = W.reshape(-1).float(), book.zero_code()
    scales = absmax.float()[torch.arange(len(x), device=x.device) // case.blocksize]
    inverse = 1.0 / scales
    divided = torch.where(scales > 0, x / scales, 0.0)

    def encoded(scaled: Tensor) -> Tensor:
        scaled = torch.where(scaled.isnan(), book.thresholds[0], scaled.clamp(-1.0, 1.0))
        return layout.pack(book.order[torch.bucketize(scaled, book.thresholds, out_int32=True)], spare)

    divides = "x is divided by absmax instead of multiplied by 1 / absmax"
    yield divides, encoded(divided)
    yield divides, encoded(torch.where(inverse.isfinite(), divided, x * 0.0))
    yield "a 1 / absmax that overflows is not replaced by 0", encoded(x * inverse)


def _wrong_products(x: Tensor, B: Tensor, state: QuantState, bias: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    weight = state.packed_weight(B)
    numel = torch.Size(weight.shape).numel()
    codes = layout.unpack(weight.packed, numel).long()
    scales = decode_scales(state, "reference")
    blocks = torch.arange(numel, device=codes.device) // weight.blocksize
    added = 0 if bias is None else bias.double()

    def product(codes: Tensor, scales: Tensor) -> Tensor:
        W = (weight.code[codes].double() * scales.double()[blocks]).view(weight.shape)
        return x @ W.t()

    if bias is not None:
        yield "the bias is not added", product(codes, scales)
        yield "the bias is added twice", product(codes, scales) + 2 * added
    swapped = layout.unpack((weight.packed << 4) | (weight.packed >> 4), numel).long()
    yield "the two nibbles of each byte are swapped", product(swapped, scales) + added
    if state.offset is not None and weight.nested is not None:
        yield "the offset of the nested scales is not added", product(codes, scales - state.offset) + added
        yield "the offset of the nested scales is subtracted", product(codes, scales - 2 * state.offset) + added
        raw = scales.new_ones(len(weight.absmax)) * weight.absmax.float()
        yield "the 8-bit scales are used as they are stored, not decoded", product(codes, raw) + added
    if len(scales) > 1:
        yield "each weight takes the scale of the block before its own", product(codes, scales.roll(1)) + added
        yield "each weight takes the scale of the block after its own", product(codes, scales.roll(-1)) + added
        yield "all weights take the first block's scale", product(codes, scales[:1].expand_as(scales)) + added
        row = max(weight.shape[1] // weight.blocksize, 1)
        per_row = (torch.arange(numel, device=codes.device) // weight.shape[1]) * row
        column = (torch.arange(numel, device=codes.device) % weight.shape[1]) // weight.blocksize
        W = weight.code[codes].double() * scales.double()[(per_row + column).clamp(max=len(scales) - 1)]
        yield "blocks are counted anew in each row, not over the flattened weight", x @ W.view(weight.shape).t() + added
    yield "the scales are not applied", product(codes, torch.ones_like(scales)) + added
    for tail in (8, 16, 32, 64):
        if weight.shape[1] % tail and weight.shape[1] > tail:
            whole = weight.shape[1] // tail * tail
            W = (weight.code[codes].double() * scales.double()[blocks]).view(weight.shape)
            yield f"the last K % {tail} elements of each row are left out", x[:, :whole] @ W[:, :whole].t() + added
