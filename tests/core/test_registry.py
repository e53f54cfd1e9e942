"""Finding backends, choosing one, and what is said when that fails."""

from __future__ import annotations

import ast
import asyncio
import contextvars
import importlib
import json
import os
import re
import subprocess
import sys
import threading
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback import Loopback

import refq4
import refq4.functional as F
from refq4 import registry
from refq4.backend import OPS, Backend, Call
from refq4.internals import discovery, remedies
from refq4.reference import ReferenceBackend
from refq4.testing import assert_same_bits
from refq4.testing.isolation import isolated_registry, know

ROOT = Path(refq4.__file__).parent
A = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def isolated():
    with isolated_registry():  # nothing chosen, and no backend but the reference
        for name in refq4.list_backends():
            if name != "reference":
                refq4.unregister_backend(name)
        yield


@pytest.fixture
def loopback() -> Loopback:
    backend = Loopback()
    refq4.register_backend(backend)
    return backend


def call(op: str = "gemm_4bit", **changes) -> Call:
    settings = {"device": "cpu", "dtype": torch.float32, "m": 2, "n": 8, "k": 64, "blocksize": 64, "codebook": "nf4"}
    return Call(op, **(settings | changes))


# --- the order of the five places -------------------------------------------------------------------------------------


def test_the_call_wins_over_the_block_over_the_process_over_the_environment(loopback, monkeypatch):
    x = torch.randn(4, 64)
    monkeypatch.setenv("REFQ4_BACKEND", "loopback")
    assert refq4.get_backend() == "loopback"
    refq4.set_backend("reference")
    assert refq4.get_backend() == "reference"
    with refq4.use_backend("loopback"):
        assert refq4.get_backend() == "loopback"
        with refq4.use_backend("auto"):
            assert refq4.get_backend() == "auto"
        F.quantize_4bit(x, backend="reference")
        assert loopback.seen["quantize_4bit"] == 0
        F.quantize_4bit(x)
        assert loopback.seen["quantize_4bit"] == 1
    assert refq4.get_backend() == "reference"


def test_use_backend_decorates_a_function(loopback):
    @refq4.use_backend("loopback")
    def inside() -> str:
        return refq4.get_backend()

    assert (inside(), refq4.get_backend()) == ("loopback", "auto")


def test_use_backend_is_undone_by_an_exception(loopback):
    with pytest.raises(KeyError), refq4.use_backend("loopback"):
        raise KeyError
    assert refq4.get_backend() == "auto"


def test_a_new_thread_does_not_inherit_the_block_unless_its_context_is_copied(loopback):
    seen = []
    with refq4.use_backend("loopback"):
        context = contextvars.copy_context()
        for target in (lambda: seen.append(refq4.get_backend()), lambda: seen.append(context.run(refq4.get_backend))):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
    assert seen == ["auto", "loopback"]


def test_two_asyncio_tasks_have_their_own_choice(loopback):
    async def task(name: str) -> str:
        with refq4.use_backend(name):
            await asyncio.sleep(0)
            return refq4.get_backend()

    async def both() -> list[str]:
        return await asyncio.gather(task("loopback"), task("reference"))

    assert asyncio.run(both()) == ["loopback", "reference"]


@pytest.mark.parametrize("value", ["cuda-emulatr", "0", "Reference"])
def test_a_wrong_environment_variable_is_an_error_that_names_it(monkeypatch, value):
    monkeypatch.setenv("REFQ4_BACKEND", value)
    with pytest.raises(refq4.UnknownBackendError, match=rf"REFQ4_BACKEND='{value}'"):
        F.quantize_4bit(torch.ones(64))


# --- auto -------------------------------------------------------------------------------------------------------------


def test_auto_takes_the_highest_priority_that_can_run_the_call_and_says_who_was_passed_over(loopback):
    loopback.can_run = lambda c: "it takes no single token" if c.m == 1 else None
    assert registry.resolve(call(m=2), "auto")[0] is loopback
    backend, passed_over = registry.resolve(call(m=1), "auto")
    assert backend.name == "reference"
    assert ("loopback", "it takes no single token") in passed_over


