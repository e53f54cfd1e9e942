"""bitsandbytes as a backend: found, refused where it is missing, and each of its differences explained or shown."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

import refq4
from refq4.testing import Case, verify
from refq4.testing import peer as adapter
from refq4.testing.peer_differences import ENTRIES, explain

DOCS = Path(__file__).parents[2] / "docs"


def test_every_difference_on_the_quick_catalogue_is_explained(bnb):
    report = verify("bitsandbytes", depth="quick", progress=False)
    assert report.agrees, str(report)
    met = {name for check in report.checks for names in check.known for name in names.split("; ")}
    assert {"FP4 follows the CUDA rule on every device", "Nested scales take the nearest entry"} <= met <= set(ENTRIES)


def test_the_names_are_headings_of_the_page_and_rows_of_the_table():
    page, table = ((DOCS / name).read_text() for name in ("differences.md", "bitsandbytes-differences.md"))
    for name in ENTRIES:
        assert f"\n### {name}\n" in page
        assert f"\n| {name} |" in table


@pytest.mark.parametrize("op", ["quantize_4bit", "dequantize_4bit", "gemm_4bit"])
def test_a_difference_that_no_entry_accounts_for_stays_unexplained(bnb, monkeypatch, op):
    right = getattr(adapter.BitsandbytesBackend, op)

    def wrong(self, *args):
        result = right(self, *args)
        return (result[0] ^ 1, result[1]) if isinstance(result, tuple) else result + 1

    monkeypatch.setattr(adapter.BitsandbytesBackend, op, wrong)
    for code in ("nf4", "fp4"):
        assert explain(Case(op, n=4, code=code)) is None
    assert not verify("bitsandbytes", depth="quick", checks=(op,), progress=False).agrees


def test_it_is_taken_by_name_only():
    assert "bitsandbytes" in refq4.list_backends()
    assert "bitsandbytes" not in refq4.registry.automatic_backends()


@pytest.mark.parametrize(("found", "says"), [(None, "is not installed"), ("0.49.1", "has no operator gemm_4bit")])
def test_without_a_fitting_bitsandbytes_it_says_what_to_install(monkeypatch, found, says):
    def version(name):
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(adapter, "version", version)
    reason = adapter.BitsandbytesBackend().available()
    assert says in reason
    assert reason.endswith("pip install bitsandbytes==0.50.2")


def test_another_table_of_values_is_refused(bnb):
    with pytest.raises(refq4.BackendUnsupportedError, match="this code is neither"):
        adapter.type_of(torch.zeros(16))
