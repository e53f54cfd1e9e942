"""Tables and listings of the reference pages, read off the package itself."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import textwrap
from statistics import NormalDist

import places
import torch

import refq4
from refq4 import cli
from refq4.codebooks import code_from_values, codebook_names, create_dynamic_map, get_codebook

_VARIABLE_ROW = re.compile(r"^\| `(?:REFQ4_\w+|CC)` \|.*\|$", re.MULTILINE)
_COMMAND = re.compile(r"^    (\w+) +\S", re.MULTILINE)


def codebooks(page: str) -> str:
    """The codebooks on the shelf."""
    rows = [f"| `{name}` | {get_codebook(name).description} |" for name in codebook_names()]
    return "\n".join(["| name | what it is |", "| --- | --- |", *rows])


def values(page: str, name: str) -> str:
    """A codebook's sixteen values in code order, and for each the interval of scaled weights that get it."""
    book = get_codebook(name)
    rows = []
    for code, value in enumerate(book.values):
        rank = book.order.index(code)
        low = f"{book.thresholds[rank - 1]:.9g}" if rank else "-1"
        high = f"{book.thresholds[rank]:.9g}" if rank < 15 else "1"
        rows.append(f"| {code} | `{code:04b}` | {value:.9g} | {low} | {high} |")
    return "\n".join(["| code | bits | value | above | up to |", "| ---: | --- | ---: | ---: | ---: |", *rows])


def codebook_data(page: str) -> str:
    """The codebooks and the 8-bit map as JSON for the playground: what the browser computes with are these numbers."""
    data = {
        name: {"values": book.values, "thresholds": book.thresholds, "order": book.order, "about": book.description}
        for name in codebook_names()
        for book in [get_codebook(name)]
    }
    values, thresholds, order = (part.tolist() for part in code_from_values(create_dynamic_map()))
    dynamic_map = _json("dynamic-map", {"values": values, "thresholds": thresholds, "order": order})
    return _json("codebooks", data) + dynamic_map


def figure_data() -> str:
    """What the figures in the notebooks compute with: the codebooks, the dynamic map, 64 weights of a normal block."""
    normal = torch.tensor([NormalDist().inv_cdf((i + 0.5) / 64) for i in range(64)])
    return codebook_data("") + _json("normal-weights", normal.tolist())


def _json(name: str, data: object) -> str:
    return f'<script type="application/json" id="{name}">{json.dumps(data)}</script>'


def state_dict(page: str) -> str:
    """What the state dict of a layer holds: one with nested scales, [N, K] = [128, 256]."""
    torch.manual_seed(0)
    layer = refq4.nn.LinearNF4(256, 128, compress_statistics=True).to("cpu")
    rows = []
    for key, tensor in layer.state_dict().items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        rows.append(f"| `{key}` | {dtype} | {list(tensor.shape)} | {tensor.nbytes} |")
    return "\n".join(["| key | dtype | shape | bytes |", "| --- | --- | --- | ---: |", *rows])


def environment(page: str) -> str:
    """Every environment variable, from the pages that say what reads it."""
    parts = []
    for title, path in (
        ("Everywhere", "docs/how-to/choose-a-backend.md"),
        ("The CPU backend", "backends/cpu/README.md"),
        ("The CUDA backend", "backends/cuda/README.md"),
    ):
        rows = _VARIABLE_ROW.findall((places.ROOT / path).read_text())
        if not rows:
            raise ValueError(f"{path} has no table of environment variables any more")
        parts.append("\n".join([f"## {title}\n", "| variable | values | meaning |", "| --- | --- | --- |", *rows]))
    return "\n\n".join(parts)


def command_line(page: str) -> str:
    """Each command's own --help."""
    top = _help()
    commands = _COMMAND.findall(top.split("COMMAND", 1)[1])
    parts = [f"```text\n{top}\n```"]
    parts += [f"## {name}\n\n```text\n{_help(name)}\n```" for name in dict.fromkeys(commands) if name != "python"]
    return "\n\n".join(parts)


def _help(*arguments: str) -> str:
    columns, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "100"
    try:
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
            cli.main([*arguments, "--help"])
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return "\n".join(textwrap.fill(line, 110) if len(line) > 110 else line for line in text.getvalue().splitlines())


def file(page: str, path: str) -> str:
    """A file of the repository, whole."""
    language = places.LANGUAGES.get(os.path.splitext(path)[1], "text")
    return f'````{{ .{language} title="{path}" }}\n{(places.ROOT / path).read_text().rstrip()}\n````'


def gpu_model(page: str) -> str:
    """What the CUDA backend's model makes of each architecture: a table that opens at a click, that of an H200 open."""
    from refq4_cuda.roofline import GPUS, table

    shown = []
    for arch, gpu in GPUS.items():
        inside = table(arch).replace("\n", "\n    ")
        shown.append(f'???{"+" if arch == 90 else ""} note "{gpu.name} (sm_{arch})"\n\n    {inside}\n')
    return "\n".join(shown)