def test_auto_passes_over_an_unavailable_backend(loopback):
    class Away(Loopback):
        name, priority = "away", 90

        def available(self):
            return "no such processor; run it elsewhere"

    refq4.register_backend(Away())
    backend, passed_over = registry.resolve(call(), "auto")
    assert backend is loopback
    assert passed_over == [("away", "no such processor; run it elsewhere")]
    with pytest.raises(refq4.BackendUnavailableError, match="no such processor; run it elsewhere"):
        refq4.set_backend("away")


def test_auto_without_any_that_can_is_an_error_with_every_reason():
    with pytest.raises(refq4.BackendUnsupportedError, match="reference: meta tensors hold no values"):
        registry.resolve(call(device="meta"), "auto")


def test_a_backend_chosen_by_name_raises_for_what_it_cant_do(loopback):
    loopback.can_run = lambda c: "only odd N"
    with pytest.raises(refq4.BackendUnsupportedError, match=r"'loopback' can't run gemm_4bit\(M=2, N=8.*only odd N"):
        registry.resolve(call(), "loopback")


def test_an_error_in_the_middle_of_an_op_keeps_its_type_and_says_whose_it_was(loopback):
    def broken(*args):
        raise ZeroDivisionError("inside the kernel")

    loopback.quantize_4bit = broken
    with pytest.raises(ZeroDivisionError, match="inside the kernel") as caught:
        F.quantize_4bit(torch.ones(64), backend="loopback")
    assert "backend 'loopback' ran quantize_4bit" in caught.value.__notes__[0]


# --- registering ------------------------------------------------------------------------------------------------------


def test_every_op_reaches_a_plug_in(loopback):
    with refq4.use_backend("loopback"), torch.no_grad():
        layer = refq4.nn.LinearNF4(64, 8).to("cpu")
        layer(torch.randn(1, 64))
        layer(torch.randn(2, 64))
        F.dequantize_4bit(layer.weight, layer.quant_state)
        F.dequantize_blockwise(*F.quantize_blockwise(torch.ones(64)))
    assert set(OPS) <= set(loopback.seen)


def test_the_nearest_name_is_suggested():
    with pytest.raises(refq4.UnknownBackendError, match="Did you mean 'reference'"):
        refq4.set_backend("refernce")
    with pytest.raises(refq4.UnknownBackendError, match="unknown backend 'quux'"):
        F.quantize_4bit(torch.ones(64), backend="quux")
    with pytest.raises(refq4.UnknownBackendError, match="unknown backend 'quux'"):
        refq4.backend_info("quux")
    with pytest.raises(refq4.UnknownBackendError, match="unknown backend 'quux'"):
        refq4.unregister_backend("quux")
    for ask in (refq4.backend_info, refq4.unregister_backend):
        with pytest.raises(refq4.UnknownBackendError, match=r"unknown backend 'auto'\. Known: (?!.*auto)"):
            ask("auto")


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        (object(), TypeError, "an instance of refq4.backend.Backend"),
        (Loopback, TypeError, "an instance of refq4.backend.Backend"),
        (Backend(), ValueError, "needs a name"),
    ],
    ids=["not a backend", "a class", "no name"],
)
def test_registering_something_wrong_says_what_is_wanted(wrong, error, says):
    with pytest.raises(error, match=says):
        refq4.register_backend(wrong)


def test_a_name_is_taken_over_only_on_request(loopback):
    with pytest.raises(ValueError, match="registered already; pass replace=True"):
        refq4.register_backend(Loopback())
    other = refq4.register_backend(Loopback(), replace=True)
    assert registry.resolve(call(), "loopback")[0] is other


SELF_REGISTERED = """
import refq4
from refq4.reference import ReferenceBackend

class {kind}(ReferenceBackend):
    name = "twice"

made = refq4.register_backend({kind}())
"""


@pytest.mark.parametrize("first", ["entry point", "module"])
def test_an_entry_point_whose_module_also_registers_the_class_is_one_backend(first, tmp_path, monkeypatch):
    twice_known("Mine", tmp_path, monkeypatch)
    if first == "module":
        importlib.import_module("twice_known")
    assert "twice" in refq4.list_backends()
    made = sys.modules["twice_known"].made
    assert registry.resolve(call(), "twice")[0] is made
    assert refq4.backend_info("twice")["found_in"] == "entry point twice_known:Mine"
    with pytest.raises(ValueError, match="by the entry point twice_known:Mine; drop one of the two"):
        refq4.register_backend(type(made)())


