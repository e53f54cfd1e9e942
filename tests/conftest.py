"""What several test files share: options, seeds, and bitsandbytes as a fixture."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
import torch
from peer_path import CANONICAL, computing_on

from refq4.integrations import later
from refq4.testing.peer import quiet_bitsandbytes

PEER = "0.50.2"

later.told = True  # once in a process, so in whichever test comes first; the test of it begins with False

# The same examples on every run and machine; HYPOTHESIS_PROFILE=explore looks for new ones.
hypothesis.settings.register_profile(
    "repeat", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))

if "PYTEST_XDIST_WORKER" in os.environ:  # the processes share the cores: threads in each would wait for one another
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same for the programs and notebooks that tests start


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-peers",
        action="store_true",
        help="fail, instead of skipping, the tests that need bitsandbytes or a browser where there is none",
    )


@pytest.fixture(scope="session")
def bnb(request: pytest.FixtureRequest) -> ModuleType:
    """bitsandbytes 0.50.2, as its wheel is: with the kernels it could fetch from elsewhere kept out."""
    try:
        peer = quiet_bitsandbytes()
        missing = None if peer.__version__ == PEER else f"is {peer.__version__}, the tests are about {PEER}"
    except ImportError as error:
        missing = f"can't be imported ({error})"
    if missing:
        stop = pytest.fail if request.config.getoption("--require-peers") else pytest.skip
        stop(f"bitsandbytes {missing}: pip install -e '.[test]', or pip install bitsandbytes=={PEER}")
    return peer


@pytest.fixture
def peer_path(request: pytest.FixtureRequest, bnb: ModuleType) -> Iterator[str]:
    """The way in which the peer's layers compute in this test, whatever the processor: tests/support/peer_path.py."""
    with computing_on(bnb, getattr(request, "param", CANONICAL)) as path:
        yield path


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libcuda.so.1 compiled from fake_cuda.c: a driver without a GPU."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler for the driver that stands in for NVIDIA's: apt install gcc")
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).parent / "backends" / "cuda" / "fake_cuda.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source], check=True)
    return folder
