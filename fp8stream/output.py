"""An output that exists is whole, and what a run did is not lost with it.

Work happens in a directory beside the output, locked while its run lives. It holds what will be the
output, which one rename puts in place, and a journal of what is safely on disk, from which the same
command goes on. What would stop that rename is looked for before any work is done.
"""

import errno
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from fp8stream.checkpoint import INDEX_SUFFIX, WORK_SUFFIX, Checkpoint
from fp8stream.errors import CheckpointError, OutputError, listed
from fp8stream.header import open_regular, shorten
from fp8stream.journal import (
    Fingerprint,
    Journal,
    differences,
    files_digest,
    first_line,
    is_journal,
    layers_line,
    parse_journal,
    publishing_line,
)
from fp8stream.lock import LOCK, lock_directory
from fp8stream.memory import format_size
from fp8stream.system import append_all, exchange, sync_directory, write_file

# In the directory beside the output. The journal tells what a run left from all that is not ours.
JOURNAL = "journal"
CONTENT = "output"
_NEW_JOURNAL = "journal.new"
_REPLACED = "replaced"
_OURS = {JOURNAL, CONTENT, _NEW_JOURNAL, _REPLACED, LOCK}
# The file of an output that is written last.
_LAST = "config.json"
# A line is some 60 bytes: more than a run of months writes.
_LARGEST_JOURNAL = 1 << 28
# Seconds that leaving waits for a record under way: a slow disk takes more of them.
_LAST_WAIT = 0.1


def check_output(
    output: Path,
    checkpoint: Checkpoint,
    needed: int,
    overwrite: bool,
    now: Callable[[], Fingerprint],
) -> Path:
    """The real path to write to, or an OutputError before any work is done.

    Refused: an output that exists (unless it is an empty directory, or a checkpoint and `overwrite`
    says so), one inside the source or around any file of it, the current directory, a mount point,
    an unwritable place, a disk with less than `needed` bytes free, unless all that is left of a run
    of `now` is to tidy up.
    """
    target = Path(os.path.realpath(output))
    if not target.name:
        raise OutputError(f"{output}: OUTPUT has no name; give a directory below it")
    try:
        _check_apart(target, checkpoint)
        if _was_put_in_place(target, now):
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
    """Whether `path` is where a run works that has not put its output in place yet, or the output
    in there, or a file of that. The journal tells, whatever the directory is called."""
    place = Path(os.path.realpath(path))
    place = place if place.is_dir() else place.parent
    works = [place, *([place.parent] if place.name == CONTENT else [])]
    return any(_has_journal(work) and (work / CONTENT).is_dir() for work in works)


def _has_journal(work: Path) -> bool:
    """Whether a run of ours left a journal there; something else may have that name."""
    with suppress(OutputError):
        return _read_journal(work) is not None
    return False


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
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        what = "a link that leads nowhere" if target.is_symlink() else "a file"
        raise OutputError(f"{target}: expected a new or empty directory, found {what}")
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
        if work.is_dir() and _is_ours(work):
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


def _was_put_in_place(target: Path, now: Callable[[], Fingerprint]) -> bool:
    """Whether OUTPUT is that of a run of `now`, killed when only tidying up was left to do."""
    with suppress(OutputError):  # of the journal: whoever takes it over will say it
        journal = _read_journal(work_directory(target))
        if journal is not None and _is_in_place(target, journal):
            return journal.fingerprint == now()
    return False


def _is_in_place(target: Path, journal: Journal) -> bool:
    if journal.inode is None or not (target / _LAST).is_file():
        return False
    found = target.stat().st_ino, (target / _LAST).stat().st_mtime_ns, _files_of(target)
    return found == (journal.inode, journal.written, journal.files)


def _files_of(directory: Path) -> str:
    """A digest of what makes a checkpoint of a directory: its tensor files, index and config."""
    with os.scandir(directory) as entries:
        sizes = {entry.name: entry.stat(follow_symlinks=False).st_size for entry in entries}
    ends = (".safetensors", INDEX_SUFFIX)
    return files_digest({n: s for n, s in sizes.items() if n.endswith(ends) or n == _LAST})


