"""QuantState: everything besides the packed bytes that a quantised tensor needs to become numbers again.

In memory it is an object; in a state dict it is a handful of tensors beside the weight, under bitsandbytes' keys:

    weight                                     the packed bytes, [b, 1] in the storage dtype
    weight.absmax                              fp32 [blocks], or uint8 [blocks] with double quantisation
    weight.quant_map                           fp32 [16], the code
    weight.nested_absmax                       fp32 [ceil(blocks/256)]        (double quantisation only)
    weight.nested_quant_map                    fp32 [256]                     (double quantisation only)
    weight.quant_state.bitsandbytes__nf4       uint8 [L], UTF-8 JSON: quant_type, blocksize, dtype, shape
                                               and, nested: nested_blocksize, nested_dtype, nested_offset

What comes from a file is checked before it is believed: every field, every dtype, every length against the shape it
claims. A ValueError names the key, what was found and what was wanted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import layout
from .backend import Nested, PackedWeight
from .codebooks import codebook_names, create_dynamic_map, get_codebook
from .lending import LentBytes

__all__ = ["BLOCKSIZES", "NESTED_BLOCKSIZE", "WEIGHT_DTYPES", "QuantState"]

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES}
_JSON_KEY = "quant_state.bitsandbytes__"
_JSON_FIELDS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_JSON_FIELDS = ("nested_blocksize", "nested_dtype", "nested_offset")
_NESTED_TENSORS = ("nested_absmax", "nested_quant_map")
_MAX_NUMEL = 2**48  # no tensor is larger; keeps arithmetic on a file's claims small


class QuantState:
    """The scales, the code and the shape of one quantised tensor. Mirrors ``bitsandbytes.functional.QuantState``.

    Args:
        absmax: fp32 [blocks]; uint8 [blocks] when ``state2`` is given.
        shape: of the tensor that was quantised ([N, K] for a linear layer); None for an 8-bit blockwise state.
        code: fp32 [16] (4-bit) or [256] (8-bit), indexed by code.
        blocksize: elements per block.
        quant_type: the codebook's name; None for an 8-bit blockwise state.
        dtype: what dequantising gives back.
        offset: fp32 [], the mean that was taken off the scales before they were quantised.
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

    # --- to and from a state dict -----------------------------------------------------------------------------------

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The state as a dict, key for key and byte for byte as bitsandbytes writes it.

        Args:
            packed: put what is no tensor into one uint8 tensor of JSON (what a state dict wants).

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
        tensors[f"{_JSON_KEY}{self.quant_type}"] = _json_to_tensor(others)
        return tensors

    @classmethod
    def from_dict(
        cls,
        qs_dict: Mapping[str, Any],
        device: torch.device | str | None = None,
        *,
        packed: Tensor | None = None,
        allow_other_code: bool = False,
    ) -> QuantState:
        """The state back from :meth:`as_dict` or from the ``weight.*`` entries of a state dict; both forms work.

        Args:
            qs_dict: keys may carry prefixes (``model.layer.weight.absmax``). It is only read.
            device: where the state's tensors go; by default they stay where they are.
            packed: the packed weight, to check its size against the claimed shape.
            allow_other_code: accept a ``quant_map`` whose values are not those of the named codebook, and a
                ``nested_quant_map`` that is not the dynamic map (the values in the file are then used).

        Raises:
            ValueError: something is missing, unknown or contradicts something else; the message names the key, what
                was found and what was wanted.

        Example:
            >>> import torch, refq4.functional as F
            >>> _, state = F.quantize_4bit(torch.ones(64), quant_type="nf4", compress_statistics=True)
            >>> F.QuantState.from_dict(state.as_dict(packed=True)) == state
            True
        """
        return _Reader(qs_dict, allow_other_code).read(device, packed)

    # --- use --------------------------------------------------------------------------------------------------------

    def packed_weight(self, stored: Tensor) -> PackedWeight:
        """The canonical weight as a backend wants it.

        Args:
            stored: the packed tensor in any storage dtype and orientation.

        Raises:
            ValueError: its size does not fit the state's shape, or the state is no 4-bit state.
        """
        shape, blocksize = self.geometry()
        if isinstance(stored, LentBytes):
            stored = stored.readable()
        self.check_packed(stored)
        if self.code is None:
            raise ValueError("this QuantState has no code: make it with quantize_4bit or from_dict")
        packed, name = layout.from_storage(stored, shape.numel()), self.quant_type or "custom"
        return PackedWeight(packed, self.absmax, self.code, blocksize, tuple(shape), name, self._second_level())

    def geometry(self) -> tuple[torch.Size, int]:
        """Shape and blocksize of a 4-bit state; a ValueError for the state of an 8-bit blockwise tensor."""
        if self.shape is None or self.blocksize is None:
            raise ValueError(
                "this QuantState has no shape: it belongs to an 8-bit blockwise tensor, not to a 4-bit one"
            )
        return self.shape, self.blocksize

    def _second_level(self) -> Nested | None:
        if self.state2 is None:
            return None
        if self.offset is None or self.state2.code is None or self.state2.blocksize is None:
            raise ValueError("this QuantState is nested but lacks the offset, or the code or blocksize of its scales")
        return Nested(self.state2.absmax, self.state2.code, self.offset, self.state2.blocksize)

    def check_packed(self, stored: Tensor, key: str = "weight") -> None:
        """Raise a ValueError if ``stored`` can't be the packed bytes of this state's shape."""
        if stored.dtype not in layout.STORAGE_DTYPES:
            raise ValueError(f"{key}: a packed weight is stored as {_names(layout.STORAGE_DTYPES)}, got {stored.dtype}")
        shape, _ = self.geometry()
        wanted = -(-layout.packed_bytes(shape.numel()) // stored.dtype.itemsize)
        if stored.numel() != wanted:
            raise ValueError(
                f"{key}: shape {list(shape)} packs into {wanted} {_name(stored.dtype)} elements "
                f"(two codes a byte), got {stored.numel()} in shape {list(stored.shape)}"
            )

    def to(self, device: torch.device | str | None) -> QuantState:
        """Move the state's tensors to ``device``, in place as in bitsandbytes; returns the state itself."""
        if device is not None:
            self.absmax = self.absmax.to(device)
            self.code = None if self.code is None else self.code.to(device)
            self.offset = None if self.offset is None else self.offset.to(device)
            if self.state2 is not None:
                self.state2.to(device)
        return self

    def copy(self) -> QuantState:
        """A new state that shares this one's tensors."""
        state2 = None if self.state2 is None else self.state2.copy()
        return QuantState(
            self.absmax, self.shape, self.code, self.blocksize, self.quant_type, self.dtype, self.offset, state2
        )

    def nbytes(self) -> int:
        """Bytes of scales, codes and offset: what a quantised tensor costs besides its packed bytes."""
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
        return f"QuantState({shape}, {_name(self.dtype)}, blocksize {self.blocksize}{nested})"


class _Reader:
    """Reads one QuantState from a dict of unknown origin, checking each thing before it is used."""

    def __init__(self, source: Mapping[str, Any], allow_other_code: bool) -> None:
        self.allow_other_code = allow_other_code
        self.keys: dict[str, str] = {}  # field -> the caller's key, for messages
        self.items: dict[str, Any] = {}
        json_keys = [key for key in source if _JSON_KEY in key]
        if len(json_keys) > 1:
            raise ValueError(f"one quant_state entry expected, found {len(json_keys)}: {sorted(json_keys)}")
        for key, value in source.items():
            if key not in json_keys:
                self._add(key.rsplit(".", 1)[-1], key, value)
        if json_keys:
            self._add_json(json_keys[0], source[json_keys[0]])
        elif "quant_type" not in self.items:
            raise ValueError(
                f"no quantisation state here: neither a '{_JSON_KEY}<type>' entry nor a 'quant_type' among "
                f"{sorted(map(str, source))}"
            )

    def read(self, device: torch.device | str | None, packed: Tensor | None) -> QuantState:
        nested = any(name in self.items for name in (*_NESTED_TENSORS, *_NESTED_JSON_FIELDS))
        wanted = {*_JSON_FIELDS, "absmax", "quant_map"} | (
            {*_NESTED_TENSORS, *_NESTED_JSON_FIELDS} if nested else set()
        )
        self._check_fields(wanted)
        quant_type = self._quant_type()
        shape = self._shape()
        blocksize = self._blocksize("blocksize")
        blocks = layout.block_count(shape.numel(), blocksize)
        state = QuantState(
            absmax=self._tensor("absmax", torch.uint8 if nested else torch.float32, blocks, scales=not nested),
            shape=shape,
            code=self._code("quant_map", torch.tensor(get_codebook(quant_type).values)),
            blocksize=blocksize,
            quant_type=quant_type,
            dtype=self._dtype("dtype"),
        )
        if nested:
            blocksize2 = self._blocksize("nested_blocksize")
            blocks2 = layout.block_count(blocks, blocksize2)
            state.offset = torch.tensor(self._number("nested_offset"), dtype=torch.float32, device=state.absmax.device)
            state.state2 = QuantState(
                absmax=self._tensor("nested_absmax", torch.float32, blocks2, scales=True),
                code=self._code("nested_quant_map", create_dynamic_map(), _dynamic_map_of_old_cpu_builds()),
                blocksize=blocksize2,
                dtype=self._dtype("nested_dtype"),
            )
        if packed is not None:
            state.check_packed(packed)
        return state.to(device)

    # --- one thing at a time ----------------------------------------------------------------------------------------

    def _add(self, name: str, key: str, value: Any) -> None:
        if name in self.items:
            raise ValueError(f"{key}: {name!r} is there twice, also as {self.keys[name]}")
        self.items[name], self.keys[name] = value, key

    def _add_json(self, key: str, value: Any) -> None:
        self.json_type = key.rsplit("__", 1)[-1]
        for name, item in _tensor_to_json(value, key).items():
            self._add(name, f"{key} {name}", item)
        if self.items.get("quant_type") != self.json_type:
            raise ValueError(f"{key}: the key says {self.json_type!r}, the quant_type in it {self._raw('quant_type')}")

    def _check_fields(self, wanted: set[str]) -> None:
        missing, unknown = wanted - self.items.keys(), self.items.keys() - wanted
        if missing:
            raise ValueError(f"{', '.join(sorted(missing))}: missing; found {', '.join(sorted(self.items))}")
        if unknown:
            key = self.keys[min(unknown)]
            raise ValueError(f"{key}: not part of a quantisation state, which has {', '.join(sorted(wanted))}")

    def _raw(self, name: str) -> str:
        value = self.items.get(name)
        return _describe(value) if isinstance(value, Tensor) else repr(value)[:80]

    def _fail(self, name: str, wanted: str) -> ValueError:
        return ValueError(f"{self.keys[name]}: wanted {wanted}, got {self._raw(name)}")

    def _quant_type(self) -> str:
        value = self.items["quant_type"]
        if not isinstance(value, str) or value not in codebook_names():
            raise self._fail("quant_type", f"one of {codebook_names()} (register_codebook adds more)")
        return value

    def _shape(self) -> torch.Size:
        value = self.items["shape"]
        whole = isinstance(value, list | tuple) and len(value) <= 8 and all(type(n) is int and n >= 0 for n in value)
        if not whole or math.prod(value) > _MAX_NUMEL:
            raise self._fail(
                "shape", f"a list of whole numbers with a product of at most 2**{_MAX_NUMEL.bit_length() - 1}"
            )
        return torch.Size(value)

    def _blocksize(self, name: str) -> int:
        value = self.items[name]
        if type(value) is not int or value not in BLOCKSIZES:
            raise self._fail(name, f"one of {list(BLOCKSIZES)}")
        return value

    def _dtype(self, name: str) -> torch.dtype:
        value = self.items[name]
        if not isinstance(value, str) or value not in _DTYPE_NAMES:
            raise self._fail(name, f"one of {list(_DTYPE_NAMES)}")
        return _DTYPE_NAMES[value]

    def _number(self, name: str) -> float:
        value = self.items[name]
        if type(value) not in (int, float) or not abs(value) <= torch.finfo(torch.float32).max:
            raise self._fail(name, "a finite fp32 number")
        return float(value)

    def _tensor(self, name: str, dtype: torch.dtype, numel: int, scales: bool) -> Tensor:
        value = self.items[name]
        shape = list(self.items["shape"])
        if not isinstance(value, Tensor) or value.dtype != dtype or value.dim() != 1 or value.numel() != numel:
            where = f"for shape {shape} and blocksize {self.items['blocksize']}"
            raise self._fail(name, f"a {_name(dtype)} tensor of {numel} {where}")
        if scales and not value.is_meta and not bool((value.isfinite() & (value >= 0)).all()):
            at = int((~(value.isfinite() & (value >= 0))).nonzero()[0])
            raise ValueError(f"{self.keys[name]}: scales are finite and not negative, got {value[at].item()} at {at}")
        return value.detach()

    def _code(self, name: str, expected: Tensor, *variants: Tensor) -> Tensor:
        value = self.items[name]
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.shape != expected.shape:
            raise self._fail(name, f"a float32 tensor of {expected.numel()}")
        if value.is_meta:
            return value
        if not bool(value.isfinite().all()):
            raise self._fail(name, f"{expected.numel()} finite values")
        if not self.allow_other_code and not any(torch.equal(value.cpu(), known) for known in (expected, *variants)):
            at = int((value.cpu() != expected).nonzero()[0])
            raise ValueError(
                f"{self.keys[name]}: entry {at} is {value[at].item()}, the published table has {expected[at].item()}; "
                f"pass allow_other_code=True to decode with the values in the file"
            )
        return value.detach()


def _dynamic_map_of_old_cpu_builds() -> Tensor:
    """The map in nested checkpoints that bitsandbytes up to 0.49 wrote on a CPU: its smallest entry is -1 there."""
    table = create_dynamic_map()
    table[0] = -1.0
    return table


def _json_to_tensor(items: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(items).encode()), dtype=torch.uint8)


def _tensor_to_json(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.dim() != 1 or value.is_meta:
        raise ValueError(f"{key}: wanted JSON in a uint8 tensor of one dimension, got {_describe(value)}")
    try:
        items = json.loads(bytes(value.tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}: wanted UTF-8 JSON, got {type(error).__name__}: {str(error)[:80]}") from None
    if not isinstance(items, dict):
        raise ValueError(f"{key}: wanted a JSON object, got {type(items).__name__}")
    return items


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return False
        alike = a.device == b.device and a.dtype == b.dtype and a.shape == b.shape
        return alike and (a is b or (not a.is_meta and torch.equal(a, b)))
    return bool(a == b)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(map(_name, dtypes))


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{_name(value.dtype)} {list(value.shape)}"
    return f"{type(value).__name__} {value!r}"[:80]
