"""What the model of ``roofline.py`` knows of the kernels: counts.json, and how it is made.

    loops       instructions, integer ones and L1 wavefronts per weight of the loop along K, by architecture and tokens,
                counted in the machine code (``sass.py``); of the rungs before it for one token on sm_90
    outside     instructions a thread issues outside that loop, counted in the emulator by running the kernel: by tokens
                and warps side by side, in a CTA that has all of K (alone), in each that shares it (each), and in
                the last of these, which adds up the others' sums (last)

The emulator counts PTX, of which ptxas makes fewer instructions. What it makes of the loop is known on both sides, so
``outside`` is in machine instructions at the loop's rate of exchange, that of sm_90.

    python -m refq4_cuda.counts              compare counts.json with the kernels as they are
    python -m refq4_cuda.counts --write      count again: two minutes
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from refq4.backend import PackedWeight
from refq4.codebooks import get_codebook

from .geometry import (
    Shape,
    Variant,
    naive_variant,
    published,
    ring_plan,
    ring_variant,
    tensor_core_variant,
    vectorised_variant,
)
from .launch import filled, planned_product
from .nvrtc import compile_variant
from .sass import count

__all__ = ["FILE", "counted", "known", "loop_counts", "outside_counts"]

FILE = Path(__file__).with_name("counts.json")
MODELLED = (80, 86, 89, 90, 100, 120)
TOKENS = {8: (1, 2, 4), 16: (1, 2, 4), 32: (1, 2, 4), 64: (1, 2, 4)}
EARLIER = {
    "naive 1": naive_variant("BF16"),
    "vectorised 1": vectorised_variant("BF16", 1),
    "tensor_core 8": tensor_core_variant("BF16", 8),
}
_ROW_TILES = {8: 2, 16: 2, 32: 4, 64: 2}


@cache
def known() -> dict[str, Any]:
    """What is in counts.json."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def counted() -> dict[str, Any]:
    """The same, counted now."""
    loops = {str(arch): {str(tokens): loop_counts(arch, tokens) for tokens in TOKENS} for arch in MODELLED}
    loops["90"] |= {name: _loop(variant, 90) for name, variant in EARLIER.items()}
    outside = {f"{t}x{warps}": outside_counts(t, warps) for t, several in TOKENS.items() for warps in several}
    return {"loops": loops, "outside": outside}


def loop_counts(arch: int, tokens: int) -> list[float]:
    """[instructions, ALU operations, L1 wavefronts for 32 weights] per weight."""
    return _loop(ring_variant(arch, "BF16", tokens), arch)


def _loop(variant: Variant, arch: int) -> list[float]:
    found = count(variant, arch)
    return [round(figure, 2) for figure in (found.instructions, found.alu, found.l1) if figure is not None]


def outside_counts(tokens: int, row_warps: int) -> dict[str, int]:
    """Instructions of a thread, from runs of one tile with K in one, two and four parts."""
    whole = {splits: _run(tokens, row_warps, splits) for splits in (1, 2, 4)}
    per_weight = whole[1][1]
    rate = loop_counts(90, tokens)[0] / per_weight
    alone, two, four = (rate * whole[splits][0] for splits in (1, 2, 4))
    each = (four - two) / 2
    return {"alone": round(alone), "each": round(each), "last": round(two - 2 * each)}


def _run(tokens: int, row_warps: int, splits: int) -> tuple[float, float]:
    """Instructions of a thread that do not grow with K, over all CTAs of a tile; those of the loop per weight."""
    n, step = row_warps * 16 * _ROW_TILES[tokens], 8 // row_warps * 64 * (4 // _ROW_TILES[tokens])
    once, twice = (_instructions(tokens, row_warps, splits, n, k) for k in (8 * step, 16 * step))
    loop = twice - once
    return (once - loop) / 256, loop / (n * 8 * step)


def _instructions(tokens: int, row_warps: int, splits: int, n: int, k: int) -> int:
    from . import emulator  # here, since it is large and reading counts.json does not need it

    shape = Shape("BF16", tokens, n, k, 64, 0, True)
    chosen = ring_plan(shape, published(90), tokens, row_warps, splits)
    packed, absmax = torch.zeros(n * k // 2, dtype=torch.uint8), torch.ones(n * k // 64)
    weight = PackedWeight(packed, absmax, get_codebook("nf4").on("cpu").values, 64, (n, k), "nf4")
    x, y = torch.ones(tokens, k, dtype=torch.bfloat16), torch.empty(tokens, n, dtype=torch.bfloat16)
    launch = filled(planned_product(weight, x.dtype, tokens, chosen), x, x.data_ptr(), None, y)
    ptx = compile_variant(launch.variant, 90, "ptx").data.decode()
    return emulator.run(ptx, launch, checks=False).instructions


def main(arguments: list[str] | None = None) -> int:
    """The command at the top of the file; 1 if counts.json is not what the kernels are."""
    parser = argparse.ArgumentParser(prog="python -m refq4_cuda.counts", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write counts.json anew")
    chosen, found = parser.parse_args(arguments), counted()
    if chosen.write:
        rows = ",\n".join(
            f' "{part}": {{\n' + ",\n".join(f'  "{k}": {json.dumps(v)}' for k, v in kept.items()) + "\n }"
            for part, kept in found.items()
        )
        FILE.write_text("{\n" + rows + "\n}\n")
        return 0
    print("counts.json is as the kernels are" if found == known() else "counts.json is not as the kernels are: --write")
    return int(found != known())


if __name__ == "__main__":
    sys.exit(main())
