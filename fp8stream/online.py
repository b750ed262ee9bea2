"""A checkpoint straight into a live FP8 model, and again into the same storage.

The model is a skeleton on meta. Its linear layers and experts become FP8 modules, and what the
converter would write into files streams into their tensors: read, materialize, quantize, copy,
release. No 16-bit model ever exists. A reload streams into the tensors that are there, unit by
unit, so that whoever holds on to their storage, as a captured graph does, sees the new weights.
"""

import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

import torch
from torch import Tensor, nn

from fp8stream.checkpoint import Checkpoint, open_checkpoint
from fp8stream.clock import Clock
from fp8stream.coded import copy_layer, find_coded, is_of_activations, parted
from fp8stream.device import TORCH_DTYPES, find_devices, open_lane, running_out_of_memory
from fp8stream.errors import CheckpointError, ReloadError, SchemeError
from fp8stream.experts import ExpertForm, ExpertOptions
from fp8stream.fitting import Fit, fit, granularities
from fp8stream.header import Shard
from fp8stream.held import HeldTensors, spec_like, spec_of
from fp8stream.live import Held, ModelSink, Part
from fp8stream.mapping import Placement, Rule, checkpoint_names, find_places
from fp8stream.memory import PeakMeter, parse_size, plan_workspace
from fp8stream.places import Place, Region
from fp8stream.plan import Decisions, Task, decide_tensors, demand_of, tasks_of
from fp8stream.policy import Patterns
from fp8stream.ranks import Group, Spread, spread, trimmed
from fp8stream.reader import Reader
from fp8stream.scheme import Granularity, Scheme
from fp8stream.skeleton import (
    become_fp8,
    check_model,
    find_weights,
    finish,
    give_storage,
    granularities_of,
    original_tensors,
    parts_of,
    stored_tensors,
)
from fp8stream.stream import LayerDone, Worker, stream_tasks
from fp8stream.waiting import Waiting, with_specs

Source = str | Path | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
Progress = Callable[[LayerDone], object]


@dataclass(frozen=True)
class LoadResult:
    """What was loaded. `quantized` are modules of the model that are FP8, `kept` its other tensors,
    `missing` those that nothing, or not all, came for, and `unexpected` names of the source that
    the model has no use for.

    `bytes_read` of the source; `peak_bytes` is what the host took at most on top of what was there
    before, the model's own storage included where that lies on the host.
    """

    quantized: tuple[str, ...]
    kept: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    warnings: tuple[str, ...]
    bytes_read: int
    peak_bytes: int


@dataclass(frozen=True)
class _Recipe:
    """How a model was loaded, and is loaded again; `whole` says that the load came to its end.

    `rank` is which of how many ranks of tensor parallelism it is.
    """

    scheme: Scheme
    patterns: Patterns
    experts: ExpertOptions
    mapping: Mapping[str, Rule] | None
    rank: tuple[int, int] = (0, 1)
    whole: bool = False

    def decide(self, checkpoint: Checkpoint) -> Decisions:
        return decide_tensors(checkpoint, self.scheme, self.patterns, self.experts)


_RECIPE = "_fp8stream_recipe"


