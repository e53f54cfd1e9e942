"""refq4 against bitsandbytes 0.50.2 on the CPU: the same bytes, the same scales, the same numbers.

Where the two differ on purpose, the interval is enumerated here (FP4) or the entry is in ``docs/differences.md``,
whose tests are in ``test_differences.py``. The weights are whole rows of whole blocks throughout: the peer's AVX-512
dequantiser is wrong for blocks that straddle rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from torch import Tensor

import refq4
import refq4.functional as F
from refq4 import codebooks, layout, nn
from refq4.state import BLOCKSIZES
from refq4.testing import assert_same_bits, assert_within_budget

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STORAGE = {"uint8": torch.uint8} | DTYPES

dtypes = pytest.mark.parametrize("dtype", [pytest.param(d, id=f"{name} weights") for name, d in DTYPES.items()])
blocksizes = pytest.mark.parametrize("blocksize", [pytest.param(b, id=f"blocksize {b}") for b in BLOCKSIZES])
quant_types = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
nestings = pytest.mark.parametrize("nested", [pytest.param(False, id="plain"), pytest.param(True, id="nested")])
storages = pytest.mark.parametrize("storage", [pytest.param(d, id=f"stored as {name}") for name, d in STORAGE.items()])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Where tests run side by side, threads that wait for each other's cores make these four times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def ten_million(dtype: torch.dtype) -> Tensor:
    """10,002,432 values, [2442, 4096]: normal, uniform, heavy-tailed and tiny rows, each a quarter."""
    draw = torch.Generator().manual_seed(20240)
    x = torch.randn(2442, 4096, generator=draw)
    x[611:1221] = torch.rand(610, 4096, generator=draw) * 2 - 1
    x[1221:1832] = x[1221:1832] ** 5
    x[1832:] *= torch.logspace(-4, 4, 610).unsqueeze(1)
    return x.to(dtype)


def peer_dequantize(bnb, packed: Tensor, state) -> Tensor:
    """The peer's dequantize_4bit, kept from compiling its fallback (blocksize 2048 and up) on each new shape."""
    with torch.compiler.set_stance("force_eager"):
        return bnb.functional.dequantize_4bit(packed, state)


def peer_keeps_minus_zero(bnb) -> bool:
    """Whether this machine's build of the peer decodes FP4's code 8 to -0: its loop without AVX-512 does."""
    packed, state = bnb.functional.quantize_4bit(torch.ones(64), quant_type="fp4")
    return bool(peer_dequantize(bnb, torch.full_like(packed, 0x88), state).signbit().all())


def assert_decodes_alike(bnb, mine: Tensor, theirs: Tensor, quant_type: str) -> None:
    """The same bits, but for the sign of FP4's second zero where the peer's build keeps it."""
    if quant_type == "fp4" and peer_keeps_minus_zero(bnb):
        assert not bool((mine.signbit() & (mine == 0)).any()), "refq4 decodes FP4's code 8 to 0, not to -0"
        theirs = theirs + 0.0  # -0 becomes 0, everything else stays
    assert_same_bits(mine, theirs, "decoded")


def ours(peer_state, packed: Tensor | None = None) -> F.QuantState:
    """The peer's quant state, through its state-dict form, as refq4's."""
    return F.QuantState.from_dict(peer_state.as_dict(packed=True), packed=packed)


# --- scales that were searched --------------------------------------------------------------------------------------


@quant_types
@nestings
def test_it_decodes_a_weight_whose_scales_were_searched_to_the_same_values(bnb, quant_type, nested):
    weight = ten_million(torch.float32)[::40].contiguous()
    layer = nn.Linear4bit(
        *weight.shape[::-1], False, quant_type=quant_type, compress_statistics=nested, scales="search"
    )
    layer.weight.data.copy_(weight)
    saved = layer.to("cpu").state_dict()
    packed = saved.pop("weight")
    theirs = bnb.nn.Params4bit.from_prequantized(
        packed, {key.removeprefix("weight."): value for key, value in saved.items()}, device="cpu"
    )
    decoded = F.dequantize_4bit(packed, layer.quant_state)
    assert_decodes_alike(bnb, decoded, peer_dequantize(bnb, packed, theirs.quant_state), quant_type)
    plain = F.dequantize_4bit(*F.quantize_4bit(weight, quant_type=quant_type, compress_statistics=nested))
    assert (decoded - weight).norm() < 0.97 * (plain - weight).norm()


