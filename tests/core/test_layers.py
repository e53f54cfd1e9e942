"""Params4bit and the modules that hold it: quantising on a move, copying, splitting, saving, loading."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from loopback import Loopback
from safetensors.torch import load, save
from torch import nn

import refq4
import refq4.functional as F
from refq4.internals.blockwise import slice_state
from refq4.nn import Embedding4bit, EmbeddingFP4, EmbeddingNF4, Linear4bit, LinearFP4, LinearNF4, Params4bit
from refq4.testing import assert_same_bits, assert_within_budget
from refq4.testing.isolation import isolated_registry

A = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))


def layer_of(cls=LinearNF4, n: int = 8, k: int = 64, **settings) -> Linear4bit:
    return cls(k, n, **settings).to("cpu").eval()


@pytest.fixture
def layer() -> LinearNF4:
    torch.manual_seed(1)
    return layer_of(k=128, compress_statistics=True)


def assert_same_layer(got: Linear4bit, wanted: Linear4bit) -> None:
    mine, theirs = got.state_dict(), wanted.state_dict()
    assert list(mine) == list(theirs)
    for key, value in theirs.items():
        assert_same_bits(mine[key], value, key)
    x = torch.randn(3, wanted.in_features)
    assert_same_bits(got(x).detach(), wanted(x).detach())


# --- quantising -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to("cpu"),
        lambda m: m.cpu(),
        lambda m: m.to(torch.device("cpu")),
        lambda m: nn.Sequential(m).to("cpu"),
    ],
    ids=["to('cpu')", "cpu()", "to(device)", "inside a model"],
)
def test_a_move_to_a_device_quantises(move):
    layer = Linear4bit(64, 8, quant_type="nf4", compress_statistics=False)
    weight = layer.weight.detach().clone()
    assert not layer.weight.bnb_quantized
    move(layer)
    packed, state = F.quantize_4bit(weight, quant_type="nf4")
    assert layer.weight.bnb_quantized
    assert_same_bits(layer.weight.detach(), packed)
    assert layer.weight.quant_state == state
    assert layer.quant_state is layer.weight.quant_state


def test_a_second_move_changes_nothing():
    layer = layer_of()
    before = layer.weight
    packed = layer.weight.detach().clone()
    layer.to("cpu").cpu().to("cpu")
    assert layer.weight is before
    assert_same_bits(layer.weight.detach(), packed)


@pytest.mark.parametrize("quant_type", refq4.codebooks.codebook_names())
def test_every_registered_codebook_runs_in_a_layer(quant_type):
    layer = Linear4bit(96, 10, quant_type=quant_type, blocksize=32).to("cpu")
    x = torch.randn(3, 96)
    assert_within_budget(layer(x).detach(), x, layer.weight, layer.quant_state, layer.bias)
    twin = Linear4bit(96, 10, quant_type="fp4")
    twin.load_state_dict(layer.state_dict())
    assert_same_layer(twin, layer)


def test_a_dtype_and_a_device_together_cast_and_then_quantise():
    layer = Linear4bit(64, 8, quant_type="nf4").to("cpu", torch.bfloat16)
    assert layer.quant_state.dtype == torch.bfloat16
    assert layer.bias.dtype == torch.bfloat16


def test_a_dtype_alone_casts_a_weight_that_is_not_quantised_yet():
    layer = Linear4bit(64, 8, quant_type="nf4").to(torch.float16)
    assert (layer.weight.dtype, layer.weight.bnb_quantized, layer.weight.shape) == (torch.float16, False, (8, 64))
    assert isinstance(layer.weight, Params4bit)


@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.float(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.type(torch.float32),
        lambda m: m.type(torch.bfloat16),
        lambda m: m.type("torch.DoubleTensor"),
        lambda m: m.type(torch.FloatTensor),
        lambda m: nn.Sequential(m).type(torch.float16)[0],
    ],
    ids=["half", "bfloat16", "float", "to(bfloat16)", "double", "type(float32)", "type(bfloat16)",
         "type('torch.DoubleTensor')", "type(torch.FloatTensor)", "the model's type(float16)"],
)  # fmt: skip
def test_casting_a_quantised_module_casts_the_bias_and_never_the_packed_bytes(cast, storage):
    layer = layer_of(quant_storage=storage)
    packed, state = layer.weight.detach().clone(), copy.deepcopy(layer.quant_state)
    cast(layer)
    assert_same_bits(layer.weight.detach(), packed)
    assert layer.weight.quant_state == state
    dtype = cast(nn.Linear(1, 1)).bias.dtype
    assert layer.bias.dtype == dtype
    x = torch.randn(3, 64, dtype=dtype)
    if dtype == torch.float16:
        with pytest.warns(UserWarning, match="float16"):
            layer(x)
    assert_within_budget(layer(x).detach(), x, layer.weight, layer.quant_state, layer.bias)


def test_casting_the_parameter_itself_keeps_a_quantised_one():
    weight = layer_of(quant_storage=torch.bfloat16).weight
    for cast in (weight.half, weight.float, weight.bfloat16, weight.double, lambda: weight.type(torch.float32)):
        assert cast() is weight
    assert weight.type() == "torch.BFloat16Tensor"


def test_a_cast_by_type_changes_a_weight_that_is_not_quantised_yet():
    layer = Linear4bit(64, 8, quant_type="nf4").type(torch.float16)
    assert (layer.weight.dtype, layer.weight.bnb_quantized, layer.weight.shape) == (torch.float16, False, (8, 64))
    assert isinstance(layer.weight, Params4bit)


def test_casting_an_embedding_by_type_leaves_its_table_alone():
    table, ids = refq4.nn.EmbeddingNF4(10, 64).to("cpu"), torch.tensor([3, 1])
    wanted = table(ids)
    assert_same_bits(table.type(torch.float16)(ids), wanted)


def test_moving_to_meta_does_not_quantise_and_a_quantised_layer_follows():
    layer = Linear4bit(64, 8).to("meta")
    assert not layer.weight.bnb_quantized
    quantised = layer_of().to("meta")
    assert quantised.weight.is_meta
    assert quantised.quant_state.absmax.is_meta
    assert quantised.weight.quant_state.state2.absmax.is_meta


def test_a_quantised_layer_emptied_from_meta_waits_for_a_state_dict():
    layer = layer_of()
    empty = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="or load a quantised state dict"):
        empty(torch.randn(1, 64))
    empty.load_state_dict(layer.state_dict())
    assert_same_layer(empty, layer)


def test_cuda_without_a_gpu_is_torchs_own_error():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU; the test is about machines without one")
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        LinearNF4(64, 8).cuda()


def test_a_quantised_layer_needs_no_gradient_for_its_weight():
    assert not layer_of().weight.requires_grad


@pytest.mark.parametrize(
    ("cls", "quant_type"),
    [(LinearNF4, "nf4"), (LinearFP4, "fp4"), (Linear4bit, "fp4"), (EmbeddingNF4, "nf4"), (EmbeddingFP4, "fp4")],
)
def test_each_class_has_its_format_and_says_so(cls, quant_type):
    layer = cls(64, 64)
    assert layer.weight.quant_type == quant_type
    assert f"{quant_type}, blocksize=64" in repr(layer)
    assert "not quantised yet" in repr(layer)
    assert "not quantised yet" not in repr(layer.to("cpu"))


def test_a_layer_from_a_linear_leaves_the_linear_alone_and_shares_the_bias():
    linear = nn.Linear(64, 8).eval()
    before = linear.weight.detach().clone()
    layer = Linear4bit.from_linear(linear, quant_type="nf4", blocksize=32)
    assert_same_bits(linear.weight.detach(), before)
    assert layer.bias is linear.bias
    assert (layer.training, layer.weight.blocksize) == (False, 32)
    assert layer.weight.module is layer


@pytest.mark.reference_only("what it checks is the same for every backend")
def test_a_weight_in_full_precision_takes_every_cast():
    weight = Params4bit(A.clone(), quant_type="nf4")
    casts = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32, "double": torch.float64}
    for name, dtype in casts.items():
        cast = getattr(weight, name)()
        assert (cast.dtype, cast.bnb_quantized, cast.quant_state) == (dtype, False, None)


@pytest.mark.reference_only("what it checks is the same for every backend")
def test_what_ops_read_of_a_weight_is_a_plain_tensor(layer):
    assert type(layer.weight.readable()) is torch.Tensor


@pytest.mark.reference_only("what it checks is the same for every backend")
def test_a_weight_of_nothing_is_empty():
    assert Params4bit().numel() == 0


@pytest.mark.reference_only("what it checks is the same for every backend")
def test_a_weight_rebuilt_in_full_precision_is_cast_like_any_other():
    layer = LinearNF4(64, 8)
    layer.weight = nn.Parameter(torch.randn(8, 64))
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.reference_only("what it checks is the same for every backend")
def test_emptied_on_its_own_device_a_layer_keeps_its_state_and_from_meta_it_waits_for_one(layer):
    assert layer.to_empty(device="cpu").quant_state is not None
    on_meta = LinearNF4(128, 8).to("cpu").to("meta")
    assert on_meta.quant_state.absmax.is_meta
    assert on_meta.to_empty(device="meta").quant_state.absmax.is_meta
    assert on_meta.to_empty(device="cpu").quant_state is None


# --- copies -----------------------------------------------------------------------------------------------------------


def test_a_deepcopy_has_its_own_bytes_state_and_module():
    layer = layer_of()
    twin = copy.deepcopy(layer)
    assert_same_layer(twin, layer)
    assert twin.weight.module is twin
    assert twin.weight.quant_state is not layer.weight.quant_state
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    twin.weight.quant_state.absmax.zero_()
    assert layer.weight.quant_state.absmax.any()


def test_a_deepcopy_before_quantising_quantises_on_its_own():
    layer = LinearNF4(64, 8)
    twin = copy.deepcopy(layer).to("cpu")
    assert twin.weight.bnb_quantized
    assert twin.quant_state is twin.weight.quant_state
    assert not layer.weight.bnb_quantized
    assert layer.quant_state is None


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_deepcopy_before_or_after_quantising_is_independent(when):
    layer = refq4.nn.LinearNF4(64, 8)
    if when == "after":
        layer.to("cpu")
    twin = copy.deepcopy(layer).to("cpu")
    layer.to("cpu")
    x = torch.randn(3, 64)
    assert_same_bits(twin(x).detach(), layer(x).detach())
    with torch.no_grad():
        twin.weight.zero_()
    assert not torch.equal(twin(x), layer(x))


def test_a_deepcopied_model_keeps_tied_weights_tied():
    model = nn.ModuleDict({"a": LinearNF4(64, 64), "b": LinearNF4(64, 64)})
    model["b"].weight = model["a"].weight
    model.to("cpu")
    twin = copy.deepcopy(model)
    assert twin["a"].weight is twin["b"].weight
    x = torch.randn(2, 64)
    assert_within_budget(twin["b"](x).detach(), x, twin["a"].weight, twin["a"].quant_state, twin["b"].bias)


def test_a_shallow_copy_of_a_weight_shares_bytes_and_state():
    weight = layer_of().weight
    twin = copy.copy(weight)
    assert isinstance(twin, Params4bit)
    assert twin.data_ptr() == weight.data_ptr()
    assert twin.quant_state is weight.quant_state


def test_the_weight_does_not_keep_its_module_alive():
    layer = layer_of()
    weight, module = layer.weight, weakref.ref(layer)
    del layer
    gc.collect()
    assert module() is None
    assert weight.module is None


def test_a_weight_moves_from_one_module_to_another():
    one, other = layer_of(), layer_of()
    other.weight = one.weight
    x = torch.randn(3, 64)
    assert_within_budget(other(x).detach(), x, one.weight, one.quant_state, other.bias)


@pytest.mark.reference_only("what it checks is the same for every backend")
def test_a_weight_made_with_the_settings_of_another_knows_its_layer(layer):
    again = Params4bit(layer.weight.stored(), **layer.weight.__dict__)
    assert again.module is layer
    assert again.quant_state is layer.quant_state


# --- pickles ----------------------------------------------------------------------------------------------------------

N, K = 96, 128


@pytest.fixture
def own_registry():
    """No backend is chosen, so that "auto" takes one, and what is registered is undone."""
    with isolated_registry():
        yield


def through_torch_save(value: Any, **settings: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **settings)


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_a_layer_survives_pickle(protocol):
    layer = layer_of()
    assert_same_layer(pickle.loads(pickle.dumps(layer, protocol)), layer)


def test_a_pickled_weight_loads_with_weights_only():
    weight = layer_of().weight
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, Params4bit)
    assert_same_bits(loaded.detach(), weight.detach())
    assert loaded.quant_state == weight.quant_state


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "prepared"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "double quantisation"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_weights_and_state_dicts_survive_torch_save_with_weights_only(storage, nested, used):
    if used:
        refq4.set_backend(refq4.register_backend(Loopback(own_layout=True)).name)
    layer, x = layer_of(n=N, k=K, quant_storage=storage, compress_statistics=nested), torch.randn(3, K)
    y = layer(x).detach()
    weight = through_torch_save(layer.weight, weights_only=True)
    assert weight.quant_state == layer.weight.quant_state
    assert_same_bits(weight.detach(), layer.weight.stored())
    fresh = refq4.nn.LinearNF4(K, N)
    fresh.load_state_dict(through_torch_save(layer.state_dict(), weights_only=True))
    assert_same_bits(fresh.eval()(x).detach(), y)


@pytest.mark.usefixtures("own_registry")
def test_a_pickled_layer_is_code_which_weights_only_refuses_and_who_trusts_it_may_load():
    layer, x = layer_of(n=N, k=K), torch.randn(3, K)
    with pytest.raises(pickle.UnpicklingError, match=r"refq4\.nn\.LinearNF4"):
        through_torch_save(layer, weights_only=True)
    trusted = through_torch_save(layer, weights_only=False)
    assert_same_bits(trusted(x).detach(), layer(x).detach())


@pytest.mark.usefixtures("own_registry")
def test_a_pickled_weight_whose_state_was_spoilt_is_refused_where_it_is_used():
    layer = layer_of(n=N, k=K)
    spoilt = layer.weight.quant_state.copy()
    spoilt.absmax = spoilt.absmax[:1].clone()
    layer.weight.quant_state = layer.quant_state = spoilt
    weight = through_torch_save(layer.weight, weights_only=True)
    with pytest.raises(ValueError, match="needs 192 uint8 elements in absmax, it has uint8"):
        F.matmul_4bit(torch.randn(1, K), weight, weight.quant_state)


# --- the fields of the quant state, as attributes of the weight -------------------------------------------------------

OF_THE_STATE = {  # the names that bitsandbytes gives, and where the value is
    "absmax": lambda state: state.absmax,
    "code": lambda state: state.code,
    "quant_map": lambda state: state.code,
    "offset": lambda state: state.offset,
    "state2": lambda state: state.state2,
    "nested_offset": lambda state: state.offset,
    "nested_absmax": lambda state: state.state2.absmax,
    "nested_blocksize": lambda state: state.state2.blocksize,
    "nested_quant_map": lambda state: state.state2.code,
    "nested_dtype": lambda state: state.state2.dtype,
}
OF_THE_SCALES = {"nested_absmax", "nested_blocksize", "nested_quant_map", "nested_dtype"}
nestings = pytest.mark.parametrize("nested", [pytest.param(False, id="plain"), pytest.param(True, id="nested")])


@nestings
@pytest.mark.parametrize("name", OF_THE_STATE)
def test_a_weight_gives_the_fields_of_its_state_as_attributes(name, nested):
    weight = Linear4bit(64, 8, quant_type="nf4", compress_statistics=nested).to("cpu").weight
    if nested or name not in OF_THE_SCALES:
        assert getattr(weight, name) is OF_THE_STATE[name](weight.quant_state)
    else:
        assert not hasattr(weight, name)
        with pytest.raises(AttributeError, match=f"no attribute '{name}': its scales are not quantised"):
            getattr(weight, name)


@pytest.mark.parametrize("name", OF_THE_STATE)
def test_a_weight_that_is_not_quantised_has_none_of_those_attributes(name):
    weight = Params4bit(torch.randn(8, 64), quant_type="nf4")
    assert not hasattr(weight, name)
    with pytest.raises(AttributeError, match=f"no attribute '{name}': it is not quantised"):
        getattr(weight, name)


@nestings
@pytest.mark.parametrize("quant_type", refq4.codebooks.codebook_names())
def test_every_key_of_a_state_dict_leads_to_its_tensor_attribute_by_attribute(quant_type, nested):
    layer = Linear4bit(64, 8, quant_type=quant_type, compress_statistics=nested).to("cpu")
    for key, tensor in layer.state_dict().items():
        found = layer
        for name in key.split("."):
            found = getattr(found, name)
        assert_same_bits(found.detach(), tensor, key)


def test_a_name_that_no_state_has_is_named_in_the_error():
    layer = layer_of()
    for owner, name in ((layer.weight, "absmin"), (layer.quant_state, "bitsandbytes__nf5")):
        assert not hasattr(owner, name)
        with pytest.raises(AttributeError, match=name):
            getattr(owner, name)


def test_those_attributes_compile_whole():
    layer = layer_of()
    compiled = torch.compile(lambda x: x * layer.weight.absmax.sum(), fullgraph=True, backend="eager")
    assert_same_bits(compiled(torch.ones(3)), torch.ones(3) * layer.weight.quant_state.absmax.sum())


# --- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "double quantisation"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "cut",
    [
        lambda w: torch.chunk(w, 3),
        lambda w: w.chunk(3),
        lambda w: torch.split(w, len(w) // 3),
        lambda w: w.split(len(w) // 3),
    ],
    ids=["torch.chunk", "chunk", "torch.split", "split"],
)
def test_pieces_carry_the_state_of_their_own_rows(cut, storage, nested):
    layer = Linear4bit(64, 3 * 256, quant_type="nf4", compress_statistics=nested, quant_storage=storage).to("cpu")
    whole = F.dequantize_4bit(layer.weight, layer.quant_state)
    pieces = cut(layer.weight)
    assert len(pieces) == 3
    for piece, rows in zip(pieces, whole.chunk(3), strict=True):
        assert isinstance(piece, Params4bit)
        assert piece.quant_state.nested == nested
        assert_same_bits(F.dequantize_4bit(piece, piece.quant_state), rows)


def test_a_piece_that_begins_inside_a_nested_block_gets_plain_scales_with_the_same_numbers():
    layer = Linear4bit(64, 6, quant_type="nf4").to("cpu")
    whole = F.dequantize_4bit(layer.weight, layer.quant_state)
    first, second = torch.chunk(layer.weight, 2)
    assert (first.quant_state.nested, second.quant_state.nested) == (True, False)
    assert_same_bits(F.dequantize_4bit(second, second.quant_state), whole[3:])


def test_a_piece_that_cuts_a_row_has_no_state_rather_than_a_wrong_one():
    layer = Linear4bit(64, 3, quant_type="nf4").to("cpu")
    assert [piece.quant_state for piece in torch.chunk(layer.weight, 2)] == [None, None]


def test_pieces_of_a_weight_that_is_not_quantised_quantise_on_their_own():
    piece = torch.chunk(Params4bit(torch.randn(8, 64), quant_type="nf4"), 2)[0].to("cpu")
    assert piece.quant_state.shape == (4, 64)


@pytest.mark.reference_only("what it checks is the same for every backend")
def test_a_scalar_and_an_empty_tensor_have_no_pieces():
    for shape in ((), (4, 0), (0, 4)):
        _, state = F.quantize_4bit(torch.ones(shape), quant_type="nf4")
        piece = slice_state(state, 0, state.shape.numel())
        assert piece is None if shape != (0, 4) else piece.shape == (0, 4), shape
    _, state = F.quantize_4bit(A, blocksize=32, quant_type="nf4")
    assert slice_state(state, 64, 256) is slice_state(state, 0, 64) is None  # whole blocks, half a row


# --- state dicts ------------------------------------------------------------------------------------------------------

SETTINGS = [
    pytest.param(
        {"quant_type": q, "compress_statistics": n, "quant_storage": s}, id=f"{q}, {'nested' if n else 'plain'}, {s}"
    )
    for q in ("nf4", "fp4")
    for n in (False, True)
    for s in (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_state_dict_goes_through_safetensors_and_back_whatever_the_receiving_layer_was_set_to(settings):
    layer = Linear4bit(96, 10, **settings).to("cpu")
    file = save(layer.state_dict())
    for receiver in (
        Linear4bit(96, 10),
        Linear4bit(96, 10, quant_type="nf4").to("cpu"),
        Linear4bit(96, 10, device="meta"),
    ):
        on_meta = receiver.weight.is_meta
        receiver.load_state_dict(load(file), assign=on_meta)
        assert_same_layer(receiver, layer)
        assert receiver.weight.quant_type == settings["quant_type"]


def test_loading_strictly_reports_what_is_missing_and_what_is_unexpected():
    saved = layer_of().state_dict()
    del saved["bias"]
    saved["extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"bias".*Unexpected key.*"extra"'):
        LinearNF4(64, 8).load_state_dict(saved)
    layer = LinearNF4(64, 8)
    report = layer.load_state_dict(saved, strict=False)
    assert (report.missing_keys, report.unexpected_keys) == (["bias"], ["extra"])
    assert layer.weight.bnb_quantized


def test_scales_without_the_packed_weight_are_a_missing_weight():
    saved = layer_of().state_dict()
    del saved["weight"]
    assert LinearNF4(64, 8).load_state_dict(saved, strict=False).missing_keys == ["weight"]


def test_a_packed_weight_without_its_state_is_a_size_mismatch():
    packed = layer_of().weight.detach()
    for receiver in (LinearNF4(64, 8), layer_of()):
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            receiver.load_state_dict({"weight": packed}, strict=False)


def test_full_precision_weights_load_before_and_after_quantising():
    linear = nn.Linear(64, 8)
    before = LinearNF4(64, 8)
    before.load_state_dict(linear.state_dict())
    before.to("cpu")
    after = layer_of()
    after.load_state_dict(linear.state_dict())
    assert_same_layer(after, before)
    assert_same_layer(before, Linear4bit.from_linear(linear, quant_type="nf4"))


def test_a_checkpoint_of_another_shape_is_refused_by_name():
    with pytest.raises(ValueError, match=r"fc\.weight: the checkpoint holds .*\[8, 64\].*needs shape \[8, 128\]"):
        nn.ModuleDict({"fc": LinearNF4(128, 8)}).load_state_dict(nn.ModuleDict({"fc": layer_of()}).state_dict())


def test_loading_copies_unless_it_assigns():
    saved = layer_of().state_dict()
    copied, assigned = LinearNF4(64, 8), LinearNF4(64, 8)
    copied.load_state_dict(saved)
    assigned.load_state_dict(saved, assign=True)
    assert copied.weight.data_ptr() != saved["weight"].data_ptr()
    assert copied.quant_state.absmax.data_ptr() != saved["weight.absmax"].data_ptr()
    assert assigned.weight.data_ptr() == saved["weight"].data_ptr()


def test_loading_leaves_the_callers_dict_as_it_was():
    saved = layer_of().state_dict()
    keys, values = list(saved), [v.clone() for v in saved.values()]
    LinearNF4(64, 8).load_state_dict(saved)
    assert list(saved) == keys
    for value, wanted in zip(saved.values(), values, strict=True):
        assert_same_bits(value, wanted)


def test_a_layer_that_is_not_quantised_saves_a_plain_weight():
    assert list(LinearNF4(64, 8).state_dict()) == ["weight", "bias"]


def test_keep_vars_hands_out_the_parameter_itself():
    layer = layer_of()
    assert layer.state_dict(keep_vars=True)["weight"] is layer.weight


def test_from_prequantized_reads_but_does_not_take_the_callers_entries():
    layer = layer_of()
    stats = {k: v for k, v in layer.state_dict().items() if k.startswith("weight.")}
    keys = list(stats)
    weight = Params4bit.from_prequantized(layer.weight.detach(), stats, module=layer)
    assert list(stats) == keys
    assert weight.quant_state == layer.quant_state
    assert weight.compress_statistics


@pytest.mark.reference_only("what it checks is the same for every backend")
def test_from_saved_entries_to_meta_everything_is_on_meta(layer):
    saved = layer.state_dict()
    stats = {key: value for key, value in saved.items() if key.startswith("weight.")}
    state = F.QuantState.from_dict(stats, device="meta")
    weight = Params4bit.from_prequantized(saved["weight"], stats, device="meta")
    for tensors in (state, weight.quant_state):
        held = (tensors.absmax, tensors.code, tensors.offset, tensors.state2.absmax, tensors.state2.code)
        assert all(t.is_meta for t in held)
    assert weight.is_meta
    assert weight.data.is_meta
    assert weight.quant_storage == weight.dtype == torch.uint8
    assert Params4bit.from_prequantized(saved["weight"].to("meta"), stats, device="meta").is_meta
    on_meta = F.QuantState.from_dict({k: v if "bitsandbytes" in k else v.to("meta") for k, v in stats.items()})
    assert on_meta.offset.is_meta


@pytest.mark.reference_only("what it checks is the same for every backend")
def test_saved_tensors_are_plain_and_detached_unless_variables_are_asked_for(layer):
    assert all(type(value) is torch.Tensor for value in layer.state_dict().values())
    assert not any(value.requires_grad for value in layer.state_dict().values())
    assert layer.state_dict(keep_vars=True)["bias"] is layer.bias
    assert layer.state_dict(keep_vars=True)["weight"] is layer.weight


@pytest.mark.reference_only("what it checks is the same for every backend")
def test_what_is_saved_is_the_state_of_the_weight_that_is_there(layer):
    other = Params4bit(2 * A, quant_type="nf4").to("cpu")
    layer.weight = other
    assert layer.quant_state is not other.quant_state
    entries = layer.state_dict()
    assert F.QuantState.from_dict({k: v for k, v in entries.items() if "weight." in k}) == other.quant_state


@pytest.mark.reference_only("what it checks is the same for every backend")
def test_the_stand_in_for_a_sharded_weight_has_every_public_name_and_no_other(layer):
    stand_in = getattr(layer, layer._fqn_modifiers()["weight"])
    assert stand_in.quant_state.absmax is stand_in
    assert not hasattr(stand_in, "__len__")
    assert not hasattr(stand_in, "_private")


# --- whole models -----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)
        self.lm_head = nn.Linear(64, 10)

    def forward(self, x):
        return self.lm_head(self.down(self.act(self.up(x))))


def test_quantize_model_swaps_linears_and_skips_by_name():
    model = Net()
    assert refq4.quantize_model(model, progress=False) is model
    assert [type(m).__name__ for m in model.children()] == ["Linear4bit", "GELU", "Linear4bit", "Linear"]
    assert model(torch.randn(2, 64)).shape == (2, 10)
    other = refq4.quantize_model(Net(), skip=["up"], quant_type="fp4", compress_statistics=False, progress=False)
    assert isinstance(other.up, nn.Linear)
    assert not isinstance(other.up, Linear4bit)
    assert other.lm_head.weight.quant_type == "fp4"


def test_quantize_model_takes_a_bare_linear_and_refuses_a_model_without_any():
    assert isinstance(refq4.quantize_model(nn.Linear(64, 8), progress=False), Linear4bit)
    with pytest.raises(ValueError, match=r"no nn\.Linear to quantise in this GELU"):
        refq4.quantize_model(nn.GELU())


def test_quantize_model_names_the_layer_that_holds_a_nan():
    model = Net()
    with torch.no_grad():
        model.down.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match="down: the tensor to quantise has a NaN"):
        refq4.quantize_model(model, progress=False)


def test_an_embedding_takes_a_dtype_for_its_result():
    table = Embedding4bit(10, 64, dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    assert table(torch.tensor([1])).dtype == torch.bfloat16
