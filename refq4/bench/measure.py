"""Timing: what is called, how often, in which order."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..backend import Backend, BackendError
from ..codebooks import get_codebook
from ..functional import quantize_4bit
from .peers import PEERS, Peer, Product, hub_kernel, peer_quantiser, peer_rearranger, random_weights

__all__ = ["interleaved", "limits", "machine", "make_named", "ops", "products"]

Run = Callable[[int], object]
_TELLING = ("tier", "processor", "compiler", "driver", "nvrtc")  # of a backend's info, what speed depends on


def interleaved(runs: dict[str, Run], rounds: int, layers: int = 1, at_a_time: int | None = None) -> dict[str, float]:
    """Median seconds of a call: each round takes each run through the layers, as a model's forward pass does.

    A pass over all layers comes first, unmeasured. A pass is timed as a whole: its first call, which finds the caches
    full of the peer before it, counts as much as any other. Where calls are long, ``at_a_time`` layers make a pass, and
    the next round goes on with the next ones.
    """
    at_a_time = at_a_time or layers
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for layer in range(layers):
            run(layer)
    for i in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for j in range(at_a_time):
                run((i * at_a_time + j) % layers)
            times[name].append((time.perf_counter() - start) / at_a_time)
    return {name: statistics.median(t) for name, t in times.items()}


def limits(backend: Backend) -> dict[str, float]:
    """The machine's limits where the backend can measure them, else nothing."""
    measure = getattr(backend, "limits", None)
    return dict(measure()) if measure is not None else {}


def machine(backend: Backend) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "backend": backend.name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "bitsandbytes' kernel from the hub": hub_kernel(),
        **{key: value for key, value in backend.info().items() if key in _TELLING},
    }


def products(
    backend: Backend,
    n: int,
    k: int,
    tokens: Sequence[int],
    dtype: torch.dtype,
    rounds: int,
    peers: Sequence[str],
    layers: int = 8,
) -> list[dict[str, Any]]:
    """One row per M: medians of every peer on ``layers`` weights [n, k], at least 15 rounds.

    An M that the backend can't run is left out, with the reason under ``missing`` of the other rows.

    Returns:
        Dicts with ``n k m dtype ms`` (peer to milliseconds) and ``missing`` (peer to the reason).

    Raises:
        BackendError: the backend can't run any M.
    """
    made, missing = make_named(PEERS, peers, backend, random_weights(n, k, layers), dtype)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for m in tqdm(tokens, desc=f"{n} x {k}", leave=False, disable=None):
            x = torch.randn(m, k).to(dtype)
            runs: dict[str, Run] = {name: partial(call, x) for name, call in made.items()}
            try:
                medians = interleaved(runs, max(15, rounds // max(1, m // 4)), layers, layers if m < 32 else 1)
            except BackendError as error:
                if not rows and m == tokens[-1]:
                    raise
                missing[f"left out, M = {m}"] = f"{error}".splitlines()[0]
                continue
            ms = {name: 1e3 * seconds for name, seconds in medians.items()}
            rows.append({"n": n, "k": k, "m": m, "dtype": str(dtype), "ms": ms, "missing": missing})
    return rows


def make_named(
    known: Sequence[Peer], names: Sequence[str], backend: Backend, weights: list[Tensor], dtype: torch.dtype
) -> tuple[dict[str, Product], dict[str, str]]:
    """The products of the peers that are named, and for each that can't be had the reason."""
    made: dict[str, Product] = {}
    missing: dict[str, str] = {}
    for peer in known:
        if peer.name in names:
            try:
                made[peer.name] = peer.make(backend.name, weights, dtype)
            except (ImportError, NotImplementedError, RuntimeError) as error:
                missing[peer.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return made, missing


def ops(backend: Backend, rounds: int, n: int, k: int) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Milliseconds of the ops around the product, on a weight [n, k]: {op: {who: ms}}, and what is left out and why."""
    code, A = get_codebook("nf4").on("cpu"), torch.randn(n, k)
    packed, state = quantize_4bit(A, quant_type="nf4", blocksize=64, compress_statistics=False, backend="auto")
    weight = state.packed_weight(packed)
    rounds = max(15, rounds // 4)
    out: dict[str, dict[str, float]] = {}
    needs = {"quantise": "quantize_4bit", "dequantise": "dequantize_4bit", "rearrange": "prepare_weight"}
    needs |= {"a layer of 64 x 64": "gemv_4bit"}
    left_out = {name: f"the backend has no {op}" for name, op in needs.items() if not backend.has(op)}
    if "quantise" not in left_out:
        out["quantise fp32"] = interleaved(
            {"refq4": lambda _: backend.quantize_4bit(A, code, 64)} | peer_quantiser(A), rounds
        )
    for dtype in () if "dequantise" in left_out else (torch.bfloat16, torch.float32):
        # A fresh result costs page faults; a clone has the same, so it is the fair yardstick for the memory's speed.
        dequantise: dict[str, Run] = {
            "refq4": partial(_ignore, partial(backend.dequantize_4bit, weight, dtype)),
            "clone of it": partial(_ignore, A.to(dtype).clone),
        }
        name = f"dequantise to {str(dtype).removeprefix('torch.')}"
        out[name] = interleaved(dequantise, rounds)
        if (into := getattr(backend, "dequantize_into", None)) is not None:
            here = A.to(dtype)
            in_place: dict[str, Run] = {
                "refq4": partial(_ignore, partial(into, weight, here)),
                "copy of it": partial(_ignore, partial(here.clone().copy_, here)),
            }
            out[f"{name}, into memory at hand"] = interleaved(in_place, rounds)
    if backend.prepare_weight(weight) is None:
        left_out.setdefault("rearrange", "its prepare_weight keeps the stored layout here")
    else:
        rearrange: dict[str, Run] = {"refq4": lambda _: backend.prepare_weight(weight)}
        out["rearrange"] = interleaved(rearrange | peer_rearranger(A), rounds)
    if "a layer of 64 x 64" not in left_out:
        peers = ["refq4", "bitsandbytes packed", "torch bf16"]
        small = products(backend, 64, 64, [1], torch.bfloat16, 400, peers, layers=1)
        out["a layer of 64 x 64, one token"] = {name: ms / 1e3 for name, ms in small[0]["ms"].items()}
    return {op: {who: 1e3 * seconds for who, seconds in row.items()} for op, row in out.items()}, left_out


def _ignore(run: Callable[[], object], _: int) -> object:
    return run()