# --- names ----------------------------------------------------------------------------------------------------------


def public(bnb) -> dict[str, tuple]:
    """What both have: refq4's and the peer's, by name."""
    found = {"matmul_4bit": (refq4.matmul_4bit, bnb.matmul_4bit)}
    for mine, theirs in ((F, bnb.functional), (nn, bnb.nn)):
        found |= {name: (getattr(mine, name), getattr(theirs, name)) for name in mine.__all__ if hasattr(theirs, name)}
    for owner, methods in {"QuantState": ("as_dict", "from_dict", "to"), "Params4bit": ("from_prequantized",)}.items():
        for method in methods:
            found[f"{owner}.{method}"] = tuple(getattr(cls, method) for cls in found[owner])
    return found


def test_functions_and_layers_take_the_peers_arguments_in_its_order_with_its_defaults(bnb):
    own_default = {"QuantState.from_dict device", "Params4bit.from_prequantized device"}  # differences.md
    without = {"create_normal_map use_extra_value"}  # differences.md
    compared = 0
    for name, both in public(bnb).items():
        mine, theirs = (
            [p for p in inspect.signature(f).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD] for f in both
        )
        theirs = [p for p in theirs if f"{name} {p.name}" not in without]
        assert [p.name for p in mine] == [p.name for p in theirs], name
        for a, b in zip(mine, theirs, strict=True):
            assert (a.default == b.default) != (f"{name} {a.name}" in own_default), f"{name}({a.name}=)"
            compared += 1
    assert compared > 100


# --- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nf4", "fp4", "af4"])
def test_code_table_equals_the_peers_to_the_last_bit(bnb, name):
    assert_same_bits(F.get_4bit_type(name), bnb.functional.get_4bit_type(name, device="cpu"), name)


@pytest.mark.parametrize("signed", [pytest.param(True, id="signed"), pytest.param(False, id="unsigned")])
@pytest.mark.parametrize("total_bits", range(2, 9))
def test_dynamic_map_equals_the_peers_for_every_number_of_exponent_bits(bnb, signed, total_bits):
    compared = 0
    for exponent_bits in range(1, total_bits):
        try:
            theirs = bnb.functional.create_dynamic_map(signed, exponent_bits, total_bits)
        except AssertionError:  # the peer can't build it: its own count of values does not add up
            continue
        assert_same_bits(codebooks.create_dynamic_map(signed, exponent_bits, total_bits), theirs)
        compared += 1
    assert compared > 0


@pytest.mark.parametrize("offset", [0.9677083, 0.95, 0.99])
def test_normal_map_equals_the_peers_made_with_scipy(bnb, offset):
    pytest.importorskip("scipy", reason="the peer's create_normal_map needs scipy: pip install scipy")
    padded = bnb.functional.create_normal_map(offset)  # 256 entries: 241 of them are the zero, again and again
    assert_same_bits(codebooks.create_normal_map(offset), padded.unique())


# Each dtype and each blocksize, and with ``-m slow`` each pair of them: both sides widen to fp32 before they scale.
dtypes_and_blocksizes = pytest.mark.parametrize(
    ("dtype", "blocksize"),
    [
        pytest.param(
            dtype,
            blocksize,
            id=f"{name} weights, blocksize {blocksize}",
            marks=[] if name == "float32" or blocksize == 64 else pytest.mark.slow,
        )
        for name, dtype in DTYPES.items()
        for blocksize in BLOCKSIZES
    ],
)


# --- ten million values ---------------------------------------------------------------------------------------------


