"""FSDP2 over two processes on the CPU: weights sharded, gathered for each call, trained around, saved whole, loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from patience import BUSY
from torch.distributed.device_mesh import init_device_mesh

import refq4
from refq4.testing import assert_same_bits

# Of a parameter of integers, torch 2.8 to 2.10 make a shard that requires a gradient, which is an error; 2.13 does not.
SHARDS_BYTES = torch.__version__ >= (2, 13)
NO_BYTES = f"fully_shard of torch {torch.__version__} refuses uint8 parameters: run this with torch 2.13"

PROCESS = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import refq4

class Block(nn.Module):
    def __init__(self, storage):
        super().__init__()
        self.base = refq4.nn.LinearNF4(64, 64, bias=False, quant_storage=storage).requires_grad_(False)
        self.a, self.b = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))

def made(storage, seed):
    torch.manual_seed(seed)
    return nn.Sequential(Block(storage), Block(storage)).to("cpu")

rank, meeting_point = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
mesh, whole = init_device_mesh("cpu", (2,)), StateDictOptions(full_state_dict=True, cpu_offload=True)
x = torch.randn(5, 64, generator=torch.Generator().manual_seed(7))
same = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0)
times = 2 if torch.__version__ < (2, 9) else 1  # torch 2.8 adds the gradients of a gloo group; it should average them

for storage in [getattr(torch, name) for name in sys.argv[3:]]:
    plain, model = made(storage, 0), made(storage, 0)
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    weight = model[0].base.weight
    assert weight.to_local().numel() * 2 == weight.numel() == plain[0].base.weight.numel()

    for _ in range(2):  # the second call gathers again
        y, wanted = model(x), plain(x)
        same(y, wanted)
    y.square().sum().backward()
    wanted.square().sum().backward()
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == ("base" in name)
        if q.grad is not None:
            torch.testing.assert_close(p.grad.full_tensor(), times * q.grad)

    entries, wanted = get_model_state_dict(model, options=whole), plain.state_dict()
    if rank == 0:  # the other process has none
        assert entries.keys() == wanted.keys()
        for key, value in wanted.items():
            same(entries[key].view(torch.uint8), value.view(torch.uint8))

    other = made(storage, 1)
    set_model_state_dict(model, other.state_dict(), options=whole)
    same(model(x), other(x))

    narrow = {k: v for k, v in refq4.nn.LinearNF4(64, 32, bias=False).to("cpu").state_dict().items()}
    try:
        model[0].base._load_sharded(narrow.pop("weight"), narrow)
    except ValueError as error:
        assert "[32, 64]" in str(error)
    else:
        raise AssertionError("another shape was taken")
dist.destroy_process_group()
print("done")
"""


def test_two_processes_share_a_models_weights_and_agree_with_one_that_has_them_all(tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("gloo is in every build of torch for Linux; run this there")
    command = [sys.executable, "-W", "error::UserWarning:refq4", "-c", PROCESS]
    storages = ["bfloat16", "float32", *(["uint8"] if SHARDS_BYTES else [])]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting"), *storages],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=BUSY) for process in running]
    for process, (out, err) in zip(running, said, strict=True):
        assert process.returncode == 0, err
        assert out.endswith("done\n")
    if not SHARDS_BYTES:
        pytest.skip(f"bfloat16 and float32 storage passed, uint8 did not run: {NO_BYTES}")


@pytest.fixture
def group_of_one(tmp_path):
    """A process group in this process, so that what it runs counts as run (coverage)."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'alone'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "storage",
    [pytest.param(torch.uint8, marks=pytest.mark.skipif(not SHARDS_BYTES, reason=NO_BYTES)), torch.bfloat16],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_sharded_layer_takes_bytes_and_state_of_its_shape_and_keeps_them_to_itself(storage, group_of_one):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    model, other = (
        torch.nn.Sequential(refq4.nn.LinearNF4(64, 64, quant_storage=storage).to("cpu").requires_grad_(False))
        for _ in range(2)
    )
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert hasattr(model[0].weight, "device_mesh")
    whole = StateDictOptions(full_state_dict=True)
    entries = {key: value.clone() for key, value in other.state_dict().items()}
    set_model_state_dict(model, entries, options=whole)
    x = torch.randn(5, 64)
    assert torch.equal(model(x), other(x))
    for key, value in get_model_state_dict(model, options=whole).items():
        assert_same_bits(value, other.state_dict()[key], key)

    stats = {key.removeprefix("0."): value for key, value in entries.items() if "weight." in key}
    model[0]._load_packed(entries["0.weight"], stats, False)
    assert model[0].quant_state == other[0].quant_state
    stats["weight.nested_absmax"].zero_()
    stats["weight.absmax"].zero_()
    assert model[0].quant_state == other[0].quant_state

    with pytest.raises(ValueError, match=r"^weight: shape \[64, 64\] packs into 2048"):
        model[0]._load_packed(torch.zeros(3, 1, dtype=torch.uint8), stats, False)
    narrow = refq4.nn.LinearNF4(32, 64).to("cpu").state_dict()
    narrow.pop("bias")
    with pytest.raises(ValueError, match=r"the checkpoint holds .*\[64, 32\].* this LinearNF4 needs .*\[64, 64\]"):
        model[0]._load_packed(narrow.pop("weight"), narrow, False)


def test_sharded_experts_compute_in_training_mode_too_from_the_bytes_that_were_gathered(group_of_one):
    from moe_models import made
    from torch.distributed.fsdp import fully_shard

    sharded, plain = (made("Qwen3Moe").requires_grad_(False).train() for _ in range(2))
    for model in (sharded, plain):
        refq4.quantize_model(model, quant_storage=torch.bfloat16)
    for block in sharded.model.layers:
        fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    assert hasattr(sharded.model.layers[0].mlp.experts.parametrizations.down_proj.original, "device_mesh")
    x = torch.randn(1, 10, 128)
    results = []
    for model in (sharded, plain):
        A = x.clone().requires_grad_()
        y = model(inputs_embeds=A).logits
        y.square().sum().backward()
        results.append((y.detach(), A.grad, model.eval()(inputs_embeds=x).logits.detach()))
    for mine, wanted in zip(*results, strict=True):
        assert torch.equal(mine, wanted)
