"""A small language model that knows the Zen of Python by heart, as a 4-bit checkpoint of bitsandbytes.

    python scripts/models/zen.py DIR      DIR/full: as trained; DIR/nf4: what bitsandbytes makes of it; DIR/text.txt

It stands in for a reader's own checkpoint: a Llama of two layers with a tokenizer, trained in seconds. bitsandbytes
and transformers quantise and save it; refq4 takes no part in that.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

STEPS, TOKENS = 80, 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a tiny language model, and save it in 4 bits with bitsandbytes."
    )
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    text = zen_of_python()
    tokenizer = tokenizer_for(text)
    make(directory / "full", trained(tokenizer(text, return_tensors="pt").input_ids[0], len(tokenizer)), tokenizer)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    small = AutoModelForCausalLM.from_pretrained(directory / "full", quantization_config=config)
    make(directory / "nf4", small, tokenizer)
    (directory / "text.txt").write_text(text)


def make(directory: Path, model: torch.nn.Module, tokenizer: FastTokenizer) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def zen_of_python() -> str:
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return codecs.decode(this.s, "rot13")


def tokenizer_for(text: str) -> FastTokenizer:
    """Pieces of words that occur in the text."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    pieces.train_from_iterator([text], trainers.BpeTrainer(vocab_size=400, show_progress=False))
    return FastTokenizer(tokenizer_object=pieces)


def trained(ids: torch.Tensor, vocabulary: int) -> LlamaForCausalLM:
    """The model, after it has read parts of the text some hundred times."""
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, bos_token_id=None, eos_token_id=None))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - TOKENS + 1, (8,))
        batch = torch.stack([ids[start : start + TOKENS] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


if __name__ == "__main__":
    main()
