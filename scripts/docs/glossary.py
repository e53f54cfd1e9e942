"""The glossary's words in the pages: the first of each gets a dotted line and its entry as a tooltip.

The entries are the rows of ``docs/reference/glossary.md``. Headings, links, code, formulas and drawings stay plain.
"""

from __future__ import annotations

import functools
import html
import re

import places

__all__ = ["entries", "mark"]

PAGE = "reference/glossary.md"
# Of the words there, those that a sentence may use without its reader knowing them.
MARKED = (
    "AMX", "AVX2", "AVX-512", "AWQ", "CTA", "E2M1", "FMA", "FP4", "FSDP", "GEMM", "GEMV", "GFLOP", "GGUF", "GPTQ", "KL",
    "LoRA", "MXFP4", "NEON", "NF4", "NVRTC", "PTX", "QLoRA", "SIMD",
    "absmax", "canonical", "oracle", "perplexity", "roofline", "straddle", "ulp", "warp", "wavefront",
)  # fmt: skip

_ROW = re.compile(r"^\| (?!word \||---)([^|]+) \| (.+) \|$", re.MULTILINE)
_TAG = re.compile(r"(<[^>]*>)")
_QUIET = re.compile(r"<(/?)(a|abbr|button|code|h[1-6]|label|math|pre|script|style|summary|svg|title)\b[^>]*?(/?)>")


@functools.cache
def entries() -> dict[str, str]:
    """Each word, and what it means, without links."""
    rows = _ROW.findall((places.ROOT / "docs" / PAGE).read_text())
    plain = {word: re.sub(r"\s*\(\[.*?\)\)|`", "", meaning) for word, meaning in rows}
    return {part: meaning for words, meaning in plain.items() for part in words.split(", ")}


def mark(page: str, path: str) -> str:
    """The page's HTML with the first of each word marked; the glossary itself stays as it is."""
    if path == PAGE or path.startswith("source/"):
        return page
    waiting = set(MARKED)
    quiet = 0  # how many elements are open whose text stays as it is
    parts = _TAG.split(page)
    for i, part in enumerate(parts):
        if i % 2:
            tag = _QUIET.match(part)
            quiet += 0 if tag is None or tag[3] else -1 if tag[1] else 1
        elif not quiet and part.strip():
            parts[i] = _marked(part, waiting)
    return "".join(parts)


def _marked(text: str, waiting: set[str]) -> str:
    for word in sorted(waiting):
        found = re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text)
        if found and not re.search(r"<abbr[^>]*$", text[: found.start()]):
            waiting.discard(word)
            meaning = html.escape(entries()[word], quote=True)
            text = f'{text[: found.start()]}<abbr title="{meaning}">{word}</abbr>{text[found.end() :]}'
    return text
