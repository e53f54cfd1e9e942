"""The part of the site that mkdocs does not build by itself; ``mkdocs.yml`` names this file under ``hooks``.

pages from elsewhere   notebooks, READMEs and source files become pages, and links to them lead there   (places.py)
generated passages     <!-- refq4: NAME ARGUMENT --> in a page is replaced by what passages.py makes
kernels                names of their files lead to the pages of those files                     (kernels_code.py)
maths                  LaTeX becomes MathML while the site is built: no script, no fonts                  (maths.py)
notebooks              what mkdocs-jupyter renders loses its scripts and styles                           (cells.py)
figures                a notebook that has one to move gets the numbers that it computes with             (tables.py)
glossary               the first of each of its words has its entry as a tooltip                         (glossary.py)
lines                  long names break after their joints, options and short cells not at all            (wrapping.py)
wide pages             a table that needs the whole screen has no navigation beside it
"""

from __future__ import annotations

from typing import Any

import cells
import glossary
import kernels_code
import maths
import passages
import pipeline_page
import places
import tables
import wrapping
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

WIDE = ("architectures.md",)  # a script writes it: nine columns, half of them with names of classes


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The nav's entry "Tutorials" gets the notebooks that there are, in order."""
    for section in config.nav or []:
        if isinstance(section, dict) and "Tutorials" in section:
            section["Tutorials"].extend(places.uri(path) for path in places.notebooks())
    return config


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose files lie outside ``docs``."""
    for path in places.notebooks():
        files.append(File(path, str(places.ROOT), config.site_dir, config.use_directory_urls))
    for path, page in places.READMES.items():
        files.append(File.generated(config, page, content=(places.ROOT / path).read_text()))
    texts = {places.origin(f.src_uri): f.content_string for f in files.documentation_pages()}
    for path in sorted(places.linked_sources(texts) | pipeline_page.sources() | {*kernels_code.files().values()}):
        files.append(File.generated(config, places.uri(path), content=places.source_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Generated passages first: their links, too, are written as in the repository."""
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["navigation", "toc"]
    if not page.file.src_uri.startswith("source/"):
        markdown = kernels_code.link(passages.fill(markdown, page.file.src_uri), page.file.src_uri)
        markdown = places.relink(markdown, page.file.src_uri)
    return markdown


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Maths, in pages and in notebooks, and where lines may break."""
    notebook = page.file.src_uri.endswith(".ipynb")
    html = cells.clean(html, page.file.src_uri) if notebook else maths.render(html)
    data = tables.figure_data() if 'id="figure-' in html else ""
    return glossary.mark(wrapping.in_page(html), page.file.src_uri) + data
