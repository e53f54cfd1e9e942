"""The layers: a parameter that quantises itself when it is moved, and the modules that hold one.

    layer = Linear4bit(4096, 11008, quant_type="nf4")
    layer.load_state_dict(...)            full-precision weights, or a bitsandbytes 4-bit state dict
    layer.to("cpu")                       a full-precision weight is quantised here
    layer(x)                              the seven steps of refq4/pipeline.py

The names, arguments and state-dict keys are those of ``bitsandbytes.nn``. What a layer does is in the pipeline; this
file is about parameters: how they are quantised, moved, copied, split, saved and loaded.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import pipeline
from .checks import warn_caller
from .quantization import DEFAULT_BLOCKSIZE, quantize_4bit, slice_state
from .state import QuantState

__all__ = ["Embedding4bit", "EmbeddingFP4", "EmbeddingNF4", "Linear4bit", "LinearFP4", "LinearNF4", "Params4bit"]


class Params4bit(nn.Parameter):
    """A weight that is quantised the first time it is moved to a device (the CPU counts). Frozen.

    Before: ``data`` is the full-precision weight. After: ``data`` is the packed column [b, 1] in ``quant_storage``,
    and ``quant_state`` is set. Mirrors ``bitsandbytes.nn.Params4bit``.

    A dtype cast (``.half()``, ``.to(torch.bfloat16)``) changes a weight that is not quantised yet, and leaves a
    quantised one alone: its bytes are codes, whatever dtype they are stored under.

    Args:
        data: the weight [N, K], or packed bytes together with ``quant_state`` and ``bnb_quantized=True``.
        requires_grad: leave it False: a packed weight has no gradient.
        quant_state: of an already packed weight.
        blocksize: elements per block; 64 if None.
        compress_statistics: double quantisation of the scales.
        quant_type: a codebook's name.
        quant_storage: dtype of the packed column.
        module: the layer that holds it; it is told the quant state, so that it can give it back (step 1).
        bnb_quantized: ``data`` is packed.

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
    ) -> Params4bit:
        data = torch.empty(0) if data is None else data
        self: Params4bit = torch.Tensor._make_subclass(cls, data, requires_grad)
        self.blocksize = DEFAULT_BLOCKSIZE if blocksize is None else blocksize
        self.compress_statistics = bool(compress_statistics)
        self.quant_type = quant_type
        self.quant_storage = quant_storage
        self.quant_state = quant_state
        self.bnb_quantized = bnb_quantized
        self.module = module
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: dict[str, Any],
        requires_grad: bool = False,
        device: torch.device | str | None = None,
        module: nn.Module | None = None,
    ) -> Params4bit:
        """A parameter from packed bytes and the ``weight.*`` entries of a state dict (which are only read).

        Args:
            data: the packed weight.
            quantized_stats: what :meth:`QuantState.from_dict` takes.
            device: where it goes; by default it stays where ``data`` is (bitsandbytes: "cuda").

        Raises:
            ValueError: the entries contradict each other or the packed weight; see ``QuantState.from_dict``.

        Example:
            >>> layer = LinearNF4(64, 8).to("cpu")
            >>> saved = layer.state_dict()
            >>> stats = {k: v for k, v in saved.items() if k.startswith("weight.")}
            >>> Params4bit.from_prequantized(saved["weight"], stats).quant_state == layer.weight.quant_state
            True
        """
        device = torch.device(device) if device is not None else data.device
        state = QuantState.from_dict(quantized_stats, device, packed=data)
        self = cls(
            data.detach().to(device),
            requires_grad,
            state,
            state.blocksize,
            state.nested,
            str(state.quant_type),
            data.dtype,
            module,
            bnb_quantized=True,
        )
        self._tell_module()
        return self

    # --- moving: the moment of quantisation -------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:
        """As ``Tensor.to``; a device quantises, a dtype only casts what is not quantised yet."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if self.bnb_quantized:
            return self._moved(device, non_blocking)
        if device is None or device.type == "meta":
            cast = self.data.to(device=device, dtype=dtype, non_blocking=non_blocking)
            return self._like(cast, self.quant_state)
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

    def _quantize(self, weight: Tensor) -> Params4bit:
        packed, state = quantize_4bit(
            weight,
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        self.data = packed
        self.quant_state = state
        self.bnb_quantized = True
        self._tell_module()
        return self

    def _moved(self, device: torch.device | None, non_blocking: bool) -> Params4bit:
        if device is None or device == self.device:
            return self
        state = None if self.quant_state is None else self.quant_state.copy().to(device)
        return self._like(self.data.to(device, non_blocking=non_blocking), state)

    def _like(self, data: Tensor, state: QuantState | None) -> Params4bit:
        """The same settings around other data."""
        return Params4bit(
            data,
            self.requires_grad,
            state,
            self.blocksize,
            self.compress_statistics,
            self.quant_type,
            self.quant_storage,
            self.module,
            self.bnb_quantized,
        )

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
        if isinstance(self.module, _Holds4bitWeight):
            self.module.quant_state = self.quant_state

    # --- copies and pieces ------------------------------------------------------------------------------------------

    def __copy__(self) -> Params4bit:
        return self._like(self.data, self.quant_state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        if id(self) not in memo:
            new = self._like(copy.deepcopy(self.data, memo), copy.deepcopy(self.quant_state, memo))
            new.module = memo.get(id(self.module)) if self.module is not None else None
            memo[id(self)] = new
        found: Params4bit = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        settings = {k: v for k, v in self.__dict__.items() if k != "_module"}
        return _rebuild_params4bit, (self.data, self.requires_grad, settings)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
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
            return self._like(part, self.quant_state)
        start = (part.storage_offset() - self.storage_offset()) * self.itemsize * 2
        stop = min(start + part.numel() * self.itemsize * 2, self.quant_state.geometry()[0].numel())
        return self._like(part, slice_state(self.quant_state, int(start), int(stop)) if part.is_contiguous() else None)


_SPLITTERS = {torch.chunk, torch.split, torch.Tensor.chunk, torch.Tensor.split}


def _rebuild_params4bit(data: Tensor, requires_grad: bool, settings: dict[str, Any]) -> Params4bit:
    weight = Params4bit(data, requires_grad)
    weight.__dict__.update(settings)
    return weight


# so that torch.load(..., weights_only=True) takes a whole pickled layer's weight
torch.serialization.add_safe_globals([Params4bit, QuantState, _rebuild_params4bit])


class _Holds4bitWeight(nn.Module):
    """What Linear4bit and Embedding4bit share: moving, saving and loading a module with a Params4bit ``weight``."""

    weight: Any  # a Params4bit, until something rebuilds it as a plain parameter
    quant_state: QuantState | None

    def _hold(self, **settings: Any) -> None:
        """Turn the full-precision ``weight`` that the base class made into a Params4bit."""
        self.quant_state = None
        self.quant_storage = settings["quant_storage"]
        self._prepared: pipeline.PreparedCache | None = None
        self.weight = Params4bit(self.weight.data, requires_grad=False, module=self, **settings)

    def _weight_shape(self) -> torch.Size:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": None}  # another process or copy makes its own

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moving the module: the weight keeps its identity, and its quant state goes where the bytes go.

        torch would copy only ``.data`` from the moved parameter into the old one.
        """
        weight = self.weight
        if not isinstance(weight, Params4bit):  # rebuilt from its bytes: the state is the module's
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            if self.quant_state is not None:
                self.quant_state = self.quant_state.copy().to(self.weight.device)
            return self
        with torch.no_grad():
            moved = fn(weight)
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters["weight"] = weight
        if moved is not weight:
            self._adopt(weight, moved)
        self.quant_state = self.weight.quant_state
        return self

    def _adopt(self, weight: Params4bit, moved: Tensor) -> None:
        """Make ``weight`` what ``moved`` is; a new parameter only where torch can't exchange the data (meta)."""
        if isinstance(moved, Params4bit):
            state, quantised = moved.quant_state, moved.bnb_quantized
        else:
            state, quantised = weight.quant_state, weight.bnb_quantized
            state = None if state is None else state.copy().to(moved.device)
        if torch._has_compatible_shallow_copy_type(weight, moved):
            weight.data = moved.data
            weight.quant_state, weight.bnb_quantized = state, quantised
        else:
            self.weight = weight._like(moved.data, state)

    # --- state dicts ------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # weight (and bias): the canonical bytes
        state = getattr(self.weight, "quant_state", None) or self.quant_state
        if state is not None:
            for key, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

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
        own = f"{prefix}weight"
        stats = {key: value for key, value in state_dict.items() if key.startswith(f"{own}.")}
        incoming = state_dict.get(own)
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        if stats and incoming is None:
            missing_keys.append(own)
        elif stats:
            self._load_packed(state_dict[own], stats, assign)
        elif incoming is not None and getattr(self.weight, "bnb_quantized", False):
            self._load_full_precision(incoming, own, error_msgs)
        else:
            args = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            return super()._load_from_state_dict(state_dict, prefix, *args)
        # everything but the weight the usual way; keys that start with "weight" are dealt with
        others = {key: value for key, value in state_dict.items() if key != own and key not in stats}
        reported = len(missing_keys)
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        missing_keys[reported:] = [key for key in missing_keys[reported:] if key != own]
        return None

    def _load_packed(self, packed: Tensor, stats: dict[str, Any], assign: bool) -> None:
        device = packed.device if assign or self.weight.is_meta else self.weight.device
        weight = Params4bit.from_prequantized(packed, stats, device=device, module=self)
        state = weight.quant_state
        if state is None or state.shape != self._weight_shape():
            raise ValueError(
                f"{min(stats, key=len).rpartition('.')[0]}: the checkpoint holds {state}, this "
                f"{type(self).__name__} wants shape {list(self._weight_shape())}"
            )
        if not assign:  # as torch's copy_: the caller's tensors stay the caller's
            weight.data = weight.data.clone()
            weight.quant_state = copy.deepcopy(weight.quant_state)
        self.weight = weight
        self.quant_state = weight.quant_state

    def _load_full_precision(self, incoming: Tensor, key: str, error_msgs: list[str]) -> None:
        if incoming.shape != self._weight_shape():
            error_msgs.append(
                f"size mismatch for {key}: a full-precision weight of shape {list(self._weight_shape())} or a packed "
                f"one with its quant_state entries is wanted, got {list(incoming.shape)} without them"
            )
            return
        assert isinstance(self.weight, Params4bit)
        fresh = self.weight._like(incoming.detach(), None)
        fresh.bnb_quantized = False
        self.weight = fresh.to(self.weight.device)


