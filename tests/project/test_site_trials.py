"""The trials for readers of the site: what was planted is there, and every question has its key."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "checks"))

import site_trials  # a script, not a package


@pytest.mark.parametrize("trial", ["student", "kernel-author", "owner"])
def test_each_question_has_a_key(trial):
    questions, key = (
        re.findall(r"^(\d+)\. ", (site_trials.TRIALS / f"{name}.md").read_text(), re.MULTILINE)
        for name in (trial, f"{trial}-key")
    )
    assert questions == key == [str(i) for i in range(1, len(key) + 1)]


def test_the_planted_race_is_found_at_the_line_of_the_key_and_its_remedy_helps():
    pytest.importorskip("refq4_cuda", reason="the package refq4_cuda is not installed: pip install -e .")
    from refq4_cuda import emulator
    from refq4_cuda.nvrtc import compile_ptx

    source = (site_trials.TRIALS / "scales.cu").read_text()
    mended = source.replace("partial[3]));\n    }", "partial[3]));\n        __syncthreads();\n    }")
    assert mended != source
    torch.manual_seed(0)

    def largest(text: str, groups: int) -> bool:
        w, scales = torch.randn(3, groups * 256), torch.full((3, groups), float("nan"))
        ptx = compile_ptx(text, 80, "-lineinfo")
        emulator.run_ptx(ptx, "group_scales", grid=(3, 1, 1), block=(128, 1, 1), args=[w, scales, groups])
        return torch.equal(scales, w.view(3, groups, 256).abs().amax(2))

    with pytest.raises(emulator.RaceError, match=rf"line {site_trials.planted_line()}\b"):
        largest(source, 3)
    assert largest(mended, 3)
    assert largest(source, 1), "with one group there is no second round to race with"
