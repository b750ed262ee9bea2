"""Bytes of planned tensors into buffers that are used again and again.

Positioned reads, never maps: what is read is in memory that was counted, and nothing else is. A
file that is not the one whose header was read is refused when it is opened.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fp8stream.errors import CheckpointError
from fp8stream.header import Shard, TensorSpec
from fp8stream.views import Runs


class Reader:
    """Opens the shards of one checkpoint. Thread-safe: it keeps no position and no open file."""

    def __init__(self, directory: Path, shards: tuple[Shard, ...]) -> None:
        self._directory = directory
        self._shards: Mapping[str, Shard] = {shard.name: shard for shard in shards}

    @contextmanager
    def open(self, file: str) -> Iterator["ShardReader"]:
        """The shard `file`. Raises CheckpointError if it changed since its header was read."""
        path = self._directory / file
        shard = self._shards[file]
        try:
            # A FIFO that took the shard's place is refused below instead of waited for.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        try:
            _check_unchanged(descriptor, path, shard)
            yield ShardReader(descriptor, path)
            # Once more, for what was written while we read.
            _check_unchanged(descriptor, path, shard)
        finally:
            os.close(descriptor)


def _check_unchanged(descriptor: int, path: Path, shard: Shard) -> None:
    status = os.fstat(descriptor)
    if (status.st_size, status.st_mtime_ns) != (shard.size, shard.mtime_ns):
        raise CheckpointError(
            f"{path}: changed since its header was read: expected {shard.size} bytes, found "
            f"{status.st_size}; let what writes it finish, then run again"
        )


class ShardReader:
    """One open shard."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self.descriptor = descriptor
        self.path = path

    def read_runs(self, buffer: memoryview, runs: Runs, spec: TensorSpec) -> None:
        """Fills `buffer` with the runs of elements of `spec`, one after another.

        Raises CheckpointError as `read_into` does.
        """
        size = runs.length * spec.itemsize
        for run in range(runs.count):
            offset = spec.offset + (runs.first + run * runs.step) * spec.itemsize
            self.read_into(buffer[run * size : (run + 1) * size], offset, spec.name)

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
                raise CheckpointError(
                    f"{self.path}: tensor {name!r}: the file ends at byte {offset + done}, expected"
                    f" {offset + len(buffer)}; it shrank while it was read"
                )
            done += count
