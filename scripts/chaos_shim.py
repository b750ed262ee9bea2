"""The other side of chaos_shim.c: builds it, arms it, and reads what it noted."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from struct import Struct

SOURCE = Path(__file__).with_suffix(".c")
COMPILERS = ("cc", "gcc", "clang")


class ChaosError(Exception):
    """Something that is needed is not there."""


class Kind(IntEnum):
    """What a call does; the same numbers as in chaos_shim.c."""

    OPEN = 1
    CREATE = 2
    READ = 3
    WRITE = 4
    SYNC = 5
    RANGE = 6
    SIZE = 7
    RENAME = 8
    EXCHANGE = 9
    UNLINK = 10
    RMDIR = 11
    MKDIR = 12
    COPY = 13


class Action(IntEnum):
    """What happens at a call; the same numbers as in chaos_shim.c."""

    NOTHING = 0
    FAIL = 1
    SHORT = 2
    KILL_BEFORE = 3
    KILL_HALF = 4
    KILL_AFTER = 5
    SIGNAL = 6


@dataclass(frozen=True)
class Fault:
    """At call `first`, and at later ones of `kinds` if it `lasts`: `action`, with the `value` of an
    error or signal. A SHORT of value 1 moves one byte, else half."""

    action: Action = Action.NOTHING
    first: int = 0
    value: int = 0
    lasts: bool = False
    kinds: frozenset[Kind] = frozenset(Kind)


NONE = Fault()


def build(directory: Path) -> Path:
    """Compiles the shim into `directory`. Raises ChaosError where there is no C compiler."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise ChaosError("no C compiler: the calls of a run cannot be watched")
    library = directory / "chaos_shim.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ChaosError(f"the C compiler failed: {done.stderr.strip()[:500]}")
    return library


def is_preloaded() -> bool:
    return hasattr(ctypes.CDLL(None), "chaos_arm")


def arm(below: Path, fault: Fault = NONE, log: int = -1, save: Path | None = None) -> None:
    """Watches the files below a directory from now on, in this process."""
    last = (1 << 60) if fault.lasts else fault.first
    mask = sum(1 << kind for kind in fault.kinds)
    saved = os.fsencode(save) if save else b""
    numbers = ctypes.c_long(fault.first), ctypes.c_long(last)
    ctypes.CDLL(None).chaos_arm(
        os.fsencode(below), log, saved, *numbers, int(fault.action), fault.value, mask
    )


def counting(library: Path, below: Path, counters: Path, rate: float) -> Mapping[str, str]:
    """Variables that have a process count the bytes it reads and writes below a directory, and read
    `rate` MiB a second at most in each of its threads."""
    counters.write_bytes(bytes(4096))
    return {
        "LD_PRELOAD": str(library),
        "CHAOS_BELOW": str(below),
        "CHAOS_COUNTERS": str(counters),
        "CHAOS_NANOSECONDS_A_MIB": str(int(1e9 / rate) if rate else 0),
    }


def counted(counters: Path) -> tuple[int, int]:
    """Bytes read and written so far."""
    data = counters.read_bytes()
    return int.from_bytes(data[:8], "little"), int.from_bytes(data[8:16], "little")


_RECORD = Struct("<IIIIQQqqqqIIQ")
_MAGIC = 0x63616F73


@dataclass(frozen=True)
class Call:
    """A call that was made, and what it destroyed: `old` bytes at `offset` of a file that had
    `old_size`, or the file that was moved aside under the number `kept`."""

    number: int
    kind: Kind
    path: str
    other: str
    inode: int
    offset: int
    length: int
    old_size: int
    old: bytes
    result: int | None = None
    kept: int = -1


def read_log(path: Path) -> list[Call]:
    """The calls in order. The result of one that never ended is None."""
    calls: list[Call] = []
    open_calls: dict[int, int] = {}
    for phase, call in _records(path.read_bytes()):
        if not phase:
            open_calls[call.number] = len(calls)
            calls.append(replace(call, result=None))
        elif call.number in open_calls:
            at = open_calls.pop(call.number)
            calls[at] = replace(calls[at], result=call.result, kept=call.length)
    return calls


def _records(data: bytes) -> Iterator[tuple[int, Call]]:
    at = 0
    while at + _RECORD.size <= len(data):
        magic, kind, phase, _, number, inode, *rest = _RECORD.unpack_from(data, at)
        offset, length, old_size, result, path_bytes, other_bytes, data_bytes = rest
        if magic != _MAGIC:
            raise ChaosError(f"the log is damaged at byte {at}")
        at += _RECORD.size
        names = data[at : at + path_bytes], data[at + path_bytes : at + path_bytes + other_bytes]
        at += path_bytes + other_bytes
        path, other = map(os.fsdecode, names)
        old = data[at : at + data_bytes]
        at += data_bytes
        yield (
            phase,
            Call(number, Kind(kind), path, other, inode, offset, length, old_size, old, result),
        )
