"""One test for each entry of ``docs/differences.md``, named after it: what refq4 does, beside what bitsandbytes does.

The peer is 0.50.2 on the CPU. What it does on a processor with AVX-512 BF16 is asserted on every machine
(``peer_path.py``); what its AVX-512 dequantiser does, where there is AVX-512. refq4's side is asserted everywhere.
"""

from __future__ import annotations

import ast
import copy
import json
import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peer_path import packed_path
from test_bitsandbytes import FP4_INTERVALS, fp4_codes, peer_dequantize, peer_keeps_minus_zero
from torch import Tensor

import refq4
import refq4.functional as F
from refq4 import layout, nn
from refq4.codebooks import Codebook, codebook_names, create_dynamic_map, get_codebook, register_codebook
from refq4.testing import assert_same_bits, assert_within_budget

PAGE = Path(__file__).parents[2] / "docs" / "differences.md"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_layer(
    linear: type, n: int = 8, k: int = 64, dtype: torch.dtype = torch.float32, **settings
) -> torch.nn.Module:
    layer = linear(k, n, **({"quant_type": "nf4"} | settings))
    layer.load_state_dict({"weight": randn(n, k, seed=1), "bias": randn(n, seed=2)})
    layer.weight.data = layer.weight.data.to(dtype)
    return layer.to("cpu")


