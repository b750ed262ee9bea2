"""One run at a time makes an output: a lock that dies with its process.

It is on a file of its own, open for writing: NFS has no locks on directories. Whoever got it may
find that the file, or the directory around it, was removed by the run that had it before: then it
is no lock, and all begins again.
"""

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fp8stream.errors import OutputError

# In the directory where an output is made.
LOCK = "lock"
# What file systems say that have none.
_NO_LOCKS = {
    *(errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF, errno.ENOSYS, errno.EINVAL)
}


def lock_directory(work: Path, make: Callable[[], None]) -> tuple[int, bool]:
    """A descriptor that locks `work` as long as it is open, and whether it does: not every file
    system has locks. `make` makes the directory where it is not there.

    Raises OutputError if another process has it, and OSError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        make()
        try:
            descriptor = os.open(work / LOCK, flags, 0o666)
        except FileNotFoundError:
            continue  # the run that had the directory has just removed it
        except OSError:
            with suppress(OSError):
                work.rmdir()  # where we made it for nothing
            raise
        try:
            works = _lock(descriptor, work)
            # That run may have done so between our two calls.
            if _is_still(work / LOCK, descriptor):
                return descriptor, works
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, work: Path) -> bool:
    """False on a file system without locks. Raises OutputError where another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"{work}: another run is writing this output; wait for it, or give another OUTPUT"
        ) from None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
