"""What the pages say of the code is so: names have examples, examples run, tables and pictures are what made them."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from public_names import PAGES as API
from public_names import names

import refq4
from refq4.testing.isolation import isolated_registry

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
COST = DOCS / "how-to" / "measure-the-cost.md"
sys.path.insert(0, str(ROOT / "scripts" / "docs"))

import drawing  # noqa: E402 (how the site is built is no package)
import glossary  # noqa: E402
import kernels_code  # noqa: E402
import maths  # noqa: E402
import places  # noqa: E402
import steps  # noqa: E402
import tables  # noqa: E402
import wrapping  # noqa: E402

import notebooks  # noqa: E402

pytestmark = pytest.mark.reference_only("it is about the documentation")

NAMES = [(module, name) for _, module, name in names()]
HOW_TO = ("choose-a-backend", "debug-a-kernel", "fine-tune", "load-a-checkpoint", "quantise-a-model")
PYTHON_PAGES = ["index.md", *(f"how-to/{name}.md" for name in HOW_TO)]


@pytest.fixture(autouse=True)
def isolated():
    with isolated_registry():
        yield


def test_every_public_module_has_a_page():
    modules = {name for name in refq4.__all__ if inspect.ismodule(getattr(refq4, name))}
    assert modules <= set(API)


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{module.__name__}.{name}" for module, name in NAMES])
def test_every_public_name_has_an_example_that_runs_with_the_tests(module, name):
    thing = getattr(module, name)
    if inspect.ismodule(thing):
        assert name in API
        return
    if callable(thing):
        assert thing.__module__.startswith("refq4."), "doctests are collected from refq4"
        text = inspect.getdoc(thing) or ""
    else:
        text = text_after_constant(name)
    assert ">>>" in text, f"{module.__name__}.{name} has no example in its docstring"


def text_after_constant(name: str) -> str:
    """A constant's docstring: the string on the line after its value, in whichever file of refq4 that is."""
    pattern = rf'^{name}(?:: [^=]+)? = (?:.|\n)*?\n"""((?:.|\n)*?)"""'
    found = [re.search(pattern, path.read_text(), re.MULTILINE) for path in (ROOT / "refq4").rglob("*.py")]
    return "\n".join(match[1] for match in found if match)


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, capsys):
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)\n```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block.replace("/tmp/", f"{tmp_path}/"), page, "exec"), names)
    assert blocks


def test_steps_carry_the_names_that_the_trace_gives_them():
    with refq4.trace() as trace:
        refq4.nn.LinearNF4(64, 8, bias=False).to("cpu")(torch.ones(1, 64))
    told = steps.steps()
    assert [(step.number, step.title) for step in told] == [(s.number, s.name) for s in trace.calls[0].steps]


def test_every_decision_of_the_pipeline_is_told_by_one_step():
    told = [name for step in steps.steps() for name, _ in steps.decisions(*step.decisions.split())]
    there = [name for module in ("refq4.pipeline", "refq4.matmul") for name, _ in steps.decisions(module)]
    assert sorted(told) == sorted(set(there) - {"ROWS_ONLY", "WHOLE_TABLE"})  # those two are the embedding's


def test_the_picture_in_the_readme_is_the_one_that_is_drawn():
    assert (DOCS / "pipeline.svg").read_text() == drawing.wide(steps.steps(), "pipeline") + "\n"


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_sizes_of_a_model_are_those_that_are_drawn_and_told(page):
    linears = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)  # the shape of Llama 2 7B
    others = 2 * 32000 * 4096 + 65 * 4096  # embedding, output head and norms stay in bf16
    bits = 4 + 8 / 64 + 32 / (64 * 256)  # double quantisation
    fp32, bf16 = 4e-9 * (linears + others), 2e-9 * (linears + others)
    small = 1e-9 * (linears * bits / 8 + 2 * others)
    told = f"takes {fp32:.3g} GB in fp32, {bf16:.1f} GB in bf16 and **{small:.1f} GB in 4 bits**"
    assert told in " ".join((ROOT / page).read_text().split())
    picture = (DOCS / "sizes.svg").read_text()
    bars = re.findall(r'<rect class="bar[^>]* width="(\d+)"[^>]*/>\n<text[^>]*>([\d.]+) GB<', picture)
    assert bars == [(f"{300 * size / fp32:.0f}", f"{size:.3g}") for size in (fp32, bf16, small)]
    assert f"fp32 {fp32:.3g} GB, bf16 {bf16:.3g} GB, 4 bits {small:.3g} GB" in picture
    how_to = " ".join((DOCS / "how-to/quantise-on-disk.md").read_text().split())
    measured = re.search(r"([\d.]+) GB of bf16 became ([\d.]+) GB", how_to)
    assert (f"{bf16:.2f}", f"{small:.2f}") == measured.groups()


def test_the_formats_that_are_compared_take_the_bits_that_their_scales_cost():
    table = section_of_cost("## Beside other formats").split("###")[0]
    rows = re.findall(r"^\| (NF4|GPTQ|AWQ|GGUF|MXFP4)\b[^|]*\|[^|]*\|[^|]*\| ([^|]*) \|", table, re.MULTILINE)
    bits = {
        "NF4": f"{4 + 32 / 64:.2f} or {4 + 8 / 64 + 32 / (64 * 256):.2f}",
        "GPTQ": f"{4 + (16 + 4) / 128:.2f}",
        "AWQ": f"{4 + (16 + 4) / 128:.2f}",
        "GGUF": f"{4 + (6 + 6) / 32 + 2 * 16 / 256:.2f}",
        "MXFP4": f"{4 + 8 / 32:.2f}",
    }
    assert dict(rows) == bits
    assert len(rows) == 5
    measured = dict(re.findall(r"^\| (\w+)[^|]*? \| ([\d.]+) \|", section_of_cost("### Measured"), re.MULTILINE))
    assert {name: measured[name] for name in ("GPTQ", "AWQ", "MXFP4")}.items() <= bits.items()


def section_of_cost(title: str) -> str:
    """What the page about the cost says from a heading to the next of its level."""
    level = title.split()[0]
    return COST.read_text().split(f"\n{title}", 1)[1].split(f"\n{level} ", 1)[0]


@pytest.mark.slow
def test_the_table_of_settings_is_what_the_script_prints():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/models/settings.py")], capture_output=True, text=True, check=True
    )
    shown = [re.split(r" \| ", line) for line in done.stdout.splitlines()[2:]]
    assert len(shown) == 9
    for name, *figures in shown:
        (row,) = (line for line in section_of_cost("## On a real model").splitlines() if line.startswith(f"{name} |"))
        told = [float(x) for x in row.strip(" |").split(" | ")[1:]]
        assert told == pytest.approx([float(x.strip(" |")) for x in figures], abs=3e-4), name


def test_every_environment_variable_is_in_the_table():
    sources = [*(ROOT / "refq4").rglob("*.py"), *(ROOT / "backends").rglob("*.py")]
    read = {name for path in sources for name in re.findall(r"\"(REFQ4_[A-Z_]+)\"", path.read_text())}
    assert read - set(re.findall(r"REFQ4_[A-Z_]+", tables.environment(""))) == set()


def test_every_command_is_in_the_reference_with_its_own_help(capsys):
    with pytest.raises(SystemExit):
        refq4.cli.main(["--help"])
    commands = re.findall(r"^    (\w+) +\S", capsys.readouterr().out.split("options:")[0], re.MULTILINE)
    shown = re.findall(r"^## (\w+)$", tables.command_line(""), re.MULTILINE)
    assert commands == shown


def test_every_page_is_in_the_nav_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = re.findall(r"[\w/.-]+\.md", str(nav))
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert len(listed) == len(set(listed))
    assert pages <= set(listed), "add the page to nav in mkdocs.yml"


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")), ids=lambda path: path.stem)
def test_what_a_cell_shows_as_html_it_shows_once_and_as_text_too(path):
    for cell in json.loads(path.read_text())["cells"]:
        shown = [output["data"] for output in cell.get("outputs", []) if "text/html" in output.get("data", {})]
        assert len(shown) < 2, "".join(cell["source"])
        assert all("".join(data["text/plain"]).strip() for data in shown), "".join(cell["source"])


READ_FIRST = [*(ROOT / name for name in ("README.md", *places.READMES)), *notebooks.sources()]
# What bitsandbytes does, in the present: "bitsandbytes casts", "bitsandbytes' own class never reads".
DOES = re.compile(
    r"\bbitsandbytes(?:'(?: [\w-]+){1,3})?,? (?:\w+ly |also |never |then |itself )?(?:can't|does|doesn't|has|"
    "(?:call|cast|check|choose|comput|decod|dequantis|divid|give|ignor|keep|lack|leav|load|multipli|need|overwrit|"
    "quantis|rais|read|refus|remov|return|rewrit|round|run|sav|stor|take|use|warn|writ)e?s)\\b"
)


def prose(path: Path) -> str:
    """The text of a page, or of a notebook's cells of text, without its listings."""
    if path.suffix == ".py":
        cells = notebooks.read_source(path).cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    else:
        text = path.read_text()
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def unversioned(text: str) -> list[str]:
    """The headings of the sections that say what bitsandbytes does, and not in which version."""
    parts = re.split(r"^(#+ .*)$", text, flags=re.MULTILINE)
    sections = zip(parts[1::2], (" ".join(part.split()) for part in parts[2::2]), strict=True)
    about = {title: body for title, body in sections if "bitsandbytes" in title or DOES.search(body)}
    return [title for title, body in about.items() if not re.search(r"\b0\.(49|50)\b", title + body)]


PAGES = [path for path in sorted(DOCS.rglob("*.md")) + READ_FIRST if path.name != "CHANGELOG.md"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_section_about_bitsandbytes_names_the_version(path):
    """Its versions and builds compute differently, so "what bitsandbytes does" is a statement about one of them."""
    assert not unversioned(prose(path)), "say of which version that is so: 0.49.1, 0.50.2, or both"


@pytest.mark.parametrize(
    ("section", "found"),
    [
        ("# What bitsandbytes does\n\nIt casts the bias.", True),
        ("# Bias\n\nThere bitsandbytes casts the\nparameter.", True),
        ("# Bias\n\nbitsandbytes' packed kernel rounds it.", True),
        ("# Bias\n\nbitsandbytes 0.49.1 casts the parameter.", False),
        ("# Names\n\nThe names are those of bitsandbytes.", False),
    ],
)
def test_a_statement_without_a_version_is_found(section, found):
    assert bool(unversioned(section)) == found


def test_the_first_of_a_glossary_s_words_has_its_entry_as_a_tooltip():
    page = "<h2>GEMV</h2><p>A <code>GEMV</code> or GEMV, an ulp, a GEMV; <a href='x'>CTA</a></p>"
    meaning = glossary.entries()["GEMV"]
    marked = glossary.mark(page, "index.md")
    assert f'or <abbr title="{meaning}">GEMV</abbr>, an <abbr title=' in marked
    assert marked.count("<abbr") == 2
    assert re.sub(r"</?abbr[^>]*>", "", marked) == page
    assert set(glossary.MARKED) <= set(glossary.entries())


# What a reader is taken to know: processors, makers, and the words of the trade that everybody uses.
KNOWN = {"AMD", "API", "ARM", "BF16", "CPU", "CUDA", "EPYC", "GPU", "LLVM", "MIT", "NVIDIA", "README"}


def first_pages(section: list | str | dict) -> list[str]:
    """The first page of each section of the nav, and of each section in it."""
    if isinstance(section, str):
        return []
    entries = [next(iter(entry.values())) if isinstance(entry, dict) else entry for entry in section]
    pages = [next((entry for entry in entries if isinstance(entry, str)), None)]
    pages += [page for entry in entries if not isinstance(entry, str) for page in first_pages(entry)]
    return [page for page in pages if page]


def test_no_first_page_of_a_section_has_an_abbreviation_that_is_not_explained():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    files = {page: ROOT / path for path, page in places.READMES.items()}  # pages that are made of these
    pages = [files.get(page, DOCS / page) for page in first_pages(nav)]
    pages += [ROOT / "README.md", notebooks.sources()[0]]
    assert len(pages) >= 10
    unexplained = {}
    for page in pages:
        text = re.sub(r"^---\n.*?\n---\n|`[^`]*`|\]\([^)]*\)|<[^>]*>|\$[^$]*\$", "", prose(page), flags=re.DOTALL)
        words = set(re.findall(r"(?<![\w-])[A-Z][A-Z0-9]{2,}(?:-\d+)?(?!\w|\.md)", text)) - KNOWN - set(glossary.MARKED)
        if words:
            unexplained[page] = words
    assert not unexplained, "put them into the glossary, and into MARKED in scripts/docs/glossary.py"


