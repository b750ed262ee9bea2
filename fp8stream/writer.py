"""An output that exists is whole.

Planned safetensors files are filled in whatever order tensors come, inside a directory beside the
output that is renamed at the very end. A file's header is written last, since a file of zeros with
a header would be a valid one, and only when every planned byte of it was written exactly once;
config.json is the last file of all.
"""

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import safe_open

from fp8stream.checkpoint import Checkpoint
from fp8stream.coverage import Coverage
from fp8stream.errors import CheckpointError, OutputError
from fp8stream.layout import INDEX_NAME, OutputFile, index_bytes
from fp8stream.memory import format_size
from fp8stream.reader import ShardReader
from fp8stream.system import exchange, is_memory_backed, sync_directory

WORK_SUFFIX = ".fp8stream-partial"


def check_output(output: Path, checkpoint: Checkpoint, needed: int, overwrite: bool) -> Path:
    """The real path to write to, or an OutputError before any work is done.

    Refused: an output that exists (unless it is an empty directory, or a checkpoint and `overwrite`
    says so), one inside the source or around it, a mount point, an unwritable place, a disk with
    less than `needed` bytes free.
    """
    target = Path(os.path.realpath(output))
    _check_apart(target, checkpoint)
    _check_absent(target, overwrite)
    parent = next(path for path in target.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{output}: cannot be created: {parent} is not a writable directory")
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"{output}: not enough disk space in {parent}: expected {format_size(needed)} free, "
            f"found {format_size(free)}"
        )
    return target


def _check_apart(target: Path, checkpoint: Checkpoint) -> None:
    directory = Path(os.path.realpath(checkpoint.directory))
    if target == directory or target == Path(os.path.realpath(checkpoint.path)):
        raise OutputError(f"{target}: OUTPUT is SOURCE itself; give another directory")
    if checkpoint.path.is_dir() and directory in target.parents:
        raise OutputError(f"{target}: OUTPUT lies inside SOURCE; give a directory outside it")
    if target in directory.parents:
        raise OutputError(f"{target}: OUTPUT contains SOURCE; give another directory")


