"""Every size is checked before a kernel reads by address: a wrong one is an error, whatever it means elsewhere.

C and CUDA take addresses and sizes, and believe them. So each wrong size is tried with the numbers that are at hand in
a 4-bit layer and would pass a careless check: N where K is wanted, K and its neighbours, the blocksize, half the number
of elements. ``tests/backends/cpu/test_cpu_memory.py`` lays the same calls against pages that fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import refq4
import refq4.functional as F
from refq4 import registry
from refq4.autograd import MatMul4Bit
from refq4.codebooks import create_dynamic_map
from refq4.internals import dispatch, schemas
from refq4.internals.checks import check_blockwise
from refq4.testing import assert_same_bits
from refq4.testing.isolation import isolated_registry

N, K, BLOCKSIZE = 48, 128, 64
SIZES = {"N": N, "K - 1": K - 1, "K + 1": K + 1, "the blocksize": BLOCKSIZE, "half the elements": N * K // 2, "one": 1}

pytestmark = pytest.mark.reference_only("it names its backends itself")


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    with isolated_registry():
        yield


@pytest.fixture(params=["reference", "cpu", "cuda-emulator"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if (reason := refq4.backend_info(request.param)["reason"]) is not None:
        pytest.skip(reason)
    with refq4.use_backend(request.param):
        yield request.param


def shapes(features: int) -> list[tuple[int, ...]]:
    return [(features,), (2, features), (2, 1, features), (1, 2, 2, features)]


def quantised(nested: bool = True) -> tuple[Tensor, F.QuantState]:
    settings = {"quant_type": "nf4", "blocksize": BLOCKSIZE, "compress_statistics": nested}
    return F.quantize_4bit(torch.randn(N, K), **settings, backend="reference")


def layer_of() -> refq4.nn.Linear4bit:
    with refq4.use_backend("reference"):  # the emulator would take its time
        return refq4.nn.LinearNF4(K, N, blocksize=BLOCKSIZE).to("cpu")


# --- the last dimension of the activations ----------------------------------------------------------------------------


def in_training(x: Tensor) -> Tensor:
    return layer_of().train()(x)


def in_inference(x: Tensor) -> Tensor:
    return layer_of().eval()(x)


def after_a_call_that_prepared_the_weight(x: Tensor) -> Tensor:
    layer = layer_of().eval()
    with torch.no_grad():
        layer(torch.randn(1, K))
        return layer(x)


def with_a_gradient_wanted(x: Tensor) -> Tensor:
    return layer_of()(x.requires_grad_())


def under_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return layer_of().eval()(x)


def gemv_4bit(x: Tensor) -> Tensor:
    B, state = quantised()
    return F.gemv_4bit(x, B, state=state)


def matmul4bit_apply(x: Tensor) -> Tensor:
    B, state = quantised()
    return MatMul4Bit.apply(x, B, None, None, state)


def registered(op: str) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        B, state = quantised()
        return getattr(torch.ops.refq4, op)(x, *schemas.flatten(state.packed_weight(B)), None, refq4.get_backend())

    call.__name__ = f"torch.ops.refq4.{op}"
    return call


WAYS = [in_training, in_inference, after_a_call_that_prepared_the_weight, with_a_gradient_wanted, under_autocast,
        gemv_4bit, matmul4bit_apply, registered("gemv_4bit"), registered("gemm_4bit")]  # fmt: skip


@pytest.mark.parametrize("features", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.replace("_", " "))
def test_a_wrong_last_dimension_is_refused(way, features, backend):
    for shape in shapes(features):
        with pytest.raises(ValueError, match=rf"last dimension must be {K}"):
            way(torch.randn(shape))


def test_a_view_into_wider_rows_is_refused_as_its_copy_is(backend):
    layer = layer_of().eval()
    with torch.no_grad():
        layer(torch.randn(1, K))
        with pytest.raises(ValueError, match=f"last dimension must be {K}"):
            layer(torch.randn(1, 4096)[..., :N])


def test_only_the_functional_product_takes_n_features_and_warns(backend):
    B, state = quantised()
    x = torch.randn(2, N)
    with pytest.warns(DeprecationWarning, match=r"quantised from a \[K, N\] tensor"):
        y = F.matmul_4bit(x, B, state)
    assert_same_bits(y, x @ F.dequantize_4bit(B, state))


@pytest.mark.parametrize("features", [size for size in SIZES.values() if size != N])
def test_the_functional_product_refuses_every_other_size(features, backend):
    B, state = quantised()
    for shape in shapes(features):
        with pytest.raises(ValueError, match=f"last dimension must be {K}"):
            F.matmul_4bit(torch.randn(shape), B, state)


@pytest.mark.parametrize("features", [N, K - 1, BLOCKSIZE])
@pytest.mark.parametrize("prepared", [False, True], ids=["stored bytes", "own layout"])
def test_a_compiled_layer_refuses_it(features, prepared):
    torch._dynamo.reset()
    layer = layer_of().eval()
    with torch.no_grad():
        if prepared:
            layer(torch.randn(1, K))
        compiled = torch.compile(layer, backend="eager")
        compiled(torch.randn(3, K))
        for shape in shapes(features):
            with pytest.raises(ValueError, match=f"last dimension must be {K}"):
                compiled(torch.randn(shape))


# --- the bias ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [K, N - 1, N + 1, 1, BLOCKSIZE, N * K // 2])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_bias_of_another_size_is_refused(tokens, size, backend):
    B, state = quantised()
    x, bias = torch.randn(tokens, K), torch.randn(size)
    layer = layer_of()
    layer.bias = torch.nn.Parameter(bias)
    wanted = rf"bias has shape \[{size}\], the weight \[N, K\] = \[{N}, {K}\] needs \[{N}\]"
    with pytest.raises(ValueError, match=wanted):
        F.matmul_4bit(x, B, state, bias=bias)
    with pytest.raises(ValueError, match=wanted):
        torch.ops.refq4.gemm_4bit(x, *schemas.flatten(state.packed_weight(B)), bias, backend)
    for mode in (layer.train(), layer.eval()):
        with pytest.raises(ValueError, match=wanted):
            mode(x)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_bias_of_any_strides_is_read_as_its_copy_is(tokens, backend):
    B, state = quantised()
    x = torch.randn(tokens, K)
    for bias in (torch.randn(2 * N)[::2], torch.ones(1).expand(N), torch.randn(N, 3)[:, 1], torch.randn(N).flip(0)):
        copy = torch.empty(N).copy_(bias)
        assert_same_bits(F.matmul_4bit(x, B, state, bias=bias), F.matmul_4bit(x, B, state, bias=copy))


# --- tensors that are not what their address says ---------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3])
def test_activations_that_are_a_lazy_negation_are_negated(tokens, backend):
    B, state = quantised()
    x = torch.randn(tokens, K)
    assert_same_bits(F.matmul_4bit(torch._neg_view(x), B, state), F.matmul_4bit(-x, B, state))


def freed(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(0)


def cut(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(2)


@pytest.mark.parametrize("spoil", [freed, cut])
@pytest.mark.parametrize("tokens", [1, 3])
def test_operands_whose_memory_was_freed_or_cut_are_refused(tokens, spoil, backend):
    def fresh() -> dict[str, Any]:
        B, state = quantised()
        return {"A": torch.randn(2 * tokens, K)[tokens:], "B": B, "state": state, "bias": torch.randn(N)}

    operands = {
        "A": lambda g: g["A"], "B": lambda g: g["B"], "bias": lambda g: g["bias"],
        "absmax": lambda g: g["state"].absmax, "code": lambda g: g["state"].code,
        "offset": lambda g: g["state"].offset, "absmax2": lambda g: g["state"].state2.absmax,
        "code2": lambda g: g["state"].state2.code,
    }  # fmt: skip
    for of in operands.values():
        given = fresh()
        spoil(of(given))
        with pytest.raises((ValueError, RuntimeError), match=r"memory|storage|allocated"):
            F.matmul_4bit(given["A"], given["B"], given["state"], bias=given["bias"])
    weight = torch.randn(N, K)
    spoil(weight)
    for quantise in (F.quantize_4bit, F.quantize_blockwise):
        with pytest.raises((ValueError, RuntimeError), match=r"memory|storage|allocated"):
            quantise(weight)


@pytest.mark.parametrize("prepared", [False, True], ids=["stored bytes", "own layout"])
def test_a_layer_whose_memory_was_freed_is_refused_and_does_not_hang(prepared, backend):
    for which in ("bias", "weight"):
        layer = layer_of().eval()
        with torch.no_grad():
            if prepared:
                layer(torch.randn(1, K))
            freed(layer.bias if which == "bias" else layer.weight.data)
            with pytest.raises((ValueError, RuntimeError), match=r"memory|storage|allocated"):
                layer(torch.randn(1, K))


def test_a_bias_that_is_a_lazy_negation_is_negated_and_a_complex_one_refused(backend):
    B, state = quantised()
    x, bias = torch.randn(2, K), torch.randn(N)
    assert_same_bits(F.matmul_4bit(x, B, state, bias=torch._neg_view(bias)), F.matmul_4bit(x, B, state, bias=-bias))
    with pytest.raises(TypeError, match="bias must be a tensor of floats, got complex64"):
        F.matmul_4bit(x, B, state, bias=bias.to(torch.complex64))


def test_a_weight_of_another_shape_than_the_layers_is_not_taken_the_wrong_way_round(backend):
    layer = layer_of()
    with refq4.use_backend("reference"):
        layer.weight = refq4.nn.LinearNF4(N, K).to("cpu").weight
    for mode in (layer.train(), layer.eval()):
        with pytest.raises(ValueError, match=f"last dimension must be {N}"):
            mode(torch.randn(2, K))


def test_a_table_of_another_width_than_the_embeddings_gives_its_own_rows(backend):
    table, wide = (refq4.nn.EmbeddingNF4(2, dim).to("cpu") for dim in (64, 128))
    wanted = wide(torch.tensor([1]))
    table.weight = wide.weight
    assert_same_bits(table(torch.tensor([1])), wanted)
    assert refq4.nn.EmbeddingNF4(0, 64).to("cpu")(torch.zeros(0, dtype=torch.int64)).shape == (0, 64)


def test_a_layer_quantised_in_inference_mode_can_be_used(backend):
    with torch.inference_mode():
        layer = refq4.nn.LinearNF4(K, 4 * N).to("cpu").eval()
        wanted = layer(torch.ones(1, K))
        assert_same_bits(layer(torch.ones(1, K)), wanted)
    with torch.no_grad():
        assert_same_bits(layer(torch.ones(1, K)), wanted)


def test_torch_func_differentiates_through_a_prepared_layer(backend):
    layer = refq4.nn.LinearNF4(K, 4 * N).to("cpu").eval()
    x = torch.randn(2, K)
    with torch.no_grad():
        layer(x)
    grad = torch.func.grad(lambda x: layer(x).sum())(x)
    wanted = F.dequantize_4bit(layer.weight, layer.quant_state).sum(0).expand(2, K)
    torch.testing.assert_close(grad, wanted)


# --- rows of an embedding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [BLOCKSIZE, 40], ids=["rows are whole blocks", "rows straddle blocks"])
@pytest.mark.parametrize("row", [10, 11, -1, -10, -11, 2**31, -(2**40)])
@pytest.mark.filterwarnings("ignore:embedding_dim")
def test_rows_that_are_not_there_are_refused(row, dim, backend):
    table = refq4.nn.EmbeddingNF4(10, dim).to("cpu")
    for ids in (torch.tensor(row), torch.tensor([0, row]), torch.tensor([[0], [row]])):
        with pytest.raises(IndexError, match="out of range"):
            table(ids)


@pytest.mark.parametrize("row", [10, -1, 2**31])
def test_a_compiled_embedding_refuses_them(row):
    torch._dynamo.reset()
    compiled = torch.compile(refq4.nn.EmbeddingNF4(10, BLOCKSIZE).to("cpu"), backend="aot_eager")
    compiled(torch.tensor([1, 2]))
    with pytest.raises((IndexError, RuntimeError), match=r"out of range|out of bounds"):
        compiled(torch.tensor([1, row]))


# --- the registered ops, called directly ------------------------------------------------------------------------------


def weight_arguments(nested: bool) -> list[Any]:
    B, state = quantised(nested)
    return list(schemas.flatten(state.packed_weight(B)))


def calls(backend: str) -> dict[str, list[Any]]:
    """Arguments that each op takes."""
    code, x = create_dynamic_map(), torch.randn(5, 33)
    q, absmax = dispatch.quantize_blockwise(x, code, 32, backend)
    made = {
        "quantize_4bit": [x, 32, "nf4", False, backend],
        "quantize_blockwise": [x, code, 32, backend],
        "dequantize_blockwise": [q, absmax, code, 32, torch.float32, backend],
    }
    for nested in (False, True):
        weight = weight_arguments(nested)
        made[f"dequantize_4bit nested={nested}"] = [*weight, torch.float32, backend]
        for op, tokens in (("gemv_4bit", 1), ("gemm_4bit", 3)):
            made[f"{op} nested={nested}"] = [torch.randn(tokens, K), *weight, torch.randn(N), backend]
        B, state = quantised(nested)
        prepared = registry.check_usable(backend).prepare_weight(state.packed_weight(B))
        if prepared is not None:
            own = schemas.flatten(prepared)
            made[f"gemm_4bit own layout, nested={nested}"] = [torch.randn(3, K), *own, torch.randn(N), backend]
    return made


def spoilt(value: Any) -> Iterator[Any]:
    """What could stand in place of an argument: less of it, another dtype, sizes that are none."""
    if isinstance(value, Tensor):
        if value.dim() and value.shape[-1] > 1:
            yield value[..., :-1].contiguous()
            yield value[..., : value.shape[-1] // 2].contiguous()
        yield value.to(torch.float16 if value.dtype != torch.float16 else torch.uint8)
        yield value.to(torch.int64)
        yield value.new_empty(0)
    elif isinstance(value, list) and value and isinstance(value[0], Tensor):
        for i in range(len(value) if len(value) % 3 == 0 else 2):  # of an own layout what a product reads: tiles, code
            for worse in spoilt(value[i]):
                yield [*value[:i], worse, *value[i + 1 :]]
        yield value[:1]
        yield []
    elif isinstance(value, list):
        yield [2 * value[0], *value[1:]]
        yield [value[0], *(2 * size for size in value[1:])]
        yield [-size for size in value]
        yield value[1:]
        yield [value[0], 2**40]
    elif isinstance(value, bool):
        return
    elif isinstance(value, int):
        yield from {0, -1, -64, 7} - {value}
    elif isinstance(value, torch.dtype):
        yield from (torch.int32, torch.complex64)


FREE = {  # (op, place of the argument): changes that are no fault
    ("quantize_4bit", 0): "any shape is quantised, of three dtypes",
    ("quantize_4bit", 1): "any blocksize above 0",
    ("quantize_blockwise", 0): "any shape is quantised, of three dtypes",
    ("quantize_blockwise", 1): "a code may be shorter",
    ("quantize_blockwise", 2): "any blocksize above 0",
    ("gemm_4bit own layout,", 6): "the backend's layout says by itself what its scales are",
}


@pytest.mark.parametrize("op", [
    "quantize_4bit", "quantize_blockwise", "dequantize_blockwise", "dequantize_4bit", "gemv_4bit", "gemm_4bit",
])  # fmt: skip
def test_a_registered_op_refuses_each_argument_that_does_not_fit_the_others(op, backend):
    tried = 0
    for name, arguments in calls(backend).items():
        if name.partition(" ")[0] != op:
            continue
        getattr(torch.ops.refq4, op)(*arguments)
        for place, value in enumerate(arguments):
            if (name.rpartition(" nested=")[0] or name, place) in FREE:
                continue
            for worse in spoilt(value):
                changed = [*arguments[:place], worse, *arguments[place + 1 :]]
                tried += 1
                try:
                    getattr(torch.ops.refq4, op)(*changed)
                except (ValueError, TypeError, refq4.BackendUnsupportedError):
                    continue
                pytest.fail(f"{name}: argument {place} was {described(value)}, taken as {described(worse)}")
    assert tried > 5 or op.startswith("quantize"), tried


def described(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)[:200]


@pytest.mark.parametrize("blocksize", [0, -1, -64, 2**63 - 1])
def test_a_blocksize_that_is_no_size_is_refused(blocksize, backend):
    for op in (torch.ops.refq4.quantize_4bit,):
        with pytest.raises(ValueError, match="blocksize"):
            op(torch.randn(64), blocksize, "nf4", False, backend)
    with pytest.raises(ValueError, match="blocksize"):
        torch.ops.refq4.quantize_blockwise(torch.randn(64), create_dynamic_map(), blocksize, backend)
    B, state = quantised()
    state.blocksize = blocksize
    layer = layer_of().eval()
    layer.weight.quant_state.blocksize = blocksize
    table = refq4.nn.EmbeddingNF4(10, BLOCKSIZE).to("cpu")
    table.weight.quant_state.blocksize = blocksize
    x = torch.randn(1, K)
    for call in (
        lambda: F.dequantize_4bit(B, state), lambda: F.matmul_4bit(x, B, state), lambda: F.gemv_4bit(x, B, state=state),
        lambda: layer(x), lambda: table(torch.tensor([1])),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="blocksize"):
            call()


@pytest.mark.parametrize("blocksize", [0, -64, 2**64, "64", 64.0])
def test_a_blocksize_of_the_scales_that_is_no_size_is_refused(blocksize, backend):
    B, state = quantised()
    state.state2.blocksize = blocksize
    for call in (lambda: F.dequantize_4bit(B, state), lambda: F.matmul_4bit(torch.randn(1, K), B, state)):
        with pytest.raises(ValueError, match="blocksize"):
            call()
    q, state = F.quantize_blockwise(torch.randn(64))
    state.blocksize = blocksize
    with pytest.raises(ValueError, match="blocksize"):
        F.dequantize_blockwise(q, state)


def test_a_weight_that_says_it_is_in_another_layout_than_it_is_is_refused(backend):
    B, state = quantised()
    canonical = schemas.flatten(state.packed_weight(B))
    own = ([torch.zeros(9), torch.zeros(16)], "rows", [N, K], 64, "nf4", 0)
    with pytest.raises(ValueError, match=r"is three tensors, or six .* got 2 and blocksize2 = 0"):
        torch.ops.refq4.gemv_4bit(torch.randn(1, K), own[0], "canonical", *own[2:], None, backend)
    for op, operands in (("grad_input_4bit", (torch.randn(1, N),)), ("dequantize_4bit", ())):
        rest = [torch.float32] if op == "dequantize_4bit" else []
        with pytest.raises(ValueError, match="reads a weight in the canonical layout, got 'rows'"):
            getattr(torch.ops.refq4, op)(*operands, *own, *rest, backend)
    for weight, name in ((canonical, backend), (own, "auto")):
        with pytest.raises(ValueError, match="needs a prepared weight and the name of its backend"):
            torch.ops.refq4.restore_weight(*weight, name)


@pytest.mark.parametrize("field", ["absmax", "code", "offset", "shape", "blocksize"])
@pytest.mark.parametrize("value", [None, [1.0], (N, K), "64"], ids=str)
def test_a_field_of_a_state_that_is_something_else_is_a_clear_error_or_means_the_same(field, value, backend):
    B, state = quantised()
    setattr(state, field, value)
    if (field, value) == ("shape", (N, K)):
        assert F.dequantize_4bit(B, state).shape == (N, K)
    else:
        with pytest.raises((ValueError, TypeError), match=r"QuantState|this weight|blocksize|shape|packs"):
            F.dequantize_4bit(B, state)


def test_codes_beyond_the_end_of_their_table_are_refused_compiled_or_not(backend):
    q = torch.tensor([0, 1, 2, 9], dtype=torch.uint8)
    absmax, code = torch.ones(1), torch.linspace(-1, 1, 4)
    with pytest.raises(ValueError, match="the largest of the codes to decode is 9"):
        F.dequantize_blockwise(q, absmax=absmax, code=code)
    with pytest.raises(ValueError, match="the largest of the codes to decode is 9"):
        torch.ops.refq4.dequantize_blockwise(q, absmax, code, 4096, torch.float32, backend)


# --- codes of eight bits ----------------------------------------------------------------------------------------------


def test_a_code_of_256_entries_decodes_every_byte_and_one_of_255_is_asked():
    q = torch.full((4,), 255, dtype=torch.uint8)
    check_blockwise(q, torch.zeros(1), torch.zeros(256), 32)
    for codes, device in ((q[:0], "cpu"), (q, "meta")):  # nothing to look at
        absmax = torch.zeros(-(-codes.numel() // 32), device=device)
        check_blockwise(codes.to(device), absmax, torch.zeros(16, device=device), 32)
    with pytest.raises(ValueError, match="code has 255 entries, and the largest of the codes to decode is 255"):
        check_blockwise(q, torch.zeros(1), torch.zeros(255), 32)