@dtypes_and_blocksizes
def test_nf4_bytes_scales_and_decoded_values_equal_the_peers_on_ten_million_values(bnb, dtype, blocksize):
    x = ten_million(dtype)
    theirs, their_state = bnb.functional.quantize_4bit(x, blocksize=blocksize, quant_type="nf4")
    packed, state = F.quantize_4bit(x, blocksize=blocksize, quant_type="nf4")
    assert_same_bits(packed, theirs, "packed")
    assert_same_bits(state.absmax, their_state.absmax, "absmax")
    assert_same_bits(F.dequantize_4bit(packed, state), peer_dequantize(bnb, theirs, their_state), "decoded")


@dtypes_and_blocksizes
def test_fp4_equals_the_peers_on_ten_million_values_outside_the_listed_intervals(bnb, dtype, blocksize):
    x = ten_million(dtype)
    theirs, their_state = bnb.functional.quantize_4bit(x, blocksize=blocksize, quant_type="fp4")
    packed, state = F.quantize_4bit(x, blocksize=blocksize, quant_type="fp4")
    assert_same_bits(state.absmax, their_state.absmax, "absmax")
    # the same bytes decode to the same numbers
    assert_decodes_alike(bnb, F.dequantize_4bit(theirs, state), peer_dequantize(bnb, theirs, their_state), "fp4")

    # codes differ exactly where the scaled value lies in an interval of the table below, in the way it says
    scaled = (x.float().view(-1, blocksize) * (1.0 / state.absmax).unsqueeze(1)).clamp_(-1, 1).view(-1)
    listed = in_an_interval(scaled).nonzero().view(-1)
    at, mine, peer = differing_codes(packed.view(-1), theirs.view(-1))
    assert_same_bits(at, listed, "where the codes differ")
    for where in FP4_INTERVALS:
        inside = where.contains(scaled[at])
        assert set(mine[inside].tolist()) <= {where.refq4}, where
        assert set(peer[inside].tolist()) <= {where.peer}, where


def differing_codes(packed: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The elements whose codes differ, and the codes of each side there; only bytes that differ are unpacked."""
    byte = (packed != theirs).nonzero().view(-1)
    mine, peer = layout.unpack(packed[byte], 2 * byte.numel()), layout.unpack(theirs[byte], 2 * byte.numel())
    differs = mine != peer
    return torch.stack([2 * byte, 2 * byte + 1], dim=1).view(-1)[differs], mine[differs], peer[differs]


# --- the FP4 intervals ----------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """Scaled values, both ends included, whose FP4 code differs: what refq4 (and CUDA) says, and the peer's CPU."""

    name: str
    low: float
    high: float
    refq4: int
    peer: int

    def contains(self, scaled: Tensor) -> Tensor:
        return (scaled >= self.low) & (scaled <= self.high)


TINIEST = 2.0**-149

# Ends are fp32 numbers, so each row can be counted. Where low is high, one single number differs.
FP4_INTERVALS = (
    Interval("positive, below the first pivot: both decode to 0", TINIEST, 0.0026041667442768812, 0, 8),
    Interval("from the peer's 1/384 to pivot .00260417", 0.002604166977107525, 0.0026041700039058924, 0, 1),
    Interval("just above pivot .20833333", 0.2083333432674408, 0.2083333432674408, 7, 6),
    Interval("just above pivot .29166667", 0.2916666865348816, 0.2916666865348816, 4, 7),
    Interval("from pivot .583333 to the peer's 7/12", 0.5833330750465393, 0.5833333730697632, 2, 5),
    Interval("just above pivot .8333333", 0.8333333730697632, 0.8333333730697632, 3, 2),
    Interval("negative, above the first midpoint: both decode to 0", -0.0026041665114462376, -TINIEST, 8, 0),
    Interval("from the peer's -1/384 to pivot -.00260417", -0.0026041700039058924, -0.0026041667442768812, 8, 9),
    Interval("a tie at pivot -.0859375", -0.0859375, -0.0859375, 9, 14),
    Interval("a tie at pivot -.4166667", -0.4166666865348816, -0.4166666865348816, 12, 13),
    Interval("from pivot -.583333 to the peer's -7/12", -0.5833333134651184, -0.5833330750465393, 10, 13),
)


def in_an_interval(scaled: Tensor) -> Tensor:
    """Whether each number lies in an interval: then it has passed one more lower than upper end."""
    lows, highs = (torch.tensor([interval[i] for interval in FP4_INTERVALS]) for i in (1, 2))
    past = torch.cat([lows, torch.nextafter(highs, torch.tensor(2.0))]).sort().values
    return torch.bucketize(scaled, past, out_int32=True, right=True).bitwise_and_(1).bool()


def fp4_codes(quantize, values: Tensor) -> Tensor:
    """The codes of values that are scaled already: each shares its block with a 1.0."""
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % 31)).view(-1, 31)
    packed, state = quantize(torch.nn.functional.pad(blocks, (1, 0), value=1.0), blocksize=32, quant_type="fp4")
    assert torch.equal(state.absmax, torch.ones(blocks.shape[0]))
    return layout.unpack(packed.view(-1), packed.numel() * 2).view(-1, 32)[:, 1:].reshape(-1)[: values.numel()]


