"""Every command and every program of the README and the how-to pages runs, in the order of the page.

Commands of a page run in one directory, which holds a small Llama as ``model`` and tokens for it in ``ids.txt``. What
is not run stands in ``NOT_RUN`` with the reason, and what takes minutes in ``SLOW`` (``pytest -m slow``); an entry that
no page needs any more is a failure. ``python -m refq4`` runs in this process, through the same ``main``: importing
torch for each takes longer than all of them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from refq4 import cli
from refq4.testing.isolation import isolated_registry

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "how-to").glob("*.md"))]

NOT_RUN = {  # a command that starts like this -> why
    "python3 -m venv .venv &&": "installs; CI's own command is one of the two (tests/project/test_conventions.py)",
    "command -v chromium": "installs a browser and headers with the system's packages",
    "pip install": "installs",
    "REFQ4_CPU_CFLAGS=": "a debugger waits for a person",
    "REFQ4_CPU_KERNEL=": "my_script.py stands for a program of the reader's",
    "torchrun": "program.py does so, too: tests/models/test_tensor_parallel.py starts the processes",
    "python -m refq4 run": "lm_eval and train.py do so, too: tests/models/test_other_programs.py runs some",
    "python scripts/models/smollm.py": "needs a model of 93 MB (the scripts: tests/docs/test_model_scripts.py)",
    "python -m refq4 quantize smol/full": "the same",
    "python -m refq4 eval smol/nf4": "the same",
    "python scripts/bench/arm_cycles.py": "needs llvm-mca; run by tests/backends/cpu/test_cpu_arm.py",
    "pytest -m slow": "a part of the slow tests",
}
SLOW = {  # the same, for what takes minutes on two cores
    "python -m refq4 bench",
    "python -m refq4 verify",
    "REFQ4_CPU_TIER=c python -m refq4 verify",
    "REFQ4_CPU_TIER=avx512 REFQ4_CPU_EMULATE=1 python -m refq4 verify",
    "REFQ4_CPU_TIER=neon_bf16 REFQ4_CPU_EMULATE=1 python -m refq4 verify --backend cpu --deep",
}
# A backend called mine stands for the reader's own; here it is the CPU backend, asked the quick questions.
STAND_INS = {"--import mine.py --backend mine": "--backend cpu --quick"}
NOT_RUN_PROGRAMS: dict[str, str] = {  # a line that a program holds -> why it is not run
    'set_backend("cuda")': "needs a GPU",
    "DistributedConfig(": "needs two processes: tests/models/test_tensor_parallel.py runs it in them",
    "init_device_mesh(": "the same",
}


# Commands and programs that need one another: run by the last test, and what is printed compared with what is shown.
IN_ORDER = {ROOT / "docs" / "how-to" / "a-checkpoint-on-a-laptop.md"}


def commands(page: Path) -> Iterator[str]:
    for block in re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"\s#\s.*", "", line).removeprefix("$ ").strip()
            if command and not command.startswith("#"):
                yield command


def programs(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def prefix_of(command: str, prefixes: object) -> str | None:
    return next((prefix for prefix in prefixes if command.startswith(prefix)), None)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page's commands run: with a model, and with this environment's programs first on the PATH."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "ids.txt").write_text("1 2 3 4 5 6 7 8\n31 30 29 28\n")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def run(command: str) -> None:
    command = with_stand_ins(command)
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "refq4"] and not {"|", ";", "&&"} & set(words):
        output = words.pop() if words[-2:-1] == [">"] else os.devnull
        with open(output, "w") as file, contextlib.redirect_stdout(file):
            assert cli.main([word for word in words[3:] if word != ">"]) == 0, command
    else:
        run_in_a_shell(command)


def with_stand_ins(text: str) -> str:
    for words, instead in STAND_INS.items():
        text = text.replace(words, instead)
    return text


def run_in_a_shell(command: str) -> None:
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def of_pages(slow: bool) -> list[object]:
    """A parameter for each page that has a command to run."""
    wanted = {
        page: [c for c in commands(page) if not prefix_of(c, NOT_RUN) and bool(prefix_of(c, SLOW)) == slow]
        for page in PAGES
        if page not in IN_ORDER
    }
    return [pytest.param(some, id=page.stem) for page, some in wanted.items() if some]


@pytest.mark.parametrize("of_page", of_pages(slow=False))
def test_the_commands_of_a_page_run(of_page, directory):
    for command in of_page:
        run(command)
        assert list(directory.iterdir()), "each page has its directory"


@pytest.mark.slow
@pytest.mark.parametrize("of_page", of_pages(slow=True))
def test_the_commands_that_take_minutes_run(of_page, directory):
    for command in of_page:
        run(command)
        assert list(directory.iterdir()), "each page has its directory"


def run_here(page: Path) -> list[str]:
    return [program for program in programs(page) if not any(line in program for line in NOT_RUN_PROGRAMS)]


@pytest.mark.parametrize(
    "page", [page for page in PAGES[1:] if run_here(page) and page not in IN_ORDER], ids=lambda page: page.stem
)
def test_the_programs_of_a_page_run(page, directory, capsys):
    """One after the other, in one namespace, as a reader would type them (the README's are in test_conventions.py)."""
    names: dict[str, object] = {"__name__": "__main__"}
    with isolated_registry(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, program in enumerate(run_here(page), 1):
            exec(compile(program, f"{page.name}, program {i}", "exec"), names)
    assert len(names) > 1, capsys.readouterr().out


@pytest.mark.parametrize("page", IN_ORDER, ids=lambda page: page.stem)
def test_a_page_runs_as_printed_from_an_empty_directory(page, tmp_path, monkeypatch, capsys):
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    names: dict[str, object] = {"__name__": "__main__"}
    shown = printed = 0
    with isolated_registry(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, block in re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            if kind == "bash" and not prefix_of(block, NOT_RUN):
                run(block.strip())
            elif kind == "python":
                capsys.readouterr()
                exec(compile(block, page.name, "exec"), names)
                printed += 1
            elif kind == "text":
                assert capsys.readouterr().out == block
                shown += 1
    assert (printed, shown) == (6, 5)


def test_what_is_not_run_is_still_on_a_page_and_has_a_reason():
    found = [command for page in PAGES for command in commands(page)]
    assert len(found) > 10
    for prefix in (*NOT_RUN, *SLOW):
        assert any(command.startswith(prefix) for command in found), f"no page has {prefix!r} any more: take it out"
    assert all(NOT_RUN.values())
