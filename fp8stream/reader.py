"""Bytes of planned tensors into buffers that are used again and again.

Positioned reads, never maps: what is read is in memory that was counted, and nothing else is. Pages
that reading brought into memory are given back behind us, and those that were there before stay. A
file that is not the one whose header was read is refused when it is opened.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import groupby
from mmap import PAGESIZE
from operator import itemgetter
from pathlib import Path
from typing import Protocol

from fp8stream.errors import CheckpointError, SourceChangedError
from fp8stream.header import Shard, TensorSpec, reading
from fp8stream.system import cached_pages, drop_cached, is_memory_backed
from fp8stream.views import Runs

# Whether pages were in memory before is asked and kept for so many bytes of a file together.
_WINDOW = 1 << 20


class Shards(Protocol):
    """What opens the shards of a checkpoint, wherever they lie."""

    def open(self, file: str) -> "AbstractContextManager[ShardReader]":
        """The shard `file`. Raises CheckpointError."""

    def give_back(self) -> None:
        """Called when all is read."""


class Reader:
    """Opens the shards of one checkpoint. Thread-safe: it keeps no position and no open file."""

    def __init__(self, directory: Path, shards: tuple[Shard, ...]) -> None:
        """Raises CheckpointError if the directory cannot be looked at."""
        self._directory = directory
        self._shards: Mapping[str, Shard] = {shard.name: shard for shard in shards}
        with reading(directory):
            self._in_memory = is_memory_backed(directory)
        self._warm: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @contextmanager
    def open(self, file: str) -> Iterator["ShardReader"]:
        """The shard `file`. Raises CheckpointError if it cannot be read, or changed since its
        header was."""
        path = self._directory / file
        shard = self._shards[file]
        with reading(path):
            # A FIFO that took the shard's place is refused below instead of waited for.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            with reading(path):
                _check_unchanged(descriptor, path, shard)
                warm = self._warm_windows(descriptor, shard)
            yield ShardReader(descriptor, path, file, warm)
            # Once more, for what was written while we read.
            with reading(path):
                _check_unchanged(descriptor, path, shard)
        finally:
            with reading(path):
                os.close(descriptor)

    def _warm_windows(self, descriptor: int, shard: Shard) -> bytes:
        """For each window of the file, 1 if any of it was in memory before it was read here."""
        with self._lock:
            if shard.name not in self._warm:
                size = 0 if self._in_memory else shard.size
                self._warm[shard.name] = bytes(_warm(descriptor, size))
            return self._warm[shard.name]

    def give_back(self) -> None:
        """Frees what is left of the pages that reading brought in: read ahead, or where two reads
        met. Called when all is read."""
        for name, warm in self._warm.items():
            if not all(warm):
                with suppress(CheckpointError), self.open(name) as shard:
                    shard.give_back(0, self._shards[name].size)


def _warm(descriptor: int, size: int) -> Iterator[bool]:
    """For each window of a file of `size` bytes, whether any of it is in memory."""
    together, window = 64 * _WINDOW, _WINDOW // PAGESIZE
    for begin in range(0, size, together):
        pages = cached_pages(descriptor, begin, min(together, size - begin))
        for page in range(0, len(pages), window):
            yield 1 in pages[page : page + window]


def _check_unchanged(descriptor: int, path: Path, shard: Shard) -> None:
    status = os.fstat(descriptor)
    if (status.st_size, status.st_mtime_ns) != (shard.size, shard.mtime_ns):
        difference = _difference(status, shard)
        raise SourceChangedError(
            f"{path}: changed since its header was read: {difference}; let what writes it finish, "
            "then run again"
        )


def _difference(status: os.stat_result, shard: Shard) -> str:
    if status.st_size != shard.size:
        return f"expected {shard.size} bytes, found {status.st_size}"
    return f"expected {shard.size} bytes of that time, found as many of another"


class ShardReader:
    """One open shard. `warm` says which windows of it are in memory on behalf of others."""

    def __init__(self, descriptor: int, path: Path, file: str, warm: bytes) -> None:
        self.descriptor = descriptor
        self.path = path
        self.file = file
        self._warm = warm

    def read_runs(self, buffer: memoryview, runs: Runs, spec: TensorSpec) -> None:
        """Fills `buffer` with the runs of elements of `spec`, one after another.

        Raises CheckpointError as `read_into` does.
        """
        for begin, piece in runs.pieces(spec.itemsize):
            self.read_into(buffer[piece], spec.offset + begin, spec.name)

    def give_back_runs(self, runs: Runs, spec: TensorSpec) -> None:
        """Frees the pages of what `read_runs` read. Those of several runs hold parts of other
        matrices, which are soon asked for: they go with the file."""
        if runs.count == 1:
            self.give_back(spec.offset + runs.first * spec.itemsize, runs.length * spec.itemsize)

    def give_back(self, offset: int, length: int) -> None:
        """Frees the pages of a range, but for those that were in memory before we came."""
        if not length:
            return
        first, last = offset // _WINDOW, -(-(offset + length) // _WINDOW)
        windows = enumerate(self._warm[first:last], start=first)
        # Neighbours together: pages may be larger than a window, and go as a whole or not at all.
        for warm, group in groupby(windows, key=itemgetter(1)):
            if not warm:
                together = [window for window, _ in group]
                begin = max(offset, together[0] * _WINDOW)
                end = min(offset + length, (together[-1] + 1) * _WINDOW)
                drop_cached(self.descriptor, begin, end - begin)

    def read_into(self, buffer: memoryview, offset: int, name: str) -> None:
        """Fills `buffer` from byte `offset` of the file, where tensor `name` lies.

        Raises CheckpointError if the file ends or fails before the buffer is full.
        """
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self.descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r}: reading failed at byte {offset + done}: "
                    f"{error.strerror}"
                ) from error
            if not count:
                raise SourceChangedError(
                    f"{self.path}: tensor {name!r}: the file ends at byte {offset + done}, expected"
                    f" {offset + len(buffer)}; it shrank while it was read"
                )
            done += count
