"""Figures of speed in the prose are those of the files in ``docs/benchmarks``: no table is typed, no ratio guessed.

A table is compared line by line; a sentence is written here with the figures left open, and must stand in its page.
What no file holds says in the page when and for which commit it was measured.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from refq4_cpu import CpuBackend
from refq4_cpu.build import TIERS
from refq4_cpu.kernels import PRODUCT_KERNELS

from refq4.bench.show import weight_bytes
from refq4.functional import DEFAULT_BLOCKSIZE as BLOCK
from refq4.state import NESTED_BLOCKSIZE

pytestmark = pytest.mark.reference_only("it is about the documentation")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

import cpu_rungs  # noqa: E402 (the scripts are no package)

CPU, AVX2, RUNGS, ZEN5, ZEN5_FP16, ZEN5_FP32, LLAMA, MODEL = (
    json.loads((ROOT / "docs" / "benchmarks" / f"{name}.json").read_text())
    for name in (
        "cpu",
        "cpu-avx2",
        "rungs/cpu-avx2",
        "cpu-zen5",
        "cpu-zen5-fp16",
        "cpu-zen5-fp32",
        "cpu-zen5-llama",
        "rungs/cpu-zen5-model",
    )
)
BENCHMARKS, KERNELS, NUMERICS = "docs/benchmarks.md", "docs/cpu-kernels.md", "docs/explanation/numerics.md"
PEERS = ("refq4 canonical", "bitsandbytes packed", "torch bf16", "torch int4")
FP32_PEERS = (*PEERS[:3], "torch fp32")  # torch's int4 takes seconds for other activations than bf16
N = K = 4096


def text_of(page: str) -> str:
    return " ".join((ROOT / page).read_text().split())


def times(report: dict[str, Any], m: int, n: int = N, k: int = K) -> dict[str, float]:
    """Milliseconds of a layer by who computes."""
    (row,) = (row for row in report["products"] if (row["n"], row["k"], row["m"]) == (n, k, m))
    return row["ms"]


def ratio(report: dict[str, Any], who: str, m: int, n: int = N, k: int = K) -> float:
    ms = times(report, m, n, k)
    return ms[who] / ms["refq4"]


def gflop_s(ms: float, m: int, n: int = N, k: int = K) -> float:
    return 2e-6 * m * n * k / ms


def gb_s(ms: float, n: int = N, k: int = K) -> float:
    return weight_bytes(n, k) / ms / 1e6


# --- tables -----------------------------------------------------------------------------------------------------------


def layers_table(
    report: dict[str, Any], peak: float, peak_name: str, decimals: tuple[int, ...], peers: tuple[str, ...] = PEERS
) -> list[str]:
    lines = []
    for row in report["products"]:
        m, n, k, ours = row["m"], row["n"], row["k"], row["ms"]["refq4"]
        memory, arithmetic = gb_s(ours, n, k) / report["limits"]["read_gb_s"], gflop_s(ours, m, n, k) / peak
        share = f"{memory:.0%} of the read limit" if memory > arithmetic else f"{arithmetic:.0%} of the {peak_name}"
        others = [f"{row['ms'][who] / ours:.{places}f}×" for who, places in zip(peers, decimals, strict=True)]
        lines.append(f"| {n} × {k} | {m} | {ours:.3g} | {share} | {' | '.join(others)} |")
    return lines


def ops_table(report: dict[str, Any]) -> list[str]:
    lines = []
    for op, row in report["ops"].items():
        others = [f"{who} {ms:.3g} ({ms / row['refq4']:.2f}×)" for who, ms in row.items() if who != "refq4"]
        lines.append(f"| {op} | {row['refq4']:.3g} | {', '.join(others)} |")
    return lines


TABLES = {
    "layers": layers_table(CPU, CPU["limits"]["dot_gflop_s"], "dot-product peak", (2, 2, 2, 2)),
    "layers on AVX2": layers_table(AVX2, AVX2["limits"]["fma_gflop_s"], "FMA peak", (2, 1, 2, 2)),
    "layers on Zen 5": layers_table(ZEN5, ZEN5["limits"]["dot_gflop_s"], "dot-product peak", (2, 2, 2, 2)),
    "layers of fp16": layers_table(ZEN5_FP16, ZEN5_FP16["limits"]["fma_gflop_s"], "FMA peak", (2, 2, 2, 1), FP32_PEERS),
    "layers of fp32": layers_table(ZEN5_FP32, ZEN5_FP32["limits"]["fma_gflop_s"], "FMA peak", (2, 2, 2, 1), FP32_PEERS),
    "overlap on Zen 5": cpu_rungs.model_table(MODEL),
    "ops": ops_table(CPU),
    "ops on AVX2": ops_table(AVX2),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_the_cpu_kernels_is_that_of_its_file(name):
    there = (ROOT / KERNELS).read_text()
    missing = [line for line in TABLES[name] if f"{line}\n" not in there]
    assert not missing, f"{KERNELS} has no such lines:\n" + "\n".join(missing)


def test_the_cpu_kernels_have_no_row_of_layers_that_is_in_no_file():
    rows = re.findall(r"^\| \d+ × \d+ \| .*\|$", (ROOT / KERNELS).read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(line for name, lines in TABLES.items() if "layers" in name for line in lines)


def test_the_rungs_of_avx2_have_the_times_of_their_file():
    section = (ROOT / KERNELS).read_text().partition("\n## The same with AVX2 only\n")[2]
    rows = re.findall(r"^\| `(\w+)\.c` \|.*?\|((?: [\d., ]*\|){4})$", section, re.MULTILINE)
    assert {name for name, _ in rows} == RUNGS["ms"].keys()
    for name, cells in rows:
        ms = [RUNGS["ms"][name].get(m) for m in ("1", "4", "16", "128")]
        wanted = ["" if x is None else f"{x:.2g}" if x < 99.5 else f"{x:.0f}" for x in ms]
        assert [cell.strip() for cell in cells.split("|")[:-1]] == wanted, name


def test_the_rows_of_a_layer_in_short_are_those_of_the_file():
    rows = re.findall(
        r"^\| (\d+) \| ([\d.]+) ms \| ([\d.]+)× .*?\| ([\d.]+)× \| ([\d.]+)× \|$", (ROOT / BENCHMARKS).read_text(), re.M
    )
    assert [int(m) for m, *_ in rows] == [1, 4, 16, 128]
    for m, ours, *others in rows:
        assert ours == to_digits_of(ours, times(CPU, int(m))["refq4"])
        for who, printed in zip(("bitsandbytes packed", "torch int4", "torch bf16"), others, strict=True):
            assert printed == to_digits_of(printed, ratio(CPU, who, int(m))), (m, who)


def test_the_ratios_of_llama_cpp_are_those_of_the_file():
    text = (ROOT / BENCHMARKS).read_text().partition("\n## Beside llama.cpp\n")[2].partition("\n## ")[0]
    found: dict[str, str] = {}
    for row in LLAMA["products"]:
        n, k, m = row["n"], row["k"], row["m"]
        found.setdefault(f"{n} × {k}", "")
        found[f"{n} × {k}"] += f" {ratio(LLAMA, 'llama.cpp q4_0 int8', m, n, k):.2f}× |"
    assert re.findall(r"^\| (\d+ × \d+) \|(.* \|)$", text, re.M) == list(found.items())
    assert f"| N × K |{''.join(f' {m} |' for m in dict.fromkeys(row['m'] for row in LLAMA['products']))}\n" in text


def to_digits_of(printed: str, figure: float) -> str:
    return f"{figure:.{len(printed.partition('.')[2])}f}"


def test_the_script_that_times_rungs_times_every_kernel_of_this_machine():
    report = cpu_rungs.measured(32, 128, layers=1, rounds=1)
    assert report.keys() == RUNGS.keys()
    features = TIERS[report["machine"]["tier"]]
    able = {kernel.name: kernel for kernel in PRODUCT_KERNELS if kernel.feature in features}
    assert report["ms"].keys() == able.keys()
    few = {name for name, kernel in able.items() if kernel.most_tokens or name == "gemv_4bit_1_scalar"}
    assert {name for name, ms in report["ms"].items() if "128" not in ms} == few
    assert report["in_cache_weights_s"].keys() == {name for name, kernel in able.items() if kernel.reads_tiles}
    figures = [*report["ms"].values(), *report["ops"].values(), report["in_cache_weights_s"]]
    assert all(0 < figure < float("inf") for row in figures for figure in row.values())


def test_the_model_of_a_product_has_its_three_parts():
    if not TIERS[CpuBackend().info()["tier"].split()[0]][1:]:
        pytest.skip("plain C has no peak to compare with: unset REFQ4_CPU_TIER")
    report = cpu_rungs.model(32, 128, layers=1, rounds=1)
    assert report.keys() == MODEL.keys()
    assert [row["m"] for row in report["rows"]] == list(cpu_rungs.MODEL_TOKENS)
    for row in report["rows"]:
        assert row.keys() == MODEL["rows"][0].keys()
        assert 0 < row["decoding"] <= row["multiplying"]
    assert len({row["reading"] for row in report["rows"]}) == 1


# --- sentences --------------------------------------------------------------------------------------------------------


def shares(report: dict[str, Any], who: str, peak: float, at_least: int) -> str:
    """ "76 to 93": per cent of the peak over all shapes from that many tokens on."""
    rows = [row for row in report["products"] if row["m"] >= at_least]
    found = [gflop_s(row["ms"][who], row["m"], row["n"], row["k"]) / peak for row in rows]
    return f"{100 * min(found):.0f} to {100 * max(found):.0f}"


READ, DOT, FMA = (CPU["limits"][name] for name in ("read_gb_s", "dot_gflop_s", "fma_gflop_s"))
PEAK2 = RUNGS["limits"]["fma_gflop_s"]
RUNG, OPS, SPEED = RUNGS["ms"], RUNGS["ops"], RUNGS["in_cache_weights_s"]
BYTES, BLOCKED = RUNG["gemm_4bit_3_avx2_bytes"], RUNG["gemm_4bit_4_avx2_blocked"]
WEIGHT_MB, BF16_MB = weight_bytes(N, K) / 1e6, 2e-6 * N * K
A_TOKEN = (BLOCKED["128"] - BLOCKED["16"]) / (128 - 16)  # milliseconds that a token costs the blocked rung


def faster(m: int, times_as_fast: float) -> float:
    """Milliseconds of a layer that is so many times as fast as bitsandbytes' packed one."""
    return times(CPU, m)["bitsandbytes packed"] / times_as_fast


