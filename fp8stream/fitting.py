"""What of a checkpoint becomes which FP8 weight of a live model, and in which pieces.

The converter's plan says what is quantized, the placement where everything goes. A module becomes
FP8 if all that feeds it is quantized alike and its own matrices come in whole rows. Pure.
"""

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from fp8stream.coded import Coded, CodedRows, can_be, common, scales_of
from fp8stream.errors import CheckpointError, SchemeError, listed
from fp8stream.filled import Composed
from fp8stream.mapping import Placement
from fp8stream.pieces import Piece, Weight, pieces_of, weight_plan
from fp8stream.places import Place
from fp8stream.plan import Decisions, LayerPlan, TensorPlan
from fp8stream.roles import SOURCE_DTYPES, Role, fused_set
from fp8stream.scheme import Granularity
from fp8stream.weights import Kept, WeightPlan

_LISTED = 3


@dataclass(frozen=True)
class Fit:
    """`layers` stream the checkpoint into the model, and what is `composed` has numbers of its own.

    What belongs together is a unit: `units` say it of each number, `modules` of each module of the
    model, and `tensors` of each unit what comes for it. `copied` says where a tensor goes that is
    not quantized. `quantized` are the modules that are FP8, and how.
    """

    layers: tuple[LayerPlan, ...]
    composed: tuple[tuple[int, Composed], ...]
    units: Mapping[int, str]
    modules: Mapping[str, str]
    tensors: Mapping[str, frozenset[str]]
    copied: Mapping[str, Sequence[Place]]
    quantized: Mapping[str, Granularity]
    warnings: tuple[str, ...]

    def without(self, units: Container[str]) -> "Fit":
        """The same without some units."""
        return replace(
            self,
            layers=tuple(one for one in self.layers if self.units[one.number] not in units),
            composed=tuple(one for one in self.composed if self.units[one[0]] not in units),
            units={number: unit for number, unit in self.units.items() if unit not in units},
            tensors={unit: names for unit, names in self.tensors.items() if unit not in units},
        )

    def unit(self, target: str) -> str:
        """The unit of a tensor of the model."""
        return self.modules.get(module_of(target), "")


def granularities(plan: Decisions, experts: bool) -> dict[str, Granularity]:
    """How each tensor of the checkpoint is quantized; those that are kept are not in it.

    With `experts`, also those that are kept only because no engine would load them.
    """
    found = {t.spec.name: t.granularity for t in plan.tensors if t.granularity}
    for tensor in plan.tensors if experts else ():
        floats = tensor.spec.dtype in SOURCE_DTYPES
        stacked = tensor.role is Role.EXPERT and tensor.known.stacked
        if stacked and floats and not tensor.known.asked:
            found.setdefault(tensor.spec.name, plan.scheme.expert_granularity)
    return found


class _Ready(NamedTuple):
    """A weight that can be FP8, and how all of it comes."""

    weight: Weight
    pieces: list[Piece]
    granularity: Granularity


