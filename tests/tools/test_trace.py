"""trace, explain, compare: what they record, how they show it, and that they cost nothing when off."""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time

import pytest
import torch
from loopback import Loopback, Recorder

import refq4
import refq4.functional as F
from refq4 import registry
from refq4.nn import LinearNF4
from refq4.testing import assert_same_bits, error_budget
from refq4.testing.isolation import isolated_registry
from refq4.tools.explain import _first_difference
from refq4.trace import current

A = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))


def layer_of(n: int = 8, k: int = 64, **settings) -> refq4.nn.Linear4bit:
    return refq4.nn.LinearNF4(k, n, **settings).to("cpu").eval()


@pytest.fixture
def layer() -> LinearNF4:
    torch.manual_seed(1)
    return layer_of(k=128, compress_statistics=True)


def test_a_trace_lists_the_seven_steps_of_each_call_with_decision_reason_and_result():
    layer = layer_of()
    with torch.no_grad(), refq4.trace() as t:
        layer(torch.randn(1, 64))
        layer(torch.randn(2, 3, 64))
    assert [call.title for call in t.calls] == [
        "LinearNF4.forward(x float32 [1, 64])",
        "LinearNF4.forward(x float32 [2, 3, 64])",
    ]
    for call in t.calls:
        assert [step.number for step in call.steps] == [1, 2, 3, 4, 5, 6, 7]
        assert all(step.choice and step.why and step.result and step.micros >= 0 for step in call.steps)
    assert t.calls[1].steps[5].result == "float32 [2, 3, 8]"


def test_a_trace_says_which_backend_and_kernel_ran_and_who_was_passed_over():
    backend = refq4.register_backend(Loopback())
    backend.can_run = lambda call: "it takes several tokens only" if call.m == 1 else None
    refq4.set_backend("auto")
    layer = layer_of().train()  # on the stored layout, for which each call asks anew
    with torch.no_grad(), refq4.trace() as t:
        layer(torch.randn(3, 64))
        layer(torch.randn(1, 64))
    several, one = t.ops
    assert (several.backend, several.kernel) == ("loopback", "loopback gemm_4bit")
    assert one.op == "gemv_4bit"
    assert one.backend != "loopback"
    assert ("loopback", "it takes several tokens only") in one.passed_over
    assert "passed over loopback: it takes several tokens only" in t.text(width=300)


def test_a_lone_matmul_and_a_lone_op_are_recorded_too():
    B, state = F.quantize_4bit(torch.randn(8, 64), quant_type="nf4")
    with refq4.trace() as t:
        F.matmul_4bit(torch.randn(2, 64), B, state)
        F.dequantize_4bit(B, state)
    assert [step.number for step in t.calls[0].steps] == [6]
    assert [op.op for op in t.ops] == ["gemm_4bit", "dequantize_4bit"]


def test_a_trace_reads_as_text_html_and_json():
    with refq4.trace() as t:
        layer_of()(torch.randn(1, 64))
    assert "recover the quant state" in str(t)
    assert t._repr_html_().startswith("<pre")
    plain = json.loads(json.dumps(t.to_dict()))
    assert plain["calls"][0]["steps"][5]["ops"][0]["op"] == "gemv_4bit"
    with refq4.trace() as empty:
        pass
    assert "no call was recorded" in str(empty)


def test_in_jupyter_a_report_is_shown_once_as_html_and_as_its_text(monkeypatch):
    shown = []
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)  # there, rich displays what is printed to any console
    monkeypatch.setattr("rich.jupyter.display", lambda *args: shown.append(args))
    report = refq4.explain(layer_of(), torch.randn(1, 64))  # a dataclass, which has a repr of its own
    bundle = report._repr_mimebundle_(include=None, exclude=None)
    assert "recover the quant state" in str(report)
    assert "recover the quant" in bundle["text/plain"]
    assert bundle["text/html"].startswith("<pre")
    assert not shown


def test_explain_says_whether_the_casts_are_in_its_error():
    x = torch.randn(1, 64)
    assert "this is the rounding of the kernel alone" in refq4.explain(layer_of(), x).text(width=300)
    assert "of kernel and casts" in refq4.explain(layer_of(compute_dtype=torch.bfloat16), x).text(width=300)


def test_each_step_has_its_name_and_shows_what_it_gave():
    layer = layer_of(compute_dtype=torch.bfloat16)
    with torch.no_grad(), refq4.use_backend("reference"), refq4.trace() as t:
        layer(torch.randn(3, 64))
    steps = t.calls[0].steps
    assert [(step.name, step.result) for step in steps] == [
        ("recover the quant state", repr(layer.quant_state)),
        ("ask for the backend's layout", "canonical, for reference"),
        ("bias dtype", "float32 [8]"),
        ("compute dtype", "bfloat16"),
        ("cast the operands", "bfloat16 [3, 64], bfloat16 [8]"),
        ("dispatch to matmul_4bit", "bfloat16 [3, 8]"),
        ("cast back", "float32 [3, 8]"),
    ]
    assert [step.ops for step in steps[:5]] == [[]] * 5
    assert str(steps[5].ops[0].call) == "gemm_4bit(M=3, N=8, K=64, bfloat16 on cpu, nf4, blocksize 64, nested absmax)"


