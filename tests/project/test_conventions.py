"""The house rules that a machine can check: tools are clean, README and CI agree, figures are where they come from."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "checks"))

import mutants  # noqa: E402 (a script, not a package)

README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    return re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)


def test_ci_runs_exactly_the_test_command_of_the_readme():
    tour, tests = commands()
    assert tour.endswith("-m refq4 tour")
    system, suite = tests.splitlines()
    assert "chromium libsimde-dev;" in system, "the browser, and the headers with which tiers are emulated"
    assert "pytest" in suite
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert script[-2:] == [system, suite], "CI does nothing else, and nothing after the tests"


@pytest.mark.parametrize(
    "tool", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=["ruff check", "ruff format", "mypy"]
)
def test_the_code_is_clean_by(tool):
    done = subprocess.run(
        [sys.executable, "-m", *tool, *(["."] if tool[0] == "ruff" else [])], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readmes_python_runs(capsys):
    for block in re.findall(r"```python\n(.*?)\n```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), README_NAMES)
    assert "cast back" in capsys.readouterr().out


README_NAMES: dict[str, object] = {}


@pytest.fixture(autouse=True)
def isolated():
    from refq4.testing.isolation import isolated_registry

    with isolated_registry():
        yield


def test_links_of_the_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_page_of_planted_bugs_is_that_of_the_script():
    page = (ROOT / "docs" / "mutants.md").read_text()
    for mutant in mutants.MUTANTS:
        mutants.planted(mutant)  # raises where the source has moved on
        assert f"| {mutant.name} |" in page, f"{mutant.name}: run scripts/checks/mutants.py --write"
    assert f"{len(mutants.MUTANTS)} bugs, 0 survived" in page


def test_no_test_is_without_a_check():
    """A test function that checks nothing can't fail: each holds an assert, a raises or warns block, or a helper's."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for body in re.split(r"\n(?=def |class |@)", path.read_text()):
            name = re.search(r"def (test_\w+)", body)
            if name:
                checks = r"assert|raises|pytest\.warns|pytest\.fail|gradcheck|opcheck|\bcheck[_(]|simplefilter\(.error"
                assert re.search(checks, body), f"{path.name}: {name[1]} checks nothing"


def reading_order() -> list[str]:
    """The files of the layer, as the head of refq4/__init__.py lists them."""
    (block,) = re.findall(r"Read it .*?\n\n(.*?)\n\"\"\"", (ROOT / "refq4" / "__init__.py").read_text(), re.DOTALL)
    return [name for line in block.splitlines() for name in re.split(r"\s{3,}", line.strip())[0].split()]


def test_there_is_one_reading_order_and_every_file_at_the_top_stands_in_it():
    order = reading_order()
    assert order[0] == "one_page"
    at_the_top = [p.stem for p in (ROOT / "refq4").glob("*.py") if not p.stem.startswith("__")]
    assert sorted(order) == sorted([*at_the_top, "nn"])  # a folder, of which the layers are the __init__
    page = (ROOT / "docs" / "reading-the-code.md").read_text()
    assert re.findall(r"\(\.\./refq4/(\w+)(?:/__init__)?\.py\)", page) == order
    api = re.findall(r"^\| \[`refq4\.(\w+)`\]", (ROOT / "docs/reference/api/index.md").read_text(), re.MULTILINE)
    assert [name for name in api if name in order] == [name for name in order if name in api]
    assert len(set(api) & set(order)) > 8
