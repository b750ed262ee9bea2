"""What is said to whoever runs a command: data on stdout, and on stderr what is for the eye."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from fp8stream.errors import OutputError
from fp8stream.memory import format_size
from fp8stream.report import escape

if TYPE_CHECKING:
    from fp8stream.stream import LayerDone
    from fp8stream.verify import Checked

SECONDS_BETWEEN_LINES = 30


class ReaderLeft(Exception):
    """Whoever read our data had enough of it, as `head` does."""


@contextmanager
def stdout() -> Iterator[None]:
    """Where data is printed: a reader that left is no failure, a full disk behind it is."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise ReaderLeft from None
    except OSError as error:
        raise OutputError(f"standard output cannot be written: {error.strerror}") from error


def warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        tell(f"warning: {warning}")


def tell(text: str) -> None:
    with suppress(OSError):
        click.echo(escape(text), err=True)


class Progress:
    """What to call for every layer. This one says nothing."""

    def __call__(self, done: "LayerDone | Checked") -> None:
        """A layer was written."""

    def close(self) -> None:
        """No layer comes any more."""


class _Bar(Progress):
    """A bar on a terminal."""

    def __init__(self, total: int, there: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=total,
            initial=there,
            unit="iB",
            unit_scale=True,
            unit_divisor=1024,
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def __call__(self, done: "LayerDone | Checked") -> None:
        with suppress(OSError):
            self._bar.set_description(escape(done.name), refresh=False)
            self._bar.update(done.bytes_read)

    def close(self) -> None:
        with suppress(OSError):
            self._bar.close()


class _Lines(Progress):
    """A plain line now and then, where there is no terminal."""

    def __init__(self, total: int, there: int) -> None:
        self._total = total
        self._there = there
        self._done = 0
        self._start = self._last = time.monotonic()

    def __call__(self, done: "LayerDone | Checked") -> None:
        self._done += done.bytes_read
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES or not self._done:
            return  # what was read tells the rate
        self._last = now
        rate = self._done / (now - self._start)
        reached = self._there + self._done
        left = (self._total - reached) / rate
        tell(
            f"{100 * reached / self._total:.0f} %: {format_size(reached)} of "
            f"{format_size(self._total)}, {format_size(rate)}/s, {left:.0f} s left, {done.name}"
        )


def open_progress(total: int, there: int, hidden: bool) -> Progress:
    """For a run of `total` bytes, `there` of which an earlier one has read."""
    if hidden:
        return Progress()
    return _Bar(total, there) if sys.stderr.isatty() else _Lines(total, there)
