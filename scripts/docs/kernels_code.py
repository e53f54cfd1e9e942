"""Lines of the kernels in the pages about them, and links from a kernel's name to its file.

<!-- refq4: inner-loops cpu -->      each rung's excerpt, which notebooks/support/kernels.py chooses
<!-- refq4: tiles -->                the picture at the top of tiles.h
`gemm_4bit_3_avx512.c` in a page     leads to the page of that file
"""

from __future__ import annotations

import posixpath
import re
import sys

import places

sys.path.insert(0, str(places.ROOT / "notebooks"))
from support import kernels  # beside the notebooks

__all__ = ["files", "inner_loops", "link", "tiles"]

_NAME = re.compile(r"(?<![\[`\w/])`([a-z]\w*\.(?:c|h|cu|cuh))`(?!\])")


def files() -> dict[str, str]:
    """Every file of a kernel: name -> path."""
    folders = [places.ROOT / folder for folder in kernels.FOLDERS]
    every = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in places.LANGUAGES]
    return {path.name: path.relative_to(places.ROOT).as_posix() for path in every}


def inner_loops(page: str, backend: str) -> str:
    """The excerpts of a backend, one below the other."""
    chosen = {"cpu": kernels.CPU, "cuda": kernels.CUDA}[backend]
    parts = [f"`{file}`: {excerpt.does}\n\n```c\n{kernels.lines(file)}\n```" for file, excerpt in chosen.items()]
    return "\n\n".join(parts)


def tiles(page: str) -> str:
    """The layout, drawn in letters."""
    return f"```text\n{kernels.picture_of_tiles()}\n```"


def link(markdown: str, page: str) -> str:
    """The page with each name of a kernel's file leading to that file's page."""
    here, known = posixpath.dirname(places.origin(page)), files()

    def leading(match: re.Match[str]) -> str:
        path = known.get(match[1])
        return match[0] if path is None else f"[{match[0]}]({posixpath.relpath(path, here or '.')})"

    outside = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if i % 2 else _NAME.sub(leading, part) for i, part in enumerate(outside))
