"""Tensors as they come, in any order, under any name that goes to the same places.

What comes is worked on at once, and held only while its layer lacks something. What never completes
is loaded at the end, as far as it came.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from threading import Event

import torch
from torch import Tensor, nn

from fp8stream.clock import Clock
from fp8stream.conversions import Saved
from fp8stream.device import TORCH_DTYPES, open_lane, running_out_of_memory
from fp8stream.errors import CheckpointError
from fp8stream.held import HeldTensors, dense, spec_like, spec_of
from fp8stream.incoming import Course, Incoming, Progress, Request, as_checkpoint, pair_of
from fp8stream.mapping import checkpoint_names, find_places, what_came
from fp8stream.memory import plan_workspace
from fp8stream.places import Place, whole
from fp8stream.plan import LayerPlan, Task
from fp8stream.skeleton import original_tensors
from fp8stream.stream import Worker
from fp8stream.waiting import Waiting, with_specs


def unsaved(model: nn.Module, tensors: Mapping[str, Tensor], saved: Sequence[Saved]) -> list[str]:
    """The names of a model's `tensors` that saving leaves out, but for those of tied ones."""
    seen = {id(tensors[name]) for each in saved for name in each.sources}
    left: dict[int, str] = {}
    names = {each.name for each in saved} | {*(getattr(model, "all_tied_weights_keys", None) or ())}
    for name, tensor in tensors.items():
        if id(tensor) not in seen and name not in names:
            left.setdefault(id(tensor), name)
    return list(left.values())


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
        specs += [
            spec_of(name, self._targets[name]) for name in unsaved(model, self._targets, saved)
        ]
        super().__init__(model, as_checkpoint(model, specs), request, HeldTensors())
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
                    for name, tensor in self._expected(*pair_of(item)):
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
