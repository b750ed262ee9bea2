"""An output that exists is whole.

Work happens in a directory beside the output, locked while its run lives, and one rename makes it
the output. What would stop that rename is looked for before any work is done.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fp8stream.checkpoint import Checkpoint
from fp8stream.errors import OutputError
from fp8stream.header import shorten
from fp8stream.memory import format_size
from fp8stream.system import exchange, sync_directory

WORK_SUFFIX = ".fp8stream-partial"
# Tells a directory that a run left unfinished from anything else that has its name.
MARKER = ".fp8stream-unfinished"


def check_output(output: Path, checkpoint: Checkpoint, needed: int, overwrite: bool) -> Path:
    """The real path to write to, or an OutputError before any work is done.

    Refused: an output that exists (unless it is an empty directory, or a checkpoint and `overwrite`
    says so), one inside the source or around any file of it, the current directory, a mount point,
    an unwritable place, a disk with less than `needed` bytes free.
    """
    target = Path(os.path.realpath(output))
    if not target.name:
        raise OutputError(f"{output}: OUTPUT has no name; give a directory below it")
    try:
        _check_apart(target, checkpoint)
        _check_absent(target, overwrite)
        parent = next(path for path in target.parents if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"{output}: cannot be created: {parent} is not a writable directory")
        free = shutil.disk_usage(parent).free + _left_behind(work_directory(target))
    except OSError as error:
        raise OutputError(f"{shorten(str(output))}: cannot be created: {error.strerror}") from error
    if free < needed:
        raise OutputError(
            f"{output}: not enough disk space in {parent}: expected {format_size(needed)} free, "
            f"found {format_size(free)}"
        )
    return target


def work_directory(output: Path) -> Path:
    """Where the output is made: beside it, so that a rename is enough to put it in place."""
    return output.with_name(output.name + WORK_SUFFIX)


def _check_apart(target: Path, checkpoint: Checkpoint) -> None:
    directory = Path(os.path.realpath(checkpoint.directory))
    if target in (directory, Path(os.path.realpath(checkpoint.path))):
        raise OutputError(f"{target}: OUTPUT is SOURCE itself; give another directory")
    if checkpoint.path.is_dir() and directory in target.parents:
        raise OutputError(f"{target}: OUTPUT lies inside SOURCE; give a directory outside it")
    # A link's target counts as well: the files of a snapshot may lie anywhere.
    for file in ("", "config.json", *checkpoint.file_names):
        above = Path(os.path.realpath(directory / file), "_").parents
        for place in (target, work_directory(target)):
            if place in above:
                raise OutputError(
                    f"{target}: OUTPUT contains SOURCE: {directory / file} is in {place}; give "
                    "another directory"
                )
    if target in Path(os.getcwd(), "_").parents:
        raise OutputError(
            f"{target}: the current directory or one above it, which cannot be put in place in one "
            f"step; give a directory inside it, such as {target / 'fp8'}"
        )


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
    names = os.listdir(target)
    if names and not overwrite:
        raise OutputError(
            f"{target}: exists already; --overwrite replaces it, once the new is whole"
        )
    if names and not ("config.json" in names and any(n.endswith(".safetensors") for n in names)):
        raise OutputError(
            f"{target}: holds {names[0]} and no checkpoint; --overwrite replaces checkpoints only"
        )


def _left_behind(work: Path) -> int:
    """Bytes that an unfinished run left, which taking over its directory sets free."""
    if not (work / MARKER).exists():
        return 0
    return sum(path.lstat().st_blocks * 512 for path in work.rglob("*"))


class OutputDirectory:
    """The directory `work` that will be `output`. Leaving it unpublished removes all of it."""

    def __init__(self, output: Path, overwrite: bool) -> None:
        """`output` is what `check_output` returned."""
        self.output = output
        self.work = work_directory(output)
        self._overwrite = overwrite
        self._made: list[Path] = []
        self._lock = -1
        self._keep = False

    def __enter__(self) -> "OutputDirectory":
        with self.failing():
            self._made = [parent for parent in self.work.parents if not parent.exists()]
            self.work.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock_directory(self.work)
        return self

    def __exit__(self, *error: object) -> None:
        if not self._keep:
            with suppress(OSError):
                _empty(self.work)
                # Last, so that what an interruption leaves is still known as ours.
                (self.work / MARKER).unlink(missing_ok=True)
                self.work.rmdir()
                for parent in self._made:
                    parent.rmdir()
        os.close(self._lock)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Turns what the system says of the output into an OutputError."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OutputError(
                    f"{self.output}: the disk is full, and nothing was left behind; free some "
                    "space, then run again"
                ) from error
            what = error.strerror or str(error)
            raise OutputError(f"{self.output}: cannot be written: {what}") from error

    def publish(self) -> None:
        """One rename. What was finished is never thrown away: on failure it stays where it is."""
        sync_directory(self.work)
        self._keep = True
        (self.work / MARKER).unlink()
        try:
            if self._overwrite and self.output.exists():
                exchange(self.work, self.output)
                self._keep = False  # what is there now is the output of before
            else:
                self.work.rename(self.output)
        except OSError as error:
            raise OutputError(
                f"{self.output}: could not be put in place: {error.strerror}; the finished output "
                f"is {self.work}: move it where you want it"
            ) from error
        sync_directory(self.output.parent)


def _lock_directory(work: Path) -> int:
    """Makes `work`, or takes over what a dead run left, and locks it: the lock dies with us."""
    while True:
        _make_work(work)
        descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(
                f"{work}: another run is writing this output; wait for it, or give another OUTPUT"
            ) from None
        except OSError:
            pass  # a file system without locks: two runs at once are then the user's to avoid
        # The run that had it may have published or removed it between our two calls.
        if os.path.lexists(work) and os.path.samestat(os.fstat(descriptor), os.lstat(work)):
            break
        os.close(descriptor)
    (work / MARKER).touch()
    _empty(work)
    return descriptor


def _empty(work: Path) -> None:
    """Removes everything in `work` but the marker."""
    for left in work.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        elif left.name != MARKER:
            left.unlink()


def _make_work(work: Path) -> None:
    """Raises OutputError if something is in the way that no run of ours made."""
    try:
        work.mkdir()
    except FileExistsError:
        ours = work.is_dir() and not work.is_symlink()
        if not ours or not ((work / MARKER).exists() or not os.listdir(work)):
            raise OutputError(
                f"{work}: in the way: expected nothing, or what an unfinished run left; look at it "
                "(a finished output that could not be put in place is kept there), then move or "
                "remove it"
            ) from None
