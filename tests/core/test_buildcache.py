"""The build cache, by what goes wrong: shared directories, files that are damaged or that others could have written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from refq4.internals.buildcache import CacheError, cache_directory, cache_key, cached


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REFQ4_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def directory(empty_cache: Path) -> Path:
    return cache_directory("cpu")


class Builder:
    def __init__(self) -> None:
        self.times = 0

    def __call__(self, target: Path) -> None:
        self.times += 1
        target.write_text("built by us")


def needs_root() -> None:
    if not hasattr(os, "getuid") or os.getuid() != 0:
        pytest.skip("only root can give a file to another user: run this test as root, in a container")


# --- the directory ----------------------------------------------------------------------------------------------------


def test_the_directory_is_made_private(empty_cache: Path) -> None:
    assert cache_directory("cpu") == empty_cache / "cpu"
    assert (empty_cache / "cpu").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_a_directory_that_others_can_write_to_is_refused(empty_cache: Path, mode: int) -> None:
    empty_cache.mkdir()
    empty_cache.chmod(mode)
    with pytest.raises(CacheError, match=r"writable by others.*chmod go-w"):
        cache_directory("cpu")


def test_what_cannot_be_made_names_the_variable(empty_cache: Path) -> None:
    empty_cache.write_text("a file where the directory should be")
    with pytest.raises(CacheError, match="REFQ4_CACHE_DIR"):
        cache_directory("cpu")


def test_a_home_that_nobody_has_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFQ4_CACHE_DIR", "~nobody-of-that-name/cache")
    with pytest.raises(CacheError, match="environment variable REFQ4_CACHE_DIR='~nobody"):
        cache_directory("cpu")


@pytest.mark.parametrize("level", ["the root", "the kind's own"])
def test_a_cache_directory_of_another_user_is_refused(directory, level):
    needs_root()
    os.chown(directory if level == "the kind's own" else directory.parent, 12345, -1)
    with pytest.raises(CacheError, match=r"belongs to another user. Set REFQ4_CACHE_DIR to a directory of yours"):
        cache_directory("cpu")


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_built_once_and_a_damaged_one_again(empty_cache: Path) -> None:
    directory, builds = cache_directory("cpu"), []

    def build_it(target: Path) -> None:
        builds.append(target)
        target.write_bytes(b"0123456789")

    path = cached(directory, "a.bin", build_it)
    assert cached(directory, "a.bin", build_it).read_bytes() == b"0123456789"
    assert len(builds) == 1
    path.write_bytes(b"01234")
    assert cached(directory, "a.bin", build_it).read_bytes() == b"0123456789"
    assert len(builds) == 2


def test_a_failed_build_leaves_nothing_behind(empty_cache: Path) -> None:
    directory = cache_directory("cpu")

    def fail(target: Path) -> None:
        target.write_text("half")
        raise ValueError("the compiler said no")

    with pytest.raises(ValueError, match="said no"):
        cached(directory, "a.bin", fail)
    assert [p.name for p in directory.iterdir() if not p.name.endswith(".lock")] == []


def test_a_key_depends_on_every_part_and_its_borders() -> None:
    parts = [("ab", "c"), ("a", "bc"), ("abc",), ("ab", "c", ""), ("ab", "d")]
    assert len({cache_key(*p) for p in parts}) == 5


@pytest.mark.parametrize("which", ["", ".sha256"], ids=["the file", "its digest"])
@pytest.mark.parametrize("mode", [0o666, 0o622, 0o660], ids=oct)
def test_a_cached_file_that_others_can_write_to_is_built_again(directory, which, mode):
    build = Builder()
    path = cached(directory, "a.so", build)
    path.with_name(path.name + which).chmod(mode)
    assert cached(directory, "a.so", build).read_text() == "built by us"
    assert build.times == 2
    cached(directory, "a.so", build)
    assert build.times == 2, "and is then as it should be"


def test_what_is_built_under_a_lax_umask_is_not_writable_by_others(directory):
    old = os.umask(0)
    try:
        path, build = cached(directory, "a.so", build := Builder()), build
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o022 == 0
    cached(directory, "a.so", build)
    assert build.times == 1


@pytest.mark.parametrize("which", ["", ".sha256"], ids=["the file", "its digest"])
def test_a_cached_file_of_another_user_is_built_again(directory, which):
    needs_root()
    build = Builder()
    path = cached(directory, "a.so", build)
    os.chown(path.with_name(path.name + which), 12345, -1)
    cached(directory, "a.so", build)
    assert build.times == 2
    assert path.stat().st_uid == os.getuid()


@pytest.mark.parametrize("which", ["", ".sha256"], ids=["the file", "its digest"])
@pytest.mark.parametrize("content", [b"", b"built", b"\xff\xfe"], ids=["emptied", "truncated", "replaced"])
def test_a_cached_file_that_is_not_what_was_built_is_built_again(directory, which, content):
    build = Builder()
    path = cached(directory, "a.so", build)
    path.with_name(path.name + which).write_bytes(content)
    assert cached(directory, "a.so", build).read_text() == "built by us"
    assert build.times == 2
