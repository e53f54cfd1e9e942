"""State dicts of quantised weights, changed: fields, JSON text, tensors, keys; some of them are valid still.

All choices come from one ``random.Random``, so a number or hypothesis can make them (tests/core/test_fuzz_states.py).
Which results are valid is for ``state_oracle.expected`` to say.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from state_oracle import JSON_KEY, Entries
from torch import Tensor

import refq4.functional as F
from refq4.internals.statedict import json_to_tensor


def _bases() -> list[Entries]:
    """Small ones, so that a state takes a fraction of a millisecond; with one nested block and with several."""
    generator, made = torch.Generator().manual_seed(4), []
    for shape in ((2, 33), (4, 64), (1, 1), (3, 0), (5,), (2, 3, 32), (260, 32)):
        for quant_type in ("nf4", "fp4", "int4"):
            for nested in (False, True):
                dtype = (torch.float32, torch.bfloat16, torch.float16)[len(made) % 3]
                weight = torch.randn(shape, generator=generator).to(dtype)
                _, state = F.quantize_4bit(weight, None, None, 32, nested, quant_type, backend="reference")
                made.append(state.as_dict(packed=len(made) % 4 > 0))
    return made


BASES = _bases()


def mutate(rng: random.Random) -> Entries:
    """The entries of a weight, changed in none to three ways."""
    entries = dict(rng.choice(BASES))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3))):
        entries = rng.choice(_WAYS)(rng, entries)
    return entries


# --- values -----------------------------------------------------------------------------------------------------------

_WHOLE = (
    0, 1, 2, -1, 5, 31, 32, 33, 64, 66, 96, 128, 192, 256, 512, 4096, 8192, 8320, 2**31, 2**32, 2**48, 2**63, 10**30,
)  # fmt: skip
_REAL = (0.0, -0.0, 0.5, 64.0, -1.0, 1e-45, 1e39, 3.4028235e38, float("nan"), float("inf"), float("-inf"))
_TEXT = ("nf4", "fp4", "int4", "af4", "nf5", "", "float32", "bfloat16", "float16", "float64", "torch.float32", "\ud800")
_ODD = (None, True, False, [], {}, {"a": 1}, [None], [64], ["nf4"], 10**5000)
_SHAPES = ([2, 33], [33, 2], [66], [1, 66], [65], [4, 64], [256], [1, 1], [], [0], [3, 0], [0, 2**63], [2**32, 2**32])


def _value(rng: random.Random) -> Any:
    pool: tuple[Any, ...] = rng.choice((_WHOLE, _REAL, _TEXT, _ODD, _SHAPES))
    value = rng.choice(pool)
    return list(value) if isinstance(value, list) else value


def _near(rng: random.Random, value: Any) -> Any:
    """A value of the same kind, or a slip of the same value."""
    if isinstance(value, list | tuple):
        near = [*value]
        at = rng.randrange(len(near) + 1)
        rng.choice((
            near.reverse,
            lambda: near.insert(at, rng.choice((0, 1, 2, -1, 2**40))),
            lambda: near and near.pop(),
            lambda: near.__setitem__(slice(at, at + 1), [rng.choice(_WHOLE)]),
            lambda: near.__setitem__(slice(None), rng.choice(_SHAPES)),
            lambda: near.__setitem__(slice(at, at + 1), [_as_float(n) for n in near[at : at + 1]]),
        ))()  # fmt: skip
        return near
    if isinstance(value, str):
        return rng.choice(_TEXT)
    if isinstance(value, float):
        return rng.choice((*_REAL, value * 2, -value, int(value) if abs(value) < 1e30 else 0))
    if isinstance(value, int) and abs(value) < 2**64:
        return rng.choice((*_WHOLE, float(value), str(value), bool(value)))
    return _value(rng)


def _as_float(value: Any) -> Any:
    return float(value) if isinstance(value, int) and value < 2**64 else None


# --- fields and JSON --------------------------------------------------------------------------------------------------


def _json_key(entries: Entries) -> str | None:
    return next((key for key in entries if isinstance(key, str) and JSON_KEY in key), None)


def _text(entries: Entries, key: str) -> bytes:
    value = entries[key]
    plain = isinstance(value, Tensor) and value.dtype == torch.uint8 and value.layout == torch.strided
    return value.detach().flatten()[:70_000].numpy().tobytes() if plain and not value.is_meta else b"{}"


def _change_field(rng: random.Random, entries: Entries) -> Entries:
    key = _json_key(entries)
    if key is None:
        fields = entries
    else:
        try:
            fields = dict(json.loads(_text(entries, key)))
        except (ValueError, TypeError, RecursionError):
            return _change_text(rng, entries)
    plain = [name for name in fields if not isinstance(fields[name], Tensor)]
    name = rng.choice(plain or ["shape"])
    change = rng.randrange(6)
    if change == 0:
        fields.pop(name, None)
    elif change == 1:
        fields[rng.choice(("absmax", "nested_offset", "nested_blocksize", "nested_dtype", "extra"))] = _value(rng)
    else:
        fields[name] = _near(rng, fields.get(name)) if change < 5 else _value(rng)
    if key is None:
        return entries
    try:
        return entries | {key: json_to_tensor(fields)}
    except ValueError:  # a number of more digits than Python writes
        return entries


def _change_text(rng: random.Random, entries: Entries) -> Entries:
    key = _json_key(entries)
    if key is None:
        return entries
    text = bytearray(_text(entries, key))
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text) + 1)
        change = rng.randrange(7)
        if change == 0:
            text[at:at] = bytes([rng.randrange(256)])
        elif change == 1:
            del text[at : at + rng.randint(1, 4)]
        elif change == 2 and at < len(text):
            text[at] ^= 1 << rng.randrange(8)
        elif change == 3:
            del text[at:]
        elif change == 4:  # what no reader minds, at a place where none does
            text = text.replace(b", ", rng.choice((b",", b" ,\n\t")), rng.randint(1, 3))
        elif change == 5:  # a field once more
            text[1:1] = rng.choice(
                (b'"blocksize": 32, ', b'"shape": [1], ', b'"dtype": "float32", ', b'"x": {"y": [], "y": 1}, ')
            )
        else:
            text += rng.choice((b" ", b"\n", b"\x00", b"}", b"[" * 20_000, b" " * 66_000, b"\xff", b"\xef\xbb\xbf"))
    return entries | {key: torch.frombuffer(text, dtype=torch.uint8) if text else torch.zeros(0, dtype=torch.uint8)}


# --- tensors ----------------------------------------------------------------------------------------------------------

_DTYPES = (
    torch.uint8, torch.int8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.complex64,
)  # fmt: skip


def _poke(rng: random.Random, t: Tensor) -> Tensor:
    t = t.clone()
    if t.numel():
        value = rng.choice((float("nan"), float("inf"), -1.0, -0.0, 0.0, 1e-45, 0.5, 3.4e38))
        byte = rng.randrange(256 if t.dtype == torch.uint8 else 128)  # an int8 holds no more
        t.view(-1)[rng.randrange(t.numel())] = value if t.dtype.is_floating_point else byte
    return t


def _flip(rng: random.Random, t: Tensor) -> Tensor:
    t = t.clone(memory_format=torch.contiguous_format).as_strided(t.shape, (1,) * t.dim())  # a single one may keep 2
    raw = t.view(torch.uint8) if t.dim() and t.numel() and t.dtype in (torch.uint8, torch.float32) else None
    if raw is not None:
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return t


_ON_TENSORS: tuple[Callable[[random.Random, Tensor], Any], ...] = (
    _poke,
    _poke,
    _flip,
    lambda rng, t: (t.real if t.is_complex() else t).to(rng.choice(_DTYPES)),
    lambda rng, t: t[: rng.randrange(t.numel() + 1)],
    lambda rng, t: torch.cat([t, t[: rng.randint(1, 300)]]),
    lambda rng, t: t.repeat(rng.choice((2, 8, 16))),
    lambda rng, t: t[:1].clone().expand(rng.choice((t.numel(), t.numel(), 2**40))) if t.numel() else t,
    lambda rng, t: torch.stack([t, t.flip(0)], 1)[:, 0],
    lambda rng, t: torch.complex(-t, -t).conj().imag if t.dtype == torch.float32 else t,
    lambda rng, t: rng.choice((t.unsqueeze(0), t.unsqueeze(1), t.flatten()[:1].reshape(()) if t.numel() else t)),
    lambda rng, t: t.flip(0),
    lambda rng, t: t.to("meta"),
    lambda rng, t: t.to_sparse(),
    lambda rng, t: torch.nn.Parameter(t, requires_grad=t.is_floating_point()),
    lambda rng, t: rng.choice((t.tolist(), None, 1.0, "absmax", np.zeros(t.shape, np.float32))),
    lambda rng, t: t.clone(),
    lambda rng, t: torch.cat([t.new_full((1,), -1), t[1:]]) if t.dtype != torch.uint8 else t,
)


def _change_tensor(rng: random.Random, entries: Entries) -> Entries:
    names = [
        key
        for key, value in entries.items()
        if isinstance(value, Tensor) and value.dim() == 1 and value.layout == torch.strided and not value.is_meta
        if value.numel() <= value.untyped_storage().nbytes()
    ]
    if not names:
        return entries
    name = rng.choice(names)
    return entries | {name: rng.choice(_ON_TENSORS)(rng, entries[name].detach().resolve_neg())}


# --- keys -------------------------------------------------------------------------------------------------------------


def _change_keys(rng: random.Random, entries: Entries) -> Entries:
    keys = list(entries)
    key = rng.choice(keys) if keys else "absmax"
    other = rng.choice(BASES)
    change = rng.randrange(12)
    if change == 0:
        return {k: v for k, v in entries.items() if k != key}
    if change in (1, 10):
        renamed = rng.choice((f"{key}x", f"w.{key}", f"w.{key}", f"x{key}", str(key).upper(), f"{key}.0", "", 7, None))
        return {renamed if k == key else k: v for k, v in entries.items()}
    if change in (2, 3):
        prefix = rng.choice(("weight.", "model.layers.0.fc.weight.", ".", "quant_state.bitsandbytes__.", "absmax."))
        return {f"{prefix}{k}" if isinstance(k, str) else k: v for k, v in entries.items()}
    if change == 4:
        return entries | {rng.choice(("extra", "b.absmax", "bias", "weight", f"{JSON_KEY}fp4")): entries.get(key)}
    if change == 5 and len(keys) > 1:
        second = rng.choice(keys)
        return entries | {key: entries[second], second: entries[key]}
    if change == 6:  # the key's type, not the JSON's
        return {k.replace("nf4", "fp4") if isinstance(k, str) else k: v for k, v in entries.items()}
    if change == 7:
        return other | {k: v for k, v in entries.items() if rng.random() < 0.5}
    if change == 8 and key in other:
        return entries | {key: other[key]}
    if change == 9:
        return dict(sorted(entries.items(), key=lambda item: str(item[0]), reverse=True))
    return dict(rng.sample(list(entries.items()), len(entries)))


_WAYS = (_change_field, _change_field, _change_field, _change_text, _change_tensor, _change_tensor, _change_keys)


# --- showing ----------------------------------------------------------------------------------------------------------


def as_python(entries: Entries) -> str:
    """The entries as Python source that makes them again."""
    lines = [f"    {key!r}: {_source(value)}," for key, value in entries.items()]
    return "\n".join(["import torch", "from refq4 import QuantState", "QuantState.from_dict({", *lines, "})"])


def _source(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    if isinstance(value, torch.nn.Parameter):
        return f"torch.nn.Parameter({_source(value.detach())}, requires_grad={value.requires_grad})"
    if value.is_meta:
        return f"torch.empty({list(value.shape)}, dtype={value.dtype}, device='meta')"
    if value.layout != torch.strided:
        return f"{_source(value.to_dense())}.to_sparse()"
    if value.numel() * value.itemsize > value.untyped_storage().nbytes():
        return f"{_source(value.flatten()[:1])}.expand({list(value.shape)})"
    if value.dtype == torch.uint8 and value.dim() == 1 and bytes(value.tolist()).isascii() and value.numel() > 40:
        return f"torch.tensor(list({bytes(value.tolist())!r}), dtype=torch.uint8)"
    strides = "" if value.is_contiguous() else f"  # strides {value.stride()}"
    return f"torch.tensor({value.tolist()}, dtype={value.dtype}){strides}"