def test_an_entry_point_whose_module_registers_another_class_says_to_drop_one(tmp_path, monkeypatch):
    twice_known("Other", tmp_path, monkeypatch)
    reason = refq4.backend_info("twice")["reason"]
    assert "registered already, by the entry point twice_known:Mine; drop one of the two" in reason


def twice_known(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point twice_known:Mine, in a module that registers a backend of the same name when it is imported."""
    (tmp_path / "twice_known.py").write_text(SELF_REGISTERED.format(kind=kind))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "twice_known", raising=False)
    point = EntryPoint("twice", "twice_known:Mine", "refq4.backends")
    monkeypatch.setattr(discovery, "entry_points", lambda group: [point])
    know(discovery.installed())


def test_the_error_for_an_unknown_backend_says_how_one_becomes_known():
    with pytest.raises(refq4.UnknownBackendError, match=r"register_backend.*entry point.*--import file\.py.*pytest -p"):
        refq4.set_backend("mine")


def test_auto_imports_nothing_that_it_may_not_take(monkeypatch):
    points = {
        "refq4.backends": [EntryPoint("reference", "refq4.reference:ReferenceBackend", "refq4.backends")],
        "refq4.backends.by_name": [EntryPoint("away", "no_such_module:Backend", "refq4.backends.by_name")],
    }
    monkeypatch.setattr(discovery, "entry_points", lambda group: points[group])
    know(discovery.installed())
    assert refq4.list_backends() == ["reference", "away"]
    F.quantize_4bit(torch.ones(64))
    assert discovery.entries["away"].problem is None, "it has not been imported"
    with pytest.raises(refq4.BackendUnavailableError, match="importing it failed: ModuleNotFoundError"):
        refq4.set_backend("away")


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("no_such_module:Backend", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("builtins:dict", r"TypeError: builtins:dict makes \{\}, which is no refq4.backend.Backend"),
    ],
    ids=["no module", "no backend"],
)
def test_a_plug_in_that_fails_to_import_is_listed_with_its_error_and_breaks_nothing(monkeypatch, value, why):
    points = [
        EntryPoint("broken", value, "refq4.backends"),
        EntryPoint("reference", "refq4.reference:ReferenceBackend", "refq4.backends"),
    ]
    monkeypatch.setattr(discovery, "entry_points", lambda group: points)
    know(discovery.installed())
    assert refq4.list_backends() == ["broken", "reference"]
    info = refq4.backend_info("broken")
    assert not info["available"]
    assert re.search(why, info["reason"])
    F.quantize_4bit(torch.ones(64))
    with pytest.raises(refq4.BackendUnavailableError, match=f"importing it failed: {why}"):
        refq4.set_backend("broken")


def test_a_plug_in_that_fails_when_asked_whether_it_is_available_is_listed_with_its_error():
    class Nervous(Loopback):
        name = "nervous"

        def available(self):
            raise OSError("driver says no")

    refq4.register_backend(Nervous())
    assert "OSError: driver says no" in refq4.backend_info("nervous")["reason"]
    F.quantize_4bit(torch.ones(64))


def test_an_uninstalled_checkout_finds_no_backends_and_hints_at_installing(monkeypatch):
    monkeypatch.setattr(discovery, "entry_points", lambda group: [])
    know(discovery.installed())
    with pytest.raises(refq4.BackendUnavailableError, match=re.escape(remedies.install())):
        F.quantize_4bit(torch.ones(64))
    with pytest.raises(refq4.UnknownBackendError, match=re.escape(remedies.install())):
        refq4.set_backend("reference")


def test_backend_info_tells_where_it_was_found_and_what_it_can_do(loopback):
    info = refq4.backend_info("reference")
    assert info["found_in"] == "entry point refq4.reference:ReferenceBackend"
    assert info["ops"] == list(OPS)
    assert json.loads(json.dumps(info)) == info
    assert "register_backend(loopback.Loopback)" in refq4.backend_info("loopback")["found_in"]


def test_backend_info_of_an_unavailable_backend_still_tells_what_it_would_do(loopback):
    loopback.available = lambda: "it is away; call it back"
    info = refq4.backend_info("loopback")
    assert (info["available"], info["reason"]) == (False, "it is away; call it back")
    assert (info["priority"], info["devices"]) == (50, ["cpu"])
    assert info["ops"] == list(OPS)
    assert info["description"] == "counts what reaches it"


def test_a_backend_says_no_to_ops_it_has_not_and_devices_it_is_not_on():
    class Half(Backend):
        name = "half"
        gemv_4bit = ReferenceBackend.gemv_4bit

    half = Half()
    assert half.can_run(call("gemv_4bit")) is None
    assert half.can_run(call("gemm_4bit")) == "it has no gemm_4bit"
    assert "computes on cpu, and the tensors are on cuda" in str(half.can_run(call("gemv_4bit", device="cuda")))
    assert half.prepare_weight(None) is None
    for op, arguments in {"quantize_4bit": 3, "dequantize_4bit": 2, "gemm_4bit": 3, "restore_weight": 1}.items():
        with pytest.raises(refq4.BackendUnsupportedError, match=f"'half' has no {op}"):
            getattr(half, op)(*[None] * arguments)
    with pytest.raises(refq4.BackendUnsupportedError, match="has no quantize_blockwise"):
        half.quantize_blockwise(None, None, 64)
    with pytest.raises(refq4.BackendUnsupportedError, match="has no dequantize_blockwise"):
        half.dequantize_blockwise(None, None, None, 64, torch.float32)
    with pytest.raises(refq4.BackendUnsupportedError, match="has no gemv_4bit"):
        Backend().gemv_4bit(None, None, None)


@pytest.mark.reference_only("it names its engine itself")
def test_a_backend_is_asked_once_whether_it_is_available_and_need_not_describe_itself():
    asked = []

    class Quiet(ReferenceBackend):
        name, priority = "quiet", -1
        description = Backend.description

        def available(self) -> None:
            asked.append(self)

    with isolated_registry():
        refq4.register_backend(Quiet())
        with refq4.use_backend("quiet"):
            for _ in range(3):
                F.quantize_4bit(A)
        assert registry.backend_info("quiet")["description"] == ""
    assert len(asked) == 1


# --- plug-ins that raise ----------------------------------------------------------------------------------------------

CALLED = ["quantize_4bit", "quantize_blockwise", "dequantize_4bit", "gemv_4bit", "gemm_4bit", "prepare_weight"]
N, K = 96, 128


class BreaksError(Exception):
    """What a plug-in of somebody else raises."""


def layer_of(**settings: Any) -> refq4.nn.Linear4bit:
    torch.manual_seed(5)
    return refq4.nn.LinearNF4(K, N, **settings).to("cpu").eval()


@pytest.mark.reference_only("it registers a backend that breaks")
@pytest.mark.parametrize("op", [*CALLED, "restore_weight"])
@pytest.mark.parametrize("error", [BreaksError, KeyboardInterrupt])
def test_a_plug_in_that_raises_in_the_middle_of_an_op_leaves_the_layer_usable(op, error):
    plug_in = refq4.register_backend(Loopback(own_layout=True))
    whole, layer = layer_of(), refq4.nn.LinearNF4(K, N)
    layer.load_state_dict({"weight": F.dequantize_4bit(whole.weight.detach(), whole.quant_state), "bias": whole.bias})
    x, working = torch.randn(3, K), getattr(plug_in, op)

    def breaks(*args: Any) -> Any:
        working(*args)
        raise error("in the middle of it")

    def use() -> None:
        with refq4.use_backend("loopback"), torch.no_grad():
            layer.to("cpu").eval()
            F.dequantize_4bit(*F.quantize_4bit(torch.ones(64)))
            layer(x[:1])
            layer(x)
            layer.train()

    setattr(plug_in, op, breaks)
    with pytest.raises(error, match="in the middle of it"):
        use()
    setattr(plug_in, op, working)
    use()  # the very same layer, with the plug-in mended
    with refq4.use_backend("reference"), torch.no_grad():
        y = layer.eval()(x)
        fresh = refq4.nn.LinearNF4(K, N)
        fresh.load_state_dict(layer.state_dict())
        assert_same_bits(y, fresh.eval()(x))


@pytest.mark.reference_only("it registers a backend that breaks")
def test_auto_does_not_hide_an_error_in_the_middle_of_an_op_behind_another_backend():
    plug_in = refq4.register_backend(Loopback())
    plug_in.priority = 1000

    def breaks(*args: Any) -> Any:
        raise BreaksError("in the middle of it")

    plug_in.gemm_4bit = breaks
    with pytest.raises(BreaksError) as caught, torch.no_grad():
        layer_of()(torch.randn(3, K))
    assert "raised while backend 'loopback' ran gemm_4bit" in caught.value.__notes__[0]


# --- who imports whom -------------------------------------------------------------------------------------------------


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            found |= {prefix} | {f"{prefix}.{alias.name}".replace("..", ".") for alias in node.names}
    return found


def test_the_core_imports_no_backend():
    for path in ROOT.rglob("*.py"):
        for name in imports(path):
            peers = () if path.parent.name == "bench" or path.name == "peer.py" else ("bitsandbytes",)
            backends = ("refq4_cpu", "refq4_cuda", "refq4_triton")
            assert not name.startswith((*backends, *peers)), f"{path.name} imports {name}"


def test_the_core_reaches_the_reference_through_the_registry_only():
    allowed = {"reference.py"}
    for path in ROOT.glob("*.py"):
        if path.name not in allowed:
            assert not any(name.lstrip(".").startswith("reference") for name in imports(path)), path.name


def test_the_layers_know_no_device():
    source = "".join((ROOT / name).read_text() for name in ("nn/__init__.py", "internals/holder.py", "pipeline.py"))
    for word in ("is_cuda", "torch.cuda", "avx", '== "cpu"', '== "cuda"'):
        assert word not in source, word


def test_backends_import_contract_codebooks_and_layout_only():
    allowed = {"refq4.backend", "refq4.codebooks", "refq4.layout", "refq4.internals.buildcache"}
    allowed |= {"refq4.internals.remedies"}  # for messages: what to install, and from where
    allowed |= {"refq4.internals.shown"}  # by which a report prints and shows itself
    paths = [
        path for path in (ROOT.parent / "backends").rglob("*.py") if path.name != "__main__.py"
    ]  # those are programs
    assert {path.parts[-2] for path in paths} >= {"refq4_cpu", "refq4_cuda", "refq4_triton", "emulator"}
    for path in paths:
        for name in imports(path):
            if name.split(".")[0] == "refq4":
                assert any(name == a or name.startswith(f"{a}.") for a in allowed), f"{path} imports {name}"
            others = {"refq4_cpu", "refq4_cuda", "refq4_triton"} - set(path.parts)
            if path.parts[-2:] == ("refq4_triton", "emulated.py") and name.startswith("refq4_cuda.emulator"):
                continue  # it takes anybody's PTX, and is no part of the CUDA backend's own work
            assert name.split(".")[0] not in others, f"{path} imports {name}"


def test_importing_refq4_needs_no_backend_no_cuda_and_none_of_the_extras():
    # torch itself imports cuda.bindings where that is installed: what counts is what refq4 adds
    probe = (
        "import sys, torch; before = set(sys.modules); import refq4; added = set(sys.modules) - before; "
        "print([m for m in sys.argv[1:] if m in added], torch.cuda.is_initialized())"
    )
    heavy = ["refq4_cpu", "refq4_cuda", "refq4_triton", "rich", "cuda"]
    heavy += ["transformers", "sentence_transformers", "bitsandbytes"]
    run = subprocess.run(
        [sys.executable, "-c", probe, *heavy], capture_output=True, text=True, env=os.environ | {"REFQ4_BACKEND": ""}
    )
    assert run.stdout.strip() == "[] False", run.stdout + run.stderr


def test_a_backend_that_says_nothing_of_fp64_is_not_given_it():
    class Float32Only(Backend):
        name = "float32-only"

        def gemv_4bit(self, x, weight, bias):
            return (x.float() @ ReferenceBackend().dequantize_4bit(weight, torch.float32).T).to(x.dtype)

    layer, x = refq4.nn.LinearNF4(64, 8, bias=False).to("cpu").eval(), torch.randn(1, 64).double()
    with isolated_registry(), torch.no_grad():
        exact = layer(x)
        refq4.register_backend(Float32Only())
        assert torch.equal(layer(x), exact)
        assert not torch.equal(layer(x.float()).double(), exact)
        with pytest.raises(refq4.BackendUnsupportedError, match=r"it does not compute in torch\.float64"):
            refq4.matmul_4bit(x, layer.weight, layer.weight.quant_state, backend="float32-only")
