"""What each setting costs a real model: the tour's sentence encoder, or a language model.

python scripts/models/settings.py                  the first table of docs/how-to/measure-the-cost.md
python scripts/models/settings.py DIR TEXT         the second: DIR is a model in full precision, with a tokenizer
                                  --sequences N    of the text's first N pieces of 256 tokens (8)
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
# What a table has a row of: its name, bits a weight, mean error of a layer, and the model that is so.
Rows = Callable[[Any, list[Tensor]], Iterator[tuple[str, str, float, Any]]]


def main() -> None:
    options = parser(__doc__, "?").parse_args()
    if options.model is None:
        encoder()
    else:
        language_model(options.model, options.text, options.sequences, in_settings)


def parser(doc: str | None, nargs: str | None = None) -> argparse.ArgumentParser:
    """What both scripts are given: a model and a text."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("model", type=Path, nargs=nargs, help="a language model in full precision")
    made.add_argument("text", type=Path, nargs=nargs)
    made.add_argument("--sequences", type=int, default=8)
    return made


def encoder() -> None:
    tour.FORMATS.clear()
    tour.FORMATS.update(FORMATS)
    print("| setting | bits per weight | mean error of a layer | mean cosine | worst |")
    print("| --- | --- | --- | --- | --- |")
    for row in tour.tour().formats:
        print(f"| {row.name} | {row.bits:.3f} | {row.error:.4f} | {row.mean_cosine:.4f} | {row.worst_cosine:.4f} |")


def language_model(directory: Path, text: Path, count: int, rows: Rows) -> None:
    """A table, measured on the text's first pieces; ``rows`` gets the model, and four times as many last pieces."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    full = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(directory)(text.read_text(), return_tensors="pt").input_ids[0]
    size = count * CONTEXT
    sequences = list(ids[:size].view(-1, CONTEXT))
    exact = refq4.evaluate(full, sequences, progress=False)
    print(f"{exact.tokens} predicted tokens; perplexity in full precision: {exact.perplexity:.3f}")
    print("| format | bits per weight | mean error of a layer | KL | same first choice | perplexity |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, bits, error, small in rows(full, list(ids[-4 * size :].view(-1, CONTEXT))):
        found = refq4.evaluate(small, sequences, against=full, draws=0, progress=False)
        figures = f"{bits} | {error:.4f} | {found.kl:.4f} | {found.top1:.1%} | {found.perplexity:.2f}"
        print(f"| {name} | {figures} |", flush=True)


def in_settings(full: Any, seen: list[Tensor]) -> Iterator[tuple[str, str, float, Any]]:
    for name, settings in FORMATS.items():
        report = QuantizationReport()
        small = refq4.quantize_model(copy.deepcopy(full), report=report, progress=False, **settings)
        yield name, f"{report.bits:.3f}", report.error, small


if __name__ == "__main__":
    main()
