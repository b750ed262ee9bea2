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
from fp8stream.system import start_thread

MIB = 1 << 20
SMALLEST_SCRATCH = 128 * 128


@dataclass(frozen=True)
class BufferSizes:
    """What a worker's buffers are at best: bytes of a slab, elements of the scratch, slots that
    take turns; the bytes below which another worker gains nothing; and what an element of the
    scratch takes."""

    slab_bytes: int
    scratch_elements: int
    slots: int
    share: int
    element_bytes: int = 4


# A slab and its scratch stay in the caches, and are large enough that Python's share of the time is
# small; docs/performance.md has what else was tried.
ON_CPU = BufferSizes(4 * MIB, MIB // 2, 1, 4 * MIB)
# Large copies, and few launches; while one slot is on the device, the other is read into.
ON_GPU = BufferSizes(16 * MIB, 4 * MIB, 2, 32 * MIB)
# Quotients, what codes stand for, and two bytes: see comparison.py.
TO_VERIFY = BufferSizes(4 * MIB, MIB // 2, 1, 4 * MIB, 10)

# The least that no system counts to.
_NO_SIZE = 1 << 63
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}I": 1 << 10 * power for power, unit in enumerate("KMGT", start=1)}


def parse_size(text: str) -> int:
    """Bytes in `256MiB` (binary), `5GB` (decimal) or `1048576`. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if not match or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is not a size such as 256MiB, 5GB or 1048576")
    size = float(match[1]) * _UNITS[match[2]]
    if size >= _NO_SIZE:
        raise ValueError(f"{text!r} is more than any file or memory has")
    if size < 1:
        raise ValueError(f"{text!r} is not a positive size")
    return int(size)


def size_of(option: str, size: str | int) -> int:
    """Bytes in an option of the Python interface. Raises BudgetError for what is no size."""
    try:
        return parse_size(str(size))
    except ValueError:
        raise BudgetError(f"{option}: expected bytes or a size as '1GiB', found {size!r}") from None


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
    block scales), `row_elements` the widest row, and `itemsize` the smallest source element, since
    a slab of n bytes holds n / itemsize codes. `layers` is how many there are to share among
    workers.
    """

    row_bytes: int = 64 * 1024
    row_elements: int = 1
    itemsize: int = 2
    layers: int = 1


@dataclass(frozen=True)
class Workspace:
    """The buffers of a run: every byte that `--memory-budget` pays for.

    Each worker owns a scratch of elements of `element_bytes`, and `slots` times a slab of source
    bytes and one of codes; on a GPU the slots stand twice, in pinned host memory and on the device.
    `gpus` is how many the workers are dealt to.
    """

    workers: int
    slab_bytes: int
    codes_bytes: int
    scratch_elements: int
    slots: int = 1
    gpus: int = 0
    element_bytes: int = 4

    @property
    def host_bytes(self) -> int:
        source, codes = self.slots * self.slab_bytes, self.slots * self.codes_bytes
        if self.gpus:
            return self.workers * (_pinned(source) + _pinned(codes))
        return self.workers * (source + codes + self.element_bytes * self.scratch_elements)

    @property
    def device_bytes(self) -> int:
        if not self.gpus:
            return 0
        source, codes = self.slots * self.slab_bytes, self.slots * self.codes_bytes
        pools = _segment(source) + _segment(codes) + _segment(4 * self.scratch_elements)
        return self.workers * (pools + _SMALL_SEGMENTS)

    @property
    def total_bytes(self) -> int:
        return self.host_bytes + self.device_bytes


def _aligned(size: int) -> int:
    """`size` bytes as far as the next slot may begin, whatever its dtype."""
    return -(-size // 512) * 512


def _pinned(size: int) -> int:
    """What torch's allocator takes for `size` bytes of pinned memory: a power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def _segment(size: int) -> int:
    """What torch's caching allocator takes from a device for `size` bytes (c10's
    `get_allocation_size`): segments of 2 MiB for up to 1 MiB, of 20 MiB for up to 10."""
    if size <= MIB:
        return 2 * MIB
    return 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB


# Scales and what is computed on the way to them: small allocations of the kernels' stream, and of
# the default stream, which the workers of a device share.
_SMALL_SEGMENTS = 4 * MIB
# Torch has 32 streams to give away on a device, and a worker takes three.
_WORKERS_A_GPU = 8
# After so many nothing of any size above is left, and rows alone decide.
_MOST_HALVINGS = 63


def plan_workspace(
    demand: SlabDemand,
    budget: int,
    threads: int,
    gpus: int = 0,
    on_cpu: BufferSizes = ON_CPU,
) -> Workspace:
    """Buffers for as many of `threads` workers as `budget` bytes can feed.

    Raises BudgetError, naming the least that works, when not even one worker fits.
    """
    sizes = ON_GPU if gpus else on_cpu
    least = _workspace(demand, sizes, 1, gpus, _MOST_HALVINGS).total_bytes
    if least > budget:
        raise BudgetError(
            f"--memory-budget {format_size(budget)} is too small for this checkpoint: its widest "
            f"rows need {format_size(least)}; give at least {-(-least // MIB)}MiB"
        )
    # Two for each GPU, so that one's reading overlaps the other's writing.
    wanted = min(max(threads, 2 * gpus), demand.layers)
    if gpus:
        wanted = min(wanted, _WORKERS_A_GPU * gpus)
    workers = max(1, min(wanted, budget // max(least, sizes.share)))
    halvings = range(_MOST_HALVINGS + 1)
    smaller = (_workspace(demand, sizes, workers, gpus, times) for times in halvings)
    return next(space for space in smaller if space.total_bytes <= budget)


def _workspace(
    demand: SlabDemand, sizes: BufferSizes, workers: int, gpus: int, halvings: int
) -> Workspace:
    slab = _aligned(max(demand.row_bytes, sizes.slab_bytes >> halvings))
    codes = _aligned(slab // demand.itemsize)
    scratch = max(demand.row_elements, SMALLEST_SCRATCH, sizes.scratch_elements >> halvings)
    return Workspace(workers, slab, codes, scratch, sizes.slots, gpus, sizes.element_bytes)


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
        start_thread(self._thread)
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