def test_the_table_of_a_call_has_a_row_for_each_step_and_each_op():
    backend = refq4.register_backend(Loopback())
    backend.can_run = lambda call: "not today"
    refq4.set_backend("auto")
    layer = layer_of().train()  # on the stored layout, for which each call asks anew
    with torch.no_grad(), refq4.trace() as t:
        layer(torch.randn(3, 64))
        F.quantize_4bit(torch.ones(64))
    with torch.no_grad(), refq4.trace(keep_values=True) as lone:
        F.matmul_4bit(torch.randn(2, 64), layer.weight.stored(), layer.quant_state)
    (table,) = t._parts()
    assert [column.header for column in table.columns] == ["step", "decision", "because", "gives", "µs"]
    assert [column.overflow for column in table.columns[:4]] == ["fold"] * 4
    assert (table.columns[4].justify, table.title, table.title_justify) == ("right", t.calls[0].title, "left")
    wanted = []
    for step in t.calls[0].steps:
        wanted.append((f"{step.number} {step.name}", step.choice, step.why, step.result, f"{step.micros:.0f}"))
        for op in step.ops:
            assert ("loopback", "not today") in op.passed_over
            over = "".join(f"\n  passed over {name}: {why}" for name, why in op.passed_over)
            wanted.append(("", f"→ {op.op}", f"{op.backend}: {op.kernel}{over}", op.call, f"{op.micros:.0f}"))
    assert list(zip(*(column.cells for column in table.columns), strict=True)) == wanted
    assert [call.title for call in lone.calls] == ["matmul_4bit(x float32 [2, 64])"]
    assert "no call was recorded" in str(type(t)())


def test_nothing_is_recorded_before_after_or_in_another_thread():
    layer, x = layer_of(), torch.randn(1, 64)
    assert current() is None
    with refq4.trace() as t:
        thread = threading.Thread(target=lambda: layer(x))
        thread.start()
        thread.join()
    layer(x)
    assert (t.calls, t.ops, current()) == ([], [], None)


def test_a_trace_inside_a_trace_gets_the_inner_calls():
    layer, x = layer_of(), torch.randn(1, 64)
    with refq4.trace() as outer:
        with refq4.trace() as inner:
            layer(x)
        layer(x)
    assert (len(inner.calls), len(outer.calls)) == (1, 1)


def test_a_trace_ends_with_an_exception():
    with pytest.raises(ValueError, match="last dimension"), refq4.trace() as t:
        layer_of()(torch.randn(1, 65))
    assert current() is None
    assert len(t.calls) == 1


def test_tracing_changes_no_bits():
    layer, x = layer_of(), torch.randn(5, 64)
    wanted = layer(x)
    with refq4.trace(keep_values=True) as t:
        assert_same_bits(layer(x).detach(), wanted.detach())
    assert_same_bits(t.calls[0].steps[6].value, wanted.detach())


@pytest.mark.reference_only("it names its engine itself")
def test_steps_and_ops_take_the_time_between_two_looks_at_the_clock(monkeypatch, layer):
    ticks = itertools.count(0, 3_000_000)
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(ticks))
    with torch.no_grad(), refq4.use_backend("reference"), refq4.trace() as t:
        layer(A)
    (call,) = t.calls
    assert [op.micros for op in t.ops] == [3000.0]
    # each step ends with a look and one for the next; the product looks twice more
    assert [step.micros for step in call.steps] == [3000.0] * 5 + [9000.0] + [3000.0]


@pytest.mark.reference_only("what it checks is the same for every backend")
def test_steps_without_a_number_are_shown_without_one():
    table = refq4.nn.EmbeddingNF4(10, 64).to("cpu")
    with refq4.trace() as t:
        table(torch.tensor([1]))
    assert "embedding rows" in t.text()
    assert "0 embedding rows" not in t.text()
    assert sys.modules["refq4.trace"]._listeners == 0  # or every call from now on would look for one


