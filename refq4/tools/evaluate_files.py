"""``refq4 eval``: models in directories, and tokens in a file, for ``refq4/tools/evaluate.py``.

DIR          4-bit or not; loaded by transformers, a 4-bit one onto refq4's layers
--against    the full-precision one, loaded first and gone before the other comes; meanwhile the 4-bit weights are
             read from DIR one at a time, when their layer is reached
--tokens     token ids as text, a sequence a line
--text       text, cut into sequences by the tokenizer in DIR; with --lines each line is cut separately
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import places
from ..checkpoint.architecture import no_progress_bar
from ..checkpoint.inspection import groups
from ..checkpoint.sources import FromSafetensors
from ..checkpoint.tensors import SafetensorsReader
from ..internals import remedies
from ..models.report import in_fp32
from ..state import QuantState
from .damage import Decoded
from .evaluate import DRAWS, Evaluation, evaluate_one_after_the_other

__all__ = ["evaluate_directories", "read_text", "read_tokens"]

CONTEXT = 512  # tokens in a sequence of a text, where the model takes so many


def evaluate_directories(
    model: Path,
    sequences: list[Tensor],
    against: Path | None = None,
    draws: int = DRAWS,
    progress: bool = True,
) -> Evaluation:
    """:func:`refq4.evaluate` for models on disk, of which one is in memory at a time.

    Raises:
        FileNotFoundError, ValueError: as ``refq4.evaluate``; no such directory; ``against`` is in 4 bits itself; a
            sequence is longer than ``max_position_embeddings`` in the model's config.
    """
    for directory in (model, against):
        if directory is not None:
            _check_is_a_model(directory)
    longest, limit = max(map(len, sequences), default=0), _most_tokens(model)
    if longest > limit:
        raise ValueError(
            f"a sequence of {longest} tokens, but max_position_embeddings in the config of {model} is {limit}, and a "
            f"model predicts poorly beyond it: give --context {limit} or less, or shorter lines in the file of --tokens"
        )
    if against is not None and _is_quantised(against):
        raise ValueError(f"--against {against}: this one is quantised, too; expected the model in full precision")
    with ExitStack() as stack:
        decoded: Decoded = {}
        if against is not None:
            readers = [stack.enter_context(SafetensorsReader(path)) for path in places.weight_files(model)]
            decoded = _weights(FromSafetensors(readers), _module_names(against))
        load_against = None if against is None else partial(_load, against)
        return evaluate_one_after_the_other(partial(_load, model), sequences, load_against, decoded, draws, progress)


def read_tokens(path: Path) -> list[Tensor]:
    """Token ids from a file: a sequence a line, ids separated by spaces or commas; empty lines count for nothing."""
    sequences = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            ids = [int(word) for word in line.replace(",", " ").split()]
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: expected token ids, {error}") from None
        if len(ids) == 1:
            raise ValueError(f"{path}, line {number}: one token alone predicts none; expected two or more")
        if ids:
            sequences.append(torch.tensor(ids))
    if not sequences:
        raise ValueError(f"{path} holds no token ids")
    return sequences


def read_text(path: Path, model: Path, context: int | None = None, lines: bool = False) -> list[Tensor]:
    """A text as sequences of ``context`` tokens, by the model's own tokenizer; each begins as it begins a text.

    Without ``context``: 512 tokens, or as many as the model takes if these are fewer. With ``lines`` each line is a
    text of its own; otherwise a sequence goes on from one line to the next.
    """
    _check_is_a_model(model)
    context = int(min(CONTEXT, _most_tokens(model))) if context is None else context
    if context < 2:
        raise ValueError(f"--context {context}: a sequence has two tokens or more")
    transformers = _transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(f"no tokenizer could be loaded from {model}: give --tokens instead ({error})") from None
    text = path.read_text(encoding="utf-8")
    texts = text.splitlines() if lines else [text]
    all_ids = [tokenizer(one, add_special_tokens=False, verbose=False)["input_ids"] for one in texts]
    start = tokenizer("", add_special_tokens=True)["input_ids"][:1]  # <s>, where there is one
    start = start if start and start[0] == tokenizer.bos_token_id else []
    step = context - len(start)
    pieces = [start + ids[at : at + step] for ids in all_ids for at in range(0, len(ids), step)]
    return [torch.tensor(piece) for piece in pieces if len(piece) > 1]


# --- models -----------------------------------------------------------------------------------------------------------


def _check_is_a_model(directory: Path) -> None:
    if (directory / "config.json").is_file():
        return
    if (directory / "adapter_config.json").is_file():
        raise ValueError(
            f"{directory} is a peft adapter, not a model: merge it into its base model with merge_and_unload(), save "
            f"the result with save_pretrained(), and give that directory"
        )
    raise FileNotFoundError(f"no config.json in {directory}: expected a model directory of transformers")


def _most_tokens(directory: Path) -> float:
    """The longest sequence that the model was made for; infinite if its config names none."""
    config = _transformers().AutoConfig.from_pretrained(directory, local_files_only=True)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else math.inf


def _load(directory: Path) -> nn.Module:
    transformers = _transformers()
    settings: dict[str, Any] = {"dtype": "auto", "local_files_only": True}
    if _is_quantised(directory):
        from ..integrations.transformers import Refq4Config

        settings["quantization_config"] = Refq4Config()
    with no_progress_bar():
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(directory, **settings)
    return model.to("cuda") if torch.cuda.is_available() else model


def _is_quantised(directory: Path) -> bool:
    return bool(places.read_json(directory / "config.json").get("quantization_config"))


def _transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in the directory: nothing to ask a hub for
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import transformers
    except ImportError as error:
        raise ModuleNotFoundError(
            f"models on disk are loaded by transformers, which is not installed: {remedies.install('transformers')}"
        ) from error
    return transformers


def _module_names(directory: Path) -> set[str]:
    """The names of a model's modules, built without memory."""
    transformers = _transformers()
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return {name for name, _ in model.named_modules()} | {f"{model.base_model_prefix}."}


def _weights(source: FromSafetensors, modules: set[str]) -> Decoded:
    """Of each packed weight that a module of the full-precision model has, how to read and decode it."""
    found: dict[str, Callable[[], Tensor]] = {}
    prefix = next(name for name in modules if name.endswith("."))
    for key, beside in groups(source.keys()).items():
        name = key.removesuffix(".weight")
        module = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in modules), None)
        if beside and module is not None:
            found[module] = partial(_read, source, key, beside)
    return found


def _read(source: FromSafetensors, key: str, beside: list[str]) -> Tensor:
    packed = source.tensor(key)
    state = QuantState.from_dict({entry: source.tensor(entry) for entry in beside}, packed=packed)
    return in_fp32(packed, state)
