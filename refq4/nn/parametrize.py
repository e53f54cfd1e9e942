"""Any parameter of any module in 4 bits: it is stored packed, and decoded when it is read.

    replace_parameter_4bit(module, "gate_up_proj")
    module.gate_up_proj                              decoded, in the shape and dtype that it had
    module.parametrizations.gate_up_proj.original    the packed bytes, a Params4bit
    module.state_dict()                              "gate_up_proj", "gate_up_proj.absmax", ...: a layer's keys

It is for weights that no ``nn.Linear`` holds, such as the fused experts [E, N, K] of a mixture-of-experts model. The
names and the file format are those of ``bitsandbytes.nn.parametrize``. ``refq4/internals/grouped.py`` multiplies by the
packed bytes without decoding them here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from ..functional import dequantize_4bit
from ..internals.holder import Holds4bitWeight
from ..params import Params4bit
from ..state import QuantState

__all__ = [
    "Bnb4bitParametrization",
    "decode_parameter_4bit",
    "packed_parameter",
    "replace_parameter_4bit",
    "replace_parameter_4bit_prequantized",
]


def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: Literal["nf4", "fp4"] | str = "nf4",
    blocksize: int | None = None,
) -> None:
    """Store a parameter of a module in 4 bits; reading it decodes it.

    Mirrors ``bitsandbytes.nn.parametrize.replace_parameter_4bit``. The module's ``state_dict`` and ``load_state_dict``
    know the packed form, and loading a full-precision parameter quantises it with these settings. A parameter on the
    meta device stays as it is until something is loaded into it.

    Args:
        module: the owner of the parameter; it is changed.
        param_name: the parameter's name in it, without a dot.
        compress_statistics: double quantisation of the scales.
        quant_type: a codebook's name.
        blocksize: elements per block; 64 if None. Blocks run over the flattened parameter.

    Raises:
        AttributeError: the module has no such parameter.
        TypeError: the attribute of this name is not an ``nn.Parameter``.
        ValueError: the parameter holds NaN or infinity, or a setting is wrong.

    Example:
        >>> experts = nn.Module()
        >>> experts.down_proj = nn.Parameter(torch.randn(8, 32, 64))
        >>> replace_parameter_4bit(experts, "down_proj")
        >>> experts.down_proj.shape, experts.parametrizations.down_proj.original.shape
        (torch.Size([8, 32, 64]), torch.Size([8192, 1]))
        >>> sorted(experts.state_dict())
        ['down_proj', 'down_proj.absmax', 'down_proj.quant_map', 'down_proj.quant_state.bitsandbytes__nf4']
    """
    parameter = _own_parameter(module, param_name)
    weight = Params4bit(
        parameter.data, blocksize=blocksize, compress_statistics=compress_statistics, quant_type=quant_type
    )
    parametrize(module, param_name, weight.to(parameter.device))


def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: Mapping[str, Any], device: torch.device | str
) -> None:
    """Decode a parameter that holds packed bytes already whenever it is read.

    Mirrors ``bitsandbytes.nn.parametrize.replace_parameter_4bit_prequantized``.

    Args:
        module: the owner of the parameter; it is changed.
        param_name: the parameter's name in it.
        qs_dict: what :meth:`QuantState.from_dict` takes.
        device: where bytes and state go.

    Raises:
        AttributeError: the module has no such parameter.
        TypeError: what has this name is no ``nn.Parameter``.
        ValueError: the entries contradict each other or the packed bytes; see ``QuantState.from_dict``.

    Example:
        >>> import refq4.functional as F
        >>> packed, state = F.quantize_4bit(torch.randn(8, 32, 64), quant_type="nf4")
        >>> experts = nn.Module()
        >>> experts.down_proj = nn.Parameter(packed, requires_grad=False)
        >>> replace_parameter_4bit_prequantized(experts, "down_proj", state.as_dict(packed=True), "cpu")
        >>> experts.down_proj.shape
        torch.Size([8, 32, 64])
    """
    packed = _own_parameter(module, param_name)
    parametrize(module, param_name, Params4bit.from_prequantized(packed.data, dict(qs_dict), device=device))


def packed_parameter(module: nn.Module, param_name: str) -> Params4bit | None:
    """The packed bytes of a parameter that is in 4 bits, with their quant state.

    None where reading the parameter gives something else than these bytes decoded: it is in full precision, waits for
    a state dict, or carries another parametrisation on top (an adapter of peft).

    Example:
        >>> experts = nn.Module()
        >>> experts.down_proj = nn.Parameter(torch.randn(8, 32, 64))
        >>> packed_parameter(experts, "down_proj") is None
        True
        >>> replace_parameter_4bit(experts, "down_proj")
        >>> packed_parameter(experts, "down_proj").quant_state.shape
        torch.Size([8, 32, 64])
    """
    held = held_4bit(module, param_name)
    if held is None or len(held) != 1 or held.quant_state is None or not isinstance(held.original, Params4bit):
        return None
    return held.original


def decode_parameter_4bit(module: nn.Module, param_name: str, dtype: torch.dtype | None = None) -> None:
    """Undo :func:`replace_parameter_4bit`: the parameter is an ordinary one again, with the decoded values.

    Args:
        module: the owner of the parameter; it is changed.
        param_name: the parameter's name in it.
        dtype: of the parameter afterwards; the one that reading gives if None.

    Raises:
        ValueError: the parameter is not in 4 bits, or carries another parametrisation on top.

    Example:
        >>> experts = nn.Module()
        >>> experts.down_proj = nn.Parameter(torch.randn(8, 32, 64))
        >>> replace_parameter_4bit(experts, "down_proj")
        >>> decode_parameter_4bit(experts, "down_proj", torch.bfloat16)
        >>> type(experts.down_proj), experts.down_proj.dtype
        (<class 'torch.nn.parameter.Parameter'>, torch.bfloat16)
    """
    held = held_4bit(module, param_name)
    if held is None or len(held) != 1:
        what = "is not in 4 bits" if held is None else f"carries {type(held[-1]).__name__} on top"
        raise ValueError(f"{param_name} of this {type(module).__name__} {what}, and can't be decoded")
    decoded = nn.Parameter(getattr(module, param_name).to(dtype))
    for handle in held.hooks:
        handle.remove()
    _drop(module, param_name)
    setattr(module, param_name, decoded)


class Bnb4bitParametrization(nn.Module):
    """What torch calls when the parameter is read: it decodes packed bytes. Mirrors bitsandbytes' class.

    Args:
        quant_state: of the packed bytes; None until something is loaded.

    Example:
        >>> import refq4.functional as F
        >>> packed, state = F.quantize_4bit(torch.eye(64), quant_type="nf4")
        >>> torch.equal(Bnb4bitParametrization(state)(packed), torch.eye(64))
        True
    """

    def __init__(self, quant_state: QuantState | None) -> None:
        super().__init__()
        self.quant_state = quant_state

    @torch.no_grad()
    def forward(self, quantized_param: Tensor) -> Tensor:
        """[b, 1] -> the parameter's shape and dtype; what is not quantised yet comes as it is."""
        return quantized_param if self.quant_state is None else dequantize_4bit(quantized_param, self.quant_state)


