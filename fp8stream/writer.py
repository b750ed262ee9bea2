"""Planned safetensors files, filled in whatever order their tensors come.

A file's header is written last, since a file of zeros with a header would be a valid one, and only
when every planned byte of it was written exactly once; config.json is the last file of all.
"""

import errno
import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open

from fp8stream.checkpoint import Checkpoint
from fp8stream.coverage import Coverage
from fp8stream.errors import CheckpointError, OutputError
from fp8stream.layout import INDEX_NAME, OutputFile, config_bytes, index_bytes
from fp8stream.output import OutputDirectory
from fp8stream.reader import ShardReader
from fp8stream.system import (
    drop_cached,
    finish_writing,
    is_memory_backed,
    reserve,
    start_writing,
    sync_directory,
)


class _OpenFile:
    """A planned file that is being filled.

    Unless it is `in_memory` anyway, the disk is kept busy while it is filled, and few of its pages
    stay in memory.
    """

    def __init__(self, path: Path, plan: OutputFile, in_memory: bool) -> None:
        self.plan = plan
        self.remaining = sum(tensor.nbytes for tensor in plan.tensors)
        self.descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._sizes = {tensor.name: tensor.nbytes for tensor in plan.tensors}
        self._partial: dict[str, Coverage] = {}
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
        begin, length = offset, len(data)
        while data:
            done = os.pwrite(self.descriptor, data, offset)
            data, offset = data[done:], offset + done
        self.wrote(begin, length)

    def wrote(self, offset: int, length: int) -> None:
        """Notes that bytes there are written, by whoever, and are the disk's to take."""
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


