"""Directories: what a model directory holds, and how an output directory appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "INDEX",
    "check_places",
    "check_room",
    "copy_others",
    "directory_beside",
    "move_into_place",
    "read_json",
    "weight_files",
]

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data")
_RESERVE = 64 * 2**20  # of disk, for what is not weights


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model: the single one, or those of its index, or all that are there.

    transformers asks in this order, so that an index left over from an earlier save counts for nothing.

    Raises:
        FileNotFoundError: no such directory, none in it, or the index names one that is not there.
        ValueError: the index is no index.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"no such directory: {directory}")
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    if (directory / INDEX).is_file():
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{directory / INDEX} has no weight_map from keys to files")
        names = sorted(set(weight_map.values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{directory / INDEX} names a file outside its directory: {outside[0]!r}")
        if missing := [name for name in names if not (directory / name).is_file()]:
            raise FileNotFoundError(
                f"{directory / INDEX} names {', '.join(missing)}, not there: is a download incomplete?"
            )
        return [directory / name for name in names]
    found = sorted(directory.glob("*.safetensors"))
    if not found:
        others = sorted(path.name for path in directory.iterdir() if path.name.endswith(_WEIGHTS))
        held = f"; it holds {', '.join(others)}: save the model as safetensors first" if others else ""
        raise FileNotFoundError(f"no .safetensors file in {directory}{held}")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; a ValueError that names the file if it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def check_places(source: Path, target: Path, force: bool) -> None:
    """That the output can go there: raised before anything is read."""
    real_source, real_target = source.resolve(), target.resolve()
    if real_source == real_target or real_source in real_target.parents or real_target in real_source.parents:
        raise ValueError(f"the output {target} and the model {source} must not lie in one another")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no such directory: {target.parent}")
    if not target.exists():
        return
    if not force:
        raise FileExistsError(f"{target} exists: choose another name, or --force (force=True) to replace it")
    if not target.is_dir() or target.is_symlink():
        raise FileExistsError(f"{target} is not a directory: remove it, or choose another name")
    if any(target.iterdir()) and not (any(target.glob("*.safetensors")) or (target / "config.json").is_file()):
        raise FileExistsError(f"{target} is not empty and holds no model: it is not replaced, even with --force")


def check_room(directory: Path, size: int) -> None:
    """A ValueError if ``size`` bytes don't fit on the disk of ``directory``."""
    free = shutil.disk_usage(directory).free
    if free < size + _RESERVE:
        raise ValueError(f"the result takes {size / 1e9:.2f} GB and {directory} has {free / 1e9:.2f} GB free")


@contextmanager
def directory_beside(target: Path) -> Iterator[Path]:
    """A new hidden directory beside ``target``, gone at the end unless it was moved."""
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        partial.chmod(0o777 & ~_umask())
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def move_into_place(partial: Path, target: Path) -> None:
    """Rename to ``target``; what was there is removed last, and is back if that fails."""
    if not target.exists():
        os.replace(partial, target)
        return
    with directory_beside(target) as old:
        os.replace(target, old / target.name)
        try:
            os.replace(partial, target)
        except BaseException:
            os.replace(old / target.name, target)
            raise


def copy_others(source: Path, partial: Path) -> list[str]:
    """Copy everything but weights, indexes of weights and hidden files; returns the names of weights left out."""
    left_out = []
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts) or (partial / relative).exists():
            continue
        if path.name.endswith(_WEIGHTS):
            left_out.append(str(relative))
        elif not path.name.endswith(".index.json"):
            (partial / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, partial / relative)
    return left_out


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
