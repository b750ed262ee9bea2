"""What is loaded, and how it comes: files, tensors that are all there, or tensors one by one.

Before anything of a source is read it is known where everything goes. What is all there is streamed
by workers as the converter streams files; what comes one by one is worked on as it comes, and held
only while its layer lacks something.
"""

import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor, nn

from fp8stream.carried import carry_layers, is_carried, with_values
from fp8stream.checkpoint import Checkpoint, open_weights
from fp8stream.clock import Clock
from fp8stream.coded import find_coded, is_beside
from fp8stream.conversions import Saved
from fp8stream.device import TORCH_DTYPES, dtype_of, open_lane, running_out_of_memory
from fp8stream.errors import CheckpointError
from fp8stream.filled import Composed
from fp8stream.fitting import Fit, Fitting, granularities
from fp8stream.header import Shard, TensorSpec
from fp8stream.held import GivenTensors, HeldTensors, dense, spec_like, spec_of
from fp8stream.live import ModelSink
from fp8stream.mapping import Placement, Rule, checkpoint_names, find_places, what_came
from fp8stream.memory import plan_workspace
from fp8stream.places import Place, whole
from fp8stream.plan import Decisions, LayerPlan, Task, demand_of, tasks_of
from fp8stream.reader import Reader, Shards
from fp8stream.scheme import Granularity
from fp8stream.skeleton import find_weights, original_tensors
from fp8stream.stream import LayerDone, Worker, stream_tasks
from fp8stream.waiting import Waiting, with_specs

Source = str | Path | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
Progress = Callable[[LayerDone], object]


@dataclass(frozen=True)
class Course:
    """How a source is streamed: by what it `fits`, to where, in which memory, and who is told.

    What never completes is loaded as far as it came, if the layer with its number may `settle`,
    given what came of the source.
    """

    fitted: Fit
    sink: ModelSink
    device: torch.device
    budget: int
    progress: Progress
    settle: Callable[[int, Placement], bool] = lambda number, came: True


@dataclass(frozen=True)
class Request:
    """What is asked of a source: `decide` what of it is quantized; what of it is `ignored` is not,
    even if it comes in FP8. With `experts` those are quantized that no engine would load."""

    decide: Callable[[Checkpoint], Decisions]
    ignores: Callable[[str], bool]
    experts: bool
    mapping: Mapping[str, Rule] | None


def open_source(model: nn.Module, source: Source, request: Request) -> "Incoming":
    """What is known of `source` before any of it is read. Raises CheckpointError."""
    if isinstance(source, str | Path):
        checkpoint = open_weights(source, _described(model))
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
        source = [(name, tensor.clone()) for name, tensor in map(_pair, source)]
    if not isinstance(source, Sequence):
        return OneByOne(model, source, request)
    pairs = [_pair(item) for item in source]
    specs = [spec_of(name, tensor) for name, tensor in pairs]
    return Known(model, _as_checkpoint(model, specs), request, GivenTensors(dict(pairs)))


def _pair(item: object) -> tuple[str, Tensor]:
    match item:
        case (str(name), Tensor() as tensor):
            return name, tensor
        case (str(name), other):
            raise CheckpointError(f"tensor {name!r}: expected a torch.Tensor, found {type(other)}")
    raise CheckpointError(f"expected names and tensors, found {item!r:.60}")


def _as_checkpoint(model: nn.Module, specs: Iterable[TensorSpec]) -> Checkpoint:
    """Tensors of a model as a checkpoint, each a file."""
    shards = tuple(Shard(spec.name, spec.nbytes, 0, (spec,)) for spec in specs)
    return Checkpoint(Path("model"), Path("model"), _described(model), shards)


def _described(model: nn.Module) -> dict[str, Any]:
    """The model's own config.json, if it has one."""
    describe = getattr(getattr(model, "config", None), "to_dict", dict)
    return {key: value for key, value in describe().items() if key != "quantization_config"}


def unsaved(tensors: Mapping[str, Tensor], saved: Sequence[Saved]) -> list[str]:
    """The names of a model's tensors that saving leaves out, but for those of tied ones."""
    seen = {id(tensors[name]) for each in saved for name in each.sources}
    left: dict[int, str] = {}
    names = {each.name for each in saved}
    for name, tensor in tensors.items():
        if id(tensor) not in seen and name not in names:
            left.setdefault(id(tensor), name)
    return list(left.values())