class CheckpointWriter:
    """Writes one planned output. A context manager: unless `commit` ran, leaving removes all of it.

    `write` and `copy` may be called from several threads.
    """

    def __init__(self, output: Path, files: Sequence[OutputFile], overwrite: bool = False) -> None:
        """`output` is what `check_output` returned."""
        self._directory = OutputDirectory(output, overwrite)
        self._files = files
        self._places = {
            tensor.name: (file, offset)
            for file in files
            for tensor, offset in zip(file.tensors, file.offsets, strict=True)
        }
        self._in_memory = False
        self._open: dict[str, _OpenFile] = {}
        self._sealed: set[str] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> "CheckpointWriter":
        self._directory.__enter__()
        self._in_memory = is_memory_backed(self._directory.work)
        try:
            with self._directory.failing():
                for file in self._files:
                    self._create(file)
        except BaseException as error:
            self._directory.__exit__(error)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._open.values():
            with suppress(OSError):  # it is given up anyway
                os.close(file.descriptor)
        self._open.clear()
        self._directory.__exit__(*error)

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Writes `data` at byte `offset` of planned tensor `name`.

        Raises OutputError if any of it was written before, or if the disk fails.
        """
        with self._directory.failing():
            file, at = self._claim(name, offset, len(data))
            file.write(data, at)
            self._finish(file, len(data))

    def copy(
        self,
        name: str,
        offset: int,
        length: int,
        source: ShardReader,
        at: int,
        buffer: memoryview,
    ) -> int:
        """Copies up to `length` bytes of tensor `name` from byte `at` of `source`: how many it did.

        The kernel does it where it can; else it goes through `buffer`.
        """
        length = min(_COPY_CHUNK, length)
        with self._directory.failing():
            file, target = self._claim(name, offset, length)
            done = _copy_range(source, at, file, target, length)
            file.wrote(target, done)
            while done < length:
                part = buffer[: min(len(buffer), length - done)]
                source.read_into(part, at + done, name)
                file.write(part, target + done)
                done += len(part)
            source.give_back(at, length)
            self._finish(file, length)
        return length

    def _create(self, plan: OutputFile) -> None:
        """The file in its full size, so that a disk that is too small shows before any work."""
        path = self._directory.work / plan.name
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            reserve(descriptor, path, plan.size)
        finally:
            os.close(descriptor)
        if not any(tensor.nbytes for tensor in plan.tensors):
            self._sealed.add(plan.name)
            _OpenFile(path, plan, self._in_memory).seal()

    def _claim(self, name: str, offset: int, length: int) -> tuple[_OpenFile, int]:
        """The file of tensor `name` and the position in it, for bytes that nobody wrote yet."""
        plan, begin = self._places[name]
        with self._lock:
            if plan.name in self._sealed:
                raise OutputError(f"{plan.name}: tensor {name!r}: bytes came before")
            if plan.name not in self._open:
                path = self._directory.work / plan.name
                self._open[plan.name] = _OpenFile(path, plan, self._in_memory)
            file = self._open[plan.name]
            file.claim(name, offset, offset + length)
            return file, begin + offset

    def _finish(self, file: _OpenFile, length: int) -> None:
        """Counts what was written; whoever writes the last byte of a file seals it."""
        with self._lock:
            file.remaining -= length
            if file.remaining:
                return
            del self._open[file.plan.name]
            self._sealed.add(file.plan.name)
        file.seal()

    def copy_side_files(self, checkpoint: Checkpoint) -> None:
        """Everything beside the weights, as bytes. Raises CheckpointError or OutputError."""
        for side in checkpoint.side_files:
            source = checkpoint.directory / side.name
            try:
                data = source.open("rb")
            except OSError as error:
                raise CheckpointError(f"{source}: cannot be read: {error.strerror}") from error
            with data, self._directory.failing():
                self._copy_side_file(data, source, self._directory.work / side.name)
        names = [Path(side.name) for side in checkpoint.side_files]
        with self._directory.failing():
            for directory in {parent for name in names for parent in name.parents}:
                sync_directory(self._directory.work / directory)

    def _copy_side_file(self, data: BinaryIO, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as copy:
            while True:
                try:
                    chunk = data.read(_SIDE_CHUNK)
                except OSError as error:
                    raise CheckpointError(f"{source}: cannot be read: {error.strerror}") from error
                if not chunk:
                    break
                copy.write(chunk)
            copy.flush()
            os.fsync(copy.fileno())

    def commit(self, config: Mapping[str, Any]) -> None:
        """Checks that all is there, adds the index and config.json, and publishes.

        Raises OutputError; the output then does not exist, or is what it was.
        """
        with self._directory.failing():
            for plan in self._files:
                self._check_whole(plan)
            if len(self._files) > 1:
                _write_file(self._directory.work / INDEX_NAME, index_bytes(self._files))
            _write_file(self._directory.work / "config.json", config_bytes(config))
            self._give_back()
            self._directory.publish()

    def _give_back(self) -> None:
        """Frees the pages of the files, which the check read into memory again."""
        for plan in () if self._in_memory else self._files:
            with (self._directory.work / plan.name).open("rb") as stream:
                drop_cached(stream.fileno(), 0, 0)

    def _check_whole(self, plan: OutputFile) -> None:
        """Every planned byte written, and a file that the reference parser reads."""
        if plan.name not in self._sealed:
            raise OutputError(f"{plan.name}: tensors are missing: not every planned byte came")
        with (
            (self._directory.work / plan.name).open("rb") as stream,
            # By descriptor: the reference library takes no path that is not UTF-8.
            safe_open(f"/proc/self/fd/{stream.fileno()}", framework="pt") as opened,
        ):
            if set(opened.keys()) != {tensor.name for tensor in plan.tensors}:
                raise OutputError(f"{plan.name}: does not hold the tensors that were planned")


_SIDE_CHUNK = 1 << 20
_COPY_CHUNK = 8 << 20
# Bytes of one file that the disk gets together, and how many times as many may be under way.
_BURST = 16 << 20
_BURSTS_AT_ONCE = 2


def _copy_range(source: ShardReader, at: int, file: _OpenFile, target: int, length: int) -> int:
    """Bytes that the kernel copied by itself: all of them, or those before it found it cannot."""
    done = 0
    while done < length:
        try:
            count = os.copy_file_range(
                source.descriptor, file.descriptor, length - done, at + done, target + done
            )
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            return done
        if not count:
            return done
        done += count
    return done


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
