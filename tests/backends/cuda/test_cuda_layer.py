"""A layer on the CUDA backend: how many calls it takes, what it keeps, and how its counters are given out.

The launches go through cuda-python to the driver of ``fake_cuda.c`` (``tests/conftest.py``), or into the emulator.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from ctypes import sizeof
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from patience import BUSY

import refq4
from refq4.backend import PreparedWeight
from refq4.nn import LinearNF4

pytest.importorskip("refq4_cuda", reason="the package refq4_cuda is not installed: pip install -e .")
pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-python is not installed: pip install -e '.[test]'")
from refq4_cuda import CudaEmulatorBackend, stored
from refq4_cuda.arguments import ProductArguments
from refq4_cuda.counters import GRAPHS, REGION, REGIONS, Counters

pytestmark = pytest.mark.reference_only("it names its backends itself")

_PARTIAL, _ARRIVED = ProductArguments.partial.offset, ProductArguments.arrived.offset
WEIGHT, PARTIAL = slice(24, _PARTIAL), slice(_PARTIAL, _ARRIVED)
ARRIVED, REST = slice(_ARRIVED, _ARRIVED + 8), slice(_ARRIVED + 8, None)

COUNTED = """
import json, sys, torch
torch._C._cuda_getCurrentRawStream = lambda index: 0x55 + index
torch._C._cuda_getDevice = lambda: 0
import refq4
from refq4_cuda import CudaBackend, driver

class Fake(CudaBackend):
    name, devices = "fake", ("cpu",)
    def available(self):
        return None

refq4.register_backend(Fake())
gpu = driver.device(0)
gpu._driver.cuCtxPushCurrent(gpu._context)  # as torch leaves it
counts = {}
with torch.no_grad(), refq4.use_backend("fake"):
    for bias in (False, True):
        with refq4.use_backend("reference"):
            layer = refq4.nn.LinearNF4(4096, 4096, bias=bias, compute_dtype=torch.bfloat16)
            layer = layer.bfloat16().to("cpu").eval()
        for m in (1, 8, 64):
            x, calls = torch.randn(m, 4096).bfloat16(), []
            for _ in range(3):
                layer(x)
            def count(frame, event, function):
                if event in ("call", "c_call"):
                    calls.append(frame.f_code.co_qualname if event == "call" else str(function))
            sys.setprofile(count)
            layer(x)
            sys.setprofile(None)
            counts[f"{m} {bias}"] = calls[:-1]
