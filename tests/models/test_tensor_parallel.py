"""Tensor and expert parallelism: parts of whole blocks, two processes that compute what one does, and refusals."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from patience import BUSY
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.distributed import DistributedConfig

import refq4
from refq4.functional import dequantize_4bit
from refq4.integrations.parts import Split
from refq4.integrations.tensor_parallel import ColwiseParallel4bit, RowwiseParallel4bit, whole_state_dict
from refq4.integrations.transformers import Refq4Config
from refq4.params import Params4bit

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to" / "several-processes.md"
NO_TOKENS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
LLAMA = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, **NO_TOKENS}
MOE = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}
MOE |= {"num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, **NO_TOKENS}

# peft takes a part of the device mesh that transformers took from a larger one.
PARTS_OF_PARTS = torch.__version__ >= (2, 9)
NO_PARTS_OF_PARTS = (
    f"torch {torch.__version__} slices no slice of a device mesh, as peft wants: run this with torch 2.9"
)

# What both processes run. Each has the model whole as well, to compare with.
COMMON = """
import os, re, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import parallelize_module
import refq4
from refq4.integrations.tensor_parallel import ColwiseParallel4bit, RowwiseParallel4bit, whole_state_dict
from refq4.testing.budget import Budget

rank, meeting_point, where = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
"""

TORCH_ALONE = """
def made():
    torch.manual_seed(0)
    return nn.Sequential(refq4.nn.LinearNF4(128, 256), nn.ReLU(), refq4.nn.LinearNF4(256, 128)).to("cpu").eval()

mesh, x = init_device_mesh("cpu", (2,)), torch.randn(6, 128, generator=torch.Generator().manual_seed(1))
for by_token in (False, True):  # the second as in sequence parallelism: each process has the rows of some tokens
    one, two = made(), made()
    layout = {"input_layouts": Shard(0)} if by_token else {}
    result = {"output_layouts": Shard(0)} if by_token else {}
    parallelize_module(two, mesh, {"0": ColwiseParallel4bit(**layout), "2": RowwiseParallel4bit(**result)})
    assert two[0].weight.numel() * 2 == one[0].weight.numel() and two[2].weight.numel() * 2 == one[2].weight.numel()
    assert (two[0].out_features, two[2].in_features) == (128, 128)
    mine = (lambda whole: whole.chunk(2)[rank]) if by_token else (lambda whole: whole)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    with torch.no_grad():
        torch.testing.assert_close(two(mine(x)), mine(one(x)))
    outputs = one(inputs[0]), two(mine(inputs[1]))
    torch.testing.assert_close(outputs[1], mine(outputs[0]))
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(mine(inputs[1].grad), mine(inputs[0].grad))
    torch.testing.assert_close(two[2].bias.grad, one[2].bias.grad)  # added once
    torch.testing.assert_close(two[0].bias.grad, one[0].bias.grad.chunk(2)[rank])
    entries, wanted = whole_state_dict(two), one.state_dict()
    assert entries.keys() == wanted.keys() and all(torch.equal(entries[key], wanted[key]) for key in wanted)
"""

TRANSFORMERS = """
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from refq4.integrations.transformers import Refq4Config

