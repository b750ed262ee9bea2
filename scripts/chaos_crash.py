"""A run is killed, and then the power fails: what was written and not synced is gone, or half gone.

The shim noted what every call destroyed, so a directory as the kill left it can be turned into one
that a power cut might have left:

- Data: of every file, bytes written (or sizes set) since the beginning of its last completed fsync
  or fdatasync are in doubt. Each page of 4 KiB goes back to what it was at some moment since then,
  chosen at random; one in four is torn, which is the same for each of its sectors of 512 bytes. The
  size goes back to one that it had since then; sync_file_range counts for nothing.
- Names: creating, renaming, exchanging and removing are on disk once the directory was synced that
  they happened in, and all that happened before them, as on a file system with a journal. Of the
  rest, however many last ones are undone.

A system that was only killed keeps its pages: what is in doubt stays so until a power cut, over as
many runs as there are till then.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from chaos_case import SCHEMES, Tiny, World
from chaos_faults import BASE, Tally, recording
from chaos_shim import Action, Call, Fault, Kind, read_log

SECTOR, PAGE = 512, 4096
_DATA = frozenset({Kind.WRITE, Kind.COPY, Kind.SIZE})
_NAMES = frozenset({Kind.CREATE, Kind.MKDIR, Kind.RENAME, Kind.EXCHANGE, Kind.UNLINK, Kind.RMDIR})
MOST_ATTEMPTS = 6


class Cut(Enum):
    """What a power cut takes of all that is in doubt."""

    AT_RANDOM = "at random"
    EVERYTHING = "everything"
    DATA = "data, no names"
    NAMES = "names, no data"


@dataclass(frozen=True)
class Doubt:
    """What is not known to be on disk: calls on the data of each inode, and names in order."""

    data: Mapping[int, Sequence[Call]]
    names: Sequence[Call]


def in_doubt(calls: Sequence[Call]) -> Doubt:
    """What of these calls no sync made certain."""
    done = [c for c in calls if c.result is not None and c.result >= 0]
    last_sync = {c.inode: at for at, c in enumerate(done) if c.kind is Kind.SYNC}
    synced_names = {c.path: at for at, c in enumerate(done) if c.kind is Kind.SYNC}
    data: dict[int, list[Call]] = {}
    names: list[Call] = []
    for at, call in enumerate(done):
        if call.kind in _DATA and at > last_sync.get(call.inode, -1):
            data.setdefault(call.inode, []).append(call)
        if call.kind in _NAMES:
            names.append(call)
            parent = os.path.dirname(call.other or call.path)
            if at < synced_names.get(parent, -1):
                names.clear()  # it is certain, and so is all that came before it
    return Doubt(data, names)


def cut_power(world: World, dice: random.Random, cut: Cut) -> int:
    """Takes what a power cut might: how many calls were in doubt."""
    doubt = in_doubt(read_log(world.log))
    files = {
        path.lstat().st_ino: path
        for root in (world.place, world.save)
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink()
    }
    if cut is not Cut.NAMES:
        for inode, calls in doubt.data.items():
            lose_data(files[inode], calls, dice, cut is not Cut.AT_RANDOM)
    count = len(doubt.names)
    kept = {Cut.AT_RANDOM: dice.randint(0, count), Cut.DATA: count}.get(cut, 0)
    for call in reversed(doubt.names[kept:]):
        undo_name(call, world.save)
    world.forget()
    return count + sum(map(len, doubt.data.values()))


def lose_data(path: Path, calls: Sequence[Call], dice: random.Random, all_of_it: bool) -> None:
    """Puts pages of a file back to what they were before some of the calls."""
    content = bytearray(path.read_bytes())
    new: list[bytes] = []
    sizes = [len(content)]
    for call in reversed(calls):
        new.append(bytes(content[call.offset : call.offset + _moved(call)]))
        content[call.offset : call.offset + len(call.old)] = call.old
        del content[call.old_size :]
        content += bytes(call.old_size - len(content))
        sizes.append(call.old_size)
    new.reverse()
    if not all_of_it:
        content += bytes(max(sizes) - len(content))
        _redo(content, calls, new, dice)
        size = dice.choice(sizes)
        del content[size:]
        content += bytes(size - len(content))
    with path.open("r+b") as stream:
        stream.write(content)
        stream.truncate()


def _moved(call: Call) -> int:
    """Bytes that a call wrote."""
    return (call.result or 0) if call.kind in (Kind.WRITE, Kind.COPY) else 0


def _redo(
    content: bytearray, calls: Sequence[Call], new: Sequence[bytes], dice: random.Random
) -> None:
    """Writes again what reached the disk of each page, of each sector of a torn one."""
    reached: dict[int, int] = {}
    for number, (call, data) in enumerate(zip(calls, new, strict=True)):
        for begin, end in _sectors(call.offset, call.offset + len(data)):
            sector = begin // SECTOR
            if sector not in reached:
                _decide(reached, sector * SECTOR // PAGE, len(calls), dice)
            if number < reached[sector]:
                content[begin:end] = data[begin - call.offset : end - call.offset]


def _decide(reached: dict[int, int], page: int, calls: int, dice: random.Random) -> None:
    """How many of the calls reached each sector of a page."""
    torn, whole = dice.random() < 0.25, dice.randint(0, calls)
    for sector in range(page * PAGE // SECTOR, (page + 1) * PAGE // SECTOR):
        reached[sector] = dice.randint(0, calls) if torn else whole


def _sectors(begin: int, end: int) -> Iterator[tuple[int, int]]:
    while begin < end:
        stop = min(end, (begin // SECTOR + 1) * SECTOR)
        yield begin, stop
        begin = stop


def undo_name(call: Call, save: Path) -> None:
    """Takes back what a call did to a directory."""
    kept = save / str(call.kept)
    if call.kind is Kind.CREATE:
        os.unlink(call.path)
    elif call.kind is Kind.MKDIR:
        os.rmdir(call.path)
    elif call.kind is Kind.RENAME:
        os.rename(call.other, call.path)
        if call.kept >= 0:
            kept.rename(call.other)
    elif call.kind is Kind.EXCHANGE:
        aside = save / "exchanged"
        for one, other in ((call.path, aside), (call.other, call.path), (aside, call.other)):
            os.rename(one, other)
    else:
        kept.rename(call.path)


def _record_first(self: Any) -> None:
    layers, self._finished = self._finished, []
    if layers:
        self._record(layers)
    for descriptor in list(self._files.values()):
        os.fdatasync(descriptor)


def _layers_last(self: Any) -> None:
    for descriptor in list(self._files.values()):
        os.fdatasync(descriptor)
    layers, self._finished = self._finished, []
    if layers:
        self._record(layers)


def _mutate(name: str | None) -> None:
    """Puts a bug into fp8stream, in this process."""
    from fp8stream import output, recorder, writer

    deaf = {**vars(os), "fdatasync": lambda descriptor: None}
    if name == "record-first":
        recorder.Recorder.flush = _record_first  # type: ignore[method-assign]
    if name == "layers-last":
        recorder.Recorder.flush = _layers_last  # type: ignore[method-assign]
    if name == "no-sync":
        recorder.os = SimpleNamespace(**deaf)  # type: ignore[assignment,attr-defined]
    if name == "no-sync-of-names":
        writer.sync_directory = lambda path: None  # type: ignore[attr-defined]
        output.sync_directory = lambda path: None  # type: ignore[attr-defined]


MUTANTS = ("record-first", "layers-last", "no-sync", "no-sync-of-names")


@dataclass(frozen=True)
class Setting:
    """A conversion to be cut off: the scheme, one file or several, what is in the way, threads."""

    scheme: str
    many_files: bool
    overwrite: bool
    threads: int

    @property
    def arguments(self) -> tuple[str, ...]:
        base = BASE if self.many_files else BASE[:-2]
        return (*base, "--threads", str(self.threads), *SCHEMES[self.scheme])


SETTINGS = tuple(
    Setting(scheme, number % 2 == 0, number % 3 == 0, 1 + number % 2)
    for number, scheme in enumerate([*SCHEMES, *SCHEMES, "channel"])
)


def run(directory: Path, seed: int, count: int, mutant: str | None = None) -> dict[str, Any]:
    """So many conversions, each killed and cut off several times. What came of it, for JSON.

    With a mutant, as many as it takes to find that.
    """

    def change() -> None:
        recording(0.0005)
        _mutate(mutant)

    worlds: dict[Setting, World] = {}
    tally, totals = Tally(), {"kills": 0, "power_cuts": 0, "calls_in_doubt": 0}
    for number in range(count):
        setting = SETTINGS[number % len(SETTINGS)]
        if setting not in worlds:
            where = directory / str(len(worlds))
            arguments = setting.arguments
            worlds[setting] = World(where, Tiny(layers=3), arguments, setting.overwrite, change)
        wrong = _conversion(worlds[setting], random.Random(f"{seed} {number}"), totals)
        tally.add(f"conversion {number} ({setting})", wrong, "wrong" if wrong else "identical")
        if wrong and mutant:
            break  # it was found
    return {"conversions": tally.cases, **totals, **tally.ended, "failures": tally.failures}


def _conversion(world: World, dice: random.Random, totals: dict[str, int]) -> list[str]:
    """One conversion to its end, through kills and power cuts: what is wrong with it."""
    world.reset()
    calls, wrong = 0, list[str]()
    for _ in range(dice.randint(1, MOST_ATTEMPTS)):
        calls = calls or _calls(world)
        action = dice.choice((Action.KILL_BEFORE, Action.KILL_HALF, Action.KILL_AFTER))
        outcome = world.run(Fault(action, dice.randint(16, calls)), undo=True)
        totals["kills"] += outcome.code < 0
        cut = dice.choice((*Cut, None, Cut.AT_RANDOM))
        if cut:
            totals["power_cuts"] += 1
            totals["calls_in_doubt"] += cut_power(world, dice, cut)
        if outcome.code >= 0 and not world.over(outcome):
            wrong += outcome.complaints({0})
        wrong += world.complaints()
        if wrong or (world.done and not world.left()):
            return wrong
    return world.going_on()


def _calls(world: World) -> int:
    """How many calls an undisturbed run makes, about."""
    world.run(note=True)
    calls = len(read_log(world.log))
    world.reset()
    return calls
