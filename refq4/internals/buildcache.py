"""Where compiled kernels are kept: build once, find again, trust nothing that others could have written.

A backend that compiles on first use needs the same six things, whatever it compiles:

    1. a directory        REFQ4_CACHE_DIR, else the user's cache directory; refused if others can write to it
    2. a key              a hash of all that the result depends on (source, flags, compiler, device)
    3. one builder        a file lock: of two processes that need the same file, one builds and one waits
    4. all or nothing     written under a temporary name and renamed, so no one ever loads half a file
    5. a check            the file's digest beside it: a truncated file is built again instead of loaded, and so is one
                          that others own or can write to
    6. a memory           what a compiler refused once, it is not given again in this process (RefusedError)

Not here: what is compiled, and how. This file knows neither C nor CUDA, and needs neither numpy nor torch.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["CACHE_VARIABLE", "CacheError", "RefusedError", "cache_directory", "cached", "cache_key"]

CACHE_VARIABLE = "REFQ4_CACHE_DIR"
LOCK_SECONDS = 300  # a build takes seconds: who waits longer waits for a process that hangs


class CacheError(RuntimeError):
    """The cache can't be used; the message says why and what to do."""


class RefusedError(RuntimeError):
    """A compiler's refusal: the same input would be refused again, so :func:`cached` does not build it again."""


_refused: dict[Path, RefusedError] = {}  # in this process


def cache_directory(kind: str) -> Path:
    """The directory for one kind of compiled file, made if it is missing.

    Args:
        kind: a short name, such as "cpu".

    Raises:
        CacheError: it can't be made, or somebody else could put a file there that this process would then run.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        try:
            root = Path(chosen).expanduser().absolute()
        except RuntimeError as error:  # ~nobody-of-that-name
            raise CacheError(f"the environment variable {CACHE_VARIABLE}={chosen!r}: {error}") from None
    else:
        import platformdirs

        root = Path(platformdirs.user_cache_dir("refq4", appauthor=False))
    directory = root / kind
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"can't make the cache directory: {error}. Set {CACHE_VARIABLE} to one that works") from error
    for path in (root, directory):
        _refuse_if_shared(path)
    return directory


def cache_key(*parts: str | bytes) -> str:
    """One name for all that a compiled file depends on.

    Example:
        >>> cache_key("int f;", "-O2") == cache_key("int f;", "-O2")
        True
        >>> cache_key("ab", "c") == cache_key("a", "bc")  # parts keep their borders
        False
    """
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def cached(directory: Path, name: str, build: Callable[[Path], None]) -> Path:
    """The file ``name`` in the cache; built if it is missing or damaged.

    Args:
        directory: from :func:`cache_directory`.
        name: the file's name, with a :func:`cache_key` in it.
        build: writes the file at the path it is given. What it raises, this raises, and no file is kept. A
            :class:`RefusedError` is raised again, without another build, each time that this process asks.

    Raises:
        CacheError: another process holds the lock for minutes, or the directory can't be written.
    """
    path = directory / name
    if _intact(path):
        return path
    if (refused := _refused.get(path)) is not None:
        raise type(refused)(*refused.args)
    import filelock

    try:
        with filelock.FileLock(directory / f"{name}.lock", timeout=LOCK_SECONDS):
            if not _intact(path):  # another process may have built it while this one waited
                _build(path, build)
    except RefusedError as error:
        _refused[path] = type(error)(*error.args)  # a copy: the traceback would keep every frame alive
        raise
    except filelock.Timeout:
        raise CacheError(
            f"another process has been building {path} for {LOCK_SECONDS} s. If none is, delete {path}.lock"
        ) from None
    except PermissionError as error:
        raise CacheError(f"can't write to the cache: {error}. Set {CACHE_VARIABLE} to a directory of yours") from error
    return path


def _build(path: Path, build: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as scratch:
        made, digest = Path(scratch) / path.name, Path(scratch) / "digest"
        build(made)
        digest.write_text(_digest(made))
        for file in (made, digest):  # whatever the umask is
            file.chmod(file.stat().st_mode & ~_WRITABLE_BY_OTHERS)
        # The digest goes last: a file without one counts as damaged, never the other way round.
        os.replace(made, path)
        os.replace(digest, _digest_path(path))


def _intact(path: Path) -> bool:
    try:
        private = all(_only_ours(file.stat()) for file in (path, _digest_path(path)))
        return private and _digest_path(path).read_bytes() == _digest(path).encode()
    except FileNotFoundError:
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def _only_ours(found: os.stat_result) -> bool:
    """Whether nobody but this user and root can have written there."""
    if not hasattr(os, "getuid"):
        return True  # no POSIX permissions to read; the user's profile directory is private there
    return not found.st_mode & _WRITABLE_BY_OTHERS and found.st_uid in (os.getuid(), 0)


def _refuse_if_shared(path: Path) -> None:
    found = path.stat()
    if _only_ours(found):
        return
    if found.st_mode & _WRITABLE_BY_OTHERS:
        raise CacheError(
            f"the cache directory {path} is writable by others (mode {stat.S_IMODE(found.st_mode):o}), who could put "
            f"code there for you to run. Do: chmod go-w {path}, or set {CACHE_VARIABLE} to a private directory"
        )
    raise CacheError(
        f"the cache directory {path} belongs to another user. Set {CACHE_VARIABLE} to a directory of yours"
    )
