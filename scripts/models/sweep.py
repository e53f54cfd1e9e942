"""Take every model type of the installed transformers through all doors of refq4 and write docs/architectures.md.

python scripts/models/sweep.py                      all, in half an hour on two cores; exits with 1 if a cell fails
python scripts/models/sweep.py llama vit            these alone, printed and not written

A type takes part if a model of it with a shrunk config builds below 5 M parameters and runs (scripts/models/tiny.py).
The model is saved in full precision, and then
    from_pretrained   quantised while it loads; its output beside that of the full-precision model
    quantize_model    quantised in memory: the same bytes in the same layers?
    command           quantised on disk by what `refq4 quantize` calls: the same file as the loaded model saves?
    save, reload      the saved directory loaded again: the same output?
    generate          four tokens: the same after reloading?
Where a door refuses, bitsandbytes is asked the same: a cell says "refused" only if it fails, too.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import refq4
from refq4.checkpoint import quantize_checkpoint
from refq4.checkpoint.architecture import ask_transformers
from refq4.checkpoint.tensors import SafetensorsReader
from refq4.integrations import fates
from refq4.integrations.transformers import Refq4Config
from refq4.models.experts import expert_weights

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
DOORS = ("from_pretrained", "quantize_model", "command", "reload", "generate")
SETTINGS = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
_STATE_SPACE = ("mamba", "rwkv", "ssm", "deltanet", "recurrent", "linearattention", "mixer")


@dataclass
class Row:
    """One model type: why it takes no part, or what came out at each door.

    Attributes:
        excluded: the reason; empty for one that takes part.
        share: of the weights of linear layers and experts in the file, output layers apart, in 4 bits.
        cosine: of the outputs before and after quantising while loading.
        cells: door -> what came out. One that begins with "fails" is an error.
    """

    type: str
    excluded: str = ""
    model: str = ""
    kind: str = ""
    parameters: int = 0
    share: float = 0.0
    cosine: float = 0.0
    cells: dict[str, str] = field(default_factory=dict)

    @property
    def fails(self) -> list[str]:
        """The doors at which it failed."""
        return [f"{door}: {said}" for door, said in self.cells.items() if said.startswith("fails")]


def sweep(model_type: str) -> Row:
    """Take one model type through all doors."""
    row = Row(model_type)
    try:
        kind, row.kind = tiny.model_class(model_type)
        model = tiny.tiny_model(model_type)
        before = tiny.output(model)
        if not bool(before.isfinite().all()):
            raise ValueError("its output with random weights is not finite")
        if not all(torch.equal(before, tiny.output(model)) for _ in range(3)):
            raise ValueError("its output differs from call to call")
    except Exception as error:
        row.excluded = _said(error)
        return row
    row.model, row.parameters = kind.__name__, sum(parameter.numel() for parameter in model.parameters())
    if any(part in type(module).__name__.lower() for module in model.modules() for part in _STATE_SPACE):
        row.kind += ", state space"
    if fates.EXPERTS in fates.candidates(model).values() or list(expert_weights(model)):
        row.kind += ", experts"
    with tempfile.TemporaryDirectory() as directory:
        _through_the_doors(row, model, before, Path(directory))
        if row.fails and (why := _not_by_itself(kind, Path(directory))):
            row.excluded = why
    return row


def _through_the_doors(row: Row, model: Any, before: Tensor, root: Path) -> None:
    kind = type(model)
    model.save_pretrained(root / "full")

    def at(door: str, action: Callable[[], str]) -> None:
        try:
            row.cells[door] = action()
        except Exception as error:
            theirs = _bitsandbytes(kind, root)
            row.cells[door] = f"refused: {_said(error)}" if theirs else f"fails: {_said(error)}"

    held: dict[str, Any] = {}

    def from_pretrained() -> str:
        loaded = held["loaded"] = kind.from_pretrained(root / "full", quantization_config=Refq4Config(**SETTINGS))
        share, row.cosine = _share(loaded, root), _cosine(before, tiny.output(loaded))
        if share is None:
            row.excluded = "it has no linear layers or experts but for its output layer"
        row.share = share or 0.0
        loaded.save_pretrained(root / "saved")
        return "yes"

    def reload() -> str:
        again = held["again"] = kind.from_pretrained(root / "saved", quantization_config=Refq4Config())
        return _same_model(held["loaded"], again)

    def command() -> str:
        quantize_checkpoint(root / "full", root / "out", progress=False)
        return _same_files(root / "saved", root / "out")

    def quantize_model() -> str:
        skip = [rf"{name}" for name in _plain_layers(held["loaded"])]
        made = refq4.quantize_model(model, skip=skip, compress_statistics=True, progress=False)
        return _same_weights(held["loaded"], made)

    def generate() -> str:
        if not kind.can_generate() or "input_ids" not in tiny.inputs(held["loaded"]):
            return "–"
        try:
            _four_tokens(model)
        except Exception:  # what it generates from is not tokens alone
            return "–"
        said = [_four_tokens(each) for each in (held["loaded"], held["again"])]
        return "same" if torch.equal(*said) else "fails: other tokens"

    at("from_pretrained", from_pretrained)
    if row.cells["from_pretrained"] != "yes" or row.excluded:
        return
    at("command", command)
    at("reload", reload)
    if "again" in held:
        at("generate", generate)
    at("quantize_model", quantize_model)


def _not_by_itself(kind: Any, root: Path) -> str:
    """Why transformers alone, without refq4, loses something on the way through files; empty if it does not."""
    for source, target in (("full", "plain"), ("plain", "")):
        loaded, report = kind.from_pretrained(root / source, output_loading_info=True)
        if report["missing_keys"]:
            return f"transformers does not load what it saved: {min(report['missing_keys'])} is missing"
        if target:
            loaded.save_pretrained(root / target)
    return ""


def _share(loaded: Any, root: Path) -> float | None:
    """Of the weights that could be in 4 bits, those that are; None where there are none."""
    with SafetensorsReader(root / "full" / "model.safetensors") as reader:
        architecture = ask_transformers(root / "full", reader.entries)
    if architecture is None:
        raise ValueError("its config.json does not lead to its class")
    could = {name for name, why in architecture.choice.items() if why not in (fates.HEAD, fates.NEW)}
    total = sum(architecture.model.get_parameter(name).numel() for name in could)
    states = (getattr(parameter, "quant_state", None) for parameter in loaded.parameters())
    return sum(state.shape.numel() for state in states if state is not None) / total if total else None


def _plain_layers(loaded: Any) -> list[str]:
    return [name for name, module in loaded.named_modules() if type(module) is torch.nn.Linear]


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), 0))


def _four_tokens(model: Any) -> Tensor:
    given = {name: value for name, value in tiny.inputs(model).items() if name != "decoder_input_ids"}
    made: Tensor = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return made


def _files(directory: Path) -> dict[str, Tensor]:
    return {key: value for path in sorted(directory.glob("*.safetensors")) for key, value in load_file(path).items()}


def _same_model(wanted: Any, got: Any) -> str:
    """Bit for bit in all that it holds; its output may round otherwise where memory is aligned otherwise."""
    states = [model.state_dict() for model in (wanted, got)]
    differ = [key for key in states[0].keys() | states[1].keys() if not all(key in state for state in states)]
    differ += [key for key in states[0] if key in states[1] and not _same(states[0][key], states[1][key])]
    if differ:
        return f"fails: other bytes: {sorted(differ)[:3]}"
    close = torch.allclose(tiny.output(got), tiny.output(wanted), rtol=1e-4, atol=1e-5)
    return "same" if close else "fails: another output"


def _same_files(saved: Path, written: Path) -> str:
    wanted, got = _files(saved), _files(written)
    if wanted.keys() != got.keys():
        return f"fails: other keys: {sorted(wanted.keys() ^ got.keys())[:3]}"
    differ = [key for key, value in wanted.items() if not _same(value, got[key].to(value.dtype))]
    return f"fails: other bytes: {differ[:3]}" if differ else "same"


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _same_weights(loaded: Any, made: Any) -> str:
    """Linear layers and experts in 4 bits, by name."""
    ours, theirs = (
        {name: weight for name, weight in model.named_parameters() if getattr(weight, "quant_state", None) is not None}
        for model in (loaded, made)
    )
    common = ours.keys() & theirs.keys()
    differ = [name for name in common if not _same_weight(ours[name], theirs[name])]
    if differ:
        return f"fails: other bytes: {sorted(differ)[:3]}"
    lacking = len(ours.keys() - theirs.keys())
    return "same" if not lacking else f"same, {lacking} of {len(ours)} weights left in full precision"


def _same_weight(a: Any, b: Any) -> bool:
    states = [weight.quant_state.as_dict(packed=True) for weight in (a, b)]
    same_states = states[0].keys() == states[1].keys() and all(
        _same(states[0][key], states[1][key]) for key in states[0]
    )
    return _same(a.stored(), b.stored()) and same_states


def _bitsandbytes(kind: Any, root: Path) -> str:
    """What it says where it fails as well: quantising the model while it loads, running, saving and reloading it."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **SETTINGS)
    try:
        loaded = kind.from_pretrained(root / "full", quantization_config=config)
        tiny.output(loaded)
        loaded.save_pretrained(root / "theirs")
        tiny.output(kind.from_pretrained(root / "theirs"))
    except Exception as error:
        return _said(error)
    return ""


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return _shown(text)