def load_into(
    model: nn.Module,
    source: Source,
    *,
    scheme: str = "channel",
    ignore: Sequence[str] = (),
    include: Sequence[str] = (),
    experts: str = "auto",
    device: str = "auto",
    memory_budget: str | int = "1GiB",
    mapping: Mapping[str, Rule] | None = None,
    strict: bool = True,
    tp_rank: int = 0,
    tp_size: int = 1,
    tp_plan: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> LoadResult:
    """Loads `source` into `model`, whose linear layers and experts become FP8 in place.

    `model` lies on meta, or what of it does not is filled where it lies. `source` is a checkpoint
    directory or file, of which no more than `memory_budget` is in memory beside the model; or names
    and tensors, in any order, which cost besides what of them waits for the rest of a layer. Those
    of an iterator are the names that the model would be saved under; with a `mapping`, which says
    where names go that neither the model nor transformers knows (see `find_places`), all of an
    iterator is gathered first. `scheme`, `ignore`, `include` and `experts` mean what they do on the
    command line; `progress` is called for each layer that is done.

    Of `tp_size` ranks, `tp_rank` gets its part of the model, to the bit what it is of the whole:
    scales are those of whole rows and sets, for which it asks no other rank. `tp_plan` says what is
    cut how, in transformers' words, by names in which `*` stands for a number or a name, and `*.`
    at the beginning for any path; by default it is the model's own. A forward takes all ranks, as
    processes of torch.distributed.

    Raises CheckpointError for a source that does not fit, or, if `strict`, is not all of the model;
    WeightError for NaN and infinity; SchemeError, DeviceError, BudgetError for what was asked.
    """
    recipe = _Recipe(
        Scheme(Granularity(scheme)),
        Patterns(tuple(ignore), tuple(include)),
        ExpertOptions(ExpertForm(experts)),
        mapping,
        (tp_rank, tp_size),
    )
    where = find_devices(device)[0]
    check_model(model)
    _check_scheme(model, recipe)
    coming = _open(model, source, recipe)
    fitted = coming.fit(model, recipe)
    if coming.is_known:
        _require(coming.placement, strict)
    ours = Spread(dict(parts_of(model)))
    if recipe.rank != (0, 1) and not ours.parts:
        group = Group(*recipe.rank)
        ours = spread(model, fitted.quantized, coming.placement.ties, group, tp_plan)
    fitted = trimmed(fitted, ours.parts)
    # What is made on the way lies on the host, whatever device the caller is in the context of.
    with PeakMeter() as meter, torch.no_grad(), torch.device("cpu"):
        become_fp8(model, fitted.quantized, coming.placement.ties)
        ours.apply(model)
        object.__setattr__(model, _RECIPE, recipe)
        give_storage(model, where, spoil=not strict)
        sink = ModelSink(_held(model), fitted.copied, coming.specs)
        read = coming.stream(fitted, sink, where, _bytes(memory_budget), progress or _nothing)
        read -= sink.passed_over
        missing = [*coming.missing(), *finish(model, coming.placement, where)]
        meter.sample()
    if missing and strict:
        raise CheckpointError(_not_all(missing))
    object.__setattr__(model, _RECIPE, replace(recipe, whole=True))
    if coming.placement.conversions:
        # What transformers keeps there itself, to save under the names that were loaded.
        object.__setattr__(model, "_weight_conversions", list(coming.placement.conversions))
    return _result(model, coming, fitted, missing, read, meter, ours.warnings)


def reload(
    model: nn.Module,
    source: Source,
    *,
    memory_budget: str | int = "1GiB",
    strict: bool = True,
    progress: Progress | None = None,
) -> LoadResult:
    """Loads other weights into a `model` that `load_into` loaded: into the same storage.

    What belongs together, as all of a module and all that shares a scale, changes at once when all
    of it came, which takes its size in memory besides; what does not come stays, with a warning. If
    `strict`, a source that brings part of a tensor alone is refused before anything changes.

    Raises what `load_into` does, and ReloadError, which knows what is new already, where it stops
    midway.
    """
    recipe = getattr(model, _RECIPE, None)
    if not isinstance(recipe, _Recipe) or not recipe.whole:
        raise CheckpointError("reload: expected a model that fp8stream.load_into loaded")
    check_model(model)
    held = _held(model)
    parts = parts_of(model)
    where = next((h.tensor.device for h in held.values()), torch.device("cpu"))
    coming = _open(model, source, recipe)
    fitted = trimmed(coming.fit(model, recipe), parts)
    partial = [str(gap) for gap in coming.placement.missing if not gap.whole]
    if partial and strict and coming.is_known:
        raise CheckpointError(_not_all(partial))
    units = {name: unit for unit, names in fitted.tensors.items() for name in names}
    sink = ModelSink(held, fitted.copied, coming.specs, fitted.units, units)
    with PeakMeter() as meter, torch.no_grad(), torch.device("cpu"):
        try:
            read = coming.stream(fitted, sink, where, _bytes(memory_budget), progress or _nothing)
            read -= sink.passed_over
        except Exception as error:
            new = tuple(sorted(sink.changed))
            what = f"{len(new)} of {len(fitted.tensors)} units are new, all others as they were"
            raise ReloadError(f"{error}; {what}", new) from error
        meter.sample()
    old = sorted({*fitted.tensors} - sink.changed | {*coming.missing()})
    stale = f"{_some(old)} did not come, or not whole: they keep their weights"
    return _result(model, coming, fitted, old, read, meter, [stale] if old else [])


def quantize_model(
    model: nn.Module,
    *,
    scheme: str = "channel",
    ignore: Sequence[str] = (),
    include: Sequence[str] = (),
    experts: str = "auto",
) -> LoadResult:
    """Quantizes a `model` that has its weights, in place and layer by layer.

    A layer's own weight is let go as soon as its codes are there. Raises what `load_into` does.
    """
    if granularities_of(model):
        raise CheckpointError("quantize_model: the model is FP8 already; fp8stream.reload loads it")
    device = next((tensor.device for tensor in stored_tensors(model).values()), torch.device("cpu"))
    return load_into(
        model,
        _Taken(model),
        scheme=scheme,
        ignore=ignore,
        include=include,
        experts=experts,
        device=str(device),
    )


class _Taken:
    """A model's tensors under the names that it is saved under, each let go once it is given."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = dict(stored_tensors(model))
        self._saved = checkpoint_names(model)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        left: dict[str, int] = {}
        for saved in self._saved:
            for place in saved.places:
                left[place.source] = left.get(place.source, 0) + 1
        for saved in self._saved:
            tensor = torch.empty(saved.shape, dtype=saved.dtype)
            for place in saved.places:
                place.apply(tensor, self._tensors[place.source])
                left[place.source] -= 1
                if not left[place.source]:
                    del self._tensors[place.source]
            yield saved.name, tensor


def _held(model: nn.Module) -> dict[str, Held]:
    """The model's tensors as targets, under each of their names."""
    parts = parts_of(model)
    tensors = stored_tensors(model).items()
    return {name: Held(t, parts.get(name) or Part.whole(t.shape)) for name, t in tensors}


def _open(model: nn.Module, source: Source, recipe: _Recipe) -> "_Coming":
    """What is known of `source` before any of it is read."""
    if isinstance(source, str | Path):
        return _FromFiles(model, open_checkpoint(source), recipe)
    if isinstance(source, Mapping):
        source = list(source.items())
    if not isinstance(source, Sequence) and recipe.mapping is not None:
        source = list(source)
    return _FromTensors(model, source, recipe)


class _Coming:
    """A source, and where in the model everything of it goes. `is_known` says that its names are
    those that will come."""

    is_known = True

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, recipe: _Recipe) -> None:
        self.checkpoint = checkpoint
        self.specs = {spec.name: spec for spec in checkpoint.tensors}
        self.coded = find_coded(self.specs)
        self.decided = recipe.decide(checkpoint)
        beside = {each.scales.name for each in self.coded.values()}
        shapes = [
            (spec.name, spec.shape)
            for spec in checkpoint.tensors
            if spec.name not in beside and not (self.coded and is_of_activations(spec.name))
        ]
        self.placement = find_places(model, shapes, recipe.mapping, original_tensors(model))
        self.unexpected = list(self.placement.unexpected)

    def fit(self, model: nn.Module, recipe: _Recipe) -> Fit:
        """How the source fits the model: its FP8 modules, or what will be that."""
        keep = recipe.experts.form is ExpertForm.KEEP or bool(self.coded)
        chosen = granularities(self.decided, experts=not keep)
        chosen |= {name: each.granularity for name, each in self.coded.items()}
        weights, fixed = find_weights(model), granularities_of(model)
        return fit(self.decided, chosen, self.placement, weights, fixed)

    def stream(
        self,
        fitted: Fit,
        sink: ModelSink,
        device: torch.device,
        budget: int,
        progress: Progress,
    ) -> int:
        """Everything to its place; the bytes that were read."""
        raise NotImplementedError

    def missing(self) -> list[str]:
        """What nothing, or not all, came for."""
        return [str(gap) for gap in self.placement.missing]


