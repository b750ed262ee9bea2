"""Checkpoint in, checkpoint out: read, materialize, quantize, write, release, within one budget.

Each worker owns one lane of buffers and takes layers from a common queue. A layer that is larger
than a slab goes through in runs of rows, and small ones go together, which changes no byte of the
result. Workers read, quantize and write by themselves: while one waits for a disk or for a device,
the others go on.
"""

import math
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fp8stream.checkpoint import Checkpoint
from fp8stream.clock import Clock, Stage
from fp8stream.device import TORCH_DTYPES, Lane, Slot, bytes_of, open_lane, running_out_of_memory
from fp8stream.errors import SourceChangedError, WeightError
from fp8stream.fp8 import is_finite, weight_scale
from fp8stream.layerwise import Layer, build_skeleton
from fp8stream.memory import Workspace
from fp8stream.plan import Batch, LayerPlan, Plan, Slab, Task, TensorPlan
from fp8stream.reader import Reader, ShardReader, Shards
from fp8stream.scheme import Granularity
from fp8stream.views import Runs
from fp8stream.weights import WeightPlan
from fp8stream.work import OpenShard, Stopped, run_workers


@dataclass(frozen=True)
class LayerDone:
    """A layer was written whole. Bytes of source read and of output written for it."""

    name: str
    bytes_read: int
    bytes_written: int