class Incoming:
    """A source, and where in the model everything of it goes."""

    # Whether its names are those that will come, and no others.
    is_known = True

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        request: Request,
        reader: Shards,
    ) -> None:
        self.specs = {spec.name: spec for spec in checkpoint.tensors}
        self.coded = with_values(find_coded(self.specs), reader)
        self.decided = request.decide(checkpoint)
        scales = frozenset(each.scales.name for each in self.coded.values())
        shapes = [
            (spec.name, spec.shape)
            for spec in checkpoint.tensors
            if not is_beside(spec.name, self.coded, scales)
        ]
        targets = original_tensors(model)
        self.placement = find_places(model, shapes, request.mapping, targets)
        self.unexpected = list(self.placement.unexpected)
        self._request = request
        self._dtypes = {name: tensor.dtype for name, tensor in targets.items()}
        for name in self.placement.by_source:
            self._check_kind(self.specs[name])
        for name in (name for one in self.placement.composed for name in one.sources):
            if name in self.coded:
                raise CheckpointError(
                    f"{self.specs[name].file}: tensor {name!r}: comes as FP8 codes, and the model "
                    "computes its weights from numbers; give it in 16 bit"
                )

    def fit(
        self,
        model: nn.Module,
        fixed: Mapping[str, Granularity] | None = None,
        held_back: Mapping[str, str] | None = None,
        others: Mapping[str, str] | None = None,
        together: Iterable[frozenset[str]] = (),
    ) -> Fit:
        """How the source fits the model: its FP8 modules, or what will be that.

        The rest are those of `Fitting`, and so is what is raised.
        """
        chosen = granularities(self.decided, self._request.experts and not self.coded)
        chosen |= {
            name: coded.granularity
            for name, coded in self.coded.items()
            if not self._request.ignores(name)
        }
        return Fitting(
            self.decided,
            chosen,
            self.placement,
            find_weights(model),
            fixed,
            self.coded,
            held_back or {},
            others or {},
            together,
        ).fit()

    def stream(self, course: Course) -> int:
        """Everything to its place; the bytes that were read."""
        raise NotImplementedError

    def came(self) -> set[str]:
        """The tensors of the model that anything came for."""
        composed = (name for one in self.placement.composed for name in one.targets)
        return {*self.placement.by_target, *composed}

    def missing(self) -> list[str]:
        """What nothing, or not all, came for."""
        return [str(gap) for gap in self.placement.missing]

    def _check_kind(self, spec: TensorSpec) -> None:
        """Raises CheckpointError for numbers that would be others in the model."""
        found, coded = dtype_of(spec), spec.name in self.coded
        plain = coded or found.is_complex or (found.is_floating_point and found.itemsize > 1)
        for place in self.placement.by_source.get(spec.name, ()):
            wanted = self._dtypes[place.target]
            if wanted.is_floating_point and wanted.itemsize == 1:
                raise CheckpointError(
                    f"{place.target}: is {wanted} and no weight of a module that fp8stream knows; "
                    "make it one in 16 bit"
                )
            if plain != (wanted.is_floating_point or wanted.is_complex):
                raise CheckpointError(
                    f"{spec.file}: tensor {spec.name!r}: expected {wanted} for {place.target}, "
                    f"found {spec.dtype}; of quantized weights only FP8 (F8_E4M3) with its scales "
                    "can be loaded"
                )


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