print(json.dumps(counts))
"""


@pytest.fixture(scope="module")
def counted(fake_driver: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[str]], list[str]]:
    """The calls of a warm forward by tokens and bias, and what the driver was asked."""
    log = tmp_path_factory.mktemp("counted") / "log"
    environment = os.environ | {"LD_LIBRARY_PATH": str(fake_driver), "FAKE_CUDA_LOG": str(log)}
    done = subprocess.run(
        [sys.executable, "-c", COUNTED], capture_output=True, text=True, env=environment, timeout=BUSY
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), log.read_text().splitlines()


@pytest.mark.parametrize(("bias", "allowed"), [(False, 90), (True, 99)], ids=["", "with a bias"])
@pytest.mark.parametrize("m", [1, 8, 64], ids="{} tokens".format)
def test_a_warm_forward_on_a_gpu_makes_no_more_calls_than_this(counted, m, bias, allowed):
    calls = counted[0][f"{m} {bias}"]
    assert any("Device.run" in call for call in calls)
    assert any("check_memory" in call for call in calls)
    assert len(calls) <= allowed, f"{len(calls)} calls:\n" + "\n".join(calls)


def test_each_launch_has_the_addresses_of_its_own_tensors_and_the_rest_as_before(counted):
    launches = [line.split()[-1] for line in counted[1] if line.startswith("launch")]
    products = [one for one in map(bytes.fromhex, launches) if len(one) == sizeof(ProductArguments)]
    assert len(products) == 24, "four calls for each of three numbers of tokens, without bias and with one"
    for first in range(0, 24, 4):
        kept = {one[WEIGHT] + one[REST] for one in products[first : first + 4]}
        assert len(kept) == 1
    assert len({one[24:32] for one in products}) == 3, "numbers of tokens"
    split = [one for one in products if any(one[PARTIAL])]
    assert split, "K is split for eight tokens"
    assert {one[ARRIVED] for one in split if any(one[ARRIVED])} >= {(0x100000).to_bytes(8, "little")}
    assert not [one for one in products if any(one[ARRIVED]) and not any(one[PARTIAL])]


# --- the weight -----------------------------------------------------------------------------------------------------


def layer_on_the_emulator(nested: bool = False, bias: bool = False, k: int = 256) -> LinearNF4:
    torch.manual_seed(0)
    made = LinearNF4(k, 48, bias=bias, compress_statistics=nested, compute_dtype=torch.bfloat16)
    return made.bfloat16().to("cpu").eval()


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_prepared_weight_is_the_stored_memory_and_its_products_are_the_same_bits(nested):
    layer, x = layer_on_the_emulator(nested, bias=True), torch.randn(9, 256).bfloat16()
    address, before = layer.weight.data_ptr(), {k: v.clone() for k, v in layer.state_dict().items()}
    with refq4.use_backend("cuda-emulator"), torch.no_grad():
        training = layer.train()(x)  # on the canonical bytes
        layer.eval()
        first, again = layer(x), layer(x)
        assert layer.weight.prepared
        assert layer.weight._form.prepared.tensors[0].data_ptr() == address
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    for got in (first, again, compiled):
        assert torch.equal(got, training)
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert layer.weight.data_ptr() == address, "and it goes back without a copy"


def test_arguments_are_packed_once_for_each_number_of_tokens_and_threads_share_them(monkeypatch):
    packed: list[int] = []
    product_of = stored.product_of
    monkeypatch.setattr(stored, "product_of", lambda *args, **rest: packed.append(args[2]) or product_of(*args, **rest))
    layer, inputs = layer_on_the_emulator(), [torch.randn(m, 256).bfloat16() for m in (1, 5, 9)]
    with refq4.use_backend("cuda-emulator"), torch.no_grad():
        wanted = [layer(x) for x in inputs]
        assert packed == [1, 5, 9]
        got: dict[int, list[torch.Tensor]] = {}

        def work(number: int) -> None:
            with refq4.use_backend("cuda-emulator"), torch.no_grad():
                got[number] = [layer(x) for x in inputs]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert packed == [1, 5, 9]
    assert len(got) == 4
    assert all(torch.equal(y, w) for ys in got.values() for y, w in zip(ys, wanted, strict=True))


def test_of_a_call_on_a_prepared_weight_no_tensor_is_kept(monkeypatch):
    layer, x = layer_on_the_emulator(k=4096), torch.randn(9, 4096).bfloat16()  # K is split
    with refq4.use_backend("cuda-emulator"), torch.no_grad():
        layer(x)
        seen: list[weakref.ref[torch.Tensor]] = []
        filled = stored.filled

        def watch(*args, **rest):
            made = filled(*args, **rest)
            weights = {t.data_ptr() for t in layer.weight._form.prepared.tensors}
            seen.extend(weakref.ref(t) for t in made.buffers if t.data_ptr() not in weights)
            return made

        monkeypatch.setattr(stored, "filled", watch)
        y = layer(x)
        del x, y
        gc.collect()
    assert len(seen) >= 4, "x, y, sums and counters"
    assert not [ref for ref in seen if ref() is not None]


def test_a_weight_whose_storage_was_freed_is_an_error_and_one_allocated_again_is_read_there():
    layer, x = layer_on_the_emulator(), torch.randn(1, 256).bfloat16()
    storage, held = layer.weight.data.untyped_storage(), layer.weight.data.clone()
    with refq4.use_backend("cuda-emulator"), torch.no_grad():
        wanted = layer(x)
        size = storage.nbytes()
        storage.resize_(0)
        with pytest.raises(ValueError, match="the packed weight has no memory"):
            layer(x)
        storage.resize_(size)
        layer.weight._form.prepared.tensors[0].copy_(held.view(torch.uint8).flatten())
        assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize("which", ["absmax", "code", "nested absmax", "nested code", "offset"])
def test_scales_and_tables_that_were_given_other_memory_are_read_there(which):
    layer, x = layer_on_the_emulator(nested=which != "absmax"), torch.randn(1, 256).bfloat16()
    state = layer.weight.quant_state
    owner = state.state2 if which.startswith("nested") else state
    tensor = getattr(owner, which.removeprefix("nested "))
    with refq4.use_backend("cuda-emulator"), torch.no_grad():
        before = layer(x)
        old = tensor.data
        tensor.data = (2 * tensor.data).clone()
        wanted = refq4.matmul_4bit(x, layer.weight.stored(), state, backend="reference")
        assert not torch.equal(wanted, before)
        torch.testing.assert_close(layer(x), wanted, rtol=2e-2, atol=2e-2)
        tensor.data = tensor.data.new_empty(0)
        with pytest.raises(ValueError, match="has tensors of"):
            layer(x)
        tensor.data = old
        assert torch.equal(layer(x), before)


def test_a_layout_of_another_backend_is_refused():
    weight = PreparedWeight("cuda-emulator", "tiles", (torch.zeros(2),), (8, 64), 64, "nf4")
    with pytest.raises(refq4.BackendUnsupportedError, match="reads the layouts canonical and stored, not 'tiles'"):
        CudaEmulatorBackend().gemm_4bit(torch.ones(2, 64), weight, None)
    with pytest.raises(
        ValueError, match=r"a weight \[8, 64\] in the layout 'stored' has tensors of \[\(256, torch.uint8"
    ):
        CudaEmulatorBackend().gemm_4bit(torch.ones(2, 64), weight._replace(layout="stored"), None)


# --- the counters ---------------------------------------------------------------------------------------------------


class Driver:
    """What ``Counters`` asks: which stream is current, and whether it is being captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.capturing, self.asked = 0, False, []
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: self.stream, raising=False)

    def ask(self, name: str, *arguments: int) -> int:
        self.asked.append((name, *arguments))
        return 0x1000

    def cuStreamIsCapturing(self, stream: int) -> tuple[int, int]:  # noqa: N802  (the driver's name)
        return 0, int(self.capturing)


