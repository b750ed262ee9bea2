"""An output that exists is whole, and what a run did is not lost with it.

Work happens in a directory beside the output, locked while its run lives. It holds what will be the
output, which one rename puts in place, and a journal of what is safely on disk, from which the same
command goes on. What would stop that rename is looked for before any work is done.
"""

import errno
import fcntl
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fp8stream.checkpoint import Checkpoint
from fp8stream.errors import OutputError
from fp8stream.header import shorten
from fp8stream.journal import (
    Fingerprint,
    Journal,
    differences,
    first_line,
    layers_line,
    parse_journal,
    publishing_line,
)
from fp8stream.memory import format_size
from fp8stream.system import append_all, exchange, sync_directory, write_file

WORK_SUFFIX = ".fp8stream-partial"
# In the directory beside the output. The journal tells what a run left from all that is not ours.
JOURNAL = "journal"
CONTENT = "output"
_NEW_JOURNAL = "journal.new"
_REPLACED = "replaced"
# The file of an output that is written last.
_LAST = "config.json"
# A line is some 60 bytes: more than a run of months writes.
_LARGEST_JOURNAL = 1 << 28


def check_output(output: Path, checkpoint: Checkpoint, needed: int, overwrite: bool) -> Path:
    """The real path to write to, or an OutputError before any work is done.

    Refused: an output that exists (unless it is an empty directory, or a checkpoint and `overwrite`
    says so), one inside the source or around any file of it, the current directory, a mount point,
    an unwritable place, a disk with less than `needed` bytes free, unless all that is left of a run
    is to tidy up.
    """
    target = Path(os.path.realpath(output))
    if not target.name:
        raise OutputError(f"{output}: OUTPUT has no name; give a directory below it")
    try:
        _check_apart(target, checkpoint)
        if _was_put_in_place(target):
            needed = 0
        else:
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


def is_unfinished(path: Path) -> bool:
    """Whether `path` is where a run has not put its output in place yet, or the output in there."""
    return any(part.name.endswith(WORK_SUFFIX) for part in (path, path.parent))


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
    """Bytes that an unfinished run left: going on needs them no more, and a new run frees them."""
    with suppress(FileNotFoundError):  # another run is at work there, and will be told of
        if (work / JOURNAL).exists():
            return sum(path.lstat().st_blocks * 512 for path in work.rglob("*"))
    return 0


def _read_journal(work: Path) -> Journal | None:
    """The journal of an unfinished run.

    Raises OutputError for one that no run wrote, or that cannot be read.
    """
    path = work / JOURNAL
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_JOURNAL:
            raise OutputError("not a file that a run wrote")
        return parse_journal(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror}") from error
    except OutputError as error:
        raise OutputError(_damaged(work, error)) from error


def _damaged(work: Path, what: OutputError) -> str:
    return f"{work / JOURNAL}: damaged: {what}; --restart discards the unfinished run"


def _was_put_in_place(target: Path) -> bool:
    """Whether OUTPUT is that of a run which was killed when only tidying up was left to do."""
    with suppress(OutputError):  # of the journal: whoever takes it over will say it
        return _is_in_place(target, _read_journal(work_directory(target)))
    return False


def _is_in_place(target: Path, journal: Journal | None) -> bool:
    if journal is None or journal.inode is None or not (target / _LAST).is_file():
        return False
    found = target.stat().st_ino, (target / _LAST).stat().st_mtime_ns
    return found == (journal.inode, journal.written)


def unfinished_run(target: Path, now: Callable[[], Fingerprint]) -> str | None:
    """What to say of an unfinished run that one of `now` goes on with; None if there is none.

    Raises OutputError if it is another one.
    """
    work = work_directory(target)
    before = _read_journal(work)
    if before is None or not before.layers or _is_in_place(target, before):
        return None
    _check_same(work, before, now())
    layers = sum(end - begin for begin, end in before.layers)
    return f"{work}: an unfinished run of this conversion, which goes on: {layers:,} layers done"


def _check_same(work: Path, before: Journal, now: Fingerprint) -> None:
    """Raises OutputError if the bytes of this run would not be those of the one before."""
    found = differences(before.fingerprint, now)
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise OutputError(
            f"{work}: an unfinished run of another conversion: {'; '.join(found[:3])}{more}; give "
            "its command and source to go on, or --restart to discard what it did"
        )