def make_both(bnb, **settings) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The peer's layer, in training mode, and refq4's, of the same weight and bias."""
    return make_layer(bnb.nn.Linear4bit, **settings).train(), make_layer(nn.Linear4bit, **settings)


def codes(packed: Tensor, numel: int) -> list[int]:
    return layout.unpack(layout.from_storage(packed, numel), numel).tolist()


# --- the page and the tests -----------------------------------------------------------------------------------------


def entries() -> list[tuple[str, list[str]]]:
    """(heading, tests it names) for each entry of the page."""
    parts = re.split(r"^### (.+)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return [
        (h, re.findall(r"^Test: `(\w+)`$", body, re.MULTILINE)) for h, body in zip(parts[::2], parts[1::2], strict=True)
    ]


def test_page_and_tests_list_the_same_differences():
    tree = ast.parse(Path(__file__).read_text())
    tests = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    about_the_page = {"test_page_and_tests_list_the_same_differences", "test_page_entries_are_named_like_their_tests"}
    assert [name for _, names in entries() for name in names] == [t for t in tests if t not in about_the_page]


def test_page_entries_are_named_like_their_tests():
    for heading, names in entries():
        assert names == ["test_" + "_".join(re.findall(r"[a-z0-9]+", heading.lower()))], heading


# --- quantising -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quant_type", "zero"), [("nf4", 7), ("fp4", 0)])
@pytest.mark.parametrize("tiny", [pytest.param(0.0, id="zeros"), pytest.param(1e-40, id="1 over absmax overflows")])
def test_zero_blocks_store_the_code_of_zero(bnb, quant_type, zero, tiny):
    x = randn(8, 64)
    x[3] = tiny
    make = {"quant_type": quant_type, "compress_statistics": True}
    packed, state = F.quantize_4bit(x, **make)
    assert codes(packed, 512)[192:256] == [zero] * 64
    assert F.dequantize_4bit(packed, state)[3].tolist() == [0.0] * 64
    if tiny == 0 or quant_type == "nf4":  # FP4 calls +tiny code 8: see the next entry
        theirs, _ = bnb.functional.quantize_4bit(x, **make)
        assert_same_bits(packed[96:128], theirs[96:128], "the block in 0.50.2")


def test_fp4_follows_the_cuda_rule_on_every_device(bnb):
    rows = re.findall(r"^\| (-?[\d.]+\S*) \| (\S+) \| (\d+) \| (\d+) \|$", PAGE.read_text(), re.MULTILINE)
    listed = [(float(low), float(high), int(mine), int(peers)) for low, high, mine, peers in rows]
    assert listed == [(i.low, i.high, i.refq4, i.peer) for i in FP4_INTERVALS]
    ends = torch.tensor([row[:2] for row in listed])
    for end in (ends[:, 0], ends[:, 1]):
        assert fp4_codes(F.quantize_4bit, end).tolist() == [row[2] for row in listed]
        assert fp4_codes(bnb.functional.quantize_4bit, end).tolist() == [row[3] for row in listed]


def test_a_short_last_block_multiplies_by_the_reciprocal(bnb):
    absmax, x = 1.300011396408081, 0.15633319318294525
    short = torch.tensor([absmax, x])
    whole = torch.nn.functional.pad(short, (0, 62))
    multiplied, divided = float(short[1] * (1 / short[0])), float(short[1] / short[0])
    assert get_codebook("nf4").encode([multiplied]) != get_codebook("nf4").encode([divided])

    def second_code(quantize, tensor: Tensor) -> list[int]:
        return codes(quantize(tensor, quant_type="nf4")[0], 2)[1:]

    assert second_code(F.quantize_4bit, short) == second_code(F.quantize_4bit, whole)
    assert second_code(F.quantize_4bit, short) == get_codebook("nf4").encode([multiplied])
    assert second_code(bnb.functional.quantize_4bit, whole) == get_codebook("nf4").encode([multiplied])
    assert second_code(bnb.functional.quantize_4bit, short) == get_codebook("nf4").encode([divided])


def test_nested_scales_take_the_nearest_entry(bnb):
    x = randn(1024, 1024)
    _, mine = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    _, theirs = bnb.functional.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    _, plain = F.quantize_4bit(x, quant_type="nf4")
    scaled = ((plain.absmax - mine.offset).view(-1, 256) * (1 / mine.state2.absmax).unsqueeze(1)).clamp(-1, 1)
    distance = (scaled.double().view(-1, 1) - mine.state2.code.double()).abs()
    mine_off, theirs_off = (distance.gather(1, s.absmax.long().view(-1, 1)).view(-1) for s in (mine, theirs))
    assert_same_bits(mine_off, distance.amin(1), "refq4's distance, the smallest one")
    assert bool((theirs_off > mine_off).any()), "the peer's table is as near everywhere"


def test_the_dynamic_map_is_never_written_to(bnb):
    code = create_dynamic_map()
    _, state = F.quantize_blockwise(randn(512), code=code, blocksize=256)
    assert_same_bits(code, create_dynamic_map(), "the map given")
    assert_same_bits(state.code, create_dynamic_map(), "the map in the state")

    packed, state = F.quantize_4bit(randn(64, 64), quant_type="nf4", compress_statistics=True)
    saved = state.as_dict(packed=True)
    saved["nested_quant_map"][0] = -1.0  # as 0.49.1 saves it; a golden file holds a real one
    loaded = F.QuantState.from_dict(saved, packed=packed)
    assert loaded.state2.code[0] == -1.0
    theirs = bnb.functional.QuantState.from_dict(dict(saved), "cpu")
    assert_same_bits(F.dequantize_4bit(packed, loaded), bnb.functional.dequantize_4bit(packed, theirs))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_any_number_of_elements_fits_any_storage_dtype(bnb, storage):
    for numel in range(1, 20):
        x = randn(numel)
        packed, state = F.quantize_4bit(x, quant_type="nf4", quant_storage=storage)
        plain, plain_state = F.quantize_4bit(x, quant_type="nf4")
        assert packed.dtype == storage
        assert_same_bits(F.dequantize_4bit(packed, state), F.dequantize_4bit(plain, plain_state))
        if -(-numel // 2) % storage.itemsize:
            with pytest.raises(RuntimeError, match="to view Byte as"):
                bnb.functional.quantize_4bit(x, quant_type="nf4", quant_storage=storage)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_infinity_are_refused_unless_allowed(bnb, bad, nested):
    x = randn(4, 64)
    x[1, 3] = bad
    make = {"quant_type": "nf4", "compress_statistics": nested}
    with pytest.raises(ValueError, match="the first is block 1 "):
        F.quantize_4bit(x, **make)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mine = F.dequantize_4bit(*F.quantize_4bit(x, **make, allow_nonfinite=True))
    assert len(caught) == nested
    assert torch.equal(mine.isnan().any(1), torch.tensor([nested, True, nested, nested]))
    theirs = bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(x, **make))
    assert torch.equal(theirs.isnan().any(1), mine.isnan().any(1))


def test_scales_below_1e_38_are_used_as_they_are(bnb):
    x = torch.tensor([4e-39] + [2e-39] * 63)
    (mine, _), (theirs, _) = (
        quantize(x, quant_type="nf4") for quantize in (F.quantize_4bit, bnb.functional.quantize_4bit)
    )
    assert codes(mine, 64)[:2] == get_codebook("nf4").encode([1.0, 0.5])
    assert codes(theirs, 64)[:2] == get_codebook("nf4").encode([0.4, 0.2])
    short = torch.zeros(10)
    assert F.quantize_4bit(short, quant_type="nf4")[1].absmax.tolist() == [0.0]
    assert_same_bits(bnb.functional.quantize_4bit(short, quant_type="nf4")[1].absmax, torch.tensor([1e-38]))


def test_a_nan_spoils_the_scale_of_its_block_in_the_8_bit_stage_too(bnb):
    x = randn(128)
    x[3] = float("nan")
    _, mine = F.quantize_blockwise(x, blocksize=64)
    _, theirs = bnb.functional.quantize_blockwise(x, blocksize=64)
    assert mine.absmax.isnan().tolist() == [True, False]
    assert_same_bits(theirs.absmax[0], x[:64].nan_to_num().abs().max(), "the peer's scale")


def test_an_empty_tensor_has_an_offset_of_zero(bnb):
    _, state = F.quantize_4bit(torch.empty(0, 64), compress_statistics=True)
    assert state.offset == 0
    assert F.QuantState.from_dict(state.as_dict(packed=True)) == state
    _, theirs = bnb.functional.quantize_4bit(torch.empty(0, 64), compress_statistics=True)
    assert theirs.offset.isnan()


def test_every_codebook_can_be_quantised_to(bnb):
    register_codebook(Codebook("differences_ramp", [i / 15 for i in range(-15, 16, 2)]))
    for name in codebook_names():
        x = torch.tensor((*get_codebook(name).values, -1.0, 1.0))  # the last two make the scale 1
        assert F.dequantize_4bit(*F.quantize_4bit(x, quant_type=name)).tolist()[:16] == x.tolist()[:16], name
    with pytest.raises(RuntimeError, match="can't be cast"):
        bnb.functional.get_4bit_type("int4", device="cpu")
    with pytest.raises(ValueError, match="must be 'nf4' or 'fp4'"):
        bnb.functional.quantize_4bit(randn(64), quant_type="af4")


def test_the_normal_map_has_sixteen_entries(bnb):
    mine = F.create_normal_map()
    assert_same_bits(mine, F.get_4bit_type("nf4"))
    pytest.importorskip("scipy", reason="the peer's create_normal_map needs scipy: pip install scipy")
    padded = bnb.functional.create_normal_map()
    assert padded.shape == (256,)
    assert_same_bits(padded.unique(), mine)


def test_the_blocksize_of_the_8_bit_stage_is_one_of_the_eight(bnb):
    with pytest.raises(ValueError, match=r"must be one of \[32, 64, 128, 256, 512, 1024, 2048, 4096\], got 100"):
        F.quantize_blockwise(randn(300), blocksize=100)
    assert bnb.functional.quantize_blockwise(randn(300), blocksize=100)[1].absmax.shape == (3,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32], ids=str)
def test_a_wrong_dtype_is_a_typeerror(bnb, dtype):
    with pytest.raises(TypeError, match="must be a tensor of float32, float16, bfloat16"):
        F.quantize_4bit(torch.ones(64, dtype=dtype))
    with pytest.raises(ValueError, match="only supports 16/32-bit floats"):
        bnb.functional.quantize_4bit(torch.ones(64, dtype=dtype))


# --- dequantising ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [48, 80, 90, 96, 100, 112])
def test_blocks_that_straddle_rows_decode_correctly(bnb, k):
    x = randn(6, k)
    packed, state = F.quantize_4bit(x, quant_type="nf4")
    scales = state.absmax.repeat_interleave(64)[: x.numel()]
    by_hand = (state.code[torch.tensor(codes(packed, x.numel()))] * scales).view(6, k)
    assert_same_bits(F.dequantize_4bit(packed, state), by_hand)
    if torch.backends.cpu.get_cpu_capability() == "AVX512" and k % 16 == 0:
        _, theirs = bnb.functional.quantize_4bit(x, quant_type="nf4")
        assert not torch.equal(bnb.functional.dequantize_4bit(packed, theirs), by_hand)


@pytest.mark.parametrize("blocksize", [64, 2048, 4096])
def test_fp4_decodes_to_exact_twelfths_at_every_blocksize(bnb, blocksize):
    twelfths = [0, 1 / 16, 8, 12, 4, 6, 2, 3]
    wanted = torch.tensor([sign * v / 12 for sign in (1, -1) for v in twelfths]).repeat(256).view(4, 1024) + 0.0
    packed, state = F.quantize_4bit(wanted, quant_type="fp4", blocksize=blocksize)
    assert_same_bits(F.dequantize_4bit(packed, state), wanted)
    theirs, their_state = bnb.functional.quantize_4bit(wanted, quant_type="fp4", blocksize=blocksize)
    assert_same_bits(peer_dequantize(bnb, theirs, their_state), wanted)


def test_fp4_has_one_zero(bnb):
    packed, state = F.quantize_4bit(torch.ones(2, 64), quant_type="fp4")
    decoded = F.dequantize_4bit(torch.full_like(packed, 0x88), state)
    assert_same_bits(decoded, torch.zeros(2, 64))
    _, their_state = bnb.functional.quantize_4bit(torch.ones(2, 64), quant_type="fp4")
    theirs = peer_dequantize(bnb, torch.full_like(packed, 0x88), their_state)
    assert_same_bits(theirs, torch.full((2, 64), -0.0 if peer_keeps_minus_zero(bnb) else 0.0))


def test_decoded_numbers_below_1e_38_are_not_zero_in_bf16(bnb):
    x = torch.linspace(-1e-37, 1e-37, 256)
    packed, state = F.quantize_4bit(x, quant_type="nf4")
    exact = F.dequantize_4bit(packed, state).to(torch.bfloat16)
    small = (exact.abs() < torch.finfo(torch.bfloat16).tiny) & (exact != 0)
    assert bool(small.any())
    state.dtype = torch.bfloat16
    assert_same_bits(F.dequantize_4bit(packed, state), exact)
    _, their_state = bnb.functional.quantize_4bit(x.bfloat16(), quant_type="nf4")
    their_state.absmax = state.absmax
    theirs = peer_dequantize(bnb, packed, their_state).view(-1)
    flushed = exact.masked_fill(small, 0) if torch.cpu._is_avx512_bf16_supported() else exact
    assert torch.equal(theirs, flushed)


def test_one_dimensional_tensors_keep_their_shape(bnb):
    assert F.dequantize_4bit(*F.quantize_4bit(randn(128))).shape == (128,)
    assert bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(randn(128))).shape == (1, 128)


def test_a_single_packed_byte_is_not_taken_for_a_row(bnb):
    assert F.dequantize_4bit(*F.quantize_4bit(randn(1, 2))).shape == (1, 2)
    assert bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(randn(1, 2))).shape == (2, 1)
    packed, state = F.quantize_4bit(randn(4, 64))
    assert F.dequantize_4bit(packed.t(), state).shape == (64, 4)


def test_nested_blocks_of_other_sizes_multiply(bnb):
    packed, state = F.quantize_4bit(randn(64, 64), quant_type="nf4")
    q, state2 = F.quantize_blockwise(state.absmax - 2.0, blocksize=32)
    state.absmax, state.offset, state.state2 = q, torch.tensor(2.0), state2
    saved = state.as_dict(packed=True)
    x = randn(3, 64)
    with pytest.raises(
        ValueError, match=r"nested_blocksize: expected one of \[256\]; allow_other_nested_blocksize=True"
    ):
        F.QuantState.from_dict(saved, packed=packed)
    loaded = F.QuantState.from_dict(saved, packed=packed, allow_other_nested_blocksize=True)
    assert_within_budget(refq4.matmul_4bit(x, packed, loaded), x, packed, loaded)
    theirs = bnb.functional.QuantState.from_dict(dict(saved), "cpu")
    with pytest.raises(NotImplementedError, match="blocksize != 256"):
        bnb.matmul_4bit(x, packed, theirs)


# --- the quant state ------------------------------------------------------------------------------------------------


def test_the_callers_dict_is_only_read(bnb):
    _, state = F.quantize_4bit(randn(64), quant_type="nf4", compress_statistics=True)
    given = state.as_dict(packed=True)
    before = dict(given)
    F.QuantState.from_dict(given)
    assert given.keys() == before.keys()
    assert all(given[key] is before[key] for key in before)
    bnb.functional.QuantState.from_dict(given, "cpu")
    assert given.keys() != before.keys()


@pytest.mark.parametrize(
    ("key", "spoil"),
    [
        pytest.param("absmax", lambda t: t[:3], id="too few scales"),
        pytest.param("absmax", lambda t: t.half(), id="scales of another dtype"),
        pytest.param("absmax", lambda t: -t, id="negative scales"),
        pytest.param("quant_state.bitsandbytes__nf4", lambda t: with_shape(t, [80, 64]), id="another shape"),
        pytest.param(
            "quant_state.bitsandbytes__nf4",
            lambda t: with_shape(t, [8, 60]),
            id="a shape of as many blocks, fewer bytes",
        ),
    ],
)
def test_a_state_that_contradicts_itself_is_refused(bnb, key, spoil):
    packed, state = F.quantize_4bit(randn(8, 64), quant_type="nf4")
    saved = state.as_dict(packed=True)
    F.QuantState.from_dict(saved, packed=packed)
    saved[key] = spoil(saved[key])
    with pytest.raises(ValueError, match=r"absmax: |shape"):
        F.QuantState.from_dict(saved, packed=packed)
    bnb.functional.QuantState.from_dict(saved, "cpu")


def with_shape(packed_json: Tensor, shape: list[int]) -> Tensor:
    fields = json.loads(bytes(packed_json.tolist())) | {"shape": shape}
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def test_the_code_in_a_file_is_used_or_refused(bnb):
    packed, state = F.quantize_4bit(randn(8, 64), quant_type="nf4")
    saved = state.as_dict(packed=True)
    saved["quant_map"] = saved["quant_map"] * 2
    with pytest.raises(ValueError, match=r"quant_map: entry 0 is -2\.0, the published table has -1\.0"):
        F.QuantState.from_dict(saved, packed=packed)
    doubled = F.QuantState.from_dict(saved, packed=packed, allow_other_code=True)
    assert_same_bits(F.dequantize_4bit(packed, doubled), 2 * F.dequantize_4bit(packed, state))
    theirs = bnb.functional.QuantState.from_dict(dict(saved), "cpu")
    assert_same_bits(bnb.functional.dequantize_4bit(packed, theirs), F.dequantize_4bit(packed, state))


def test_equality_is_exact_and_never_raises(bnb):
    def states(quantize) -> tuple:
        _, plain = quantize(randn(64, 64), quant_type="nf4")
        _, nested = quantize(randn(64, 64), quant_type="nf4", compress_statistics=True)
        nearly = copy.deepcopy(plain)
        nearly.absmax = plain.absmax * (1 + 2**-23)
        return plain, nested, nearly

    plain, nested, nearly = states(F.quantize_4bit)
    assert plain == copy.deepcopy(plain)
    assert nested == copy.deepcopy(nested)
    for other in (nested, nearly, None, 3, "nf4", torch.ones(2)):
        assert plain != other
    plain, nested, nearly = states(bnb.functional.quantize_4bit)
    assert plain == nearly
    with pytest.raises(RuntimeError, match="did not match"):
        plain == nested  # noqa: B015  (the comparison itself raises)


def test_moving_a_state_returns_it(bnb):
    _, state = F.quantize_4bit(randn(64))
    assert state.to("cpu") is state
    assert bnb.functional.quantize_4bit(randn(64))[1].to("cpu") is None


def test_default_devices_are_where_the_data_is(bnb):
    assert F.get_4bit_type("nf4").device.type == "cpu"
    saved = make_layer(nn.Linear4bit).state_dict()
    stats = {key: value for key, value in saved.items() if key.startswith("weight.")}
    assert nn.Params4bit.from_prequantized(saved["weight"], stats).device.type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError), match=r"(?i)cuda|nvidia"):
            bnb.functional.get_4bit_type("nf4")
        with pytest.raises((AssertionError, RuntimeError), match=r"(?i)cuda|nvidia"):
            bnb.nn.Params4bit.from_prequantized(saved["weight"], dict(stats))


# --- the layer ------------------------------------------------------------------------------------------------------


@packed_path
def test_computing_in_fp32_stays_in_fp32(bnb, peer_path):
    settings = {"n": 32, "dtype": torch.bfloat16, "compute_dtype": torch.float32, "compress_statistics": False}
    peer, layer = make_both(bnb, **settings)
    state = layer.weight.quant_state
    assert state.dtype == torch.bfloat16
    in_fp32 = state.copy()
    in_fp32.dtype = torch.float32
    weight, coarse = F.dequantize_4bit(layer.weight.data, in_fp32), F.dequantize_4bit(layer.weight.data, state).float()
    x, grad_y = randn(5, 64), randn(5, 32, seed=3)
    exact, off = grad_y.double() @ weight.double(), grad_y.double() @ coarse.double()
    grads = {}
    for name, module in {"refq4": layer, "peer": peer}.items():
        a = x.clone().requires_grad_()
        module(a).backward(grad_y)
        grads[name] = a.grad.double()
    allowed = 1e-6 * (grad_y.abs() @ weight.abs())
    assert bool(((grads["refq4"] - exact).abs() <= allowed).all())
    assert bool(((grads["peer"] - off).abs() <= allowed).all())
    assert bool(((off - exact).abs() > 10 * allowed).any())

    operands = x, layer.weight.data, state, layer.bias.detach()
    for mode in (True, False):
        assert_within_budget(layer.train(mode)(x).detach(), *operands)
    with pytest.raises(AssertionError, match="elements are off"):
        assert_within_budget(peer.eval()(x).detach(), *operands)


@packed_path
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_inference_leaves_the_weight_and_the_state_dict_alone(bnb, peer_path, nested):
    peer, layer = make_both(bnb, n=32, compress_statistics=nested)

    def changed(module: torch.nn.Module) -> set[str]:
        before = {key: value.clone() for key, value in module.state_dict().items()}
        weight = module.weight.data.clone()
        module.eval()(randn(1, 64))
        kept = module.weight.shape == weight.shape and torch.equal(module.weight, weight)
        after = module.state_dict()
        assert after.keys() == before.keys()
        differs = {k for k in before if after[k].dtype != before[k].dtype or not torch.equal(after[k], before[k])}
        return differs if kept else differs | {"the live weight"}

    assert changed(layer) == set()
    assert changed(peer) >= {"the live weight", "weight.absmax"}


@packed_path
@pytest.mark.parametrize(("n", "k"), [(33, 64), (32, 96), (32, 65), (1, 1)])
def test_inference_takes_any_shape(bnb, peer_path, n, k):
    layer = make_layer(nn.Linear4bit, n=n, k=k).eval()
    x = randn(2, k)
    assert_within_budget(layer(x).detach(), x, layer.weight.data, layer.weight.quant_state, layer.bias.detach())
    peer = make_layer(bnb.nn.Linear4bit, n=n, k=k).eval()
    with pytest.raises((AssertionError, RuntimeError), match=r"must be|is invalid"):
        peer(x)


def test_a_forward_does_not_change_the_dtype_in_the_state():
    layer = make_layer(nn.Linear4bit)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    for dtype in (torch.bfloat16, torch.float16):
        for training in (True, False):
            layer.train(training)(torch.ones(2, 64, dtype=dtype))
    assert layer.weight.quant_state.dtype == torch.float32
    for key, value in layer.state_dict().items():
        assert_same_bits(value, before[key], key)


def test_the_bias_is_never_rewritten(bnb):
    peer, layer = make_both(bnb, compute_dtype=torch.bfloat16)
    assert_same_bits(layer.bias.detach(), peer.bias.detach())
    bias = layer.bias.detach().clone()
    for module in (peer, layer):
        module(torch.ones(2, 64, dtype=torch.bfloat16))
        module(torch.ones(2, 64))
    assert_same_bits(layer.bias.detach(), bias, "refq4's bias")
    assert_same_bits(peer.bias.detach().float(), bias.bfloat16().float(), "the peer's bias")


def test_the_bias_takes_the_dtype_of_the_input(bnb):
    peer, layer = make_both(bnb, compute_dtype=torch.float32)
    bias, x = layer.bias.detach().clone(), (randn(200, 64) / 16).bfloat16()
    weight = F.dequantize_4bit(layer.weight, layer.weight.quant_state).double()
    exact, rounded = ((x.double() @ weight.t() + b.double()).bfloat16() for b in (bias, bias.bfloat16()))
    assert 0.2 < float((exact != rounded).float().mean()) < 0.8, "the two rules give different results"
    for module, wanted in ((peer, exact), (layer, rounded)):
        assert float((module(x).detach() == wanted).float().mean()) > 0.99
    assert_same_bits(peer.bias.detach(), bias, "the peer's bias, which had the compute dtype already")
    peer, _ = make_both(bnb, compute_dtype=torch.bfloat16)
    peer(x.float())
    assert peer.bias.dtype == torch.bfloat16, "the compute dtype, not the input's"


@pytest.mark.parametrize("leading", [(), (2,), (2, 3), (2, 1, 3)], ids=lambda s: f"input {[*s, 64]}")
def test_the_gradient_of_the_bias_sums_over_all_leading_dimensions(bnb, leading):
    peer, layer = make_both(bnb)
    x, grad_y = randn(*leading, 64).requires_grad_(), randn(*leading, 8, seed=3)
    layer.train()(x).backward(grad_y)
    exact = grad_y.double().reshape(-1, 8).sum(0)
    assert bool(((layer.bias.grad.double() - exact).abs() <= 1e-6 * grad_y.abs().reshape(-1, 8).sum(0)).all())
    y = peer(x)
    if leading:
        y.backward(grad_y)
        torch.testing.assert_close(peer.bias.grad, layer.bias.grad)
    else:
        with pytest.raises(RuntimeError, match="invalid gradient"):
            y.backward(grad_y)


def test_functional_transforms_work(bnb):
    peer, layer = make_both(bnb)
    x, state = randn(3, 2, 64), layer.weight.quant_state
    with torch.no_grad():
        each = torch.func.vmap(lambda a: refq4.autograd.MatMul4Bit.apply(a, layer.weight.data, None, None, state))(x)
    assert_within_budget(each, x, layer.weight.data, state)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.vmap(lambda a: bnb.matmul_4bit(a, peer.weight, peer.weight.quant_state, bias=peer.bias))(x)


def test_weights_quantised_as_k_by_n_are_deprecated(bnb):
    K, N = 64, 96
    packed, state = F.quantize_4bit(randn(K, N), quant_type="nf4")
    _, theirs = bnb.functional.quantize_4bit(randn(K, N), quant_type="nf4")
    with pytest.warns(DeprecationWarning, match=r"Quantise it as \[N, K\]"):
        y = refq4.matmul_4bit(randn(3, K), packed, state)
    torch.testing.assert_close(y, randn(3, K) @ F.dequantize_4bit(packed, state))
    with pytest.warns(DeprecationWarning, match="quantized from a"):
        bnb.matmul_4bit(randn(3, K), packed, theirs)


def test_square_weights_are_n_by_k_however_b_is_turned(bnb):
    packed, state = F.quantize_4bit(randn(64, 64), quant_type="nf4")
    _, theirs = bnb.functional.quantize_4bit(randn(64, 64), quant_type="nf4")
    x = randn(3, 64)
    for B in (packed, packed.t()):
        assert_within_budget(refq4.matmul_4bit(x, B, state), x, packed, state)
        assert_within_budget(bnb.matmul_4bit(x, B, theirs), x, packed, state)


def test_warnings_come_once_per_layer_and_leave_the_filters_alone(bnb, caplog):
    peer, layer = make_both(bnb)
    another = make_layer(nn.Linear4bit)
    x = torch.ones(1, 64, dtype=torch.float16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        for module in (layer, layer, another, another):
            module(x)
        assert warnings.filters == filters
    assert [w.category for w in caught] == [UserWarning] * 2
    assert all(w.filename == __file__ for w in caught), "a warning points at the caller's line"
    with caplog.at_level(logging.WARNING):
        peer(x)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_fp16_input_warns_also_where_fp32_was_set_by_hand(bnb, caplog):
    peer, layer = make_both(bnb, compute_dtype=torch.float32)
    x = torch.ones(2, 64, dtype=torch.float16)
    with pytest.warns(UserWarning, match="computes in float32: inference and training will be slow"):
        layer(x)
    with caplog.at_level(logging.WARNING):
        peer(x)
    assert caplog.records == []


def test_a_layer_that_was_not_quantised_says_so(bnb, caplog):
    with pytest.raises(RuntimeError, match=r"LinearNF4 has not been quantised: call \.to\(device\)"):
        nn.LinearNF4(64, 8)(randn(1, 64))
    with caplog.at_level(logging.WARNING), pytest.raises(AssertionError):
        bnb.nn.LinearNF4(64, 8)(randn(1, 64))
    assert "FP4 quantization state" in caplog.text


def test_a_compiled_forward_does_not_remember_the_first_input(bnb):
    peer, layer = make_both(bnb)
    for module in (peer, layer):
        with torch.no_grad():
            torch.compile(module, backend="eager")(randn(2, 64))
    assert layer.compute_dtype is None
    assert peer.compute_dtype == torch.float32
    layer(randn(2, 64))
    assert layer.compute_dtype == torch.float32


def test_no_grad_counts_when_the_path_is_chosen():
    _, state = F.quantize_4bit(randn(8, 64), quant_type="nf4")
    x = randn(1, 64).requires_grad_()
    assert F.choose_path(x, state).choice == "MatMul4Bit"
    with torch.no_grad():
        assert F.choose_path(x, state).choice == "gemv_4bit"


def test_a_single_token_warns_of_straddling_blocks_on_every_device(bnb):
    packed, state = F.quantize_4bit(randn(8, 100), quant_type="nf4")
    x = randn(1, 100)
    with pytest.warns(UserWarning, match="100 is not a multiple of the blocksize 64"):
        y = refq4.matmul_4bit(x, packed, state)
    assert_within_budget(y, x, packed, state)
    _, theirs = bnb.functional.quantize_4bit(randn(8, 100), quant_type="nf4")
    bnb.matmul_4bit(x, packed, theirs)  # warnings are errors here


def test_fp64_activations_take_the_exact_path(bnb):
    peer, layer = make_both(bnb)
    x = randn(2, 64).double()
    exact = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    y = layer(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, x @ exact.t() + layer.bias.double(), rtol=1e-14, atol=1e-14)
    with nan_in_new_memory():
        assert_same_bits(layer(x), y, "with NaN in new memory")
        assert peer(x).isnan().all()


@contextmanager
def nan_in_new_memory() -> Iterator[None]:
    """torch.empty gives NaN: torch does so in its deterministic mode."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_out_is_filled_or_refused():
    packed, state = F.quantize_4bit(randn(8, 64), quant_type="nf4")
    for x in (randn(1, 64), randn(3, 64)):
        out = torch.full((x.shape[0], 8), float("nan"))
        assert refq4.matmul_4bit(x, packed, state, out=out) is out
        assert_within_budget(out, x, packed, state)
        with pytest.raises(ValueError, match="out= can't be combined with a wanted gradient"):
            refq4.matmul_4bit(x.requires_grad_(), packed, state, out=out)


