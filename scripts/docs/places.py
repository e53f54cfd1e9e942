"""Where a file of the repository is on the site, and the pages made of files that lie outside ``docs``.

    docs/how-to/benchmark.md          how-to/benchmark.md
    notebooks/01_five_minutes.ipynb   notebooks/01_five_minutes.ipynb
    backends/cpu/README.md            reference/backend-cpu.md          (READMES)
    refq4/backend.py                  source/refq4/backend.py.md        a page with the file, if any page links to it
    backends/cpu/refq4_cpu/kernels    source/.../kernels.md             a folder: a page that lists it

So a link in a page is written as it works in the repository, and works on the site as well.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]

READMES = {
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "backends/cpu/README.md": "reference/backend-cpu.md",
    "backends/cuda/README.md": "reference/backend-cuda.md",
    "backends/triton/README.md": "reference/backend-triton.md",
}
if (ROOT / "notebooks" / "README.md").exists():
    READMES["notebooks/README.md"] = "notebooks/index.md"

LANGUAGES = {".py": "python", ".c": "c", ".h": "c", ".cu": "cuda", ".cuh": "cuda", ".cpp": "cpp", ".toml": "toml"}

_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def notebooks() -> list[str]:
    """Paths of the notebooks, in order."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))


def uri(path: str) -> str:
    """The page of a path, both relative to their roots."""
    if path in READMES:
        return READMES[path]
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("notebooks/") and path.endswith(".ipynb"):
        return path
    return f"source/{path}.md"


def origin(page: str) -> str:
    """The path of a page: the way back."""
    for path, readme in READMES.items():
        if page == readme:
            return path
    return page if page.startswith(("source/", "notebooks/")) else f"docs/{page}"


def linked_sources(texts: Mapping[str, str]) -> set[str]:
    """The source files and folders that pages link to.

    Args:
        texts: the pages' Markdown by path.
    """
    targets = {target for path, text in texts.items() for target in _targets(path, text)}
    return {path for path in targets if uri(path).startswith("source/")}


def relink(markdown: str, page: str) -> str:
    """The same page with its links leading to where their targets are on the site."""
    path, here = origin(page), posixpath.dirname(page)

    def lead(match: re.Match[str]) -> str:
        target = _resolve(path, match[2])
        if target is None:
            return match[0]
        return f"{match[1]}{posixpath.relpath(uri(target), here or '.')}{match[3]}"

    return _LINK.sub(lead, markdown)


def relative_url(link: str, page: str) -> str:
    """The same for a link in HTML, where it names the folder that a page is served as."""
    target, _, anchor = link.partition("#")
    path = _resolve(origin(page), target) if target else None
    if path is None:
        return link
    url = link_to(path, page)
    return f"{url}#{anchor}" if anchor else url


def link_to(path: str, page: str) -> str:
    """The address of a path's page, from the folder that ``page`` is served as."""
    there = uri(path)
    url = posixpath.relpath(_served(there), _served(page))
    return f"{url}/" if there.endswith((".md", ".ipynb")) else url


def _served(page: str) -> str:
    """how-to/benchmark.md is served as how-to/benchmark/, index.md as the folder it is in; a picture as it is."""
    stem, extension = posixpath.splitext(page)
    if extension not in (".md", ".ipynb"):
        return page
    return posixpath.dirname(stem) or "." if posixpath.basename(stem) == "index" else stem


def source_page(path: str) -> str:
    """A page with a file's text, or with the files of a folder."""
    if (ROOT / path).is_dir():
        entries = sorted(entry.name for entry in (ROOT / path).iterdir() if entry.suffix in LANGUAGES)
        body = "\n".join(f"- `{name}`" for name in entries)
    else:
        language = LANGUAGES.get(Path(path).suffix, "text")
        body = f'````{{ .{language} linenums="1" }}\n{(ROOT / path).read_text()}\n````'
    return f"---\ntitle: {path}\nsearch:\n  exclude: true\nhide: [toc]\n---\n\n# `{path}`\n\n{body}\n"


def _targets(path: str, text: str) -> Iterator[str]:
    for match in _LINK.finditer(text):
        target = _resolve(path, match[2])
        if target is not None:
            yield target


def _resolve(path: str, link: str) -> str | None:
    """The path a link in the file ``path`` leads to; None where it leads out of the repository, or nowhere."""
    if "://" in link or link.startswith(("/", "mailto:")):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    return None if target.startswith("..") or not (ROOT / target).exists() else target