@dataclass
class Fitting:
    """Fits the tensors of `plan`, quantized as `chosen`, to the model's `weights`.

    If modules are FP8 already, `fixed` says which and how, and no other will be. `coded` are those
    tensors that are FP8 already. A weight that does not come whole, or is tied to what cannot be
    FP8, stays as it is, and so does one that is `held_back`, for the reason that is given; `others`
    are tensors of modules that cannot be FP8, and why. Each of `together` names modules that change
    at once besides those that must.
    """

    plan: Decisions
    chosen: Mapping[str, Granularity]
    placement: Placement
    weights: Sequence[Weight]
    fixed: Mapping[str, Granularity] | None = None
    coded: Mapping[str, Coded] = field(default_factory=dict)
    held_back: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)
    together: Iterable[frozenset[str]] = ()

    def __post_init__(self) -> None:
        self._specs = {tensor.spec.name: tensor.spec for tensor in self.plan.tensors}
        self._fixed = self.fixed or {}
        self._warnings: list[str] = []

    def fit(self) -> Fit:
        """Raises SchemeError for codes that a module that is FP8 already cannot have, and
        CheckpointError for rows that it does not get whole."""
        ready = self._alike(self._ready())
        keys = ((t.spec.name, fused_set(t.spec.name, t.known)) for t in self.plan.tensors)
        sets = {name: key for name, key in keys if key}
        layers = _Layers(sets)
        for one in ready:
            layers.add(one)
        narrow = {one.weight.target for one in ready}
        narrow |= {weight.target for weight in self.weights if weight.module in self._fixed}
        copied: dict[str, list[Place]] = {}
        for tensor in self.plan.tensors:
            goes = self.placement.by_source.get(tensor.spec.name, ())
            if rest := [place for place in goes if place.target not in narrow]:
                layers.keep(tensor, rest)
                copied[tensor.spec.name] = rest
        for name in {name for _, names in self._composed() for name in names} & narrow:
            raise CheckpointError(
                f"{name}: is FP8, and the model computes it from what comes; begin with a new "
                "skeleton"
            )
        self._warn_of_others(copied)
        self._warn_of_numbers([name for name in copied if name in self.coded])
        units = _Joined(self.together)
        for places in self.placement.by_source.values():
            units.join({module_of(place.target) for place in places})
        made = layers.layers(units, copied, self._composed())
        modules = {one.weight.module: one.granularity for one in ready}
        return Fit(*made, copied, modules, tuple(self._warnings))

    def _composed(self) -> list[tuple[Composed, set[str]]]:
        """What is composed, and what it fills: of tied tensors the name that is filled."""
        ties = self.placement.ties
        return [(one, {ties.get(n, n) for n in one.targets}) for one in self.placement.composed]

    def _ready(self) -> list[_Ready]:
        unfit = {**_unfit(self.placement, self.weights), **self.held_back}
        found: list[_Ready] = []
        for weight in self.weights:
            places = self.placement.by_target.get(weight.target, ())
            if not places:
                continue
            if weight.target in unfit:
                # Rows of a weight that has codes would come under a scale that is not theirs.
                self._warnings.append(f"{weight.target} stays as it is: {unfit[weight.target]}")
                continue
            granularity, why = self._granularity(weight, places)
            pieces = self._pieces(weight, places, granularity) if granularity else None
            if granularity and pieces is not None:
                found.append(_Ready(weight, pieces, granularity))
            elif granularity or why:
                self._stays(weight, why or "it does not come in whole rows")
        return found

    def _stays(self, weight: Weight, why: str) -> None:
        if weight.module in self._fixed:
            raise CheckpointError(f"{weight.target}: is FP8, and cannot be filled: {why}")
        self._warnings.append(f"{weight.target} stays as it is: {why}")

    def _granularity(
        self, weight: Weight, places: Sequence[Place]
    ) -> tuple[Granularity | None, str]:
        """How the weight will be quantized; None where it will not be, and why, if unexpected."""
        fixed, sources = self._fixed.get(weight.module), {place.source for place in places}
        if self.fixed is not None and fixed is None:
            return None, ""
        if sources & self.coded.keys():
            return self._of_codes(weight, places, fixed)
        other = {self._specs[name].dtype for name in sources} - {*SOURCE_DTYPES}
        if fixed and other:
            return None, f"it comes in {other.pop()}, expected {', '.join(SOURCE_DTYPES)}"
        found = {self.chosen.get(name) for name in sources}
        if fixed or len(found) == 1:
            return fixed or found.pop(), ""
        return None, "not all that feeds it is quantized alike"

    def _of_codes(
        self, weight: Weight, places: Sequence[Place], fixed: Granularity | None
    ) -> tuple[Granularity | None, str]:
        if not all(self.coded.get(place.source) for place in places):
            return None, "part of it comes as FP8 codes, and part does not"
        if fixed is None and not all(place.source in self.chosen for place in places):
            return None, ""
        pieces = self._pieces(weight, places, Granularity.CHANNEL)
        if pieces is None:
            return None, "its codes do not come in whole rows"
        by_matrix: dict[int, list[CodedRows]] = defaultdict(list)
        for piece in pieces:
            rows = CodedRows(self.coded[piece.spec.name], piece.source, piece.rows)
            by_matrix[piece.expert].append(rows)
        found = common(map(scales_of, by_matrix.values()))
        if fixed is None:
            return found, "" if found else "the scales of its codes cannot be put together"
        if not all(can_be(rows, fixed) for rows in by_matrix.values()):
            of = found.value if found else "mixed"
            raise SchemeError(
                f"{weight.target}: comes as FP8 codes with {of} scales, and has {fixed.value} "
                "scales in the model; load it into a new skeleton, or give it in 16 bit"
            )
        return fixed, ""

    def _pieces(
        self, weight: Weight, places: Sequence[Place], granularity: Granularity
    ) -> list[Piece] | None:
        return pieces_of(weight, places, self._specs, granularity)

    def _alike(self, ready: Sequence[_Ready]) -> list[_Ready]:
        """Those of modules all of whose weights are ready, and alike."""
        kinds: dict[str, set[Granularity | None]] = defaultdict(set)
        known = {one.weight.target: one for one in ready}
        for weight in self.weights:
            one = known.get(weight.target)
            kinds[weight.module].add(one.granularity if one else None)
        if self.fixed is not None:
            return list(ready)
        shared = {module: common(found) for module, found in kinds.items()}
        alike = [(one, shared[one.weight.module]) for one in ready]
        for one, granularity in alike:
            if granularity is None:
                self._stays(one.weight, "not all weights of its module are quantized alike")
        return [one._replace(granularity=granularity) for one, granularity in alike if granularity]

    def _warn_of_others(self, copied: Mapping[str, Sequence[Place]]) -> None:
        """Of what would be quantized, if only its module were another."""
        targets = {p.target for name, of in copied.items() if name in self.chosen for p in of}
        why: dict[str, list[str]] = defaultdict(list)
        for name in sorted(targets & self.others.keys()):
            why[self.others[name]].append(name)
        for reason, names in why.items():
            self._warnings.append(f"{listed(names, _LISTED)}: not quantized, {reason}")

    def _warn_of_numbers(self, names: Sequence[str]) -> None:
        if names:
            self._warnings.append(f"{listed(names, _LISTED)}: from FP8 codes back to numbers")


