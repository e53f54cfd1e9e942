"""A run starts with an empty HOME and empty caches, and leaves nothing in the user's own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import platformdirs
import pytest

from refq4.internals.buildcache import cache_directory

pytestmark = pytest.mark.reference_only("it is about the test run itself")

ROOT = Path(__file__).parents[2]
RUN = Path(os.environ["HOME"]).parent


def users_home() -> Path:
    """From the system's list of users, which no variable changes."""
    pwd = pytest.importorskip("pwd", reason="Windows has no list of users to ask: run this on Linux or macOS")
    return Path(pwd.getpwuid(os.getuid()).pw_dir)


def test_every_cache_in_effect_is_in_a_folder_of_this_run():
    from matplotlib import get_cachedir, get_configdir
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    places = [cache_directory("cpu"), Path.home(), platformdirs.user_cache_path("refq4"), Path(cache_dir())]
    places += [Path(get_cachedir()), Path(get_configdir()), Path("~/.cache/huggingface").expanduser()]
    for place in places:
        assert place.resolve().is_relative_to(RUN), place
    assert RUN.is_relative_to(Path(tempfile.gettempdir()).resolve())
    assert not RUN.is_relative_to(users_home())


def test_a_process_that_a_test_starts_has_the_same_folders():
    code = "import pathlib, refq4.internals.buildcache as b; print(pathlib.Path.home(), b.cache_directory('cpu'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(RUN / "home"), str(cache_directory("cpu"))]


SMALL_RUN = '''
"""
>>> import os, pathlib; pathlib.Path("said").open("a").write(os.environ["REFQ4_CACHE_DIR"] + "\\\\n") > 0
True
"""
import os, pathlib
import pytest

@pytest.mark.parametrize("i", range(2))
def test_it(i):
    pathlib.Path.home().joinpath("mine").write_text("left")
    pathlib.Path("said").open("a").write(os.environ["REFQ4_CACHE_DIR"] + "\\n")
    assert {"XDG_CACHE_HOME", "HF_HOME"}.isdisjoint(os.environ)
'''


def test_a_run_uses_a_folder_of_its_own_whatever_is_set_and_takes_it_away(tmp_path):
    """A small run inside this one: the rules of the checkout, a module with a doctest and two tests, two processes."""
    (tmp_path / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(SMALL_RUN)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    names = ("HOME", "REFQ4_CACHE_DIR", "XDG_CACHE_HOME", "HF_HOME")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--doctest-modules", "-p", "no:cacheprovider"]
    environment = os.environ | dict.fromkeys(names, str(theirs))
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = (tmp_path / "said").read_text().split()
    assert len(said) == 3
    (folder,) = set(said)  # all processes share it
    assert not Path(folder).is_relative_to(theirs)
    assert not Path(folder).parent.exists()
    assert not list(theirs.iterdir())


def test_the_tests_of_an_installed_kit_keep_the_caches_of_their_user(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os, pathlib, refq4\nfrom refq4.reference import ReferenceBackend\n"
        "class Mine(ReferenceBackend):\n    name = 'mine'\nrefq4.register_backend(Mine())\n"
        "def pytest_sessionfinish():\n"
        "    pathlib.Path('said').write_text(os.environ['REFQ4_CACHE_DIR'] + os.environ['HOME'])\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "mine", "-p", "no:cacheprovider", "-k", "m1_n1_k1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    environment |= {"REFQ4_CACHE_DIR": "/their/cache", "HOME": "/their/home"}
    command += ["--collect-only", "--pyargs", "refq4.testing", "--backend", "mine", "--rootdir", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "unrecognized arguments" not in done.stderr, done.stderr
    assert (tmp_path / "said").read_text() == "/their/cache/their/home"
