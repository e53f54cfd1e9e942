"""The pytest plug-in: tests run on the backends that ``--backend`` names.

    pytest --backend cpu                         this project's suite, on the CPU backend
    pytest --backend cpu --backend reference     on both, one after the other
    pytest --backend all                         on every available backend that "auto" may take
    pytest --pyargs refq4.testing --backend x    the conformance tests, for an installed backend of your own

A test that a backend can't take (``BackendUnsupportedError``, with its reason) is skipped with that reason. A backend
that is not available on the machine is skipped with the remedy, or with ``--require-backends`` it is an error.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .. import registry
from ..backend import BackendUnavailableError, BackendUnsupportedError, UnknownBackendError
from .isolation import isolated_registry

REFERENCE = "reference"


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--backend`` and ``--require-backends``."""
    group = parser.getgroup("refq4")
    group.addoption(
        "--backend",
        action="append",
        default=[],
        metavar="NAME",
        help="run the tests on this backend (repeatable; 'all': every available one; default: reference)",
    )
    group.addoption(
        "--require-backends",
        default="",
        metavar="NAMES",
        help="comma-separated: fail instead of skipping where one of these backends is not available",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse unknown names at once, and register the marker."""
    config.addinivalue_line(
        "markers", "reference_only(reason): a test about the reference itself, not run on other backends"
    )
    required = [name for name in config.getoption("--require-backends").split(",") if name]
    for name in {*config.getoption("--backend"), *required} - {"all"}:
        try:
            registry.check_usable(name)
        except UnknownBackendError as error:
            raise pytest.UsageError(f"--backend {name}: {error}") from None
        except BackendUnavailableError as error:
            if name in required:
                raise pytest.UsageError(f"--require-backends {name}: {error}") from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One copy of each test per backend, where backends are named."""
    names = chosen(metafunc.config)
    if names and "backend_name" in metafunc.fixturenames:
        metafunc.parametrize("backend_name", names, indirect=True, scope="session")


def chosen(config: pytest.Config) -> list[str]:
    """The names after ``--backend``, "all" written out."""
    names: list[str] = []
    for name in config.getoption("--backend"):
        names += registry.automatic_backends() if name == "all" else [name]
    return list(dict.fromkeys(names))


@pytest.fixture(scope="session")
def backend_name(request: pytest.FixtureRequest) -> str:
    """The backend under test: available, or the test is skipped with the remedy."""
    name: str = getattr(request, "param", REFERENCE)
    try:
        registry.check_usable(name)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    return name


@pytest.fixture(autouse=True)
def _the_same_start_for_every_test(backend_name: str) -> Iterator[None]:
    """Seeded, on the backend under test, and what a test registers or chooses is undone."""
    torch.manual_seed(0)
    with isolated_registry():
        registry.set_backend(backend_name)
        yield


@pytest.fixture(autouse=True)
def _not_for_other_backends(request: pytest.FixtureRequest, backend_name: str) -> None:
    marker = request.node.get_closest_marker("reference_only")
    if marker is not None and backend_name != REFERENCE:
        pytest.skip(f"about the reference itself: {marker.args[0] if marker.args else ''}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test that a backend under test can't take is skipped, with the backend's reason."""
    try:
        yield
    except BackendUnsupportedError as refusal:
        name = getattr(item, "funcargs", {}).get("backend_name", REFERENCE)
        if name == REFERENCE or f"backend {name!r} can't run" not in str(refusal):
            raise
        pytest.skip(str(refusal))
