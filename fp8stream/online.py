"""A checkpoint straight into a live FP8 model, and again into the same storage.

The model is a skeleton on meta. Its linear layers and experts become FP8 modules, and what the
converter would write into files streams into their tensors: read, materialize, quantize, copy,
release. No 16-bit model ever exists. A reload streams into the tensors that are there, unit by
unit, so that whoever holds on to their storage, as a captured graph does, sees the new weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from fp8stream.checkpoint import Checkpoint
from fp8stream.device import find_devices
from fp8stream.errors import (
    CheckpointError,
    ReloadError,
    SchemeError,
    WeightError,
    listed,
)
from fp8stream.experts import ExpertForm, ExpertOptions
from fp8stream.fitting import Fit, module_of
from fp8stream.fp8 import is_finite
from fp8stream.incoming import Course, Incoming, Progress, Request, Source
from fp8stream.initialization import finish, uncomputable
from fp8stream.live import Held, ModelSink, Share
from fp8stream.mapping import Placement, Rule, checkpoint_names, model_tensors
from fp8stream.memory import PeakMeter, size_of
from fp8stream.one_by_one import unsaved
from fp8stream.plan import Decisions, decide_tensors
from fp8stream.policy import Patterns
from fp8stream.ranks import Group
from fp8stream.reads import read_by_parents
from fp8stream.scheme import Granularity, Scheme
from fp8stream.skeleton import (
    become_fp8,
    check_model,
    find_weights,
    give_storage,
    granularities_of,
    not_plain,
    original_tensors,
    parts_of,
    sharing,
)
from fp8stream.sources import open_source
from fp8stream.spread import Spread, spread
from fp8stream.stream import LayerDone
from fp8stream.trimming import trimmed


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

    `rank` is which of how many ranks of tensor parallelism it is, cut by `plan`. `loaded` are the
    tensors that all came, and `units` the modules that share a scale, or a source.
    """

    scheme: Scheme
    patterns: Patterns
    experts: ExpertOptions
    mapping: Mapping[str, Rule] | None
    rank: tuple[int, int] = (0, 1)
    plan: Mapping[str, str] | None = None
    whole: bool = False
    loaded: frozenset[str] = frozenset()
    units: tuple[frozenset[str], ...] = ()

    def decide(self, checkpoint: Checkpoint) -> Decisions:
        # Other weights need not have all that was ignored or included.
        patterns = replace(self.patterns, may_miss=self.whole)
        return decide_tensors(checkpoint, self.scheme, patterns, self.experts)

    @property
    def request(self) -> Request:
        keep = self.experts.form is ExpertForm.KEEP
        return Request(self.decide, self.patterns.ignores, not keep, self.mapping)


_RECIPE = "_fp8stream_recipe"
_BUDGET = "1GiB"
_LISTED = 10