# --- explain ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_explain_reports_error_bytes_and_flops(dtype):
    layer = layer_of(16, 128)
    x = torch.randn(4, 128, dtype=dtype)
    report = refq4.explain(layer, x)
    assert 0 <= report.error <= 2 * report.reference_error + report.allowed
    item = dtype.itemsize
    assert report.bytes_moved == {
        "weight": 16 * 128 // 2,
        "scales": layer.quant_state.nbytes(),
        "input": 4 * 128 * item,
        "bias": 16 * 4,
        "output": 4 * 16 * item,
    }
    assert report.flops == 2 * 4 * 16 * 128
    assert json.loads(json.dumps(report.to_dict()))["flops"] == report.flops
    assert report.largest_output == pytest.approx(float(layer(x).detach().abs().max()), rel=0.01)
    assert f"absolute error against fp64: {report.error:.3g}, of outputs up to {report.largest_output:.3g} (" in str(
        report
    )
    assert "bytes to move" in report._repr_html_()


def test_explain_sees_the_error_of_a_wrong_backend():
    class Off(Loopback):
        name = "off"

        def gemm_4bit(self, x, weight, bias):
            return super().gemm_4bit(x, weight, bias) + 0.5

    refq4.register_backend(Off())
    with refq4.use_backend("off"):
        report = refq4.explain(layer_of(), torch.randn(2, 64))
    assert report.error > 0.49 > report.reference_error


def test_explain_reports_the_second_call_and_what_the_first_input_decides():
    """The first call of a backend may compile or calibrate; here it sleeps."""
    calls = []

    class Slow(Loopback):
        name = "slow"

        def gemm_4bit(self, x, weight, bias):
            calls.append(x)
            if len(calls) == 1:
                time.sleep(0.2)
            return super().gemm_4bit(x, weight, bias)

    refq4.register_backend(Slow())
    layer = layer_of().train()
    refq4.set_backend("slow")
    with pytest.warns(UserWarning, match="float16") as caught:
        report = refq4.explain(layer, torch.randn(2, 64).half())
    again = refq4.explain(layer, torch.randn(2, 64).bfloat16())
    assert report.trace.calls[0].steps[5].micros < 1e5
    assert len(report.trace.calls) == 1
    assert len(caught) == 1
    assert [r.trace.calls[0].steps[3].choice for r in (report, again)] == ["as the input"] * 2
    assert not layer.awaits_first_input
    assert "the same 4-bit weight" in str(report)
    fresh = refq4.explain(layer_of(), torch.randn(2, 64))
    assert fresh.trace.calls[0].steps[3].choice == "inferred"


def test_explain_takes_an_empty_batch_and_a_layer_without_bias():
    report = refq4.explain(layer_of(bias=False), torch.randn(0, 64))
    assert (report.flops, report.error, report.reference_error, report.allowed) == (0, 0.0, 0.0, 0.0)
    assert report.bytes_moved == {
        "weight": 256, "scales": layer_of().quant_state.nbytes(), "input": 0, "bias": 0, "output": 0
    }  # fmt: skip


def test_explain_gives_the_references_error_and_the_smallest_bound_of_the_budget():
    layer, x = layer_of(compute_dtype=torch.bfloat16), torch.randn(4, 64).bfloat16()
    report = refq4.explain(layer, x)
    budget = error_budget(x, layer.weight, layer.quant_state, layer.bias)
    assert report.reference_error == float((budget.reference.double() - budget.oracle).abs().max()) > 0
    assert report.allowed == float(budget.allowed.min()) > 0
    figures = {"error", "reference_error", "allowed", "largest_output", "bytes_moved", "flops"}
    assert set(report.to_dict()) == {"trace"} | figures


# --- compare ----------------------------------------------------------------------------------------------------------


def test_compare_marks_the_first_step_that_differs_and_by_how_much():
    class Off(Loopback):
        name = "off"

        def gemm_4bit(self, x, weight, bias):
            return super().gemm_4bit(x, weight, bias) + 0.5

    refq4.register_backend(Off())
    refq4.register_backend(Loopback(own_layout=True))
    comparison = refq4.compare(layer_of(), torch.randn(2, 64), backends=["reference", "loopback", "off"])
    assert comparison.first_difference == {"off": (0, 5)}
    assert comparison.largest_difference("loopback") == 0
    assert comparison.largest_difference("off") == pytest.approx(0.5, abs=1e-5)
    text = str(comparison)
    assert "first difference, 0.5" in text
    assert "off: largest difference of the result 0.5" in text
    assert json.loads(json.dumps(comparison.to_dict()))["first_difference"] == {"off": [0, 5]}


