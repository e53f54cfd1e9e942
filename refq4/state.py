"""QuantState: everything that is needed, besides the packed bytes, to decode a quantised tensor.

In memory it is an object; in a state dict it is a handful of tensors beside the weight, under bitsandbytes' keys. That
form, and the checks of a file before it is used, are in ``refq4/internals/statedict.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import layout
from .backend import Nested, PackedWeight
from .internals.checks import check_packed, check_positive, checked_weight
from .internals.format import BLOCKSIZES, JSON_KEY, NESTED_BLOCKSIZE, WEIGHT_DTYPES, dtype_name
from .internals.prepared import Preparable
from .internals.statedict import Reader, json_to_tensor

__all__ = ["BLOCKSIZES", "NESTED_BLOCKSIZE", "WEIGHT_DTYPES", "QuantState"]


class QuantState:
    """The scales, the code and the shape of one quantised tensor. Mirrors ``bitsandbytes.functional.QuantState``.

    Args:
        absmax: fp32 [blocks]; uint8 [blocks] when ``state2`` is given.
        shape: of the tensor that was quantised ([N, K] for a linear layer); None for an 8-bit blockwise state.
        code: fp32 [16] (4-bit) or [256] (8-bit), indexed by code.
        blocksize: elements per block.
        quant_type: the codebook's name; None for an 8-bit blockwise state.
        dtype: the dtype of the decoded tensor.
        offset: fp32 [], the mean that was subtracted from the scales before they were quantised.
        state2: the 8-bit state of the scales (double quantisation), with fp32 ``absmax``.

    Example:
        >>> import torch, refq4.functional as F
        >>> packed, state = F.quantize_4bit(torch.randn(4, 64), quant_type="nf4")
        >>> state.shape, state.absmax.shape, state.nested
        (torch.Size([4, 64]), torch.Size([4]), False)
    """

    def __init__(
        self,
        absmax: Tensor,
        shape: torch.Size | tuple[int, ...] | None = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        self.absmax = absmax
        self.shape = shape if shape is None else torch.Size(shape)
        self.code = code
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.dtype = dtype
        self.offset = offset
        self.state2 = state2

    @property
    def nested(self) -> bool:
        """Whether the scales themselves are quantised."""
        return self.state2 is not None

    def __getattr__(self, name: str) -> Tensor:
        """The JSON tensor, under the last part of its state-dict key: FSDP looks keys up attribute by attribute."""
        if f"quant_state.{name}" == f"{JSON_KEY}{self.__dict__.get('quant_type')}":
            found: Tensor = self.as_dict(packed=True)[f"quant_state.{name}"]
            return found
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    # --- to and from a state dict -----------------------------------------------------------------------------------

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """Return the state as a dict, key for key and byte for byte as bitsandbytes writes it.

        Args:
            packed: put the values that are not tensors into one uint8 tensor of JSON, as a state dict needs them.

        Example:
            >>> import torch, refq4.functional as F
            >>> _, state = F.quantize_4bit(torch.ones(64), quant_type="nf4")
            >>> sorted(state.as_dict(packed=True))
            ['absmax', 'quant_map', 'quant_state.bitsandbytes__nf4']
        """
        if self.shape is None or self.code is None:
            raise ValueError("only the state of a 4-bit tensor has a state-dict form; this one has no shape or no code")
        items: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": tuple(self.shape),
        }
        nested = self._second_level()
        if nested is not None:
            items |= {
                "nested_absmax": nested.absmax,
                "nested_blocksize": nested.blocksize,
                # a copy of its own: savers that drop shared tensors would drop it from all layers but one
                "nested_quant_map": nested.code.clone(),
                "nested_dtype": "float32",
                "nested_offset": nested.offset.item(),
            }
        if not packed:
            return items
        tensors = {key: value for key, value in items.items() if isinstance(value, Tensor)}
        others = {key: value for key, value in items.items() if not isinstance(value, Tensor)}
        tensors[f"{JSON_KEY}{self.quant_type}"] = json_to_tensor(others)
        return tensors

    @classmethod
    def from_dict(
        cls,
        qs_dict: Mapping[str, Any],
        device: torch.device | str | None = None,
        *,
        packed: Tensor | None = None,
        allow_other_code: bool = False,
        allow_other_nested_blocksize: bool = False,
    ) -> QuantState:
        """Make a state from :meth:`as_dict` or from the ``weight.*`` entries of a state dict; both forms work.

        Args:
            qs_dict: keys may carry a prefix, the same for all (``model.layer.weight.absmax``). It is only read.
            device: where the state's tensors go; by default they stay where they are.
            packed: the packed weight, to check its size against the claimed shape.
            allow_other_code: accept a ``quant_map`` whose values are not those of the named codebook, and a
                ``nested_quant_map`` that is not the dynamic map (the values in the file are then used).
            allow_other_nested_blocksize: accept scales that were quantised in blocks of another size than 256, which no
                layer of bitsandbytes or refq4 writes, but a state made by hand can have.

        Raises:
            ValueError: an entry is missing, unknown or contradicts another one; the message names the key, what was
                found and what was expected.

        Example:
            >>> import torch, refq4.functional as F
            >>> _, state = F.quantize_4bit(torch.ones(64), quant_type="nf4", compress_statistics=True)
            >>> F.QuantState.from_dict(state.as_dict(packed=True)) == state
            True
        """
        return Reader(qs_dict, allow_other_code, allow_other_nested_blocksize).read(cls, device, packed)

    # --- use --------------------------------------------------------------------------------------------------------

    def packed_weight(self, stored: Tensor) -> PackedWeight:
        """Return the canonical weight in the form that a backend needs.

        Args:
            stored: the packed tensor in any storage dtype and orientation.

        Raises:
            ValueError: its size does not fit the state's shape, the state is no 4-bit state, or its scales and tables
                are not as many as shape and blocksize want.
        """
        shape, blocksize = self.geometry()
        if isinstance(stored, Preparable):
            stored = stored.readable()
        check_packed(stored, shape)
        if self.code is None:
            raise ValueError("this QuantState has no code: make it with quantize_4bit or from_dict")
        packed, name = layout.from_storage(stored, shape.numel()), self.quant_type or "custom"
        second = self._second_level()
        return checked_weight(PackedWeight(packed, self.absmax, self.code, blocksize, tuple(shape), name, second))

    def geometry(self) -> tuple[torch.Size, int]:
        """Shape and blocksize of a 4-bit state; a ValueError for the state of an 8-bit blockwise tensor."""
        if self.shape is None or self.blocksize is None:
            raise ValueError(
                "this QuantState has no shape: it belongs to an 8-bit blockwise tensor, not to a 4-bit one"
            )
        check_positive("blocksize", self.blocksize)
        if type(self.shape) is torch.Size:  # as a rule: this is asked several times in every forward
            return self.shape, self.blocksize
        try:
            return torch.Size(self.shape), self.blocksize
        except TypeError:
            raise ValueError(f"this QuantState has no shape but {self.shape!r}") from None

    def _second_level(self) -> Nested | None:
        if self.state2 is None:
            return None
        if self.offset is None or self.state2.code is None or self.state2.blocksize is None:
            raise ValueError("this QuantState is nested but lacks the offset, or the code or blocksize of its scales")
        return Nested(self.state2.absmax, self.state2.code, self.offset, self.state2.blocksize)

    def check_packed(self, stored: Tensor, key: str = "weight") -> None:
        """Raise a ValueError if ``stored`` can't be the packed bytes of this state's shape."""
        check_packed(stored, self.geometry()[0], key)

    def to(self, device: torch.device | str | None) -> QuantState:
        """Move the state's tensors to ``device``, in place as in bitsandbytes; returns the state itself."""
        if device is not None:
            for name in ("absmax", "code", "offset", "state2"):
                here = getattr(self, name)
                setattr(self, name, None if here is None else here.to(device))
        return self

    def copy(self) -> QuantState:
        """A new state that shares this one's tensors."""
        state2 = None if self.state2 is None else self.state2.copy()
        return QuantState(
            self.absmax, self.shape, self.code, self.blocksize, self.quant_type, self.dtype, self.offset, state2
        )

    def nbytes(self) -> int:
        """Return the bytes of scales, codes and offset: the size of a quantised tensor besides its packed bytes."""
        tensors = [t for t in (self.absmax, self.code, self.offset) if t is not None]
        return sum(t.numel() * t.itemsize for t in tensors) + (self.state2.nbytes() if self.state2 is not None else 0)

    def __getitem__(self, index: int | slice) -> Any:
        """The list form of old bitsandbytes: [absmax, shape, dtype, blocksize, [offset, state2] or None, type]."""
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    def __eq__(self, other: object) -> bool:
        """Same fields, same bits, same devices; False for anything else, and never an error."""
        if not isinstance(other, QuantState):
            return False
        mine, theirs = self.__dict__, other.__dict__
        return mine.keys() == theirs.keys() and all(_same(mine[key], theirs[key]) for key in mine)

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        shape = "8-bit" if self.shape is None else f"{self.quant_type} {list(self.shape)}"
        nested = ", double quantisation" if self.nested else ""
        return f"QuantState({shape}, {dtype_name(self.dtype)}, blocksize {self.blocksize}{nested})"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.device == b.device and a.dtype == b.dtype and a.shape == b.shape
        return alike and (a is b or (not a.is_meta and torch.equal(a, b)))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)
