"""What transformers' loader is to refuse or to warn about: names to skip, and packed weights that have no data yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from .. import layout
from ..internals.checks import warn_caller
from ..models.linears import nearest
from .fates import Route

__all__: list[str] = []  # for the modules beside it


def check_skipped(model: PreTrainedModel, names: Iterable[str], way: Route | None) -> None:
    """Warn of each name in ``llm_int8_skip_modules`` that means nothing, in the model or in the file."""
    there = [name for name, _ in (*model.named_modules(), *model.named_parameters())]  # experts are parameters
    there += [key.removesuffix(".weight") for group in (way.groups if way is not None else ()) for key in group.sources]
    for name in names:
        if all(should_convert_module(other, [name]) for other in there):
            hint = nearest(name, there)
            warn_caller(f"llm_int8_skip_modules: {name!r} is not a module of this {type(model).__name__}{hint}")


def check_described(name: str, packed: Tensor, parts: Mapping[str, Tensor], numel: int) -> None:
    """Raise a ValueError unless a packed weight without data has what must stand beside it, and the size of its layer.

    Args:
        name: the key of the weight.
        packed: its bytes, on the meta device.
        parts: key -> what stands beside it.
        numel: of the weight that it decodes to.
    """
    endings = {key.removeprefix(f"{name}.").partition("__")[0] for key in parts}
    if missing := {"absmax", "quant_map", "quant_state.bitsandbytes"} - endings:
        raise ValueError(f"{name}.{min(missing)}: missing, though {name} is packed")
    wanted, held = layout.packed_bytes(numel), packed.numel() * packed.itemsize
    if not 0 <= held - wanted < packed.itemsize:
        raise ValueError(f"{name}: {held} bytes, and its layer packs into {wanted}")
