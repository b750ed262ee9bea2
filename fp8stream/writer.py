"""Planned safetensors files, filled in whatever order their tensors come.

A file's header is written last, since a file of zeros with a header would be a valid one, and only
when every planned byte of it was written exactly once; config.json is the last file of all.
"""

import errno
import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import safe_open

from fp8stream.checkpoint import Checkpoint
from fp8stream.coverage import Coverage
from fp8stream.errors import CheckpointError, OutputError
from fp8stream.layout import INDEX_NAME, OutputFile, index_bytes
from fp8stream.output import OutputDirectory
from fp8stream.reader import ShardReader
from fp8stream.system import reserve


class _OpenFile:
    """A planned file that is being filled."""

    def __init__(self, path: Path, plan: OutputFile) -> None:
        self.path = path
        self.plan = plan
        self.remaining = sum(tensor.nbytes for tensor in plan.tensors)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self.descriptor = os.open(path, flags, 0o666)
        try:
            reserve(self.descriptor, path, plan.size)
        except BaseException:
            os.close(self.descriptor)
            raise

    def write(self, data: memoryview, offset: int) -> None:
        while data:
            done = os.pwrite(self.descriptor, data, offset)
            data, offset = data[done:], offset + done

    def seal(self) -> None:
        """Makes the file valid: its data durable first, then the header, its length last."""
        try:
            header = memoryview(self.plan.header)
            self.write(header[8:], 8)
            os.fdatasync(self.descriptor)
            self.write(header[:8], 0)
            os.fsync(self.descriptor)
        finally:
            os.close(self.descriptor)


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
        self._written = {t.name: Coverage(t.nbytes) for file in files for t in file.tensors}
        self._open: dict[str, _OpenFile] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "CheckpointWriter":
        self._directory.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._open.values():
            os.close(file.descriptor)
        self._open.clear()
        self._directory.__exit__(kind, error, trace)

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Writes `data` at byte `offset` of planned tensor `name`.

        Raises OutputError if any of it was written before, or if the disk fails.
        """
        with self._directory.failing():
            file, at = self._claim(name, offset, len(data))
            file.write(data, at)
            self._finish(file, len(data))

    def copy(self, name: str, offset: int, source: ShardReader, at: int, buffer: memoryview) -> int:
        """Copies up to a chunk of tensor `name` from byte `at` of `source`: how many bytes.

        The kernel does it where it can; else it goes through `buffer`.
        """
        length = min(_COPY_CHUNK, self._written[name].size - offset)
        with self._directory.failing():
            file, target = self._claim(name, offset, length)
            done = _copy_range(source, at, file, target, length)
            while done < length:
                part = buffer[: min(len(buffer), length - done)]
                source.read_into(part, at + done, name)
                file.write(part, target + done)
                done += len(part)
            self._finish(file, length)
        return length

    def _claim(self, name: str, offset: int, length: int) -> tuple[_OpenFile, int]:
        """The file of tensor `name` and the position in it, for bytes that nobody wrote yet."""
        plan, begin = self._places[name]
        with self._lock:
            try:
                self._written[name].add(offset, offset + length)
            except ValueError as error:
                raise OutputError(f"{plan.name}: tensor {name!r}: bytes {error}") from None
            if plan.name not in self._open:
                self._open[plan.name] = _OpenFile(self._directory.work / plan.name, plan)
            return self._open[plan.name], begin + offset

    def _finish(self, file: _OpenFile, length: int) -> None:
        """Counts what was written; whoever writes the last byte of a file seals it."""
        with self._lock:
            file.remaining -= length
            if file.remaining:
                return
            del self._open[file.plan.name]
        file.seal()

    def commit(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        """Checks that all is there, adds the side files, the index and config.json, and publishes.

        Raises OutputError; the output then does not exist, or is what it was.
        """
        with self._directory.failing():
            self._check_complete()
            self._copy_side_files(checkpoint)
            if len(self._files) > 1:
                _write_file(self._directory.work / INDEX_NAME, index_bytes(self._files))
            text = json.dumps(config, indent=2) + "\n"
            _write_file(self._directory.work / "config.json", text.encode())
            self._directory.publish()

    def _check_complete(self) -> None:
        """Every planned byte written, and every file one that the reference parser reads."""
        for plan in self._files:
            for tensor in plan.tensors:
                gap = self._written[tensor.name].gap()
                if gap:
                    raise OutputError(
                        f"{plan.name}: tensor {tensor.name!r}: bytes [{gap[0]}, {gap[1]}) missing"
                    )
            path = self._directory.work / plan.name
            if not path.exists():  # nothing but empty tensors, so nobody wrote a byte of it
                _OpenFile(path, plan).seal()
            with safe_open(path, framework="pt") as opened:
                if set(opened.keys()) != {tensor.name for tensor in plan.tensors}:
                    raise OutputError(f"{plan.name}: does not hold the tensors that were planned")

    def _copy_side_files(self, checkpoint: Checkpoint) -> None:
        for side in checkpoint.side_files:
            target = self._directory.work / side.name
            target.parent.mkdir(parents=True, exist_ok=True)
            source = checkpoint.directory / side.name
            try:
                shutil.copyfile(source, target)
            except FileNotFoundError as error:
                raise CheckpointError(f"{source}: vanished while the run was going on") from error


_COPY_CHUNK = 64 << 20


def _copy_range(source: ShardReader, at: int, file: _OpenFile, target: int, length: int) -> int:
    """Bytes that the kernel copied by itself: all of them, or those before it found it cannot."""
    done = 0
    while done < length:
        try:
            count = os.copy_file_range(
                source.descriptor, file.descriptor, length - done, at + done, target + done
            )
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
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
