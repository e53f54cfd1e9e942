"""Params4bit: a weight that quantises itself the first time it is moved to a device.

    before   data [N, K] full precision, quant_state None
    .to("cpu"), .cuda(), inside model.to(device)         <- the moment of quantisation
    after    data [b, 1] packed bytes in quant_storage, quant_state set, bnb_quantized True

How the parameter is quantised, moved, copied and split. Modules that hold one, and state dicts: ``refq4/nn``.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .functional import DEFAULT_BLOCKSIZE, quantize_4bit
from .internals.blockwise import slice_state
from .internals.checks import check_layers_shape
from .internals.prepared import Preparable
from .internals.state_fields import of_no_module, of_the_state
from .state import QuantState

__all__ = ["Params4bit"]

SETTINGS = ("blocksize", "compress_statistics", "quant_type", "quant_storage", "scales")


class Params4bit(Preparable, nn.Parameter):
    """A weight that is quantised the first time it is moved to a device (the CPU counts). Frozen.

    Before: ``data`` is the full-precision weight. After: ``data`` is the packed column [b, 1] in ``quant_storage``,
    and ``quant_state`` is set. Mirrors ``bitsandbytes.nn.Params4bit``.

    A dtype cast (``.half()``, ``.to(torch.bfloat16)``) changes a weight that is not quantised yet, and leaves a
    quantised one alone: its bytes are codes, whatever dtype they are stored under.

    The fields of the quant state are attributes as well, under their names in a state dict (``weight.absmax``).

    Args:
        data: the weight [N, K], or packed bytes together with ``quant_state`` and ``bnb_quantized=True``.
        requires_grad: leave it False: a packed weight has no gradient.
        quant_state: of an already packed weight.
        blocksize: elements per block; 64 if None.
        compress_statistics: double quantisation of the scales.
        quant_type: a codebook's name.
        quant_storage: dtype of the packed column.
        module: the layer that holds it; it gets a reference to the quant state, for step 1.
        bnb_quantized: ``data`` is packed.
        scales: "absmax" or "search", as in ``quantize_4bit``.
        others: other entries of a weight's ``__dict__``; accelerate copies a weight's settings with
            ``Params4bit(data, **weight.__dict__)``.

    Example:
        >>> weight = Params4bit(torch.randn(8, 64), quant_type="nf4")
        >>> weight.to("cpu").shape, weight.quant_state.shape
        (torch.Size([256, 1]), torch.Size([8, 64]))
    """

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_storage: torch.dtype
    quant_state: QuantState | None
    bnb_quantized: bool
    scales: str

    absmax = of_the_state("absmax", "absmax")
    code = of_the_state("code", "code")
    quant_map = of_the_state("quant_map", "code")
    offset = of_the_state("offset", "offset")
    state2 = of_the_state("state2", "state2")
    nested_offset = of_the_state("nested_offset", "offset")
    nested_absmax = of_the_state("nested_absmax", "absmax", second=True)
    nested_blocksize = of_the_state("nested_blocksize", "blocksize", second=True)
    nested_quant_map = of_the_state("nested_quant_map", "code", second=True)
    nested_dtype = of_the_state("nested_dtype", "dtype", second=True)
    _parameters = of_no_module()

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool | None = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: nn.Module | None = None,
        bnb_quantized: bool = False,
        *,
        scales: str = "absmax",
        **others: Any,
    ) -> Params4bit:
        if unknown := [name for name in others if not name.startswith("_")]:
            raise TypeError(f"Params4bit() got an unexpected keyword argument {unknown[0]!r}")
        if module is None and others.get("_module") is not None:
            module = others["_module"]()
        data = torch.empty(0) if data is None else data
        data = data.stored() if isinstance(data, Preparable) else data
        self: Params4bit = torch.Tensor._make_subclass(cls, data, requires_grad)
        self.blocksize = DEFAULT_BLOCKSIZE if blocksize is None else blocksize
        self.compress_statistics = bool(compress_statistics)
        self.quant_type, self.quant_storage = quant_type, quant_storage
        self.quant_state, self.bnb_quantized = quant_state, bnb_quantized
        self.scales = scales
        self.module = module
        self._form, self._restores = None, 0
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: dict[str, Any],
        requires_grad: bool = False,
        device: torch.device | str | None = None,
        module: nn.Module | None = None,
        *,
        allow_other_code: bool = False,
        allow_other_nested_blocksize: bool = False,
    ) -> Params4bit:
        """Make a parameter from packed bytes and the ``weight.*`` entries of a state dict (which are only read).

        Args:
            data: the packed weight.
            quantized_stats: what :meth:`QuantState.from_dict` takes.
            device: the parameter's device; by default that of ``data`` (bitsandbytes: "cuda").
            module: the parameter's layer; its shape must be the state's, and its quant state becomes this one.
            allow_other_code, allow_other_nested_blocksize: as in :meth:`QuantState.from_dict`.

        Raises:
            ValueError: the entries contradict each other, the packed weight or the layer; see
                ``QuantState.from_dict``. The layer is then as it was.

        Example:
            >>> from refq4.nn import LinearNF4
            >>> layer = LinearNF4(64, 8).to("cpu")
            >>> saved = layer.state_dict()
            >>> stats = {k: v for k, v in saved.items() if k.startswith("weight.")}
            >>> Params4bit.from_prequantized(saved["weight"], stats).quant_state == layer.weight.quant_state
            True
        """
        state = QuantState.from_dict(
            quantized_stats,
            device,
            packed=data,
            allow_other_code=allow_other_code,
            allow_other_nested_blocksize=allow_other_nested_blocksize,
        )
        wanted = getattr(module, "weight_shape", None)
        # What no state dict can show by itself: it was transposed, or is another layer's.
        if wanted is not None and state.shape != wanted:
            raise ValueError(
                f"{min(quantized_stats, key=len).rpartition('.')[0] or 'weight'}: the checkpoint holds {state}, this "
                f"{type(module).__name__} needs shape {list(wanted)}"
            )
        device = torch.device(device) if device is not None else data.device
        state = state.to(device)
        self = cls(
            data.detach().to(device), requires_grad, state, state.blocksize, state.nested, str(state.quant_type),
            data.dtype, module, bnb_quantized=True,
        )  # fmt: skip
        self._tell_module()
        return self

    # --- moving: the moment of quantisation -------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:
        """As ``Tensor.to``: a device quantises the weight; a dtype casts it only if it is not quantised yet."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if self.bnb_quantized:
            return self._moved(device, non_blocking)
        if device is None or device.type == "meta":
            cast = self.data.to(device=device, dtype=dtype, non_blocking=non_blocking)
            return self._like(cast, None)
        return self._quantize(self.data.to(device=device, dtype=dtype, non_blocking=non_blocking))

    def cpu(self) -> Params4bit:  # type: ignore[override]
        """``.to("cpu")``: quantises."""
        return self.to("cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False) -> Params4bit:  # type: ignore[override]
        """``.to("cuda")``: quantises."""
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def half(self) -> Params4bit:
        """``.to(torch.float16)``."""
        return self.to(torch.float16)

    def bfloat16(self) -> Params4bit:
        """``.to(torch.bfloat16)``."""
        return self.to(torch.bfloat16)

    def float(self) -> Params4bit:
        """``.to(torch.float32)``."""
        return self.to(torch.float32)

    def double(self) -> Params4bit:
        """``.to(torch.float64)``; such a weight can't be quantised."""
        return self.to(torch.float64)

    def type(self, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        """As ``Tensor.type``: without a dtype the name of the type; with one a cast, as ``.to(dtype)`` is.

        A type of another device (``torch.cuda.FloatTensor``) also moves, as it does there.
        """
        if dtype is None:
            return super().type()
        like = torch.empty(0, device=self.device).type(dtype)  # torch knows all the ways to name a type
        return self.to(like.device, like.dtype, non_blocking) if like.device != self.device else self.to(like.dtype)

    def _quantize(self, weight: Tensor) -> Params4bit:
        check_layers_shape(weight, self.module)
        self.data, self.quant_state = quantize_4bit(weight, **self._settings())
        self.bnb_quantized = True
        self._tell_module()
        return self

    def _moved(self, device: torch.device | None, non_blocking: bool) -> Params4bit:
        if device is None or device == self.device:
            return self
        state = None if self.quant_state is None else self.quant_state.copy().to(device)
        return self._like(self.stored().to(device, non_blocking=non_blocking), state)

    def _like(self, data: Tensor, state: QuantState | None) -> Params4bit:
        """The same settings around other data."""
        kept = {"module": self.module, "bnb_quantized": self.bnb_quantized, **self._settings()}
        return Params4bit(data, self.requires_grad, state, **kept)

    def _settings(self) -> dict[str, Any]:
        """What quantises the weight, as ``quantize_4bit`` takes it."""
        return {name: self.__dict__[name] for name in SETTINGS}

    # --- the layer that holds it: known by a weak reference, so that neither keeps the other alive ------------------

    @property
    def module(self) -> nn.Module | None:
        """The layer that holds this weight, if it still exists."""
        ref = self.__dict__.get("_module")
        return None if ref is None else ref()

    @module.setter
    def module(self, module: nn.Module | None) -> None:
        self.__dict__["_module"] = None if module is None else weakref.ref(module)

    def _tell_module(self) -> None:
        if self.module is not None:
            self.module.quant_state = self.quant_state  # type: ignore[assignment]

    # --- copies and pieces ------------------------------------------------------------------------------------------

    def __copy__(self) -> Params4bit:
        return self._like(self.stored(), self.quant_state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        new = self._like(copy.deepcopy(self.stored(), memo), copy.deepcopy(self.quant_state, memo))
        new.module = memo.get(id(self.module))
        memo[id(self)] = new
        return new

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        settings = {k: v for k, v in self.__dict__.items() if k not in ("_module", "_form", "_restores")}
        return _rebuild_params4bit, (self.stored(), self.requires_grad, settings)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        cls._before(func, args, kwargs or {})
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if func in _SPLITTERS and isinstance(args[0], Params4bit):
            return tuple(args[0]._piece(part) for part in result)
        return result

    def _piece(self, part: Tensor) -> Params4bit:
        """A part of this weight as a parameter of its own.

        A part of packed bytes that covers whole rows and whole blocks gets its own quant state. Any other cut gets
        none, as FSDP's shards want it: the state comes back from the module once the bytes are together again.
        """
        if not self.bnb_quantized or self.quant_state is None:
            return self._like(part, None)
        start = (part.storage_offset() - self.storage_offset()) * self.itemsize * 2
        stop = min(start + part.numel() * self.itemsize * 2, self.quant_state.geometry()[0].numel())
        return self._like(part, slice_state(self.quant_state, int(start), int(stop)) if part.is_contiguous() else None)


# A dict, for Dynamo of torch 2.8, as in internals/prepared.py.
_SPLITTERS = dict.fromkeys((torch.chunk, torch.split, torch.Tensor.chunk, torch.Tensor.split))


def _rebuild_params4bit(data: Tensor, requires_grad: bool, settings: dict[str, Any]) -> Params4bit:
    weight = Params4bit(data, requires_grad)
    weight.__dict__.update(settings)
    return weight


# so that torch.load(..., weights_only=True) takes a whole pickled layer's weight
torch.serialization.add_safe_globals([Params4bit, QuantState, _rebuild_params4bit])
