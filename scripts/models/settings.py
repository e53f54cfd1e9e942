"""What each setting costs a real model: the tour's sentence encoder, or a language model.

python scripts/models/settings.py                  the first table of docs/how-to/measure-the-cost.md
python scripts/models/settings.py DIR TEXT         the second: DIR is a model in full precision, with a tokenizer
                                  --sequences N    of the text's first N pieces of 256 tokens (8)
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import refq4
from refq4.models.report import QuantizationReport
from refq4.tools import tour

PLAIN: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}
NESTED = PLAIN | {"compress_statistics": True}
FORMATS: dict[str, dict[str, Any]] = {
    "NF4, blocks of 32": PLAIN | {"blocksize": 32},
    "NF4, blocks of 64": PLAIN,
    "NF4, blocks of 128": PLAIN | {"blocksize": 128},
    "NF4, blocks of 256": PLAIN | {"blocksize": 256},
    "NF4, blocks of 64, double quantisation": NESTED,
    'the same, `scales="search"`': NESTED | {"scales": "search"},
    "FP4, blocks of 64": PLAIN | {"quant_type": "fp4"},
    "int4, blocks of 64": PLAIN | {"quant_type": "int4"},
    "E2M1 (the values of MXFP4), blocks of 32": PLAIN | {"quant_type": "e2m1", "blocksize": 32},
}
CONTEXT = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="a language model in full precision")
    parser.add_argument("text", type=Path, nargs="?")
    parser.add_argument("--sequences", type=int, default=8)
    options = parser.parse_args()
    if options.model is None:
        encoder()
    else:
        language_model(options.model, options.text, options.sequences)


def encoder() -> None:
    tour.FORMATS.clear()
    tour.FORMATS.update(FORMATS)
    print("| setting | bits per weight | mean error of a layer | mean cosine | worst |")
    print("| --- | --- | --- | --- | --- |")
    for row in tour.tour().formats:
        print(f"| {row.name} | {row.bits:.3f} | {row.error:.4f} | {row.mean_cosine:.4f} | {row.worst_cosine:.4f} |")


def language_model(directory: Path, text: Path, count: int) -> None:
    full, sequences, _ = sequences_of(directory, text, count)
    print(in_full(full, sequences))
    print("| setting | bits per weight | mean error of a layer | KL | same first choice | perplexity |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, settings in FORMATS.items():
        report = QuantizationReport()
        small = refq4.quantize_model(copy.deepcopy(full), report=report, progress=False, **settings)
        row = f"| {name} | {report.bits:.3f} | {report.error:.4f} | {figures(small, full, sequences)} |"
        print(row, flush=True)


def sequences_of(directory: Path, text: Path, count: int) -> tuple[Any, list[Tensor], list[Tensor]]:
    """The model, the first pieces of the text as ids [CONTEXT], and four times as many of the last ones."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    full = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(directory)(text.read_text(), return_tensors="pt").input_ids[0]
    size = count * CONTEXT
    return full, list(ids[:size].view(-1, CONTEXT)), list(ids[-4 * size :].view(-1, CONTEXT))


def in_full(full: nn.Module, sequences: list[Tensor]) -> str:
    """What both tables are measured on, and the perplexity that they compare with."""
    found = refq4.evaluate(full, sequences, progress=False)
    return f"{found.tokens} predicted tokens; perplexity in full precision: {found.perplexity:.3f}"


def figures(small: nn.Module, full: nn.Module, sequences: list[Tensor]) -> str:
    """Divergence, agreement and perplexity, as cells of a table."""
    found = refq4.evaluate(small, sequences, against=full, draws=0, progress=False)
    return f"{found.kl:.4f} | {found.top1:.1%} | {found.perplexity:.2f}"


if __name__ == "__main__":
    main()
