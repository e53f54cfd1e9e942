"""What each setting costs a real model: the tour's sentence encoder, with other formats than the tour's.

python scripts/models/settings.py        the table of docs/how-to/measure-the-cost.md
"""

from __future__ import annotations

from typing import Any

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


def main() -> None:
    tour.FORMATS.clear()
    tour.FORMATS.update(FORMATS)
    print("| setting | bits per weight | mean error of a layer | mean cosine | worst |")
    print("| --- | --- | --- | --- | --- |")
    for row in tour.tour().formats:
        error = sum(layer.error for layer in row.layers) / len(row.layers)
        print(f"| {row.name} | {row.bits:.3f} | {error:.4f} | {row.mean_cosine:.4f} | {row.worst_cosine:.4f} |")


if __name__ == "__main__":
    main()
