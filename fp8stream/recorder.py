"""What is finished becomes durable, then is recorded: in that order, and in the background.

Layers are noted as they end. Now and then whatever files were written are synced, and only then the
layers that had ended before are recorded. The recorder syncs through descriptors of its own, opened
before anything was written: a disk's failure is told to each descriptor once, and to no other.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from fp8stream.system import start_thread

# Seconds between records, or so many times what the last one took: a slow disk has other work.
_INTERVAL = 0.25
_PATIENCE = 10
_LAST_WAIT = 0.5


class Recorder:
    """Syncs files and calls `record` with the layers that are then on disk. Thread-safe."""

    def __init__(self, record: Callable[[Iterable[int]], None]) -> None:
        self._record = record
        self._finished: list[int] = []
        self._files: dict[Path, int] = {}
        self._sealed: set[Path] = set()
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._one_at_a_time = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fp8stream-recorder", daemon=True)

    def __enter__(self) -> "Recorder":
        start_thread(self._thread)
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join(_LAST_WAIT)
        if self._thread.is_alive():
            return  # a slow disk: whoever stops us does not wait for what the next run redoes
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def follow(self, path: Path) -> None:
        """Syncs the file from now on: nothing was written to it yet. Raises OSError."""
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with self._lock:
            self._files[path] = descriptor

    def sealed(self, path: Path) -> None:
        """Nothing will be written to the file any more."""
        with self._lock:
            self._sealed.add(path)

    def finished(self, layer: int) -> None:
        """All of the layer was written. Raises what the last record failed with."""
        self._raise()
        with self._lock:
            self._finished.append(layer)

    def flush(self) -> None:
        """Records whatever is finished. Raises OSError, and from then on always.

        A failure may concern layers that end later as well: nothing is recorded after it.
        """
        with self._one_at_a_time:
            self._raise()
            try:
                self._sync_and_record()
            except BaseException as error:
                self._error = error
                raise

    def _sync_and_record(self) -> None:
        # The layers before the files: what is written from here on is the next record's.
        with self._lock:
            layers, self._finished = self._finished, []
            files = list(self._files.items())
            sealed, self._sealed = self._sealed, set()
        if not layers and not sealed:
            return
        for path, descriptor in files:
            os.fdatasync(descriptor)
            if path in sealed:
                with self._lock:
                    del self._files[path]
                os.close(descriptor)
        if layers:
            self._record(layers)

    def _raise(self) -> None:
        if self._error:
            raise self._error

    def _watch(self) -> None:
        pause = _INTERVAL
        while not self._closed.wait(pause):
            start = time.monotonic()
            try:
                self.flush()
            except BaseException:
                return  # whoever finishes a layer, or the run, is told
            pause = max(_INTERVAL, _PATIENCE * (time.monotonic() - start))
