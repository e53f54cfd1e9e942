"""Every test run starts from empty: HOME and all caches are new folders, which the processes of the run share.

A test that passes only because an earlier run compiled or downloaded something is seen at once, and a run leaves
nothing behind in the user's own folders. This holds for the tests and the doctests of this checkout. The run of a
backend's author, ``pytest --pyargs refq4.testing`` in a project of their own, keeps the caches of its user.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

FOLDER = pytest.StashKey[str]()
# What says where something is kept, in place of HOME: without it, HOME decides.
ELSEWHERE = (
    *("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_MODULES_CACHE", "TORCH_HOME", "TRITON_CACHE_DIR", "MPLCONFIGDIR"),
    *("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_PLATFORM_DIRS"),
)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Make the folders, in the process that starts the others: they inherit its environment."""
    if hasattr(config, "workerinput") or config.rootpath != Path(__file__).parent:
        return
    folder = Path(tempfile.mkdtemp(prefix="refq4-tests-")).resolve()
    config.stash[FOLDER] = str(folder)
    for name in ("home", "cache", "inductor"):
        (folder / name).mkdir(mode=0o700)
    pip = Path.home() / ".config" / "pip" / "pip.conf"  # how this machine reaches an index is not what is tested
    if pip.exists():
        os.environ.setdefault("PIP_CONFIG_FILE", str(pip))
    for name in ELSEWHERE:
        os.environ.pop(name, None)
    os.environ |= {"HOME": str(folder / "home"), "USERPROFILE": str(folder / "home")}
    os.environ["REFQ4_CACHE_DIR"] = str(folder / "cache")
    # torch keeps compiled backward graphs on disk without looking at an op's autograd code: stale ones mislead.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Take the folders away again."""
    if FOLDER in config.stash:
        shutil.rmtree(config.stash[FOLDER], ignore_errors=True)