class _FromFiles(_Coming):
    """A checkpoint on disk."""

    def stream(
        self,
        fitted: Fit,
        sink: ModelSink,
        device: torch.device,
        budget: int,
        progress: Progress,
    ) -> int:
        gpus = int(device.type == "cuda")
        numbers = [layer for coded, layer in parted(fitted.layers) if not coded]
        weights = [weight for layer in numbers for weight in layer.weights]
        demand = demand_of(weights, max(1, len(fitted.layers)))
        space = plan_workspace(demand, budget, len(os.sched_getaffinity(0)), gpus)
        reader = Reader(self.checkpoint.directory, self.checkpoint.shards)
        tasks = tasks_of(numbers, space.slab_bytes)
        read = 0
        with (
            _one_thread_each(),
            closing(stream_tasks(tasks, space, reader, sink, [device])) as done,
        ):
            for layer in done:
                read += layer.bytes_read
                progress(layer)
        for coded, one in parted(fitted.layers):
            read += copy_layer(one, self.coded, reader, sink) if coded else 0
        for composed in self.placement.composed:
            held = HeldTensors()
            for name in composed.sources:
                held.read(self.specs[name], reader)
                read += self.specs[name].nbytes
            sink.put(composed.convert(held.tensors))
        reader.give_back()
        return read