def load_into(
    model: nn.Module,
    source: Source,
    *,
    scheme: str = "channel",
    ignore: Sequence[str] = (),
    include: Sequence[str] = (),
    experts: str = "auto",
    device: str | torch.device = "auto",
    memory_budget: str | int = _BUDGET,
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
    recipe = _recipe(scheme, ignore, include, experts, mapping, (tp_rank, tp_size), tp_plan)
    where, budget = find_devices(str(device))[0], size_of("memory_budget", memory_budget)
    how = _How(where, budget, strict, progress or _nothing)
    return _load(_bare(model), source, recipe, how)


@dataclass(frozen=True)
class _How:
    """What a load needs to know that a reload does not go by."""

    device: torch.device
    budget: int
    strict: bool
    progress: Progress


def _recipe(
    scheme: str,
    ignore: Sequence[str],
    include: Sequence[str],
    experts: str,
    mapping: Mapping[str, Rule] | None = None,
    rank: tuple[int, int] = (0, 1),
    plan: Mapping[str, str] | None = None,
) -> _Recipe:
    return _Recipe(
        Scheme(_choice(Granularity, "scheme", scheme)),
        Patterns(_names("ignore", ignore), _names("include", include)),
        ExpertOptions(_choice(ExpertForm, "experts", experts)),
        mapping,
        rank,
        plan,
    )


def _load(
    model: nn.Module,
    source: Source,
    recipe: _Recipe,
    how: _How,
    check: Callable[[Fit], None] | None = None,
) -> LoadResult:
    """Loads `source`, once `check` has nothing against how it fits."""
    check_model(model)
    _check_recipe(model, recipe)
    coming = open_source(model, source, recipe.request)
    fixed = granularities_of(model) or None
    fitted = coming.fit(model, fixed, read_by_parents(model), not_plain(model))
    if how.strict:
        gaps = coming.placement.missing if coming.is_known else ()
        _require([*map(str, gaps), *uncomputable(model)])
    if check is not None:
        check(fitted)
    before = getattr(model, _RECIPE, recipe)
    units = tuple(frozenset(map(module_of, names)) for names in fitted.tensors.values())
    # An iterator is not known to lack anything before it ends.
    own = {} if how.strict or coming.is_known else _own_weights(model, fitted)
    ours = _share(model, coming, fitted, recipe.rank, recipe.plan)
    fitted = trimmed(fitted, ours.parts)
    # What is made on the way lies on the host, whatever device the caller is in the context of.
    with PeakMeter() as meter, torch.no_grad(), torch.device("cpu"):
        become_fp8(model, fitted.quantized, coming.placement.ties)
        ours.apply(model)
        begun = replace(recipe, loaded=before.loaded, units=before.units)
        object.__setattr__(model, _RECIPE, begun)
        give_storage(model, how.device, spoiled=not how.strict)
        sink = ModelSink(_held(model), fitted.copied, coming.specs)
        read = coming.stream(Course(fitted, sink, how.device, how.budget, how.progress))
        read -= sink.passed_over
        missing = [*coming.missing(), *finish(model, coming.placement, how.device)]
        meter.sample()
    if how.strict:
        _require(missing)
    loaded = before.loaded | (coming.placement.filled - {gap.partition("[")[0] for gap in missing})
    units = tuple(dict.fromkeys((*units, *before.units)))
    object.__setattr__(model, _RECIPE, replace(recipe, whole=True, loaded=loaded, units=units))
    _put_back(model, {name: own[name] for name in own.keys() - coming.came()})
    if coming.placement.conversions:
        # What transformers keeps there itself, to save under the names that were loaded.
        object.__setattr__(model, "_weight_conversions", list(coming.placement.conversions))
    return _result(model, coming, fitted, missing, read, meter, ours.warnings)


def _own_weights(model: nn.Module, fitted: Fit) -> dict[str, Tensor]:
    """What weights that will be FP8 have for values."""
    tensors = model_tensors(model)
    targets = (w.target for w in find_weights(model) if w.module in fitted.quantized)
    found = {name: tensors[name] for name in targets}
    return {name: t.detach() for name, t in found.items() if not t.is_meta and t.itemsize > 1}


def _put_back(model: nn.Module, own: Mapping[str, Tensor]) -> None:
    """Gives FP8 weights that nothing came for what they had for values, if those are numbers."""
    finite = {n: t for n, t in own.items() if is_finite(torch.stack(torch.aminmax(t)))}
    if not finite:
        return
    recipe = getattr(model, _RECIPE)
    # They come alone, whatever else their modules have.
    object.__setattr__(model, _RECIPE, replace(recipe, loaded=frozenset(), units=()))
    reload(model, finite, strict=False)
    object.__setattr__(model, _RECIPE, recipe)


def _share(
    model: nn.Module,
    coming: Incoming,
    fitted: Fit,
    rank: tuple[int, int],
    plan: Mapping[str, str] | None,
) -> Spread:
    """What a rank holds of the model."""
    ours = Spread(dict(parts_of(model)))
    if rank == (0, 1) or ours.parts:
        return ours
    return spread(model, fitted.quantized, coming.placement.ties, Group(*rank), plan)


def reload(
    model: nn.Module,
    source: Source,
    *,
    memory_budget: str | int = _BUDGET,
    strict: bool = True,
    progress: Progress | None = None,
) -> LoadResult:
    """Loads other weights into a `model` that `load_into` loaded: into the same storage.

    What belongs together, a module or all those that share a scale, changes at once when all of it
    came, which takes its size in memory besides; what does not come stays, with a warning. If
    `strict`, a source that brings some of what belongs together is refused, before anything changes
    where its names are known.

    Raises what `load_into` does, and ReloadError, which knows the modules that are new already,
    where it stops midway.
    """
    model = _bare(model)
    recipe = getattr(model, _RECIPE, None)
    if not isinstance(recipe, _Recipe) or not recipe.whole:
        raise CheckpointError("reload: expected a model that fp8stream.load_into loaded")
    check_model(model)
    held, budget = _held(model), size_of("memory_budget", memory_budget)
    where = next((h.tensor.device for h in held.values()), torch.device("cpu"))
    coming = open_source(model, source, recipe.request)
    fitted = coming.fit(model, granularities_of(model), together=(*recipe.units, *sharing(model)))
    lacking = recipe.loaded - coming.placement.filled
    stale = {fitted.unit(name) for name in lacking}
    if strict and coming.is_known:
        begun = {fitted.unit(name) for name in coming.came()}
        _require(_gaps({n for n in lacking if fitted.unit(n) in begun}, coming.placement))
    fitted = trimmed(fitted.without(stale), parts_of(model))
    sink = ModelSink(held, fitted.copied, coming.specs, fitted.units, fitted.unit)
    with PeakMeter() as meter, torch.no_grad(), torch.device("cpu"):
        settle = partial(_is_whole, recipe.loaded, fitted)
        course = Course(fitted, sink, where, budget, progress or _nothing, settle)
        try:
            read = coming.stream(course) - sink.passed_over
            begun = {fitted.unit(name) for name in coming.came()} & fitted.tensors.keys()
            if strict:
                torn = {n for n in recipe.loaded if fitted.unit(n) in begun - sink.changed}
                _require(_gaps(torn - coming.placement.filled, coming.placement))
        except Exception as error:
            raise _stopped(error, fitted, sink.changed) from error
        finally:
            fresh = {n for n in coming.placement.filled if fitted.unit(n) in sink.changed}
            object.__setattr__(model, _RECIPE, replace(recipe, loaded=recipe.loaded | fresh))
        if where.type == "cuda":
            # A graph may be replayed next, on a stream that waits for nothing.
            torch.cuda.synchronize(where)
        meter.sample()
    new = _modules(fitted, sink.changed)
    missing = sorted(name for name in recipe.loaded if module_of(name) not in new)
    old = list(dict.fromkeys(map(module_of, missing)))
    told = f"{listed(old, _LISTED)} did not come, or not whole: they keep their weights"
    return _result(model, coming, fitted, missing, read, meter, [told] if old else [])


def _gaps(names: Set[str], placement: Placement) -> list[str]:
    """What lacks of the tensors of these names, by region where some of it comes."""
    told = [str(gap) for gap in placement.missing if gap.target in names]
    return sorted({*told, *(names - {gap.target for gap in placement.missing})})


def _is_whole(loaded: Set[str], fitted: Fit, number: int, came: Placement) -> bool:
    """Whether all came that was ever loaded of what changes with the layer of this number."""
    unit = fitted.units[number]
    return not any(fitted.unit(name) == unit for name in loaded - came.filled)


def _tensors(fitted: Fit, units: Set[str]) -> set[str]:
    return {name for unit in units for name in fitted.tensors[unit]}


def _modules(fitted: Fit, units: Set[str]) -> set[str]:
    return set(map(module_of, _tensors(fitted, units)))


def _stopped(error: Exception, fitted: Fit, changed: Set[str]) -> ReloadError:
    new, every = _modules(fitted, changed), _modules(fitted, fitted.tensors.keys())
    what = f"{len(new)} of {len(every)} modules are new, all others as they were"
    return ReloadError(f"{error or type(error).__name__}; {what}", tuple(sorted(new)))


def quantize_model(
    model: nn.Module,
    *,
    scheme: str = "channel",
    ignore: Sequence[str] = (),
    include: Sequence[str] = (),
    experts: str = "auto",
) -> LoadResult:
    """Quantizes a `model` that has its weights, in place and layer by layer.

    A layer's own weight is let go as soon as its codes are there. Raises what `load_into` does,
    before anything changes.
    """
    model = _bare(model)
    if granularities_of(model):
        raise CheckpointError("quantize_model: the model is FP8 already; fp8stream.reload loads it")
    tensors = model_tensors(model)
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    recipe = _recipe(scheme, ignore, include, experts)
    how = _How(device, size_of("memory_budget", _BUDGET), True, _nothing)
    return _load(model, _Taken(model), recipe, how, partial(_check_finite, model))


def _check_finite(model: nn.Module, fitted: Fit) -> None:
    """Raises WeightError for NaN and infinity in what will be quantized, and CheckpointError for a
    weight without values: what is lost then has no other copy."""
    tensors = model_tensors(model)
    for weight in find_weights(model):
        tensor = tensors[weight.target].detach()
        if weight.module not in fitted.quantized or not tensor.numel():
            continue
        if tensor.is_meta:
            raise CheckpointError(
                f"quantize_model: {weight.target} is on meta and has no values; "
                "fp8stream.load_into loads them"
            )
        if not is_finite(torch.stack(torch.aminmax(tensor))):
            raise WeightError(
                f"tensor {weight.target!r}: expected finite values, found NaN or infinity; repair "
                f"it, or keep the layer with ignore=[{weight.module!r}]"
            )


class _Taken:
    """A model's tensors under the names that it is saved under, each let go once it is given."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = dict(model_tensors(model))
        self._saved = checkpoint_names(model)
        self._unsaved = unsaved(model, self._tensors, self._saved)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        left: dict[str, int] = {}
        for saved in self._saved:
            for source in saved.sources:
                left[source] = left.get(source, 0) + 1
        for saved in self._saved:
            tensor = saved.values(self._tensors)
            for source in saved.sources:
                left[source] -= 1
                if not left[source]:
                    del self._tensors[source]
            yield saved.name, tensor
        for name in self._unsaved:
            yield name, self._tensors.pop(name)


def _held(model: nn.Module) -> dict[str, Held]:
    """The model's tensors as targets, under each of their names."""
    parts = parts_of(model)
    tensors = model_tensors(model).items()
    return {name: Held(t, parts.get(name) or Share.whole(t.shape)) for name, t in tensors}


def _bare(model: nn.Module) -> nn.Module:
    """The model itself, where torch.compile has put it into another module."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _require(missing: Sequence[str]) -> None:
    """Raises CheckpointError if something is `missing`."""
    if missing:
        raise CheckpointError(_not_all(missing))


def _not_all(missing: Sequence[str]) -> str:
    names = listed(missing, _LISTED)
    return f"not all of the model comes: missing {names}; give the rest, or strict=False"


def _check_recipe(model: nn.Module, recipe: _Recipe) -> None:
    """Raises SchemeError for a model that is FP8 already, and otherwise than `recipe` says."""
    known = getattr(model, _RECIPE, recipe)
    there = bool(granularities_of(model) or parts_of(model))
    if there and known.rank != recipe.rank:
        raise SchemeError(
            "tp_rank, tp_size: the model is rank {} of {} already, not {} of {}; begin with a new "
            "skeleton".format(*known.rank, *recipe.rank)
        )
    if parts_of(model) and known.plan != recipe.plan:
        raise SchemeError(
            "tp_plan: the model is cut by another one already; begin with a new skeleton"
        )
    if there and known.scheme != recipe.scheme:
        before, after = (r.scheme.granularity.value for r in (known, recipe))
        raise SchemeError(
            f"scheme {after!r}: the model's weights are {before} already; begin with a new "
            "skeleton, or give it other weights with fp8stream.reload"
        )
    if there and (known.patterns, known.experts) != (recipe.patterns, recipe.experts):
        raise SchemeError(
            "ignore, include, experts: the model was loaded with others; begin with a new "
            "skeleton, or give it other weights with fp8stream.reload"
        )


Choice = TypeVar("Choice", bound=Enum)


def _choice(kind: type[Choice], option: str, value: str) -> Choice:
    """The choice that is called `value`. Raises SchemeError."""
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(repr(choice.value) for choice in kind)
        raise SchemeError(f"{option}: expected one of {known}, found {value!r}") from None


def _names(option: str, patterns: Sequence[str]) -> tuple[str, ...]:
    """Raises SchemeError for one string, which would be taken letter by letter."""
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise SchemeError(f"{option}: expected a list of names, found {patterns!r}")
    return tuple(patterns)


def _result(
    model: nn.Module,
    coming: Incoming,
    fitted: Fit,
    missing: Sequence[str],
    read: int,
    meter: PeakMeter,
    more_warnings: Sequence[str] = (),
) -> LoadResult:
    fp8 = granularities_of(model)
    quantized = tuple(sorted(name for name, _ in model.named_modules() if name in fp8))
    warnings = [*coming.decided.warnings, *fitted.warnings, *more_warnings, *_useless(coming)]
    if not quantized:
        warnings.append("nothing was quantized: no linear layer or expert is to be, by what it is")
    codes = {weight.target for weight in find_weights(model) if weight.module in fp8}
    return LoadResult(
        quantized,
        tuple(name for name in original_tensors(model) if name not in codes),
        tuple(missing),
        tuple(coming.unexpected),
        tuple(warnings),
        read,
        meter.peak.anonymous - meter.baseline.anonymous,
    )


def _useless(coming: Incoming) -> Iterator[str]:
    """What was given and is of no use."""
    placement = coming.placement
    if placement.unused:
        yield f"mapping: {listed(placement.unused, _LISTED)} matches no name of the source"
    if placement.leftover:
        yield f"mapping: {listed([str(gap) for gap in placement.leftover], _LISTED)} goes nowhere"
    if placement.stranded:
        yield f"{listed(placement.stranded, _LISTED)}: of no use without others that did not come"


def _nothing(done: LayerDone) -> None:
    """What is told of progress where nobody asks."""
