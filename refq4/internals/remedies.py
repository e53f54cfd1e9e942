"""How to get what is missing, said so that it works where the user is: refq4 is on no package index.

To install it, or an extra of it, by its name would fail for everybody. What works depends on where this copy of refq4
came from, which is found here and nowhere else.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path

__all__ = ["install"]

_ROOT = Path(__file__).parents[2]


def install(extra: str = "") -> str:
    """Give the pip command that installs this refq4 again, with what an extra of it brings.

    Args:
        extra: a name under ``[project.optional-dependencies]`` of pyproject.toml; none installs refq4 alone.

    Example:
        >>> install("cuda").startswith("pip install ")
        True
    """
    brackets = f"[{extra}]" if extra else ""
    if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "backends").is_dir():  # a checkout, installed or not
        return f"pip install -e {_quoted(f'{_ROOT}{brackets}')}"
    url = _url()
    command = "pip install " + _quoted(f"refq4{brackets} @ {url or 'URL'}")
    return command if url else f"{command} (URL: where this refq4 came from, file:///... for a file or a checkout)"


def _url() -> str | None:
    """What pip was given when it installed refq4; None where it found refq4 by its name, or did not install it."""
    try:
        noted = importlib.metadata.distribution("refq4").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    if noted is None:
        return None
    origin = json.loads(noted)
    if "vcs_info" in origin:
        vcs = origin["vcs_info"]
        return f"{vcs['vcs']}+{origin['url']}@{vcs['commit_id']}"
    return str(origin["url"])


def _quoted(text: str) -> str:
    mark = '"' if os.name == "nt" else "'"  # brackets mean something to shells, and cmd.exe knows no single quotes
    return f"{mark}{text}{mark}"
