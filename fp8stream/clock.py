"""Where the time goes: seconds that threads were busy and blocked, for each stage of the work."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum


class Stage(str, Enum):
    """What a worker does with a slab. Kept tensors are copied, and know no other stage."""

    READ = "read"
    QUANTIZE = "quantize"
    WRITE = "write"
    COPY = "copy"


@dataclass
class Spent:
    """Seconds: on a core, and waiting for a disk, a device, a lock or a core."""

    busy: float = 0.0
    blocked: float = 0.0


@dataclass
class Clock:
    """Adds up what all threads spend. Thread-safe."""

    stages: dict[Stage, Spent] = field(default_factory=lambda: {stage: Spent() for stage in Stage})
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @contextmanager
    def measure(self, stage: Stage) -> Iterator[None]:
        """Counts the block's time, of this thread, as `stage`."""
        wall, busy = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            busy = time.thread_time() - busy
            wall = time.perf_counter() - wall
            with self._lock:
                spent = self.stages[stage]
                spent.busy += busy
                spent.blocked += max(0.0, wall - busy)