def test_compare_names_the_layers_of_a_model_and_unfolds_the_first_that_differs():
    class Off(Loopback):
        name = "off"

        def gemm_4bit(self, x, weight, bias):
            return super().gemm_4bit(x, weight, bias) + (0.5 if weight.shape[0] == 32 else 0)

    refq4.register_backend(Off())
    sizes = (64, 64, 32, 64)
    layers = [refq4.nn.LinearNF4(k, n).to("cpu") for k, n in itertools.pairwise(sizes)]
    model = torch.nn.Sequential()
    for name, made in zip(("one", "two", "three"), layers, strict=True):
        model.add_module(name, made.eval())
    comparison = refq4.compare(model, torch.randn(2, 64), backends=["reference", "off"])
    assert comparison.names == {0: "one", 1: "two", 2: "three"}
    assert comparison.first_difference == {"off": (1, 5)}
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in comparison.text(200).splitlines() if "│" in line
    ]
    assert rows[0] == ["one", "the same bits", "the same bits"]
    assert rows[1][0] == "two"
    assert rows[1][2].startswith("differs by 0.5")
    assert [row[0][:1] for row in rows[2:9]] == list("1234567"), "the layer that differs first is unfolded"
    assert [row[0] for row in rows[9:]] == ["three"]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_compare_takes_every_available_backend_by_default_and_lists_who_could_not():
    backend = refq4.register_backend(Loopback())
    backend.can_run = lambda call: "not today"
    comparison = refq4.compare(layer_of(), torch.randn(2, 64))
    assert comparison.backends[0] == "reference"
    assert "loopback" in comparison.backends
    assert "not today" in comparison.errors["loopback"]
    assert "could not run it" in str(comparison)


def test_compare_needs_its_first_backend_and_known_names():
    backend = refq4.register_backend(Loopback())
    backend.can_run = lambda call: "not today"
    refq4.set_backend("auto")
    layer, x = layer_of(), torch.randn(2, 64)
    with pytest.raises(ValueError, match="'loopback', which the others are held to, can't run this"):
        refq4.compare(layer, x, backends=["loopback", "reference"])
    with pytest.raises(refq4.UnknownBackendError):
        refq4.compare(layer, x, backends=["reference", "nope"])


def test_compare_sees_nan_against_a_number_and_a_missing_step():
    class Nan(Loopback):
        name = "nan"

        def gemm_4bit(self, x, weight, bias):
            return super().gemm_4bit(x, weight, bias) * float("nan")

    refq4.register_backend(Nan())
    comparison = refq4.compare(layer_of(), torch.randn(2, 64), backends=["reference", "nan"])
    assert comparison.largest_difference("nan") == float("inf")
    only_on_reference = lambda x: layer(x) if refq4.get_backend() == "reference" else x  # noqa: E731
    layer = layer_of()
    comparison = refq4.compare(only_on_reference, torch.randn(2, 64), backends=["reference", "nan"])
    assert comparison.first_difference == {"nan": (0, 0)}
    assert "no such step" in str(comparison)


@pytest.mark.reference_only("it names its engine itself")
def test_a_comparison_names_each_backend_once_and_tells_all_it_knows(layer):
    with isolated_registry():
        refq4.register_backend(Recorder())
        report = refq4.compare(layer, A)
        assert len(set(report.backends)) == len(report.backends)
        assert report.backends[0] == "reference"
        told = refq4.compare(layer, A, backends=["reference", "recorder"]).to_dict()
        shown = refq4.compare(layer, A, backends=["reference", "recorder"]).text(width=200)
    assert told.keys() == {"backends", "errors", "names", "first_difference", "largest_difference", "traces"}
    assert "(recorder: loopback g" in shown
    assert refq4.compare(lambda: "same", backends=["reference"]).largest_difference("reference") == 0


@pytest.mark.reference_only("it names its engine itself")
def test_a_trace_that_ends_early_differs_where_it_ends(layer):
    with torch.no_grad(), refq4.use_backend("reference"), refq4.trace(keep_values=True) as whole:
        layer(A)
    with torch.no_grad(), refq4.use_backend("reference"), refq4.trace(keep_values=True) as part:
        layer(A)
    assert _first_difference(whole, part) is None
    del part.calls[0].steps[3:]
    assert _first_difference(whole, part) == (0, 3)


@pytest.mark.reference_only("it names its engine itself")
def test_a_backend_with_fewer_steps_or_calls_differs_where_they_end(layer):
    table = refq4.nn.EmbeddingNF4(10, 64).to("cpu")

    def fewer_steps(x: torch.Tensor) -> torch.Tensor:
        if registry.get_backend() != "reference":
            table(torch.tensor([1]))
            return x
        with torch.no_grad():
            layer(x)
        return x

    def fewer_calls(x: torch.Tensor) -> torch.Tensor:
        layer(x)
        if registry.get_backend() == "reference":
            layer(x)
        return x

    with isolated_registry():
        refq4.register_backend(Recorder())
        names = ["reference", "recorder"]
        assert refq4.compare(fewer_calls, A, backends=names).first_difference == {"recorder": (1, 0)}
        assert refq4.compare(fewer_steps, A, backends=names).first_difference["recorder"][0] == 0
