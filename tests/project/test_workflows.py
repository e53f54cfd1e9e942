"""The workflow of other people's machines runs what runs here, and its file is what GitHub reads."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.reference_only("it is about how the tests are run")

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
LINUX, ELSEWHERE = WORKFLOW["jobs"]["linux"], WORKFLOW["jobs"]["elsewhere"]
NOX = ast.parse((ROOT / "noxfile.py").read_text())


def commands(job: dict) -> list[str]:
    return [step["run"].strip() for step in job["steps"] if "run" in step]


def check(path: Path) -> subprocess.CompletedProcess[str]:
    """By the schema that comes inside the package: nothing is fetched."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def schema(request: pytest.FixtureRequest) -> None:
    if importlib.util.find_spec("check_jsonschema") is None:
        stop = pytest.fail if request.config.getoption("--require-peers") else pytest.skip
        stop("check-jsonschema, which knows the schema of workflows, is not installed: pip install -e '.[test]'")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
@pytest.mark.usefixtures("schema")
def test_a_workflow_is_valid_by_githubs_schema(path):
    done = check(path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("before", "after"),
    [("runs-on:", "run-on:"), ("  push:", "  pushed:"), ("contents: read", "contents: sometimes")],
    ids=["a key", "an event", "a value"],
)
@pytest.mark.usefixtures("schema")
def test_the_schema_refuses_what_is_misspelt(before, after, tmp_path):
    text = FILES[0].read_text()
    assert before in text
    (tmp_path / "tests.yml").write_text(text.replace(before, after, 1))
    assert check(tmp_path / "tests.yml").returncode == 1


def test_linux_runs_the_command_of_the_readme_and_nothing_else_that_could_pass_for_it():
    assert commands(LINUX)[-1] == "bash .ci/run"  # which tests/project/test_conventions.py holds to the README
    assert [command for command in commands(LINUX) if "pytest" in command or "pip" in command] == []
    machines = LINUX["strategy"]["matrix"]["machine"]
    assert len(machines) == 2
    assert [machine.endswith("-arm") for machine in machines] == [False, True]


def test_macos_and_windows_run_the_session_of_the_noxfile():
    assert commands(ELSEWHERE)[-1] == "python -m nox -s portable"
    sessions = [node.name for node in NOX.body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    assert "portable" in sessions
    assert {machine.split("-")[0] for machine in ELSEWHERE["strategy"]["matrix"]["machine"]} == {"macos", "windows"}
    assert "nox -s portable" in (ROOT / "CONTRIBUTING.md").read_text()


def test_every_job_runs_on_the_oldest_and_the_newest_python_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest, beyond = map(int, re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"]).groups())
    for job in (LINUX, ELSEWHERE):
        assert job["strategy"]["matrix"]["python"] == [f"3.{oldest}", f"3.{beyond - 1}"]


def test_every_job_reads_only_ends_in_time_and_uses_actions_by_version():
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert WORKFLOW["concurrency"]["cancel-in-progress"] is True
    for name, job in WORKFLOW["jobs"].items():
        assert job["timeout-minutes"] <= 90, name
        assert "permissions" not in job, name
        used = [step["uses"] for step in job["steps"] if "uses" in step]
        assert used, name
        assert all(re.search(r"@v\d+\.\d+\.\d+$", action) for action in used), used


def test_the_portable_tests_exist_and_import_nothing_of_unix_or_of_another_library():
    (listed,) = (n.value for n in NOX.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "PORTABLE")
    files = ast.literal_eval(listed)
    assert len(files) >= 6
    allowed = {"torch", "pytest", "hypothesis", "expecttest", "numpy", "safetensors", "refq4", "__future__"}
    allowed |= sys.stdlib_module_names - {"fcntl", "resource", "pty", "termios", "pwd", "grp"}
    for file in files:
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                top = module.split(".")[0]
                assert top in allowed or (ROOT / "tests" / "support" / f"{top}.py").exists(), f"{file} imports {module}"
