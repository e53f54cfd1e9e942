"""The part of a 4-bit weight that each process of a group holds: whole blocks, with the scales that they have.

A part has the codes and scales of the whole weight, so that a model on two processes has the weights that it has on
one, bit for bit. In the flat order of a weight, a part is a run of elements that repeats:

    weight [N, K], columns divided by 2     | run 0 | run 1 | run 0 | run 1 | ...     run = K/2, whole blocks
    process 0 holds                         | run 0 |       | run 0 |       | ...
    scales in 8 bits                        groups of 256 share an fp32 scale; a part repeats it for smaller groups

Whose weights are divided, and what a layer does with its part, is in ``tensor_parallel.py`` and ``parallel_plans.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .. import layout
from ..internals.format import BLOCKSIZES, NESTED_BLOCKSIZE
from ..nn import Linear4bit
from ..params import Params4bit

__all__: list[str] = []  # for the modules that divide


@dataclass(frozen=True)
class Split:
    """How a weight is divided among the processes of a mesh.

    Attributes:
        name: of the parameter, for messages.
        shape: of the whole weight, [N, K] or [E, N, K].
        dim: the dimension that is divided.
        mesh: of one dimension.
        parts: weights that are stacked in this dimension, each divided by itself (gate and up: 2).
    """

    name: str
    shape: torch.Size
    dim: int
    mesh: DeviceMesh
    parts: int = 1

    def check(self, blocksize: int) -> None:
        """Raise a ValueError unless each process gets whole blocks."""
        processes, size = self.mesh.size(), self.shape[self.dim]
        what = f"{self.name}: dimension {self.dim} of a 4-bit weight of shape {list(self.shape)}"
        if size % (self.parts * processes):
            each = f"{self.parts} parts of {size // self.parts}" if self.parts > 1 else f"{size}"
            raise ValueError(
                f"{what}, {each}, can't be divided evenly among {processes} processes: take another number of "
                f"processes, or leave the layer in full precision (llm_int8_skip_modules, skip)"
            )
        run = self._run(self.shape.numel())
        if run % blocksize:
            better = [size for size in BLOCKSIZES if run % size == 0]
            other = f"quantise it with blocksize={better[-1]}, " if better else ""
            raise ValueError(
                f"{what} can't be divided among {processes} processes: each would hold runs of {run} elements, which "
                f"cut blocks of {blocksize}; {other}take another number of processes, or leave the layer in full "
                f"precision (llm_int8_skip_modules, skip)"
            )

    def part(self, weight: Params4bit) -> Params4bit:
        """This process's part of a quantised weight, in memory of its own.

        Raises:
            ValueError: a block would be cut, or the scales are quantised in other groups than usual.
        """
        assert weight.quant_state is not None
        state = weight.quant_state.copy()
        shape, blocksize = state.geometry()
        self.check(blocksize)
        packed = self._mine(layout.from_storage(weight.stored(), shape.numel()))
        if state.state2 is not None:
            if state.state2.blocksize != NESTED_BLOCKSIZE:  # put_together makes groups of that size again
                raise ValueError(
                    f"{self.name}: the scales of this weight are quantised in groups of {state.state2.blocksize}; only "
                    f"those in groups of {NESTED_BLOCKSIZE}, which is what bitsandbytes and refq4 write, can be divided"
                )
            blocks = state.absmax.numel()
            state.state2.blocksize = math.gcd(NESTED_BLOCKSIZE, self._run(blocks))
            starts = torch.arange(0, blocks, state.state2.blocksize, device=state.absmax.device)
            state.state2.absmax = self._mine(state.state2.absmax[starts // NESTED_BLOCKSIZE])
        state.absmax = self._mine(state.absmax)
        state.shape = torch.Size((*shape[: self.dim], shape[self.dim] // self.mesh.size(), *shape[self.dim + 1 :]))
        return weight._like(layout.to_storage(packed, weight.dtype), state)

    def put_together(self, part: Params4bit) -> Params4bit:
        """The whole weight again, of the parts that all processes give."""
        assert part.quant_state is not None
        state = part.quant_state.copy()
        packed = self.gathered(layout.from_storage(part.stored(), state.geometry()[0].numel()))
        state.absmax = self.gathered(state.absmax)
        if state.state2 is not None:
            assert state.state2.blocksize is not None
            state.state2.absmax = self.gathered(state.state2.absmax)[:: NESTED_BLOCKSIZE // state.state2.blocksize]
            state.state2.blocksize = NESTED_BLOCKSIZE
        state.shape = self.shape
        return part._like(layout.to_storage(packed, part.dtype), state)

    def gathered(self, part: Tensor, outer: int | None = None) -> Tensor:
        """Flat values, of this process's runs and the others'; ``outer`` is how often the runs repeat."""
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.mesh.size())]
        dist.all_gather(parts, part, group=self.mesh.get_group())
        return torch.stack([other.view(outer or self._outer, -1) for other in parts], dim=1).flatten()

    def _mine(self, whole: Tensor, outer: int | None = None) -> Tensor:
        runs = whole.reshape(outer or self._outer, self.mesh.size(), -1)[:, self.mesh.get_local_rank()]
        return runs.clone(memory_format=torch.contiguous_format).flatten()

    @property
    def _outer(self) -> int:
        """How often the runs of all processes repeat."""
        return self.shape[: self.dim].numel() * self.parts

    def _run(self, values: int) -> int:
        """Of so many values of the whole weight, how many follow each other in a process's part."""
        return values // (self._outer * self.mesh.size())


def splits(module: nn.Module) -> dict[str, Split]:
    """How the 4-bit parameters of a module are divided, by the name of the parameter."""
    found: dict[str, Split] = module.__dict__.get("_refq4_splits", {})
    return found


def is_divided(model: nn.Module) -> bool:
    """Whether this process holds a part of a model's 4-bit weights."""
    return any(splits(module) for module in model.modules())


def split_later(module: nn.Module, param_name: str, split: Split) -> None:
    """Note how a weight is to be divided once it is there: :func:`divided`."""
    module.__dict__["_refq4_splits"] = splits(module) | {param_name: split}


def divided(module: nn.Module, param_name: str, weight: Params4bit) -> Params4bit:
    """What a module is to hold of a whole weight: this process's part, if the weight is to be divided.

    A linear layer gets the sizes of its part.
    """
    split = splits(module).get(param_name)
    if split is None:
        return weight
    part = split.part(weight)
    assert part.quant_state is not None
    layer: Any = module
    if isinstance(layer, Linear4bit):
        layer.quant_state = part.quant_state
        layer.out_features, layer.in_features = part.quant_state.geometry()[0]
    return part


def divide_bias(layer: Linear4bit) -> None:
    """The bias of a divided layer: the part that goes with its rows; whole where columns are divided."""
    split, bias = splits(layer)["weight"], layer.bias
    if split.dim == 0 and bias is not None:
        layer.bias = nn.Parameter(split._mine(bias.detach(), outer=split.parts), bias.requires_grad)


@contextmanager
def whole_sizes(layer: Any) -> Iterator[None]:
    """Let a divided layer show the sizes of the whole one, to what is put around it."""
    split = splits(layer).get("weight") if isinstance(layer, Linear4bit) else None
    if split is None:
        yield
        return
    own = layer.out_features, layer.in_features
    layer.out_features, layer.in_features = split.shape
    try:
        yield
    finally:
        layer.out_features, layer.in_features = own
