"""A weight in a backend's own layout: one copy of its codes, never a stale one, and only the memory shows it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from loopback import Loopback, Recorder
from torch import nn

import refq4
import refq4.functional as F
from refq4.backend import PackedWeight, PreparedWeight
from refq4.internals.prepared import MOST_RESTORES
from refq4.nn import LinearNF4
from refq4.pipeline import LAYOUT_IN_USE, LAYOUT_OWN
from refq4.testing import assert_same_bits
from refq4.testing.isolation import isolated_registry

pytestmark = pytest.mark.reference_only("it registers a backend with a layout of its own")
STORAGES = pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
N, K = 128, 192


@pytest.fixture(autouse=True)
def owner():
    backend = refq4.register_backend(Loopback(own_layout=True))
    refq4.set_backend("loopback")
    return backend


def layer_of(**settings) -> refq4.nn.Linear4bit:
    return refq4.nn.Linear4bit(K, N, quant_type="nf4", **settings).to("cpu").eval()


def prepared(**settings) -> tuple[refq4.nn.Linear4bit, torch.Tensor]:
    """A layer whose weight is prepared, and its stored bytes."""
    layer = layer_of(**settings)
    stored = layer.weight.detach().clone()
    infer(layer)
    assert layer.weight.prepared
    return layer, stored


def infer(layer: nn.Module, tokens: int = 2) -> torch.Tensor:
    x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return layer(x)


def bytes_held(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.untyped_storage().nbytes()


@STORAGES
def test_a_weight_of_one_stored_element_is_not_taken_for_its_placeholder(storage):
    layer = refq4.nn.Linear4bit(2, 1, quant_type="nf4", bias=False, quant_storage=storage).to("cpu").eval()
    stored = layer.weight.detach().clone()
    assert stored.numel() == 1
    with torch.no_grad():
        layer(torch.ones(1, 2))
    assert layer.weight.prepared
    assert_same_bits(layer.weight.stored(), stored)
    assert_same_bits(layer.weight.restore(), stored)


@STORAGES
def test_after_the_first_inference_the_bytes_are_with_the_backend_only(storage):
    layer, stored = prepared(quant_storage=storage)
    assert bytes_held(layer.weight) <= 4
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device) == (stored.shape, storage, stored.device)
    assert layer.weight.prepared, "shape, dtype and device restore nothing"
    assert_same_bits(layer.weight.stored(), stored)
    assert layer.weight.prepared


@STORAGES
def test_results_and_state_dicts_are_those_of_a_layer_that_was_never_prepared(storage):
    torch.manual_seed(3)
    layer, stored = prepared(quant_storage=storage, bias=True)
    saved = layer.state_dict()
    assert layer.weight.prepared, "saving leaves the live layer as it is"
    assert_same_bits(saved["weight"], stored)
    assert next(iter(saved)) == "weight"
    fresh = refq4.nn.Linear4bit(K, N, quant_type="nf4", quant_storage=storage, bias=True)
    fresh.load_state_dict(saved)
    assert list(fresh.state_dict()) == list(saved)
    assert_same_bits(infer(fresh), infer(layer))


def test_a_state_dict_taken_before_inference_keeps_its_bytes():
    layer = layer_of()
    saved = layer.state_dict()
    before = saved["weight"].clone()
    infer(layer)
    assert layer.weight.prepared
    assert_same_bits(saved["weight"], before)


def test_preparing_in_inference_mode_leaves_an_ordinary_parameter():
    with isolated_registry():
        refq4.register_backend(Recorder(own_layout=True))
        layer = LinearNF4(256, 64).to("cpu").eval()
        with torch.inference_mode(), refq4.use_backend("recorder"):
            layer(torch.ones(3, 256))
        assert layer.weight.prepared
        with torch._C.DisableTorchFunctionSubclass():
            assert not layer.weight.data.is_inference()


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w.detach().clone(),
        lambda w: w.data.clone(),
        lambda w: torch.cat([w, w])[: w.shape[0]].detach(),
        lambda w: w.cpu().detach().clone() if w.data is not None else None,
        lambda w: torch.from_numpy(w.numpy()).clone(),
        lambda w: torch.tensor(w.tolist(), dtype=w.dtype),
    ],
    ids=["detach", "data", "cat", "cpu", "numpy", "tolist"],
)
def test_whoever_reads_the_parameter_gets_the_bytes_and_they_stay(read):
    layer, stored = prepared()
    assert_same_bits(read(layer.weight), stored)
    assert not layer.weight.prepared
    wanted = infer(layer)
    assert layer.weight.prepared
    assert_same_bits(infer(layer), wanted)


def test_a_prepared_weight_is_restored_where_it_is_read_by_keyword():
    with isolated_registry():
        refq4.register_backend(Recorder(own_layout=True))
        layer = LinearNF4(256, 64).to("cpu").eval()
        wanted = layer.weight.stored().clone()
        with torch.no_grad(), refq4.use_backend("recorder"):
            layer(torch.ones(3, 256))
        assert layer.weight.prepared
        assert torch.equal(torch.clone(input=layer.weight), wanted)


def decision_of_step_2(layer: nn.Module) -> str:
    with refq4.trace() as t:
        infer(layer)
    return t.calls[-1].steps[1].why


def test_a_weight_that_others_keep_reading_stays_as_stored_until_it_is_prepared_by_name(owner):
    layer, stored = prepared()
    for _ in range(MOST_RESTORES):
        assert decision_of_step_2(layer) == LAYOUT_OWN.why
        assert_same_bits(layer.weight.detach().clone(), stored)
    assert decision_of_step_2(layer) == LAYOUT_IN_USE.why
    assert owner.seen["prepare_weight"] == MOST_RESTORES
    assert refq4.prepare(nn.Sequential(layer)) == 1
    assert decision_of_step_2(layer) == LAYOUT_OWN.why
    assert refq4.restore(layer) == 1
    assert_same_bits(layer.weight.stored(), stored)
    assert refq4.restore(layer) == 0
    layer.weight.data = stored.flip(0)  # new bytes: nobody has read them yet
    assert decision_of_step_2(layer) == LAYOUT_OWN.why


def test_two_layers_that_share_a_weight_share_its_prepared_form(owner):
    layer = layer_of(bias=False)
    other = layer_of(bias=False)
    other.weight, other.quant_state = layer.weight, layer.quant_state
    for _ in range(20):
        assert_same_bits(infer(layer), infer(other))
    assert owner.seen["prepare_weight"] == 1


def test_an_alias_of_the_memory_taken_before_the_first_inference_no_longer_reaches_the_weight():
    layer = layer_of()
    alias = layer.weight.data
    wanted = infer(layer)
    alias.zero_()
    assert_same_bits(infer(layer), wanted)


def test_calls_that_alternate_in_tokens_and_dtype_prepare_once_and_resolve_once_each(owner):
    layer = layer_of(bias=False)
    infer(layer)
    asked = []
    owner.can_run = lambda call: asked.append(call)
    with torch.no_grad():
        for tokens, dtype in [(1, torch.float32), (3, torch.bfloat16), (1, torch.bfloat16), (2, torch.float32)] * 3:
            layer(torch.randn(tokens, K, dtype=dtype))
    assert len(asked) == 12
    assert owner.seen["prepare_weight"] == 1


def test_writing_into_the_parameter_is_seen_by_the_next_inference():
    layer, stored = prepared()
    with torch.no_grad():
        layer.weight.zero_()
    other = refq4.nn.Linear4bit(K, N, quant_type="nf4")
    other.load_state_dict(layer.state_dict())
    assert_same_bits(infer(layer), infer(other))
    layer.weight.data = stored
    assert_same_bits(layer.weight.stored(), stored)


EDITS = {
    "bytes, through .data": lambda layer, other: layer.weight.data.copy_(other.weight.data),
    "another code": lambda layer, other: setattr(layer.quant_state, "code", layer.quant_state.code.flip(0)),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_of_a_weight_or_of_its_state_is_seen_by_the_next_inference(edit):
    layer, other = (refq4.nn.LinearNF4(64, 16, bias=False).to("cpu").eval() for _ in range(2))
    x = torch.randn(2, 64)
    with torch.no_grad():
        layer(x)
        edit(layer, other)
        wanted = F.matmul_4bit(x, layer.weight.data, layer.quant_state, backend="reference")
        torch.testing.assert_close(layer(x), wanted)


def test_setting_data_replaces_what_was_prepared():
    layer, stored = prepared()
    layer.weight.data = stored.flip(0)
    assert not layer.weight.prepared
    assert_same_bits(layer.weight.stored(), stored.flip(0))


def test_new_data_for_a_prepared_weight_has_no_old_form():
    with isolated_registry():
        refq4.register_backend(Recorder(own_layout=True))
        layer = LinearNF4(256, 64).to("cpu").eval()
        with torch.no_grad(), refq4.use_backend("recorder"):
            x = torch.ones(3, 256)
            before = layer(x)
            assert layer.weight.prepared
            layer.weight.data = torch.zeros(8192, 1, dtype=torch.uint8)
            assert not layer.weight.prepared
            assert not layer.weight.stored().any()
            assert not torch.equal(layer(x), before)


def test_training_restores_the_bytes_and_inference_prepares_them_again():
    layer, stored = prepared()
    layer.train()
    assert not layer.weight.prepared
    assert_same_bits(layer.weight.stored(), stored)
    layer.eval()
    infer(layer)
    assert layer.weight.prepared


def test_a_wanted_gradient_reads_the_stored_bytes():
    layer, _ = prepared(bias=False)
    x = torch.randn(3, K, requires_grad=True)
    layer(x).sum().backward()
    wanted = F.dequantize_4bit(layer.weight, layer.quant_state).sum(0).expand(3, K)
    torch.testing.assert_close(x.grad, wanted)
    assert not layer.weight.prepared
    infer(layer)
    assert layer.weight.prepared


@pytest.mark.parametrize(
    "twin",
    [
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: torch.load(io.BytesIO(saved(layer)), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_of_a_layer_have_the_bytes(twin):
    layer, stored = prepared()
    wanted = infer(layer)
    other = twin(layer)
    assert layer.weight.prepared
    assert not other.weight.prepared
    assert_same_bits(other.weight.stored(), stored)
    assert_same_bits(infer(other), wanted)
    del layer
    gc.collect()
    assert_same_bits(infer(other), wanted)


def saved(layer: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    return buffer.getvalue()


def test_functions_of_refq4_read_a_prepared_weight_without_restoring_it():
    layer, stored = prepared()
    assert_same_bits(F.dequantize_4bit(layer.weight, layer.quant_state), F.dequantize_4bit(stored, layer.quant_state))
    F.matmul_4bit(torch.randn(2, K), layer.weight, layer.quant_state)
    refq4.explain(layer, torch.randn(2, K))
    assert layer.weight.prepared


def test_another_backend_gets_the_bytes_and_the_first_ones_form_goes(owner):
    layer, stored = prepared()
    wanted = F.matmul_4bit(torch.eye(K), stored, layer.quant_state, bias=layer.bias, backend="reference").detach()
    with refq4.use_backend("reference"), torch.no_grad():
        assert_same_bits(layer(torch.eye(K)), wanted)
    assert_same_bits(layer.weight.stored(), stored)
    infer(layer)
    assert owner.seen["prepare_weight"] == 2


def test_a_backend_that_is_gone_still_gives_the_bytes_back():
    layer, stored = prepared()
    refq4.set_backend("reference")
    refq4.unregister_backend("loopback")
    assert_same_bits(layer.state_dict()["weight"], stored)
    infer(layer)
    assert_same_bits(layer.weight.stored(), stored)


def test_compiled_code_reads_the_bytes_whether_they_were_prepared_before_or_after_it_was_compiled():
    layer = layer_of(bias=False)
    x = torch.randn(2, K)
    wanted = layer_of_same(layer)(x.clone().requires_grad_())
    run = torch.compile(lambda a: layer(a), fullgraph=True)
    decode = torch.compile(lambda: F.dequantize_4bit(layer.weight, layer.quant_state), fullgraph=True)
    decoded = F.dequantize_4bit(layer.weight, layer.quant_state)
    for _ in range(2):
        torch.testing.assert_close(run(x.clone().requires_grad_()), wanted)
        assert_same_bits(decode(), decoded)
        infer(layer)  # eager: prepares the weight
        with torch.no_grad():
            torch.testing.assert_close(run(x), wanted.detach())


def test_graphs_compiled_before_a_weight_is_prepared_do_not_read_the_placeholder():
    layer = layer_of(bias=False)
    decoded = F.dequantize_4bit(layer.weight, layer.quant_state)
    decode = torch.compile(lambda: F.dequantize_4bit(layer.weight, layer.quant_state), fullgraph=True)
    decode()
    infer(layer)
    assert layer.weight.prepared
    assert_same_bits(decode(), decoded)


def layer_of_same(layer: nn.Module) -> nn.Module:
    twin = refq4.nn.Linear4bit(K, N, bias=layer.bias is not None, quant_type="nf4")
    twin.load_state_dict(layer.state_dict())
    return twin.eval()


def test_a_tied_embedding_and_its_linear_both_read_right():
    linear = layer_of(bias=False)
    table = refq4.nn.Embedding4bit(N, K, quant_type="nf4").to("cpu")
    table.weight, table.quant_state = linear.weight, linear.quant_state
    wanted = F.dequantize_4bit(linear.weight.stored(), linear.quant_state)
    for _ in range(3):
        infer(linear)
        assert_same_bits(table(torch.arange(N)), wanted)


@pytest.fixture
def hasty_threads():
    """Threads take turns after a microsecond instead of five milliseconds: a race shows in a second, not in a week."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty_threads")
