"""Every call of a small run fails once, is cut short, kills the run or interrupts it."""

from __future__ import annotations

import errno
import random
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_case import SCHEMES, Outcome, Tiny, World
from chaos_shim import NONE, Action, Call, Fault, Kind, read_log

BASE = ("--threads", "1", "-q", "--device", "cpu", "--max-shard-size", "300KB")
# A run that is asked to stop does so within this, in seconds.
SOON = 1.0
_DISK = frozenset({Kind.CREATE, Kind.WRITE, Kind.SIZE, Kind.MKDIR, Kind.COPY})
_CHANGES = frozenset(Kind) - {Kind.OPEN, Kind.READ, Kind.SYNC, Kind.RANGE}
_INTERRUPTIBLE = frozenset({Kind.OPEN, Kind.CREATE, Kind.READ, Kind.WRITE, Kind.SYNC, Kind.SIZE})
_MOVING = frozenset({Kind.READ, Kind.WRITE, Kind.COPY})
_ERRORS: Mapping[Kind, tuple[int, ...]] = {
    Kind.OPEN: (errno.EIO, errno.EACCES, errno.ENOENT, errno.EMFILE),
    Kind.CREATE: (errno.EIO, errno.EACCES, errno.ENOSPC),
    Kind.READ: (errno.EIO, errno.ESTALE),
    Kind.WRITE: (errno.EIO, errno.ENOSPC, errno.EDQUOT),
    Kind.SYNC: (errno.EIO, errno.ENOSPC),
    Kind.RANGE: (errno.EIO, errno.EINVAL),
    Kind.SIZE: (errno.EIO, errno.ENOSPC),
    Kind.RENAME: (errno.EIO, errno.EACCES, errno.ENOSPC),
    Kind.EXCHANGE: (errno.EIO, errno.EINVAL),
    Kind.UNLINK: (errno.EIO, errno.EACCES),
    Kind.RMDIR: (errno.EIO, errno.EACCES),
    Kind.MKDIR: (errno.EIO, errno.EACCES, errno.ENOSPC),
    Kind.COPY: (errno.EIO, errno.ENOSPC, errno.EINVAL),
}


@dataclass(frozen=True)
class Setting:
    """A run that is disturbed: with a recorder that is always at work if `busy`, after an earlier
    one that was killed when it had made a share of its calls, or as soon as its output was in
    place."""

    name: str
    scheme: str = "channel"
    overwrite: bool = False
    busy: bool = False
    killed_at: float = 0.0
    published: bool = False
    more: tuple[str, ...] = ()


SETTINGS = (
    Setting("new"),
    Setting("replacing", "block-fp8", overwrite=True),
    Setting("recording", "tensor", busy=True),
    Setting("going on", "block", busy=True, killed_at=0.65),
    Setting("tidying up", overwrite=True, published=True),
    Setting("starting again", busy=True, killed_at=0.65, more=("--restart",)),
)


def recording(seconds: float) -> None:
    """Has the recorder of this process work at such intervals, and every layer end by itself."""
    from fp8stream import plan, recorder

    plan._LAYERS_A_TASK = 1
    recorder._INTERVAL = seconds
    recorder._PATIENCE = 0 if seconds < 1 else recorder._PATIENCE


def quiet() -> None:
    recording(60.0)


def busy() -> None:
    recording(0.0005)


def faults(kind: Kind) -> Iterator[tuple[str, Fault]]:
    """Everything that may happen at a call, under a name."""
    for code in _ERRORS[kind]:
        yield errno.errorcode[code], Fault(Action.FAIL, 0, code)
    if kind in _DISK:
        yield "ENOSPC from here on", Fault(Action.FAIL, 0, errno.ENOSPC, True, _DISK)
    if kind in _CHANGES:
        yield "EROFS from here on", Fault(Action.FAIL, 0, errno.EROFS, True, _CHANGES)
    if kind in (Kind.READ, Kind.SYNC):
        yield "EIO from here on", Fault(Action.FAIL, 0, errno.EIO, True, frozenset({kind}))
    if kind in _INTERRUPTIBLE:
        yield "EINTR", Fault(Action.FAIL, 0, errno.EINTR)
    if kind in _MOVING:
        yield "half", Fault(Action.SHORT, 0, 0)
        yield "one byte", Fault(Action.SHORT, 0, 1)
        yield "killed half-way", Fault(Action.KILL_HALF)
    yield "killed before", Fault(Action.KILL_BEFORE)
    yield "killed after", Fault(Action.KILL_AFTER)
    yield "SIGTERM", Fault(Action.SIGNAL, 0, signal.SIGTERM)
    yield "SIGINT", Fault(Action.SIGNAL, 0, signal.SIGINT)