class OneByOne(Incoming):
    """Tensors as they come, under the names that the model would be saved under, or others that
    go to the same places."""

    is_known = False

    def __init__(
        self, model: nn.Module, source: Iterable[tuple[str, Tensor]], request: Request
    ) -> None:
        # Without storage: a layer's own weight is let go once it is quantized.
        self._targets = _without_storage(original_tensors(model))
        saved = checkpoint_names(model, self._targets)
        specs = [spec_like(each.name, each.dtype, each.shape) for each in saved]
        specs += [spec_of(name, self._targets[name]) for name in unsaved(self._targets, saved)]
        super().__init__(model, _as_checkpoint(model, specs), request, HeldTensors())
        self._source = source
        self._model = model
        # Under which name each tensor came.
        self._came: dict[str, str] = {}

    def stream(self, course: Course) -> int:
        layers = course.fitted.layers
        held, waiting = HeldTensors(), Waiting(layers, course.fitted.composed)
        gpus = int(course.device.type == "cuda")
        space = plan_workspace(waiting.demand(), course.budget, 1, gpus)
        quantized = {w.spec.name for layer in layers for w in layer.weights}
        read = 0
        with running_out_of_memory():
            with torch.inference_mode():
                lane = open_lane(space, course.device)
            with Worker(lane, space.slab_bytes, held, course.sink, Clock(), Event()) as worker:
                for item in self._source:
                    for name, tensor in self._expected(*_pair(item)):
                        self._check(name, tensor, quantized)
                        if not waiting.is_for(name):
                            continue  # of experts that other ranks have
                        held.hold(name, tensor)
                        read += self.specs[name].nbytes
                        ready, composed = waiting.ready(name)
                        self._work(worker, ready, course.progress)
                        for number, each in composed:
                            course.sink.put(number, each.convert(held.tensors))
                        held.release(waiting.done())
                        # Its giver may write to it, once the next one is asked for.
                        held.own(name, tensor)
                shapes = {name: tuple(t.shape) for name, t in self._targets.items()}
                self.placement = what_came(self._model, self.placement, self._came, shapes)
                for layer in waiting.rest(self._came):
                    if course.settle(layer.number, self.placement):
                        self._work(worker, [layer], course.progress)
        return read

    def _work(self, worker: Worker, layers: Iterable[LayerPlan], progress: Progress) -> None:
        for layer in layers:
            task = Task((with_specs(layer, self.specs),))
            # The source's own tensors are none of inference mode's.
            with torch.inference_mode():
                finished = list(worker.work(task))
            for done in finished:
                progress(done)

    def _expected(self, given: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The expected tensors that a given one is, or that lie in it.

        Raises CheckpointError for one that comes twice, or is no more than a part of another.
        """
        if given in self.specs:
            if self._comes_first(given, given):
                yield given, tensor
            return
        places = self._own_place(given, tensor) or self._foreign_places(given, tensor)
        if not places:
            self.unexpected.append(given)
            return
        near = list(self._near(places))
        names = [name for name in near if self._lies_in(name, places)]
        if not near:
            self.unexpected.append(given)
        elif not names:
            raise CheckpointError(
                f"tensor {given!r}: is part of {near[0]!r}; an iterator gives tensors under the "
                "names that the model is saved under: give a dict or a list"
            )
        for name in names:
            if self._comes_first(name, given):
                yield name, self._taken(name, given, places, tensor)

    def _own_place(self, given: str, tensor: Tensor) -> list[Place]:
        """The place of a tensor that is called as one of the model's is, which need not be looked
        up."""
        shape = tuple(tensor.shape)
        if given not in self._targets or shape != tuple(self._targets[given].shape):
            return []
        target = self.placement.ties.get(given, given)
        return [piece.place(target, shape) for piece in whole(given, shape)]

    def _foreign_places(self, given: str, tensor: Tensor) -> Sequence[Place]:
        shapes = [(given, tuple(tensor.shape))]
        return find_places(self._model, shapes, None, self._targets).by_source.get(given, ())

    def _near(self, places: Sequence[Place]) -> Iterator[str]:
        """The expected tensors that go to the same targets."""
        into = dict.fromkeys(place.target for place in places)
        every = (place for target in into for place in self.placement.by_target.get(target, ()))
        return iter(dict.fromkeys(place.source for place in every))

    def _lies_in(self, name: str, places: Sequence[Place]) -> bool:
        own = self.placement.by_source[name]
        return all(any(place.covers(one) for place in places) for one in own)

    def _taken(self, name: str, given: str, places: Sequence[Place], tensor: Tensor) -> Tensor:
        """The expected tensor called `name`, out of one that goes to `places`."""
        own, shape = self.placement.by_source[name], self.specs[name].shape
        if len(own) == len(places) == 1 and own[0] == replace(places[0], source=name):
            return tensor
        values = dense(given, tensor)
        taken = torch.empty(shape, dtype=tensor.dtype, device="cpu")
        for one in own:
            place = next(place for place in places if place.covers(one))
            into = taken.as_strided(one.shape, one.steps, one.first)
            into.copy_(place.part(one.region).read(values))
        return taken

    def _comes_first(self, name: str, given: str) -> bool:
        """Whether a tensor comes for the first time; what is tied may come again under another
        name. Raises CheckpointError for others."""
        first = self._came.get(name)
        if first is None:
            self._came[name] = given
            return True
        tied = {*self.placement.ties, *self.placement.ties.values()}
        if first != given and any(p.target in tied for p in self._places(name)):
            return False
        also = "" if first == given else f", as {first!r} before"
        raise CheckpointError(f"tensor {given!r}: comes twice{also}")

    def _places(self, name: str) -> Sequence[Place]:
        return self.placement.by_source.get(name, ())

    def _check(self, name: str, tensor: Tensor, quantized: Container[str]) -> None:
        """Raises CheckpointError for a tensor that is wrong."""
        if tuple(tensor.shape) != self.specs[name].shape:
            raise CheckpointError(
                f"tensor {name!r}: expected {list(self.specs[name].shape)}, found "
                f"{list(tensor.shape)}"
            )
        self.specs[name] = spec_of(name, tensor)
        if name in quantized and self.specs[name].dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"tensor {name!r}: expected a weight in {', '.join(TORCH_DTYPES)}, found "
                f"{self.specs[name].dtype}; cast it, or keep the layer with ignore; FP8 weights "
                "are loaded from files, dicts and lists"
            )
        self._check_kind(self.specs[name])


def _without_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on meta, under one name or several as they are."""
    bare = {id(tensor): tensor.detach().to("meta") for tensor in tensors.values()}
    return {name: bare[id(tensor)] for name, tensor in tensors.items()}


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Workers are the parallelism: threads inside torch would only get in their way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
