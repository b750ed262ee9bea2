"""Output against source: every header, every file beside the weights, and every value, streamed.

A source slab and the codes and scales that were made of it are read side by side and compared in
cache. Workers take layers from a queue as in stream.py, under the same budget; what is wrong with
one tensor stops no other. Only the CPU computes, which takes little longer than reading does.
"""

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fp8stream.checkpoint import Checkpoint
from fp8stream.comparison import Comparer
from fp8stream.device import TORCH_DTYPES, Slot, bytes_of, open_lane
from fp8stream.errors import CheckpointError
from fp8stream.evidence import added_files, file_problems, open_output
from fp8stream.expectation import Expectation, LayerError, Problem
from fp8stream.experts import ExpertLayout
from fp8stream.findings import Difference, WeightSums, compare_bytes, same_bits
from fp8stream.foreign import expect_foreign
from fp8stream.fp8 import is_finite, weight_scale
from fp8stream.header import TensorSpec, reading
from fp8stream.memory import TO_VERIFY, Workspace, plan_workspace
from fp8stream.output import is_unfinished
from fp8stream.plan import Batch, Slab, Task, demand_of, tasks_of
from fp8stream.reader import Reader
from fp8stream.replan import expect_ours
from fp8stream.scheme import Granularity
from fp8stream.views import Runs
from fp8stream.weights import WeightPlan
from fp8stream.work import OpenShard, Stopped, run_workers

# Bytes and number of kept tensors that a worker takes at once.
_KEPT_BYTES = 16 << 20
_KEPT_AT_ONCE = 64


@dataclass(frozen=True)
class Checked:
    """Tensors that were compared: the first one's name, bytes read, what was found."""

    name: str
    bytes_read: int
    problems: tuple[Problem, ...] = ()
    layers: tuple[LayerError, ...] = ()


Pair = tuple[TensorSpec, TensorSpec]
Pairs = tuple[Pair, ...]
Sums = dict[str, WeightSums]


@dataclass(frozen=True)
class Comparison:
    """Everything that a run compares. `exact` says that values must be equal to the bit;
    `added_files` are the user's, which are not compared."""

    source: Checkpoint
    output: Checkpoint
    expectation: Expectation
    exact: bool
    workspace: Workspace
    problems: tuple[Problem, ...]
    added_files: tuple[str, ...] = ()

    @property
    def bytes_read(self) -> int:
        """Bytes that are read of both, unless something is wrong."""
        found, weights = self.expectation.found, list(self.weights())
        names = {name for w in weights for name in (w.codes.name, w.scales.name)} & found.keys()
        kept = sum(spec.nbytes + there.nbytes for spec, there in self.expectation.kept)
        return kept + sum(w.nbytes for w in weights) + sum(found[name].nbytes for name in names)

    def weights(self) -> Iterator[WeightPlan]:
        """The weights whose values are compared."""
        for layer in self.expectation.layers:
            yield from layer.weights


def prepare(
    source: Checkpoint, output: str, layout: ExpertLayout | None, budget: int, threads: int
) -> Comparison:
    """Opens `output`, and compares everything but values.

    Raises CheckpointError where one of the two is no checkpoint, BudgetError for a budget that is
    too small.
    """
    if source.quantized_as:
        raise CheckpointError(
            f"{source.path}: already quantized ({source.quantized_as}); expected the checkpoint in "
            "BF16, F16 or F32 that the output was made from"
        )
    with reading(Path(output)):
        unfinished = is_unfinished(Path(output))
    if unfinished:
        raise CheckpointError(f"{output}: an unfinished run's; run quantize to its end first")
    there = open_output(output)
    expect = expect_ours if there.ours else expect_foreign
    expectation = expect(source, there.checkpoint, there.config, there.whole, layout)
    weights = [weight for layer in expectation.layers for weight in layer.weights]
    demand = demand_of(weights, max(1, len(weights) + len(expectation.kept)))
    problems = (
        *file_problems(there, source, expectation.config),
        *expectation.problems,
    )
    if not (weights or problems):
        problems = (Problem("", "", "not quantized: there are no FP8 weights with scales in it"),)
    return Comparison(
        source,
        there.checkpoint,
        expectation,
        there.ours,
        plan_workspace(demand, budget, threads, on_cpu=TO_VERIFY),
        problems,
        added_files(there, source),
    )