def codes(call: Call, fault: Fault) -> set[int]:
    """How a run may end that this befell; it is over or not begun where that came too late."""
    if fault.action in (Action.KILL_BEFORE, Action.KILL_HALF, Action.KILL_AFTER):
        return {-signal.SIGKILL, 0}
    if fault.action is Action.SIGNAL:
        return {128 + fault.value, 0}
    interrupted = fault.value == errno.EINTR and call.kind in _INTERRUPTIBLE
    harmless = interrupted or (call.kind, fault.value) in {
        (Kind.COPY, errno.EINVAL),
        (Kind.EXCHANGE, errno.EINVAL),
        (Kind.RANGE, errno.EINVAL),
    }
    if call.kind is Kind.OPEN and call.path.endswith(".safetensors"):
        harmless = False  # torch, which the reference library asks to open files, does so once
    return {0} if fault.action is Action.SHORT or harmless else {0, 1}


@dataclass
class Tally:
    """What was done, and what went wrong."""

    cases: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest_stop: float = 0.0

    def add(self, what: str, wrong: list[str], ended: str) -> None:
        self.cases += 1
        self.ended[ended] += 1
        if wrong:
            self.failures.append(f"{what}: {'; '.join(wrong)}")


class Disturbed:
    """One setting, and the calls of an undisturbed run in it."""

    def __init__(self, directory: Path, setting: Setting) -> None:
        self.setting = setting
        arguments = (*BASE, *SCHEMES[setting.scheme])
        change = busy if setting.busy else quiet
        self.world = World(directory, Tiny(), arguments, setting.overwrite, change)
        self._before = NONE
        if setting.killed_at or setting.published:
            self._before = Fault(Action.KILL_AFTER, self._last_call_before())
        self.prepare()
        self.undisturbed = self.world.run(NONE, *setting.more, note=True)
        self.calls = [call for call in read_log(self.world.log) if call.result is not None]

    def _last_call_before(self) -> int:
        self.world.reset()
        self.world.run(note=True)
        calls = read_log(self.world.log)
        if not self.setting.published:
            return int(len(calls) * self.setting.killed_at)
        placed = {Kind.RENAME, Kind.EXCHANGE}
        to = str(self.world.output)
        return next(c.number for c in calls if c.kind in placed and c.other == to)

    def prepare(self) -> None:
        self.world.reset()
        if self._before != NONE:
            self.world.run(self._before)

    def cases(self) -> list[tuple[Call, str, Fault]]:
        every = ((call, *named) for call in self.calls for named in faults(call.kind))
        return [
            (call, name, Fault(fault.action, call.number, fault.value, fault.lasts, fault.kinds))
            for call, name, fault in every
        ]

    def disturb(self, call: Call, name: str, fault: Fault, tally: Tally) -> None:
        """One case: the run with the fault, what it leaves, and the run after it."""
        self.prepare()
        outcome = self.world.run(fault, *self.setting.more, note=True)
        # With a recorder at work not every run makes its calls in the same order.
        hit = next((c for c in read_log(self.world.log) if c.number == fault.first), call)
        wrong = outcome.complaints(codes(hit, fault)) + self.world.complaints()
        wrong += self._of_the_end(outcome, fault, tally)
        wrong += [] if outcome.code == 0 and not self.world.left() else self.world.going_on()
        path = hit.path.removeprefix(str(self.world.below))
        what = f"{self.setting.name}, call {hit.number} ({hit.kind.name} {path}), {name}"
        tally.add(what, wrong, _ended(outcome))

    def _of_the_end(self, outcome: Outcome, fault: Fault, tally: Tally) -> list[str]:
        wrong = []
        if outcome.code == 0 and not self.world.done:
            wrong.append("exit code 0 without the right output")
        if fault.action is Action.SIGNAL:
            tally.slowest_stop = max(tally.slowest_stop, outcome.seconds)
            if outcome.seconds > self.undisturbed.seconds + SOON:
                wrong.append(f"took {outcome.seconds:.2f} s to stop")
        return wrong


def _ended(outcome: Outcome) -> str:
    return "killed" if outcome.code < 0 else f"exit {outcome.code}"


def run(directory: Path, seed: int, share: float, only: str | None = None) -> dict[str, Any]:
    """Disturbs a share of all calls, in every way, in each setting. What came of it, for JSON."""
    tally, calls = Tally(), {}
    for setting in SETTINGS:
        if only not in (None, setting.name):
            continue
        disturbed = Disturbed(directory / setting.name.replace(" ", "-"), setting)
        cases = disturbed.cases()
        chosen = random.Random(f"{seed} {setting.name}")
        calls[setting.name] = len(disturbed.calls)
        for case in chosen.sample(cases, max(1, round(share * len(cases)))):
            disturbed.disturb(*case, tally)
    return {
        "cases": tally.cases,
        "calls": calls,
        "ended": dict(tally.ended),
        "slowest_stop_seconds": round(tally.slowest_stop, 3),
        "failures": tally.failures,
    }