class _FromTensors(_Coming):
    """Tensors in memory, as they come."""

    def __init__(
        self, model: nn.Module, source: Iterable[tuple[str, Tensor]], recipe: _Recipe
    ) -> None:
        self._source = source
        self.is_known = isinstance(source, Sequence)
        if isinstance(source, Sequence):
            specs = [spec_of(name, tensor) for name, tensor in source]
        else:
            saved = checkpoint_names(model, original_tensors(model))
            specs = [spec_like(each.name, each.dtype, each.shape) for each in saved]
        describe = getattr(getattr(model, "config", None), "to_dict", dict)
        described = dict(describe())
        described.pop("quantization_config", None)
        shards = tuple(Shard(spec.name, spec.nbytes, 0, (spec,)) for spec in specs)
        checkpoint = Checkpoint(Path("model"), Path("model"), described, shards)
        super().__init__(model, checkpoint, recipe)
        if self.coded:
            raise CheckpointError("tensors in FP8 are loaded from a directory or a file alone")
        # Without their storage: a layer's own weight is let go once it is quantized.
        self._original = _without_storage(original_tensors(model))
        self._model = model
        self._names = {_where(places): n for n, places in self.placement.by_source.items()}
        self._came: set[str] = set()

    def stream(
        self,
        fitted: Fit,
        sink: ModelSink,
        device: torch.device,
        budget: int,
        progress: Progress,
    ) -> int:
        held, read = HeldTensors(), 0
        quantized = {w.spec.name for layer in fitted.layers for w in layer.weights}
        waiting = Waiting(fitted.layers, self.placement.composed)
        space = plan_workspace(waiting.demand(), budget, 1, int(device.type == "cuda"))
        with running_out_of_memory():
            with torch.inference_mode():
                lane = open_lane(space, device)
            with Worker(lane, space.slab_bytes, held, sink, Clock(), Event()) as worker:
                for given, tensor in self._source:
                    name = self._known(given, tensor)
                    if not self._take(name, tensor, quantized):
                        continue
                    if not waiting.is_for(name):
                        continue  # of experts that other ranks have
                    held.hold(name, tensor)
                    read += self.specs[name].nbytes
                    layers, composed = waiting.ready(name)
                    for layer in layers:
                        task = Task((with_specs(layer, self.specs),))
                        # The source's own tensors are none of inference mode's.
                        with torch.inference_mode():
                            finished = list(worker.work(task))
                        for done in finished:
                            progress(done)
                    for each in composed:
                        sink.put(each.convert(held.tensors))
                    held.release(waiting.done())
        return read

    def _known(self, name: str, tensor: Tensor) -> str:
        """The name that is expected for a tensor that goes to the same place under another one."""
        if name in self.specs:
            return name
        shapes = [(name, tuple(tensor.shape))]
        found = find_places(self._model, shapes, None, self._original).by_source.get(name, ())
        return self._names.get(_where(found), name) if found else name

    def _take(self, name: str, tensor: Tensor, quantized: Container[str]) -> bool:
        """Whether anything waits for the tensor. Raises CheckpointError for one that is wrong."""
        if name not in self.specs:
            self.unexpected.append(name)
            return False
        if name in self._came:
            raise CheckpointError(f"tensor {name!r}: comes twice")
        if tuple(tensor.shape) != self.specs[name].shape:
            raise CheckpointError(
                f"tensor {name!r}: expected {list(self.specs[name].shape)}, found "
                f"{list(tensor.shape)}"
            )
        self._came.add(name)
        self.specs[name] = spec_of(name, tensor)
        if name in quantized and self.specs[name].dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"tensor {name!r}: expected a weight in {', '.join(TORCH_DTYPES)}, found "
                f"{self.specs[name].dtype}; cast it, or keep the layer with ignore"
            )
        return bool(self.placement.by_source.get(name)) or any(
            name in composed.sources for composed in self.placement.composed
        )

    def missing(self) -> list[str]:
        lost = [name for name in self.specs if name not in self._came]
        targets = {p.target for n in lost for p in self.placement.by_source.get(n, ())}
        return sorted({*super().missing(), *targets})


