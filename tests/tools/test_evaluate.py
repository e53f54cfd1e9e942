"""refq4.evaluate and ``refq4 eval``: on a real text, against losses and divergences computed by hand."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pydoc_data import topics

import pytest
import torch
import transformers
from torch import nn

import refq4
from refq4 import cli
from refq4.checkpoint import quantize_checkpoint
from refq4.functional import dequantize_4bit
from refq4.nn import Linear4bit
from refq4.tools import evaluate as evaluating
from refq4.tools.evaluate_files import read_text, read_tokens

TEXT = "\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()[:400_000]
BYTES = torch.tensor(list(TEXT))
CHANCE = math.log(256)


def trained(layers: int, width: int, steps: int) -> transformers.LlamaForCausalLM:
    """A Llama that reads bytes, trained on a real text: the reference pages that help() shows."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None
    )
    model = transformers.LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, total_steps=steps)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(BYTES) - 40_000, (16,), generator=draw)
        ids = torch.stack([BYTES[at : at + 48] for at in starts])
        loss = model(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def held_out(count: int = 12, length: int = 64) -> list[torch.Tensor]:
    """Sequences of bytes that were not trained on, of two lengths."""
    return [ids[: length - at % 2] for at, ids in enumerate(BYTES[-count * length :].view(count, length))]


@pytest.fixture(scope="module")
def full():
    return trained(layers=2, width=64, steps=100)


@pytest.fixture(scope="module")
def small(full):
    return refq4.quantize_model(copy.deepcopy(full), quant_type="fp4", progress=False)


@pytest.fixture(scope="module")
def report(full, small):
    return refq4.evaluate(small, held_out(), against=full, progress=False)


@torch.no_grad()
def by_hand(model, exact=None):
    """Loss, KL and agreement in fp64, one sequence after the other."""
    loss, kl, same = [], [], []
    for ids in held_out():
        logits = model(ids[None]).logits[0, :-1].double()
        loss.append(nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
        if exact is not None:
            wanted = exact(ids[None]).logits[0, :-1].double()
            p, q = wanted.softmax(-1), logits.softmax(-1)
            kl.append((p * (p / q).log()).sum(-1))
            same.append(wanted.argmax(-1) == logits.argmax(-1))
    return [float(torch.cat(found).double().mean()) for found in (loss, kl, same) if found]


def test_the_figures_are_those_computed_by_hand(full, small, report):
    loss, kl, top1 = by_hand(small, full)
    assert report.exact_loss < 0.6 * CHANCE, "a model that has learnt nothing shows nothing"
    assert abs(report.loss - loss) < 1e-6
    assert abs(report.exact_loss - by_hand(full)[0]) < 1e-6
    assert abs(report.kl - kl) < 1e-6
    assert kl > 1e-4
    assert report.top1 == top1
    assert 0.5 < top1 < 1
    assert report.tokens == sum(len(ids) - 1 for ids in held_out())
    assert report.perplexity == math.exp(report.loss)


@torch.no_grad()
def test_the_standard_error_of_kl_is_that_of_the_mean_over_positions(full, small, report):
    each = []
    for ids in held_out():
        exact, ours = (model(ids[None]).logits[0, :-1].double().log_softmax(-1) for model in (full, small))
        each.append((exact.exp() * (exact - ours)).sum(-1))
    found = torch.cat(each)
    assert report.kl_error == pytest.approx(float(found.std()) / math.sqrt(len(found)), rel=1e-3)


@pytest.mark.parametrize(("error", "says"), [(0.03, "(30%); a longer text makes it smaller"), (0.005, "(5%)\n")])
def test_a_report_says_when_its_text_is_short(error, says):
    text = str(evaluating.Evaluation(800, 2.0, exact_loss=1.9, kl=0.1, top1=0.9, kl_error=error))
    assert says in text + "\n"


def test_the_damage_of_a_layer_is_that_of_its_outputs_on_this_text(full, small, report):
    sums = {}

    def watch(name):
        def hook(module, args, out):
            layer = small.get_submodule(name)
            off = nn.functional.linear(args[0], module.weight - dequantize_4bit(layer.weight, layer.quant_state))
            error, norm = sums.get(name, (0, 0))
            sums[name] = error + off.double().square().sum(), norm + out.double().square().sum()

        return hook

    names = [name for name, module in small.named_modules() if isinstance(module, Linear4bit)]
    hooks = [full.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    with torch.no_grad():
        for ids in held_out():
            full(ids[None])
    for hook in hooks:
        hook.remove()
    assert {layer.name for layer in report.layers} == set(names)
    for layer in report.layers:
        error, norm = sums[layer.name]
        assert layer.damage == pytest.approx(float(error / norm), rel=1e-4)


def ranks(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).argsort().argsort().double()


@torch.no_grad()
def alone(full, small, name: str) -> float:
    """The KL of the model in which one layer alone is quantised."""
    one = copy.deepcopy(full)
    layer = small.get_submodule(name)
    one.get_submodule(name).weight.copy_(dequantize_4bit(layer.weight, layer.quant_state))
    return by_hand(one, full)[1]


def correlation(full, small, report) -> tuple[float, float]:
    """Spearman's, of the KL of one layer alone with the estimate, and with the damage."""
    measured = ranks([alone(full, small, layer.name) for layer in report.layers])
    found = (
        float(torch.corrcoef(torch.stack([measured, ranks([getattr(layer, field) for layer in report.layers])]))[0, 1])
        for field in ("kl", "damage")
    )
    return tuple(found)


def test_the_layers_are_ranked_as_quantising_each_alone_ranks_them(full, small, report):
    estimated, _ = correlation(full, small, report)
    assert len(report.layers) == 14
    assert estimated >= 0.8
    assert [layer.kl for layer in report.layers] == sorted((layer.kl for layer in report.layers), reverse=True)
    measured = alone(full, small, report.layers[0].name)
    assert report.layers[0].kl == pytest.approx(measured, rel=0.7), "an estimate of the divergence, not just a rank"


@pytest.mark.slow
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_layers_of_a_deeper_model_are_ranked_too(quant_type):
    full = trained(layers=4, width=128, steps=400)
    small = refq4.quantize_model(copy.deepcopy(full), quant_type=quant_type, progress=False)
    report = refq4.evaluate(small, held_out(), against=full, progress=False)
    estimated, damage = correlation(full, small, report)
    print(f"{quant_type}: Spearman's rho {estimated:.3f} (of the plain damage {damage:.3f}); {report}")
    assert report.exact_loss < 0.4 * CHANCE
    assert len(report.layers) == 28
    assert estimated >= 0.8


def test_without_a_model_to_compare_with_there_is_a_loss_and_no_more(small):
    report = refq4.evaluate(small, held_out(), progress=False)
    assert report.loss == pytest.approx(by_hand(small)[0], abs=1e-6)
    assert (report.kl, report.top1, report.exact_loss, report.exact_perplexity, report.layers) == (None,) * 4 + ([],)
    assert "this model" in str(report)


def test_without_draws_nothing_is_estimated_and_the_damage_ranks(full, small):
    report = refq4.evaluate(small, held_out(2), against=full, draws=0, progress=False)
    assert {layer.kl for layer in report.layers} == {None}
    damages = [layer.damage for layer in report.layers]
    assert damages == sorted(damages, reverse=True)


def test_models_are_left_as_they_were(full, small):
    models = copy.deepcopy(full).train(), copy.deepcopy(small).train()
    models[0].model.norm.eval()
    models[0].model.embed_tokens.weight.requires_grad_(True)
    before = [{name: module.training for name, module in model.named_modules()} for model in models]
    refq4.evaluate(models[1], held_out(2), against=models[0], progress=False)
    assert before == [{name: module.training for name, module in model.named_modules()} for model in models]
    assert all(parameter.grad is None for model in models for parameter in model.parameters())
    assert not any(module._forward_hooks for model in models for module in model.modules())


class Tables(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table, self.say = table, nn.Linear(64, 9)

    def forward(self, ids):
        return self.say(self.table(ids))


def test_a_tables_damage_is_that_of_the_rows_that_were_looked_up():
    table = nn.Embedding(9, 64)
    full = Tables(table)
    small = Tables(refq4.nn.Embedding4bit(9, 64, quant_type="nf4"))
    small.load_state_dict(full.state_dict())
    small = small.to("cpu")
    ids = torch.tensor([1, 2, 2, 5])
    report = refq4.evaluate(small, [ids], against=full, progress=False)
    rows = table(ids).detach()
    wanted = (small.table(ids) - rows).square().sum() / rows.square().sum()
    assert [layer.name for layer in report.layers] == ["table"]
    assert report.layers[0].damage == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize(
    ("tokens", "error", "says"),
    [
        ([], ValueError, "no tokens to evaluate on"),
        ([[1, 2], [3]], ValueError, "sequence 2: expected two or more token ids"),
        ([[1.5, 2.5]], ValueError, "sequence 1: expected two or more token ids, got torch.float32"),
        ([[-1, 2]], ValueError, "sequence 1"),
        ([[1, 9]], IndexError, "out of range"),
    ],
    ids=["nothing", "one token", "floats", "negative", "outside the vocabulary"],
)
def test_wrong_tokens_are_named(tokens, error, says):
    with pytest.raises(error, match=says):
        refq4.evaluate(Tables(nn.Embedding(9, 64)), tokens, progress=False)


def test_what_is_no_language_model_and_models_that_do_not_belong_together_are_refused(full, monkeypatch):
    with pytest.raises(TypeError, match=r"needs a language model: ids \[1, 3\] gave \[1, 3\]"):
        refq4.evaluate(nn.Identity(), [[1, 2, 3]], progress=False)
    with pytest.raises(ValueError, match="vocabulary of 9 is not the full-precision model's"):
        refq4.evaluate(Tables(nn.Embedding(9, 64)), [[1, 2, 3]], against=full, progress=False)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match="give fewer tokens, or let TMPDIR"):
        refq4.evaluate(full, [[1, 2, 3]], against=full, progress=False)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directories(full, tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    root = tmp_path_factory.mktemp("models")
    full.save_pretrained(root / "full")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(root / "full")
    quantize_checkpoint(root / "full", root / "nf4", progress=False)
    lines = [" ".join(map(str, ids.tolist())) for ids in held_out()]
    (root / "ids.txt").write_text("\n\n".join(lines))
    (root / "text.txt").write_text(TEXT[-500:].decode())
    return root


def run(capsys, *arguments: object) -> str:
    assert cli.main(["eval", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_the_command_gives_what_the_function_gives_with_one_model_in_memory(full, directories, capsys, monkeypatch):
    living: list[object] = []
    load = transformers.AutoModelForCausalLM.from_pretrained

    def watched(*arguments, **settings):
        import weakref

        assert all(ref() is None for ref in living), "the full-precision model is still there"
        model = load(*arguments, **settings)
        living.append(weakref.ref(model))
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", watched)
    options = ["--against", directories / "full", "--tokens", directories / "ids.txt", "--json"]
    got = json.loads(run(capsys, directories / "nf4", *options))
    assert len(living) == 2
    small = refq4.quantize_model(copy.deepcopy(full), progress=False)
    wanted = refq4.evaluate(small, held_out(), against=full, progress=False).to_dict()
    assert got.keys() == wanted.keys()
    assert {"loss", "perplexity", "kl", "top1", "layers"} <= got.keys()
    for name in ("loss", "perplexity", "exact_loss", "kl", "top1"):
        assert got[name] == pytest.approx(wanted[name], rel=1e-4), name
    assert [layer["name"] for layer in got["layers"]] == [layer["name"] for layer in wanted["layers"]]
    for mine, theirs in zip(got["layers"], wanted["layers"], strict=True):
        assert (mine["damage"], mine["kl"]) == pytest.approx((theirs["damage"], theirs["kl"]), rel=1e-3)


def test_a_text_is_cut_by_the_models_tokenizer_and_the_layers_are_drawn(directories, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "layers.png"
    options = ["--against", directories / "full", "--text", directories / "text.txt", "--context", 48]
    text = run(capsys, directories / "nf4", *options, "--sequences", 3, "--draws", 1, "--picture", picture)
    assert f"{3 * 47} predicted tokens" in text
    assert "the 10 of 14 layers that cost the most" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def edited(directories, name: str, change) -> object:
    """A copy of the 4-bit model whose config.json is changed."""
    target = directories / name
    shutil.copytree(directories / "nf4", target, dirs_exist_ok=True)
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_a_text_is_cut_into_no_longer_sequences_than_the_model_takes(directories):
    (directories / "long.txt").write_text("a" * 700)
    no_limit = {"model_type": "bloom"}  # ALiBi: its config has no max_position_embeddings
    nested = {"model_type": "llava", "text_config": {"model_type": "llama", "max_position_embeddings": 40}}
    for name, change, wanted in [
        ("as it is", lambda config: None, 128),
        ("long", lambda config: config.update(max_position_embeddings=4096), 512),
        ("nested", lambda config: config.update(nested), 40),
        ("no limit", lambda config: config.pop("max_position_embeddings") and config.update(no_limit), 512),
    ]:
        sequences = read_text(directories / "long.txt", edited(directories, name, change))
        assert max(map(len, sequences)) == wanted, name


def test_each_line_of_a_text_can_be_a_sequence(directories):
    (directories / "lines.txt").write_text("abc\n\nabcdefg\n")
    (whole,) = read_text(directories / "lines.txt", directories / "nf4")
    lines = read_text(directories / "lines.txt", directories / "nf4", lines=True)
    assert [len(line) for line in lines] == [3, 7]
    assert len(whole) > 3 + 7, "the whole text has its line ends, too"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tokens", "ids.txt", "--lines"], "--lines goes with --text"),
        (["--tokens", "missing.txt"], "missing.txt"),
        (["--tokens", "words.txt"], "words.txt, line 2: expected token ids"),
        (["--tokens", "one.txt"], "one.txt, line 1: one token alone"),
        (["--tokens", "empty.txt"], "holds no token ids"),
        (["--text", "words.txt"], "no tokenizer could be loaded"),
        (["--tokens", "ids.txt", "--against", "nf4"], "this one is quantised, too"),
        (["--tokens", "ids.txt", "--against", "nowhere"], "no config.json in"),
        (["--tokens", "ids.txt", "--draws", "-1"], "--draws must be 0 or more"),
        (["--tokens", "long-ids.txt"], "a sequence of 129 tokens, but max_position_embeddings in the config of bare"),
        (["--tokens", "ids.txt", "--against", "adapter"], "adapter is a peft adapter, not a model: merge it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_line_on_stderr(directories, options, says, capsys, monkeypatch):
    monkeypatch.chdir(directories)
    (directories / "adapter").mkdir(exist_ok=True)
    (directories / "adapter" / "adapter_config.json").write_text("{}")
    for name, content in {"words": "1 2\nthree 4", "one": "5", "empty": "\n", "long-ids": "1 " * 129}.items():
        (directories / f"{name}.txt").write_text(content)
    shutil.copytree("nf4", "bare", ignore=shutil.ignore_patterns("tokenizer*"), dirs_exist_ok=True)
    assert cli.main(["eval", "bare", *options]) == 1
    error = capsys.readouterr().err
    assert says in error


def test_a_context_beyond_the_models_limit_and_an_adapter_are_refused(directories, capsys):
    (directories / "long.txt").write_text("a" * 700)
    text = ["--text", str(directories / "long.txt")]
    assert cli.main(["eval", str(directories / "nf4"), *text, "--context", "200"]) == 1
    assert "give --context 128 or less" in capsys.readouterr().err
    (directories / "adapter").mkdir(exist_ok=True)
    (directories / "adapter" / "adapter_config.json").write_text("{}")
    assert cli.main(["eval", str(directories / "adapter"), *text]) == 1
    assert "adapter is a peft adapter, not a model: merge it" in capsys.readouterr().err


def test_ids_may_stand_with_commas(tmp_path):
    (tmp_path / "ids.txt").write_text("1, 2,3\n4 5\n")
    assert [ids.tolist() for ids in read_tokens(tmp_path / "ids.txt")] == [[1, 2, 3], [4, 5]]
    assert evaluating.DRAWS >= 1
