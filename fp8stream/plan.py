"""The plan: from headers, config and a scheme to everything that will be done, before any of it is.

A pure value. What `inspect` and `--dry-run` show, what the disk-space check asks for, the total of
the progress bar and the predicted peak memory are all read off the object that the conversion then
follows.
"""

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

from fp8stream import __version__
from fp8stream.advice import advise
from fp8stream.checkpoint import Checkpoint
from fp8stream.declaration import Modules, declare
from fp8stream.engines import fall_back, keep_unquantized
from fp8stream.errors import SchemeError
from fp8stream.experts import AS_KNOWN, Arrangement, ExpertOptions, arrange
from fp8stream.header import TensorSpec
from fp8stream.layout import OutputFile, OutputTensor, entry_room, pack
from fp8stream.memory import SlabDemand, Workspace, plan_workspace
from fp8stream.policy import Patterns, decide
from fp8stream.roles import Classified, Role, classify, expert_module, fused_set, is_tied
from fp8stream.scheme import Granularity, Scheme
from fp8stream.structure import Config, Family, in_order
from fp8stream.views import Runs, View
from fp8stream.weights import Kept, Kind, LinearLayers, StackedExperts, Treatment, WeightPlan

_METADATA = {"format": "pt", "fp8stream": __version__}
# What a name grows by: `.123456.gate_proj.weight_scale_inv`.
_SUFFIX = 40
# Bytes that make a layer a large one.
_LARGE = 64 << 20
_SLABS_A_TASK = 4
# What a worker remembers of layers that it has begun is in no budget: so few that it need not be.
_LAYERS_A_TASK = 32
# Nor are scales, and what is computed on the way to them: some 25 bytes a row.
_ROWS_A_SLAB = 16384
_FILES_AT_ONCE = 4


