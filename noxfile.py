"""The matrix of releases: every Python and the oldest and newest torch that refq4 says it supports.

pipx run nox                        all of it, an hour; needs python3.11 and python3.12
pipx run nox -s tests-3.12          one session
pipx run nox -s package             build, check and install the wheel and the sdist
"""

from __future__ import annotations

import nox

nox.options.sessions = ["tests", "oldest", "package", "docs"]
PYTHONS = ["3.11", "3.12"]


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The suite, as CI runs it, against the newest torch."""
    session.install("-e", ".[test]")
    session.run(
        "python", "-m", "pytest", "-n", "2", "--dist", "worksteal", "--cov", "--require-peers", *session.posargs
    )


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """The oldest torch of pyproject.toml, without the libraries that want a newer one."""
    session.install("torch==2.8.0", "-e", ".", "pytest", "hypothesis", "expecttest")
    files = ("codebooks", "golden", "state", "layers", "pipeline", "quantize_model", "quantize_checkpoint")
    session.run("python", "-m", "pytest", *(f"tests/test_{name}.py" for name in files), *session.posargs)


@nox.session(python=PYTHONS)
def package(session: nox.Session) -> None:
    """Wheel and sdist: built, checked, and each installed into a fresh environment."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "-m", "slow", "tests/test_packaging.py", *session.posargs)


@nox.session(python="3.11")
def docs(session: nox.Session) -> None:
    """The site; a dead link or a broken page is an error."""
    session.install("-e", ".[docs,notebooks]")
    session.run("mkdocs", "build", "--strict")