def _without_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on meta, under one name or several as they are."""
    bare = {id(tensor): tensor.detach().to("meta") for tensor in tensors.values()}
    return {name: bare[id(tensor)] for name, tensor in tensors.items()}


def _where(places: Sequence[Place]) -> frozenset[tuple[str, Region]]:
    """The regions that a tensor fills."""
    return frozenset((place.target, place.region) for place in places)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Workers are the parallelism: threads inside torch would only get in their way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _require(placement: Placement, strict: bool) -> None:
    """Raises CheckpointError if a source that is known is not all of the model."""
    if strict and placement.missing:
        raise CheckpointError(_not_all([str(gap) for gap in placement.missing]))


def _not_all(missing: Sequence[str]) -> str:
    return f"not all of the model comes: missing {_some(missing)}; give the rest, or strict=False"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def _check_scheme(model: nn.Module, recipe: _Recipe) -> None:
    """Raises SchemeError for a model that is FP8 already, and otherwise than `recipe` says."""
    known = getattr(model, _RECIPE, recipe)
    there = bool(granularities_of(model) or parts_of(model))
    if there and known.rank != recipe.rank:
        raise SchemeError(
            "tp_rank, tp_size: the model is rank {} of {} already, not {} of {}; begin with a new "
            "skeleton".format(*known.rank, *recipe.rank)
        )
    if there and known.scheme != recipe.scheme:
        before, after = (r.scheme.granularity.value for r in (known, recipe))
        raise SchemeError(
            f"scheme {after!r}: the model's weights are {before} already; begin with a new "
            "skeleton, or give it other weights with fp8stream.reload"
        )


def _result(
    model: nn.Module,
    coming: _Coming,
    fitted: Fit,
    missing: Sequence[str],
    read: int,
    meter: PeakMeter,
    more_warnings: Sequence[str] = (),
) -> LoadResult:
    quantized = tuple(sorted(granularities_of(model)))
    warnings = [*coming.decided.warnings, *fitted.warnings, *more_warnings, *_useless(coming)]
    if not quantized:
        warnings.append("nothing was quantized: no linear layer or expert is to be, by what it is")
    fp8 = {weight.target for weight in find_weights(model) if weight.module in {*quantized}}
    return LoadResult(
        quantized,
        tuple(name for name in original_tensors(model) if name not in fp8),
        tuple(missing),
        tuple(coming.unexpected),
        tuple(warnings),
        read,
        meter.peak.anonymous - meter.baseline.anonymous,
    )


def _useless(coming: _Coming) -> Iterator[str]:
    """What was given and is of no use."""
    placement = coming.placement
    if placement.unused:
        yield f"mapping: {_some(placement.unused)} matches no name of the source"
    if placement.leftover:
        yield f"mapping: {_some([str(gap) for gap in placement.leftover])} goes nowhere"
    if placement.stranded:
        yield f"{_some(placement.stranded)}: of no use without others that did not come"


def _bytes(budget: str | int) -> int:
    return budget if isinstance(budget, int) else parse_size(budget)


def _nothing(done: LayerDone) -> None:
    """What is told of progress where nobody asks."""