def test_gemv_4bit_takes_the_stored_layout_on_a_cpu():
    packed, state = F.quantize_4bit(randn(8, 64), quant_type="nf4")
    x = randn(1, 64)
    assert_within_budget(F.gemv_4bit(x, packed, state=state), x, packed, state)


@packed_path
def test_long_products_in_fp32_are_closer_to_the_exact_one_than_torch_is(bnb, peer_path):
    """By the measure of the peer's test_gemv_4bit, on its "fc2" of dim 1024; ``pytest -s`` shows the page's table."""
    torch.manual_seed(0)
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for i in range(10):
        x, W = torch.randn(1, 4096), torch.randn(1024, 4096) / 32
        settings = {"quant_type": ("nf4", "fp4")[i % 2], "compress_statistics": i % 4 > 1}
        packed, state = F.quantize_4bit(W, **settings)
        decoded = F.dequantize_4bit(packed, state)
        peer = bnb.nn.Linear4bit(4096, 1024, bias=False, compute_dtype=torch.float32, **settings)
        peer.load_state_dict({"weight": W})
        exact, linear = x.double() @ decoded.double().t(), torch.nn.functional.linear(x, decoded)
        with torch.no_grad():
            products = {"torch's linear": linear, "exact, rounded once": exact.float()}
            products["refq4 cpu"] = F.gemv_4bit(x, packed.t(), state=state, backend="cpu")
            products["bitsandbytes, packed"] = peer.to("cpu").eval()(x)
        for name, y in products.items():
            found[name].append(tuple(float((y - to).abs().mean()) / 32 for to in (exact, linear.double())))
    mean = {name: [sum(column) / 10 for column in zip(*pairs, strict=True)] for name, pairs in found.items()}
    print(f"\n{'':24}from the exact product   from torch's linear")
    for name, (from_exact, from_linear) in mean.items():
        print(f"{name:24}{from_exact:22.2e} {from_linear:21.2e}")
    assert mean["refq4 cpu"][0] < 0.5 * mean["torch's linear"][0]
    assert mean["exact, rounded once"][1] > 2.4e-8, "the exact product misses the peer's own bound"
    assert mean["bitsandbytes, packed"][0] > 1000 * mean["refq4 cpu"][0]


