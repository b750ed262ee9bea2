"""Workers over tasks: a few threads, each with what it opened for itself, and one queue of work.

Whoever is free takes the next task, and what comes of it is told as it happens. The first error
stops all, and so does a caller who has had enough.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import TypeVar

from fp8stream.plan import Batch
from fp8stream.reader import ShardReader, Shards
from fp8stream.system import start_thread

Task = TypeVar("Task")
Event = TypeVar("Event")
Work = Callable[[Task], Iterable[Event]]


class Stopped(Exception):
    """A worker was told to stop in the middle of a task."""


def run_workers(
    tasks: Iterable[Task],
    count: int,
    open_worker: "Callable[[int, threading.Event], AbstractContextManager[Work[Task, Event]]]",
) -> Generator[Event, None, None]:
    """Yields what `count` workers make of `tasks`, in no fixed order.

    `open_worker` is called in the worker's own thread, with its number and an event that is set
    when it should stop: at the next chance it then raises Stopped. Raises the first error of any
    worker; closing the iterator stops them and waits for them.
    """
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()

    def run(number: int) -> None:
        try:
            with open_worker(number, stop) as work:
                while not stop.is_set() and (task := _next(waiting)) is not None:
                    for event in work(task):
                        events.put(event)
        except BaseException as error:
            stop.set()
            events.put(error)
        finally:
            events.put(None)

    threads = [
        threading.Thread(target=run, args=(number,), name=f"fp8stream-{number}", daemon=True)
        for number in range(count)
    ]
    try:
        for thread in threads:
            start_thread(thread)
        yield from _until_done(events, len(threads))
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:  # it may be that not all could be started
                thread.join()


def _next(waiting: "queue.SimpleQueue[Task]") -> Task | None:
    try:
        return waiting.get_nowait()
    except queue.Empty:
        return None


def _until_done(
    events: "queue.SimpleQueue[Event | BaseException | None]", workers: int
) -> Iterator[Event]:
    while workers:
        event = events.get()
        if isinstance(event, Stopped):
            continue
        if isinstance(event, BaseException):
            raise event
        if event is None:
            workers -= 1
        else:
            yield event


class OpenShard:
    """The shard of a checkpoint that a worker reads from, open until it asks for another one."""

    def __init__(self, reader: Shards) -> None:
        self._reader = reader
        self._shards = ExitStack()
        self._shard: ShardReader | None = None

    def close(self) -> None:
        """Closes the shard. Raises CheckpointError if it changed while it was open."""
        self._shards.close()

    def open(self, file: str) -> ShardReader:
        """The shard `file`. Raises CheckpointError as `Reader.open` does."""
        if self._shard is None or self._shard.file != file:
            self._shard = None
            self._shards.close()
            self._shard = self._shards.enter_context(self._reader.open(file))
        return self._shard

    def read_batch(self, batch: Batch, buffer: memoryview, again: bool = False) -> None:
        """Fills `buffer` with the batch's source, slab after slab.

        Its pages stay in memory where it will be read `again`.
        """
        done = 0
        for slab in batch.slabs:
            spec = slab.weight.spec
            shard = self.open(spec.file)
            shard.read_runs(buffer[done : done + slab.nbytes], slab.runs, spec)
            if not again:
                shard.give_back_runs(slab.runs, spec)
            done += slab.nbytes
