"""A planned output, filled in whatever order its tensors come, whole or not at all.

Of every file each planned byte comes exactly once, from this run or from one before it that was
stopped; config.json is the last file of all.
"""

import os
import shutil
import stat
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from fp8stream.checkpoint import Checkpoint
from fp8stream.errors import CheckpointError, OutputError
from fp8stream.filling import FillingFile
from fp8stream.header import open_regular, read_at_most
from fp8stream.layout import INDEX_NAME, OutputFile, config_bytes, index_bytes
from fp8stream.output import OutputDirectory
from fp8stream.plan import Written
from fp8stream.reader import ShardReader
from fp8stream.recorder import Recorder
from fp8stream.system import (
    append_all,
    drop_cached,
    is_memory_backed,
    reserve,
    sync_directory,
    write_file,
)

_SIDE_CHUNK = 1 << 20
_COPY_CHUNK = 8 << 20


class CheckpointWriter:
    """Fills the planned files in an open OutputDirectory. A context manager: only what `commit` put
    in place is an output.

    `write`, `copy` and `finished` may be called from several threads.
    """

    def __init__(
        self, directory: OutputDirectory, files: Sequence[OutputFile], there: Iterable[Written] = ()
    ) -> None:
        """`there` is what an earlier run wrote of them."""
        self._directory = directory
        self._content = directory.content
        self._files = files
        self._places = {
            tensor.name: (file, offset)
            for file in files
            for tensor, offset in zip(file.tensors, file.offsets, strict=True)
        }
        self._there: dict[str, list[Written]] = defaultdict(list)
        for part in there:
            self._there[self._places[part.tensor][0].name].append(part)
        self._in_memory = False
        self._open: dict[str, FillingFile] = {}
        self._sealed: set[str] = set()
        self._recorder = Recorder(directory.record)
        self._lock = threading.Lock()

    def __enter__(self) -> "CheckpointWriter":
        with self._directory.failing():
            self._in_memory = is_memory_backed(self._content)
            self._remove_others()
            for file in self._files:
                self._create(file)
            sync_directory(self._content)
            for file in self._files:
                self._seal_if_whole(file)
            self._recorder.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._recorder.__exit__()
        for file in self._open.values():
            with suppress(OSError):  # it is given up anyway
                os.close(file.descriptor)
        self._open.clear()

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
            done = file.copy(source, at, target, length)
            while done < length:
                part = buffer[: min(len(buffer), length - done)]
                source.read_into(part, at + done, name)
                file.write(part, target + done)
                done += len(part)
            source.give_back(at, length)
            self._finish(file, length)
        return length

    def finished(self, layer: int) -> None:
        """Notes that everything of the layer with this number was written: it will be recorded.

        Raises OutputError if an earlier layer could not be.
        """
        with self._directory.failing():
            self._recorder.finished(layer)

    def _remove_others(self) -> None:
        """Whatever an earlier run left that is none of the planned files: it is made anew."""
        planned = {file.name for file in self._files}
        for left in self._content.iterdir():
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            elif left.name not in planned:
                left.unlink()

    def _create(self, plan: OutputFile) -> None:
        """The file in its full size, so that a disk that is too small shows before any work."""
        path = self._content / plan.name
        with suppress(FileNotFoundError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_size == plan.size:
                return
            if not self._there[plan.name]:
                path.unlink()
        if self._there[plan.name]:
            raise OutputError(
                f"{path}: expected the {plan.size} bytes that an unfinished run left, found "
                "something else; --restart discards that run"
            )
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            reserve(descriptor, path, plan.size)
        finally:
            os.close(descriptor)

    def _seal_if_whole(self, plan: OutputFile) -> None:
        """Gives the file its header where all else is there, or where there is nothing else."""
        there = sum(part.end - part.begin for part in self._there[plan.name])
        if there == sum(tensor.nbytes for tensor in plan.tensors):
            self._sealed.add(plan.name)
            self._fill(plan).seal()

    def _fill(self, plan: OutputFile) -> FillingFile:
        there = self._there.pop(plan.name, ())
        return FillingFile(self._content / plan.name, plan, self._in_memory, there)

    def _claim(self, name: str, offset: int, length: int) -> tuple[FillingFile, int]:
        """The file of tensor `name` and the position in it, for bytes that nobody wrote yet."""
        plan, begin = self._places[name]
        with self._lock:
            if plan.name in self._sealed:
                raise OutputError(f"{plan.name}: tensor {name!r}: bytes came before")
            if plan.name not in self._open:
                self._recorder.follow(self._content / plan.name)
                self._open[plan.name] = self._fill(plan)
            file = self._open[plan.name]
            file.claim(name, offset, offset + length)
            return file, begin + offset

    def _finish(self, file: FillingFile, length: int) -> None:
        """Counts what was written; whoever writes the last byte of a file seals it."""
        with self._lock:
            file.remaining -= length
            if file.remaining:
                return
            del self._open[file.plan.name]
            self._sealed.add(file.plan.name)
        file.seal()
        self._recorder.sealed(self._content / file.plan.name)

    def copy_side_files(self, checkpoint: Checkpoint) -> None:
        """Everything beside the weights, as bytes. Raises CheckpointError or OutputError."""
        for side in checkpoint.side_files:
            self._copy_side_file(checkpoint.directory / side.name, self._content / side.name)
        names = [Path(side.name) for side in checkpoint.side_files]
        with self._directory.failing():
            for directory in {parent for name in names for parent in name.parents}:
                sync_directory(self._content / directory)

    def _copy_side_file(self, source: Path, target: Path) -> None:
        with _failing_to_read(source):
            data = open_regular(source)
        with data:
            left = os.fstat(data.fileno()).st_size  # what somebody still writes to may never end
            with self._directory.failing():
                target.parent.mkdir(parents=True, exist_ok=True)
                copy = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                while left and (chunk := _read_side(data, min(left, _SIDE_CHUNK), source)):
                    with self._directory.failing():
                        append_all(copy, chunk)
                    left -= len(chunk)
                with self._directory.failing():
                    os.fsync(copy)
            finally:
                os.close(copy)

    def commit(
        self,
        config: Mapping[str, Any],
        placing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Checks that all is there, adds the index and config.json, and publishes, the one step of
        which is made inside of `placing`.

        Raises OutputError; the output then does not exist, or is what it was.
        """
        with self._directory.failing():
            self._recorder.flush()
            for plan in self._files:
                with _failing_to_read_again(self._content / plan.name):
                    self._check_whole(plan)
            if len(self._files) > 1:
                write_file(self._content / INDEX_NAME, index_bytes(self._files))
            write_file(self._content / "config.json", config_bytes(config))
            self._give_back()
            self._directory.publish(placing)

    def _give_back(self) -> None:
        """Frees the pages of the files, which the check read into memory again."""
        for plan in () if self._in_memory else self._files:
            with (self._content / plan.name).open("rb") as stream:
                drop_cached(stream.fileno(), 0, 0)

    def _check_whole(self, plan: OutputFile) -> None:
        """Every planned byte written, and a file that the reference parser reads."""
        if plan.name not in self._sealed:
            raise OutputError(f"{plan.name}: tensors are missing: not every planned byte came")
        with (
            (self._content / plan.name).open("rb") as stream,
            # By descriptor: the reference library takes no path that is not UTF-8.
            safe_open(f"/proc/self/fd/{stream.fileno()}", framework="pt") as opened,
        ):
            if set(opened.keys()) != {tensor.name for tensor in plan.tensors}:
                raise OutputError(f"{plan.name}: does not hold the tensors that were planned")


@contextmanager
def _failing_to_read_again(path: Path) -> Iterator[None]:
    """What the reference library says of a file that it cannot read, and torch, which it asks."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OutputError(f"{path}: cannot be read again: {error}") from error


def _read_side(data: BinaryIO, length: int, source: Path) -> bytes:
    with _failing_to_read(source):
        return read_at_most(data, length)


@contextmanager
def _failing_to_read(source: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read: {error.strerror}") from error
