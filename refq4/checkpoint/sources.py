"""Tensors of a weight file by key, for reading: described without data, whole, or in pieces."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .tensors import DTYPES, SafetensorsReader

__all__ = ["FromSafetensors", "FromTorch", "Source"]

_PIECE = 2**24


class FromSafetensors:
    """Of one or several safetensors files, read where they are."""

    def __init__(self, readers: list[SafetensorsReader]) -> None:
        self.readers = {key: reader for reader in readers for key in reader.entries}

    def keys(self) -> list[str]:
        return list(self.readers)

    def described(self, key: str) -> Tensor | None:
        return self.readers[key].entries[key].described() if key in self.readers else None

    def dtype_name(self, key: str) -> str:
        name = self.readers[key].entries[key].dtype
        return str(DTYPES.get(name, name)).removeprefix("torch.")

    def tensor(self, key: str) -> Tensor:
        entry = self.readers[key].entries[key]
        whole = self.readers[key].tensor(key)
        return whole.view(entry.shape) if entry.dtype in DTYPES else whole

    def pieces(self, key: str, as_bytes: bool = True) -> Iterator[Tensor]:
        reader = self.readers[key]
        if as_bytes:
            yield from reader.pieces(key, repeat(torch.empty(_PIECE, dtype=torch.uint8)))
        else:
            for start in range(0, reader.entries[key].numel, _PIECE):
                yield reader.tensor(key, start, start + _PIECE)


class FromTorch:
    """Of a file that ``torch.save`` wrote, mapped into memory.

    Raises:
        ValueError: it can't be read without running code from it, or holds no tensor.
    """

    def __init__(self, path: Path) -> None:
        self.tensors = dict(_flat(_load(path)))
        if not self.tensors:
            raise ValueError(f"{path} holds no tensor")

    def keys(self) -> list[str]:
        return list(self.tensors)

    def described(self, key: str) -> Tensor | None:
        return None if key not in self.tensors else self.tensors[key].to("meta")

    def dtype_name(self, key: str) -> str:
        return str(self.tensors[key].dtype).removeprefix("torch.")

    def tensor(self, key: str) -> Tensor:
        return self.tensors[key]

    def pieces(self, key: str, as_bytes: bool = True) -> Iterator[Tensor]:
        flat = self.tensors[key].contiguous().view(-1)
        flat = flat.view(torch.uint8) if as_bytes else flat
        for start in range(0, flat.numel(), _PIECE):
            yield flat[start : start + _PIECE]


Source = FromSafetensors | FromTorch


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"  # the older format can't be mapped
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of a damaged file torch reads on until something breaks, and that may be anything
        foreign = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        why = (
            f"it holds {foreign[1]}, and to make one would run code from the file, which refq4 does not; save the "
            f"tensors alone: torch.save(model.state_dict(), ...), or as safetensors"
            if foreign
            else "it is damaged, or no file that torch.save wrote"
        )
        raise ValueError(f"{path} can't be read as torch's format: {why}") from None


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state dict, or of one inside others."""
    if isinstance(value, Tensor):
        yield prefix or "(the tensor)", value.detach()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
