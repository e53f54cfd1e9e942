"""A head that a checkpoint lacks: in full precision, initialised, trained, saved and loaded again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.utils import ModelOutput

from refq4.integrations.transformers import Refq4Config
from refq4.nn import Linear4bit

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
}
BASES = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL)),
    "bert with its own head": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
    "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(**SMALL, pad_token_id=0)),
    "llama with its own head": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, pad_token_id=0)),
}
TASKS = {
    "sequence classification": transformers.AutoModelForSequenceClassification,
    "token classification": transformers.AutoModelForTokenClassification,
    "question answering": transformers.AutoModelForQuestionAnswering,
}
HEADS = ("classifier", "score", "qa_outputs")
IDS = torch.tensor([[7, 30, 19, 4, 82, 11]])
NF4 = {"bnb_4bit_quant_type": "nf4"}


def save(base: str, path: Path, by: str, request: pytest.FixtureRequest) -> Path:
    """A checkpoint of the base: in full precision, or in 4 bits by refq4 or by bitsandbytes."""
    torch.manual_seed(0)
    model = BASES[base]()
    model.save_pretrained(path / "full")
    if by == "nobody":
        return path / "full"
    if by == "bitsandbytes":
        request.getfixturevalue("bnb")
    config = {"refq4": Refq4Config, "bitsandbytes": transformers.BitsAndBytesConfig}[by](load_in_4bit=True, **NF4)
    type(model).from_pretrained(path / "full", quantization_config=config).save_pretrained(path / by)
    return path / by


def head_of(model: nn.Module) -> nn.Linear:
    (name,) = (name for name in HEADS if hasattr(model, name))
    head = getattr(model, name)
    assert type(head) is nn.Linear
    return head


def tensors(output: ModelOutput) -> list[torch.Tensor]:
    return [value for value in output.to_tuple() if isinstance(value, torch.Tensor)]


def said(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([value.flatten() for value in tensors(model.eval()(IDS))])


@pytest.mark.parametrize("by", ["nobody", "refq4", "bitsandbytes"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("base", BASES)
def test_a_new_head_is_initialised_trains_and_comes_back(base, task, by, tmp_path, request):
    path = save(base, tmp_path, by, request)
    torch.manual_seed(1)
    # transformers calls what is inside of LlamaForQuestionAnswering "transformer", and inside of all others "model"
    other_name = base == "llama with its own head" and task == "question answering"
    names = {"key_mapping": {"^model": "transformer"}} if other_name else {}
    model = TASKS[task].from_pretrained(path, quantization_config=Refq4Config(**NF4), **names)
    head = head_of(model)
    assert 0.01 < float(head.weight.detach().std()) < 0.04, "as transformers initialises it: 0.02"
    layers = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(layers) >= 6

    before = head.weight.detach().clone()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sum(value.float().pow(2).mean() for value in tensors(model(IDS))).backward()
    optimiser.step()
    assert not torch.equal(head.weight, before)

    model.save_pretrained(tmp_path / "tuned")
    again = TASKS[task].from_pretrained(tmp_path / "tuned", quantization_config=Refq4Config(), **names)
    assert {name for name, module in again.named_modules() if isinstance(module, Linear4bit)} == layers
    assert torch.equal(said(again), said(model))


def test_a_checkpoint_of_which_nothing_fits_is_refused(tmp_path, request):
    path, kind = save("llama with its own head", tmp_path, "nobody", request), TASKS["question answering"]
    with pytest.raises(ValueError, match=r"no parameter of a LlamaForQuestionAnswering, .* transformer\..*key_mapping"):
        kind.from_pretrained(path, quantization_config=Refq4Config(**NF4))


def test_what_was_tuned_loads_on_bitsandbytes_too(tmp_path, bnb, request):
    path, kind = save("bert", tmp_path, "nobody", request), TASKS["sequence classification"]
    model = kind.from_pretrained(path, quantization_config=Refq4Config(**NF4))
    model.save_pretrained(tmp_path / "tuned")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "tuned")
    config.quantization_config["quant_method"] = "bitsandbytes"  # as where refq4's integration is not imported
    theirs = kind.from_pretrained(tmp_path / "tuned", config=config)
    assert type(theirs.classifier) is nn.Linear
    assert torch.equal(theirs.classifier.weight, model.classifier.weight)


def test_an_output_layer_with_a_bias_stays_as_one_without(tmp_path):
    """transformers' own rule for the last parameter finds ``score.weight`` and overlooks ``classifier.bias``."""
    transformers.BertForTokenClassification(transformers.BertConfig(**SMALL)).save_pretrained(tmp_path)
    config = Refq4Config(**NF4)
    model = transformers.BertForTokenClassification.from_pretrained(tmp_path, quantization_config=config)
    assert type(model.classifier) is nn.Linear
    assert config.llm_int8_skip_modules is None, "what the caller passed is not changed"
    assert "classifier" in model.config.quantization_config.llm_int8_skip_modules