def _shown(text: str) -> str:
    """For a cell of the table: without the names of temporary directories."""
    return re.sub(r"\S*/(full|saved|out)\b'?", "the model", text).replace("|", "/").replace("`", "'")[:160]


# --- the page ---------------------------------------------------------------------------------------------------------


def page(rows: list[Row]) -> str:
    """The table, and what takes no part in it with the reasons."""
    taken, excluded = [row for row in rows if not row.excluded], [row for row in rows if row.excluded]
    kinds = Counter(part for row in taken for part in row.kind.split(", "))
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    lines = [
        "# Architectures",
        "",
        f"Written by `scripts/models/sweep.py`: transformers {version('transformers')}, torch {version('torch')}.",
        f"Of {len(rows)} model types in transformers, {len(taken)} build below 5 M parameters with a shrunk config and",
        f"random weights, and run on inputs that the script makes: {counts}.",
        "Each model is quantised and loaded in every way. The columns are:",
        "",
        "- *Share*: the part of the file's weights in linear layers and experts (without heads) that is in 4 bits.",
        "- *Cosine*: between the outputs in full precision and in NF4. Random weights lose more than trained ones.",
        "- *Command*: `refq4 quantize` writes the tensors that the model of `from_pretrained` saves, bit for bit.",
        "- *quantize_model*: it gives the same bytes in the same layers.",
        "- *Reload*: a model saved with `save_pretrained` has the same bytes and output when it is loaded again.",
        "- *Generate*: the model generates the same four tokens after reloading; – if it can't generate from tokens.",
        "",
        "| type | model | kind | share | cosine | command | quantize_model | reload | generate |",
        "| --- | --- | --- | ---: | ---: | --- | --- | --- | --- |",
    ]
    for row in taken:
        cells = [row.cells.get(door, row.cells["from_pretrained"]) for door in ("command", "quantize_model", "reload")]
        figures = [f"{row.share:.0%}", f"{row.cosine:.3f}"]
        cells = [_shown(cell) for cell in (*cells, row.cells.get("generate", "–"))]
        lines.append(f"| {' | '.join([f'`{row.type}`', f'`{row.model}`', row.kind, *figures, *cells])} |")
    lines += ["", "## Model types that were not run", "", "| type | reason |", "| --- | --- |"]
    lines += [f"| `{row.type}` | {row.excluded} |" for row in excluded]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types (all)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = []
    for model_type in arguments.types or tiny.model_types():
        rows.append(row := sweep(model_type))
        print(row.type, row.excluded or f"{row.share:.0%} {row.cosine:.3f} {row.cells}", flush=True)
        gc.collect()
    if not arguments.types:
        PAGE.write_text(page(rows), encoding="utf-8")
    failed = [f"{row.type}, {said}" for row in rows if not row.excluded for said in row.fails]
    print(*failed, f"{sum(not row.excluded for row in rows)} types, {len(failed)} cells fail", sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
