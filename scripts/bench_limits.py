"""What this machine does at best: reading, writing, copying, casting, and nothing else.

    bench_limits.py '{"kind": "read", "threads": 2, ...}'

Does one kind of work (see `Probe`) and prints the seconds that it took, as JSON. A process of its
own, so that it starts in the state in which the programs that it is compared with start.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

MIB = 1 << 20
READ_BLOCK = 2 * MIB
WRITE_BLOCK = MIB
COPY_BLOCK = 8 * MIB
# Bytes of a file that may wait for the disk.
WRITE_BEHIND = 32 * MIB
SYNC_WAIT_BEFORE, SYNC_WRITE, SYNC_WAIT_AFTER = 1, 2, 4
FP8_MAX = 448.0
SCALE_BLOCK = 128
SLAB_ELEMENTS = 1 << 20
# The best tile depends on the caches, so the fastest of these is taken, before the clock starts.
TILE_ELEMENTS = (1 << 17, 1 << 18, 1 << 19)

Kind = Literal["read", "write", "turns", "copy", "cast"]
Task = TypeVar("Task")


@dataclass(frozen=True)
class Probe:
    """One kind of work for `threads` threads.

    read: all of the files `sources`; `on_disk` says that pages are given back once they were read.
    write: new files of `sizes` bytes in `target`; `on_disk` that the disk works while we write.
    turns: both of these, a block read and its share of the output written by turns.
    copy: the first `nbytes` of `sources` to a new file in `target`, by the kernel.
    cast: `elements` of bf16 to codes, in rows of `columns`, with scales as `scheme` says.
    """

    kind: Kind
    threads: int
    on_disk: bool = False
    sources: tuple[str, ...] = ()
    target: str = ""
    sizes: tuple[int, ...] = ()
    nbytes: int = 0
    elements: int = 0
    columns: int = 2048
    scheme: str = "channel"


@dataclass(frozen=True)
class Cost:
    """Seconds on the clock, and seconds of all cores together."""

    wall: float
    cpu: float
    tile_elements: int | None = None


@dataclass(frozen=True)
class Block:
    """A range of an open file, in bytes."""

    descriptor: int
    offset: int
    length: int


def measure(probe: Probe) -> Cost:
    """Does the work of `probe`. Buffers are there and touched, and files open, at the start."""
    works = {"read": _read, "write": _write, "turns": _turns, "copy": _copy, "cast": _cast}
    return works[probe.kind](probe)


def drain(tasks: Iterable[Task], workers: Sequence[Callable[[Task], None]]) -> Cost:
    """All `tasks`, each done by whichever of the workers is free; every worker is a thread."""
    pending, lock = iter(tasks), threading.Lock()

    def work(worker: Callable[[Task], None]) -> None:
        while True:
            with lock:
                try:
                    task = next(pending)
                except StopIteration:
                    return
            worker(task)

    wall, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(len(workers)) as pool:
        for future in [pool.submit(work, worker) for worker in workers]:
            future.result()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def _blocks(descriptor: int, size: int, length: int) -> Iterator[Block]:
    for offset in range(0, size, length):
        yield Block(descriptor, offset, min(length, size - offset))


def _source_blocks(probe: Probe) -> list[Block]:
    descriptors = [os.open(source, os.O_RDONLY) for source in probe.sources]
    return [
        block
        for descriptor in descriptors
        for block in _blocks(descriptor, os.fstat(descriptor).st_size, READ_BLOCK)
    ]


def _read(probe: Probe) -> Cost:
    blocks = _source_blocks(probe)
    workers = [_reader(probe.on_disk) for _ in range(probe.threads)]
    return drain(blocks, workers)


def _reader(gives_back: bool) -> Callable[[Block], None]:
    buffer = memoryview(bytearray(b"\1") * READ_BLOCK)

    def read(block: Block) -> None:
        done = 0
        while done < block.length:
            part = buffer[done : block.length]
            done += os.preadv(block.descriptor, [part], block.offset + done)
        if gives_back:
            # Else the kernel would search for pages to free, which takes longer.
            os.posix_fadvise(block.descriptor, block.offset, block.length, os.POSIX_FADV_DONTNEED)

    return read


def _new_file(path: Path, size: int) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.ftruncate(descriptor, size)
    return descriptor


def _turns(probe: Probe) -> Cost:
    """A converter without arithmetic: the disk is asked to read and to write at the same time."""
    reads, descriptors, writes = _source_blocks(probe), *_target_blocks(probe)
    share = len(writes) / len(reads)
    tasks = [
        (block, writes[int(n * share) : int((n + 1) * share)]) for n, block in enumerate(reads)
    ]

    def worker() -> Callable[[tuple[Block, list[Block]]], None]:
        read, write = _reader(probe.on_disk), _writer(probe.on_disk)

        def turn(task: tuple[Block, list[Block]]) -> None:
            read(task[0])
            for block in task[1]:
                write(block)

        return turn

    done = drain(tasks, [worker() for _ in range(probe.threads)])
    synced = drain(descriptors, [os.fsync])
    return Cost(done.wall + synced.wall, done.cpu + synced.cpu)


def _target_blocks(probe: Probe) -> tuple[list[int], list[Block]]:
    """New files, and the blocks that fill them."""
    target = Path(probe.target)
    descriptors = [_new_file(target / f"{n}.bin", size) for n, size in enumerate(probe.sizes)]
    blocks = [
        block
        for descriptor, size in zip(descriptors, probe.sizes, strict=True)
        for block in _blocks(descriptor, size, WRITE_BLOCK)
    ]
    return descriptors, blocks


def _write(probe: Probe) -> Cost:
    descriptors, blocks = _target_blocks(probe)
    written = drain(blocks, [_writer(probe.on_disk) for _ in range(probe.threads)])
    synced = drain(descriptors, [os.fsync])
    return Cost(written.wall + synced.wall, written.cpu + synced.cpu)


def _writer(on_disk: bool) -> Callable[[Block], None]:
    buffer = memoryview(bytearray(b"\1") * WRITE_BLOCK)

    def write(block: Block) -> None:
        done = 0
        while done < block.length:
            done += os.pwrite(block.descriptor, buffer[done : block.length], block.offset + done)
        if on_disk:
            _sync_range(block.descriptor, block.offset, block.length, SYNC_WRITE)
            if block.offset >= WRITE_BEHIND:
                _finish(block.descriptor, block.offset - WRITE_BEHIND, WRITE_BLOCK)

    return write


def _finish(descriptor: int, offset: int, length: int) -> None:
    """Waits until the disk has a range, and gives its pages back."""
    flags = SYNC_WAIT_BEFORE | SYNC_WRITE | SYNC_WAIT_AFTER
    _sync_range(descriptor, offset, length, flags)
    os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)


def _sync_range(descriptor: int, offset: int, length: int, flags: int) -> None:
    # Its result is of no interest: where there is no such call, the fsync at the end does it all.
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call(descriptor, ctypes.c_int64(offset), ctypes.c_int64(length), flags)


def _copy(probe: Probe) -> Cost:
    target = _new_file(Path(probe.target, "copy.bin"), probe.nbytes)
    tasks, done = [], 0
    for source in probe.sources:
        descriptor = os.open(source, os.O_RDONLY)
        size = min(os.fstat(descriptor).st_size, probe.nbytes - done)
        tasks += [(block, done + block.offset) for block in _blocks(descriptor, size, COPY_BLOCK)]
        done += size
    return drain(tasks, [_copier(target) for _ in range(probe.threads)])


def _copier(target: int) -> Callable[[tuple[Block, int]], None]:
    def copy(task: tuple[Block, int]) -> None:
        block, at = task
        done = 0
        while done < block.length:
            done += os.copy_file_range(
                block.descriptor, target, block.length - done, block.offset + done, at + done
            )

    return copy


def _cast(probe: Probe) -> Cost:
    import torch

    torch.set_num_threads(1)  # threads of ours are the parallelism
    tiles = [max(1, size // probe.columns // SCALE_BLOCK) * SCALE_BLOCK for size in TILE_ELEMENTS]
    trials = {rows: _cast_in_tiles(probe, rows, min(probe.elements, 32 << 20)) for rows in tiles}
    rows = min(trials, key=lambda rows: trials[rows].wall)
    cost = _cast_in_tiles(probe, rows, probe.elements)
    return Cost(cost.wall, cost.cpu, rows * probe.columns)


def _cast_in_tiles(probe: Probe, rows: int, elements: int) -> Cost:
    count = -(-elements // (rows * probe.columns))
    workers = [_caster(probe.scheme, rows, probe.columns) for _ in range(probe.threads)]
    cost = drain(range(count), workers)
    share = elements / (count * rows * probe.columns)  # the last tile was a whole one
    return Cost(cost.wall * share, cost.cpu * share)


def _caster(scheme: str, rows: int, columns: int) -> Callable[[int], None]:
    """Casts a tile [rows, columns] of a slab that stays in cache: every step that must be."""
    import torch

    tiles = max(1, SLAB_ELEMENTS // (rows * columns))
    slab = (torch.randn(tiles, rows, columns) * 0.02).bfloat16()
    scratch = torch.ones(rows, columns)
    magnitudes = scratch.view(torch.bfloat16).flatten()[: rows * columns].view(rows, columns)
    codes = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)

    @torch.inference_mode()
    def cast(number: int) -> None:
        tile = slab[number % tiles]
        torch.abs(tile, out=magnitudes)
        # As integers magnitudes order like the numbers, and their maximum is found sooner.
        amax = _amax(magnitudes.view(torch.int16), scheme).view(torch.bfloat16)
        scale = amax.float() / FP8_MAX
        scratch.copy_(tile)
        if scheme == "block":
            columns_of = scale[:, None, :].repeat_interleave(SCALE_BLOCK, 2)
            scratch.view(-1, SCALE_BLOCK, columns).div_(columns_of)
        else:
            scratch.div_(scale)
        codes.copy_(scratch)

    return cast


def _amax(magnitudes: Tensor, scheme: str) -> Tensor:
    """[rows, 1], [1, 1], or [bands, blocks]."""
    if scheme == "channel":
        return magnitudes.amax(1, keepdim=True)
    if scheme == "tensor":
        return magnitudes.amax().reshape(1, 1)
    columns = magnitudes.view(-1, SCALE_BLOCK, magnitudes.shape[1]).amax(1)
    return columns.view(len(columns), -1, SCALE_BLOCK).amax(2)


def main() -> int:
    fields: dict[str, Any] = json.loads(sys.argv[1])
    fields |= {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
    probe = Probe(**fields)
    print(json.dumps(vars(measure(probe))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
