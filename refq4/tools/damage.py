"""What each 4-bit layer does to a model, measured on the full-precision model alone: one layer's damage at a time.

    x       what the layer is given in the full-precision model, for some text
    e       (W4 - W) x, the error of its output, were this layer alone in 4 bits
    damage  |e|² / |W x|², summed over all tokens: how large the error is where it arises

A large error may hardly matter to what the model says, and a small one may. What matters is which way it points: g, the
gradient of the log-probability of a next token for the layer's output, says how far each direction moves that token.
With tokens drawn from the model's own prediction, half the mean of (g · e)² is the KL divergence between the model and
the one in which this layer alone is in 4 bits, to second order in e (g g' is then the Fisher information). That is
``kl``. One backward pass gives it for all layers at once, for one draw of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LayerDamage", "Probes"]

Decoded = Mapping[str, Callable[[], Tensor]]  # by a layer's name: its 4-bit weight [N, K], decoded to fp32


@dataclass
class LayerDamage:
    """What one layer in 4 bits does.

    Attributes:
        name: of the layer, in the full-precision model.
        damage: ``|(W - W4) x|² / |W x|²``.
        kl: the divergence if this layer alone were in 4 bits, estimated; None where it was not.

    Example:
        >>> LayerDamage("up", 0.0081).kl is None
        True
    """

    name: str
    damage: float
    kl: float | None = None


@dataclass
class _Sums:
    """Of one layer, over all sequences so far."""

    error: float = 0.0
    norm: float = 0.0
    squares: float = 0.0


@dataclass
class Probes:
    """Watches the layers of a full-precision model of which there are 4-bit weights.

    Attributes:
        model: the full-precision model.
        decoded: the 4-bit weights; those without a layer of that name and shape are left out.
        draws: how often tokens are drawn for a sequence; 0 leaves ``kl`` out.
    """

    model: nn.Module
    decoded: Decoded
    draws: int
    sums: dict[str, _Sums] = field(default_factory=dict)
    tokens: int = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure whatever runs through the model inside."""
        self._of_sequence: dict[str, tuple[Tensor, Tensor]] = {}
        layers = {name: module for name, module in self.model.named_modules() if name in self.decoded}
        hooks = [
            module.register_forward_hook(self._hook(name))
            for name, module in layers.items()
            if isinstance(getattr(module, "weight", None), Tensor)
        ]
        try:
            with torch.set_grad_enabled(self.draws > 0):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def measure(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            with torch.no_grad():
                wanted, error = _exact_and_error(module, args[0], self.decoded[name]())
                sums = self.sums.setdefault(name, _Sums())
                sums.error += float(error.double().square().sum())
                sums.norm += float(wanted.double().square().sum())
            if not self.draws:
                return out
            probe = torch.zeros_like(out, requires_grad=True)  # its gradient is that of the output
            self._of_sequence[name] = probe, error
            return out + probe

        return measure

    def draw(self, log_probs: Tensor, generator: torch.Generator) -> None:
        """Take one sequence into the estimates: log_probs [T, V], as the watched model computed them."""
        self.tokens += len(log_probs)
        names = list(self._of_sequence)
        probes = [probe for probe, _ in self._of_sequence.values()]
        likely = log_probs.detach().exp().cpu()
        for _ in range(self.draws if names else 0):
            drawn = torch.multinomial(likely, 1, generator=generator).to(log_probs.device)
            grads = torch.autograd.grad(log_probs.gather(1, drawn).sum(), probes, retain_graph=True)
            for name, grad in zip(names, grads, strict=True):
                error = self._of_sequence[name][1]
                self.sums[name].squares += float((grad.float() * error).sum(dtype=torch.float64)) ** 2
        self._of_sequence.clear()

    def layers(self) -> list[LayerDamage]:
        """One for each layer: the one that does the most first, or in the order of the model if none was drawn."""
        found = []
        for name, sums in self.sums.items():
            damage = sums.error / sums.norm if sums.norm else float("inf" if sums.error else 0)
            kl = sums.squares / (2 * self.draws * self.tokens) if self.draws and self.tokens else None
            found.append(LayerDamage(name, damage, kl))
        return sorted(found, key=lambda layer: -(layer.damage if layer.kl is None else layer.kl))


def _exact_and_error(module: nn.Module, x: Tensor, decoded: Tensor) -> tuple[Tensor, Tensor]:
    """``W x`` without the bias, and ``(W4 - W) x``, both fp32; of a table the rows that x, ids, names."""
    weight: Any = module.weight
    if isinstance(module, nn.Embedding):
        rows = weight[x].float()
        return rows, decoded.to(weight.device)[x] - rows
    if type(module).__name__ == "Conv1D":  # GPT-2's, which stores [K, N]
        weight = weight.T
    if weight.shape != decoded.shape:
        raise ValueError(f"a layer [N, K] = {list(weight.shape)} has a 4-bit weight {list(decoded.shape)}")
    exact = weight.float()
    x = x.float()
    return nn.functional.linear(x, exact), nn.functional.linear(x, decoded.to(weight.device) - exact)