def compare_values(comparison: Comparison) -> Generator[Checked, None, None]:
    """Compares every value, and yields what was found as tensors are done, in no fixed order.

    Raises CheckpointError where the source or the output cannot be read; closing the iterator stops
    the workers.
    """
    readers = [Reader(c.directory, c.shards) for c in (comparison.source, comparison.output)]

    @contextmanager
    def open_worker(
        number: int, stop: threading.Event
    ) -> Iterator[Callable[[Task | Pairs], Iterable[Checked]]]:
        shards = [OpenShard(reader) for reader in readers]
        checker = _Checker(comparison, shards[0], shards[1], stop)
        try:
            with torch.inference_mode():
                yield checker.work
        finally:
            for shard in shards:
                shard.close()

    try:
        yield from run_workers(_tasks(comparison), comparison.workspace.workers, open_worker)
    finally:
        for reader in readers:
            reader.give_back()


def _tasks(comparison: Comparison) -> Iterator[Task | Pairs]:
    """What is kept, the largest first, then the weights: small ones fill up the end."""
    together: list[Pair] = []
    for pair in sorted(comparison.expectation.kept, key=lambda pair: -pair[0].nbytes):
        size = sum(spec.nbytes for spec, _ in together) + pair[0].nbytes
        if together and (size > _KEPT_BYTES or len(together) == _KEPT_AT_ONCE):
            yield tuple(together)
            together = []
        together.append(pair)
    if together:
        yield tuple(together)
    yield from tasks_of(comparison.expectation.layers, comparison.workspace.slab_bytes)


