"""The model of a product's time: its counts are the kernels', plans go by its cross-overs, and it meets its bar."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

pytest.importorskip("refq4_cuda", reason="the package refq4_cuda is not installed: pip install -e .")
from refq4_cuda import CudaEmulatorBackend, counts, crossover, roofline, sass, tune
from refq4_cuda.geometry import ARCHITECTURES, Shape, plan

pytestmark = pytest.mark.reference_only("it predicts, and measures itself")

EVERY = range(1, roofline.MOST_TOKENS + 1)


def shape(m: int, n: int, k: int) -> Shape:
    return Shape("BF16", m, n, k, 64, 0, aligned=True)


# --- the bar ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", roofline.GPUS, ids="sm_{}".format)
@pytest.mark.parametrize(("n", "k"), roofline.SHAPES, ids=str)
def test_the_chosen_way_is_the_faster_one_by_the_model_for_1_to_512_tokens(n: int, k: int, arch: int) -> None:
    wrong = []
    for m in EVERY:
        made = plan(shape(m, n, k), arch, roofline.GPUS[arch].multiprocessors)
        fused, decoded = roofline.predict(shape(m, n, k), arch).seconds, roofline.decoded(shape(m, n, k), arch)
        if (made is not None) != (fused <= decoded):
            wrong.append(m)
    assert not wrong, f"python -m refq4_cuda.roofline --write: another way is taken than the faster one at M = {wrong}"


@pytest.mark.parametrize("arch", roofline.GPUS, ids="sm_{}".format)
@pytest.mark.parametrize(("n", "k"), roofline.SHAPES, ids=str)
def test_up_to_16_tokens_the_model_takes_no_longer_than_cublas_on_bf16(n: int, k: int, arch: int) -> None:
    for m in range(1, 17):
        assert roofline.predict(shape(m, n, k), arch).seconds <= roofline.cublas(shape(m, n, k), arch), m
    assert "| 512 |" in roofline.table(arch), "above, the ratio is in the table"


# --- its parts --------------------------------------------------------------------------------------------------------


def assert_near(kept, found) -> None:
    """Within 3 %, or one in the last place that is kept: a change of a few instructions moves no figure of the docs."""
    assert kept.keys() == found.keys()
    for name in kept:
        pairs = zip(kept[name].values(), found[name].values(), strict=True) if isinstance(kept[name], dict) else []
        for one, other in pairs or [(kept[name], found[name])]:
            assert one == pytest.approx(other, rel=0.03, abs=0.011), f"{name}: python -m refq4_cuda.counts --write"


def test_the_counts_kept_are_those_of_the_kernels_as_they_are() -> None:
    try:
        loops = {str(tokens): counts.loop_counts(90, tokens) for tokens in counts.TOKENS}
        outside = {"16x4": counts.outside_counts(16, 4)}
    except sass.ToolMissingError as missing:
        pytest.skip(str(missing))
    assert_near({name: counts.known()["loops"]["90"][name] for name in loops}, loops)
    assert_near({"16x4": counts.known()["outside"]["16x4"]}, outside)


@pytest.mark.slow
def test_all_the_counts_kept_are_those_of_the_kernels_as_they_are() -> None:
    found = counts.counted()
    for part in ("loops", "outside"):
        assert_near(counts.known()[part], found[part])


def test_a_prediction_counts_what_is_outside_the_loop_on_top() -> None:
    made = roofline.predict(shape(32, 4096, 4096))
    loop = max(made.parts.values())
    assert 0.1 * loop < made.outside < loop
    assert made.seconds == pytest.approx(loop + made.outside + roofline.START)
    assert made.limit == "l1"
    twice = roofline.predict(shape(32, 4096, 8192))
    assert twice.outside == made.outside, "it does not grow with K"
    assert max(twice.parts.values()) == pytest.approx(2 * loop)


def test_the_cost_of_a_weight_follows_from_the_constants() -> None:
    gpu = roofline.GPUS[90]
    weights = 0.9 * gpu.bandwidth / (0.5 + 4 / 64) / gpu.multiprocessors / gpu.clock
    assert round(weights) == 33, "weights that a multiprocessor must get through in a clock (docs/cuda-kernels.md)"


def test_bitsandbytes_is_never_slower_than_its_own_decoding() -> None:
    for m in (1, 4, 5, 32, 33, 512):
        made = roofline.bitsandbytes(shape(m, 4096, 4096), 90)
        assert (
            roofline.predict(shape(m, 4096, 4096)).parts["memory"] < made <= roofline.decoded(shape(m, 4096, 4096), 90)
        )


# --- where it turns ---------------------------------------------------------------------------------------------------


def test_the_cross_overs_that_are_shipped_are_the_models() -> None:
    shipped = json.loads(crossover.FILE.read_text())
    assert set(shipped) == {str(arch) for arch in roofline.GPUS}
    for arch, n, k in ((90, 4096, 4096), (100, 8192, 28672), (86, 2048, 2048)):
        (row,) = [turns for rows_n, rows_k, turns in shipped[str(arch)] if (rows_n, rows_k) == (n, k)]
        assert row == roofline.turns(n, k, arch)
    assert all(a < b for rows in shipped.values() for *_, turns in rows for a, b in pairwise(turns))


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch >= 80], ids="sm_{}".format)
def test_every_architecture_and_shape_has_a_cross_over(arch: int) -> None:
    for n, k in ((8, 64), (4096, 4096), (1 << 20, 128)):
        assert crossover.is_fused(1, n, k, arch, 16)
        assert not crossover.is_fused(1 << 20, n, k, arch, 16)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REFQ4_CACHE_DIR", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    crossover.forget()
    plan.cache_clear()


def test_what_was_measured_on_a_gpu_comes_before_the_model_and_holds_for_that_gpu_alone(own_cache) -> None:
    before = plan(shape(64, 4096, 4096), 90, 132)
    crossover.keep(90, 132, [(4096, 4096, (48,)), (1024, 4096, (96,))])
    crossover.keep(89, 128, [(4096, 4096, (7,))])
    plan.cache_clear()
    assert before is not None
    assert plan(shape(64, 4096, 4096), 90, 132) is None
    assert plan(shape(48, 4096, 4096), 90, 132) is not None
    assert plan(shape(64, 900, 4000 // 64 * 64), 90, 132) is not None, "the nearest shape's"
    assert plan(shape(64, 4096, 4096), 90, 114) == plan(shape(64, 4096, 4096), 90, 114)
    assert plan(shape(8, 4096, 4096), 89, 128) is None
    assert plan(shape(64, 4096, 4096), 90, 78) is not None, "another GPU"


def test_measuring_one_shape_leaves_what_is_known_of_the_others(own_cache) -> None:
    crossover.keep(90, 132, [(4096, 4096, (128,))])
    crossover.keep(90, 132, [(28672, 8192, (16,))])
    forget()
    assert crossover.is_fused(100, 4096, 4096, 90, 132)
    assert not crossover.is_fused(17, 28672, 8192, 90, 132)
    assert crossover.is_fused(40, 1024, 4096, 90, 132) == (crossover.modelled_turns(1024, 4096, 90)[0] >= 40)


@pytest.mark.parametrize(("tokens", "wins"), [((128, 256), False), ((16, 32), True)], ids=["never faster", "always"])
def test_what_was_not_measured_is_the_models(own_cache, monkeypatch, tokens, wins) -> None:
    monkeypatch.setattr(tune, "_both", lambda *others: (1e-6, 2e-6) if wins else (2e-6, 1e-6))
    backend = CudaEmulatorBackend()
    processor = backend.processor(torch.device("cpu"))
    list(tune.tune(backend, torch.device("cpu"), [(4096, 4096)], tokens))
    forget()
    modelled = crossover.modelled_turns(4096, 4096, processor.arch)[0]
    for m in (1, 33):
        assert crossover.is_fused(m, 4096, 4096, processor.arch, processor.multiprocessors) == (m <= modelled)


@pytest.mark.parametrize("damage", ["", "no json", "[]", '{"sm_90 with 132 multiprocessors": [[64, 256]]}'])
def test_a_damaged_file_of_cross_overs_is_as_none(own_cache, damage: str) -> None:
    crossover.keep(90, 132, [(4096, 4096, (1,))])
    crossover.tuned_file().write_text(damage)
    forget()
    assert plan(shape(64, 4096, 4096), 90, 132) is not None


def test_tuning_runs_both_ways_finds_where_they_cross_and_keeps_it(own_cache, monkeypatch) -> None:
    ran: list[str] = []
    run = type(CudaEmulatorBackend().processor(torch.device("cpu"))).run
    monkeypatch.setattr(
        type(CudaEmulatorBackend().processor(torch.device("cpu"))),
        "run",
        lambda self, made: (ran.extend(one.variant.entry for one in made), run(self, made)),
    )
    monkeypatch.setattr(tune, "_ROUNDS", 1)

    def clock(work):  # the fused kernel takes 2 µs for each eight tokens, decoding 5
        def once() -> float:
            ran.clear()
            work()
            return 5e-6 if "dequantize" in ran else 2e-6 * (tokens_seen[-1] / 8)

        return once

    tokens_seen: list[int] = []
    both = tune._both
    monkeypatch.setattr(
        tune, "_both", lambda backend, weights, m, clock: (tokens_seen.append(m), both(backend, weights, m, clock))[1]
    )
    backend = CudaEmulatorBackend()
    lines = list(tune.tune(backend, torch.device("cpu"), [(32, 128)], (8, 16, 24, 32), clock))
    assert lines[0].startswith(
        "32 x 128: fused up to 16 tokens (µs fused/decoded at 8: 2.0/5.0, 16: 4.0/5.0, 24: 6.0/5"
    )
    assert tokens_seen == [8, 16, 24]
    assert str(crossover.tuned_file()) in lines[1]
    arch = backend.processor(torch.device("cpu")).arch
    assert plan(shape(16, 32, 128), arch, 132) is not None
    assert plan(shape(17, 32, 128), arch, 132) is None
