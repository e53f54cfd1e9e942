"""The form a QuantState takes in a state dict, and the reader that believes nothing in it before it is checked.

    weight                                     the packed bytes, [b, 1] in the storage dtype
    weight.absmax                              fp32 [blocks], or uint8 [blocks] with double quantisation
    weight.quant_map                           fp32 [16], the code
    weight.nested_absmax                       fp32 [ceil(blocks/256)]        (double quantisation only)
    weight.nested_quant_map                    fp32 [256]                     (double quantisation only)
    weight.quant_state.bitsandbytes__nf4       uint8 [L], UTF-8 JSON: quant_type, blocksize, dtype, shape
                                               and, nested: nested_blocksize, nested_dtype, nested_offset

The keys are bitsandbytes'. Every field, every dtype and every length is checked against the shape that the file claims,
and the checks look at what the tensors hold: no memory is allocated because a file claims a size. Whatever is wrong,
a ValueError names the key, what was found and what was wanted. How that is tested: docs/hardening.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import layout
from ..codebooks import codebook_names, get_codebook
from .checks import check_packed
from .dynamic_map import stored_dynamic_maps
from .format import (
    BLOCKSIZES,
    JSON_KEY,
    MAX_NUMEL,
    NESTED_BLOCKSIZE,
    WEIGHT_DTYPES,
    article,
    describe,
    dtype_name,
    shown,
)

if TYPE_CHECKING:
    from ..state import QuantState

__all__ = ["Reader", "json_to_tensor"]

FIELDS = {"quant_type", "blocksize", "dtype", "shape", "absmax", "quant_map"}
NESTED_FIELDS = {"nested_blocksize", "nested_dtype", "nested_offset", "nested_absmax", "nested_quant_map"}
DTYPES = {dtype_name(dtype): dtype for dtype in WEIGHT_DTYPES}
MAX_JSON = 2**16  # bytes; bitsandbytes writes about 200


class Reader:
    """Reads one QuantState from a dict of unknown origin, checking each thing before it is used.

    Args:
        source, allow_other_code, allow_other_nested_blocksize: as in :meth:`QuantState.from_dict`.
    """

    def __init__(self, source: Mapping[str, Any], allow_other_code: bool, allow_other_nested_blocksize: bool) -> None:
        if not isinstance(source, Mapping):
            raise ValueError(f"expected a dict of the weight's entries, got {describe(source)}")
        self.allow_other_code = allow_other_code
        self.nested_blocksizes = BLOCKSIZES if allow_other_nested_blocksize else (NESTED_BLOCKSIZE,)
        self.keys: dict[str, str] = {}  # field -> the caller's key, for messages
        self.items: dict[str, Any] = {}
        self.prefix: str | None = None
        for key, value in source.items():
            if not isinstance(key, str):
                raise ValueError(f"{shown(key)}: keys are text, this one is {article(key)}")
            before, found, _ = key.rpartition(JSON_KEY)
            if found and (not before or before.endswith(".")):
                self._same_prefix(key, before.removesuffix("."))
                self._add_json(key, value)
            else:
                prefix, _, name = key.rpartition(".")
                self._add(name, key, value)
                self._same_prefix(key, prefix)
        if "quant_type" not in self.items:
            raise ValueError(
                f"no quantisation state here: neither a '{JSON_KEY}<type>' entry nor a 'quant_type' among "
                f"{shown(sorted(source))}"
            )

    def read(self, new: type[QuantState], device: torch.device | str | None, packed: Tensor | None) -> QuantState:
        """A ``new`` state; ``device`` and ``packed`` as in :meth:`QuantState.from_dict`."""
        nested = bool(NESTED_FIELDS & self.items.keys())
        self._check_fields(FIELDS | NESTED_FIELDS if nested else FIELDS)
        quant_type: str = self._one_of("quant_type", codebook_names(), " (register_codebook adds more)")
        shape, blocksize = self._shape(), self._one_of("blocksize", BLOCKSIZES)
        blocks = layout.block_count(shape.numel(), blocksize)
        state = new(
            absmax=self._scales("absmax", torch.uint8 if nested else torch.float32, blocks),
            shape=shape,
            code=self._code("quant_map", get_codebook(quant_type).on("cpu").values),
            blocksize=blocksize,
            quant_type=quant_type,
            dtype=DTYPES[self._one_of("dtype", DTYPES)],
        )
        if nested:
            offset = self._offset("nested_offset")
            state.offset = torch.tensor(offset, dtype=torch.float32, device=state.absmax.device)
            state.state2 = self._second_level(new, blocks)
        if packed is not None:
            self._check_packed(packed, shape)
        self._check_devices(device, packed)
        return state.to(device)

    def _second_level(self, new: type[QuantState], blocks: int) -> QuantState:
        hint = "; allow_other_nested_blocksize=True takes any that a blocksize can be"
        blocksize = self._one_of("nested_blocksize", self.nested_blocksizes, hint)
        self._one_of("nested_dtype", ["float32"])
        return new(
            absmax=self._scales("nested_absmax", torch.float32, layout.block_count(blocks, blocksize)),
            code=self._code("nested_quant_map", *stored_dynamic_maps()),
            blocksize=blocksize,
            dtype=torch.float32,
        )

    # --- which entries there are ------------------------------------------------------------------------------------

    def _same_prefix(self, key: str, prefix: str) -> None:
        if self.prefix is None:
            self.prefix = prefix
        elif prefix != self.prefix:
            raise ValueError(
                f"{_label(key)}: belongs to {_label(prefix)!r}, entries before it to {_label(self.prefix)!r}; "
                f"give the entries of one weight"
            )

    def _add(self, name: str, key: str, value: Any) -> None:
        if name in self.items:
            raise ValueError(f"{_label(key)}: {_label(name)!r} is there twice, also as {self.keys[name]}")
        self.items[name], self.keys[name] = value, _label(key)

    def _add_json(self, key: str, value: Any) -> None:
        for name, item in _tensor_to_json(value, _label(key)).items():
            self._add(name, f"{key} {name}", item)
        json_type = key.rpartition(JSON_KEY)[2]
        if self.items.get("quant_type") != json_type:
            raise ValueError(
                f"{_label(key)}: the key says {_label(json_type)!r}, the quant_type in it "
                f"{shown(self.items.get('quant_type'))}"
            )

    def _check_fields(self, wanted: set[str]) -> None:
        missing, unknown = wanted - self.items.keys(), self.items.keys() - wanted
        if missing:
            found = ", ".join(sorted(map(_label, self.items)))
            raise ValueError(f"{', '.join(sorted(missing))}: missing; found {found}")
        if unknown:
            key = self.keys[min(unknown)]
            raise ValueError(f"{key}: not part of a quantisation state, which has {', '.join(sorted(wanted))}")

    # --- one thing at a time ----------------------------------------------------------------------------------------

    def _fail(self, name: str, wanted: str) -> ValueError:
        item = self.items[name]
        return ValueError(
            f"{self.keys[name]}: expected {wanted}, got {describe(item) if isinstance(item, Tensor) else shown(item)}"
        )

    def _one_of(self, name: str, allowed: Collection[Any], hint: str = "") -> Any:
        value = self.items[name]
        if type(value) not in (str, int) or value not in allowed:
            raise self._fail(name, f"one of {list(allowed)}{hint}")
        return value

    def _shape(self) -> torch.Size:
        value = self.items["shape"]
        whole = isinstance(value, list | tuple) and len(value) <= 8
        whole = whole and all(type(n) is int and 0 <= n <= MAX_NUMEL for n in value)
        if not whole or math.prod(value) > MAX_NUMEL:
            limit = f"2**{MAX_NUMEL.bit_length() - 1}"
            raise self._fail("shape", f"a list of at most 8 whole numbers with a product of at most {limit}")
        return torch.Size(value)

    def _offset(self, name: str) -> float:
        value = self.items[name]  # the mean of scales, so not negative
        if type(value) not in (int, float) or not 0 <= value <= torch.finfo(torch.float32).max:
            raise self._fail(name, "a finite fp32 number that is not negative")
        return float(value)

    def _row(self, name: str, dtype: torch.dtype, numel: int, where: str = "") -> Tensor:
        """A tensor of one dimension that is as long as it must be, and has its memory."""
        value = self.items[name]
        if not _is_row(value, dtype, numel):
            raise self._fail(name, f"a {dtype_name(dtype)} tensor of {numel}{where}")
        _check_holds(self.keys[name], value)
        return _plain(value)

    def _scales(self, name: str, dtype: torch.dtype, numel: int) -> Tensor:
        where = f" for shape {list(self.items['shape'])} and blocksize {self.items['blocksize']}"
        value = self._row(name, dtype, numel, where)
        wrong = ~(value.isfinite() & (value >= 0))
        if not value.is_meta and bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise ValueError(f"{self.keys[name]}: scales are finite and not negative, got {value[at].item()} at {at}")
        return value

    def _code(self, name: str, expected: Tensor, *variants: Tensor) -> Tensor:
        value = self._row(name, torch.float32, expected.numel())
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
        return value

    def _check_packed(self, packed: Any, shape: torch.Size) -> None:
        key = self.prefix or "weight"
        if not isinstance(packed, Tensor) or packed.layout != torch.strided:
            raise ValueError(f"{key}: expected the packed weight as a dense tensor, got {describe(packed)}")
        check_packed(packed, shape, key)
        _check_holds(key, packed)

    def _check_devices(self, device: torch.device | str | None, packed: Tensor | None) -> None:
        """A tensor on meta has no values: it can't be moved, and what belongs to it must be there, too."""
        if device is not None and torch.device(device).type == "meta":
            return
        tensors = {self.keys[name]: value for name, value in self.items.items() if isinstance(value, Tensor)}
        if packed is not None:
            tensors[self.prefix or "weight"] = packed
        on_meta = [key for key, value in tensors.items() if value.is_meta]
        if on_meta and (device is not None or len(on_meta) < len(tensors)):
            raise ValueError(f"{on_meta[0]}: is on meta, where tensors have no values, and not all of the state is")