def _was_moved_away(work: Path, journal: Journal) -> bool:
    """Whether a finished output was put in place, and then somewhere else by somebody."""
    return journal.inode is not None and not os.path.lexists(work / CONTENT)


def unfinished_run(target: Path, now: Callable[[], Fingerprint]) -> str | None:
    """What to say of an unfinished run that one of `now` goes on with; None if there is none.

    Raises OutputError if it is another one.
    """
    work = work_directory(target)
    if os.path.lexists(work):
        _check_ours(work)
    before = _read_journal(work)
    if before is None or not before.layers or _is_in_place(target, before):
        return None
    if _was_moved_away(work, before):
        return None
    _check_same(work, before, now())
    layers = sum(end - begin for begin, end in before.layers)
    return f"{work}: an unfinished run of this conversion, which goes on: {layers:,} layers done"


def _check_same(work: Path, before: Journal, now: Fingerprint) -> None:
    """Raises OutputError if the bytes of this run would not be those of the one before."""
    found = differences(before.fingerprint, now)
    if found:
        raise OutputError(
            f"{work}: an unfinished run of another conversion: {listed(found, 3, '; ')}; give "
            "its command and source to go on, or --restart to discard what it did"
        )


class OutputDirectory:
    """The directory whose `content` will be `output`. A context manager, locked while it is open.

    Left unpublished it stays, if anything of it is on record, for the same command to go on; else
    it is removed. `in_place` says that an earlier run had finished all but tidying up, and `locked`
    that no other run can come in between: not every file system can say so. `placed` says that this
    run put it in place, if not for good. `left` is what to say where tidying up failed.
    """

    def __init__(
        self, output: Path, now: Fingerprint, overwrite: bool = False, restart: bool = False
    ) -> None:
        """`output` is what `check_output` returned; `restart` discards an unfinished run."""
        self.output = output
        self.work = work_directory(output)
        self.content = self.work / CONTENT
        self.in_place = False
        self.locked = False
        self.placed = False
        self.left: str | None = None
        self._now = now
        self._overwrite = overwrite
        self._restart = restart
        self._before: Journal | None = None
        self._made: list[Path] = []
        self._lock = -1
        self._journal = -1
        self._recorded: frozenset[int] = frozenset()
        self._recording = False
        self._begun = False
        self._finished = False
        self._appending = threading.Lock()

    def __enter__(self) -> "OutputDirectory":
        with self.failing():
            self._made = [parent for parent in self.work.parents if not parent.exists()]
            self.work.parent.mkdir(parents=True, exist_ok=True)
            self._lock, self.locked = lock_directory(self.work, lambda: _make_work(self.work))
            try:
                self._begin()
            except BaseException:
                if self._begun:
                    self.__exit__()
                else:
                    # What is there may be an unfinished run: it stays, if there is anything.
                    with suppress(OSError):
                        if os.listdir(self.work) == [LOCK]:
                            self._remove_work()
                    self._close_journal()
                    self._unlock()
                raise
        return self

    def _begin(self) -> None:
        """Goes on from what an unfinished run left, or begins."""
        before = None if self._restart else _read_journal(self.work)
        if before and _is_in_place(self.output, before):
            self.in_place = before.fingerprint == self._now
            self._sync_name()
        elif before and before.layers and not _was_moved_away(self.work, before):
            self._check_left(before)
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
        if self._before:
            # By descriptor, as Python does that again where a signal cuts it short.
            os.ftruncate(self._journal, self._before.size)

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
        with self._appending:
            if self._journal < 0:
                return  # it may be another run's by now
            self._recording = True  # whoever stops us meanwhile must take it for done
            try:
                self._append(layers_line(layers))
            except OSError:
                self._recording = bool(self._recorded)
                raise
            # Another set: somebody may be reading this one.
            self._recorded = self._recorded.union(layers)

    def _append(self, line: bytes) -> None:
        append_all(self._journal, line)
        os.fdatasync(self._journal)

    def __exit__(self, *error: object) -> None:
        if not self._close_journal():
            # A slow disk: whoever stops us does not wait for a record. Somebody is at work in
            # there, and nothing is removed; the lock ends with the process, and so does he.
            return
        try:
            if not self.kept:
                self._tidy_up()
        finally:
            self._unlock()

    def _tidy_up(self) -> None:
        try:
            self._discard()
            self._remove_work()
        except OSError as error:
            if os.path.lexists(self.work):
                where = f"{self.work}: could not be removed: {error.filename or self.work}"
                self.left = f"{where}: {error.strerror}; the same command does it, once it can"
        with suppress(OSError):  # somebody may have put something else there
            for parent in () if self.in_place else self._made:
                parent.rmdir()

    def _remove_work(self) -> None:
        """Removes the directory, of which the lock is left. From here on it may be another run's:
        nothing else in it is touched any more."""
        (self.work / LOCK).unlink()
        self._unlock()  # NFS keeps a file under another name as long as it is open
        try:
            self.work.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise

    @property
    def kept(self) -> bool:
        """Whether leaving now keeps what was done."""
        some = self._before is not None or self._recording or self._finished
        return some and not self.in_place

    def _close_journal(self) -> bool:
        """From here on nothing is recorded. False if something just is, and will be for a while."""
        if not self._appending.acquire(timeout=_LAST_WAIT):
            return False
        try:
            if self._journal >= 0:
                os.close(self._journal)
            self._journal = -1
        finally:
            self._appending.release()
        return True

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def _discard(self) -> None:
        """Empties the directory but for the lock. What was to be replaced goes back, if it was
        moved aside.

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
            if left.name == LOCK:
                continue
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

    def publish(self, placing: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """One rename, made inside of `placing`.

        What was finished is never thrown away: on failure it stays where it is.
        """
        try:
            _check_absent(self.output, self._overwrite)
        except OutputError as error:  # somebody came meanwhile
            raise OutputError(
                f"{error}; the finished output is {self.content}: move it where you want it"
            ) from error
        sync_directory(self.content)
        inode, written = self.content.stat().st_ino, (self.content / _LAST).stat().st_mtime_ns
        with self._appending:
            self._append(publishing_line(inode, written, _files_of(self.content)))
        self._finished = True
        try:
            with placing():
                if self._overwrite and self.output.exists():
                    exchange(self.content, self.output, self.work / _REPLACED)
                else:
                    self.content.rename(self.output)
        except OSError as error:
            raise OutputError(
                f"{self.output}: could not be put in place: {error.strerror}; the finished output "
                f"is {self.content}: move it where you want it"
            ) from error
        self.placed = True
        # Before anything is tidied up, or after a failure the same command would find no journal.
        self._sync_name()
        self.in_place = True

    def _sync_name(self) -> None:
        try:
            sync_directory(self.output.parent)
        except OSError as error:
            raise OutputError(
                f"{self.output}: is whole and in place, but may be lost with the power: "
                f"{self.output.parent} cannot be synced: {error.strerror}; the same command tries "
                "again"
            ) from error


def _make_work(work: Path) -> None:
    """Raises OutputError if something is in the way that no run of ours made."""
    try:
        work.mkdir()
    except FileExistsError:
        with suppress(FileNotFoundError):  # the run that had it has just removed it
            _check_ours(work)


def _check_ours(work: Path) -> None:
    """Raises OutputError if no run of ours made what stands there."""
    if not stat.S_ISDIR(work.lstat().st_mode) or not _is_ours(work):
        raise OutputError(
            f"{work}: in the way: expected nothing, or what an unfinished run left; look at it, "
            "then move or remove it"
        )


def _is_ours(work: Path) -> bool:
    """Whether a directory is one that a run of ours left: there was no journal yet, or there is
    one, or what a crash made of it, and then nothing but what we put there."""
    names = {*os.listdir(work)}
    journals = names & {JOURNAL, _NEW_JOURNAL}
    if any(is_journal(_begin_of(work / name)) for name in journals):
        return True
    return names <= (_OURS if journals else {LOCK})


def _begin_of(path: Path) -> bytes:
    """The first bytes of a file; none where there is no file."""
    try:
        with open_regular(path) as stream:
            return stream.read(64)
    except (OSError, CheckpointError):
        return b""
