"""What is shipped: wheel and sdist with every source, an import that stays light, platforms that are told why."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from refq4_cpu import CpuBackend

import refq4

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = {
    "refq4": ROOT,
    "pytest_refq4": ROOT,
    "refq4_cpu": ROOT / "backends/cpu",
    "refq4_cuda": ROOT / "backends/cuda",
    "refq4_triton": ROOT / "backends/triton",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A directory with a wheel and an sdist of this checkout."""
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", out], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def tracked() -> set[str]:
    """The files of the packages that git knows, by their paths inside the wheel."""
    files = set()
    for name, parent in PACKAGES.items():
        listed = subprocess.run(["git", "ls-files", name], cwd=parent, capture_output=True, text=True, check=True)
        files |= set(listed.stdout.split())
    return files


# --- what is in them --------------------------------------------------------------------------------------------------


def test_the_wheel_holds_every_file_of_its_packages_and_no_other(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = {name.rpartition("/")[2]: wheel.read(name).decode() for name in wheel.namelist() if "dist-" in name}
    assert tracked() - names == set(), "tracked, and not in the wheel"
    assert not [name for name in names if re.search(r"__pycache__|\.so$|\.o$|^tests/|^notebooks/", name)]
    for wanted in (
        r"refq4_cpu/.*\.c$",
        r"refq4_cpu/.*\.h$",
        r"refq4_cuda/.*\.cu$",
        r"refq4/py\.typed",
        r"sentences\.txt",
    ):
        assert [name for name in names if re.search(wanted, name)], f"nothing like {wanted}"
    assert f"Version: {refq4.__version__}" in metadata["METADATA"]
    assert "refq4 = refq4.cli:main" in metadata["entry_points.txt"]


def test_the_sdist_holds_what_the_wheel_is_built_from(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "tests/conftest.py"} <= names
    for name, parent in PACKAGES.items():
        folder = (parent / name).relative_to(ROOT).as_posix()
        listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
        assert set(listed.stdout.split()) <= names


def test_an_index_takes_both(built):
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *built.iterdir()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2


def test_the_version_is_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text()
    assert PROJECT["version"] == refq4.__version__
    assert f"\nversion: {refq4.__version__}\n" in citation
    assert f"## {refq4.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_extra_and_entry_point_can_be_read():
    for requirements in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        for text in requirements:
            requirement = Requirement(text)
            if requirement.name == "refq4":
                assert requirement.extras <= PROJECT["optional-dependencies"].keys()
    for group in ("refq4.backends", "refq4.backends.by_name"):
        assert {point.name: point.value for point in entry_points(group=group)} == PROJECT["entry-points"][group]
    (script,) = (point for point in entry_points(group="console_scripts") if point.name == "refq4")
    assert callable(script.load())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"], ids=["wheel", "sdist"])
def test_it_installs_into_a_fresh_environment_and_works_there(built, kind, tmp_path):
    """refq4 alone is installed; its dependencies come from the environment of the tests, to fetch nothing."""
    run, site = installed(*built.glob(kind), tmp_path)
    assert run("python", "-c", "import refq4; print(refq4.__file__)").startswith(site)
    assert run("python", "-c", "import refq4_cuda; print(refq4_cuda.__file__)").startswith(site)
    backends = {backend["name"]: backend for backend in json.loads(run("refq4", "info", "--json"))["backends"]}
    assert backends["reference"]["available"]
    assert backends["cpu"]["available"] == refq4.backend_info("cpu")["available"]
    assert "cast back" in run("refq4", "explain", "64x128")


@pytest.mark.slow
def test_a_wheel_with_its_tiers_built_in_needs_no_compiler(tmp_path):
    if CpuBackend().available() is not None:
        pytest.skip("there is no C compiler here to build the tiers with")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, capture_output=True,
        text=True, env=os.environ | {"REFQ4_BUILD_TIERS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.whl")
    assert not path.name.endswith("-any.whl")
    run, _ = installed(path, tmp_path)
    (tmp_path / "empty").mkdir()
    env = {"PATH": str(tmp_path / "empty")}
    backends = {backend["name"]: backend for backend in json.loads(run("refq4", "info", "--json", **env))["backends"]}
    assert backends["cpu"]["available"]
    assert run("python", "-c", MULTIPLIES, **env).split() == ["none:", "it", "came", "with", "the", "wheel", "True"]
    assert not [*(tmp_path / "cache").rglob("*.so")], "nothing was compiled"


MULTIPLIES = """
import torch, refq4
W, x = torch.randn(48, 128), torch.randn(3, 128)
B, state = refq4.functional.quantize_4bit(W, quant_type="nf4", backend="cpu")
y, expected = (refq4.matmul_4bit(x, B, state, backend=name) for name in ("cpu", "reference"))
print(refq4.backend_info("cpu")["compiler"], torch.allclose(y, expected, atol=1e-3))
"""


def installed(path: Path, home: Path) -> tuple[Callable[..., str], str]:
    """A function that runs a program of a fresh environment with the package in it, and where packages are there."""
    venv.create(home / "env", with_pip=True)
    programs = home / "env" / ("Scripts" if os.name == "nt" else "bin")

    def run(program: str, *arguments: object, **environment: str) -> str:
        command = [programs / program, *map(str, arguments)]
        env = os.environ | {"REFQ4_CACHE_DIR": str(home / "cache")} | environment
        env = {name: value for name, value in env.items() if name not in ("PYTHONPATH", "CC")}
        done = subprocess.run(command, cwd=home, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    site = run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "dependencies.pth").write_text(str(Path(pytest.__file__).parent.parent))
    run("python", "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", path)
    return run, site


# --- importing it -----------------------------------------------------------------------------------------------------

PROBE = """
import sys, torch
before = set(sys.modules)
import refq4
new = sorted(set(sys.modules) - before)
refq4.testing.verify, refq4.checkpoint.quantize_checkpoint  # and these come when they are asked for
print("\\n".join(new))
"""


def test_importing_refq4_loads_itself_and_almost_nothing_else():
    """Time can't be asserted, what it is spent on can: no console, no kit, no backend, no library beside torch's."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    new = done.stdout.split()
    others = {name.partition(".")[0] for name in new} - {"refq4", "torch"}
    by_torch = {"_decimal", "_statistics", "decimal", "fractions", "numbers", "statistics", "triton"}  # when ops come
    assert others <= by_torch, others
    assert len([name for name in new if name.startswith("refq4")]) <= 30
    late = ("refq4.testing", "refq4.cli", "refq4.bench", "refq4.checkpoint", "refq4.models", "refq4.tools")
    assert not [name for name in new if name.startswith(late)]


WITHOUT = """
import sys
for name in ("numpy", "safetensors", "shtab"):
    sys.modules[name] = None  # as if it were not installed
import warnings
warnings.filterwarnings("ignore", message=".*NumPy.*")
import torch, refq4
from refq4.cli import main
layer = refq4.nn.LinearNF4(64, 8).to("cpu").eval()
with refq4.trace() as t:
    layer(torch.ones(1, 64))
print(t)
x = torch.ones(1, 64, requires_grad=True)
layer(x).sum().backward()
refq4.quantize_model(torch.nn.Sequential(torch.nn.Linear(64, 8)))
assert main(["info"]) == 0
assert main(["complete", "bash"])
assert main(["inspect", "nowhere.safetensors"])
"""


def test_a_layer_and_the_backends_need_few_packages_and_what_needs_more_says_how_to_get_it():
    assert sorted(Requirement(text).name for text in PROJECT["dependencies"]) == [
        "filelock", "platformdirs", "rich", "torch", "tqdm",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "own layout" in done.stdout or "canonical" in done.stdout
    for extra in ("[cli]", "[checkpoint]"):
        assert extra in done.stderr


# --- other platforms --------------------------------------------------------------------------------------------------


ELSEWHERE = """
import importlib, os, sys
import torch, ctypes, subprocess, pathlib, pickle, platformdirs, filelock, numpy, rich.console, shtab  # unchanged
from refq4 import registry
{changes}
import refq4
info = refq4.backend_info("cpu")
layer = refq4.nn.LinearNF4(64, 8).to("cpu")
with refq4.trace() as t:
    layer(torch.ones(1, 64))
from refq4.cli import parser
parser()  # and the command line can be built
print({{op.backend for op in t.ops}} | {{str(info["reason"])}})
"""


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ("os.name = 'nt'; del os.sched_getaffinity, os.getuid", "written for POSIX threads (not Windows)"),
        ("sys.byteorder = 'big'", "little-endian memory; use the reference"),
        ("del os.sched_getaffinity; os.environ['PATH'] = ''; os.environ.pop('CC', None)", "there is no C compiler"),
    ],
    ids=["Windows", "big-endian", "macOS without its compiler"],
)
def test_where_the_cpu_backend_cant_work_it_says_why_and_the_reference_runs(changes, says, tmp_path):
    """As far as a simulation goes: what the system would answer is changed, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE.format(changes=changes)],
        capture_output=True,
        text=True,
        env=os.environ | {"REFQ4_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    assert "'reference'" in done.stdout