def loaded(name, **options):
    config = Refq4Config(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32")
    return AutoModelForCausalLM.from_pretrained(
        f"{where}/{name}", quantization_config=config, dtype=torch.float32, **options
    )

ids = torch.tensor([[1, 20, 44, 7, 9]])

def agree(name, halves=True, **sizes):
    one, two = loaded(name), loaded(name, distributed_config=DistributedConfig(**sizes))
    assert two.supports_tp_plan
    with torch.no_grad():
        exact = loaded(name).dequantize(torch.float64).double()
        exact.set_experts_implementation("eager")  # torch's grouped product takes no fp64
        Budget.of(exact(ids).logits, one(ids).logits, torch.float32).check(two(ids).logits, name)
        assert two.generate(ids, max_new_tokens=6).tolist() == one.generate(ids, max_new_tokens=6).tolist()
    gradients = []
    for model in (one, two):
        embedded = one.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().sum().backward()
        gradients.append(embedded.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    for label, model in (("one", one), ("two", two)):
        model.save_pretrained(f"{where}/{name}-{label}")  # one process writes
    if rank == 0:
        files = [load_file(f"{where}/{name}-{label}/model.safetensors") for label in ("one", "two")]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    held, whole = (sum(p.numel() for key, p in m.named_parameters() if p.dtype == torch.uint8) for m in (two, one))
    assert held * 2 == whole or not halves
"""

DENSE = """
agree("full-nf4", tp_size=2)
agree("phi3", tp_size=2)  # results are gathered, and inputs divided again
agree("tied-nf4", tp_size=2, halves=False)  # a table in 4 bits, and the head that shares it, stay whole
"""

LORA = """
from peft import LoraConfig, PeftModel, get_peft_model

lora = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
one, generator = get_peft_model(loaded("full"), lora), torch.Generator().manual_seed(5)
for parameter in (p for p in one.parameters() if p.requires_grad):
    parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
one.save_pretrained(f"{where}/adapter-{rank}")
two = loaded("full", distributed_config=DistributedConfig(tp_size=2))
two = PeftModel.from_pretrained(two, f"{where}/adapter-{rank}", is_trainable=True)
for model in (one, two):
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    model.losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        model.losses.append(loss.item())
assert one.losses[-1] < one.losses[0] - 0.1
torch.testing.assert_close(torch.tensor(two.losses), torch.tensor(one.losses), rtol=1e-5, atol=1e-5)
for label, model in (("one", one), ("two", two)):
    model.save_pretrained(f"{where}/trained-{label}-{rank}")
files = [load_file(f"{where}/trained-{label}-{rank}/adapter_model.safetensors") for label in ("one", "two")]
assert files[0].keys() == files[1].keys()
for key in files[0]:
    torch.testing.assert_close(files[0][key], files[1][key], rtol=1e-4, atol=1e-5)
"""

EXPERTS = """
agree("moe", tp_size=2)
agree("moe-nf4", tp_size=2, ep_size=2)
"""

PAGE = r"""
names = {}
os.chdir(where)
for block in re.findall(r"```python\n(.*?)\n```", open(sys.argv[4]).read(), re.DOTALL):
    exec(compile(block, "docs/how-to/several-processes.md", "exec"), names)
assert names["answer"].shape == (1, 8) and names["entries"].keys() == names["block"].state_dict().keys()
again = AutoModelForCausalLM.from_pretrained("divided")(ids).logits
torch.testing.assert_close(names["model"](ids).logits, again, rtol=0, atol=0.02)
"""

ENDS = """
dist.barrier()
dist.destroy_process_group()
print("done")
"""


def test_two_processes_that_hold_a_half_each_compute_and_save_what_one_does(checkpoints, tmp_path):
    """Layers under parallelize_module, a Llama and LoRA on it, a mixture of experts by both plans."""
    if not sys.platform.startswith("linux"):
        pytest.skip("gloo is in every build of torch for Linux; run this there")
    command = [
        sys.executable,
        "-W",
        "error::UserWarning:refq4",
        "-c",
        COMMON + TORCH_ALONE + TRANSFORMERS + DENSE + (LORA if PARTS_OF_PARTS else "") + EXPERTS + PAGE + ENDS,
    ]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting"), str(checkpoints), str(HOW_TO)],
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
    if not PARTS_OF_PARTS:
        pytest.skip(f"all passed but LoRA, which did not run: {NO_PARTS_OF_PARTS}")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """full (a Llama), phi3 and moe in full precision; full-nf4, tied-nf4 and moe-nf4 packed."""
    where = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(where / "full")
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE)).save_pretrained(where / "moe")
    Phi3ForCausalLM(Phi3Config(**LLAMA)).save_pretrained(where / "phi3")
    tied = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)).eval()
    refq4.quantize_model(
        tied, quant_type="nf4", compute_dtype=torch.float32, embeddings=True, head=True, progress=False
    )
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    tied.save_pretrained(where / "tied-nf4")
    for name in ("full", "moe"):
        loaded(where / name).save_pretrained(where / f"{name}-nf4")
    return where


def loaded(path: Path, config: Refq4Config | None = None, **sizes: int):
    config = config or Refq4Config(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    distributed = {"distributed_config": DistributedConfig(**sizes)} if sizes else {}
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.float32, **distributed)


@contextmanager
def process_of(processes: int, rank: int = 0) -> Iterator[DeviceMesh]:
    """As one process of several, the others of which are not there: good for everything but their data."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
    try:
        yield init_device_mesh("cpu", (processes,))
    finally:
        dist.destroy_process_group()


# --- the parts of a weight --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "double quantisation"])
@pytest.mark.parametrize(
    ("shape", "dim", "parts", "processes", "blocksize"),
    [
        pytest.param((6, 128), 0, 1, 3, 64, id="rows"),
        pytest.param((512, 2048), 0, 1, 2, 64, id="rows, groups of 256 scales whole"),
        pytest.param((4, 32), 0, 1, 2, 64, id="two rows a block"),
        pytest.param((6, 192), 1, 1, 3, 64, id="columns, a block of each row"),
        pytest.param((48, 1024), 1, 1, 4, 64, id="columns, groups of 256 scales over several rows"),
        pytest.param((12, 64), 0, 2, 3, 32, id="rows of gate and up"),
        pytest.param((3, 8, 128), 1, 2, 2, 64, id="rows of gate and up of each expert"),
        pytest.param((3, 8, 128), 2, 1, 2, 64, id="columns of each expert"),
        pytest.param((4, 3, 64), 0, 1, 2, 64, id="experts"),
    ],
)
def test_the_parts_decode_to_what_the_whole_weight_decodes_to(shape, dim, parts, processes, blocksize, nested):
    torch.manual_seed(0)
    weight = Params4bit(torch.randn(shape), blocksize=blocksize, compress_statistics=nested, quant_type="nf4").to("cpu")
    decoded = dequantize_4bit(weight, weight.quant_state)
    stacked = decoded.unflatten(dim, (parts, processes, -1))
    for rank in range(processes):
        with process_of(processes, rank) as mesh:
            part = Split("w", weight.quant_state.shape, dim, mesh, parts).part(weight)
        wanted = stacked.select(dim + 1, rank).flatten(dim, dim + 1)
        assert torch.equal(dequantize_4bit(part, part.quant_state), wanted)
        assert part.numel() * processes == weight.numel()
        assert part.untyped_storage().nbytes() == part.nbytes  # no view that keeps the whole alive
        assert part.quant_state.nested is nested
        assert part.quant_state.absmax.untyped_storage().nbytes() == part.quant_state.absmax.nbytes


def test_scales_in_groups_of_another_size_are_refused_since_putting_together_makes_groups_of_256():
    weight = Params4bit(torch.randn(64, 512), quant_type="nf4").to("cpu")
    second = weight.quant_state.state2
    second.blocksize, second.absmax = 128, second.absmax.repeat_interleave(2)
    with process_of(2, 0) as mesh, pytest.raises(ValueError, match=r"^w: the scales .* in groups of 128; only those"):
        Split("w", weight.quant_state.shape, 0, mesh).part(weight)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=str)
def test_a_part_keeps_the_storage_dtype(storage):
    weight = Params4bit(torch.randn(4, 128), quant_type="nf4", quant_storage=storage).to("cpu")
    with process_of(2, 1) as mesh:
        part = Split("w", weight.quant_state.shape, 1, mesh).part(weight)
    assert part.dtype == storage
    decoded = dequantize_4bit(weight, weight.quant_state)
    assert torch.equal(dequantize_4bit(part, part.quant_state), decoded[:, 64:])


def test_a_group_of_one_computes_and_saves_as_no_group_does(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'alone'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for style, nested in ((ColwiseParallel4bit(), True), (RowwiseParallel4bit(use_local_output=False), False)):
            one = refq4.nn.LinearNF4(128, 64, compress_statistics=nested).to("cpu")
            two = nn.Sequential(refq4.nn.LinearNF4(128, 64, compress_statistics=nested), nn.Linear(64, 8)).to("cpu")
            two[0].load_state_dict(one.state_dict())
            parallelize_module(two, mesh, {"0": style, "1": style})  # what is not in 4 bits is torch's to divide
            x = torch.randn(5, 128, requires_grad=True)
            y = two[0](x)
            torch.testing.assert_close(y.full_tensor() if hasattr(y, "full_tensor") else y, one(x))
            assert two(x).shape == (5, 8)
            entries = whole_state_dict(two)
            assert all(torch.equal(entries[f"0.{key}"], value) for key, value in one.state_dict().items())
    finally:
        dist.destroy_process_group()


def test_tp_size_1_is_a_model_as_ever(checkpoints):
    model, ids = loaded(checkpoints / "full-nf4", tp_size=1), torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids).logits, loaded(checkpoints / "full-nf4")(ids).logits)


