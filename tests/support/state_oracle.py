"""Which entries are the state of a quantised weight, and whether ``QuantState.from_dict`` thinks so too.

``expected`` is written from the table at the top of refq4/internals/statedict.py and not from the code below it, in
other terms (numpy, plain Python), so that one checks the other. ``check`` asks from_dict and compares what it says,
what it read, what that decodes to, and what it saves again. Used by tests/core/test_fuzz_states.py.
"""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

import refq4.functional as F
from refq4.codebooks import get_codebook
from refq4.functional import QuantState
from refq4.internals.format import BLOCKSIZES
from refq4.nn import LinearNF4

JSON_KEY = "quant_state.bitsandbytes__"
TYPES = ("nf4", "fp4", "int4", "af4", "e2m1", "iq4nl")
PLAIN = {"quant_type", "blocksize", "dtype", "shape"}
NESTED = {"nested_blocksize", "nested_dtype", "nested_offset"}
TENSORS = {"absmax", "quant_map"}
NESTED_TENSORS = {"nested_absmax", "nested_quant_map"}
Entries = dict[Any, Any]


class WrongAnswerError(AssertionError):
    """from_dict did what it must not do with some entries."""


# --- the oracle -------------------------------------------------------------------------------------------------------


def expected(entries: Entries) -> dict[str, Any] | None:
    """What the entries spell, or None."""
    fields = _gathered(entries)
    if fields is None:
        return None
    nested = bool(fields.keys() & (NESTED | NESTED_TENSORS))
    if fields.keys() != PLAIN | TENSORS | (NESTED | NESTED_TENSORS if nested else set()):
        return None
    shape, blocksize = fields["shape"], fields["blocksize"]
    fits = (
        _is_text(fields["quant_type"], *TYPES)
        and type(shape) in (list, tuple, torch.Size)
        and len(shape) <= 8
        and all(type(n) is int and 0 <= n <= 2**48 for n in shape)
        and math.prod(shape) <= 2**48
        and type(blocksize) is int
        and blocksize in BLOCKSIZES
        and _is_text(fields["dtype"], "float32", "float16", "bfloat16")
    )
    if not fits:
        return None
    blocks = -(-math.prod(shape) // blocksize)
    spelt = {key: fields[key] for key in PLAIN} | {"shape": list(shape), "nested": nested}
    spelt["absmax"] = _numbers(fields["absmax"], torch.uint8 if nested else torch.float32, blocks)
    spelt["quant_map"] = _numbers(fields["quant_map"], torch.float32, 16)
    if (
        spelt["absmax"] is None
        or spelt["quant_map"] is None
        or not np.array_equal(spelt["quant_map"], TABLES[spelt["quant_type"]])
    ):
        return None
    if not nested:
        return spelt if _are_scales(spelt["absmax"]) else None
    offset = fields["nested_offset"]
    if type(offset) not in (int, float) or not 0 <= offset <= 3.4028234663852886e38:
        return None
    if type(fields["nested_blocksize"]) is not int or fields["nested_blocksize"] != 256:
        return None
    if not _is_text(fields["nested_dtype"], "float32"):
        return None
    spelt["nested_offset"] = float(np.float32(offset))
    spelt["nested_absmax"] = _numbers(fields["nested_absmax"], torch.float32, -(-blocks // 256))
    spelt["nested_quant_map"] = _numbers(fields["nested_quant_map"], torch.float32, 256)
    if spelt["nested_quant_map"] is None or not any(
        np.array_equal(spelt["nested_quant_map"], m) for m in (DYNAMIC, OLD_DYNAMIC)
    ):
        return None
    return spelt if spelt["nested_absmax"] is not None and _are_scales(spelt["nested_absmax"]) else None


TABLES = {name: np.array(get_codebook(name).values, np.float32) for name in TYPES}
DYNAMIC = F.create_dynamic_map().numpy()
OLD_DYNAMIC = np.concatenate([np.float32([-1]), DYNAMIC[1:]])


def _gathered(entries: Entries) -> dict[str, Any] | None:
    """Field -> value, the JSON's beside the tensors; None where something is there twice or belongs to no field."""
    found: list[tuple[str, str | None, Any]] = []  # prefix, field, value
    types = []
    for key, value in entries.items():
        if not isinstance(key, str):
            return None
        at = key.rfind(JSON_KEY)
        if at == 0 or (at > 0 and key[at - 1] == "."):
            types.append(key[at + len(JSON_KEY) :])
            found.append((key[: max(at - 1, 0)], None, None))
            text = _numbers(value, torch.uint8, None)
            if text is None or text.size > 65536:
                return None
            try:
                pairs = json.loads(text.tobytes().decode(), object_pairs_hook=_Pairs)
            except (ValueError, RecursionError):
                return None
            if type(pairs) is not _Pairs or pairs.repeats():
                return None
            found += [(found[-1][0], name, item) for name, item in pairs]
        else:
            found.append((*key.rpartition(".")[::2], value))
    names = [name for _, name, _ in found if name is not None]
    if len(types) > 1 or len(set(names)) != len(names) or len({prefix for prefix, _, _ in found}) != 1:
        return None
    fields = {name: value for _, name, value in found if name is not None}
    return None if types and fields.get("quant_type") != types[0] else fields


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it is written: a key that is there twice is there twice."""

    def repeats(self) -> bool:
        inner = [value for _, value in self]
        while inner:
            value = inner.pop()
            if isinstance(value, _Pairs):
                if value.repeats():
                    return True
            elif isinstance(value, list):
                inner += value
        return len({key for key, _ in self}) != len(self)


def _numbers(value: Any, dtype: torch.dtype, length: int | None) -> np.ndarray | None:
    """The values of a dense row that is really there, or None."""
    if not isinstance(value, Tensor) or value.dtype != dtype or value.layout != torch.strided or value.is_meta:
        return None
    if value.dim() != 1 or (length is not None and len(value) != length):
        return None
    if len(value) * value.itemsize > value.untyped_storage().nbytes():
        return None
    numbers: np.ndarray = value.detach().resolve_neg().clone().numpy()
    return numbers


def _is_text(value: Any, *allowed: str) -> bool:
    return type(value) is str and value in allowed


def _are_scales(values: np.ndarray) -> bool:
    return bool((values >= 0).all() and (values < np.inf).all())


# --- asking -----------------------------------------------------------------------------------------------------------


def check(entries: Entries) -> bool:
    """Whether the entries are a state; a WrongAnswerError where from_dict thinks otherwise or reads another one."""
    spelt = expected(entries)
    before = {key: id(value) for key, value in entries.items()}
    try:
        state = QuantState.from_dict(entries)
    except ValueError as error:
        if spelt is not None:
            raise WrongAnswerError(f"a valid state was refused: {error}") from error
        if not str(error).isprintable() or len(str(error)) > 3000:
            raise WrongAnswerError(f"a message that can't be shown: {error!a}") from error
        return False
    except Exception as error:
        raise WrongAnswerError(f"another error than a ValueError: {type(error).__name__}: {error}") from error
    if all(value.is_meta for key, value in entries.items() if isinstance(value, Tensor) and JSON_KEY not in key):
        return True  # the form without values, for models that are not there yet
    if spelt is None:
        raise WrongAnswerError(f"what is no state was accepted, as {state}")
    if before != {key: id(value) for key, value in entries.items()}:
        raise WrongAnswerError("the caller's entries were changed")
    _compare(state, spelt)
    return True


def check_layer(entries: Entries) -> bool:
    """The same for a layer that loads them beside a packed weight: it takes what is valid and of its shape, or keeps
    every bit it has and raises a ValueError, or torch's RuntimeError where no entry is left.
    """
    layer, packed = copy.deepcopy(_LAYER), torch.full((33, 1), 0x1E, dtype=torch.uint8)
    spelt = expected(entries)
    takes = spelt is not None and spelt["shape"] == [2, 33]
    kept = layer.state_dict()
    own = {f"weight.{key}" if isinstance(key, str) else "weight.7": value for key, value in entries.items()}
    try:
        layer.load_state_dict({"weight": packed} | own)
    except (ValueError, RuntimeError) as error:
        if takes:
            raise WrongAnswerError(f"a layer refused a valid state: {error}") from error
        if isinstance(error, RuntimeError) and entries:
            raise WrongAnswerError(f"another error than a ValueError: {error}") from error
        if not all(torch.equal(value, kept[key]) for key, value in layer.state_dict().items()):
            raise WrongAnswerError("a layer that refused was changed") from error
        return False
    except Exception as error:
        raise WrongAnswerError(f"another error than a ValueError: {type(error).__name__}: {error}") from error
    if spelt is None or not takes:
        raise WrongAnswerError(f"a layer [2, 33] accepted {layer.weight.quant_state}")
    if not torch.equal(F.dequantize_4bit(layer.weight.detach(), layer.quant_state).flatten(), _decoded(spelt, 66)):
        raise WrongAnswerError("the layer's weight is not what the entries say")
    return True


_LAYER = LinearNF4(33, 2, bias=False).to("cpu")


def _compare(state: QuantState, spelt: dict[str, Any]) -> None:
    again = state.as_dict(packed=True)
    if not all(t.is_contiguous() and not t.is_neg() for t in again.values()):
        raise WrongAnswerError(f"{state} holds a tensor that can't be read by its address")
    reread = expected(again)
    if reread is None or reread.keys() != spelt.keys() or not all(_equal(reread[key], spelt[key]) for key in spelt):
        raise WrongAnswerError(f"{state} is not what the entries spell, or not after saving")
    if QuantState.from_dict(again) != state:
        raise WrongAnswerError(f"{state} is another one after saving and loading")
    numel = math.prod(spelt["shape"])
    if numel <= 1 << 16:
        packed = torch.full(((numel + 1) // 2, 1), 0x1E, dtype=torch.uint8)
        decoded = F.dequantize_4bit(packed, state, backend="reference")
        if list(decoded.shape) != spelt["shape"] or not torch.equal(decoded.flatten(), _decoded(spelt, numel)):
            raise WrongAnswerError(f"{state} decodes to other numbers than its entries say")


def _decoded(spelt: dict[str, Any], numel: int) -> Tensor:
    """What the bytes 0x1E 0x1E ... decode to: code[1] and code[14] in turn, times the block's scale."""
    with np.errstate(over="ignore", invalid="ignore"):
        scales = spelt["absmax"]
        if spelt["nested"]:
            second = np.repeat(spelt["nested_absmax"], 256)[: len(scales)]
            scales = spelt["nested_quant_map"][scales] * second + np.float32(spelt["nested_offset"])
        codes = np.tile(spelt["quant_map"][[1, 14]], (numel + 1) // 2)[:numel]
        values = codes * np.repeat(scales, spelt["blocksize"])[:numel]
    return torch.from_numpy(values.astype(np.float32)).to(getattr(torch, spelt["dtype"]))


def _equal(a: Any, b: Any) -> bool:
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else bool(a == b)