def module_of(target: str) -> str:
    """The module of a tensor of the model; of one that is the model's own, the tensor."""
    return target.rpartition(".")[0] or target


class _Joined:
    """Names that belong together: each such set is called by its first."""

    def __init__(self, sets: Iterable[Iterable[str]] = ()) -> None:
        self._first: dict[str, str] = {}
        for names in sets:
            self.join(names)

    def join(self, names: Iterable[str]) -> None:
        first, *others = sorted({self.of(name) for name in names})
        self._first |= dict.fromkeys(others, first)

    def names(self) -> dict[str, str]:
        """What the set of every name is called."""
        return {name: self.of(name) for name in self._first}

    def of(self, name: str) -> str:
        """What the set of a name is called."""
        first = self._first.setdefault(name, name)
        while first != self._first[first]:
            first = self._first[name] = self._first[first]
        return first


def _unfit(placement: Placement, weights: Sequence[Weight]) -> dict[str, str]:
    """The weights that cannot be FP8, whatever comes for them, and why."""
    linear = {weight.target for weight in weights if not weight.experts}
    partial = (*(gap.target for gap in placement.missing), *placement.optional)
    why = dict.fromkeys(partial, "not all of it comes")
    for name, filled in placement.ties.items():
        if not {name, filled} <= linear:
            why[filled] = f"it is tied to {name}"
    return why


class _Layers:
    """Gathers layers: pieces that share a tensor scale in one, each other piece in its own.

    One scale is for all of an expert's matrix, or of a linear layer's, and for all that comes from
    one tensor, or from those of a fused set.
    """

    def __init__(self, sets: Mapping[str, str]) -> None:
        self._sets = sets
        self._shared = _Joined()
        self._pieces: list[tuple[str, _Ready, Piece]] = []
        self._weights: dict[str, list[WeightPlan]] = defaultdict(list)
        self._kept: dict[str, list[TensorPlan]] = defaultdict(list)

    def add(self, one: _Ready) -> None:
        """A weight, with all others' that shares its scales still to come."""
        for piece in one.pieces:
            key = f"{one.weight.target}[{piece.expert}]"
            if not one.weight.experts:
                source = piece.spec.name
                self._shared.join([key, f"from {self._sets.get(source, source)}"])
            self._pieces.append((key, one, piece))

    def _plan(self) -> None:
        for key, one, piece in self._pieces:
            shared = self._shared.of(key) if one.granularity is Granularity.TENSOR else None
            plan = weight_plan(one.weight, piece, one.granularity, shared)
            name = shared or f"{plan.name}+{piece.expert}.{piece.part}.{piece.first}"
            self._weights[name].append(plan)

    def keep(self, tensor: TensorPlan, goes: Sequence[Place]) -> None:
        """A tensor that is kept, with the first module that it goes to."""
        self._kept[module_of(goes[0].target)].append(TensorPlan(tensor.spec, Kept(tensor.known)))

    def layers(
        self,
        units: _Joined,
        copied: Mapping[str, Sequence[Place]],
        composed: Sequence[tuple[Composed, set[str]]],
    ) -> tuple[
        tuple[LayerPlan, ...],
        tuple[tuple[int, Composed], ...],
        Mapping[int, str],
        Mapping[str, str],
        Mapping[str, frozenset[str]],
    ]:
        """Layers, those of one unit after each other, what is composed with the numbers after
        theirs, the units of numbers and modules, and what units
        hold."""
        self._plan()
        fills = {name: self._targets(name, copied) for name in (*self._kept, *self._weights)}
        every = [*fills.values(), *(targets for _, targets in composed)]
        for targets in every:
            units.join(map(module_of, targets))
        unit = [units.of(module_of(min(targets))) for targets in every]
        of = dict(zip(fills, unit, strict=False))
        names = sorted(fills, key=lambda name: of[name])
        layers = [
            LayerPlan(number, min(map(module_of, fills[name])), self._weights.get(name, []), kept)
            for number, name in enumerate(names)
            for kept in [self._kept.get(name, [])]
        ]
        numbered = dict(enumerate([*(of[name] for name in names), *unit[len(fills) :]]))
        holds: dict[str, set[str]] = defaultdict(set)
        for name, targets in zip(unit, every, strict=True):
            holds[name] |= targets
        made = enumerate((one for one, _ in composed), len(fills))
        tensors = {unit: frozenset(targets) for unit, targets in holds.items()}
        return tuple(layers), tuple(made), numbered, units.names(), tensors

    def _targets(self, name: str, copied: Mapping[str, Sequence[Place]]) -> set[str]:
        """What a layer fills of the model."""
        kept = (p.target for t in self._kept.get(name, ()) for p in copied[t.spec.name])
        weights = self._weights.get(name, ())
        return {*kept, *(t.name for w in weights for t in (w.codes, w.scales))}