# --- what is refused, before anything is loaded -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def unloadable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints whose weights are NaN, which no layer takes: whoever loads one gets another message."""
    where = tmp_path_factory.mktemp("unloadable")
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**LLAMA | {"intermediate_size": 192})),
        "moe": Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE | {"moe_intermediate_size": 96})),
    }
    for name, model in models.items():
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        model.save_pretrained(where / name)
    return where


@pytest.mark.parametrize(
    ("name", "processes", "message"),
    [
        pytest.param(
            "llama",
            2,
            r"layers\.0\.mlp\.down_proj\.weight: dimension 1 of a 4-bit weight of shape \[128, 192\] can't be divided "
            r"among 2 processes: each would hold runs of 96 elements, which cut blocks of 64; quantise it with "
            r"blocksize=32, take another number of processes, or leave the layer in full precision",
            id="columns within a block",
        ),
        pytest.param(
            "llama",
            5,
            r"layers\.0\.self_attn\.q_proj\.weight: dimension 0 of a 4-bit weight of shape \[128, 128\], 128, can't be "
            r"divided evenly among 5 processes",
            id="rows that five don't share",
        ),
        pytest.param(
            "moe",
            2,
            r"layers\.0\.mlp\.experts\.down_proj: dimension 2 of a 4-bit weight of shape \[8, 128, 96\] can't be "
            r"divided among 2 processes: each would hold runs of 48 elements, which cut blocks of 64; take another",
            id="columns of experts within a block",
        ),
    ],
)
def test_a_split_that_cuts_blocks_is_refused_before_anything_is_loaded(name, processes, message, unloadable):
    with process_of(processes), pytest.raises(ValueError, match=message):
        loaded(unloadable / name, tp_size=processes)