class Linear4bit(_Holds4bitWeight, nn.Linear):
    """A linear layer with a 4-bit weight. Mirrors ``bitsandbytes.nn.Linear4bit``; QLoRA, section 3.

    Args:
        input_features: K.
        output_features: N.
        bias: add a bias [N]; it keeps its own dtype.
        compute_dtype: dtype of the product; inferred from the first input if None.
        compress_statistics: double quantisation of the scales.
        quant_type: a codebook's name ("nf4", "fp4", ...).
        quant_storage: dtype the packed bytes are stored under.
        device: as in ``nn.Linear``.
        blocksize: elements per block; 64 if None (not in bitsandbytes).

    Example:
        >>> layer = Linear4bit(64, 8, quant_type="nf4").to("cpu")
        >>> layer(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
        *,
        blocksize: int | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self.awaits_first_input = True
        self._hold(
            blocksize=blocksize,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, **settings: Any) -> Linear4bit:
        """A quantised layer from a full-precision one, on the same device; the bias is shared, not copied.

        Args:
            linear: left as it is.
            settings: ``quant_type``, ``compress_statistics``, ``compute_dtype``, ``quant_storage``, ``blocksize``.

        Example:
            >>> Linear4bit.from_linear(nn.Linear(64, 8), quant_type="nf4").weight.shape
            torch.Size([256, 1])
        """
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta", **settings)
        layer.bias = linear.bias
        weight = layer.weight
        assert isinstance(weight, Params4bit)
        layer.weight = weight._like(linear.weight.detach(), None).to(linear.weight.device)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype; see ``refq4.pipeline.linear_4bit``."""
        return pipeline.linear_4bit(self, x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_settings(self.weight)}, compute_dtype={self.compute_dtype}"

    def _weight_shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))


