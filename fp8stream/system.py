"""What Linux is asked directly: the calls that Python's `os` lacks, with stand-ins, and devices."""

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fp8stream.errors import ThreadError

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_SYNC_WAIT_BEFORE, _SYNC_WRITE, _SYNC_WAIT_AFTER = 1, 2, 4
_MAP_FAILED = ctypes.c_void_p(-1).value
_LOW_BIT = bytes(value & 1 for value in range(256))
_LIBC = ctypes.CDLL(None, use_errno=True)


def may_have_gpu() -> bool:
    """Whether a driver shows a device that torch could use; asking torch takes seconds."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def exchange(one: Path, other: Path, aside: Path) -> None:
    """Swaps two directories in one step; in two where the file system has no such call, which leave
    what was `other` as `aside`.

    Raises OSError; both are then where they were.
    """
    renameat2 = getattr(_LIBC, "renameat2", None)
    if renameat2 is not None:
        first, second = os.fsencode(one), os.fsencode(other)
        if renameat2(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise OSError(code, os.strerror(code), str(other))
    other.rename(aside)
    try:
        one.rename(other)
    except OSError:
        aside.rename(other)
        raise


def start_thread(thread: threading.Thread) -> None:
    """Raises ThreadError where the system has a limit on threads, and it is reached."""
    try:
        thread.start()
    except RuntimeError as error:
        raise ThreadError(f"{error}: a limit of the system; give fewer --threads") from error


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of `data` at `offset`, however little the system takes at once. Raises OSError."""
    left = memoryview(data)
    while left:
        done = os.pwrite(descriptor, left, offset)
        left, offset = left[done:], offset + done


def append_all(descriptor: int, data: bytes) -> None:
    """Writes all of `data` at the end of a file opened for appending. Raises OSError."""
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def write_file(path: Path, data: bytes) -> None:
    """Makes or replaces the file `path`, its content durable, its name not yet. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        write_all(descriptor, data, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    fallocate = getattr(_LIBC, "fallocate", None)
    if fallocate is not None and size and not is_memory_backed(path):
        length = ctypes.c_int64(size)
        if _call(fallocate, descriptor, 0, ctypes.c_int64(0), length) == 0:
            return
        if ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    os.ftruncate(descriptor, size)


def is_memory_backed(path: Path) -> bool:
    """Whether `path` lies in a RAM disk, where the page cache is the file itself."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1] in ("tmpfs", "ramfs")
    return False


def start_writing(descriptor: int, offset: int, length: int) -> None:
    """Has the disk begin with what was written there, without waiting for it.

    Where the file system has no such call nothing begins, and `finish_writing` does all the work.
    Raises OSError.
    """
    _sync_file_range(descriptor, offset, length, _SYNC_WRITE)


def finish_writing(descriptor: int, offset: int, length: int) -> None:
    """Waits until the disk has what was written there, and gives the pages back.

    It bounds what waits to be written, and is no fsync: the disk may have it in a cache of its own.
    Raises OSError.
    """
    flags = _SYNC_WAIT_BEFORE | _SYNC_WRITE | _SYNC_WAIT_AFTER
    if not _sync_file_range(descriptor, offset, length, flags):
        os.fdatasync(descriptor)
    drop_cached(descriptor, offset, length)


def _sync_file_range(descriptor: int, offset: int, length: int, flags: int) -> bool:
    """False where there is no such call, or the file system has none. Raises OSError."""
    call = getattr(_LIBC, "sync_file_range", None)
    if call is None:
        return False
    if _call(call, descriptor, ctypes.c_int64(offset), ctypes.c_int64(length), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code))


def _call(function: Callable[..., int], *arguments: object) -> int:
    """What a call of the C library returns when no signal cuts it short, as Python's own do."""
    while True:
        result = function(*arguments)
        if result == 0 or ctypes.get_errno() != errno.EINTR:
            return result


def never_read_ahead(descriptor: int) -> None:
    """Reads no more of a file than is asked for by this descriptor."""
    with suppress(OSError):  # advice as well
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)


def drop_cached(descriptor: int, offset: int, length: int) -> None:
    """Gives back the clean pages of a range of a file; of all that follows where `length` is 0."""
    with suppress(OSError):  # it is advice, and a file system may take none
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)


def cached_pages(descriptor: int, offset: int, length: int) -> bytes:
    """For each page of a range of a file, 1 if it is in memory already, else 0.

    `offset` is a multiple of the page size. Where the system does not tell, as of files that are
    neither ours nor ours to write, every page is.
    """
    pages = -(-length // mmap.PAGESIZE)
    map_file = _LIBC.mmap
    map_file.restype = ctypes.c_void_p
    where = map_file(
        None,
        ctypes.c_size_t(length),
        mmap.PROT_READ,
        mmap.MAP_SHARED,
        descriptor,
        ctypes.c_int64(offset),
    )
    if where == _MAP_FAILED:
        return b"\1" * pages
    found = (ctypes.c_ubyte * pages)()
    try:
        told = _LIBC.mincore(ctypes.c_void_p(where), ctypes.c_size_t(length), found) == 0
    finally:
        _LIBC.munmap(ctypes.c_void_p(where), ctypes.c_size_t(length))
    return bytes(found).translate(_LOW_BIT) if told else b"\1" * pages
