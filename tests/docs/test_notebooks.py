"""The notebooks run, and what they show is what they showed when they were committed."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "docs"))

import nbformat  # noqa: E402

import notebooks  # noqa: E402 (a script, not a package)

pytestmark = pytest.mark.reference_only("a notebook chooses its backends itself")

RELATIVE = 0.02  # of a number with a decimal point; whole numbers and words must be the same
COLUMN = 88  # characters of code that stand side by side on a page: assets/site.css, notebooks/ruff.toml
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])")

every_notebook = pytest.mark.parametrize("source", notebooks.sources(), ids=lambda path: path.stem)


@every_notebook
def test_the_pair_holds_the_same_cells_and_nothing_of_the_machine_that_made_it(source):
    committed = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(committed)
    fresh = notebooks.read_source(source)
    assert plain(committed) == plain(fresh), f"run scripts/docs/notebooks.py {int(source.name[:2])}"
    assert committed.metadata == fresh.metadata
    text = source.with_suffix(".ipynb").read_text()
    for trace in ("/home/", "/root/", "/tmp/", "/work", "site-packages", "ipykernel_", " at 0x", str(ROOT)):
        assert trace not in re.sub(r'"image/png": ".*?"', "", text), f"{source.stem} shows {trace}"


@every_notebook
def test_it_runs_and_shows_what_is_committed(source):
    fresh = notebooks.read_source(source)
    notebooks.execute(fresh)
    committed = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    for new, old in zip(fresh.cells, committed.cells, strict=True):
        if new.cell_type == "code" and notebooks.TIMING not in new.metadata.get("tags", []):
            check_same_text(text_of(new), text_of(old), where=f"{source.stem} {new.id}:\n{new.source}")


@every_notebook
def test_its_code_fits_the_column_of_its_page(source):
    long = [line for cell in notebooks.read_source(source).cells if cell.cell_type == "code"
            for line in cell.source.splitlines() if len(line) > COLUMN]  # fmt: skip
    assert not long, f"more than {COLUMN} characters:\n" + "\n".join(long)


def test_every_notebook_has_both_halves():
    halves = {path.stem for path in notebooks.NOTEBOOKS.glob("*.ipynb")}
    assert halves == {path.stem for path in notebooks.sources()}
    assert halves


@every_notebook
def test_every_picture_says_what_it_shows(source):
    pictures = 0
    for cell in nbformat.read(source.with_suffix(".ipynb"), as_version=4).cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                pictures += 1
                described = output.metadata.get("image/png", {}).get("alt", "")
                assert len(described) > 20, f"{source.stem} {cell.id}: picture.show(figure, 'what is to be seen')"
                kibibytes = len(output.data["image/png"]) * 3 / 4 / 1024
                assert kibibytes < 75, f"{source.stem} {cell.id}: {kibibytes:.0f} KiB"
    assert pictures


def test_what_is_said_about_compiling_is_no_output_and_any_other_word_on_stderr_is_an_error():
    """The first run on a machine compiles, a later one does not: a cell shows the same."""
    said = "import sys; say = sys.stderr.write; say('refq4: compiling a.cu (once) ...'); say(' 0.1 s\\n')"
    clean, dirty = (nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"{said}{more}")]) for more in WORDS)
    notebooks.execute(clean)
    assert [text_of(cell) for cell in clean.cells] == ["shown"]
    with pytest.raises(ValueError, match="wrote to stderr: a warning"):
        notebooks.execute(dirty)


WORDS = ("; print('shown', end='')", "; _ = say('a warning')")


# --- comparing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "old"),
    [
        pytest.param("error 0.0938", "error 0.0939", id="a number within 2 %"),
        pytest.param("1,024  bytes", "1,024 bytes", id="the columns of a table may be wider"),
        pytest.param("-1.5e-03 and nf4", "-1.51e-03 and nf4", id="an exponent, and a digit in a word"),
        pytest.param("nan", "nan", id="a NaN that is meant"),
    ],
)
def test_texts_that_agree_pass(new, old):
    check_same_text(new, old, "")


@pytest.mark.parametrize(
    ("new", "old"),
    [
        pytest.param("error 0.0938", "error 0.0990", id="a number 5 % off"),
        pytest.param("1,024 bytes", "1,025 bytes", id="a whole number one off"),
        pytest.param("nan", "0.5", id="a NaN for a number"),
        pytest.param("0.5", "nan", id="a number for a NaN"),
        pytest.param("inf", "0.5", id="an infinity for a number"),
        pytest.param("gemv_4bit", "MatMul4Bit", id="another word"),
        pytest.param("nf4", "nf3", id="another digit in a word"),
        pytest.param("0.5", "-0.5", id="another sign"),
        pytest.param("0.5 0.5", "0.5", id="a number more"),
        pytest.param("", "0.5", id="nothing"),
    ],
)
def test_texts_that_differ_fail(new, old):
    with pytest.raises(AssertionError, match="somewhere"):
        check_same_text(new, old, "somewhere")


def check_same_text(new: str, old: str, where: str) -> None:
    """The same words and whole numbers, and numbers with a decimal point within ``RELATIVE``."""
    assert NUMBER.sub("#", new).split() == NUMBER.sub("#", old).split(), f"{where}\nis now\n{new}\nwas\n{old}"
    for a, b in zip(NUMBER.findall(new), NUMBER.findall(old), strict=True):
        whole = re.fullmatch(r"[-+]?[\d,]+", b)
        near = math.isclose(float(a.replace(",", "")), float(b.replace(",", "")), rel_tol=RELATIVE)
        assert a == b if whole else near, f"{where}\n{a} was {b} in\n{new}"


def plain(notebook: nbformat.NotebookNode) -> list[tuple]:
    return [(cell.id, cell.cell_type, cell.source, dict(cell.metadata)) for cell in notebook.cells]


def text_of(cell: nbformat.NotebookNode) -> str:
    """All that a cell wrote as text; of a table shown as HTML its plain form, of a picture nothing."""
    parts = []
    for output in cell.outputs:
        data = output.get("data", {})
        if output.output_type == "stream":
            parts.append(output.text)
        elif "image/png" not in data:
            parts.append(data.get("text/markdown") or data.get("text/plain", ""))
    return "\n".join(parts)
