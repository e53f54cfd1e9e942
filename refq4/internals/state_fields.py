"""The fields of a quant state as attributes of the weight: ``weight.absmax`` is ``weight.quant_state.absmax``.

bitsandbytes names them so, and code that walks a state dict's keys (FSDP) looks them up one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..params import Params4bit

__all__ = ["of_no_module", "of_the_state"]


def of_the_state(name: str, field: str, second: bool = False) -> Any:
    """A field of the quant state, or of its scales' state; a property, since Dynamo compiles no ``__getattr__``."""

    def read(self: Params4bit) -> Any:
        state = self.quant_state
        owner = state.state2 if second and state is not None else state
        if owner is None:
            why = "it is not quantised" if state is None else "its scales are not quantised"
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}': {why}")
        return getattr(owner, field)

    return property(read)


def of_no_module() -> Any:
    """Say what is wrong where a program takes the weight for a module that holds ``absmax`` and the like.

    accelerate does, when it loads a checkpoint tensor by tensor: it follows the keys attribute by attribute.
    """

    def get(weight: Any) -> Any:
        raise AttributeError(
            "a packed weight is loaded whole, with what stands beside it, and not tensor by tensor: use "
            "refq4.integrations.transformers, model.load_state_dict(..., assign=True), or accelerate's device_map=None"
        )

    return property(get)