class Sink(Protocol):
    """Where codes, scales and kept tensors go. Its methods are called from several threads."""

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Takes `data` for byte `offset` of the tensor `name`, before it returns."""

    def copy(
        self, name: str, offset: int, length: int, source: ShardReader, at: int, buffer: memoryview
    ) -> int:
        """Takes up to `length` bytes of the tensor `name`, from byte `at` of `source`: how many."""

    def finished(self, layer: int) -> None:
        """Everything of the layer with this number came."""


@runtime_checkable
class RunsSink(Protocol):
    """A sink that takes many runs of a tensor at once, as rows that alternate with others."""

    def write_runs(self, name: str, runs: Runs, data: memoryview) -> None:
        """Takes `data` for the runs of elements of the tensor `name`, one after another."""


def stream_layers(
    checkpoint: Checkpoint,
    plan: Plan,
    sink: Sink,
    devices: Sequence[torch.device],
    clock: Clock | None = None,
    tasks: Iterable[Task] | None = None,
) -> Generator[LayerDone, None, None]:
    """Converts the layers of `tasks`, by default all of `plan`, as `stream_tasks` does."""
    reader = Reader(checkpoint.directory, checkpoint.shards)
    queued = plan.tasks() if tasks is None else tasks
    return stream_tasks(queued, plan.workspace, reader, sink, devices, clock)


def stream_tasks(
    tasks: Iterable[Task],
    workspace: Workspace,
    reader: Shards,
    sink: Sink,
    devices: Sequence[torch.device],
    clock: Clock | None = None,
) -> Generator[LayerDone, None, None]:
    """Converts the layers of `tasks`, and yields an event as each is done, in no fixed order.

    Workers are dealt to `devices` in turn, and whoever is free takes the next layers. `clock`
    counts where the time goes. Raises the first error of any worker; closing the iterator stops the
    workers at the end of their slab.
    """
    clock = clock or Clock()

    @contextmanager
    def open_worker(
        number: int, stop: threading.Event
    ) -> Iterator[Callable[[Task], Iterator[LayerDone]]]:
        with running_out_of_memory(), torch.inference_mode():
            lane = open_lane(workspace, devices[number % len(devices)])
            with Worker(lane, workspace.slab_bytes, reader, sink, clock, stop) as worker:
                yield worker.work

    try:
        yield from run_workers(tasks, workspace.workers, open_worker)
    finally:
        reader.give_back()


class Worker:
    """One lane of buffers, and the layers that go through it."""

    def __init__(
        self,
        lane: Lane,
        slab_bytes: int,
        reader: Shards,
        sink: Sink,
        clock: Clock,
        stop: threading.Event,
    ) -> None:
        self._lane = lane
        self._slab_bytes = slab_bytes
        self._sink = sink
        self._clock = clock
        self._stop = stop
        self._source = OpenShard(reader)
        self._in_flight: dict[Slot, Batch] = {}

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self._source.close()

    def work(self, task: Task) -> Iterator[LayerDone]:
        """Converts `task`, and says so of each of its layers."""
        self.convert(task)
        for layer in task.layers:
            self._sink.finished(layer.number)
            read = layer.bytes_read(self._slab_bytes)
            yield LayerDone(layer.name, read, layer.bytes_written)

    def convert(self, task: Task) -> None:
        """Everything of its layers: the weights quantized, the rest copied, all of it written."""
        for layer in task.layers:
            for tensor in layer.kept:
                self._copy(tensor)
        self._quantize(task)

    def _copy(self, tensor: TensorPlan) -> None:
        spec, done = tensor.spec, 0
        while done < spec.nbytes:
            self._check_stop()
            shard = self._source.open(spec.file)
            left, buffer = spec.nbytes - done, self._lane.take().source_bytes
            with self._clock.measure(Stage.COPY):
                done += self._sink.copy(spec.name, done, left, shard, spec.offset + done, buffer)

    def _quantize(self, task: Task) -> None:
        """Materializes, quantizes, writes and releases the weights, slab by slab."""
        batches = list(task.batches(self._slab_bytes))
        layers = {w.name: layer for plan in task.layers for layer, w in _skeletons(plan)}
        scale, held = self._shared_scale(batches) if task.shares_scale else (None, None)
        for batch in batches:
            slot = held or self._read(batch)
            self._materialize(batch, slot.source(batch), layers)
            with self._clock.measure(Stage.QUANTIZE):
                slot.quantize(batch, scale)
            self._in_flight[slot] = batch
        while self._in_flight:
            self._finish(next(iter(self._in_flight)))
        for layer in dict.fromkeys(layers.values()):
            layer.release()
            layer.finalize()

    def _materialize(self, batch: Batch, rows: Tensor, layers: Mapping[str, Layer]) -> None:
        row = 0
        for slab in batch.slabs:
            name = slab.weight.name
            layers[name].materialize(name, rows[row : row + slab.rows], slab.first_row)
            row += slab.rows

    def _shared_scale(self, batches: Sequence[Batch]) -> tuple[Tensor, Slot | None]:
        """The one scale [1] of a fused set, from a first pass over all of it.

        With the slot that still holds it, where it is one batch.
        """
        largest = []
        for batch in batches:
            slot = self._read(batch, again=len(batches) > 1)
            with self._clock.measure(Stage.QUANTIZE):
                slot.amax(batch)
                largest.append(slot.result().cpu())
                self._check_finite(largest[-1], batch)
        scale = weight_scale(torch.stack(largest).amax(0)).to(self._lane.device)
        return scale, slot if len(batches) == 1 else None

    def _read(self, batch: Batch, again: bool = False) -> Slot:
        """The batch in the lane's next slot, whose own was written before.

        Its pages stay in memory where it will be read `again`.
        """
        self._check_stop()
        slot = self._lane.take()
        if slot in self._in_flight:
            self._finish(slot)
        with self._clock.measure(Stage.READ):
            self._source.read_batch(batch, slot.source_bytes, again)
        return slot

    def _finish(self, slot: Slot) -> None:
        """Codes and scales of what `slot` holds to their places."""
        batch = self._in_flight.pop(slot)
        with self._clock.measure(Stage.QUANTIZE):
            scales = slot.result().cpu()
            self._check_finite(scales, batch)
        with self._clock.measure(Stage.WRITE):
            row = group = 0
            for slab in batch.slabs:
                size = slab.rows * batch.columns
                self._write_codes(slab, slot.codes_bytes[row * batch.columns :][:size])
                groups = batch.granularity.scale_shape((slab.rows, batch.columns))[0]
                self._write_scales(slab, scales[group : group + groups])
                row, group = row + slab.rows, group + groups

    def _write_codes(self, slab: Slab, codes: memoryview) -> None:
        weight = slab.weight
        runs = weight.codes_at.runs(slab.first_row, slab.rows, weight.shape[1])
        self._write_runs(weight.codes.name, runs, codes, 1)

    def _write_scales(self, slab: Slab, scales: Tensor) -> None:
        weight = slab.weight
        if weight.granularity is Granularity.TENSOR and slab.first_row:
            return  # one number for the whole weight: the slab that begins it brings it
        group = slab.first_row // weight.granularity.row_multiple
        rows, columns = scales.reshape(-1, scales.shape[-1]).shape
        runs = weight.scales_at.runs(group, rows, columns)
        self._write_runs(weight.scales.name, runs, bytes_of(scales), scales.itemsize)

    def _write_runs(self, name: str, runs: Runs, data: memoryview, itemsize: int) -> None:
        """Writes `data` to the runs of elements of output tensor `name`, one after another."""
        if runs.count > 1 and isinstance(self._sink, RunsSink):
            self._sink.write_runs(name, runs, data)
            return
        for begin, piece in runs.pieces(itemsize):
            self._sink.write(name, begin, data[piece])

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _check_finite(self, values: Tensor, batch: Batch) -> None:
        """Raises WeightError for the first weight with a value that is not finite."""
        if is_finite(values):
            return
        self._in_flight.clear()
        for slab in batch.slabs:
            self._refuse_non_finite(slab.weight)
        raise SourceChangedError(
            f"{batch.slabs[0].weight.spec.file}: tensor {batch.slabs[0].weight.spec.name!r}: "
            "changed while it was read; let what writes it finish, then run again"
        )

    def _refuse_non_finite(self, weight: WeightPlan) -> None:
        """Counts what is not finite in the whole weight, and finds the first."""
        spec, count, first = weight.spec, 0, -1
        for batch in Task((LayerPlan(0, weight.name, [weight], []),)).batches(self._slab_bytes):
            slot = self._read(batch)
            slot.amax(batch)
            if is_finite(slot.result()):
                continue
            source = slot.source(batch)
            # Row by row: a mask as large as a slab would be a buffer that nobody counted.
            for row in range(batch.rows):
                bad = torch.isfinite(source[row]).logical_not_()
                found = int(bad.sum())
                if found and not count:
                    at = batch.slabs[0].first_row + row
                    first = at * weight.shape[1] + int(bad.byte().argmax())
                count += found
        if not count:
            return
        place = weight.source.index(*divmod(first, weight.shape[1]), spec.shape)
        raise WeightError(
            f"{spec.file}: tensor {spec.name!r}: expected finite values, found {count} of "
            f"{math.prod(weight.shape)} that are NaN or infinite, the first at {place}; repair the "
            f"source, or keep the layer with --ignore {spec.module}"
        )


def _skeletons(plan: LayerPlan) -> Iterator[tuple[Layer, WeightPlan]]:
    """The layer's skeleton, with each of its weights."""
    shapes = ((w.name, w.shape, TORCH_DTYPES[w.spec.dtype]) for w in plan.weights)
    layer = Layer(plan.name, build_skeleton(shapes))
    for weight in plan.weights:
        yield layer, weight