@pytest.mark.parametrize("file", kernels_code.kernels.EXCERPTS)
def test_an_excerpt_of_a_kernel_is_whole_and_short(file):
    shown = kernels_code.kernels.lines(file)
    assert shown.count("{") == shown.count("}")
    assert 3 <= len(shown.splitlines()) <= 12
    assert not shown.startswith((" ", "}"))


def test_each_rung_of_the_tables_has_an_excerpt_or_shares_one():
    """Kernels that add to a rung of the same idea, or to another op, are left to their own pages."""
    rungs = {name for name in kernels_code.files() if re.match(r"ge[mv]+_4bit_\d_.*\.cu?$", name)}
    assert rungs - set(kernels_code.kernels.EXCERPTS) == {
        *("gemv_4bit_2_avx512.c", "gemv_4bit_3_avx512_bf16.c"),
        *("gemm_4bit_5_avx512_rows.c", "gemm_4bit_5_avx512_bf16_rows.c"),
    }


def test_the_name_of_a_kernel_s_file_leads_to_its_page():
    page = "See `tiles.h` and [`refq4.h`](x), not `nothing.c`.\n```c\n`tiles.h`\n```\n"
    path = "../backends/cpu/refq4_cpu/kernels/tiles.h"
    assert kernels_code.link(page, "cpu-kernels.md") == page.replace("`tiles.h`", f"[`tiles.h`]({path})", 1)