def json_to_tensor(items: dict[str, Any]) -> Tensor:
    """JSON as the uint8 tensor that a state dict holds."""
    return torch.frombuffer(bytearray(json.dumps(items).encode()), dtype=torch.uint8).clone()


def _tensor_to_json(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, Tensor) or not _is_row(value, torch.uint8, value.numel()) or value.is_meta:
        raise ValueError(f"{key}: expected JSON in a uint8 tensor of one dimension, got {describe(value)}")
    if value.numel() > MAX_JSON:
        raise ValueError(f"{key}: expected JSON of at most {MAX_JSON} bytes, got {value.numel()}")
    _check_holds(key, value)
    try:
        items = json.loads(value.cpu().numpy().tobytes().decode(), object_pairs_hook=_once_each)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}: expected UTF-8 JSON, got {type(error).__name__}: {str(error)[:80]}") from None
    if not isinstance(items, dict):
        raise ValueError(f"{key}: expected a JSON object, got {type(items).__name__}")
    return items


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) != len(pairs):  # json would keep the last, other readers the first
        raise ValueError("a key is there twice")
    return items


def _is_row(value: Any, dtype: torch.dtype, numel: int) -> bool:
    dense = isinstance(value, Tensor) and value.layout == torch.strided
    return dense and value.dtype == dtype and value.dim() == 1 and value.numel() == numel


def _plain(value: Tensor) -> Tensor:
    """What a backend may read by its address: the tensor itself where its elements lie side by side."""
    return value.detach().resolve_neg().contiguous()


def _check_holds(key: str, value: Tensor) -> None:
    """A view may claim more elements than there is memory behind it; whoever copied it would allocate them."""
    claims, holds = value.nbytes, value.untyped_storage().nbytes()
    if not value.is_meta and claims > holds:
        raise ValueError(f"{key}: {describe(value)} claims {claims} bytes, and there are {holds}")


def _label(key: str) -> str:
    """A key as it is, or where it can't be printed or is long as a short literal."""
    return key if key.isprintable() and len(key) <= 200 else shown(key)
