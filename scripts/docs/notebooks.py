"""Make each notebook from its source: ``notebooks/NN_name.py`` is executed, and ``NN_name.ipynb`` keeps the outputs.

    python scripts/docs/notebooks.py            all of them
    python scripts/docs/notebooks.py 2 7        those two

The .py (jupytext's percent format) is what people edit and diff; the .ipynb is what they and the docs show. It carries
no path, time or version of the machine that made it. ``tests/docs/test_notebooks.py`` executes each again and compares.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from tqdm import tqdm

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
TIMING = "timing"  # the tag of a cell whose output is the machine's: times, names of kernels, cores
NO_WIDGETS = "IProgress not found"  # tqdm's warning where ipywidgets is not installed: its bars are text then
COMPILING = re.compile(r"refq4: compiling [^\n]* \.\.\. \d+\.\d s\n")
SECONDS = 600  # a cell that takes longer hangs; a whole notebook takes some ten

METADATA = {
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"}
    | {"nbconvert_exporter": "python", "pygments_lexer": "ipython3"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Execute notebooks/*.py and write the .ipynb beside each.")
    parser.add_argument("numbers", nargs="*", type=int, metavar="NN", help="which; all of them if none is given")
    numbers = parser.parse_args().numbers
    chosen = [path for path in sources() if not numbers or int(path.name[:2]) in numbers]
    if not chosen:
        parser.error(f"no notebook has one of the numbers {numbers}; there are {[path.stem for path in sources()]}")
    total = 0.0
    for path in chosen:
        start = time.perf_counter()
        notebook = read_source(path)
        cells = sum(cell.cell_type == "code" for cell in notebook.cells)
        with tqdm(total=cells, desc=path.stem, unit="cell") as bar:
            execute(notebook, on_cell_complete=lambda **_: bar.update())
        path.with_suffix(".ipynb").write_text(nbformat.writes(notebook) + "\n")
        total += time.perf_counter() - start
        size = path.with_suffix(".ipynb").stat().st_size / 1024
        print(f"{path.stem}: {time.perf_counter() - start:.1f} s, {size:.0f} KiB")
    print(f"{len(chosen)} notebooks, {total:.1f} s")


def sources() -> list[Path]:
    """The notebooks' sources, by number."""
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.py"))


def read_source(path: Path) -> nbformat.NotebookNode:
    """The notebook that a source describes, without outputs; the metadata and ids are the same wherever it is made."""
    notebook = jupytext.read(path, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    for index, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        cell.id = f"cell-{index:02d}"
    return notebook


def execute(notebook: nbformat.NotebookNode, **callbacks: Any) -> None:
    """Run every cell, in a fresh kernel of this interpreter, in ``notebooks/``; outputs go into the notebook.

    Raises:
        CellExecutionError: a cell raised.
        ValueError: a cell wrote to stderr (a warning, as a rule): what it warns of belongs mended, or caught and shown.
    """
    import matplotlib.font_manager  # noqa: F401 (at the first import it lists the fonts, and complains if that takes long)

    with _kernel() as manager:
        client = NotebookClient(
            notebook,
            timeout=SECONDS,
            startup_timeout=SECONDS,  # of a kernel on a busy machine: a minute, the default, is not always enough
            coalesce_streams=True,
            record_timing=False,
            resources={"metadata": {"path": str(NOTEBOOKS)}},
            **callbacks,
        )
        client.km = manager  # and not km=manager above: this way it is the client that shuts the kernel down
        client.execute(env=os.environ | {"PYTHONHASHSEED": "0", "PYTHONWARNINGS": f"ignore:{NO_WIDGETS}"})
    notebook.metadata = nbformat.from_dict(METADATA)  # the kernel has added the version of this Python
    for cell in notebook.cells:
        for output in _without_progress(cell):
            if output.get("name") == "stderr":
                raise ValueError(f"{cell.id} wrote to stderr: {output.text}\n--- the cell ---\n{cell.source}")


def _without_progress(cell: nbformat.NotebookNode) -> list[Any]:
    """Take the lines about compiling, which are there at the first run only, from what a cell wrote to stderr."""
    outputs = cell.get("outputs", [])
    for output in outputs:
        if output.get("name") == "stderr":
            output.text = COMPILING.sub("", output.text)
    if outputs:
        cell.outputs = [output for output in outputs if output.get("name") != "stderr" or output.text]
    return cell.get("outputs", [])


@contextmanager
def _kernel() -> Iterator[AsyncKernelManager]:
    """A manager for this interpreter's own kernel: not one that the user has installed under the same name.

    It talks through sockets in a folder of its own, so that notebooks that start side by side can't pick one port.
    """
    with tempfile.TemporaryDirectory(prefix="refq4-") as folder:
        settings: dict[str, Any] = {"connection_file": f"{folder}/kernel.json"}
        if os.name == "posix":
            settings |= {"transport": "ipc", "ip": f"{folder}/kernel"}
        specs = KernelSpecManager(kernel_dirs=[])
        yield AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs, **settings)


if __name__ == "__main__":
    main()
