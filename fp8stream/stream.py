"""Checkpoint in, checkpoint out: read, materialize, quantize, write, release, within one budget.

Each worker owns one set of buffers and takes whole layers in the plan's order. A layer that is
larger than a slab goes through in runs of rows, which changes no byte of the result. On a GPU each
worker has a CUDA stream of its own, so that one worker's copies in and out of pinned memory overlap
the other workers' arithmetic; on a CPU the same code runs without the copies.
"""

import ctypes
import math
import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8stream.checkpoint import Checkpoint
from fp8stream.errors import DeviceError, WeightError
from fp8stream.fp8 import Quantizer, is_finite, weight_scale
from fp8stream.layerwise import Layer, build_skeleton
from fp8stream.memory import Workspace
from fp8stream.plan import LayerPlan, Plan, Slab, TensorPlan
from fp8stream.reader import Reader
from fp8stream.scheme import Granularity
from fp8stream.views import Runs
from fp8stream.weights import WeightPlan
from fp8stream.writer import CheckpointWriter

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class LayerDone:
    """A layer was written whole. Bytes of source read and of output written for it."""

    name: str
    bytes_read: int
    bytes_written: int


def stream_layers(
    checkpoint: Checkpoint, plan: Plan, writer: CheckpointWriter, device: torch.device
) -> Generator[LayerDone, None, None]:
    """Converts every layer of `plan`, and yields an event as each is done, in no fixed order.

    The caller commits the writer when the iteration ends. Raises the first error of any worker;
    closing the iterator stops the workers at the end of their slab.
    """
    reader = Reader(checkpoint.directory, checkpoint.shards)
    tasks: queue.SimpleQueue[LayerPlan] = queue.SimpleQueue()
    for layer in plan.layers:
        tasks.put(layer)
    events: queue.SimpleQueue[LayerDone | BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # or pinned memory would belong to the first one
            worker = Worker(plan.workspace, device, reader, writer, stop)
            while not stop.is_set():
                try:
                    layer = tasks.get_nowait()
                except queue.Empty:
                    break
                worker.convert(layer)
                read = layer.bytes_read(plan.workspace.slab_bytes)
                events.put(LayerDone(layer.name, read, layer.bytes_written))
        except BaseException as error:
            stop.set()
            events.put(error)
        finally:
            events.put(None)

    threads = [
        threading.Thread(target=work, name=f"fp8stream-{number}", daemon=True)
        for number in range(plan.workspace.workers)
    ]
    try:
        for thread in threads:
            thread.start()
        yield from _until_done(events, len(threads))
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:  # it may be that not all could be started
                thread.join()


def _until_done(
    events: "queue.SimpleQueue[LayerDone | BaseException | None]", workers: int
) -> Iterator[LayerDone]:
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


class Stopped(Exception):
    """A worker was told to stop in the middle of a layer."""


class Worker:
    """One set of buffers, and the layers that go through it."""

    def __init__(
        self,
        workspace: Workspace,
        device: torch.device,
        reader: Reader,
        writer: CheckpointWriter,
        stop: threading.Event,
    ) -> None:
        self._slab_bytes = workspace.slab_bytes
        self._buffers = Buffers(workspace, device)
        self._quantizer = Quantizer(device, workspace.scratch_elements)
        self._reader = reader
        self._writer = writer
        self._stop = stop

    def convert(self, layer: LayerPlan) -> None:
        """Everything of one layer: its weights quantized, the rest copied, all of it written."""
        for tensor in layer.kept:
            self._copy(tensor)
        if layer.weights:
            with self._buffers.on_stream():
                self._quantize(layer)

    def _copy(self, tensor: TensorPlan) -> None:
        spec, done = tensor.spec, 0
        with self._reader.open(spec.file) as shard:
            while done < spec.nbytes:
                self._check_stop()
                left = spec.nbytes - done
                place, buffer = spec.offset + done, self._buffers.source_bytes
                done += self._writer.copy(spec.name, done, left, shard, place, buffer)

    def _quantize(self, plan: LayerPlan) -> None:
        """Materializes, quantizes, writes and releases the layer's weights, slab by slab."""
        slabs = list(plan.slabs(self._slab_bytes))
        layer = _skeleton(plan)
        scale = self._shared_scale(slabs) if plan.shares_scale else None
        reread = scale is None or len(slabs) > 1
        for slab in slabs:
            source = self._read(slab) if reread else self._buffers.source(slab)
            rows = layer.materialize(slab.weight.name, source, slab.first_row)
            codes = self._buffers.codes(slab)
            scales = self._quantizer.quantize(rows, slab.weight.granularity, codes, scale)
            self._write(slab, scales)
            layer.release()
        layer.finalize()

    def _shared_scale(self, slabs: list[Slab]) -> Tensor:
        """The one scale [1] of a fused set, from a first pass over all of it."""
        largest = [self._quantizer.amax(self._read(slab)).reshape(1) for slab in slabs]
        for slab, amax in zip(slabs, largest, strict=True):
            self._check_finite(amax, slab)
        return weight_scale(torch.cat(largest).amax().reshape(1))

    def _read(self, slab: Slab) -> Tensor:
        """The slab's rows on the device, in the worker's buffers."""
        self._check_stop()
        spec = slab.weight.spec
        self._buffers.wait()
        with self._reader.open(spec.file) as shard:
            shard.read_runs(self._buffers.source_bytes[: slab.nbytes], slab.runs, spec)
        return self._buffers.to_device(slab)

    def _write(self, slab: Slab, scales: Tensor) -> None:
        """Codes and scales of the slab to their places."""
        codes, host_scales = self._buffers.to_host(slab, scales)
        self._check_finite(host_scales, slab)
        weight = slab.weight
        runs = weight.codes_at.runs(slab.first_row, slab.rows, weight.shape[1])
        self._write_runs(weight.codes.name, runs, codes, 1)
        if weight.granularity is Granularity.TENSOR and slab.first_row:
            return  # one number for the whole weight: the slab that begins it brings it
        group = slab.first_row // weight.granularity.row_multiple
        rows, columns = host_scales.reshape(-1, host_scales.shape[-1]).shape
        runs = weight.scales_at.runs(group, rows, columns)
        self._write_runs(weight.scales.name, runs, _bytes_of(host_scales), host_scales.itemsize)

    def _write_runs(self, name: str, runs: Runs, data: memoryview, itemsize: int) -> None:
        """Writes `data` to the runs of elements of output tensor `name`, one after another."""
        size = runs.length * itemsize
        for run in range(runs.count):
            at = (runs.first + run * runs.step) * itemsize
            self._writer.write(name, at, data[run * size : (run + 1) * size])

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _check_finite(self, values: Tensor, slab: Slab) -> None:
        if not is_finite(values):
            raise WeightError(self._describe_non_finite(slab.weight))

    def _describe_non_finite(self, weight: WeightPlan) -> str:
        """Counts what is not finite in the whole weight, and finds the first."""
        spec, count, first = weight.spec, 0, -1
        for slab in LayerPlan(weight.name, [weight], []).slabs(self._slab_bytes):
            bad = torch.isfinite(self._read(slab)).logical_not_().flatten()
            found = int(bad.sum())
            if found and not count:
                first = slab.first_row * weight.shape[1] + int(bad.byte().argmax())
            count += found
        place = weight.source.index(*divmod(first, weight.shape[1]), spec.shape)
        return (
            f"{spec.file}: tensor {spec.name!r}: expected finite values, found {count} of "
            f"{math.prod(weight.shape)} that are NaN or infinite, the first at {place}; repair the "
            f"source, or keep the layer with --ignore {spec.module}"
        )


class Buffers:
    """What one worker reads into and writes from, used again for every slab.

    On a CPU the device's buffers are the host's. On a GPU host buffers are pinned, and everything
    is queued on one stream, which is waited for before a buffer is used again.
    """

    def __init__(self, workspace: Workspace, device: torch.device) -> None:
        gpu = device.type == "cuda"
        self._host_source = torch.empty(workspace.slab_bytes, dtype=torch.uint8, pin_memory=gpu)
        self._host_codes = torch.empty(workspace.codes_bytes, dtype=torch.uint8, pin_memory=gpu)
        self._device_source = self._host_source
        self._device_codes = self._host_codes
        self._stream: torch.cuda.Stream | None = None
        if gpu:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._device_source = torch.empty_like(self._host_source, device=device)
            self._device_codes = torch.empty_like(self._host_codes, device=device)
        self.source_bytes = _bytes_of(self._host_source)

    def on_stream(self) -> AbstractContextManager[object]:
        """Where the worker's copies and kernels are queued."""
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def wait(self) -> None:
        """Waits until nothing that was queued uses the buffers any more."""
        if self._stream:
            self._stream.synchronize()

    def to_device(self, slab: Slab) -> Tensor:
        """The slab that was read into `source_bytes`, on the device."""
        if self._stream:
            size = slab.nbytes
            self._device_source[:size].copy_(self._host_source[:size], non_blocking=True)
        return self.source(slab)

    def source(self, slab: Slab) -> Tensor:
        """The slab [rows, columns] in its own dtype, on the device; a view, perhaps transposed."""
        view = self._device_source[: slab.nbytes].view(TORCH_DTYPES[slab.weight.spec.dtype])
        columns, source = slab.weight.shape[1], slab.weight.source
        if source.transposed:
            return view.view(columns, -1)[:, :: source.row_step].T
        return view.view(slab.rows, columns)

    def codes(self, slab: Slab) -> Tensor:
        """Where the slab's codes [rows, columns] go, on the device."""
        shape = slab.rows, slab.weight.shape[1]
        codes = self._device_codes[: shape[0] * shape[1]]
        return codes.view(torch.float8_e4m3fn).view(shape)

    def to_host(self, slab: Slab, scales: Tensor) -> tuple[memoryview, Tensor]:
        """The slab's codes as bytes, and its scales, both in host memory and ready."""
        size = slab.rows * slab.weight.shape[1]
        if self._stream:
            self._host_codes[:size].copy_(self._device_codes[:size], non_blocking=True)
            scales = scales.cpu()
            self.wait()
        return _bytes_of(self._host_codes)[:size], scales


def _skeleton(plan: LayerPlan) -> Layer:
    weights = ((w.name, w.shape, TORCH_DTYPES[w.spec.dtype]) for w in plan.weights)
    module = build_skeleton(weights)
    return Layer(plan.name, module)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous host tensor, without a copy; the tensor must outlive it."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


def find_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` means. Raises DeviceError if absent."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not available):
        return torch.device("cpu")
    number = int(name.partition(":")[2] or 0)
    if number >= available:
        raise DeviceError(
            f"--device {name}: expected a CUDA device, found {available}; use --device cpu"
        )
    return torch.device("cuda", number)


def device_peak(device: torch.device) -> tuple[int, int]:
    """Peak bytes that were allocated and reserved on `device`; zeros on a CPU."""
    if device.type != "cuda":
        return 0, 0
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def warm_up(device: torch.device) -> None:
    """Runs every kernel once, so that what they load counts as start-up and not as the run's."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for dtype in TORCH_DTYPES.values():
        weight = torch.zeros((1, 1), dtype=dtype, device=device)
        for granularity in Granularity:
            codes = torch.empty((1, 1), dtype=torch.float8_e4m3fn, device=device)
            is_finite(Quantizer(device, 1).quantize(weight, granularity, codes))