def test_threads_that_infer_save_and_differentiate_at_once_all_read_right():
    layer, stored = prepared(bias=False)
    wanted = infer(layer)
    x = torch.randn(2, K, generator=torch.Generator().manual_seed(1))
    wrong: list[str] = []

    def work(kind: int) -> None:
        with refq4.use_backend("loopback"):
            for _ in range(60):
                if kind == 0 and not torch.equal(infer(layer), wanted):
                    wrong.append("inference")
                if kind == 1 and not torch.equal(layer.state_dict()["weight"], stored):
                    wrong.append("state dict")
                if kind == 2 and not torch.allclose(layer(x.clone().requires_grad_()), wanted, atol=1e-5):
                    wrong.append("gradient")

    threads = [threading.Thread(target=work, args=(i % 3,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.usefixtures("hasty_threads")
def test_a_state_dict_taken_while_others_save_and_prepare_the_weight_is_whole():
    layer, stored = prepared(bias=False)
    wrong: list[object] = []

    def save() -> None:
        for _ in range(1000):
            weight = layer.state_dict().get("weight")
            if weight is None or not torch.equal(weight, stored):
                wrong.append(weight)

    saving = [threading.Thread(target=save) for _ in range(4)]
    for thread in saving:
        thread.start()
    while any(thread.is_alive() for thread in saving):
        infer(layer)  # prepares
        layer.train().eval()  # restores
    assert not wrong


def test_a_layer_is_saved_while_the_backend_restores_another_one():
    begun, saved = threading.Event(), threading.Event()

    class Waits(Loopback):
        def restore_weight(self, prepared: PreparedWeight) -> PackedWeight:
            if threading.current_thread() is not threading.main_thread():
                begun.set()
                assert saved.wait(10), "the other layer waits for this one"
            return super().restore_weight(prepared)

    refq4.register_backend(Waits(own_layout=True), replace=True)
    slow, _ = prepared(bias=False)
    with refq4.use_backend("reference"):
        other = refq4.nn.LinearNF4(K, N).to("cpu")
    faults: list[BaseException] = []

    def save() -> None:
        try:
            slow.state_dict()
        except AssertionError as fault:
            faults.append(fault)

    saving = threading.Thread(target=save)
    saving.start()
    assert begun.wait(10)
    other.state_dict()
    saved.set()
    saving.join()
    assert not faults


PROBE = """
import torch, refq4
torch.set_num_threads(1)
refq4.set_backend("cpu")
rss = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
layers = []
x = torch.randn(1, 4096)
one = refq4.nn.LinearNF4(4096, 64, bias=False).to("cpu").eval()
with torch.no_grad():
    one(x)
    for _ in range(6):
        layer = refq4.nn.LinearNF4(4096, 4096, bias=False, compute_dtype=torch.float32)
        layers.append(layer.to("cpu").eval())
    start = rss()
    for layer in layers:
        layer(x)
print(all(layer.weight.prepared for layer in layers), (rss() - start) / (6 * 4096 * 4096 / 2))
"""


def test_a_model_on_the_cpu_backend_takes_the_memory_of_one_copy():
    if not sys.platform.startswith("linux"):
        pytest.skip("resident memory is read from /proc; run this on Linux")
    if not refq4.backend_info("cpu")["available"]:
        pytest.skip(refq4.backend_info("cpu")["reason"])
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    all_prepared, more_copies = done.stdout.split()
    assert all_prepared == "True"
    assert float(more_copies) < 0.5, "a second copy of the packed bytes would be 1.0"
