"""The safetensors format, read and written in pieces, so that neither a file nor a tensor need fit into memory.

    8 bytes      header length, little-endian
    header       JSON: {"key": {"dtype": "BF16", "shape": [N, K], "data_offsets": [start, stop]}, ...}, with strings
                 of the writer's own under "__metadata__"; spaces at its end allowed
    data         the tensors, row-major, without gaps

The library (``safetensors``) opens each file first, and with that checks the whole header; it maps files into memory,
where the pages that were read count as resident, and it writes a file from a dict of whole tensors. Hence the plain
reads and writes here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ..internals import remedies

try:
    from safetensors import SafetensorError, safe_open
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"a checkpoint on disk is read and written with safetensors, which is not installed: "
        f"{remedies.install('checkpoint')}",
        name=error.name,
    ) from None

__all__ = ["DTYPES", "FLOATS", "NAMES", "PIECE", "Entry", "Plan", "SafetensorsReader", "SafetensorsWriter"]

PIECE = 2**23  # elements in memory at once: a multiple of every blocksize, of a nested block of those, and of eight
Plan = dict[str, tuple[str, tuple[int, ...], int]]  # key -> (the format's dtype name, shape, size in bytes)

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = FLOATS | {
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LATE_DIGITS = 10**15  # stands for an offset that is not known yet: no real one has more digits


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: the format's name of its dtype, its shape, and where its bytes are in the file."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes an element takes; 1 where there are none."""
        return self.nbytes // self.numel if self.numel else 1

    def casts(self, rest: torch.dtype | None) -> bool:
        """Whether this is a float of another dtype than ``rest``, which floats that are not quantised are to have."""
        return rest is not None and FLOATS.get(self.dtype, rest) != rest

    def plan(self, rest: torch.dtype | None) -> Plan:
        """What is written of a tensor that stays: as it is, or cast."""
        if rest is None or not self.casts(rest):
            return {self.key: (self.dtype, self.shape, self.nbytes)}
        return {self.key: (NAMES[rest], self.shape, self.numel * rest.itemsize)}

    def described(self) -> Tensor:
        """The tensor without data, on the meta device; its bytes where torch has no such dtype."""
        dtype = DTYPES.get(self.dtype)
        shape = (self.nbytes,) if dtype is None else self.shape
        return torch.empty(shape, dtype=dtype or torch.uint8, device="meta")


class SafetensorsReader:
    """A file's header, checked, and its tensors in pieces.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} can't be read as safetensors: {error}") from None
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by close)
        size = int.from_bytes(self._file.read(8), "little")
        header: dict[str, Any] = json.loads(self._file.read(size))
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.entries = {key: _entry(key, item, 8 + size) for key, item in header.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def tensor(self, key: str, start: int = 0, stop: int | None = None, into: Tensor | None = None) -> Tensor:
        """Elements ``start`` to ``stop`` of the flattened tensor: as its dtype, or as bytes where torch has none.

        ``into``: bytes to be used again, so that the system need not hand out and clear fresh pages for each piece.
        """
        entry = self.entries[key]
        stop = entry.numel if stop is None else min(stop, entry.numel)
        size = (stop - start) * entry.itemsize
        raw = torch.empty(size, dtype=torch.uint8) if into is None else into[:size]
        _fill(raw, self._file, entry.start + start * entry.itemsize)
        return raw.view(DTYPES.get(entry.dtype, torch.uint8))

    def pieces(self, key: str, rooms: Iterator[Tensor]) -> Iterator[Tensor]:
        """The bytes of a tensor, as many at a time as the next of the uint8 ``rooms`` takes."""
        entry, done = self.entries[key], 0
        while done < entry.nbytes:
            raw = next(rooms)[: entry.nbytes - done]
            _fill(raw, self._file, entry.start + done)
            done += len(raw)
            yield raw


class SafetensorsWriter:
    """A file whose layout is fixed before the first byte of data: tensors arrive in pieces and in any order.

    Args:
        path: a new file.
        planned: every other tensor.
        late: keys of uint8 vectors whose length is known only when they come (``add``); they go to the end.
        metadata: the header's own strings.

    Tensors are ordered by the size of their elements, the largest first, as the library does it: so all are aligned.
    """

    def __init__(self, path: Path, planned: Plan, late: list[str], metadata: dict[str, str]) -> None:
        def itemsize(key: str) -> int:
            _, shape, nbytes = planned[key]
            return nbytes // (math.prod(shape) or 1)

        self._header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        end = 0
        for key in sorted(planned, key=lambda key: (-itemsize(key), key)):
            dtype, shape, nbytes = planned[key]
            self._header[key] = _item(dtype, shape, end, end + nbytes)
            end += nbytes
        self._late, self._end = dict.fromkeys(late, False), end
        widest = self._header | {key: _item("U8", (_LATE_DIGITS,), _LATE_DIGITS, _LATE_DIGITS) for key in late}
        self._room = -(-(8 + len(_dump(widest))) // 8) * 8
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115 (closed by close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()

    def write(self, key: str, piece: Tensor, at: int = 0) -> None:
        """Put a contiguous piece of a tensor ``at`` bytes from its start."""
        start, stop = self._header[key]["data_offsets"]
        size = piece.numel() * piece.itemsize
        assert start + at + size <= stop, f"{key}: {size} bytes at {at} are more than planned"
        self._put(piece, self._room + start + at)

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Bytes ``start`` to ``stop`` of what was written."""
        offset = self._room + int(self._header[key]["data_offsets"][0])
        raw = torch.empty(stop - start, dtype=torch.uint8)
        _fill(raw, self._file, offset + start)
        return raw

    def add(self, key: str, tensor: Tensor) -> None:
        """One of the late tensors, whole: uint8 [L]."""
        assert self._late[key] is False, f"{key} is added twice"
        self._header[key] = _item("U8", (tensor.numel(),), self._end, self._end + tensor.numel())
        self._put(tensor, self._room + self._end)
        self._late[key], self._end = True, self._end + tensor.numel()

    def _put(self, piece: Tensor, offset: int) -> None:
        view = _bytes_of(piece.detach().contiguous().view(-1).view(torch.uint8))
        self._file.seek(offset)
        while len(view):
            view = view[self._file.write(view) :]

    def _finish(self) -> None:
        assert all(self._late.values()), f"never added: {[key for key, there in self._late.items() if not there]}"
        text = _dump(self._header).ljust(self._room - 8)
        self._file.seek(0)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._room + self._end)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous uint8 vector."""
    array: Any = tensor.numpy()
    return memoryview(array)


def _fill(raw: Tensor, file: FileIO, offset: int) -> None:
    view, done = _bytes_of(raw), 0
    file.seek(offset)
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise ValueError(f"{file.name} ends {len(view) - done} bytes too early: was it changed meanwhile?")
        done += count


def _entry(key: str, item: dict[str, Any], data: int) -> Entry:
    start, stop = item["data_offsets"]
    return Entry(key, item["dtype"], tuple(item["shape"]), data + start, stop - start)


def _item(dtype: str, shape: tuple[int, ...], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def _dump(header: dict[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()
