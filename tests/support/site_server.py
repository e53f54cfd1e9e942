"""The documentation as a reader gets it: built once for all test processes, served, and opened in a real browser."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[2]
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
# No GPU, no sandbox in a container, and nothing that calls home on its own.
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
]


def built_site(shared: Path) -> Path:
    """The folder of the built site; the first test process to come builds it, strictly.

    Args:
        shared: a folder that all test processes of this run know.
    """
    site = shared / "site"
    with FileLock(shared / "site.lock"):
        if not site.exists():
            being_built = shared / "site-being-built"
            command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(being_built)]
            environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"mkdocs build --strict:\n{done.stdout}{done.stderr}"
            being_built.rename(site)
    return site


@contextmanager
def served(site: Path) -> Iterator[str]:
    """The address under which the site is served while the block runs."""
    handler = functools.partial(QuietHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Says nothing on stderr, and keeps connections open."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing."""


def chromium() -> str | None:
    """Where Chromium is, if it is anywhere."""
    return next(filter(None, map(shutil.which, CHROMIUM)), None)