def test_tp_plan_auto_divides_as_well(checkpoints, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with process_of(2), pytest.warns(FutureWarning, match="tp_plan"):
        model = AutoModelForCausalLM.from_pretrained(
            checkpoints / "full", quantization_config=Refq4Config(), tp_plan="auto"
        )
    assert model.model.layers[0].self_attn.o_proj.in_features == 64


def test_blocks_that_are_small_enough_and_layers_that_are_skipped_are_divided(checkpoints, tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA | {"intermediate_size": 192})).save_pretrained(tmp_path)
    for config in (
        Refq4Config(bnb_4bit_quant_type="nf4", blocksize=32),
        Refq4Config(bnb_4bit_quant_type="nf4", formats={"down_proj": {"blocksize": 32}}),
        Refq4Config(bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["down_proj"]),
    ):
        with process_of(2):
            layer = loaded(tmp_path, config, tp_size=2).model.layers[0].mlp.down_proj
        assert layer.weight.to_local().shape == (128, 96) if type(layer) is nn.Linear else layer.in_features == 96


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        pytest.param({"tp_size": 3}, RuntimeError, "requires 3 processes, but world_size is 2", id="another number"),
        pytest.param({"fsdp_size": 2}, ValueError, "divides 4-bit weights by tp_size and ep_size alone", id="fsdp"),
        pytest.param({"pp_size": 2}, ValueError, "divides 4-bit weights by tp_size and ep_size alone", id="pipeline"),
    ],
)
def test_sizes_that_are_not_made_for_packed_weights_are_refused(sizes, error, message, unloadable):
    with process_of(2), pytest.raises(error, match=message):
        loaded(unloadable / "llama", **sizes)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # what peft 0.21 asks transformers
@pytest.mark.filterwarnings("ignore:You are attempting to slice a submesh:UserWarning")  # torch 2.9 of what peft does
def test_what_needs_whole_weights_is_refused_of_a_divided_model(checkpoints, tmp_path):
    from peft import IA3Config, LoraConfig, get_peft_model

    with process_of(2):
        model = loaded(checkpoints / "full-nf4", tp_size=2)
        with pytest.raises(ValueError, match="can't decode the whole"):
            model.dequantize()
        with pytest.raises(ValueError, match="distributed_checkpoint=True can't save 4-bit weights that are divided"):
            model.save_pretrained(tmp_path, distributed_checkpoint=True)
        for config, named in (
            (LoraConfig(target_modules=["q_proj"], use_dora=True), "use_dora=True"),
            (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3Model"),
        ):
            with pytest.raises(ValueError, match=f"divided among processes, and {named} is not made for that"):
                get_peft_model(model, config)
        if not PARTS_OF_PARTS:
            pytest.skip(f"all was refused but a merge, which did not run: {NO_PARTS_OF_PARTS}")
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(ValueError, match=r"adapters are merged into whole ones.*nothing was merged"):
            adapted.merge_adapter()


def test_lora_on_layers_that_torch_divided_is_refused():
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(refq4.nn.LinearNF4(128, 64)).to("cpu")
    with process_of(2) as mesh:
        parallelize_module(model, mesh, {"0": ColwiseParallel4bit()})
        with pytest.raises(ValueError, match="peft divides LoRA for models that transformers has divided"):
            get_peft_model(model, LoraConfig(target_modules=["0"]))


def test_a_layer_without_bytes_and_a_split_that_cuts_a_block_are_refused():
    with process_of(2) as mesh:
        with pytest.raises(RuntimeError, match="has not been quantised: call"):
            parallelize_module(refq4.nn.LinearNF4(128, 64), mesh, ColwiseParallel4bit())
        layer = refq4.nn.LinearNF4(192, 64).to("cpu")
        with pytest.raises(ValueError, match="which cut blocks of 64; quantise it with blocksize=32"):
            parallelize_module(layer, mesh, RowwiseParallel4bit())
        assert layer.in_features == 192
        assert layer(torch.ones(1, 192)).shape == (1, 64)
