"""torch.compile, torch.export, opcheck: whole graphs, no recompilation, and the backend still swaps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
from loopback import Loopback
from torch import nn

import refq4
import refq4.functional as F
from refq4.codebooks import create_dynamic_map
from refq4.internals import dispatch, schemas
from refq4.testing import assert_same_bits
from refq4.testing.isolation import isolated_registry


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with isolated_registry():
        yield
    torch._dynamo.reset()


def layer_of(**settings) -> refq4.nn.Linear4bit:
    return refq4.nn.LinearNF4(64, 8, **settings).to("cpu")


@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "double quantisation"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_layer_compiles_whole_forward_and_backward_without_recompiling(training, nested):
    layer = layer_of(compress_statistics=nested).train(training)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (4, 5, 9, 3):
        with torch._dynamo.config.patch(error_on_recompile=tokens != 4):
            x = torch.randn(tokens, 64, requires_grad=True)
            y = compiled(x)
            y.sin().sum().backward()
        twin = x.detach().clone().requires_grad_()
        wanted = eager(twin)
        wanted.sin().sum().backward()
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(x.grad, twin.grad)
        torch.testing.assert_close(layer.bias.grad, eager.bias.grad)


def test_the_first_input_does_not_cause_a_recompilation():
    layer = layer_of().eval()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with torch.no_grad():
        for _ in range(3):
            compiled(torch.randn(2, 64))
    assert counter.frame_count == 1


@pytest.mark.parametrize("tokens", [1, 3])
def test_inference_compiles_for_one_token_and_for_more(tokens):
    layer = layer_of().eval()
    x = torch.randn(tokens, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_a_prepared_layer_compiles_on_its_own_layout():
    backend = refq4.register_backend(Loopback(own_layout=True))
    layer, x = layer_of().eval(), torch.randn(3, 64)
    with torch.no_grad():
        wanted = layer(x)
        before = backend.seen["prepared product"]
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), wanted)
    assert backend.seen["prepared product"] > before
    assert backend.seen["prepare_weight"] == 1


def test_a_compiled_layer_follows_a_change_of_backend():
    backend = refq4.register_backend(Loopback())
    layer, x = layer_of().eval(), torch.randn(3, 64)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        refq4.set_backend("reference")
        wanted = compiled(x)
        assert backend.seen["gemm_4bit"] == 0
        refq4.set_backend("loopback")
        torch.testing.assert_close(compiled(x), wanted)
        assert backend.seen["gemm_4bit"] == 1
        with refq4.use_backend("reference"):
            compiled(x)
        assert backend.seen["gemm_4bit"] == 1


def test_a_model_of_several_layers_compiles_whole():
    model = nn.Sequential(layer_of(), nn.ReLU(), refq4.nn.LinearFP4(8, 4).to("cpu"))
    x = torch.randn(5, 64)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


def test_an_embedding_compiles_whole():
    table = refq4.nn.EmbeddingNF4(10, 64).to("cpu")
    ids = torch.tensor([1, 2])
    torch.testing.assert_close(torch.compile(table, fullgraph=True)(ids), table(ids))


def test_a_layer_exports_with_a_dynamic_batch():
    layer = layer_of().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(3, 64),), dynamic_shapes=({0: batch},))
    assert "refq4.gemm_4bit" in program.graph_module.code
    for tokens in (2, 7):
        x = torch.randn(tokens, 64)
        torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")  # torch warns of itself
def test_an_exported_layer_is_compiled_ahead_of_time_and_run_from_its_package(tmp_path):
    layer = layer_of().eval()
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(layer, (torch.randn(3, 64),), dynamic_shapes=({0: batch},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
        run = torch._inductor.aoti_load_package(package)
        for tokens in (3, 7):
            x = torch.randn(tokens, 64)
            torch.testing.assert_close(run(x), layer(x))


def test_quantising_and_decoding_compile_whole():
    def there_and_back(x):
        packed, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
        return F.dequantize_4bit(packed, state)

    x = torch.randn(4, 64)
    torch.testing.assert_close(torch.compile(there_and_back, fullgraph=True)(x), there_and_back(x))


@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "double quantisation"])
@pytest.mark.parametrize("op", ["gemv_4bit", "gemm_4bit", "grad_input_4bit", "dequantize_4bit"])
def test_opcheck_passes_for_ops_on_a_packed_weight(op, nested):
    B, state = F.quantize_4bit(torch.randn(6, 64), quant_type="nf4", compress_statistics=nested)
    flat = schemas.flatten(state.packed_weight(B))
    if op == "dequantize_4bit":
        args = (*flat, torch.bfloat16, "auto")
    elif op == "grad_input_4bit":
        args = (torch.randn(3, 6, requires_grad=True), *flat, "auto")
    else:
        args = (torch.randn(1, 64, requires_grad=True), *flat, torch.randn(6, requires_grad=True), "auto")
    torch.library.opcheck(getattr(torch.ops.refq4, op).default, args)


def test_opcheck_passes_for_the_other_ops():
    x = torch.randn(5, 33)
    code = create_dynamic_map()
    torch.library.opcheck(torch.ops.refq4.quantize_4bit.default, (x, 32, "nf4", False, "auto"))
    torch.library.opcheck(torch.ops.refq4.quantize_blockwise.default, (x, code, 32, "auto"))
    q, absmax = dispatch.quantize_blockwise(x, code, 32, "auto")
    torch.library.opcheck(torch.ops.refq4.dequantize_blockwise.default, (q, absmax, code, 32, torch.float16, "auto"))
    backend = refq4.register_backend(Loopback(own_layout=True))
    B, state = F.quantize_4bit(torch.randn(6, 64), quant_type="nf4")
    flat = schemas.flatten(backend.prepare_weight(state.packed_weight(B)))
    for op, tokens in (("gemv_4bit", 1), ("gemm_4bit", 2)):
        args = (torch.randn(tokens, 64), *flat, None, "loopback")
        torch.library.opcheck(getattr(torch.ops.refq4, op).default, args)
    torch.library.opcheck(torch.ops.refq4.restore_weight.default, (*flat, "loopback"))


# --- what a compiled layer must not remember --------------------------------------------------------------------------


def load(layer, other):
    layer.load_state_dict(other.state_dict())


def copy_into_the_data(layer, other):
    layer.weight.data.copy_(other.weight.data)
    layer.weight.quant_state = layer.quant_state = other.quant_state


def swap_the_parameter(layer, other):
    layer.weight, layer.quant_state = other.weight, other.quant_state


def move_and_load(layer, other):
    layer.to("meta").to_empty(device="cpu")
    load(layer, other)


@pytest.mark.parametrize("change", [load, copy_into_the_data, swap_the_parameter, move_and_load])
def test_a_layer_whose_weight_changed_before_it_was_compiled_computes_with_the_new_one(change):
    backend = refq4.register_backend(Loopback(own_layout=True))
    refq4.set_backend("loopback")
    layer, other, x = layer_of(bias=False).eval(), layer_of(bias=False).eval(), torch.randn(3, 64)
    with torch.no_grad():
        layer(x)
        assert backend.seen["prepare_weight"] == 1
        change(layer, other)
        wanted = F.matmul_4bit(x, other.weight.data, other.quant_state, backend="reference")
        torch.testing.assert_close(torch.compile(layer, backend="eager")(x), wanted)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_layer_prepared_by_one_backend_compiles_for_the_one_that_is_asked_for(tokens):
    backend = refq4.register_backend(Loopback(own_layout=True))
    layer, x = layer_of().eval(), torch.randn(tokens, 64)
    with torch.no_grad():
        with refq4.use_backend("loopback"):
            layer(x)
        before = backend.seen.copy()
        with refq4.use_backend("reference"):
            torch.compile(layer, backend="eager")(x)
    assert backend.seen == before


def test_a_layer_prepared_after_it_was_compiled_computes_on_the_own_layout_with_one_copy_of_its_codes():
    backend = refq4.register_backend(Loopback(own_layout=True))
    refq4.set_backend("loopback")
    layer, x = layer_of(), torch.randn(3, 64)
    compiled = torch.compile(layer.eval(), fullgraph=True, backend="eager")
    with torch.no_grad():
        wanted = compiled(x)
        assert not layer.weight.prepared, "nothing is prepared while tracing"
        assert refq4.prepare(layer) == 1
        assert_same_bits(compiled(x), wanted)
        assert backend.seen["prepared product"] == 1
        assert layer.weight.prepared, "the compiler looked at the weight, and it stayed prepared"
        refq4.restore(layer)
        assert_same_bits(compiled(x), wanted)
        assert backend.seen["prepared product"] == 1


def test_a_gradient_through_a_compiled_layer_that_is_prepared_reads_the_stored_bytes():
    backend = refq4.register_backend(Loopback(own_layout=True))
    refq4.set_backend("loopback")
    layer, x = layer_of().eval(), torch.randn(3, 64)
    wanted = torch.autograd.functional.jacobian(layer, x)
    refq4.prepare(layer)
    compiled, twin = torch.compile(layer, fullgraph=True), x.clone().requires_grad_()
    compiled(twin).sum().backward()
    torch.testing.assert_close(twin.grad, wanted.sum((0, 1)))
    assert layer.weight.prepared
    assert backend.seen["prepared product"] == 0


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_the_stored_bytes_of_a_prepared_layer(strict):
    refq4.register_backend(Loopback(own_layout=True))
    refq4.set_backend("loopback")
    layer, x = layer_of().eval(), torch.randn(3, 64)
    with torch.no_grad():
        wanted = layer(x)
        assert layer.weight.prepared
        program = torch.export.export(layer, (x,), strict=strict)
        assert "refq4.gemm_4bit" in program.graph_module.code
        refq4.set_backend("reference")
        torch.testing.assert_close(program.module()(x), wanted)


def test_a_compiled_gradient_in_bfloat16_is_rounded_as_in_eager_mode():
    layer = layer_of().to(torch.bfloat16)
    x = torch.randn(3, 64, dtype=torch.bfloat16)

    gelu = torch.nn.functional.gelu

    def gradient(run):
        leaf = x.clone().requires_grad_()
        run(leaf).sum().backward()
        return leaf.grad

    block = lambda x: gelu(layer(gelu(x)))  # noqa: E731
    assert_same_bits(gradient(torch.compile(block, fullgraph=True)), gradient(block))
