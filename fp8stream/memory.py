"""Memory, planned and measured.

What a conversion needs is decided before it starts, as a `Workspace`: so many workers, each with
the same few buffers, together within the budget. What it used is read from the kernel: anonymous
and shared pages are memory that the process needs; mapped file pages are not, and are reported
apart.
"""

import re
import threading
from dataclasses import dataclass
from pathlib import Path

from fp8stream.errors import BudgetError

MIB = 1 << 20
# Larger reads gained nothing on any disk or RAM disk tried, and a smaller ring leaves memory free.
LARGEST_SLAB = 16 * MIB
# Below this a worker's reads get so small that a further worker gains nothing.
SMALLEST_SHARE = 4 * MIB
# A float32 scratch of this many elements stays in a core's cache; on a GPU it amortizes launches.
CPU_SCRATCH_ELEMENTS = 256 * 1024
CUDA_SCRATCH_ELEMENTS = 4 * MIB
SMALLEST_SCRATCH = 128 * 128

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}I": 1 << 10 * power for power, unit in enumerate("KMGT", start=1)}


def parse_size(text: str) -> int:
    """Bytes in `256MiB` (binary), `5GB` (decimal) or `1048576`. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if not match or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is not a size such as 256MiB, 5GB or 1048576")
    size = int(float(match[1]) * _UNITS[match[2]])
    if size <= 0:
        raise ValueError(f"{text!r} is not a positive size")
    return size


def format_size(size: float) -> str:
    """`size` bytes for the eye, in binary units: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


@dataclass(frozen=True)
class SlabDemand:
    """What the layers of a plan ask of a worker's buffers, in bytes and elements.

    `row_bytes` is the smallest run of rows that can go through alone (one row, or 128 of them under
    block scales), `tensor_bytes` the largest tensor, `row_elements` the widest row, and `itemsize`
    the smallest source element, since a slab of n bytes holds n / itemsize codes. `layers` is how
    many there are to share among workers.
    """

    row_bytes: int = 64 * 1024
    tensor_bytes: int = 64 * 1024
    row_elements: int = 1
    itemsize: int = 2
    layers: int = 1


@dataclass(frozen=True)
class Workspace:
    """The buffers of a run: every byte that `--memory-budget` pays for.

    Each worker owns a slab of source bytes, a slab of codes and a float32 scratch; on a GPU the two
    slabs stand twice, in pinned host memory and on the device.
    """

    workers: int
    slab_bytes: int
    codes_bytes: int
    scratch_elements: int
    on_gpu: bool = False

    @property
    def host_bytes(self) -> int:
        if self.on_gpu:
            return self.workers * (_pinned(self.slab_bytes) + _pinned(self.codes_bytes))
        return self.workers * (self.slab_bytes + self.codes_bytes + 4 * self.scratch_elements)

    @property
    def device_bytes(self) -> int:
        per_worker = self.slab_bytes + self.codes_bytes + 4 * self.scratch_elements
        return self.workers * per_worker if self.on_gpu else 0

    @property
    def total_bytes(self) -> int:
        return self.host_bytes + self.device_bytes


def _pinned(size: int) -> int:
    """What torch's allocator takes for `size` bytes of pinned memory: a power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def plan_workspace(demand: SlabDemand, budget: int, threads: int, on_gpu: bool) -> Workspace:
    """Buffers for as many of `threads` workers as `budget` bytes can feed.

    Raises BudgetError, naming the least that works, when not even one worker fits.
    """
    scratch = max(demand.row_elements, SMALLEST_SCRATCH)
    least = _workspace(demand, demand.row_bytes, scratch, 1, on_gpu).total_bytes
    if least > budget:
        raise BudgetError(
            f"--memory-budget {format_size(budget)} is too small for this checkpoint: its widest "
            f"rows need {format_size(least)}; give at least {-(-least // MIB)}MiB"
        )
    if on_gpu:
        threads = max(threads, 2)  # so that one's copies overlap the other's arithmetic
    workers = max(1, min(threads, demand.layers, budget // max(least, SMALLEST_SHARE)))
    limit = CUDA_SCRATCH_ELEMENTS if on_gpu else CPU_SCRATCH_ELEMENTS
    share = budget // workers
    room = share - _workspace(demand, demand.row_bytes, 0, 1, on_gpu).total_bytes
    # Four bytes an element: no more than the smallest slab leaves, or a quarter of the share.
    affordable = min(room // 4, share // 16, demand.tensor_bytes // demand.itemsize)
    scratch = max(scratch, min(limit, affordable))
    fixed = _workspace(demand, 0, scratch, workers, on_gpu).total_bytes
    slab_byte = workers * (1 + 1 / demand.itemsize) * (2 if on_gpu else 1)
    slab = min(LARGEST_SLAB, demand.tensor_bytes, int((budget - fixed) / slab_byte))
    if on_gpu and slab:
        slab = 1 << slab.bit_length() - 1
    return _workspace(demand, max(slab, demand.row_bytes), scratch, workers, on_gpu)


def _workspace(
    demand: SlabDemand, slab: int, scratch: int, workers: int, on_gpu: bool
) -> Workspace:
    return Workspace(workers, slab, slab // demand.itemsize, scratch, on_gpu)


@dataclass(frozen=True)
class MemoryUsage:
    """Host memory of this process, in bytes: RssAnon + RssShmem, and all that is resident."""

    anonymous: int
    resident: int

    @staticmethod
    def now() -> "MemoryUsage":
        """Reads /proc/self/status."""
        kib = dict.fromkeys(("RssAnon", "RssShmem", "VmRSS"), 0)
        for line in Path("/proc/self/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in kib:
                kib[key] = int(value.split()[0])
        return MemoryUsage((kib["RssAnon"] + kib["RssShmem"]) * 1024, kib["VmRSS"] * 1024)


class PeakMeter:
    """Samples host memory while it is open; `baseline` is what was there when it opened."""

    def __init__(self, interval: float = 0.02) -> None:
        self.baseline = self.peak = MemoryUsage.now()
        self._interval = interval
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fp8stream-memory", daemon=True)

    def __enter__(self) -> "PeakMeter":
        self._thread.start()
        self.baseline = self.peak = MemoryUsage.now()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(self._interval):
            self.sample()

    def sample(self) -> None:
        now = MemoryUsage.now()
        self.peak = MemoryUsage(
            max(self.peak.anonymous, now.anonymous), max(self.peak.resident, now.resident)
        )
