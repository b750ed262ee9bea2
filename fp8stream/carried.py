"""Layers whose weights come as codes: carried over as they are, a buffer's worth at a time.

Rows of codes go where rows of the weight would have gone, and the scales of those rows, widened to
float32, with them. What cannot be codes in the model becomes numbers on the way.
"""

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from fp8stream.coded import Coded, CodedRows
from fp8stream.device import bytes_of
from fp8stream.header import TensorSpec
from fp8stream.held import HeldTensors
from fp8stream.live import Elements, ModelSink
from fp8stream.memory import Workspace
from fp8stream.plan import LayerPlan
from fp8stream.reader import ShardReader, Shards
from fp8stream.scheme import BLOCK, CODE_DTYPE, Granularity
from fp8stream.stream import LayerDone
from fp8stream.views import View
from fp8stream.weights import WeightPlan
from fp8stream.work import Stopped, run_workers


def with_values(coded: Mapping[str, Coded], reader: Shards) -> dict[str, Coded]:
    """The same, with the values of tensor scales."""
    return {name: _with_values(each, reader) for name, each in coded.items()}


def _with_values(coded: Coded, reader: Shards) -> Coded:
    if coded.granularity is not Granularity.TENSOR:
        return coded
    return replace(coded, values=tuple(_scales(coded, reader).view(-1).tolist()))


def is_carried(layer: LayerPlan) -> bool:
    """Whether any of the layer's weights comes as codes."""
    specs = [weight.spec for weight in layer.weights] + [tensor.spec for tensor in layer.kept]
    return any(spec.dtype == CODE_DTYPE for spec in specs)


def carry_layers(
    layers: Iterable[LayerPlan],
    coded: Mapping[str, Coded],
    workspace: Workspace,
    reader: Shards,
    sink: ModelSink,
) -> Generator[LayerDone, None, None]:
    """Codes and scales of `layers` to their places; an event as each layer is done."""

    @contextmanager
    def open_worker(
        number: int, stop: threading.Event
    ) -> Iterator[Callable[[LayerPlan], Iterator[LayerDone]]]:
        yield _Carrier(coded, reader, sink, workspace.slab_bytes, stop).work

    return run_workers(layers, workspace.workers, open_worker)


class _Carrier:
    """One worker's buffer, and the layers that go through it."""

    def __init__(
        self,
        coded: Mapping[str, Coded],
        reader: Shards,
        sink: ModelSink,
        size: int,
        stop: threading.Event,
    ) -> None:
        self._coded = coded
        self._reader = reader
        self._sink = sink
        self._buffer = memoryview(bytearray(size))
        self._stop = stop

    def work(self, layer: LayerPlan) -> Iterator[LayerDone]:
        """Carries the layer over."""
        with torch.no_grad():
            for weight in layer.weights:
                self._carry(weight, self._coded[weight.spec.name])
            for tensor in layer.kept:
                self._keep(tensor.spec)
        self._sink.finished(layer.number)
        sources = {w.spec.name for w in layer.weights} | {t.spec.name for t in layer.kept}
        scales = sum(self._coded[n].scales.nbytes for n in sources if n in self._coded)
        read = sum(weight.nbytes for weight in layer.weights) + scales
        read += sum(tensor.spec.nbytes for tensor in layer.kept)
        yield LayerDone(layer.name, read, layer.bytes_written)

    def _carry(self, weight: WeightPlan, coded: Coded) -> None:
        rows, columns = weight.shape
        step = max(1, len(self._buffer) // columns)
        with self._reader.open(coded.codes.file) as shard:
            for first in range(0, rows, step):
                if self._stop.is_set():
                    raise Stopped
                count = min(step, rows - first)
                data = self._buffer[: count * columns]
                shard.read_runs(data, weight.source.runs(first, count, columns), coded.codes)
                self._write(weight.codes.name, weight.codes_at, first, (count, columns), data)
        scales = _scales_of(weight, coded, self._reader)
        shape = scales.shape[0], scales.shape[1]
        self._write(weight.scales.name, weight.scales_at, 0, shape, bytes_of(scales))

    def _write(
        self, name: str, view: View, first: int, shape: tuple[int, int], data: memoryview
    ) -> None:
        for begin, piece in view.runs(first, *shape).pieces(len(data) // (shape[0] * shape[1])):
            self._sink.write(name, begin, data[piece])

    def _keep(self, spec: TensorSpec) -> None:
        """A tensor that is no codes in the model: what its codes stand for, if it comes as such."""
        with self._reader.open(spec.file) as shard:
            if spec.name in self._coded:
                coded = self._coded[spec.name]
                elements = _numbers(coded, shard, _scales(coded, self._reader))
                # A number, its place and its scale take some 32 bytes.
                self._sink.fill(spec.name, elements, max(1, len(self._buffer) // 32))
                return
            done = 0
            while done < spec.nbytes:
                left, at = spec.nbytes - done, spec.offset + done
                done += self._sink.copy(spec.name, done, left, shard, at, self._buffer)


def _scales(coded: Coded, reader: Shards) -> Tensor:
    held = HeldTensors()
    held.read(coded.scales, reader)
    return held.tensors[coded.scales.name].float()


def _scales_of(weight: WeightPlan, coded: Coded, reader: Shards) -> Tensor:
    """The scales [rows, columns] of the weight's rows, as the model has them."""
    rows = CodedRows(coded, weight.source, weight.shape[0])
    height, *width = weight.granularity.scale_shape(weight.shape)
    grid = (height, *width) if width else (1, 1)
    if coded.granularity is Granularity.TENSOR:
        return torch.full(grid, coded.values[rows.matrix], dtype=torch.float32)
    scales = _scales(coded, reader)
    if coded.granularity is Granularity.CHANNEL:
        own = scales.view(-1)[rows.first :: rows.step][: rows.rows]
        return own.view(-1, 1).contiguous()
    bands = -(-coded.matrix[0] // BLOCK)
    first = rows.matrix * bands + rows.first % coded.matrix[0] // BLOCK
    return scales.view(-1, grid[1])[first : first + grid[0]].contiguous()


def _numbers(coded: Coded, shard: ShardReader, scales: Tensor) -> Elements:
    """What the codes stand for, float32, by their places in the tensor."""
    height, width = coded.matrix

    def scale(at: Tensor) -> Tensor:
        row = at // width
        if coded.granularity is Granularity.CHANNEL:
            return scales.view(-1)[row]
        matrix = row // height
        if coded.granularity is Granularity.TENSOR:
            return scales.view(-1)[matrix]
        bands, across = -(-height // BLOCK), -(-width // BLOCK)
        band = matrix * bands + row % height // BLOCK
        return scales.view(-1)[band * across + at % width // BLOCK]

    def elements(first: int, count: int) -> Tensor:
        codes = torch.empty(count, dtype=torch.float8_e4m3fn)
        shard.read_into(bytes_of(codes), coded.codes.offset + first, coded.codes.name)
        return codes.float().mul_(scale(torch.arange(first, first + count)))

    return elements
