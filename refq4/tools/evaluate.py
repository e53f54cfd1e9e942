"""What 4 bits cost a language model, in the terms that its users have: loss, perplexity, KL, and which layers did it.

    loss        mean of -log p(next token), in nats; perplexity is e to that power
    kl          mean over positions of the divergence of the 4-bit model's prediction from the full-precision one's
    top1        share of positions at which both think the same token the likeliest
    layers      refq4/tools/damage.py: what each layer would do if it alone were in 4 bits

The two models run one after the other, so that only one has to be in memory (``refq4 eval`` loads them so). What the
first said is kept in a temporary file: a log-probability for each position and token, in fp32.
"""

from __future__ import annotations

import gc
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..internals.shown import Shown
from ..models.report import finite, in_fp32
from ..nn import Embedding4bit, Linear4bit
from .damage import Decoded, LayerDamage, Probes

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Evaluation", "evaluate", "evaluate_one_after_the_other"]

DRAWS = 4
WORST_SHOWN = 10
TOO_UNCERTAIN = 0.1  # a standard error of this share of KL or more
_RESERVE = 64 * 2**20  # of disk


@dataclass
class Evaluation(Shown):
    """What :func:`evaluate` found. Prints as a table, shows as HTML in Jupyter.

    Attributes:
        tokens: positions at which a next token was predicted.
        loss, perplexity: of the model; the loss in nats a token.
        exact_loss, exact_perplexity: of the full-precision model. These and what follows are None without one.
        kl: mean divergence of the model's predictions from the full-precision model's, in nats a token.
        top1: share of positions at which both have the same likeliest token.
        layers: one for each 4-bit layer; the one that costs the most comes first.
        kl_error: standard error of ``kl``, as if the positions were independent.

    Example:
        >>> Evaluation(tokens=10, loss=2.0).perplexity
        7.38905609893065
    """

    tokens: int
    loss: float
    exact_loss: float | None = None
    kl: float | None = None
    top1: float | None = None
    layers: list[LayerDamage] = field(default_factory=list)
    kl_error: float | None = None

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return _exp(self.loss)

    @property
    def exact_perplexity(self) -> float | None:
        """The full-precision model's."""
        return None if self.exact_loss is None else _exp(self.exact_loss)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data; what is not finite is None, since JSON has no NaN."""
        names = ("tokens", "loss", "perplexity", "exact_loss", "exact_perplexity", "kl", "kl_error", "top1")
        figures = {name: finite(getattr(self, name)) for name in names}
        layers = [{key: finite(value) for key, value in asdict(layer).items()} for layer in self.layers]
        return figures | {"layers": layers}

    def _parts(self) -> Iterator[RenderableType]:
        from rich.table import Table

        table = Table(title=f"{self.tokens:,} predicted tokens", title_justify="left", title_style="bold")
        for column in ("", "loss", "perplexity", "KL", "same first choice"):
            table.add_column(column, justify="right" if column else "left")
        if self.exact_loss is not None and self.exact_perplexity is not None:
            table.add_row("full precision", f"{self.exact_loss:.4f}", f"{self.exact_perplexity:.3f}", "", "")
        compared = ["", ""] if self.kl is None or self.top1 is None else [f"{self.kl:.5f}", f"{self.top1:.2%}"]
        table.add_row("this model", f"{self.loss:.4f}", f"{self.perplexity:.3f}", *compared)
        yield table
        if self.kl and self.kl_error is not None:
            advice = "; a longer text makes it smaller" if self.kl_error > TOO_UNCERTAIN * self.kl else ""
            yield f"standard error of KL: {self.kl_error:.5f} ({self.kl_error / self.kl:.0%}){advice}"
        if self.layers:
            yield self._layer_table()

    def _layer_table(self) -> RenderableType:
        from rich.table import Table

        shown = self.layers[:WORST_SHOWN]
        title = f"the {len(shown)} of {len(self.layers)} layers that cost the most"
        if shown[0].kl is None:
            title = f"the {len(shown)} of {len(self.layers)} layers with the largest damage (--draws 0: no KL)"
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("layer", overflow="fold")
        table.add_column("|(W - W4)x|² / |Wx|²", justify="right")
        table.add_column("KL if it alone were in 4 bits (estimated)", justify="right")
        for layer in shown:
            table.add_row(layer.name, f"{layer.damage:.5f}", "" if layer.kl is None else f"{layer.kl:.6f}")
        return table


def evaluate(
    model: nn.Module,
    tokens: Tensor | Iterable[Sequence[int] | Tensor],
    *,
    against: nn.Module | None = None,
    draws: int = DRAWS,
    progress: bool = True,
) -> Evaluation:
    """Measure a causal language model on a text, and how much worse it is in 4 bits.

    Both models are put into evaluation mode for the measurement, and then left as they were.

    Args:
        model: takes ids [1, T] and returns logits [1, T, V], or an object with them as ``logits``.
        tokens: sequences of token ids, or int64 [B, T]. Each is run separately; all but its first token are predicted.
        against: the same model in full precision, with layers of the same names.
        draws: how often next tokens are drawn, for each sequence, to estimate what each layer costs; 0: not at all. A
            draw is a backward pass through ``against``.
        progress: show a progress bar (on a terminal).

    Returns:
        An :class:`Evaluation`.

    Raises:
        ValueError: no sequences, one of fewer than two tokens, models whose vocabularies differ, layers whose shapes
            do, or too little disk for the log-probabilities.
        IndexError: an id outside the vocabulary, or a sequence longer than the model takes.
        TypeError: a model returns no logits.

    Example:
        >>> import copy, refq4
        >>> from torch import nn
        >>> full = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64), nn.Linear(64, 10))
        >>> small = refq4.quantize_model(copy.deepcopy(full), skip="2", progress=False)
        >>> report = refq4.evaluate(small, [[1, 2, 3, 4], [5, 6]], against=full, progress=False)
        >>> report.tokens, 0 <= report.kl < 0.1, [layer.name for layer in report.layers]
        (4, True, ['1'])
    """
    return evaluate_one_after_the_other(
        lambda: model, tokens, None if against is None else lambda: against, _of(model), draws, progress
    )


def evaluate_one_after_the_other(
    load: Callable[[], nn.Module],
    tokens: Tensor | Iterable[Sequence[int] | Tensor],
    load_against: Callable[[], nn.Module] | None,
    decoded: Decoded,
    draws: int = DRAWS,
    progress: bool = True,
) -> Evaluation:
    """The same for models that are loaded here, the second when the first is gone.

    Args:
        load, load_against: return the model and the full-precision one.
        decoded: by a layer's name, its 4-bit weight.
    """
    sequences = _checked(tokens)
    bar = _progress(progress)
    exact_loss: float | None = None
    layers: list[LayerDamage] = []
    with tempfile.TemporaryFile(prefix="refq4-eval-") as file:
        if load_against is not None:
            exact_loss, layers = _run_exact(load_against(), sequences, Probes(nn.Module(), decoded, draws), file, bar)
            gc.collect()  # a model may hold itself in a circle
        result = _run(load(), sequences, file if load_against is not None else None, bar)
    return Evaluation(sum(len(ids) - 1 for ids in sequences), exact_loss=exact_loss, layers=layers, **result)


def _run_exact(
    model: nn.Module, sequences: list[Tensor], probes: Probes, file: Any, bar: Any
) -> tuple[float, list[LayerDamage]]:
    """The full-precision model: its loss, what each layer costs, and its log-probabilities into the file."""
    probes.model, generator, total = model, torch.Generator().manual_seed(0), 0.0
    with _evaluating(model), probes.watching():
        for ids in bar("full precision", sequences):
            log_probs = _log_probs(model, ids)
            if file.tell() == 0:
                _check_room(sum(len(one) - 1 for one in sequences) * log_probs.shape[1] * 4)
            total += _loss(log_probs, ids)
            file.write(_bytes_of(log_probs.detach().cpu()))
            probes.draw(log_probs, generator)
    return total / sum(len(ids) - 1 for ids in sequences), probes.layers()


def _run(model: nn.Module, sequences: list[Tensor], file: Any, bar: Any) -> dict[str, float]:
    """The model itself: its loss, and KL and agreement with what is in the file."""
    total, kl, squares, same = 0.0, 0.0, 0.0, 0
    if file is not None:
        size = file.tell()
        file.seek(0)
    with _evaluating(model), torch.no_grad():
        for ids in bar("this model", sequences):
            log_probs = _log_probs(model, ids)
            total += _loss(log_probs, ids)
            if file is None:
                continue
            if size != sum(len(one) - 1 for one in sequences) * log_probs.shape[1] * 4:
                raise ValueError(f"this model's vocabulary of {log_probs.shape[1]} is not the full-precision model's")
            exact = _read(file, log_probs.shape).to(log_probs.device)
            each = (exact.exp() * (exact - log_probs)).sum(1, dtype=torch.float64)
            kl, squares = kl + float(each.sum()), squares + float(each.square().sum())
            same += int((exact.argmax(1) == log_probs.argmax(1)).sum())
    count = sum(len(ids) - 1 for ids in sequences)
    if file is None:
        return {"loss": total / count}
    error = math.sqrt(max(squares / count - (kl / count) ** 2, 0) / max(count - 1, 1))
    return {"loss": total / count, "kl": kl / count, "kl_error": error, "top1": same / count}


# --- one sequence -----------------------------------------------------------------------------------------------------


def _log_probs(model: nn.Module, ids: Tensor) -> Tensor:
    """ids [T] -> fp32 [T - 1, V]: the log-probabilities of what follows each token but the last."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        out = model(ids[None].to(device))
    except IndexError as error:
        error.add_note(f"a sequence of {len(ids)} tokens with ids up to {int(ids.max())}: is that more than it knows?")
        raise
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != (1, len(ids)):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(out).__name__
        raise TypeError(f"evaluate needs a language model: ids [1, {len(ids)}] gave {got}, not logits [1, T, V]")
    return logits[0, :-1].float().log_softmax(-1)