def test_counters_are_cleared_once_and_a_stream_keeps_its_own(monkeypatch):
    driver = Driver(monkeypatch)
    counters = Counters(0, driver.ask, driver)
    size = 4 * (REGION * REGIONS + GRAPHS)
    assert driver.asked == [("cuMemAlloc", size), ("cuMemsetD8", 0x1000, 0, size), ("cuStreamSynchronize", 0)]
    given = {}
    for driver.stream in (0, 7, 8, 0, 7, 8):
        given.setdefault(driver.stream, set()).add(counters.here(10))
    assert all(len(addresses) == 1 for addresses in given.values())
    first, *others = sorted(address for (address,) in given.values())
    assert first == 0x1000
    assert all(b - a >= 4 * REGION for a, b in pairwise([first, *others]))
    assert counters.here(REGION + 1) == 0, "more than a region has"
    driver.stream = 2
    assert counters.here(1) == 0, "the handle of a stream that each thread has its own of"
    for driver.stream in range(100, 100 + REGIONS):
        last = counters.here(1)
    assert last == 0, "all regions are given away"


def test_each_launch_in_a_graph_has_counters_that_nobody_else_is_given(monkeypatch):
    driver = Driver(monkeypatch)
    counters = Counters(0, driver.ask, driver)
    eager = counters.here(10)
    driver.capturing = True
    addresses = [counters.here(tiles) for tiles in (10, 30, 20)]
    spans = sorted(zip(addresses, (10, 30, 20), strict=True))
    assert spans[0][0] >= eager + 4 * REGION * REGIONS
    assert all(a + 4 * tiles <= b for (a, tiles), (b, _) in pairwise(spans))
    assert counters.here(GRAPHS) == 0, "not so many are left"
    assert counters.here(1) != 0
    driver.capturing = False
    assert counters.here(10) == eager