class _Checker:
    """One worker's buffers, and the tensors that are compared through them."""

    def __init__(
        self,
        comparison: Comparison,
        source: OpenShard,
        output: OpenShard,
        stop: threading.Event,
    ) -> None:
        space = comparison.workspace
        self._slab_bytes = space.slab_bytes
        self._lane = open_lane(space, torch.device("cpu"))
        self._comparer = Comparer(self._lane.quantizer, space.scratch_elements)
        self._expectation, self._exact = comparison.expectation, comparison.exact
        self._found = comparison.expectation.found
        self._source, self._output = source, output
        self._stop = stop
        self._read = 0

    def work(self, task: Task | Pairs) -> Iterator[Checked]:
        """Compares what `task` holds."""
        self._read = 0
        if isinstance(task, Task):
            yield self._weights(task)
        else:
            problems = tuple(problem for pair in task for problem in self._kept(*pair))
            yield Checked(task[0][0].name, self._read, problems)

    def _weights(self, task: Task) -> Checked:
        batches = list(task.batches(self._slab_bytes))
        if self._exact and task.shares_scale:
            sums = self._with_shared_scale(batches)
        else:
            sums = {}
            for batch in batches:
                self._batch(batch, None, sums)
        problems = (p for each in sums.values() for p in each.problems(self._found, self._exact))
        layers = tuple(each.result() for each in sums.values())
        return Checked(task.layers[0].name, self._read, tuple(problems), layers)

    def _with_shared_scale(self, batches: Sequence[Batch]) -> Sums:
        """A fused set under the scale that it has; once more where that is not the one it must
        have, so that codes are not blamed for it."""
        weights = {w.name: w for b in batches for w in (s.weight for s in b.slabs)}
        sound = [w for w in weights.values() if self._expectation.is_sound(w)]
        stored = {w.name: self._stored(w, 0, 1, 1) for w in sound}
        scale = next(iter(stored.values()))
        for _ in range(2):
            sums: Sums = {}
            largest = [self._batch(batch, scale, sums) for batch in batches]
            wanted = weight_scale(torch.stack(largest).amax(0))
            if same_bits(wanted, scale) or not is_finite(wanted):
                break
            scale = wanted
        for name, each in sums.items() if is_finite(wanted) else ():
            each.compare_scales(wanted, stored[name], 0)
        return sums

    def _batch(self, batch: Batch, shared: Tensor | None, sums: Sums) -> Tensor:
        """Compares the weights of one batch, and adds it to `sums`; the batch's amax.

        Codes must be those under the `shared` scale where there is one.
        """
        if self._stop.is_set():
            raise Stopped
        slot, granularity = self._lane.take(), batch.granularity
        self._source.read_batch(batch, slot.source_bytes)
        self._read += batch.nbytes
        source = slot.source(batch)
        amax = self._comparer.quantizer.amax(source, granularity)
        if not all(self._expectation.is_sound(slab.weight) for slab in batch.slabs):
            return amax
        stored = self._read_stored(batch, slot)
        due = weight_scale(amax) if self._exact and shared is None else None
        scale = next(given for given in (shared, due, stored) if given is not None)
        codes = slot.codes(batch)
        rows = self._comparer.compare(source, codes, granularity, scale, stored, self._exact)
        row = group = 0
        for slab in batch.slabs:
            each = sums.setdefault(slab.weight.name, WeightSums(slab.weight))
            each.add(rows, slice(row, row + slab.rows), slab.first_row, codes.view(torch.uint8))
            height = granularity.scale_shape((slab.rows, batch.columns))[0]
            groups = slice(group, group + height)
            each.finite &= is_finite(amax[groups])
            each.add_scales(stored[groups], due[groups] if due is not None else None, slab)
            if not self._exact:
                each.fit_scales(stored[groups], amax[groups], slab)
            row, group = row + slab.rows, group + height
        return amax

    def _read_stored(self, batch: Batch, slot: Slot) -> Tensor:
        """Codes into the slot; the scales, float32, shaped as those of the whole batch are."""
        done, scales = 0, []
        for slab in batch.slabs:
            weight, columns = slab.weight, batch.columns
            size = slab.rows * columns
            runs = weight.codes_at.runs(slab.first_row, slab.rows, columns)
            self._read_runs(weight.codes.name, runs, slot.codes_bytes[done : done + size])
            done += size
            scales.append(self._stored_of(slab))
        return torch.cat(scales) if len(scales) > 1 else scales[0]

    def _stored_of(self, slab: Slab) -> Tensor:
        weight = slab.weight
        grid = weight.granularity.scale_shape((slab.rows, weight.shape[1]))
        if weight.granularity is Granularity.TENSOR:
            return self._stored(weight, 0, 1, 1)
        return self._stored(weight, slab.first_row // weight.granularity.row_multiple, *grid)

    def _stored(self, weight: WeightPlan, first: int, rows: int, columns: int) -> Tensor:
        """Scales that are stored, float32 [rows, columns]; [1] of a weight that has one."""
        stored = torch.empty((rows, columns), dtype=TORCH_DTYPES[weight.scales.dtype])
        runs = weight.scales_at.runs(first, rows, columns)
        self._read_runs(weight.scales.name, runs, bytes_of(stored))
        one = weight.granularity is Granularity.TENSOR
        return stored.float().reshape(1) if one else stored.float()

    def _read_runs(self, name: str, runs: Runs, buffer: memoryview) -> None:
        spec = self._found[name]
        shard = self._output.open(spec.file)
        shard.read_runs(buffer, runs, spec)
        shard.give_back_runs(runs, spec)
        self._read += len(buffer)

    def _kept(self, spec: TensorSpec, there: TensorSpec) -> Iterator[Problem]:
        """A tensor that must have the same bytes, through the two halves of the slot."""
        buffer = self._lane.take().source_bytes
        half = len(buffer) // 2 // 64 * 64
        differs = Difference(spec.nbytes)
        for done in range(0, spec.nbytes, half):
            if self._stop.is_set():
                raise Stopped
            size = min(half, spec.nbytes - done)
            one, other = buffer[:size], buffer[half : half + size]
            self._read_bytes(self._source, spec, done, one)
            self._read_bytes(self._output, there, done, other)
            compare_bytes(one, other, done, spec, differs)
        if differs.count:
            yield Problem(there.file, there.name, differs.says("bytes of a tensor that is kept"))

    def _read_bytes(
        self, shards: OpenShard, spec: TensorSpec, begin: int, buffer: memoryview
    ) -> None:
        shard = shards.open(spec.file)
        shard.read_into(buffer, spec.offset + begin, spec.name)
        shard.give_back(spec.offset + begin, len(buffer))
        self._read += len(buffer)