# --- parameters and state dicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtype_casts_leave_packed_weights_alone(bnb, storage):
    peer, layer = make_both(bnb, quant_storage=storage)
    before = layer.weight.data.clone()
    for cast in (layer.half, layer.bfloat16, layer.float, lambda: layer.to(torch.float16)):
        cast()
        assert_same_bits(layer.weight.data, before, "packed")
    assert layer.bias.dtype == torch.float16
    assert_same_bits(peer.weight.data, before, "the peer's packed weight")
    peer.to(torch.float16 if storage is not torch.float16 else torch.bfloat16)
    destroyed = storage.is_floating_point
    assert (peer.weight.dtype != storage) == destroyed


def test_pieces_have_a_state_of_their_own(bnb):
    peer, layer = make_both(bnb, compress_statistics=False)
    whole = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    for pieces in (torch.chunk(layer.weight, 2), torch.split(layer.weight, 128)):
        assert len(pieces) == 2
        decoded = [F.dequantize_4bit(piece.data, piece.quant_state) for piece in pieces]
        assert_same_bits(torch.cat(decoded), whole)
    uneven = torch.split(layer.weight, 100)[0]
    assert uneven.quant_state is None
    assert all(piece.quant_state is peer.weight.quant_state for piece in torch.chunk(peer.weight, 2))