class OutputDirectory:
    """The directory whose `content` will be `output`. A context manager, locked while it is open.

    Left unpublished it stays, if anything of it is on record, for the same command to go on; else
    it is removed. `in_place` says that an earlier run had finished all but tidying up.
    """

    def __init__(
        self, output: Path, now: Fingerprint, overwrite: bool = False, restart: bool = False
    ) -> None:
        """`output` is what `check_output` returned; `restart` discards an unfinished run."""
        self.output = output
        self.work = work_directory(output)
        self.content = self.work / CONTENT
        self.in_place = False
        self._now = now
        self._overwrite = overwrite
        self._restart = restart
        self._before: Journal | None = None
        self._made: list[Path] = []
        self._lock = -1
        self._journal = -1
        self._recorded: set[int] = set()
        self._begun = False
        self._finished = False
        self._appending = threading.Lock()

    def __enter__(self) -> "OutputDirectory":
        with self.failing():
            self._made = [parent for parent in self.work.parents if not parent.exists()]
            self.work.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock_directory(self.work)
            try:
                self._begin()
            except BaseException:
                # What is there may be an unfinished run; all of it is ours only once we began.
                (self.__exit__ if self._begun else self._close)()
                raise
        return self

    def _begin(self) -> None:
        """Goes on from what an unfinished run left, or begins."""
        before = None if self._restart else _read_journal(self.work)
        if before and _is_in_place(self.output, before):
            self.in_place = before.fingerprint == self._now
            sync_directory(self.output.parent)
        elif before and before.layers:
            self._check_left(before)
            os.truncate(self.work / JOURNAL, before.size)
            self._before = before
        if not self.in_place:
            # Again, now that nobody else can put something there.
            _check_absent(self.output, self._overwrite)
            self._start()

    def _check_left(self, before: Journal) -> None:
        """Raises OutputError if this run cannot go on from what is there."""
        _check_same(self.work, before, self._now)
        inode = self.content.stat().st_ino if self.content.is_dir() else None
        if inode is None or self.content.is_symlink() or before.inode not in (None, inode):
            raise OutputError(
                f"{self.content}: not what the unfinished run left; --restart discards that run"
            )

    def _start(self) -> None:
        if self._before is None:
            self._discard()
            self._begun = True
            _check_absent(self.output, self._overwrite)  # it may be what went back
            write_file(self.work / _NEW_JOURNAL, first_line(self._now))
            (self.work / _NEW_JOURNAL).rename(self.work / JOURNAL)
            self.content.mkdir()
        # The name of each that was made stands in the one above it.
        for directory in (self.work, self.work.parent, *(path.parent for path in self._made)):
            sync_directory(directory)
        self._journal = os.open(self.work / JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def done(self, layers: int) -> frozenset[int]:
        """The numbers of those of so many layers that are on disk already. Raises OutputError."""
        try:
            before = self._before.done(layers) if self._before else frozenset()
            return before | self._recorded
        except OutputError as error:
            raise OutputError(_damaged(self.work, error)) from error

    def record(self, layers: Iterable[int]) -> None:
        """Notes for good that the bytes of these layers are on disk, as they must be.

        Raises OSError.
        """
        layers = list(layers)
        if self._append(layers_line(layers)):
            self._recorded.update(layers)

    def _append(self, line: bytes) -> bool:
        """False if the journal is closed: it may be another run's by now."""
        with self._appending:
            if self._journal < 0:
                return False
            append_all(self._journal, line)
            os.fdatasync(self._journal)
            return True

    def __exit__(self, *error: object) -> None:
        try:
            if not self.kept:
                with suppress(OSError):
                    self._discard()
                    self.work.rmdir()
                    for parent in () if self.in_place else self._made:
                        parent.rmdir()
        finally:
            self._close()

    @property
    def kept(self) -> bool:
        """Whether leaving now keeps what was done."""
        some = self._before is not None or bool(self._recorded) or self._finished
        return some and not self.in_place

    def _close(self) -> None:
        with self._appending:
            for descriptor in (self._journal, self._lock):
                if descriptor >= 0:
                    os.close(descriptor)
            self._journal = self._lock = -1

    def _discard(self) -> None:
        """Empties the directory. What was to be replaced goes back, if it was moved aside.

        Of an output that is in place the journal goes last: by it the same command knows that.
        """
        replaced, aside = self.work / _REPLACED, self.work / _NEW_JOURNAL
        if replaced.exists() and not self.output.exists():
            replaced.rename(self.output)
        last = self.work / JOURNAL
        if not self.in_place:
            # Not a journal any more, or a run could go on from what an interruption leaves of this;
            # and last, so that the directory is still known as ours.
            with suppress(FileNotFoundError):
                last.rename(aside)
            last = aside
        for left in sorted(self.work.iterdir(), key=lambda path: path == last):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Turns what the system says of the output into an OutputError."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OutputError(
                    f"{self.output}: the disk is full; free some space, then run again"
                ) from error
            what = error.strerror or str(error)
            raise OutputError(f"{self.output}: cannot be written: {what}") from error

    def publish(self) -> None:
        """One rename. What was finished is never thrown away: on failure it stays where it is."""
        _check_absent(self.output, self._overwrite)  # somebody may have come meanwhile
        sync_directory(self.content)
        written = (self.content / _LAST).stat().st_mtime_ns
        self._append(publishing_line(self.content.stat().st_ino, written))
        self._finished = True
        try:
            if self._overwrite and self.output.exists():
                exchange(self.content, self.output, self.work / _REPLACED)
            else:
                self.content.rename(self.output)
        except OSError as error:
            raise OutputError(
                f"{self.output}: could not be put in place: {error.strerror}; the finished output "
                f"is {self.content}: move it where you want it, or run again"
            ) from error
        # Before anything is tidied up, or after a failure the same command would find no journal.
        sync_directory(self.output.parent)
        self.in_place = True


def _lock_directory(work: Path) -> int:
    """Makes `work`, or takes over what a dead run left, and locks it: the lock dies with us."""
    while True:
        _make_work(work)
        try:
            descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # as below
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
            return descriptor
        os.close(descriptor)


def _make_work(work: Path) -> None:
    """Raises OutputError if something is in the way that no run of ours made."""
    try:
        work.mkdir()
    except FileExistsError:
        with suppress(FileNotFoundError):  # the run that had it has just removed it
            if stat.S_ISDIR(work.lstat().st_mode) and _is_ours(os.listdir(work)):
                return
            raise OutputError(
                f"{work}: in the way: expected nothing, or what an unfinished run left; look at "
                "it, then move or remove it"
            ) from None


def _is_ours(names: Sequence[str]) -> bool:
    """Whether a directory that holds `names` is one that a run of ours left."""
    return not names or JOURNAL in names or _NEW_JOURNAL in names
