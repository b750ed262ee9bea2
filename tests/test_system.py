"""The calls that Python lacks, and what stands in for them."""

import errno
import os
from pathlib import Path

import pytest

from fp8stream import system


class NoCalls:
    """A C library without the calls that we look for."""


@pytest.fixture(params=["the system's", "no renameat2"])
def directories(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if request.param == "no renameat2":
        monkeypatch.setattr(system, "_LIBC", NoCalls())
    return tmp_path / "one", tmp_path / "other"


def test_exchange_swaps(directories: tuple[Path, Path]) -> None:
    one, other = directories
    aside = one.with_name("aside")
    system.exchange(one, other, aside)
    assert os.listdir(other) == ["one"]
    assert os.listdir(aside if aside.exists() else one) == ["other"]
    assert len(os.listdir(one.parent)) == 2


def test_an_exchange_that_fails_leaves_both_where_they_were(
    directories: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = directories
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self == one:
            raise OSError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr(system, "_LIBC", NoCalls())
    with pytest.raises(OSError, match="Permission denied"):
        system.exchange(one, other, one.with_name("aside"))
    assert os.listdir(one) == ["one"]
    assert os.listdir(other) == ["other"]


def test_reserved_files_have_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reserved", "truncated"):
        with (tmp_path / name).open("wb") as stream:
            system.reserve(stream.fileno(), tmp_path / name, 10_000)
        assert (tmp_path / name).read_bytes() == bytes(10_000)
        monkeypatch.setattr(system, "_LIBC", NoCalls())


def test_a_disk_that_is_too_small_says_so_when_space_is_reserved(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as stream, pytest.raises(OSError, match=r"\[Errno") as caught:
        system.reserve(stream.fileno(), path, 1 << 60)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)


def test_pages_are_told_and_given_back(tmp_path: Path) -> None:
    """Read in: there. Given back: gone, in a file system that has pages at all."""
    size = 3 * 4096 + 10
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        system.drop_cached(stream.fileno(), 0, 0)
        after = system.cached_pages(stream.fileno(), 0, size)
        stream.read()
        read = system.cached_pages(stream.fileno(), 0, size)
    assert len(after) == len(read) == 4
    assert all(page & 1 for page in read)
    if not system.is_memory_backed(path):
        assert not any(page & 1 for page in after)


@pytest.mark.parametrize("calls", ["the system's", "none"])
def test_what_is_written_may_be_hurried(
    tmp_path: Path, calls: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if calls == "none":
        monkeypatch.setattr(system, "_LIBC", NoCalls())
    with (tmp_path / "file").open("wb", buffering=0) as stream:
        stream.write(bytes(10_000))
        system.start_writing(stream.fileno(), 0, 10_000)
        system.finish_writing(stream.fileno(), 0, 10_000)
    assert (tmp_path / "file").read_bytes() == bytes(10_000)


def test_a_disk_that_fails_in_the_background_is_an_error(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as stream:
        closed = stream.fileno()
    with pytest.raises(OSError, match="Bad file descriptor"):
        system.finish_writing(closed, 0, 1)
