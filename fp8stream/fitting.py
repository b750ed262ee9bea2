"""What of a checkpoint becomes which FP8 weight of a live model, and in which pieces.

The converter's plan says what is quantized, the placement where everything goes. A module becomes
FP8 if all that feeds it is quantized alike and its own matrices come in whole rows; a piece is then
a run of rows of one matrix, with a place for its codes and one for its scales, so that the layers
made here stream as any others do. Pure.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fp8stream.header import TensorSpec
from fp8stream.layout import OutputTensor
from fp8stream.mapping import Placement
from fp8stream.places import Place
from fp8stream.plan import Decisions, LayerPlan, TensorPlan
from fp8stream.roles import Role
from fp8stream.scheme import BLOCK, CODE_DTYPE, SCALE_DTYPE, Granularity
from fp8stream.views import View
from fp8stream.weights import Kept, WeightPlan


@dataclass(frozen=True)
class Weight:
    """A weight of the model that can be FP8: one matrix [out, in], or one for each of `experts`.

    `parts` are the matrices that share its rows, as gate and up do, in halves or `interleaved`;
    `transposed` says that the model's own parameter is [in, out].
    """

    module: str
    parameter: str
    scale: str
    shape: tuple[int, int]
    experts: int = 0
    parts: int = 1
    interleaved: bool = False
    transposed: bool = False

    @property
    def target(self) -> str:
        """The name of the parameter that the model has for it."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    def codes(self) -> OutputTensor:
        """The tensor of codes: matrices are [out, in], whatever they were."""
        shape = (self.experts, *self.shape) if self.experts else self.shape
        return OutputTensor(self.target, CODE_DTYPE, shape)

    def scales(self, granularity: Granularity) -> OutputTensor:
        """The tensor of scales; gate and up have blocks of their own, and one tensor scale."""
        grid = granularity.scale_shape((self.shape[0] // self.parts, self.shape[1]))
        rows = (grid[0] * self.parts, grid[1]) if len(grid) == 2 else grid
        name = f"{self.module}.{self.scale}" if self.module else self.scale
        return OutputTensor(name, SCALE_DTYPE, (self.experts, *rows) if self.experts else rows)


@dataclass(frozen=True)
class _Piece:
    """Rows of one part of one matrix, `first` and on, every `step`-th row of the matrix."""

    spec: TensorSpec
    expert: int
    part: int
    first: int
    rows: int
    source: View


@dataclass(frozen=True)
class Fit:
    """`layers` stream the checkpoint into the model; `units` say of each layer's number with which
    it belongs together, `tensors` of each such unit what it writes. `copied` says where a tensor
    goes that is not quantized. `quantized` are the modules that are FP8, and how."""

    layers: tuple[LayerPlan, ...]
    units: Mapping[int, str]
    tensors: Mapping[str, frozenset[str]]
    copied: Mapping[str, Sequence[Place]]
    quantized: Mapping[str, Granularity]
    warnings: tuple[str, ...]


def granularities(plan: Decisions, experts: bool) -> dict[str, Granularity]:
    """How each tensor of the checkpoint is quantized; those that are kept are not in it.

    With `experts`, also those that are kept only because no engine would load them.
    """
    found = {t.spec.name: t.granularity for t in plan.tensors if t.granularity}
    for tensor in plan.tensors if experts else ():
        asked = tensor.reason.startswith(("--ignore", "one expert set with"))
        floats = tensor.spec.dtype in ("BF16", "F16", "F32")
        if tensor.role is Role.EXPERT and tensor.known.stacked and floats and not asked:
            found.setdefault(tensor.spec.name, plan.scheme.expert_granularity)
    return found


def fit(
    plan: Decisions,
    chosen: Mapping[str, Granularity],
    placement: Placement,
    weights: Sequence[Weight],
    fixed: Mapping[str, Granularity],
) -> Fit:
    """Fits the tensors of `plan`, quantized as `chosen`, to the model's `weights`.

    If modules are FP8 already, `fixed` says how, and no other will be. A weight that does not come
    whole, or is tied to what cannot be FP8, stays as it is.
    """
    places = placement.by_target
    unfit = _unfit(placement, weights)
    specs = {tensor.spec.name: tensor.spec for tensor in plan.tensors}
    sets = {t.spec.name: w.shared for t in plan.tensors for w in t.weights if w.shared}
    warnings: list[str] = []
    ready: dict[str, tuple[Weight, list[_Piece], Granularity]] = {}
    for weight in weights:
        if weight.target in unfit and places.get(weight.target):
            warnings.append(f"{weight.target} stays as it is: {unfit[weight.target]}")
            continue
        if fixed:
            granularity = fixed.get(weight.module) if places.get(weight.target) else None
        else:
            granularity = _granularity(weight, places, chosen, warnings)
        if granularity is None:
            continue
        pieces = _pieces(weight, places[weight.target], specs, granularity)
        if pieces is None:
            warnings.append(f"{weight.target} stays as it is: it does not come in whole rows")
            continue
        ready[weight.target] = weight, pieces, granularity
    whole = {*fixed} or _whole_modules(weights, ready)
    modules = {ready[t][0].module: ready[t][2] for t in ready if ready[t][0].module in whole}
    gone = {t for t in ready if ready[t][0].module not in whole}
    builder = _Layers(sets)
    for target, (weight, pieces, granularity) in ready.items():
        if target not in gone:
            builder.add(weight, pieces, granularity)
    narrow = {t for t in ready if t not in gone} | {w.target for w in weights if w.module in fixed}
    copied: dict[str, list[Place]] = {}
    for tensor in plan.tensors:
        goes = [p for p in placement.by_source.get(tensor.spec.name, ()) if p.target not in narrow]
        if goes:
            builder.keep(tensor, goes)
            copied[tensor.spec.name] = goes
    layers, units = builder.layers()
    return Fit(layers, units, builder.tensors(), copied, modules, tuple(warnings))


def _unfit(placement: Placement, weights: Sequence[Weight]) -> dict[str, str]:
    """The weights that cannot be FP8, whatever comes for them, and why."""
    linear = {weight.target for weight in weights if not weight.experts}
    why = {gap.target: "not all of it comes" for gap in placement.missing}
    for name, filled in placement.ties.items():
        if not {name, filled} <= linear:
            why[filled] = f"it is tied to {name}"
    return why


def _granularity(
    weight: Weight,
    places: Mapping[str, Sequence[Place]],
    chosen: Mapping[str, Granularity],
    warnings: list[str],
) -> Granularity | None:
    """How all that feeds the weight is quantized; None where it is not, or not alike."""
    sources = {place.source for place in places.get(weight.target, ())}
    found = {chosen.get(name) for name in sources}
    if len(found) > 1:
        warnings.append(f"{weight.target} stays as it is: not all that feeds it is quantized alike")
    return found.pop() if len(found) == 1 else None


def _whole_modules(
    weights: Sequence[Weight], ready: Mapping[str, tuple[Weight, list[_Piece], Granularity]]
) -> set[str]:
    """The modules all of whose weights are ready, and alike."""
    kinds: dict[str, set[Granularity | None]] = defaultdict(set)
    for weight in weights:
        known = ready.get(weight.target)
        kinds[weight.module].add(known[2] if known else None)
    return {module for module, found in kinds.items() if len(found) == 1 and None not in found}


def _pieces(
    weight: Weight,
    places: Sequence[Place],
    specs: Mapping[str, TensorSpec],
    granularity: Granularity,
) -> list[_Piece] | None:
    """The weight's rows as they come; None where rows, or blocks of them, do not come whole."""
    pieces: list[_Piece] = []
    for place in places:
        found = _of_place(weight, place, specs[place.source])
        if found is None:
            return None
        pieces += found
    each = weight.shape[0] // weight.parts
    if granularity is Granularity.BLOCK:
        for piece in pieces:
            last = piece.first + piece.rows == each
            if piece.first % BLOCK or (piece.rows % BLOCK and not last):
                return None
    return pieces


def _of_place(weight: Weight, place: Place, spec: TensorSpec) -> list[_Piece] | None:
    row, column = (-1, -2) if weight.transposed else (-2, -1)
    columns, rows = place.region[column], place.region[row]
    if columns != range(weight.shape[1]):
        return None
    steps = place.steps
    leading = place.region[0] if weight.experts else range(1)
    found: list[_Piece] = []
    for number, expert in enumerate(leading):
        first = place.first + (number * steps[0] if weight.experts else 0)
        cut = _by_part(weight, rows)
        if cut is None:
            return None
        for part, begin, count, skipped, stride in cut:
            source = View(first + skipped * steps[row], stride * steps[row], steps[column])
            if source.column_step != 1 and source.row_step > source.column_step:
                return None
            found.append(_Piece(spec, expert, part, begin, count, source))
    return found


def _by_part(weight: Weight, rows: range) -> list[tuple[int, int, int, int, int]] | None:
    """For each part that `rows` of the weight hold: the part, its first row and how many, and
    which of `rows` are its: how many come before, and how far apart they lie."""
    parts, each = weight.parts, weight.shape[0] // weight.parts
    if parts == 1:
        return [(0, rows.start, len(rows), 0, 1)] if rows.step == 1 else None
    if weight.interleaved:
        if rows.step == parts:
            part = rows.start % parts
            return [(part, rows.start // parts, len(rows), 0, 1)]
        whole = rows.step == 1 and rows.start % parts == 0 and len(rows) % parts == 0
        count = len(rows) // parts
        cut = [(part, rows.start // parts, count, part, parts) for part in range(parts)]
        return cut if whole else None
    if rows.step != 1:
        return None
    found = []
    for part in range(parts):
        begin, end = max(rows.start, part * each), min(rows.stop, (part + 1) * each)
        if begin < end:
            found.append((part, begin - part * each, end - begin, begin - rows.start, 1))
    return found


class _Layers:
    """Gathers layers: pieces that share a tensor scale in one, each other piece in its own."""

    def __init__(self, sets: Mapping[str, str]) -> None:
        self._sets = sets
        self._weights: dict[str, list[WeightPlan]] = defaultdict(list)
        self._kept: dict[str, list[TensorPlan]] = defaultdict(list)
        self._units: dict[str, str] = {}
        self._tensors: dict[str, set[str]] = defaultdict(set)

    def add(self, weight: Weight, pieces: Sequence[_Piece], granularity: Granularity) -> None:
        shared = self._shared(weight, pieces)
        for piece in pieces:
            key = shared[piece.expert] if granularity is Granularity.TENSOR else None
            plan = _weight_plan(weight, piece, granularity, key)
            name = key or f"{plan.name}+{piece.expert}.{piece.part}.{piece.first}"
            self._weights[name].append(plan)
            # What shares a scale changes together, even over several modules.
            self._units[name] = weight.module if weight.experts else key or weight.module
            self._tensors[self._units[name]] |= {plan.codes.name, plan.scales.name}

    def _shared(self, weight: Weight, pieces: Sequence[_Piece]) -> dict[int, str]:
        """For each expert, the key of all that has its tensor scale."""
        keys: dict[int, str] = {}
        for piece in pieces:
            known = None if weight.experts else self._sets.get(piece.spec.name)
            keys.setdefault(piece.expert, known or f"{weight.target}[{piece.expert}]")
        return keys

    def keep(self, tensor: TensorPlan, goes: Sequence[Place]) -> None:
        """A tensor that is kept, with the module that it goes to."""
        module = goes[0].target.rpartition(".")[0] or goes[0].target
        self._tensors[module] |= {place.target for place in goes}
        self._kept[module].append(TensorPlan(tensor.spec, Kept(tensor.known)))
        self._units.setdefault(module, module)

    def tensors(self) -> dict[str, frozenset[str]]:
        """What each unit writes."""
        return {unit: frozenset(names) for unit, names in self._tensors.items()}

    def layers(self) -> tuple[tuple[LayerPlan, ...], dict[int, str]]:
        """Layers, those of one unit after each other, and the unit of each."""
        names = sorted({**self._kept, **self._weights}, key=lambda name: self._units[name])
        layers = [
            LayerPlan(number, name, self._weights.get(name, []), self._kept.get(name, []))
            for number, name in enumerate(names)
        ]
        return tuple(layers), {layer.number: self._units[layer.name] for layer in layers}


def _weight_plan(
    weight: Weight, piece: _Piece, granularity: Granularity, shared: str | None
) -> WeightPlan:
    rows, columns = weight.shape
    each, turns = rows // weight.parts, weight.interleaved
    begin = piece.expert * rows + (piece.part if turns else piece.part * each)
    step = weight.parts if turns else 1
    codes_at = View((begin + piece.first * step) * columns, step * columns)
    return WeightPlan(
        piece.spec,
        granularity,
        (piece.rows, columns),
        piece.source,
        weight.codes(),
        codes_at,
        weight.scales(granularity),
        _scales_at(weight, piece, granularity),
        shared,
    )


def _scales_at(weight: Weight, piece: _Piece, granularity: Granularity) -> View:
    """Where the piece's scales begin, and the step from one row of them to the next."""
    if granularity is Granularity.TENSOR:
        return View(piece.expert, 1)
    each = weight.shape[0] // weight.parts
    height, width = granularity.scale_shape((each, weight.shape[1]))
    turns, step = weight.interleaved, weight.parts if weight.interleaved else 1
    begin = piece.expert * height * weight.parts + (piece.part if turns else piece.part * height)
    first = piece.first // granularity.row_multiple
    return View((begin + first * step) * width, step * width)
