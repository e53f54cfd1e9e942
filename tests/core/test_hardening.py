"""What goes wrong around a layer: threads, forks, plug-ins that raise, pickles, a cache that others could have written.

Which test holds which fault: docs/hardening.md. A fork or a crash needs a process of its own; those run as scripts.
"""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import cpu_tiers
import pytest
import torch
from loopback import Loopback
from patience import BUSY
from refq4_cpu import build
from threads import faults_of

import refq4
import refq4.functional as F
from refq4.internals.buildcache import CacheError, cache_directory, cached
from refq4.registry import isolated_registry
from refq4.testing import assert_same_bits

N, K = 96, 128


@pytest.fixture(autouse=True)
def own_registry():
    with isolated_registry():
        yield


def layer_of(**settings: Any) -> refq4.nn.Linear4bit:
    torch.manual_seed(5)
    return refq4.nn.LinearNF4(K, N, **settings).to("cpu").eval()


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.reference_only("it switches backends itself")
def test_threads_hammer_one_layer_while_another_switches_backends_and_get_the_result_of_one_of_them():
    refq4.register_backend(Loopback(own_layout=True))
    names = ["loopback", "reference", *(["cpu"] if refq4.backend_info("cpu")["available"] else [])]
    layer, inputs = layer_of(), [torch.randn(1 + i % 3, K) for i in range(6)]
    assert layer.weight.numel() >= 4096, "the bytes go to and fro between the layer and the backends' layouts"
    wanted = []
    for x in inputs:
        with torch.no_grad():
            wanted.append([])
            for name in names:
                with refq4.use_backend(name):
                    wanted[-1].append(layer(x))
    saved = layer.state_dict()

    def hammer(x: torch.Tensor, allowed: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for _ in range(30):
                y = layer(x)
                if not any(torch.equal(y, one) for one in allowed):
                    raise ValueError("another result")

    def switch(done: threading.Event) -> None:
        while not done.is_set():
            for name in names:
                refq4.set_backend(name)
                done.wait(0.001)  # the lock of the interpreter is for those who multiply

    jobs = [partial(hammer, *pair) for pair in zip(inputs, wanted, strict=True)]
    assert faults_of(jobs, meanwhile=switch) == []
    for key, value in layer.state_dict().items():
        assert_same_bits(value, saved[key], key)


SWITCHING = """
import sys, threading, torch, refq4
calls = int(sys.argv[1])
torch.set_num_threads(1)
torch.manual_seed(0)
layer = refq4.nn.LinearNF4(64, 64).to("cpu").eval()
inputs = [torch.randn(1 + i % 3, 64) for i in range(4)]
allowed = [[] for _ in inputs]
for state in (refq4.prepare, refq4.restore, lambda layer: setattr(layer.weight, "_restores", 99)):  # laid out, or not
    for name in ("reference", "cpu"):
        with refq4.use_backend(name), torch.no_grad():
            state(layer)
            for x, results in zip(inputs, allowed):
                results.append(layer(x))
layer.weight._restores = 0
foreign, done = [], threading.Event()

def hammer(x, results):
    with torch.no_grad():
        for i in range(calls // len(inputs)):
            if i % 100 == 0:
                layer.weight._restores = 0  # or it would stay as stored from the third switch on
            y = layer(x)
            if not any(torch.equal(y, result) for result in results):
                foreign.append(y)

def switch():
    while not done.is_set():
        for name in ("reference", "cpu"):
            refq4.set_backend(name)
            done.wait(0.0005)

threads = [threading.Thread(target=hammer, args=pair) for pair in zip(inputs, allowed)]
switching = threading.Thread(target=switch)
for thread in (switching, *threads):
    thread.start()
for thread in threads:
    thread.join()
done.set()
switching.join()
print(len(foreign), refq4.backend_info("cpu")["tier"])
"""


@pytest.mark.reference_only("it switches backends itself")
@pytest.mark.parametrize("calls", [4000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tier", build.TIERS)
def test_threads_get_no_result_that_no_backend_gives_alone_while_another_switches(tier, calls, request):
    cpu_tiers.require(tier, request)
    env = os.environ | cpu_tiers.environment(tier)
    done = subprocess.run(
        [sys.executable, "-c", SWITCHING, str(calls)], capture_output=True, text=True, timeout=10 * BUSY, env=env
    )
    assert done.returncode == 0, done.stderr[-2000:]
    foreign, ran, *_ = done.stdout.split()
    assert (foreign, ran) == ("0", tier)


# --- fork -------------------------------------------------------------------------------------------------------------

FORK = """
import os, sys, torch, refq4
torch.set_num_threads(2)
refq4.set_backend(sys.argv[1])
torch.manual_seed(0)
layer = refq4.nn.LinearNF4(512, 768).to("cpu").eval()
x, one = torch.randn(16, 512), torch.randn(1, 512)
def work():
    with torch.no_grad():
        y, z = layer(x), layer(one)
    g = x.clone().requires_grad_()
    layer(g).sum().backward()
    return y, z, g.grad, layer.state_dict()["weight"], refq4.functional.quantize_4bit(x)[0]
before = work()
child = os.fork()
if child == 0:
    try:
        torch.set_num_threads(1)  # torch's pool does not survive a fork; its own workers do the same first
        os._exit(0 if all(map(torch.equal, work(), before)) else 3)
    finally:
        os._exit(4)
assert os.waitpid(child, 0)[1] == 0, "the child of a fork computes something else, or nothing"
assert all(map(torch.equal, work(), before)), "the parent of a fork does"
print("clean")
"""


@pytest.mark.reference_only("it names its backends itself")
@pytest.mark.parametrize("backend", ["reference", "cpu", "auto"])
def test_the_child_of_a_fork_uses_the_layer_that_its_parent_used(backend):
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork; run it on Linux or macOS")
    if backend == "cpu" and (reason := refq4.backend_info("cpu")["reason"]) is not None:
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, backend], capture_output=True, text=True, timeout=BUSY, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "clean"


# --- plug-ins that raise ----------------------------------------------------------------------------------------------

OPS = ["quantize_4bit", "quantize_blockwise", "dequantize_4bit", "gemv_4bit", "gemm_4bit", "prepare_weight"]


class BreaksError(Exception):
    """What a plug-in of somebody else raises."""


@pytest.mark.reference_only("it registers a backend that breaks")
@pytest.mark.parametrize("op", [*OPS, "restore_weight"])
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


# --- pickles ----------------------------------------------------------------------------------------------------------


def through_torch_save(value: Any, **settings: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **settings)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "prepared"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "double quantisation"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_weights_and_state_dicts_survive_torch_save_with_weights_only(storage, nested, used):
    if used:
        refq4.set_backend(refq4.register_backend(Loopback(own_layout=True)).name)
    layer, x = layer_of(quant_storage=storage, compress_statistics=nested), torch.randn(3, K)
    y = layer(x).detach()
    weight = through_torch_save(layer.weight, weights_only=True)
    assert weight.quant_state == layer.weight.quant_state
    assert_same_bits(weight.detach(), layer.weight.stored())
    fresh = refq4.nn.LinearNF4(K, N)
    fresh.load_state_dict(through_torch_save(layer.state_dict(), weights_only=True))
    assert_same_bits(fresh(x).detach(), y)


def test_a_pickled_layer_is_code_which_weights_only_refuses_and_who_trusts_it_may_load():
    layer, x = layer_of(), torch.randn(3, K)
    with pytest.raises(pickle.UnpicklingError, match=r"refq4\.nn\.LinearNF4"):
        through_torch_save(layer, weights_only=True)
    trusted = through_torch_save(layer, weights_only=False)
    assert_same_bits(trusted(x).detach(), layer(x).detach())


def test_a_pickled_weight_whose_state_was_spoilt_is_refused_where_it_is_used():
    layer = layer_of()
    spoilt = layer.weight.quant_state.copy()
    spoilt.absmax = spoilt.absmax[:1].clone()
    layer.weight.quant_state = layer.quant_state = spoilt
    weight = through_torch_save(layer.weight, weights_only=True)
    with pytest.raises(ValueError, match="needs 192 uint8 elements in absmax, it has uint8"):
        F.matmul_4bit(torch.randn(1, K), weight, weight.quant_state)


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REFQ4_CACHE_DIR", str(tmp_path / "cache"))
    return cache_directory("cpu")


class Builder:
    def __init__(self) -> None:
        self.times = 0

    def __call__(self, target: Path) -> None:
        self.times += 1
        target.write_text("built by us")


@pytest.mark.parametrize("which", ["", ".sha256"], ids=["the file", "its digest"])
@pytest.mark.parametrize("mode", [0o666, 0o622, 0o660], ids=oct)
def test_a_cached_file_that_others_can_write_to_is_built_again(directory, which, mode):
    build = Builder()
    path = cached(directory, "a.so", build)
    path.with_name(path.name + which).chmod(mode)
    assert cached(directory, "a.so", build).read_text() == "built by us"
    assert build.times == 2
    cached(directory, "a.so", build)
    assert build.times == 2, "and is then as it should be"


def test_what_is_built_under_a_lax_umask_is_not_writable_by_others(directory):
    old = os.umask(0)
    try:
        path, build = cached(directory, "a.so", build := Builder()), build
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o022 == 0
    cached(directory, "a.so", build)
    assert build.times == 1


@pytest.mark.parametrize("which", ["", ".sha256"], ids=["the file", "its digest"])
def test_a_cached_file_of_another_user_is_built_again(directory, which):
    needs_root()
    build = Builder()
    path = cached(directory, "a.so", build)
    os.chown(path.with_name(path.name + which), 12345, -1)
    cached(directory, "a.so", build)
    assert build.times == 2
    assert path.stat().st_uid == os.getuid()


@pytest.mark.parametrize("level", ["the root", "the kind's own"])
def test_a_cache_directory_of_another_user_is_refused(directory, level):
    needs_root()
    os.chown(directory if level == "the kind's own" else directory.parent, 12345, -1)
    with pytest.raises(CacheError, match=r"belongs to another user. Set REFQ4_CACHE_DIR to a directory of yours"):
        cache_directory("cpu")


def needs_root() -> None:
    if not hasattr(os, "getuid") or os.getuid() != 0:
        pytest.skip("only root can give a file to another user: run this test as root, in a container")


@pytest.mark.parametrize("which", ["", ".sha256"], ids=["the file", "its digest"])
@pytest.mark.parametrize("content", [b"", b"built", b"\xff\xfe"], ids=["emptied", "truncated", "replaced"])
def test_a_cached_file_that_is_not_what_was_built_is_built_again(directory, which, content):
    build = Builder()
    path = cached(directory, "a.so", build)
    path.with_name(path.name + which).write_bytes(content)
    assert cached(directory, "a.so", build).read_text() == "built by us"
    assert build.times == 2
