"""Programs measured from outside, on files whose pages are in memory or are not, as asked.

Linux only. Nothing here knows what is measured, and nothing that is measured is used to measure.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import re
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20
SAMPLE_SECONDS = 0.01
_MAP_FAILED = ctypes.c_void_p(-1).value
_MINCORE_WINDOW = 1 << 30


class BenchError(Exception):
    """Nothing can be measured; the message says why and what to do."""


# --- programs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One finished process, seen from outside.

    `wall_seconds` from its start to its end; `cpu_seconds` user and system of all its threads;
    `anonymous_peak_bytes` RssAnon + RssShmem of it and its children, sampled; `resident_peak_bytes`
    the kernel's own high-water mark, mapped files included, as it stood at the last sample. Of the
    same span: the CPU seconds that others used, and those that a hypervisor withheld.
    """

    stdout: str
    wall_seconds: float
    cpu_seconds: float
    anonymous_peak_bytes: int
    resident_peak_bytes: int
    others_cpu_seconds: float
    stolen_seconds: float

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object that the program printed, or that its last line is."""
        text = self.stdout.strip()
        try:
            parsed = json.loads(text if text.startswith("{") else text.rpartition("\n")[2])
        except ValueError as error:
            raise BenchError(f"expected JSON, found {text[-200:]!r}") from error
        return dict(parsed)


def run(
    command: Sequence[str], directory: Path, environment: Mapping[str, str] | None = None
) -> Run:
    """Runs `command` in `directory` to its end. Raises BenchError with what it said if it fails."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        before, start = _Jiffies.now(), time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=directory,
            env={**os.environ, **(environment or {})},
            stdout=out,
            stderr=err,
        )
        sampler = _Sampler(process.pid)
        try:
            with sampler:
                # Not `process.wait()`, which does not tell what the process took.
                _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - start
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
        after = _Jiffies.now()
        cpu = usage.ru_utime + usage.ru_stime
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise BenchError(
                f"{shlex.join(command)[:500]}: exit code {process.returncode}: {err.read()[-2000:]}"
            )
        return Run(
            stdout=out.read(),
            wall_seconds=wall,
            cpu_seconds=cpu,
            anonymous_peak_bytes=sampler.anonymous,
            # Not `ru_maxrss`: it is no less than what we ourselves had when the process was made.
            resident_peak_bytes=sampler.resident,
            others_cpu_seconds=max(0.0, after.busy - before.busy - cpu),
            stolen_seconds=after.stolen - before.stolen,
        )


class _Sampler:
    """Watches a process and its children while it is open; peaks in bytes."""

    def __init__(self, pid: int) -> None:
        self.anonymous = self.resident = 0
        self._pid = pid
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        family, sample = [self._pid], 0
        while not self._closed.wait(SAMPLE_SECONDS):
            if sample % 10 == 0:  # to look for children takes longer than to look at memory
                family = list(_family(self._pid))
            statuses = [_status(member) for member in family]
            anonymous = sum(_bytes_in(status, "RssAnon|RssShmem") for status in statuses)
            self.anonymous = max(self.anonymous, anonymous)
            self.resident = max(self.resident, sum(_bytes_in(s, "VmHWM") for s in statuses))
            sample += 1


def _family(pid: int) -> Iterator[int]:
    yield pid
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _family(int(child))


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""  # it ended


def _bytes_in(status: str, keys: str) -> int:
    """What the lines with these keys add up to."""
    return 1024 * sum(map(int, re.findall(rf"^(?:{keys}):\s+(\d+)", status, re.MULTILINE)))


@dataclass(frozen=True)
class _Jiffies:
    """What all cores did since the machine started, in seconds."""

    busy: float
    stolen: float

    @staticmethod
    def now() -> _Jiffies:
        with open("/proc/stat") as stat:
            fields = stat.readline().split()[1:]
        tick = os.sysconf("SC_CLK_TCK")
        user, nice, system, _, _, irq, softirq, stolen = (int(f) / tick for f in fields[:8])
        return _Jiffies(user + nice + system + irq + softirq, stolen)


# --- files ----------------------------------------------------------------------------------------


def file_system(path: Path) -> str:
    """The type of the file system that `path` lies in, such as ext4 or tmpfs."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return "unknown"


def is_in_memory(path: Path) -> bool:
    """Whether the files there are their own page cache: nothing is cold, nothing is on a disk."""
    return file_system(path) in ("tmpfs", "ramfs")


def weight_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def total_size(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def drop_from_cache(files: Iterable[Path]) -> None:
    """Makes files cold. Written pages cannot be dropped before the disk has them."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def load_into_cache(files: Iterable[Path]) -> None:
    """Makes files warm, as far as memory goes."""
    buffer = bytearray(2 * MIB)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def cached_share(files: Iterable[Path]) -> float:
    """The share of the files' pages that are in memory, 0 to 1.

    Of a file that is somebody else's and not writable the kernel says that all is.
    """
    cached = pages = 0
    for file in files:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            for offset in range(0, size, _MINCORE_WINDOW):
                found = _pages_in_memory(
                    stream.fileno(), offset, min(_MINCORE_WINDOW, size - offset)
                )
                cached += sum(page & 1 for page in found)
                pages += len(found)
    return cached / pages if pages else 0.0


