"""The size of a model in three formats as a picture, for the README and the landing page.

    python scripts/docs/sizes.py      writes docs/sizes.svg

The model has the shape of Llama 2 7B. Its linear layers are in 4 bits, with double quantisation; embedding, output head
and norms stay in bf16. ``scripts/bench/seven_billion.py`` writes such files, and the last figure is theirs.
"""

from __future__ import annotations

import drawing
import places

WIDTH, VOCABULARY, INNER, LAYERS = 4096, 32000, 11008, 32
LINEAR = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
OTHERS = 2 * VOCABULARY * WIDTH + (2 * LAYERS + 1) * WIDTH
BITS = 4 + 8 / 64 + 32 / (64 * 256)  # of a weight, with its share of the scales


def sizes() -> dict[str, float]:
    """Gigabytes by format."""
    return {
        "fp32": 4e-9 * (LINEAR + OTHERS),
        "bf16": 2e-9 * (LINEAR + OTHERS),
        "4 bits": 1e-9 * (LINEAR * BITS / 8 + 2 * OTHERS),
    }


def picture() -> str:
    """Three bars, 480 by 132."""
    style = drawing.STYLE + "text.name,text.size{text-anchor:start}.bar{fill:#2f6690}.bar.small{fill:#b3651b}"
    style += "\n@media (prefers-color-scheme:dark){.bar{fill:#6aa5d8}.bar.small{fill:#d79a55}}"
    words = "Bars of the size of a model of 7 billion parameters: " + ", ".join(
        f"{name} {size:.3g} GB" for name, size in sizes().items()
    )
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 480 132" width="480" role="img" '
        f'aria-label="{words}" font-family="{drawing.FONT}" font-size="15">',
        f'<style>{style}</style><rect class="paper" width="480" height="132" rx="10"/>',
    ]
    for row, (name, size) in enumerate(sizes().items()):
        y, length = 14 + 38 * row, 300 * size / sizes()["fp32"]
        kind = "bar small" if name == "4 bits" else "bar"
        parts.append(f'<text class="name" x="16" y="{y + 19}">{name}</text>')
        parts.append(f'<rect class="{kind}" x="80" y="{y}" width="{length:.0f}" height="28" rx="3"/>')
        parts.append(f'<text class="size" x="{88 + length:.0f}" y="{y + 19}">{size:.3g} GB</text>')
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    (places.ROOT / "docs" / "sizes.svg").write_text(picture())
