"""The pages about models say nothing that doesn't run; and a script for bitsandbytes runs on refq4 under its name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import refq4 as bnb

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")  # peft calls it
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # transformers, whenever one is passed
@pytest.mark.filterwarnings("ignore:a merged weight is rounded")
@pytest.mark.usefixtures("bnb")
def test_the_page_about_transformers_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "how-to" / "transformers.md").read_text()
    blocks = re.findall(r"```python\n(.*?)\n```", page, re.DOTALL)
    assert len(blocks) == 9
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/how-to/transformers.md", "exec"), names)
    assert 0.05 < names["worst"] < 0.12
    install, rest = "pip install -e '.[transformers]'", (DOCS.parent / "README.md").read_text()
    short = rest.split(install, 1)[1].split("\n", 1)[1].split("```", 1)[0]
    exec(compile(short, "README.md", "exec"), names | {"path": "full"})
    with torch.no_grad():
        ids = names["ids"]
        torch.testing.assert_close(names["merged"](ids).logits, names["model"](ids).logits, rtol=0, atol=0.05)


def test_a_script_for_bitsandbytes_runs_under_its_name():
    """The parts of bitsandbytes that 4-bit scripts use, as they use them, with ``import refq4 as bnb``."""
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = bnb.nn.Linear4bit(64, 128, compute_dtype=torch.float32, quant_type="nf4")
            self.down = bnb.nn.LinearFP4(128, 64, bias=False, compress_statistics=False)

        def forward(self, x):
            return self.down(torch.relu(self.up(x)))

    full = torch.nn.Linear(64, 128)
    net = Net()
    net.up.load_state_dict(full.state_dict())
    net = net.to("cpu")
    assert isinstance(net.up.weight, bnb.nn.Params4bit)
    assert net(torch.randn(3, 64)).shape == (3, 64)

    weight = net.up.weight
    decoded = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert (decoded - full.weight).norm() < 0.12 * full.weight.norm()
    x = torch.randn(5, 64, requires_grad=True)
    y = bnb.matmul_4bit(x, weight.t(), quant_state=weight.quant_state, bias=net.up.bias)
    torch.testing.assert_close(y, x @ decoded.t() + net.up.bias)
    y.sum().backward()
    torch.testing.assert_close(x.grad, decoded.sum(0).expand_as(x))

    packed, state = bnb.functional.quantize_4bit(
        full.weight.detach(), blocksize=64, compress_statistics=True, quant_type="nf4", quant_storage=torch.uint8
    )
    token = torch.randn(1, 64)
    out = bnb.functional.gemv_4bit(token, packed.t(), state=state)
    torch.testing.assert_close(out, token @ bnb.functional.dequantize_nf4(packed, state).t())
    moved = bnb.nn.Params4bit(full.weight.detach(), requires_grad=False, quant_type="nf4").to("cpu")
    assert torch.equal(moved.data, packed)
    q, blockwise = bnb.functional.quantize_blockwise(token)
    assert (bnb.functional.dequantize_blockwise(q, blockwise) - token).abs().max() < 0.05 * token.abs().max()