def test_a_copied_layer_holds_a_weight_of_its_own(bnb):
    peer, layer = make_both(bnb)
    copied = copy.deepcopy(layer)
    assert copied.weight.module is copied
    assert layer.weight.module is layer
    assert layer.weight.to("cpu").module is layer
    assert copy.deepcopy(peer).weight.module is peer
    assert peer.weight.to("cpu").module is None


def test_embeddings_can_be_saved(bnb):
    table, other = (nn.EmbeddingNF4(10, 64).to("cpu") for _ in range(2))
    saved = table.state_dict()
    other.load_state_dict(saved)
    ids = torch.tensor([[0, 9], [3, 3]])
    assert_same_bits(other(ids), table(ids))
    with pytest.raises(NotImplementedError, match="not implemented"):
        bnb.nn.EmbeddingNF4(10, 64).to("cpu").state_dict()


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_quantised_state_dicts_load_with_load_state_dict(bnb, strict):
    peer, layer = make_both(bnb)
    fresh = nn.Linear4bit(64, 8, quant_type="nf4")
    result = fresh.load_state_dict(layer.state_dict(), strict=strict)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert fresh.weight.quant_state == layer.weight.quant_state
    with pytest.raises(RuntimeError, match=r"weight\.absmax|size mismatch"):
        bnb.nn.Linear4bit(64, 8, quant_type="nf4").load_state_dict(peer.state_dict(), strict=strict)


def test_full_precision_weights_load_into_a_quantised_layer(bnb):
    peer, layer = make_both(bnb)
    incoming = {"weight": randn(8, 64, seed=5), "bias": randn(8, seed=6)}
    layer.load_state_dict(incoming)
    packed, state = F.quantize_4bit(incoming["weight"], quant_type="nf4", compress_statistics=True)
    assert_same_bits(layer.weight.data, packed)
    assert layer.weight.quant_state == state
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        peer.load_state_dict(incoming)
