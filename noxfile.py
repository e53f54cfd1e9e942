"""The matrix of releases: every Python and the oldest and newest torch that refq4 says it supports.

pipx run nox                        all of it, an hour; needs python3.11 to python3.14
pipx run nox -s tests-3.12          one session
pipx run nox -s package             build, check and install the wheel and the sdist
pipx run nox -s portable            what holds on macOS and Windows as well, five minutes
"""

from __future__ import annotations

import nox

nox.options.sessions = ["tests", "oldest", "package", "docs"]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
# Tests that need PyTorch and nothing else: no compiler, no Unix, no other library.
PORTABLE = [
    "tests/core/test_codebooks.py",
    "tests/peer/test_golden.py",
    "tests/core/test_state.py",
    "tests/core/test_layers.py",
    "tests/core/test_pipeline.py",
    "tests/models/test_quantize_model.py",
]
# What PyTorch can change: the layer compiled, exported and differentiated, models, the C kernels on torch's threads.
OLDEST = ["tests/core", "tests/peer", "tests/models", "tests/backends/cpu"]


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The suite, as CI runs it, against the newest torch."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "-n", "2", "--dist", "worksteal", "--require-peers", *session.posargs)


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """The oldest torch of pyproject.toml; its own Triton is older than the one that ``.[test]`` asks for."""
    peers = (".[diffusers,tour]", "bitsandbytes==0.50.2", "lm_eval>=0.4.9")
    session.install("torch==2.8.0", "-e", *peers, "pytest", "pytest-xdist", "hypothesis", "expecttest")
    session.run("python", "-m", "pytest", "-n", "2", "--dist", "worksteal", *OLDEST, *session.posargs)


@nox.session
def portable(session: nox.Session) -> None:
    """What macOS and Windows are asked, with the Python that runs nox: the layer on the reference."""
    session.install("torch==2.13.0", "-e", ".", "pytest", "hypothesis", "expecttest")
    session.env["PYTHONUTF8"] = "1"  # Windows would read and print in the code page of its country
    session.run("python", "-m", "pytest", *PORTABLE, *session.posargs)
    session.run("python", "-m", "refq4", "verify", "--backend", "reference", "--quick")
    session.run("python", "-m", "refq4", "info")


@nox.session(python=PYTHONS)
def package(session: nox.Session) -> None:
    """Wheel and sdist: built, checked, and each installed into a fresh environment."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "-m", "slow", "tests/project/test_packaging.py", *session.posargs)


@nox.session(python="3.11")
def docs(session: nox.Session) -> None:
    """The site; a dead link or a broken page is an error."""
    session.install("-e", ".[docs,notebooks]")
    session.run("mkdocs", "build", "--strict")