def _loss(log_probs: Tensor, ids: Tensor) -> float:
    """The sum of -log p over the tokens that came."""
    came = ids[1:, None].to(log_probs.device)
    return -float(log_probs.detach().gather(1, came).sum(dtype=torch.float64))


def _read(file: Any, shape: torch.Size) -> Tensor:
    kept = torch.empty(shape)
    file.readinto(_bytes_of(kept))
    return kept


def _bytes_of(tensor: Tensor) -> memoryview:
    array: Any = tensor.numpy()
    return memoryview(array).cast("B")


def _check_room(size: int) -> None:
    directory = tempfile.gettempdir()
    free = shutil.disk_usage(directory).free
    if free < size + _RESERVE:
        raise ValueError(
            f"the log-probabilities take {size / 1e9:.2f} GB and {directory} has {free / 1e9:.2f} GB free: give fewer "
            f"tokens, or let TMPDIR name a larger disk"
        )


# --- what was handed in -----------------------------------------------------------------------------------------------


def _checked(tokens: Tensor | Iterable[Sequence[int] | Tensor]) -> list[Tensor]:
    """The sequences as int64 [T] on the CPU, each of two tokens or more."""
    sequences = [torch.as_tensor(sequence) for sequence in tokens]
    if not sequences:
        raise ValueError("no tokens to evaluate on: expected sequences of token ids")
    for at, ids in enumerate(sequences, 1):
        if ids.dim() != 1 or ids.is_floating_point() or len(ids) < 2 or int(ids.min()) < 0:
            raise ValueError(f"sequence {at}: expected two or more token ids, got {ids.dtype} {list(ids.shape)}")
    return [ids.long().cpu() for ids in sequences]


def _of(model: nn.Module) -> Decoded:
    """The 4-bit weights of a model in memory."""

    def decoder(layer: Linear4bit | Embedding4bit) -> Callable[[], Tensor]:
        return lambda: in_fp32(layer.weight, layer.quant_state) if layer.quant_state else layer.weight.float()

    return {name: decoder(m) for name, m in model.named_modules() if isinstance(m, Linear4bit | Embedding4bit)}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            if next(module.children(), None) is None:
                module.train()  # a 4-bit layer has something to do then
            module.training = True


def _progress(shown: bool) -> Callable[[str, list[Tensor]], Iterable[Tensor]]:
    from tqdm.auto import tqdm

    return lambda label, sequences: tqdm(sequences, desc=label, unit="sequence", disable=None if shown else True)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else loss