@dataclass(frozen=True)
class Resources:
    """What a run may use: bytes of memory, worker threads, bytes a file, and GPUs."""

    memory_budget: int
    threads: int
    max_shard_size: int
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What happens to one source tensor."""

    spec: TensorSpec
    treatment: Treatment

    @property
    def known(self) -> Classified:
        return self.treatment.known

    @property
    def role(self) -> Role:
        return self.treatment.known.role

    @property
    def reason(self) -> str:
        return self.treatment.known.reason

    @property
    def granularity(self) -> Granularity | None:
        """None for a tensor that is kept."""
        return self.treatment.granularity

    @property
    def action(self) -> str:
        return "quantize" if self.treatment.count else "keep"

    @property
    def weights(self) -> tuple[WeightPlan, ...]:
        """The weights that lie in the tensor; none of one that is kept."""
        return self.treatment.weights(self.spec)

    @property
    def output_names(self) -> list[str]:
        return self.treatment.names(self.spec)

    def outputs(self) -> list[OutputTensor]:
        """The tensors of the output that this one becomes, or becomes a part of."""
        return self.treatment.outputs(self.spec)

    @property
    def output_bytes(self) -> int:
        return self.treatment.nbytes(self.spec)

    @property
    def room(self) -> int:
        """Bytes that the outputs take in a header, at most: their names grow by a suffix."""
        count = self.treatment.pieces
        return count * (entry_room(self.spec.name, max(3, len(self.spec.shape))) + _SUFFIX)


@dataclass(frozen=True)
class Slab:
    """A run of rows of a weight that goes through a worker's buffers at once."""

    weight: WeightPlan
    first_row: int
    rows: int

    @property
    def runs(self) -> Runs:
        """Where the rows lie in the source tensor, in elements."""
        return self.weight.source.runs(self.first_row, self.rows, self.weight.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return self.runs.elements * self.weight.spec.itemsize


@dataclass(frozen=True)
class Batch:
    """Slabs that go through a worker's buffers as one: rows below rows, all equally long.

    Small layers would otherwise cost more in launches than in arithmetic.
    """

    slabs: tuple[Slab, ...]

    @cached_property
    def rows(self) -> int:
        return sum(slab.rows for slab in self.slabs)

    @property
    def columns(self) -> int:
        return self.slabs[0].weight.shape[1]

    @property
    def granularity(self) -> Granularity:
        return self.slabs[0].weight.granularity

    @cached_property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(slab.nbytes for slab in self.slabs)


@dataclass(frozen=True, slots=True)
class Written:
    """Bytes `[begin, end)` of a tensor of the output."""

    tensor: str
    begin: int
    end: int


@dataclass(frozen=True)
class LayerPlan:
    """The smallest closure that is worked on alone: a module's tensors, or those of the modules of
    a fused set where one scale serves them all. Its `number` is its place in the plan."""

    number: int
    name: str
    weights: list[WeightPlan]
    kept: list[TensorPlan]

    @property
    def shares_scale(self) -> bool:
        return any(weight.granularity is Granularity.TENSOR for weight in self.weights)

    def slabs(self, slab_bytes: int) -> Iterator[Slab]:
        """The rows of the layer's weights, at most `slab_bytes` of source at a time."""
        for weight in self.weights:
            rows, multiple = weight.shape[0], weight.row_multiple
            fitting = min(_ROWS_A_SLAB, slab_bytes // weight.row_bytes)
            step = max(multiple, fitting // multiple * multiple)
            for row in range(0, rows, step):
                yield Slab(weight, row, min(step, rows - row))

    def bytes_read(self, slab_bytes: int) -> int:
        """Source bytes read: a shared scale takes a pass of its own unless one slab holds all."""
        once = sum(weight.nbytes for weight in self.weights)
        again = self.shares_scale and sum(1 for _ in self.slabs(slab_bytes)) > 1
        return once * (2 if again else 1) + sum(tensor.spec.nbytes for tensor in self.kept)

    @property
    def first_output(self) -> str:
        """The name of the first tensor that is written for the layer."""
        return self.weights[0].codes.name if self.weights else self.kept[0].spec.name

    def written(self) -> Iterator[Written]:
        """Everything that is written for the layer."""
        for tensor in self.kept:
            yield Written(tensor.spec.name, 0, tensor.spec.nbytes)
        for weight in self.weights:
            yield from _pieces(weight.codes, weight.codes_at, weight.shape)
            *height, width = weight.granularity.scale_shape(weight.shape)
            yield from _pieces(weight.scales, weight.scales_at, (math.prod(height), width))

    @property
    def nbytes(self) -> int:
        """Bytes of the layer's tensors."""
        kept = sum(tensor.spec.nbytes for tensor in self.kept)
        return kept + sum(weight.nbytes for weight in self.weights)

    @property
    def bytes_written(self) -> int:
        kept = sum(tensor.spec.nbytes for tensor in self.kept)
        grids = (math.prod(w.granularity.scale_shape(w.shape)) for w in self.weights)
        codes = sum(weight.shape[0] * weight.shape[1] for weight in self.weights)
        return kept + codes + 4 * sum(grids)


def _pieces(tensor: OutputTensor, view: View, shape: tuple[int, int]) -> Iterator[Written]:
    """What a matrix of `shape` takes of an output tensor that it lies in."""
    runs = view.runs(0, *shape)
    for begin, _ in runs.pieces(tensor.itemsize):
        yield Written(tensor.name, begin, begin + runs.length * tensor.itemsize)


@dataclass(frozen=True)
class Task:
    """Layers that a worker takes at once: one, or several small ones."""

    layers: tuple[LayerPlan, ...]

    @property
    def shares_scale(self) -> bool:
        """Of the one layer that it then is."""
        return any(layer.shares_scale for layer in self.layers)

    def batches(self, slab_bytes: int) -> Iterator[Batch]:
        """The rows of all its weights, at most `slab_bytes` of source at a time."""
        together: list[Slab] = []
        size = rows = 0
        for slab in (slab for layer in self.layers for slab in layer.slabs(slab_bytes)):
            size, rows = size + slab.nbytes, rows + slab.rows
            fits = size <= slab_bytes and rows <= _ROWS_A_SLAB
            if together and not (fits and _stack(together[-1], slab)):
                yield Batch(tuple(together))
                together, size, rows = [], slab.nbytes, slab.rows
            together.append(slab)
        if together:
            yield Batch(tuple(together))


def _stack(upper: Slab, lower: Slab) -> bool:
    """Whether `lower` can lie below `upper`: rows like its rows, and scale groups of its own."""
    one, other = upper.weight, lower.weight
    return (
        one.granularity is other.granularity is not Granularity.TENSOR
        and one.shape[1] == other.shape[1]
        and one.spec.dtype == other.spec.dtype
        and not (one.source.transposed or other.source.transposed)
        and upper.rows % one.granularity.row_multiple == 0
    )


@dataclass(frozen=True)
class Plan:
    """Everything a conversion will do. `config` is the output's whole config.json."""

    scheme: Scheme
    tensors: tuple[TensorPlan, ...]
    kinds: tuple[Kind, ...]
    files: tuple[OutputFile, ...]
    config: Mapping[str, Any]
    workspace: Workspace
    side_bytes: int
    tied: bool
    warnings: tuple[str, ...]

    @cached_property
    def layers(self) -> tuple[LayerPlan, ...]:
        """The units of work, in the order of their first tensor."""
        return _layers(self.tensors)

    def written(self, layers: Iterable[int]) -> Iterator[Written]:
        """Everything that is written for the layers with these numbers."""
        return (part for number in layers for part in self.layers[number].written())

    def tasks(self, done: Set[int] = frozenset()) -> tuple[Task, ...]:
        """The layers as workers take them, but for those that are `done`: a few output files' in
        turn.

        A system writes to one file for one thread at a time. Of a file the large layers come first,
        or one that ends last would keep every other worker waiting.
        """
        files = {tensor.name: file.name for file in self.files for tensor in file.tensors}
        groups: dict[str, list[LayerPlan]] = {file.name: [] for file in self.files}
        for layer in self.layers:
            if layer.number not in done:
                groups[files[layer.first_output]].append(layer)
        for layers in groups.values():
            layers.sort(key=lambda layer: -(layer.nbytes // _LARGE))
        slab_bytes = self.workspace.slab_bytes
        tasks = (list(tasks_of(layers, slab_bytes)) for layers in groups.values())
        return tuple(take_turns(tasks, _FILES_AT_ONCE))

    def with_resources(self, resources: Resources) -> "Plan":
        """The same plan with other buffers. Raises BudgetError."""
        return replace(self, workspace=_plan_workspace(self.kinds, resources))

    @property
    def layers_quantized(self) -> int:
        return sum(kind.treatment.count * len(kind.members) for kind in self.kinds)

    @property
    def layers_kept(self) -> int:
        kept = (kind for kind in self.kinds if not kind.treatment.count and kind.is_layer)
        return sum(len(kind.members) for kind in kept)

    @cached_property
    def bytes_read(self) -> int:
        """Source bytes read; tensor scales take a further pass where a slab does not hold all."""
        if self.scheme.granularity is Granularity.TENSOR:
            return sum(layer.bytes_read(self.workspace.slab_bytes) for layer in self.layers)
        return sum(kind.nbytes for kind in self.kinds)

    @property
    def bytes_written(self) -> int:
        """Bytes of the safetensors files, headers included."""
        return sum(file.size for file in self.files)

    @property
    def disk_bytes(self) -> int:
        """Bytes that the whole output takes, an index as large as the headers with it."""
        headers = sum(file.data_begin for file in self.files)
        index = headers if len(self.files) > 1 else 0
        return self.bytes_written + index + self.side_bytes

    @property
    def bits_per_weight(self) -> float:
        elements = sum(len(kind.members) * kind.first.numel for kind in self.kinds)
        written = sum(file.size - file.data_begin for file in self.files)
        return 8 * written / max(1, elements)

    @cached_property
    def fused_with(self) -> Mapping[str, tuple[str, ...]]:
        """For every member of a fused set, the names of the others."""
        found: dict[str, list[str]] = defaultdict(list)
        for tensor in self.tensors:
            key = fused_set(tensor.spec.name, tensor.known)
            if key is not None:
                found[key].append(tensor.spec.name)
        return {
            name: tuple(other for other in members if other != name)
            for members in found.values()
            for name in members
        }


@dataclass(frozen=True)
class Decisions:
    """What becomes of every tensor, in the plan's order, and by kinds; `tied` says that the output
    head is in no file."""

    scheme: Scheme
    tensors: tuple[TensorPlan, ...]
    kinds: tuple[Kind, ...]
    tied: bool
    warnings: tuple[str, ...]


def decide_tensors(
    checkpoint: Checkpoint,
    scheme: Scheme,
    patterns: Patterns,
    experts: ExpertOptions = AS_KNOWN,
) -> Decisions:
    """What is quantized, and how. Reads nothing.

    Raises SchemeError for a pattern that matches nothing, CheckpointError where config.json
    contradicts the shapes of experts.
    """
    config = Config(checkpoint.config)
    ordered = in_order(checkpoint.tensors)
    classified = keep_unquantized(classify(ordered, config), config)
    warnings: list[str] = []
    tied = is_tied(classified, config)
    kinds = _kinds(checkpoint, classified, config, scheme, patterns, experts, warnings)
    place = {named.tensor.name: at for at, named in enumerate(ordered)}
    kinds = tuple(sorted(kinds, key=lambda kind: place[kind.first.name]))
    treated = {spec.name: kind.treatment for kind in kinds for spec in kind.members}
    tensors = tuple(TensorPlan(n.tensor, treated[n.tensor.name]) for n in ordered)
    return Decisions(scheme, tensors, kinds, tied, tuple(warnings))


def plan_quantization(
    checkpoint: Checkpoint,
    scheme: Scheme,
    patterns: Patterns,
    resources: Resources,
    experts: ExpertOptions = AS_KNOWN,
) -> Plan:
    """Plans the conversion of `checkpoint`. Reads nothing.

    Raises what `decide_tensors` does, SchemeError for what the format cannot say, BudgetError for a
    budget that is too small.
    """
    decided = decide_tensors(checkpoint, scheme, patterns, experts)
    config, tensors, kinds = Config(checkpoint.config), decided.tensors, decided.kinds
    advice = advise(kinds, scheme, config, checkpoint, resources.max_shard_size)
    declared = declare(scheme, modules_of(tensors, decided.tied))
    return Plan(
        scheme,
        tensors,
        kinds,
        pack(_modules_of(tensors), resources.max_shard_size, _METADATA),
        {**checkpoint.config, "quantization_config": declared},
        _plan_workspace(kinds, resources),
        sum(file.size for file in checkpoint.side_files),
        decided.tied,
        (*_remarks(checkpoint), *decided.warnings, *advice),
    )


def _remarks(checkpoint: Checkpoint) -> Iterator[str]:
    """What is said of a checkpoint, whatever is decided."""
    yield from checkpoint.warnings
    if checkpoint.quantized_as:
        yield f"already quantized ({checkpoint.quantized_as}): quantize refuses it"


def _kinds(
    checkpoint: Checkpoint,
    classified: Mapping[Family, Classified],
    config: Config,
    scheme: Scheme,
    patterns: Patterns,
    experts: ExpertOptions,
    warnings: list[str],
) -> tuple[Kind, ...]:
    """What becomes of every tensor: the default, what was asked for, what engines make of it."""
    if checkpoint.quantized_as:
        classified = {family: _as_it_is(known) for family, known in classified.items()}
    families, arrangements = arrange(classified, config, scheme, experts)
    decided = decide(families, patterns, is_tied(families, config), warnings)
    decided, to_channel = fall_back(families, decided, scheme, config, warnings)
    planner = _Planner(scheme, decided, to_channel, arrangements)
    kinds = tuple(kind for family in families for kind in planner.kinds(family))
    _check_unique(kinds, scheme)
    return kinds


def _as_it_is(known: Classified) -> Classified:
    reason = "the checkpoint is already quantized"
    return replace(known, quantize=False, quantizable=False, reason=reason)


@dataclass(frozen=True)
class _Planner:
    """Makes the plan of each tensor from what was decided for all."""

    scheme: Scheme
    decided: Mapping[str, Classified]
    to_channel: set[str]
    arrangements: Mapping[Family, Arrangement]

    def kinds(self, family: Family) -> list[Kind]:
        """The family's members, parted where they are treated differently."""
        kinds: dict[Treatment, Kind] = {}
        same: dict[tuple[int, bool], Kind] = {}  # as comparing treatments takes its time
        for spec in family.members:
            known = self.decided[spec.name]
            key = id(known), spec.name in self.to_channel
            if key not in same:
                treatment = self._treatment(family, known, self._granularity(spec, known))
                same[key] = kinds.setdefault(treatment, Kind(family.template, treatment, []))
            same[key].members.append(spec)
        return list(kinds.values())

    def _treatment(self, family: Family, known: Classified, granularity: Granularity) -> Treatment:
        if not known.quantize:
            return Kept(known)
        arrangement = self.arrangements.get(family)
        if arrangement:
            return StackedExperts(known, granularity, family.shape, arrangement, self.scheme)
        rows, columns = family.shape
        return LinearLayers(known, granularity, (rows, columns), self.scheme)

    def _granularity(self, spec: TensorSpec, known: Classified) -> Granularity:
        if spec.name in self.to_channel:
            return Granularity.CHANNEL
        expert = known.role is Role.EXPERT
        return self.scheme.expert_granularity if expert else self.scheme.granularity


def _layers(planned: Sequence[TensorPlan]) -> tuple[LayerPlan, ...]:
    """Layers in the order of their first tensor; what a module keeps goes with its weight."""
    shared = {t.spec.module: w.shared for t in planned for w in t.weights if w.shared}
    layers: dict[str, LayerPlan] = {}
    for tensor in planned:
        for weight in tensor.weights:
            _layer(layers, _layer_name(tensor, weight)).weights.append(weight)
        if not tensor.weights:
            module = tensor.spec.module
            name = shared.get(module) or module or tensor.spec.name
            _layer(layers, name).kept.append(tensor)
    return tuple(layers.values())


def take_turns(groups: Iterable[Sequence[Task]], at_once: int) -> Iterator[Task]:
    """One of each of `at_once` groups in turn; where a group ends, the next one takes its place."""
    waiting = iter(groups)
    active = deque(map(iter, islice(waiting, at_once)))
    while active:
        tasks = active.popleft()
        task = next(tasks, None)
        if task is not None:
            active.append(tasks)
            yield task
        else:
            active.extend(map(iter, islice(waiting, 1)))


def tasks_of(layers: Iterable[LayerPlan], slab_bytes: int) -> Iterator[Task]:
    """One layer each; small ones that follow each other together, up to a few slabs."""
    together: list[LayerPlan] = []
    size = 0
    for layer in layers:
        alone = layer.shares_scale
        full = size + layer.nbytes > _SLABS_A_TASK * slab_bytes or len(together) == _LAYERS_A_TASK
        if together and (alone or full):
            yield Task(tuple(together))
            together, size = [], 0
        together.append(layer)
        size += layer.nbytes
        if alone:
            yield Task(tuple(together))
            together, size = [], 0
    if together:
        yield Task(tuple(together))


def _layer(layers: dict[str, LayerPlan], name: str) -> LayerPlan:
    layer = layers.get(name)
    if layer is None:
        layer = layers[name] = LayerPlan(len(layers), name, [], [])
    return layer


def _layer_name(tensor: TensorPlan, weight: WeightPlan) -> str:
    if weight.shared:
        return weight.shared
    return weight.name if tensor.known.stacked else tensor.spec.module or tensor.spec.name


def _modules_of(planned: Sequence[TensorPlan]) -> Iterator[list[TensorPlan]]:
    """Tensors that follow each other and belong to one module, together."""
    together: list[TensorPlan] = []
    module = None
    for tensor in planned:
        owner = tensor.spec.module
        if owner != module and together:
            yield together
            together = []
        module = owner
        together.append(tensor)
    if together:
        yield together


def _check_unique(kinds: Sequence[Kind], scheme: Scheme) -> None:
    """Refuses a name that an output would have and another tensor has already."""
    stacked = [kind for kind in kinds if kind.treatment.count and kind.treatment.known.stacked]
    members = [spec.name for kind in kinds for spec in kind.members]
    # Only such a name can be that of a linear layer's scales, and no two of those are the same.
    like_scales = {name for name in members if name.endswith(scheme.scale_suffix)}
    taken = set(members) if stacked else like_scales
    for kind in kinds if like_scales else stacked:
        for spec in kind.members if kind.treatment.count else ():
            for name in kind.treatment.names(spec):
                if name != spec.name and name in taken:
                    raise SchemeError(
                        f"tensor {name!r}: there is one already where an output of {spec.name} "
                        "would stand; keep that one with --ignore"
                    )
                taken.add(name)


def _plan_workspace(kinds: Sequence[Kind], resources: Resources) -> Workspace:
    weights = [kind.treatment.weights(kind.first)[0] for kind in kinds if kind.treatment.count]
    layers = sum(kind.treatment.count * len(kind.members) for kind in kinds)
    demand = demand_of(weights, layers)
    return plan_workspace(demand, resources.memory_budget, resources.threads, resources.gpus)


def demand_of(weights: Sequence[WeightPlan], layers: int) -> SlabDemand:
    """What `layers` layers like `weights` ask of a worker's buffers."""
    if not weights:
        return SlabDemand()
    return SlabDemand(
        row_bytes=max(weight.row_bytes * weight.row_multiple for weight in weights),
        row_elements=max(weight.shape[1] for weight in weights),
        itemsize=min(weight.spec.itemsize for weight in weights),
        layers=layers,
    )


def modules_of(tensors: Iterable[TensorPlan], tied: bool) -> Modules:
    """What engines take for linear layers, and the granularity of each.

    In the order of the tensors, so that config.json does not depend on how patterns were put.
    Raises SchemeError where experts that engines take for one are not treated alike.
    """
    modules = Modules()
    if tied:
        # In no file, but a module of the model: it must be named all the same.
        modules.linear["lm_head"] = None
    holder = ""
    for tensor in tensors:
        spec, known, granularity = tensor.spec, tensor.known, tensor.granularity
        if not known.linear_like:
            continue
        if known.role is Role.EXPERT and not (holder and spec.name.startswith(holder)):
            holder = f"{expert_module(spec.name)}."
        # Under another name engines would not know them for experts.
        if known.role is Role.EXPERT and (holder.endswith("experts.") or known.stacked):
            modules.add_experts(holder.removesuffix("."), granularity)
        else:
            modules.linear[spec.module] = granularity
    return modules
