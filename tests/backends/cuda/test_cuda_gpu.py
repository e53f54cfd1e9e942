"""What only a GPU can show: CUDA graphs, streams, threads, several devices, shapes too large for the emulator.

Skipped where there is none, with the reason. ``scripts/checks/gpu_check.py`` runs these with all else that wants a GPU.
"""

from __future__ import annotations

import threading
import time

import pytest
import torch

import refq4
from refq4.testing import Case, check

REASON = refq4.backend_info("cuda")["reason"]
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=f"the CUDA backend is not available: {REASON}"),
    pytest.mark.reference_only("it names its backends itself"),
]
SHAPES = [(4096, 4096), (11008, 4096), (4096, 14336), (130, 8192)]
TOKENS = [1, 2, 3, 8, 9, 16, 17, 31, 33, 64, 127, 128, 129, 512]


def layer_on(device: str, n: int = 512, k: int = 1024, nested: bool = True) -> refq4.nn.Linear4bit:
    torch.manual_seed(0)
    made = refq4.nn.Linear4bit(k, n, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=nested)
    return made.to(device).eval()


@pytest.fixture(autouse=True)
def on_cuda():
    with refq4.use_backend("cuda"), torch.no_grad():
        yield


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_large_products_are_within_the_budget(n, k, dtype, nested):
    for m in TOKENS:
        outcome = check(Case("gemm_4bit", m=m, n=n, k=k, dtype=dtype, nested=nested, bias=m % 2 == 0), "cuda")
        assert outcome.status == "same", str(outcome)


@pytest.mark.parametrize("op", ["quantize_4bit", "dequantize_4bit", "quantize_blockwise", "dequantize_blockwise"])
def test_large_tensors_are_bit_exact(op):
    outcome = check(Case(op, n=11008, k=4096, dtype="bfloat16"), "cuda")
    assert outcome.status == "same", str(outcome)


def test_more_than_two_to_the_31_elements_are_addressed_right():
    n = (1 << 31) + 4096
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free GPU memory")
    x = torch.zeros(n, dtype=torch.float16, device="cuda")
    x[-64:] = torch.linspace(-1, 1, 64)
    packed, state = refq4.functional.quantize_4bit(x, quant_type="nf4")
    tail = refq4.functional.dequantize_4bit(packed, state)[-64:]
    with refq4.use_backend("reference"):
        small = refq4.functional.quantize_4bit(x[-64:], quant_type="nf4")
        assert torch.equal(tail, refq4.functional.dequantize_4bit(*small))


@pytest.mark.parametrize("m", [1, 8, 33, 300])
def test_a_captured_layer_replays_on_new_inputs_and_beside_other_work(m):
    layer, x = layer_on("cuda"), torch.randn(m, 1024, device="cuda").bfloat16()
    layer(x)  # compiles and loads; a capture can't
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(m, 1024))
        graph.replay()
        layer(torch.randn_like(x))  # on the same stream, after the replay: must not disturb y
        assert torch.equal(y, layer(x))


@pytest.mark.parametrize("m", [1, 8, 64])
def test_compiled_to_reduce_overhead_a_layer_that_splits_k_gives_what_it_gives_eagerly(m):
    layer = layer_on("cuda", n=64)
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for seed in range(5):  # warm-up, recording, replays
        x = torch.randn(m, 1024, generator=torch.Generator().manual_seed(seed)).cuda().bfloat16()
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(compiled(x).clone(), layer(x))


def test_streams_at_the_same_time_give_what_one_gives():
    layer = layer_on("cuda", n=64)  # few rows: K is split, and partial sums meet in a workspace
    inputs = [torch.randn(4, 1024, device="cuda").bfloat16() for _ in range(8)]
    wanted = [layer(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(50):
        got = []
        for x, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(layer(x))
        torch.cuda.synchronize()
        for y, right in zip(got, wanted, strict=True):
            torch.testing.assert_close(y, right, rtol=0.02, atol=0.02)


def test_a_thread_that_has_not_touched_cuda_can_launch():
    layer, x = layer_on("cuda"), torch.randn(1, 1024, device="cuda").bfloat16()
    wanted, got = layer(x), []

    def work() -> None:
        with refq4.use_backend("cuda"), torch.no_grad():
            got.append(layer(x))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert torch.equal(got[0], wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_device_computes_its_own_whichever_is_current():
    layers = [layer_on(f"cuda:{i}") for i in range(2)]
    x = torch.randn(3, 1024).bfloat16()
    results = [layer(x.to(layer.weight.device)) for layer in layers]
    assert [y.device.index for y in results] == [0, 1]
    assert torch.equal(results[0].cpu(), results[1].cpu())


@pytest.mark.parametrize("m", [1, 16, 300])
def test_nothing_waits_for_the_device(m):
    layer, x = layer_on("cuda"), torch.randn(m, 1024, device="cuda").bfloat16()
    layer(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(y.isfinite().all())


def test_a_call_costs_at_most_8_microseconds_more_than_torchs_own():
    from refq4_cuda import CudaBackend

    from refq4.backend import PackedWeight
    from refq4.codebooks import get_codebook

    backend, code = CudaBackend(), get_codebook("nf4").on("cuda")
    x, W = torch.randn(1, 64, device="cuda").bfloat16(), torch.randn(64, 64, device="cuda").bfloat16()
    packed, absmax = backend.quantize_4bit(W, code, 64)
    weight = PackedWeight(packed, absmax, code.values, 64, (64, 64), "nf4")
    ours = best_seconds(lambda: backend.gemv_4bit(x, weight, None))
    torchs = best_seconds(lambda: torch.nn.functional.linear(x, W))
    assert ours - torchs <= 8e-6, f"{1e6 * ours:.1f} µs a call, torch's linear {1e6 * torchs:.1f} µs"


def best_seconds(run, calls: int = 200, rounds: int = 20) -> float:
    """Of a launch alone: few enough that the queue never fills."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - start) / calls)
    return min(times)
