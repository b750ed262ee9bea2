"""What Linux is asked directly: the calls that Python's `os` lacks, with stand-ins, and devices."""

import ctypes
import errno
import os
from pathlib import Path

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def may_have_gpu() -> bool:
    """Whether a driver shows a device that torch could use; asking torch takes seconds."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def exchange(one: Path, other: Path) -> None:
    """Swaps two directories in one step, or in three where the file system has no such call.

    Raises OSError; both are then where they were.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(libc, "renameat2", None)
    if renameat2 is not None:
        first, second = os.fsencode(one), os.fsencode(other)
        if renameat2(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise OSError(code, os.strerror(code), str(other))
    aside = one.with_name(one.name + ".old")
    other.rename(aside)
    try:
        one.rename(other)
    except OSError:
        aside.rename(other)
        raise
    aside.rename(one)


def sync_directory(path: Path) -> None:
    """Makes the names in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reserve(descriptor: int, path: Path, size: int) -> None:
    """Gives a new file its size, and the disk's promise of it where that costs nothing.

    A RAM disk would zero the memory, only for it to be written again, and a file system without the
    call would have glibc write to every page. Raises OSError.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is not None and size and not _is_memory_backed(path):
        length = ctypes.c_int64(size)
        if fallocate(descriptor, 0, ctypes.c_int64(0), length) == 0:
            return
        if ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    os.ftruncate(descriptor, size)


def _is_memory_backed(path: Path) -> bool:
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1] in ("tmpfs", "ramfs")
    return False