LONG = "tests/test_memory.py::test_a_long_name"
BROKEN = "tests/<wbr>test_<wbr>memory.py::<wbr>test_<wbr>a_<wbr>long_<wbr>name"
VARIABLE = "REFQ4_CUDA_EMULATOR_ARCH"


@pytest.mark.parametrize(
    ("cell", "wanted"),
    [
        ("<td>4096 × 4096</td>", '<td class="short brief">4096 × 4096</td>'),
        ("<td>the read limit</td>", '<td class="short">the read limit</td>'),
        ('<td style="color: red">a &lt; b</td>', '<td class="short brief" style="color: red">a &lt; b</td>'),
        (
            f"<td><code>{VARIABLE}</code> or so</td>",
            f"<td><code>{VARIABLE.replace('_', '_<wbr class=narrow>')}</code> or so</td>".replace("narrow", '"narrow"'),
        ),
        ("<td>a sentence of more than twenty-seven characters</td>", None),
        ('<td class="code"><pre>1</pre></td>', None),
        (r"<td><code>a \|\| b</code></td>", '<td class="short brief name"><code>a || b</code></td>'),
        (
            f"<td><code>pytest {LONG}</code></td>",
            f'<td class="name"><code>pytest {BROKEN}</code></td>',
        ),
        (
            "<td>no AmbiguousAttributeErrorOfLayers in it</td>",
            "<td>no Ambiguous<wbr>Attribute<wbr>Error<wbr>Of<wbr>Layers in it</td>",
        ),
        ("<th>M = 1</th>", '<th class="short brief">M = 1</th>'),
        ("<th>bitsandbytes packed</th>", None),
    ],
    ids=[
        *(
            "a number",
            "short",
            "entities",
            "a variable",
            "a sentence",
            "a listing",
            "an escaped bar",
            "a long name",
            "a class",
        ),
        *("a short heading", "a heading"),
    ],
)
def test_a_table_s_cell_breaks_only_where_it_may(cell, wanted):
    assert wrapping.in_page(f"<tr>{cell}</tr>") == f"<tr>{wanted or cell}</tr>"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f"<p><code>{LONG}_here</code></p>", f"<p><code>{BROKEN}_<wbr>here</code></p>"),
        (f"<p><code>{LONG}</code></p>", None),
        ("<h2>refq4.integrations.peft</h2>", "<h2>refq4.<wbr>integrations.<wbr>peft</h2>"),
        ("<p>a look-up: [N] -&gt; [M]</p>", '<p>a look-up: [N] <span class="whole">-&gt;</span> [M]</p>'),
        ("<p><code>run --quick</code></p>", '<p><code>run <span class="whole">--quick</span></code></p>'),
        ("<pre><code>w[i - 1] ----</code></pre>", None),
        ("<pre><code>w-&gt;b</code></pre>", '<pre><code>w<span class="whole">-&gt;</span>b</code></pre>'),
        ('<pre><code>w<span class="o">-&gt;</span>b</code></pre>', None),
        ("<svg><text>a_long_name_in_a_drawing -&gt;</text></svg>", None),
        *((f'<div class="language-text highlight"><pre>{drawn}</pre></div>', None) for drawn in ("a   b", "  a")),
        (
            '<div class="language-text highlight"><pre>run  it</pre></div>',
            '<div class="language-text lines highlight"><pre>run  it</pre></div>',
        ),
    ],
)
def test_a_line_breaks_in_no_option_and_no_arrow_and_a_name_breaks_after_its_joints(text, wanted):
    assert wrapping.in_page(text) == (wanted or text)


def test_the_bars_of_a_norm_stand_close_to_it():
    assert maths.mathml(r"|W| + \lVert x \rVert", block=False).count('<mo lspace="0" rspace="0"') == 4