class PackedParameter(Holds4bitWeight, P.ParametrizationList):
    """``module.parametrizations.<name>`` of a parameter in 4 bits: torch's list, which moves, saves and loads it."""

    _held = "original"

    def __init__(self, weight: Params4bit) -> None:
        super().__init__([Bnb4bitParametrization(weight.quant_state)], weight, unsafe=True)
        self.hooks: list[Any] = []
        self.shape = weight.shape if weight.quant_state is None else weight.quant_state.geometry()[0]
        weight.module = self

    @property
    def quant_state(self) -> QuantState | None:
        """Of the packed bytes: the parametrisation has it."""
        parametrization: Any = self[0]
        state: QuantState | None = parametrization.quant_state
        return state

    @quant_state.setter
    def quant_state(self, state: QuantState | None) -> None:
        parametrization: Any = self[0]
        parametrization.quant_state = state

    @property
    def weight_shape(self) -> torch.Size:
        """Shape of the parameter."""
        return self.shape

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As for a layer's weight. A cast changes the dtype that reading gives: the module computes in it."""
        super()._apply(fn, recurse)
        state = self.quant_state
        if state is not None and state.dtype is not None:
            state.dtype = fn(torch.empty(0, dtype=state.dtype, device=state.absmax.device)).dtype
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As for a layer's weight; what is told of it names the parameter, as the caller's state dict does."""
        owner, _, name = prefix.removesuffix(".").rpartition("parametrizations.")
        held, named = f"{prefix}original", f"{owner}{name}"
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        except ValueError as error:
            raise ValueError(str(error).replace(held, named)) from None
        for told in args[2:]:  # missing and unexpected keys, and messages
            told[:] = [line.replace(held, named) for line in told]


def parametrize(module: nn.Module, param_name: str, weight: Params4bit) -> None:
    """Make a Params4bit the packed bytes of a parameter of ``module``, in place of what it is now."""
    setattr(module, param_name, weight)
    P.register_parametrization(module, param_name, nn.Identity(), unsafe=True)
    held = PackedParameter(weight)
    held.train(module.training)
    parametrizations: Any = module.parametrizations
    parametrizations[param_name] = held
    held.hooks = _register_parametrization_hooks(module, param_name)


def _drop(module: nn.Module, param_name: str) -> None:
    """Take a parametrisation away. torch would take it from copies of the module, too, which share its class."""
    parametrizations: Any = module.parametrizations
    del parametrizations[param_name]
    cls = type(module)
    (plain,) = cls.__bases__
    if len(parametrizations):
        others = {name: value for name, value in vars(cls).items() if name not in (param_name, "__dict__")}
        module.__class__ = type(cls.__name__, (plain,), others)
    else:
        del module.parametrizations
        module.__class__ = plain


def _own_parameter(module: nn.Module, param_name: str) -> nn.Parameter:
    if not hasattr(module, param_name):
        raise AttributeError(f"Module does not have parameter '{param_name}'")
    parameter = getattr(module, param_name)
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(f"Parameter '{param_name}' is not an instance of nn.Parameter")
    return parameter


def held_4bit(module: nn.Module, param_name: str) -> PackedParameter | None:
    """What torch keeps of a parameter that is in 4 bits, with whatever has been put on top of it."""
    lists: Any = module._modules.get("parametrizations")
    held = None if lists is None else lists._modules.get(param_name)
    return held if isinstance(held, PackedParameter) else None


# --- hooks of the owner: the parameter's own name in state dicts, and one decoding a forward pass -------------------


def _register_parametrization_hooks(module: nn.Module, param_name: str) -> list[Any]:
    """The names are bitsandbytes', whose tests call this and the two functions below."""
    owner: Any = module
    return [
        owner.register_state_dict_post_hook(partial(_as_saved, param_name=param_name)),
        owner.register_load_state_dict_pre_hook(partial(_as_held, param_name=param_name)),
        owner.register_forward_pre_hook(_enable_parametrization_cache),
        # also after an error: activation checkpointing ends a recomputation with one
        owner.register_forward_hook(_disable_parametrization_cache, always_call=True),
    ]


def _enable_parametrization_cache(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    P._cache_enabled += 1


def _disable_parametrization_cache(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    P._cache_enabled = max(0, P._cache_enabled - 1)  # this is called even if the hook above was not
    if not P._cache_enabled:
        P._cache = {}


def _as_saved(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any, *, param_name: str) -> None:
    _rename(state_dict, f"{prefix}parametrizations.{param_name}.original", f"{prefix}{param_name}")


def _as_held(module: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any, param_name: str) -> None:
    _rename(state_dict, f"{prefix}{param_name}", f"{prefix}parametrizations.{param_name}.original")


def _rename(state_dict: dict[str, Any], old: str, new: str) -> None:
    for key in [key for key in state_dict if key == old or key.startswith(f"{old}.")]:
        state_dict[f"{new}{key.removeprefix(old)}"] = state_dict.pop(key)
