"""The module side of a 4-bit weight: how a module that holds one is moved, saved and loaded.

    module.to(device)              the weight keeps its identity, and its quant state goes where the bytes go
    module.state_dict()            the stored bytes, and the quant state under bitsandbytes' keys beside them
    module.load_state_dict(...)    packed weights with those keys, or full-precision weights

``Linear4bit``, ``Embedding4bit`` and the parametrisation of any other parameter (``refq4/nn``) build on it. How the
parameter itself is quantised and moved is in ``refq4/params.py``; how the keys are read and checked, in
``refq4/internals/statedict.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..params import Params4bit
from ..state import QuantState
from .format import describe

__all__ = ["Holds4bitWeight", "parameter"]


def parameter(module: nn.Module, name: str) -> Any:
    """``module.weight``, say, without the microsecond that ``nn.Module.__getattr__`` takes to find it.

    What something has rebuilt (FSDP, a parametrization) is an attribute like any other.
    """
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


class _AnyName:
    """An object of which every public attribute is the object itself."""

    def __getattr__(self, name: str) -> _AnyName:
        if name.startswith("_"):
            raise AttributeError(name)
        return self


class Holds4bitWeight(nn.Module):
    """What Linear4bit and Embedding4bit share: moving, saving and loading a module with a Params4bit ``weight``."""

    _held: ClassVar[str] = "weight"  # the name of the parameter, which torch's parametrisations call otherwise
    _any_name = _AnyName()
    weight: Any  # a Params4bit, until something rebuilds it as a plain parameter
    quant_state: QuantState | None

    def _hold(self, **settings: Any) -> None:
        """Turn the full-precision ``weight`` that the base class made into a Params4bit."""
        self.quant_state = None
        self.quant_storage = settings["quant_storage"]
        self.weight = Params4bit(self.weight.data, requires_grad=False, module=self, **settings)

    @property
    def weight_shape(self) -> torch.Size:
        """Shape of the weight, before or after it is quantised."""
        raise NotImplementedError

    @property
    def _weight(self) -> Any:
        return getattr(self, self._held)

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``; training mode restores the stored bytes, which backward reads."""
        if mode and isinstance(self._weight, Params4bit):
            self._weight.restore()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moving the module: the weight keeps its identity, and its quant state goes where the bytes go.

        torch would copy only ``.data`` from the moved parameter into the old one.
        """
        weight = self._weight
        if not isinstance(weight, Params4bit):
            return self._apply_to_rebuilt(fn, recurse)
        with torch.no_grad():
            moved = fn(weight)
        self._parameters[self._held] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters[self._held] = weight
        if moved is not weight:
            self._adopt(weight, moved)
        self.quant_state = self._weight.quant_state
        return self

    def _apply_to_rebuilt(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> Any:
        """The same for a weight that was rebuilt as a plain parameter of its bytes: the state is the module's.

        The bytes are shown to ``fn`` as the integers they are, whatever they are stored under, and of what comes back
        only a new place counts: a cast of codes would destroy them.
        """
        weight = self._weight

        def move(tensor: Tensor) -> Tensor:
            if tensor is not weight or self.quant_state is None:
                return fn(tensor)
            plain = tensor.view(torch.uint8)
            moved = fn(plain)
            return (moved if moved.dtype == torch.uint8 else plain.to(moved.device)).view(tensor.dtype)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        if self.quant_state is not None:
            self.quant_state = self.quant_state.copy().to(self._weight.device)
        return self

    def _adopt(self, weight: Params4bit, moved: Tensor) -> None:
        """Make ``weight`` what ``moved`` is; a new parameter only where torch can't exchange the data (meta)."""
        state = moved.quant_state if isinstance(moved, Params4bit) else weight.quant_state
        if state is not None and state.absmax.device != moved.device:
            # from meta nothing can be moved: to_empty() leaves a layer that waits for a state dict
            state = None if state.absmax.is_meta else state.copy().to(moved.device)
        if torch._has_compatible_shallow_copy_type(weight, moved):
            weight.data, weight.quant_state = moved.data, state
        else:
            setattr(self, self._held, weight._like(moved.data, state))

    # --- state dicts ------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # Torch collects the tensors themselves, and they are detached here: a prepared weight gives a copy of its
        # stored bytes, the live layer goes on as it is, and threads that save and infer at once don't see each other.
        super()._save_to_state_dict(destination, prefix, True)
        if not keep_vars:
            for name, value in (*self._parameters.items(), *self._buffers.items()):
                if value is not None and f"{prefix}{name}" in destination:
                    plain = value.stored() if isinstance(value, Params4bit) else value.detach()
                    destination[f"{prefix}{name}"] = plain
        state = getattr(self._weight, "quant_state", None) or self.quant_state
        if state is not None:
            for key, value in state.as_dict(packed=True).items():
                destination[f"{prefix}{self._held}.{key}"] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Both kinds of checkpoint: packed weights with their ``weight.*`` entries, and full-precision weights.

        A full-precision weight that meets a layer which is quantised already is quantised with the layer's settings.
        """
        own = f"{prefix}{self._held}"
        stats = {key: value for key, value in state_dict.items() if key.startswith(f"{own}.")}
        others = {key: value for key, value in state_dict.items() if key != own and key not in stats}
        incoming = state_dict.get(own)
        if stats and incoming is None:
            missing_keys.append(own)
        elif stats:
            self._load_packed(incoming, stats, local_metadata.get("assign_to_params_buffers", False))
        elif incoming is not None and getattr(self._weight, "bnb_quantized", False):
            self._load_full_precision(incoming, own, error_msgs)
        else:
            others, own = state_dict, ""  # torch loads the weight, too
        reported = len(missing_keys)
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        missing_keys[reported:] = [key for key in missing_keys[reported:] if key != own]

    def _fqn_modifiers(self) -> dict[str, str]:
        """Asked by ``torch.distributed.checkpoint``, which follows the keys of a state dict attribute by attribute.

        A sharded weight (a DTensor) has no ``absmax``; so ``weight`` is looked up in something that has all names.
        """
        return {self._held: "_any_name"}

    def _load_packed(self, packed: Any, stats: dict[str, Any], assign: bool) -> None:
        if hasattr(self._weight, "device_mesh"):  # a DTensor; to import the class takes a second
            self._load_sharded(packed, stats)
            return
        stay = assign or self._weight.is_meta
        weight = Params4bit.from_prequantized(packed, stats, device=None if stay else self._weight.device, module=self)
        if not assign:  # as torch's copy_: the caller's tensors stay the caller's
            weight.data = weight.data.clone()
            weight.quant_state = copy.deepcopy(weight.quant_state)
        setattr(self, self._held, weight)
        self.quant_state = weight.quant_state

    def _load_sharded(self, packed: Any, stats: dict[str, Any]) -> None:
        """Each process takes its part of the bytes, and all of the quant state."""
        state = QuantState.from_dict(stats, packed=packed)
        if state.shape != self.weight_shape:
            raise ValueError(f"the checkpoint holds {state}, this {type(self).__name__} needs {self.weight_shape}")
        with torch.no_grad():
            self._weight.copy_(packed)
        self.quant_state = copy.deepcopy(state)

    def _load_full_precision(self, incoming: Any, key: str, error_msgs: list[str]) -> None:
        shape = list(self.weight_shape)
        if not isinstance(incoming, Tensor) or list(incoming.shape) != shape:
            error_msgs.append(
                f"size mismatch for {key}: a full-precision weight of shape {shape} or a packed "
                f"one with its quant_state entries is wanted, got {describe(incoming)} without them"
            )
            return
        assert isinstance(self._weight, Params4bit)
        fresh = self._weight._like(incoming.detach(), None)
        fresh.bnb_quantized = False
        try:
            fresh = fresh.to(self._weight.device)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{key}: {error}") from None
        setattr(self, self._held, fresh)