def _pages_in_memory(descriptor: int, offset: int, length: int) -> bytes:
    """For each page of a range of a file, an odd number if it is in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size, at = ctypes.c_size_t(length), ctypes.c_int64(offset)
    # Python's own `mmap` gives no address of what is mapped for reading only.
    where = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, at)
    if where == _MAP_FAILED:
        raise BenchError(f"mmap: {os.strerror(ctypes.get_errno())}")
    found = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    try:
        if libc.mincore(ctypes.c_void_p(where), size, found):
            raise BenchError(f"mincore: {os.strerror(ctypes.get_errno())}")
    finally:
        libc.munmap(ctypes.c_void_p(where), size)
    return bytes(found)


def settle(directory: Path, size: int) -> None:
    """Has free memory in the same state for whoever comes next, and the disk at rest.

    Under a hypervisor pages that were freed may have gone back to the host, and taking them again
    costs several times what free pages cost. Without this a contestant would gain or lose by what
    the one before it freed. So as many pages as an output of `size` bytes takes are used and freed:
    as a file in `directory` where that is memory, else as memory of our own, since a file would
    leave the disk busy.
    """
    available = meminfo("MemFree")
    if is_in_memory(directory):
        with tempfile.TemporaryFile(dir=directory) as file:
            block = bytes(MIB)
            for _ in range(0, size, MIB):
                file.write(block)
        return
    # Half of what is free at most: more would push out the files that are to be warm.
    with mmap.mmap(-1, max(mmap.PAGESIZE, min(size, available // 2))) as memory:
        for offset in range(0, len(memory), mmap.PAGESIZE):
            memory[offset] = 1
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        ctypes.CDLL(None).syncfs(descriptor)
    finally:
        os.close(descriptor)


# --- a bound on memory ----------------------------------------------------------------------------


class MemoryCgroup:
    """A memory cgroup of `limit` bytes, page cache included, gone when it is left."""

    def __init__(self, limit: int) -> None:
        """Raises BenchError where none can be made."""
        self.path, self._is_v2 = _new_cgroup()
        try:
            name = "memory.max" if self._is_v2 else "memory.limit_in_bytes"
            (self.path / name).write_text(str(limit))
        except OSError as error:
            self.path.rmdir()
            raise BenchError(f"{self.path}: {error.strerror}") from error
        # Where there is swap, it must be no way out; the files exist only where it is counted.
        swap, most = ("swap.max", 0) if self._is_v2 else ("memsw.limit_in_bytes", limit)
        with suppress(OSError):
            (self.path / f"memory.{swap}").write_text(str(most))

    def __enter__(self) -> MemoryCgroup:
        return self

    def __exit__(self, *error: object) -> None:
        self.path.rmdir()

    def wrap(self, command: Sequence[str]) -> tuple[str, ...]:
        """The command line that runs `command` inside."""
        script = 'echo $$ > "$0" && exec "$@"'
        return ("sh", "-c", script, str(self.path / "cgroup.procs"), *command)

    @property
    def peak_bytes(self) -> int | None:
        """The most that was charged to it, page cache included."""
        with suppress(OSError):
            name = "memory.peak" if self._is_v2 else "memory.max_usage_in_bytes"
            return int((self.path / name).read_text())
        return None

    @property
    def times_full(self) -> int | None:
        """How often something had to be given back for something else."""
        with suppress(OSError):
            if not self._is_v2:
                return int((self.path / "memory.failcnt").read_text())
            found = re.search(
                r"^max (\d+)", (self.path / "memory.events").read_text(), re.MULTILINE
            )
            return int(found[1]) if found else None
        return None


def _new_cgroup() -> tuple[Path, bool]:
    """A new empty cgroup under our own or, where that takes none, at the top; whether it is v2."""
    errors = []
    for parent, is_v2 in _cgroup_parents():
        path = parent / f"bench-{os.getpid()}"
        try:
            path.mkdir()
        except OSError as error:
            errors.append(f"{path}: {error.strerror}")
            continue
        if (path / ("memory.max" if is_v2 else "memory.limit_in_bytes")).exists():
            return path, is_v2
        path.rmdir()
        errors.append(f"{parent}: has no memory controller for its children")
    raise BenchError("no memory cgroup can be made: " + ("; ".join(errors) or "none is mounted"))


def _cgroup_parents() -> Iterator[tuple[Path, bool]]:
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own[controllers] = path.lstrip("/")
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    if (v1 / "memory.limit_in_bytes").exists():
        yield v1 / own.get("memory", ""), False
        yield v1, False
    elif (v2 / "cgroup.controllers").exists():
        yield v2 / own.get("", ""), True
        yield v2, True


# --- the machine ----------------------------------------------------------------------------------


def cores() -> int:
    return len(os.sched_getaffinity(0))


def meminfo(key: str) -> int:
    """A line of /proc/meminfo, in bytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def machine(directory: Path, root: Path) -> dict[str, Any]:
    """What a reader must know of the machine and the versions; `root` is the repository."""
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_bytes": meminfo("MemTotal"),
        "kernel": platform.release(),
        "file_system": file_system(directory),
        "huge_pages": _chosen("enabled"),
        "huge_pages_shmem": _chosen("shmem_enabled"),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "commit": _git(root, "rev-parse", "HEAD"),
        "commit_is_changed": bool(_git(root, "status", "--porcelain", "--", "fp8stream")),
    }


def _cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def _chosen(setting: str) -> str | None:
    with suppress(OSError):
        text = Path("/sys/kernel/mm/transparent_hugepage", setting).read_text()
        found = re.search(r"\[(\w+)\]", text)
        return found[1] if found else None
    return None


def _git(root: Path, *arguments: str) -> str | None:
    with suppress(OSError):
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None
    return None