def _check_absent(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"{target}: expected a new or empty directory, found a file")
    if os.path.ismount(target):
        raise OutputError(
            f"{target}: a mount point, which cannot be put in place in one step; give a directory "
            f"inside it, such as {target / 'fp8'}"
        )
    try:
        names = os.listdir(target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be read: {error.strerror}") from error
    if names and not overwrite:
        raise OutputError(
            f"{target}: exists already; --overwrite replaces it, once the new is whole"
        )
    if names and not any(n == "config.json" or n.endswith(".safetensors") for n in names):
        raise OutputError(
            f"{target}: holds {names[0]} and no checkpoint; --overwrite replaces checkpoints only"
        )


class _OpenFile:
    """A planned file that is being filled."""

    def __init__(self, path: Path, plan: OutputFile, reserve: bool) -> None:
        self.path = path
        self.plan = plan
        self.remaining = sum(tensor.nbytes for tensor in plan.tensors)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self.descriptor = os.open(path, flags, 0o666)
        try:
            if reserve:
                os.posix_fallocate(self.descriptor, 0, plan.size)
            else:
                os.ftruncate(self.descriptor, plan.size)
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
        self._output = output
        self._overwrite = overwrite
        self._work = output.with_name(output.name + WORK_SUFFIX)
        self._files = files
        self._places = {
            tensor.name: (file, offset)
            for file in files
            for tensor, offset in zip(file.tensors, file.offsets, strict=True)
        }
        self._written = {t.name: Coverage(t.nbytes) for file in files for t in file.tensors}
        self._open: dict[str, _OpenFile] = {}
        self._lock = threading.Lock()
        self._directory_lock = -1
        self._reserve = True
        self._keep = False

    def __enter__(self) -> "CheckpointWriter":
        with self._failing():
            self._work.parent.mkdir(parents=True, exist_ok=True)
            self._directory_lock = _lock_directory(self._work)
            self._reserve = not is_memory_backed(self._work)
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
        if not self._keep:
            shutil.rmtree(self._work, ignore_errors=True)
        os.close(self._directory_lock)

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Writes `data` at byte `offset` of planned tensor `name`.

        Raises OutputError if any of it was written before, or if the disk fails.
        """
        with self._failing():
            file, at = self._claim(name, offset, len(data))
            file.write(data, at)
            self._finish(file, len(data))

    def copy(self, name: str, offset: int, source: ShardReader, at: int, buffer: memoryview) -> int:
        """Copies up to a chunk of tensor `name` from byte `at` of `source`: how many bytes.

        The kernel does it where it can; else it goes through `buffer`.
        """
        length = min(_COPY_CHUNK, self._written[name].size - offset)
        with self._failing():
            file, target = self._claim(name, offset, length)
            done = _copy_range(source, at, file, target, length)
            while done < length:
                part = buffer[: min(len(buffer), length - done)]
                source.read_into(part, at + done, name)
                file.write(part, target + done)
                done += len(part)
            self._finish(file, length)
        return length

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Turns what the system says of the output into an OutputError."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OutputError(
                    f"{self._output}: the disk is full, and nothing was left behind; free some "
                    "space, then run again"
                ) from error
            what = error.strerror or str(error)
            raise OutputError(f"{self._output}: cannot be written: {what}") from error

    def _claim(self, name: str, offset: int, length: int) -> tuple[_OpenFile, int]:
        """The file of tensor `name` and the position in it, for bytes that nobody wrote yet."""
        plan, begin = self._places[name]
        with self._lock:
            try:
                self._written[name].add(offset, offset + length)
            except ValueError as error:
                raise OutputError(f"{plan.name}: tensor {name!r}: bytes {error}") from None
            if plan.name not in self._open:
                self._open[plan.name] = _OpenFile(self._work / plan.name, plan, self._reserve)
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
        with self._failing():
            self._check_complete()
            self._copy_side_files(checkpoint)
            if len(self._files) > 1:
                _write_file(self._work / INDEX_NAME, index_bytes(self._files))
            text = json.dumps(config, indent=2) + "\n"
            _write_file(self._work / "config.json", text.encode())
            sync_directory(self._work)
            self._publish()
            sync_directory(self._output.parent)

    def _check_complete(self) -> None:
        """Every planned byte written, and every file one that the reference parser reads."""
        for plan in self._files:
            for tensor in plan.tensors:
                gap = self._written[tensor.name].gap()
                if gap:
                    raise OutputError(
                        f"{plan.name}: tensor {tensor.name!r}: bytes [{gap[0]}, {gap[1]}) missing"
                    )
            path = self._work / plan.name
            if not path.exists():  # nothing but empty tensors, so nobody wrote a byte of it
                _OpenFile(path, plan, self._reserve).seal()
            with safe_open(path, framework="pt") as opened:
                if set(opened.keys()) != {tensor.name for tensor in plan.tensors}:
                    raise OutputError(f"{plan.name}: does not hold the tensors that were planned")

    def _copy_side_files(self, checkpoint: Checkpoint) -> None:
        for side in checkpoint.side_files:
            target = self._work / side.name
            target.parent.mkdir(parents=True, exist_ok=True)
            source = checkpoint.directory / side.name
            try:
                shutil.copyfile(source, target)
            except FileNotFoundError as error:
                raise CheckpointError(f"{source}: vanished while the run was going on") from error

    def _publish(self) -> None:
        """One rename. What was finished is never thrown away: on failure it stays where it is."""
        self._keep = True
        try:
            if self._overwrite and self._output.exists():
                exchange(self._work, self._output)
                self._keep = False  # what is there now is the output of before
            else:
                self._work.rename(self._output)
        except OSError as error:
            raise OutputError(
                f"{self._output}: could not be put in place: {error.strerror}; the finished output "
                f"is {self._work}: move it where you want it"
            ) from error


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


def _lock_directory(work: Path) -> int:
    """Makes `work`, or takes over what a dead run left, and locks it: the lock dies with us."""
    while True:
        work.mkdir(exist_ok=True)
        descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(
                f"{work}: another run is writing this output; wait for it, or give another OUTPUT"
            ) from None
        # The run that had it may have published or removed it between our two calls.
        if work.exists() and os.path.samestat(os.fstat(descriptor), os.stat(work)):
            break
        os.close(descriptor)
    for left in work.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return descriptor


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