def neighbours(centre: float, count: int) -> Tensor:
    """The fp32 numbers up to ``count`` steps from ``centre`` (not 0), in order of magnitude."""
    middle = torch.tensor(centre).view(torch.int32)
    return torch.arange(int(middle) - count, int(middle) + count + 1, dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize("where", [pytest.param(i, id=i.name) for i in FP4_INTERVALS])
def test_fp4_differs_from_the_peer_on_the_whole_interval(bnb, where):
    steps = abs(int(torch.tensor(where.low).view(torch.int32)) - int(torch.tensor(where.high).view(torch.int32)))
    inside = neighbours(where.low, steps) if steps < 100 else torch.linspace(where.low, where.high, 100_000)
    inside = torch.cat([inside[where.contains(inside)], torch.tensor([where.low, where.high])])
    assert set(fp4_codes(F.quantize_4bit, inside).tolist()) == {where.refq4}
    assert set(fp4_codes(bnb.functional.quantize_4bit, inside).tolist()) == {where.peer}


@pytest.mark.parametrize("sign", [pytest.param(1.0, id="positive"), pytest.param(-1.0, id="negative")])
@pytest.mark.parametrize("pivot", codebooks.FP4_PIVOTS)
def test_fp4_differs_from_the_peer_nowhere_else_around_a_pivot(bnb, pivot, sign):
    values = neighbours(sign * pivot, 1000)
    mine, peer = fp4_codes(F.quantize_4bit, values), fp4_codes(bnb.functional.quantize_4bit, values)
    assert_same_bits(mine != peer, in_an_interval(values), f"around {sign * pivot}")
    assert mine[0] != mine[-1]


def test_fp4_differs_from_the_peer_nowhere_else_between_minus_one_and_one(bnb):
    bits = torch.arange(0, 0x3F800000, 509, dtype=torch.int32)  # every 509th of the 1,065,353,216 numbers in [0, 1)
    values = torch.cat([bits.view(torch.float32), -bits.view(torch.float32), torch.tensor([1.0, -1.0, 0.0, -0.0])])
    differs = fp4_codes(F.quantize_4bit, values) != fp4_codes(bnb.functional.quantize_4bit, values)
    assert_same_bits(differs, in_an_interval(values), "in [-1, 1]")


def test_fp4_intervals_follow_from_the_two_rules():
    """Ours: magnitude up on |x| > pivot. The peer's: value up on x > midpoint, the midpoint of fp32 values in fp32."""
    magnitudes = torch.tensor(codebooks.create_fp4_map()).abs().unique()
    midpoints = (magnitudes[:-1] + magnitudes[1:]) / 2
    wanted = set()
    for pivot, midpoint in zip(torch.tensor(codebooks.FP4_PIVOTS), midpoints, strict=True):
        near = torch.cat([neighbours(float(pivot), 50), neighbours(float(midpoint), 50)]).unique()
        up = near > pivot
        wanted |= {float(x) for x in near[up != (near > midpoint)]}
        wanted |= {-float(x) for x in near[up != (near >= midpoint)]}
    listed = set()
    for where in FP4_INTERVALS:
        if where.refq4 not in (0, 8) or where.peer in (1, 9):  # all but the tiny numbers, which both decode to 0
            around = neighbours(where.low, 50)
            listed |= {float(x) for x in around[where.contains(around)]}
    assert listed == wanted


# --- double quantisation --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ordinary() -> Tensor:
    return torch.randn(512, 4096, generator=torch.Generator().manual_seed(7)) * 0.02


@dtypes_and_blocksizes
@quant_types
def test_nested_offset_equals_and_bytes_are_nearer_than_the_peers(bnb, ordinary, quant_type, blocksize, dtype):
    x = ordinary.to(dtype)
    make = {"blocksize": blocksize, "quant_type": quant_type, "compress_statistics": True}
    _, theirs = bnb.functional.quantize_4bit(x, **make)
    _, mine = F.quantize_4bit(x, **make)
    assert_same_bits(mine.offset, theirs.offset, "offset")
    assert_same_bits(mine.state2.absmax, theirs.state2.absmax, "nested absmax")
    assert_same_bits(mine.state2.code, theirs.state2.code, "nested code")
    assert mine.state2.blocksize == theirs.state2.blocksize == 256
    steps = (mine.absmax.int() - theirs.absmax.int()).abs()
    assert int(steps.max()) <= 3, "the peer's table of 65,536 bins is at most 3 entries off"

    _, plain = F.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
    inverse = (1.0 / mine.state2.absmax).repeat_interleave(256)[: plain.absmax.numel()]
    scaled = ((plain.absmax - mine.offset) * inverse).clamp(-1, 1).double()
    code = mine.state2.code.double()
    distance = (scaled - code[mine.absmax.int()]).abs()
    nearest = (scaled.unsqueeze(1) - code).abs().amin(1) if scaled.numel() <= 32768 else _nearest(scaled, code)
    assert_same_bits(distance, nearest, "distance to the entry refq4 chose, to the nearest one")
    assert bool((distance <= (scaled - code[theirs.absmax.int()]).abs()).all())


def _nearest(scaled: Tensor, code: Tensor) -> Tensor:
    return torch.cat([(part.unsqueeze(1) - code).abs().amin(1) for part in scaled.split(32768)])


# --- decoding -------------------------------------------------------------------------------------------------------


@quant_types
@nestings
@blocksizes
@pytest.mark.parametrize("target", [pytest.param(d, id=f"into {name}") for name, d in DTYPES.items()])
def test_the_peers_tensor_decodes_to_the_peers_bits(bnb, ordinary, quant_type, nested, blocksize, target):
    packed, theirs = bnb.functional.quantize_4bit(
        ordinary[:128], blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
    )
    theirs.dtype = target
    mine = F.dequantize_4bit(packed, ours(theirs, packed))
    assert_decodes_alike(bnb, mine, peer_dequantize(bnb, packed, theirs), quant_type)


@dtypes
@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_8bit_codes_of_the_peer_decode_to_the_peers_bits(bnb, ordinary, dtype, blocksize):
    x = ordinary[:16].to(dtype)
    theirs, their_state = bnb.functional.quantize_blockwise(x, blocksize=blocksize)
    mine, state = F.quantize_blockwise(x, blocksize=blocksize)
    assert_same_bits(state.absmax, their_state.absmax, "absmax")
    assert int((mine.int() - theirs.int()).abs().max()) <= 3
    assert_same_bits(F.dequantize_blockwise(theirs, state), bnb.functional.dequantize_blockwise(theirs, their_state))


# --- state dicts ----------------------------------------------------------------------------------------------------


@quant_types
@nestings
@dtypes
@pytest.mark.parametrize("shape", [(2, 64), (64, 96), (3, 5, 64), (128,)], ids=str)
def test_state_dict_form_equals_the_peers_key_for_key_and_the_json_byte_for_byte(bnb, quant_type, nested, dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    make = {"quant_type": quant_type, "compress_statistics": nested}
    _, theirs = bnb.functional.quantize_4bit(x, **make)
    _, mine = F.quantize_4bit(x, **make)
    theirs, mine = theirs.as_dict(packed=True), mine.as_dict(packed=True)
    assert list(mine) == list(theirs)
    for key in mine:
        if key != "absmax" or not nested:  # nested bytes: see above
            assert_same_bits(mine[key], theirs[key], key)


N, K = 96, 192


@pytest.fixture(scope="module")
def full_precision() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(11)
    return {"weight": torch.randn(N, K, generator=draw) * 0.05, "bias": torch.randn(N, generator=draw)}


def peer_layer(bnb, settings: dict) -> torch.nn.Module:
    """In training mode: in eval mode the peer's first forward rewrites weight and scales."""
    return bnb.nn.Linear4bit(K, N, **settings).train()


def through_a_file(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return safetensors.torch.load(safetensors.torch.save({k: v.contiguous() for k, v in state_dict.items()}))


def assert_same_state_dict(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert sorted(got) == sorted(wanted)
    for key in wanted:
        assert_same_bits(got[key], wanted[key], key)


def assert_both_within_budget(peer: torch.nn.Module, layer: nn.Linear4bit, dtype: torch.dtype) -> None:
    """One token and several, on the training path of the peer and the inference path of refq4."""
    draw = torch.Generator().manual_seed(12)
    for shape in ((1, K), (5, K), (2, 3, K)):
        x = torch.randn(shape, generator=draw).to(dtype)
        operands = x, layer.weight.data, layer.weight.quant_state, layer.bias.detach()
        assert_within_budget(layer.eval()(x).detach(), *operands, what=f"refq4 on {list(shape)}")
        assert_within_budget(peer(x).detach(), *operands, what=f"bitsandbytes on {list(shape)}")


exchange = pytest.mark.parametrize("dtype", [pytest.param(d, id=f"computing in {name}") for name, d in DTYPES.items()])


@quant_types
@nestings
@storages
@exchange
def test_a_layer_saved_by_the_peer_loads_saves_and_computes_the_same(
    bnb, full_precision, quant_type, nested, storage, dtype
):
    settings = {"quant_type": quant_type, "compress_statistics": nested, "quant_storage": storage}
    peer = peer_layer(bnb, settings | {"compute_dtype": dtype})
    peer.load_state_dict(full_precision)
    peer = peer.to("cpu")
    saved = through_a_file(peer.state_dict())

    layer = nn.Linear4bit(K, N, **settings, compute_dtype=dtype)
    layer.load_state_dict(saved, strict=True)
    assert_same_state_dict(layer.state_dict(), saved)
    assert_both_within_budget(peer, layer, dtype)
    assert_same_state_dict(layer.state_dict(), saved)


@quant_types
@nestings
@storages
@exchange
def test_a_layer_saved_by_refq4_loads_saves_and_computes_the_same_in_the_peer(
    bnb, full_precision, quant_type, nested, storage, dtype
):
    settings = {"quant_type": quant_type, "compress_statistics": nested, "quant_storage": storage}
    layer = nn.Linear4bit(K, N, **settings, compute_dtype=dtype)
    layer.load_state_dict(full_precision)
    layer = layer.to("cpu")
    saved = through_a_file(layer.state_dict())

    peer = peer_layer(bnb, settings | {"compute_dtype": dtype})
    stats = {key: value for key, value in saved.items() if key.startswith("weight.")}
    peer.weight = bnb.nn.Params4bit.from_prequantized(saved["weight"], dict(stats), device="cpu", module=peer)
    peer.bias.data = saved["bias"].clone()
    assert_same_state_dict(peer.state_dict(), saved)
    assert_both_within_budget(peer, layer, dtype)
