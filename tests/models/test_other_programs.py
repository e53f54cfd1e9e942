"""Programs that know nothing of refq4: ``refq4 run`` makes it known in them, and takes bitsandbytes' place."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from patience import BUSY
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPTQConfig, LlamaConfig, LlamaForCausalLM

from refq4.integrations import later
from refq4.integrations.transformers import Refq4Config

LLAMA = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "bos_token_id": 1}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2, "eos_token_id": None, "pad_token_id": 0}

# Says whose layers a model has, and what a config.json of it would be.
PROGRAM = """
import sys
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
given = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **(given if "--quantize" in sys.argv else {}))
layer = model.model.layers[0].mlp.down_proj
print(sys.argv, __name__, type(layer).__module__, model(model.dummy_inputs["input_ids"] % 256).logits.isfinite().all())
if "--save" in sys.argv:
    model.save_pretrained(sys.argv[-1])
sys.exit(3)
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(path)
    return path


def run(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "refq4", "run", *map(str, words)]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=10 * BUSY)


def test_a_program_that_quantises_with_bitsandbytes_runs_on_refq4_and_saves_what_bitsandbytes_reads(
    llama, bnb, tmp_path
):
    (tmp_path / "program.py").write_text(PROGRAM)
    saved = tmp_path / "saved"
    done = run(
        "--bitsandbytes", "--backend", "cpu", "--", "program.py", llama, "--quantize", "--save", saved, cwd=tmp_path
    )
    assert done.returncode == 3, done.stderr
    assert (
        done.stdout == f"['program.py', '{llama}', '--quantize', '--save', '{saved}'] __main__ refq4.nn tensor(True)\n"
    )
    assert json.loads((saved / "config.json").read_text())["quantization_config"]["quant_method"] == "bitsandbytes"
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        theirs = AutoModelForCausalLM.from_pretrained(saved, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert isinstance(theirs.model.layers[0].mlp.down_proj, bnb.nn.Linear4bit)
    assert "refq4.nn" in run("--bitsandbytes", "--", "program.py", saved, cwd=tmp_path).stdout, (
        "its checkpoints as well"
    )


def test_a_program_that_loads_what_refq4_saved_needs_no_word_of_it(llama, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=Refq4Config(bnb_4bit_quant_type="af4"))
    model.save_pretrained(tmp_path / "af4")
    done = run("--", tmp_path / "program.py", tmp_path / "af4")
    assert done.returncode == 3, done.stderr
    assert " __main__ refq4.nn tensor(True)" in done.stdout


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ("print('fine')", 0, ""),
        ("import sys; sys.exit('a reason')", 1, "a reason\n"),
        ("import sys; sys.exit(ValueError('another'))", 1, "another\n"),
        ("import os; print(os.environ['REFQ4_BACKEND'])", 0, ""),
    ],
)
def test_a_program_ends_as_it_would_alone(body, code, says, tmp_path):
    (tmp_path / "program.py").write_text(body)
    done = run("--backend", "reference", "--", "program.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (code, says)


def test_an_error_of_the_programs_is_shown_with_its_own_lines(tmp_path):
    (tmp_path / "program.py").write_text("def load():\n    open('no such file')\n\nload()\n")
    done = run("--", "program.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "    open('no such file')" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("FileNotFoundError")


@pytest.mark.parametrize("library", ["transformers", "peft"])
def test_looking_for_a_library_is_not_importing_it(library):
    code = f"""
import importlib.util, sys
from refq4.integrations.later import connect
connect({library!r})
assert importlib.util.find_spec({library!r}) and importlib.util.find_spec({library!r})
assert "refq4.integrations.{library}" not in sys.modules
import {library}
assert "refq4.integrations.{library}" in sys.modules
assert not [finder for finder in sys.meta_path if type(finder).__name__ == "_Waiting" and finder.library == {library!r}]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=10 * BUSY)
    assert done.returncode == 0, done.stderr


def test_bitsandbytes_config_on_a_checkpoint_that_bitsandbytes_can_not_read_loads_it(llama, tmp_path, monkeypatch):
    AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=Refq4Config(bnb_4bit_quant_type="af4")
    ).save_pretrained(tmp_path)
    monkeypatch.setattr(later, "served", True)
    given = BitsAndBytesConfig(load_in_4bit=True, llm_int8_enable_fp32_cpu_offload=True)
    with pytest.warns(
        UserWarning, match="bitsandbytes does not know the type af4, so the model will be saved as refq4's"
    ):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=given)
    assert model.config.quantization_config.to_dict()["quant_method"] == "refq4"


def test_a_config_of_another_way_to_quantise_is_refused_by_transformers_own_word(llama, tmp_path):
    AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=Refq4Config(bnb_4bit_quant_type="af4")
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Refq4Config but you are passing a GPTQConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=GPTQConfig(bits=4))


def test_a_module_of_this_folder_and_an_installed_command_are_programs(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text("import sys\nprint('package', sys.argv[1:])\n")
    assert run("--", "package", "--flag", cwd=tmp_path).stdout == "package ['--flag']\n"
    assert run("--", "refq4", "--version").stdout.startswith("refq4 ")


@pytest.mark.parametrize(
    ("program", "says"),
    [("missing.py", "there is no file missing.py"), ("refq5", "refq5 is not a file, a module or a command")],
)
def test_what_is_no_program_is_one_sentence(program, says):
    done = run("--", program)
    assert done.returncode == 1
    assert done.stderr.startswith(f"refq4 run: {says}")
    assert len(done.stderr.splitlines()) == 1


def test_a_checkpoint_that_is_left_to_bitsandbytes_is_said_once(llama, bnb, tmp_path, monkeypatch):
    theirs = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=theirs).save_pretrained(tmp_path)
    monkeypatch.setattr(later, "told", False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [str(w.message) for w in seen if "refq4" in str(w.message)] == [
        "this checkpoint of bitsandbytes gets bitsandbytes' own layers, which refq4.set_backend and refq4.trace don't "
        "reach; pass quantization_config=Refq4Config() to from_pretrained for refq4's"
    ]


def test_a_config_says_for_whom_it_saves_and_refuses_what_the_other_can_not_read():
    assert (
        Refq4Config(saved_for="bitsandbytes").to_dict().keys() <= BitsAndBytesConfig(load_in_4bit=True).to_dict().keys()
    )
    for wrong in ({"bnb_4bit_quant_type": "af4"}, {"embeddings": True}, {"formats": {"mlp": {"quant_type": "int4"}}}):
        with pytest.raises(ValueError, match="bitsandbytes does not know"):
            Refq4Config(saved_for="bitsandbytes", **wrong)
    with pytest.raises(ValueError, match='must be "refq4" or "bitsandbytes"'):
        Refq4Config(saved_for="gptq")


TASK = """\
task: capitals
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


def test_lm_eval_measures_a_model_on_refq4(llama, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {
        word: i for i, word in enumerate(["<pad>", "<s>", "the", "capital", "of", "France", "is", "Paris", "Rome"])
    }
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    model = tmp_path / "model"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="<s>", pad_token="<pad>")
    tokenizer.save_pretrained(model)
    quantised = AutoModelForCausalLM.from_pretrained(llama, quantization_config=Refq4Config(bnb_4bit_quant_type="af4"))
    quantised.save_pretrained(model)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "text.jsonl").write_text('{"question": "the capital of France is", "answer": " Paris"}\n')
    (tmp_path / "tasks" / "capitals.yaml").write_text(TASK.format(file=tmp_path / "text.jsonl"))
    words = ["--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--tasks", "capitals"]
    words += ["--include_path", tmp_path / "tasks", "--device", "cpu", "--batch_size", "1"]
    done = run("--backend", "cpu", "--", "lm_eval", *words, "--output_path", tmp_path / "results.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|capitals|" in done.stdout
