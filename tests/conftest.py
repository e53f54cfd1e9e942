"""What several test files share: options, and bitsandbytes as a fixture."""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType

import pytest

PEER = "0.50.2"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-peers",
        action="store_true",
        help="fail, instead of skipping, the tests that compare with bitsandbytes where it is not installed",
    )


@pytest.fixture(scope="session")
def bnb(request: pytest.FixtureRequest) -> ModuleType:
    """bitsandbytes 0.50.2, as its wheel is: with the kernels it could fetch from elsewhere kept out."""
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")  # says at import that there are none
    level = log.level
    log.setLevel(logging.ERROR)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setitem(sys.modules, "kernels", None)
    try:
        peer = importlib.import_module("bitsandbytes")
        missing = None if peer.__version__ == PEER else f"is {peer.__version__}, the tests are about {PEER}"
    except ImportError as error:
        missing = f"can't be imported ({error})"
    finally:
        monkeypatch.undo()
        log.setLevel(level)
    if missing:
        stop = pytest.fail if request.config.getoption("--require-peers") else pytest.skip
        stop(f"bitsandbytes {missing}: pip install -e '.[test]', or pip install bitsandbytes=={PEER}")
    return peer
