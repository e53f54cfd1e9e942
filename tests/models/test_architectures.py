"""Every model type of transformers, quantised in every way: one of each sort by default, all of them with -m slow."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "models"))

import sweep  # noqa: E402 (a script, not a package)
import tiny  # noqa: E402 (likewise)

PAGE = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("model_type", ["vit", "nomic_bert"], ids=["renamed", "taken apart"])
def test_a_model_type_is_the_same_through_every_door(model_type):
    row = sweep.sweep(model_type)
    assert not row.excluded
    assert row.fails == []
    assert row.cells["command"] == row.cells["reload"] == row.cells["quantize_model"] == "same"
    assert row.share > 0.99
    assert row.cosine > 0.98
    assert f"| `{model_type}` | `{row.model}` |" in PAGE


def test_a_door_that_fails_where_bitsandbytes_does_not_is_called_so(monkeypatch, bnb):
    def broken(*args: object, **settings: object) -> None:
        raise ValueError("on purpose")

    monkeypatch.setattr(sweep, "quantize_checkpoint", broken)
    row = sweep.sweep("bert")
    assert row.fails == ["command: fails: ValueError: on purpose"]
    monkeypatch.setattr(sweep, "_bitsandbytes", lambda kind, root: "it fails, too")
    assert sweep.sweep("bert").cells["command"] == "refused: ValueError: on purpose"


def test_a_type_that_takes_no_part_has_its_reason():
    assert sweep.sweep("convnext_of_nowhere").excluded.startswith("KeyError")
    taken = sweep.Row("bert", model="B", kind="text", cells=dict.fromkeys(sweep.DOORS, "same"))
    page = sweep.page([sweep.sweep("convnext_of_nowhere"), taken])
    assert "| `bert` | `B` | text | 0% | 0.000 | same | same | same | same |" in page
    assert "| `convnext_of_nowhere` | KeyError" in page


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_no_model_type_fails_at_a_door(part):
    rows = [sweep.sweep(model_type) for model_type in tiny.model_types()[part::8]]
    assert [f"{row.type}, {said}" for row in rows for said in row.fails] == []
    assert sum(not row.excluded for row in rows) >= 60 / 8
