"""The tutorial's backend is right, short, and its planted bug is found: what docs/write-a-backend.md shows."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import refq4
from refq4.testing import CHECKS, verify
from refq4.testing.cases import DEPTHS

DOCS = Path(__file__).parents[2] / "docs"
pytestmark = pytest.mark.reference_only("it registers a backend of its own")


@pytest.fixture(scope="module")
def tutorial():
    spec = importlib.util.spec_from_file_location("numpy_backend", DOCS / "numpy_backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_under_a_hundred_lines_and_computes_with_numpy():
    source = (DOCS / "numpy_backend.py").read_text()
    assert len(source.splitlines()) < 100
    assert "reference" not in source.split('if __name__ == "__main__":')[0].split('"""')[2]


def test_it_answers_every_question_as_the_reference_does(tutorial):
    refq4.register_backend(tutorial.NumpyBackend())
    report = verify("numpy", depth="quick", progress=False)
    assert report.agrees, str(report)
    assert report.cases == (len(CHECKS) - 1) * DEPTHS["quick"]
    assert not any(check.refused for check in report.checks)


def test_its_planted_bug_is_found_with_the_words_of_the_page(tutorial):
    refq4.register_backend(tutorial.BuggyBackend())
    report = verify("buggy", depth="quick", checks=("gemm_4bit",), progress=False)
    assert not report.agrees
    page = (DOCS / "write-a-backend.md").read_text()
    shown = str(report)
    for line in page.split("gemm_4bit differs", 1)[1].split("```")[0].splitlines()[1:]:
        assert " ".join(line.split()) in " ".join(shown.split()), line


def test_the_program_of_the_page_verifies_it(monkeypatch, capsys):
    monkeypatch.syspath_prepend(DOCS)
    program = (DOCS / "write-a-backend.md").read_text().split("```python\n", 1)[1].split("```")[0]
    names = {}
    exec(compile(program, "write-a-backend.md", "exec"), names)
    assert names["report"].agrees
    assert "numpy agrees with reference" in capsys.readouterr().out
