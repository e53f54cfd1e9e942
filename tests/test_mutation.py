"""The mutation tests' own machinery: what counts as a mutant, that a bug is seen to be killed and a sound tree passes.

What it found is docs/mutation-testing.md; that page is held to its reports here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import mutate_core_mutants  # noqa: E402 (a script, not a package)
import mutate_kernels_mutants  # noqa: E402
import mutation_page  # noqa: E402

pytestmark = pytest.mark.reference_only("it is about the tests")

SOURCE = '''\
"""A module."""
import math

LIMIT = 3


def add(a: int, b: int = 2) -> int:
    """The sum, cut off."""
    if a is None:
        raise ValueError(f"no {a + 1}")
    return min(a + b, 10)


def unseen(a: int) -> int:
    return a + LIMIT


def __repr__():
    return "x"
'''

TESTS = """
from package.thing import LIMIT, add, unseen

def test_a_sum():
    assert add(1, 1) == 2

def test_a_sum_by_default():
    assert add(1) == 3

def test_the_limit():
    assert LIMIT == 3
    unseen(1)
"""


def test_texts_types_and_what_compiles_to_the_same_are_no_mutants():
    found = {(m.function, m.after) for m in mutate_core_mutants.mutants_of("thing.py", SOURCE.encode())}
    assert {("module", "LIMIT = 4"), ("module", "LIMIT = None")} <= found
    assert ("add", "return min(a - b, 10)") in found
    assert ("add", "if a is not None:") in found
    assert ("add", "def add(a: int, b: int = 3) -> int:") in found
    assert not any("raise" in after or "import" in after or "XX" in after for _, after in found)
    assert "__repr__" not in {function for function, _ in found}


def test_each_mutant_of_c_is_one_change_outside_comments_types_and_tuning():
    source = """
/* a + b */
#define N (3 + 4)
enum { DEPTH = 256 };
static float scale(const float *x, int64_t i) {
    float table[8] = {0};
    _mm_prefetch(x + i, 1);
    return i < 4 ? x[i >> 2] * -2.0f : min64(i, 7);
}
"""
    found = mutate_kernels_mutants.mutants_of("kernel.c", source)
    assert {m.function for m in found} == {"scale"}
    line = "return i < 4 ? x[i >> 2] * -2.0f : min64(i, 7);"
    for old, new in {
        "<": "<=", "i < 4": "i < 5", ">>": "<<", ">> 2": ">> 1", "* -": "+ -", "2.0f": "3.0f", "min64(i, 7)": "(7)",
    }.items():  # fmt: skip
        assert line.replace(old, new) in {m.after for m in found}, new
    assert all(m.before == line or m.before == "float table[8] = {0};" for m in found)
    for mutant in found:
        changed = mutant.apply(source.encode()).decode().splitlines()
        assert sum(a != b for a, b in zip(changed, source.splitlines(), strict=True)) == 1


@pytest.mark.parametrize("way", ["swap", "reimport"])
def test_a_bug_is_killed_by_the_test_that_sees_it_and_a_sound_tree_passes(tmp_path: Path, way: str):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "thing.py").write_text(SOURCE)
    (tmp_path / "test_thing.py").write_text(TESTS)
    tests = {f"test_thing.py::{name}": 0.01 for name in ("test_a_sum", "test_a_sum_by_default", "test_the_limit")}
    by_text = {m.after: m for m in mutate_core_mutants.mutants_of("package/thing.py", SOURCE.encode())}
    sound = by_text["LIMIT = 4"].plain() | {"text": "3", "key": "sound"}
    wanted = {
        by_text["return min(a - b, 10)"].key: "test_thing.py::test_a_sum",
        by_text["def add(a: int, b: int = 3) -> int:"].key: "test_thing.py::test_a_sum_by_default",
        by_text["LIMIT = 4"].key: "test_thing.py::test_the_limit",
        by_text["return a - LIMIT"].key: None,
        "sound": None,
    }
    mutants = [m.plain() for m in by_text.values() if m.key in wanted] + [sound]
    found = serve(tmp_path, way, [{"mutant": mutant, "tests": tests} for mutant in mutants])
    if way == "swap":  # a default and a constant are not inside a function: the other way is asked for
        for text in ("LIMIT = 4", "def add(a: int, b: int = 3) -> int:"):
            assert found[by_text[text].key]["status"] == "reimport"
            del wanted[by_text[text].key]
    # the last killer of a function is tried first on its next mutant, and either sum sees a wrong sign
    either = {"test_thing.py::test_a_sum_by_default": "test_thing.py::test_a_sum"}
    wrong_sign = by_text["return min(a - b, 10)"].key
    killers = {key: found[key].get("by") for key in wanted}
    killers[wrong_sign] = either.get(str(killers[wrong_sign]), killers[wrong_sign])
    assert killers == wanted
    assert {found[key]["status"] for key, test in wanted.items() if test is None} == {"survived"}


def test_the_page_is_that_of_its_reports_and_no_survivor_is_without_an_explanation():
    core, kernels = (json.loads((mutation_page.REPORTS / f"{name}.json").read_text()) for name in ("core", "kernels"))
    assert mutation_page.PAGE.read_text() == mutation_page.page(core, kernels), "run scripts/mutation_page.py"
    assert not mutation_page.unexplained(core) + mutation_page.unexplained(kernels)
    used = [mutation_page.explanation(survivor) for survivor in core["survivors"] + kernels["survivors"]]
    assert [e for e in tomllib.loads(mutation_page.EXPLAINED.read_text())["survivor"] if e not in used] == []
    assert mutation_page.scores(core)["all"].share >= 0.90
    assert mutation_page.scores(kernels)["all"].share >= 0.95


def serve(root: Path, way: str, mutants: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    results, plan = root / "results", root / "plan.json"
    arguments = ["-q", "-W", "error", "-p", "no:cacheprovider", "-p", "no:refq4", "--rootdir", str(root)]
    what = {"way": way, "root": str(root), "jobs": 2, "results": str(results), "pytest": arguments}
    what["imports"] = ["hypothesis", "pytest_cov"]  # which pytest would rather import itself, and says so
    plan.write_text(json.dumps(what | {"files": ["test_thing.py"], "mutants": mutants}))
    paths = os.pathsep.join([str(root), str(ROOT / "scripts")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "mutate_core_server.py")],
        env=os.environ | {"REFQ4_MUTATION_PLAN": str(plan), "PYTHONPATH": paths},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert results.exists(), done.stdout + done.stderr
    return {line["key"]: line for line in map(json.loads, results.read_text().splitlines())}