class LinearNF4(Linear4bit):
    """:class:`Linear4bit` with ``quant_type="nf4"``.

    Example:
        >>> LinearNF4(64, 8).weight.quant_type
        'nf4'
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
        *,
        blocksize: int | None = None,
    ) -> None:
        super().__init__(
            input_features,
            output_features,
            bias,
            compute_dtype,
            compress_statistics,
            "nf4",
            quant_storage,
            device,
            blocksize=blocksize,
        )


class LinearFP4(Linear4bit):
    """:class:`Linear4bit` with ``quant_type="fp4"``.

    Example:
        >>> LinearFP4(64, 8).weight.quant_type
        'fp4'
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
        *,
        blocksize: int | None = None,
    ) -> None:
        super().__init__(
            input_features,
            output_features,
            bias,
            compute_dtype,
            compress_statistics,
            "fp4",
            quant_storage,
            device,
            blocksize=blocksize,
        )


class Embedding4bit(_Holds4bitWeight, nn.Embedding):
    """An embedding with a 4-bit table. Mirrors ``bitsandbytes.nn.Embedding4bit``; unlike there, it can be saved.

    Args:
        num_embeddings: V.
        embedding_dim: D; where it is no multiple of the blocksize, each call decodes the whole table.
        dtype: of the result.
        quant_type, quant_storage, device: as in :class:`Linear4bit`.

    Warns:
        UserWarning: D is no multiple of the blocksize.

    Example:
        >>> table = Embedding4bit(100, 64, quant_type="nf4").to("cpu")
        >>> table(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 64])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self._hold(compress_statistics=False, quant_type=quant_type, quant_storage=quant_storage)
        if embedding_dim % DEFAULT_BLOCKSIZE:
            warn_caller(
                f"embedding_dim {embedding_dim} is no multiple of the blocksize {DEFAULT_BLOCKSIZE}: each call will "
                f"decode the whole table"
            )

    def forward(self, input: Tensor) -> Tensor:
        """Ids of any shape -> [*ids.shape, D]; see ``refq4.pipeline.embedding_4bit``."""
        return pipeline.embedding_4bit(self, input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_settings(self.weight)}"

    def _weight_shape(self) -> torch.Size:
        return torch.Size((self.num_embeddings, self.embedding_dim))


class EmbeddingNF4(Embedding4bit):
    """:class:`Embedding4bit` with ``quant_type="nf4"``.

    Example:
        >>> EmbeddingNF4(10, 64).weight.quant_type
        'nf4'
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)


class EmbeddingFP4(Embedding4bit):
    """:class:`Embedding4bit` with ``quant_type="fp4"``.

    Example:
        >>> EmbeddingFP4(10, 64).weight.quant_type
        'fp4'
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


def _settings(weight: nn.Parameter) -> str:
    if not isinstance(weight, Params4bit):
        return "packed"
    nested = ", double quantisation" if weight.compress_statistics else ""
    pending = "" if weight.bnb_quantized else ", not quantised yet"
    return f"{weight.quant_type}, blocksize={weight.blocksize}{nested}{pending}"
