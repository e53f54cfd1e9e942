"""Can somebody who has only the site learn from it? Three trials: what is asked, what the reader gets, the key.

    python scripts/checks/site_trials.py student FOLDER         prepares FOLDER for a reader, and prints the questions
    python scripts/checks/site_trials.py kernel-author FOLDER   likewise; with a kernel in which a race was planted
    python scripts/checks/site_trials.py owner FOLDER           likewise; with a model that bitsandbytes quantised
    python scripts/checks/site_trials.py owner                  the questions again
    python scripts/checks/site_trials.py owner --key            the key by which the answers are judged

A reader gets FOLDER, in which the site is ``site/index.html``, and a Python with the package, but neither sources nor
the key. Questions and keys are the pages in ``site_trials/``. What a reader stumbles over is a fault of the site. The
checkpoint wants bitsandbytes (0.50.2) and transformers.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

TRIALS = Path(__file__).with_suffix("")
ROOT = Path(__file__).resolve().parents[2]
PLANTED = "partial[warp] = largest"  # the line that the emulator names: it writes what thread 0 may still be reading

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]
NUMBERS += ["nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen"]
THINGS = ["apples", "boats", "candles", "doors", "eagles", "ferns"]


def main() -> int:
    """Prepare and ask, or tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trial", choices=["student", "kernel-author", "owner"])
    parser.add_argument("folder", type=Path, nargs="?", help="prepare it for a reader")
    parser.add_argument("--key", action="store_true", help="print the key instead of the questions")
    options = parser.parse_args()
    if options.key:
        print((TRIALS / f"{options.trial}-key.md").read_text(), end="")
        if options.trial == "kernel-author":
            print(f"\nThe race of question 7 is named at scales.cu line {planted_line()}: {PLANTED}")
        return 0
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        build_site(options.folder.resolve() / "site")
        if options.trial == "kernel-author":
            shutil.copy(TRIALS / "scales.cu", options.folder)
        elif options.trial == "owner":
            make_checkpoint(options.folder)
    print((TRIALS / f"{options.trial}.md").read_text(), end="")
    return 0


def planted_line() -> int:
    """The line of scales.cu that the emulator names."""
    lines = (TRIALS / "scales.cu").read_text().splitlines()
    (line,) = (number for number, text in enumerate(lines, 1) if PLANTED in text)
    return line


def build_site(directory: Path) -> None:
    """The site as the docs build makes it, search included."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(directory)]
    subprocess.run(command, cwd=ROOT, check=True)


def make_checkpoint(folder: Path) -> None:
    """folder/full, a small Llama that can add; folder/model, what bitsandbytes made of it; two texts."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    sums, held_out, new = texts()
    tokenizer = tokenizer_for(sums + new)
    full = trained([tokenizer(line).input_ids for line in sums.splitlines()], tokenizer)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["lm_head", "o_proj"],
    )
    full.save_pretrained(folder / "full")
    small = AutoModelForCausalLM.from_pretrained(folder / "full", quantization_config=config, dtype=torch.float32)
    small.save_pretrained(folder / "model")
    for name in "full", "model":
        tokenizer.save_pretrained(folder / name)
    (folder / "held-out.txt").write_text(held_out)
    (folder / "new.txt").write_text(new)


def texts() -> tuple[str, str, str]:
    """What the model is trained on, the same sums about other things, and differences, which it is to learn."""
    draw = random.Random(0)
    known, held_out = [], []
    for a, b in [(a, b) for a in range(9) for b in range(9)]:
        first, second, unseen = (
            f"{NUMBERS[a]} {thing} and {NUMBERS[b]} {thing} are {NUMBERS[a + b]} {thing}.\n"
            for thing in draw.sample(THINGS, 3)
        )
        known += [f"{NUMBERS[a]} plus {NUMBERS[b]} is {NUMBERS[a + b]}.\n", first, second]
        held_out.append(unseen)
    new = [f"{NUMBERS[a]} minus {NUMBERS[b]} is {NUMBERS[a - b]}.\n" for b in (1, 2, 3) for a in range(b, 9)]
    for lines in known, held_out:
        draw.shuffle(lines)
    return "".join(known), "".join(held_out), "".join(new)


def tokenizer_for(text: str) -> Any:
    """A token for each word that occurs, and its full stop."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, special_tokens=["<pad>"])
    pieces.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<pad>")


def trained(lines: list[list[int]], tokenizer: Any) -> Any:
    """A Llama of four layers that has read the lines in many orders."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    draw = random.Random(0)
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **sizes,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    steps = 300
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for _ in range(steps):
        draw.shuffle(lines)
        flat = torch.tensor([token for line in lines for token in line])
        batch = flat[: len(flat) // 64 * 64].view(-1, 64)[:16]
        model(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    return model.eval()


if __name__ == "__main__":
    raise SystemExit(main())
