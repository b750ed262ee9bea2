"""What is loaded: files, tensors that are all there, or tensors one by one.

What is all there is streamed by workers as the converter streams files.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch import nn

from fp8stream.carried import carry_layers, is_carried
from fp8stream.checkpoint import Checkpoint, open_weights
from fp8stream.errors import CheckpointError
from fp8stream.filled import Composed
from fp8stream.held import GivenTensors, HeldTensors, spec_of
from fp8stream.incoming import Course, Incoming, Request, Source, as_checkpoint, described, pair_of
from fp8stream.live import ModelSink
from fp8stream.memory import plan_workspace
from fp8stream.one_by_one import OneByOne
from fp8stream.plan import demand_of, tasks_of
from fp8stream.reader import Reader, Shards
from fp8stream.stream import stream_tasks


def open_source(model: nn.Module, source: Source, request: Request) -> "Incoming":
    """What is known of `source` before any of it is read. Raises CheckpointError."""
    if isinstance(source, str | Path):
        checkpoint = open_weights(source, described(model))
        reader = Reader(checkpoint.directory, checkpoint.shards)
        return Known(model, checkpoint, request, reader)
    if not isinstance(source, Iterable):
        raise CheckpointError(
            f"expected a checkpoint directory, a file, or names and tensors, found {source!r:.60}"
        )
    if isinstance(source, Mapping):
        source = list(source.items())
    if not isinstance(source, Sequence) and request.mapping is not None:
        # Its giver may write to one when the next is asked for.
        source = [(name, tensor.clone()) for name, tensor in map(pair_of, source)]
    if not isinstance(source, Sequence):
        return OneByOne(model, source, request)
    pairs = [pair_of(item) for item in source]
    specs = [spec_of(name, tensor) for name, tensor in pairs]
    return Known(model, as_checkpoint(model, specs), request, GivenTensors(dict(pairs)))


class Known(Incoming):
    """What is all there: a checkpoint on disk, or tensors in memory."""

    def __init__(
        self, model: nn.Module, checkpoint: Checkpoint, request: Request, reader: Shards
    ) -> None:
        super().__init__(model, checkpoint, request, reader)
        self._reader = reader

    def stream(self, course: Course) -> int:
        layers = course.fitted.layers
        numbers = [layer for layer in layers if not is_carried(layer)]
        weights = [weight for layer in numbers for weight in layer.weights]
        demand = demand_of(weights, max(1, len(layers)))
        gpus = int(course.device.type == "cuda")
        space = plan_workspace(demand, course.budget, len(os.sched_getaffinity(0)), gpus)
        carried = [layer for layer in layers if is_carried(layer)]
        tasks = tasks_of(numbers, space.slab_bytes)
        streams = (
            stream_tasks(tasks, space, self._reader, course.sink, [course.device]),
            carry_layers(carried, self.coded, space, self._reader, course.sink),
        )
        read = 0
        with _one_thread_each():
            for stream in streams:
                with closing(stream) as done:
                    for layer in done:
                        read += layer.bytes_read
                        course.progress(layer)
        for number, composed in course.fitted.composed:
            read += self._compose(number, composed, course.sink)
        self._reader.give_back()
        return read

    def _compose(self, number: int, composed: Composed, sink: ModelSink) -> int:
        held = HeldTensors()
        for name in composed.sources:
            held.read(self.specs[name], self._reader)
        sink.put(number, composed.convert(held.tensors))
        return sum(self.specs[name].nbytes for name in composed.sources)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Workers are the parallelism: threads inside torch would only get in their way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
