"""A planned file while its tensors come, in whatever order.

Its header is written last, since a file of zeros with a header would be a valid one, and only when
every planned byte was written exactly once. Meanwhile the disk is kept busy, and few pages wait.
"""

import errno
import os
import threading
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from fp8stream.coverage import Coverage
from fp8stream.errors import OutputError
from fp8stream.layout import OutputFile
from fp8stream.plan import Written
from fp8stream.reader import ShardReader
from fp8stream.system import drop_cached, finish_writing, start_writing, write_all

# Bytes of one file that the disk gets together, and how many times as many may be under way.
_BURST = 16 << 20
_BURSTS_AT_ONCE = 2


class FillingFile:
    """A planned file of which parts, perhaps, are on disk from an earlier run.

    Unless it is `in_memory` anyway, few of its pages stay in memory.
    """

    def __init__(
        self, path: Path, plan: OutputFile, in_memory: bool, there: Iterable[Written] = ()
    ) -> None:
        self.plan = plan
        self.remaining = sum(tensor.nbytes for tensor in plan.tensors)
        self._sizes = {tensor.name: tensor.nbytes for tensor in plan.tensors}
        self._partial: dict[str, Coverage] = {}
        for part in there:
            self.claim(part.tensor, part.begin, part.end)
            self.remaining -= part.end - part.begin
        self.descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._behind = None if in_memory else _WriteBehind(self.descriptor)

    def claim(self, name: str, start: int, stop: int) -> None:
        """Notes that bytes of tensor `name` are being written. Raises OutputError if they were."""
        if name not in self._sizes:
            raise OutputError(f"{self.plan.name}: tensor {name!r}: all bytes came before")
        coverage = self._partial.setdefault(name, Coverage(self._sizes[name]))
        try:
            coverage.add(start, stop)
        except ValueError as error:
            raise OutputError(f"{self.plan.name}: tensor {name!r}: bytes {error}") from None
        if coverage.gap() is None:
            # Most tensors come whole, and there may be very many: only open ones are remembered.
            del self._sizes[name], self._partial[name]

    def write(self, data: memoryview, offset: int) -> None:
        """Writes `data` at byte `offset` of the file. Raises OSError."""
        write_all(self.descriptor, data, offset)
        self._wrote(offset, len(data))

    def copy(self, source: ShardReader, at: int, target: int, length: int) -> int:
        """Bytes from `at` of `source` that the kernel copied to `target` by itself: all of them, or
        those before it found it cannot. Raises OSError where the disk is full."""
        done = 0
        while done < length:
            try:
                count = os.copy_file_range(
                    source.descriptor, self.descriptor, length - done, at + done, target + done
                )
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                break
            if not count:
                break
            done += count
        self._wrote(target, done)
        return done

    def _wrote(self, offset: int, length: int) -> None:
        if self._behind:
            self._behind.wrote(offset, length)

    def seal(self) -> None:
        """Makes the file valid: its data durable first, then the header, its length last."""
        try:
            header = memoryview(self.plan.header)
            self.write(header[8:], 8)
            os.fdatasync(self.descriptor)
            self.write(header[:8], 0)
            os.fsync(self.descriptor)
            if self._behind:
                drop_cached(self.descriptor, 0, 0)
        finally:
            os.close(self.descriptor)


Ranges = list[tuple[int, int]]


class _WriteBehind:
    """What of a file was written but is not on the disk yet: never more than a window of it.

    Without this the system lets a tenth of all memory fill up with such pages before the disk does
    anything, and throws out everybody else's for it. The disk gets them in bursts, since one that
    reads and writes by turns does neither well. Thread-safe.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._gathered: Ranges = []
        self._bytes = 0
        self._under_way: deque[Ranges] = deque()
        self._lock = threading.Lock()

    def wrote(self, offset: int, length: int) -> None:
        """Has the disk begin with a burst where there is one, and waits for an earlier one."""
        with self._lock:
            self._gathered.append((offset, length))
            self._bytes += length
            if self._bytes < _BURST:
                return
            burst, self._gathered, self._bytes = _joined(self._gathered), [], 0
            self._under_way.append(burst)
            late = self._under_way.popleft() if len(self._under_way) > _BURSTS_AT_ONCE else []
        for range_ in burst:
            start_writing(self._descriptor, *range_)
        for range_ in late:
            finish_writing(self._descriptor, *range_)


def _joined(ranges: Ranges) -> Ranges:
    """The same bytes in as few ranges as can be: those of neighbouring layers touch."""
    joined: Ranges = []
    for offset, length in sorted(ranges):
        if joined and sum(joined[-1]) == offset:
            joined[-1] = joined[-1][0], joined[-1][1] + length
        else:
            joined.append((offset, length))
    return joined
