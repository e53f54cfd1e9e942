"""The scripts behind the tables of "How good is it?": formats do what their papers say, on small weights."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "models"))

import neighbours  # noqa: E402 (scripts, no packages)
import settings  # noqa: E402

pytestmark = pytest.mark.reference_only("it is about the documentation")


@pytest.fixture(scope="module")
def weight_and_moment() -> tuple[torch.Tensor, torch.Tensor]:
    """W [64, 256], and the second moment of inputs of which a few channels are large and all are correlated."""
    torch.manual_seed(0)
    x = torch.randn(2000, 32) @ torch.randn(32, 256) + 0.3 * torch.randn(2000, 256)
    x[:, ::50] *= 20
    return torch.randn(64, 256), x.T @ x / len(x)


def output_error(new: torch.Tensor, W: torch.Tensor, H: torch.Tensor) -> float:
    """The mean of ``|(new - W) x|²``."""
    return float(((new - W) @ H * (new - W)).sum())


def test_integers_are_within_half_a_step(weight_and_moment):
    W, H = weight_and_moment
    new = neighbours.integers(W, H)
    for group, decoded in zip(W.split(128, dim=1), new.split(128, dim=1), strict=True):
        scale, _ = neighbours.scale_and_zero(group)
        assert bool(((decoded - group).abs() <= 1.01 * scale).all())
        assert float((decoded - group).abs().median() / scale.median()) == pytest.approx(0.25, abs=0.02)
        assert max(len(row.unique()) for row in decoded) <= 16


def test_gptq_and_awq_lose_less_of_the_output_than_rounding_to_the_nearest(weight_and_moment):
    W, H = weight_and_moment
    nearest, moved, scaled = (
        output_error(f(W, H), W, H) for f in (neighbours.integers, neighbours.gptq, neighbours.awq)
    )
    assert moved < 0.5 * nearest
    assert scaled < 0.5 * nearest


def test_gptq_without_anything_to_make_good_is_rounding_to_the_nearest(weight_and_moment):
    W, _ = weight_and_moment
    assert torch.equal(neighbours.gptq(W, torch.eye(256)), neighbours.integers(W, torch.eye(256)))


def test_mxfp4_and_q4_0_by_hand():
    x = torch.zeros(1, 32)
    x[0, :7] = torch.tensor([-7.5, 5.1, 2.4, 1.76, 0.3, 0.2, -0.9])  # scale 1: the largest is in [4, 8)
    assert neighbours.mxfp4(x, x)[0, :7].tolist() == [-6.0, 6.0, 2.0, 2.0, 0.5, 0.0, -1.0]
    assert neighbours.mxfp4(8 * x, x).equal(8 * neighbours.mxfp4(x, x))
    x[0, :7] = torch.tensor([-8.0, 8.0, 6.6, 0.4, 0.6, -0.4, -3.7])  # step 1: -8 is code 0, and 7 is the last
    assert neighbours.q4_0(x, x)[0, :7].tolist() == [-8.0, 7.0, 7.0, 0.0, 1.0, 0.0, -4.0]
    assert neighbours.q4_0(-x, x)[0, :2].tolist() == [8.0, -7.0]


def test_both_tables_come_out_for_a_model(tmp_path, capsys, monkeypatch):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is missing: pip install -e '.[transformers]'"
    )
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is missing: pip install -e '.[transformers]'")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 257,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "initializer_range": 0.2,
    }
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path)
    pieces = tokenizers.Tokenizer(tokenizers.models.BPE())
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    pieces.train_from_iterator(
        [],
        tokenizers.trainers.BpeTrainer(
            vocab_size=256, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=pieces).save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("every sentence needs a subject. " * 40)
    settings.language_model(tmp_path, text, 1, settings.in_settings)
    monkeypatch.setattr(sys, "argv", ["neighbours.py", str(tmp_path), str(text), "--sequences", "1"])
    neighbours.main()
    rows = re.findall(r"^\| (.*?) \| ([\d.]+) \| ([\d.]+) \| ([\d.e-]+) \|", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, *_ in rows] == [*settings.FORMATS, *neighbours.FORMATS]
    assert all(0.05 < float(error) < 0.2 and 0 < float(kl) < 1 for _, _, error, kl in rows)
    errors = {name: float(error) for name, _, error, _ in rows}
    assert errors["NF4, blocks of 64"] == pytest.approx(float(rows[1][2]), abs=2e-4), "two ways to the same figure"


def test_a_training_step_is_split_into_shares_and_its_products_are_counted():
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "models_bench.py"), "qlora", "--small", "--steps", "3"]
    done = subprocess.run([*command, "--json", "-"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    shares = report["a step of refq4, ms of each"]
    products = ("4-bit layers, forward", "4-bit layers, gradient", "for comparison: the 4-bit layers of bitsandbytes")
    assert all(shares[name] > 0 for name in products)
    assert report["largest relative distance of the losses"] < 1e-3
    # one block of 64 and 128 features: its weights, times 128 tokens, forward, again for the checkpoint, and backward
    operations = 2 * 128 * (4 * 64 * 64 + 3 * 64 * 128) * 3
    per_ms = operations / shares["for comparison: the 4-bit products at the machine's peak"]
    assert 1e6 < per_ms < 1e11  # between a Gflop and a hundred Tflop a second
