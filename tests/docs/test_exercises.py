"""Each exercise of the notebooks is solved by its own folded solution, and a wrong answer fails."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts" / "docs"), str(ROOT / "notebooks")]

import notebooks  # noqa: E402 (a script)
from refq4 import codebooks  # noqa: E402
from refq4.testing.isolation import isolated_registry  # noqa: E402
from support import exercises  # noqa: E402 (beside the notebooks)

pytestmark = pytest.mark.reference_only("an exercise chooses its backends itself")

WRONG = {
    "1.1": "answer = 4.5",
    "1.2": "def decode(codes, scales, table):\n    return table[codes.long()] * scales[0]",
    "2.1": "from refq4 import get_codebook\nvalues = get_codebook('nf4').values",
    "2.2": "def nearest(x, values):\n    return (x[:, None] >= (values[1:] + values[:-1]) / 2).sum(1)",
    "3.1": "def scales(W, blocksize):\n    return W.flatten()[: W.numel() // blocksize * blocksize].view(-1, blocksize)"
    ".abs().amax(1)",
    "3.2": "answer = 0.7",
    "4.1": "def scales(state):\n    second = state.state2\n    each = second.absmax.repeat_interleave(256)\n"
    "    return second.code[state.absmax.long()] * each[: state.absmax.numel()]",
    "4.2": "answer = 4 + 8 / 128",
    "5.1": "def unpack(byte):\n    return byte & 15, byte >> 4",
    "5.2": "answer = 1000 * 300 // 64",
    "6.1": "answer = ['gemv_4bit', 'MatMul4Bit', 'MatMul4Bit', 'gemv_4bit']",
    "6.2": "import torch, refq4\nlayer, given = refq4.nn.LinearNF4(64, 8).to('cpu'), torch.ones(1, 64)",
    "7.1": "from refq4.functional import dequantize_4bit\ndef gradient(grad_y, layer):\n"
    "    return 2 * grad_y @ dequantize_4bit(layer.weight, layer.quant_state)",
    "7.2": "answer = 384 * 1536",
    "8.1": "answer = 1000 / 100",
    "8.2": "answer = 4.5625",
    "9.1": "answer = list(range(8))",
    "9.2": "import struct\ndef join(upper, lower):\n    bits = (lower << 8 | upper) << 16\n"
    "    return struct.unpack('<f', struct.pack('<I', bits))[0]",
    "10.1": "def lane(r, k):\n    return 4 * (r % 8) + k // 4",
    "10.2": "answer = 'UninitialisedError'",
    "11.1": "def agrees(got, wanted, allowed):\n    return not bool(((got - wanted).abs() > allowed).any())",
    "11.2": "answer = 2**-7",
    "12.1": "import torch\ndef gemv(x, weight, bias):\n    n, k = weight.shape\n"
    "    codes = torch.stack([weight.packed & 15, weight.packed >> 4], 1).flatten().long()[: n * k]\n"
    "    scales = weight.absmax.repeat_interleave(weight.blocksize)[: n * k]\n"
    "    return x @ (weight.code[codes] * scales).view(n, k).to(x.dtype).t()",
    "12.2": "answer = 'offset'",
    "13.1": "answer = 7e9 * 4 / 8 / 1e9",
    "13.2": "answer = 0.02",
}


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(codebooks, "_BOOKS", dict(codebooks._BOOKS))
    with isolated_registry():
        yield


def found() -> dict[str, tuple[str, str]]:
    """number -> (the cell, the solution below it)."""
    every = {}
    for source in notebooks.sources():
        cells = notebooks.read_source(source).cells
        for cell, below in pairwise(cells):
            if "exercise" in cell.metadata.get("tags", []):
                (number,) = re.findall(r'exercises\.check\("([\d.]+)"', cell.source)
                (solution,) = re.findall(r"```python\n(.*?)\n```", below.source, re.DOTALL)
                assert f"A solution to {number}" in below.source
                every[number] = cell.source, solution
    return every


EXERCISES = found()
each_exercise = pytest.mark.parametrize("number", EXERCISES)


def said(number: str, *programs: str) -> exercises.Verdict:
    """What the exercise's cell shows at its end, with programs run before that."""
    *before, last = EXERCISES[number][0].strip().splitlines()
    names: dict[str, Any] = {}
    for program in ("\n".join(before), "from support import exercises", *programs):
        exec(compile(program, f"exercise {number}", "exec"), names)
    return eval(last, names)


def test_each_notebook_has_two_and_each_has_a_check_and_a_wrong_answer():
    wanted = [f"{n}.{i}" for n in range(1, len(notebooks.sources()) + 1) for i in (1, 2)]
    assert list(EXERCISES) == list(exercises.CHECKS) == list(WRONG) == wanted


@each_exercise
def test_the_folded_solution_passes(number):
    verdict = said(number, EXERCISES[number][1])
    assert verdict.right, verdict


@each_exercise
def test_a_wrong_answer_fails_and_an_empty_one_is_open(number):
    wrong, empty = said(number, WRONG[number]), said(number)
    assert not wrong.right
    assert "not right yet" in wrong.words
    assert "is open" in empty.words