def read_share(report: dict[str, Any], m: int) -> str:
    rows = [row for row in report["products"] if row["m"] == m]
    found = [gb_s(row["ms"]["refq4"], row["n"], row["k"]) / report["limits"]["read_gb_s"] for row in rows]
    return f"{100 * min(found):.0f} to {100 * max(found):.0f} % of the read limit"


SENTENCES = {
    KERNELS: [
        f"A product of M tokens reads {WEIGHT_MB:.1f} MB",
        f"eight weights in rotation ({8 * WEIGHT_MB:.0f} MB against",
        f"this machine read {READ:.1f} GB/s and multiplied {DOT:.0f} GFLOP/s in bf16 "
        f"(`vdpbf16ps`) or {FMA:.0f} in fp32",
        *(
            f"| {m} | {WEIGHT_MB / READ:.2f} ms | {gflop_s(1, m) / DOT:.2f} ms | {what} |"
            for m, what in ((1, "memory"), (4, "both"), (16, "the multipliers"), (128, "the multipliers"))
        ),
        f"In this run the limits were {READ:.1f} GB/s of memory read, {DOT:.0f} GFLOP/s of bf16 dot products and "
        f"{FMA:.0f} of fp32 multiply-adds.",
        f"In this run the limits were {AVX2['limits']['read_gb_s']:.1f} GB/s of memory read and "
        f"{AVX2['limits']['fma_gflop_s']:.0f} GFLOP/s of fp32 multiply-adds",
        f"two bytes: {RUNG['gemm_4bit_2_avx2']['1']:.2f} to {BYTES['1']:.2f} ms at one token",
        f"6 × 16: {RUNG['gemm_4bit_2_avx2']['128']:.0f} to {BLOCKED['128']:.0f} ms, "
        f"{gflop_s(BLOCKED['128'], 128) / PEAK2:.0%} of the peak in that run".replace("%", " %"),
        f"{OPS['quantise fp32']['c']:.0f} to {OPS['quantise fp32']['avx2']:.1f} ms "
        f"for {N * K / 1e6:.1f} M fp32 numbers",
        "into memory at hand, "
        + " to ".join(f"{ms:.2g}" for ms in OPS["dequantise to bfloat16, into memory at hand"].values()),
        f"A fresh result of {BF16_MB:.1f} MB",
        f"nearly all is overhead: {1e3 * CPU['ops']['a layer of 64 x 64, one token']['refq4']:.0f} µs",
        f"1.8 times as fast as it is at M = 1 would take {gb_s(faster(1, 1.8)):.0f} GB/s",
        f"1.9 times bitsandbytes at M = 4 would be {100 * gflop_s(faster(4, 1.9), 4) / DOT:.0f} % of the "
        f"dot-product peak while reading {gb_s(faster(4, 1.9)):.0f} GB/s",
        f"twice at M = 8 would be {100 * gflop_s(faster(8, 2), 8) / DOT:.0f} % of the peak",
        f"{shares(CPU, 'refq4', DOT, 16)} % of the `vdpbf16ps` peak",
        f"torch's bf16 product reaches {shares(CPU, 'torch bf16', DOT, 128)} % of the same peak from M = 128 on",
        f"bitsandbytes, which reaches {shares(CPU, 'bitsandbytes packed', DOT, 128)} % there",
        f"multiplies {SPEED['gemm_4bit_3_avx2_bytes'] / 1e9:.0f} G weights a second",
        f"at {AVX2['limits']['read_gb_s']:.1f} GB/s two cores could have "
        f"{AVX2['limits']['read_gb_s'] * N * K / weight_bytes(N, K):.0f} G",
        read_share(AVX2, 1),
        f"reads {BF16_MB:.1f} MB where refq4 reads {WEIGHT_MB:.1f}",
        f"decoding costs as much as multiplying by {BLOCKED['16'] / A_TOKEN - 16:.0f} tokens",
        f"(its scales are bf16, {100 * (1 - (4 + 16 / 64) / 4.5):.0f} % fewer bytes)",
        f"at 8 bits in the tiles ({100 * (1 - (4 + 8 / 64 + 32 / 64 / 256) / 4.5):.0f} % fewer bytes with",
    ],
    NUMERICS: [
        r"below about $2.9 \cdot 10^{-39}$".replace("2.9", f"{1e39 / torch.finfo(torch.float32).max:.1f}"),
        f"32 / {BLOCK} = {32 / BLOCK} | 8 / {BLOCK} = {8 / BLOCK} |",
        f"32 / ({BLOCK} · {NESTED_BLOCKSIZE}) = {32 / BLOCK / NESTED_BLOCKSIZE:.3g} |",
        f"| together | {4 + 32 / BLOCK} | {4 + 8 / BLOCK + 32 / BLOCK / NESTED_BLOCKSIZE:.3f} |",
    ],
    BENCHMARKS: [
        f"the same layer takes {times(AVX2, 1)['refq4']:.2f} ms at M = 1 and {times(AVX2, 64)['refq4']:.1f} at 64",
        f"bitsandbytes takes {ratio(AVX2, 'bitsandbytes packed', 1):.0f} and "
        f"{ratio(AVX2, 'bitsandbytes packed', 64):.1f} times as long",
        f"torch's int4 {ratio(AVX2, 'torch int4', 1):.1f} and {ratio(AVX2, 'torch int4', 64):.1f} times",
        f"its bf16 {ratio(AVX2, 'torch bf16', 1):.1f} and {ratio(AVX2, 'torch bf16', 64):.1f} times",
    ],
}


@pytest.mark.parametrize("page", SENTENCES)
def test_the_figures_in_a_page_s_sentences_are_those_of_the_files(page):
    text = text_of(page)
    missing = [sentence for sentence in SENTENCES[page] if sentence not in text]
    assert not missing, f"{page} does not say:\n" + "\n".join(missing)
