"""A layer in several threads, or in the child of a fork, gives the results that it gives alone.

Which test holds which fault: docs/hardening.md. A fork needs a process of its own; those tests run as scripts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from functools import partial
from typing import Any

import cpu_tiers
import pytest
import torch
from loopback import Loopback
from patience import BUSY
from threads import faults_of

import refq4
from refq4.internals.prepared import MOST_RESTORES
from refq4.testing import assert_same_bits
from refq4.testing.isolation import isolated_registry

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
    wanted: list[list[torch.Tensor]] = [[] for _ in inputs]
    for restores in (0, MOST_RESTORES):  # after its last restore the weight stays as stored, and sums in another order
        for name in names:
            refq4.restore(layer)
            layer.weight._restores = restores
            with refq4.use_backend(name), torch.no_grad():
                for x, results in zip(inputs, wanted, strict=True):
                    results.append(layer(x))
    refq4.restore(layer)
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
@pytest.mark.parametrize("calls", [1000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tier", cpu_tiers.TIERS)
def test_threads_get_no_result_that_no_backend_gives_alone_while_another_switches(tier, calls, request):
    cpu_tiers.require(tier, request)
    env = os.environ | cpu_tiers.environment(tier)
    done = subprocess.run(
        [sys.executable, "-c", SWITCHING, str(calls)], capture_output=True, text=True, timeout=10 * BUSY, env=env
    )
    assert done.returncode == 0, done.stderr[-2000:]
    foreign, ran, *_ = done.stdout.split()
    assert (foreign, ran) == ("0", tier)


@pytest.mark.reference_only("it compares bits of backends that share their arithmetic")
def test_threads_share_a_layer_while_another_switches_backends():
    refq4.register_backend(Loopback(own_layout=True))
    layer = refq4.nn.LinearNF4(64, 8).to("cpu").eval()
    inputs = [torch.randn(1 + i % 3, 64) for i in range(8)]
    with torch.no_grad():
        wanted = [layer(x) for x in inputs]

    def work(x: torch.Tensor, y: torch.Tensor) -> None:
        with torch.no_grad():
            for _ in range(100):
                if not torch.equal(layer(x), y):
                    raise ValueError("another result")

    def switch(done: threading.Event) -> None:
        while not done.is_set():
            for name in ("loopback", "reference", "auto"):
                refq4.set_backend(name)

    jobs = [partial(work, *pair) for pair in zip(inputs, wanted, strict=True)]
    assert faults_of(jobs, meanwhile=switch) == []


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
