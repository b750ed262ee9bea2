"""Ctrl-C and `kill`: the first stops a run at a safe point, a second ends the process at once.

Whatever a run has on record outlives its process, as it does a power cut. Alone the moment in which
an output is put in place hears no signal; what comes after it is the end of a run that is done,
which a first signal does not break off.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signalled(BaseException):
    """A signal came that asks us to stop."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted" if number == signal.SIGINT else "terminated")
        self.number = number


class Signals:
    """What came so far, and whether it is too late for it."""

    def __init__(self) -> None:
        self.came: Signalled | None = None
        self._deaf = False
        self._late = False

    def listen(self) -> None:
        """Stops at Ctrl-C and `kill`, in a shell's background too; not at a hang-up that `nohup`
        has ignored."""
        with suppress(ValueError):  # not the main thread: then nobody sends us signals either
            for number in _STOPPING:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._deaf:
            return
        if self.came:
            os._exit(128 + number)
        self.came = Signalled(number)
        self.check()

    def check(self) -> None:
        """Raises Signalled where we were asked to stop: again, as what we raise in the middle of an
        import, or of what Python calls as it frees an object, may be swallowed there."""
        if self.came and not self._late:
            raise self.came

    @contextmanager
    def too_late(self) -> Iterator[None]:
        """A step that no signal breaks off, and after which none stops us.

        Not a blocked mask, which holds for one thread: another would take the signal for us.
        """
        self.check()
        self._deaf = True
        try:
            yield
        finally:
            self._late, self._deaf = True, False
