"""Where every element of a checkpoint goes in a model, and under which names it would be saved.

The user's mapping says it first, then transformers' own conversion mapping, then equal names, and
last those that engines have for the matrices of one expert. What is tied needs to come once, and
whatever does not come is named.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from fp8stream.conversions import Library, Saved, as_it_is, convert_in, convert_out, either
from fp8stream.errors import CheckpointError, SchemeError
from fp8stream.filled import Composed, Findings, Missing, gaps
from fp8stream.fused_experts import ExpertsForm, experts_of
from fp8stream.places import Place, Region, Shape, cut, region_text, whole

IndexItem = int | slice | str
Index = IndexItem | tuple[IndexItem, ...]


@dataclass(frozen=True)
class Part:
    r"""Where a checkpoint tensor goes, or the part `source_index` of it: to `target[index]`.

    `target` is the name of a parameter or buffer. In it and in the indices `\1` stands for what the
    first group of the pattern found. `transpose` swaps the last two axes of what was taken from the
    source.
    """

    target: str
    index: Index = ()
    source_index: Index = ()
    transpose: bool = False


Rule = str | Part | Sequence[str | Part] | None


@dataclass(frozen=True)
class Placement:
    """Where a checkpoint's tensors go.

    `places` and `composed` fill every element of every persistent parameter and buffer exactly
    once, but for `missing`, and for `optional`, which the model says it can do without. Of tensors
    that are tied, one name is filled: `ties` leads from the others to it. `duplicates` fill it
    again and should hold the same values. Names that find nothing in the model are `unexpected`,
    `ignored` where the model or the mapping says so, and `stranded` where they are of no use
    without others that are not there. `unused` are keys of the mapping that match no name, and
    `leftover` parts of checkpoint tensors that it sends nowhere.
    `conversions` is what transformers keeps as `model._weight_conversions`, to save under the names
    that were loaded.
    """

    places: tuple[Place, ...]
    composed: tuple[Composed, ...]
    ties: Mapping[str, str]
    duplicates: tuple[Place, ...]
    missing: tuple[Missing, ...]
    optional: tuple[str, ...]
    unexpected: tuple[str, ...]
    ignored: tuple[str, ...]
    stranded: tuple[str, ...]
    unused: tuple[str, ...]
    leftover: tuple[Missing, ...]
    conversions: tuple[Any, ...]

    @cached_property
    def by_source(self) -> Mapping[str, Sequence[Place]]:
        """The places of each checkpoint tensor."""
        return _grouped(self.places, lambda place: place.source)

    @property
    def filled(self) -> frozenset[str]:
        """The tensors of the model that all comes for."""
        composed = (self.ties.get(n, n) for one in self.composed for n in one.targets)
        partly = {*self.optional, *(gap.target for gap in self.missing)}
        return frozenset({*self.by_target, *composed} - partly)

    @cached_property
    def by_target(self) -> Mapping[str, Sequence[Place]]:
        """The places in each tensor of the model."""
        return dict(_by_target(self.places))


def find_places(
    model: nn.Module,
    tensors: Iterable[tuple[str, Sequence[int]]],
    mapping: Mapping[str, Rule] | None = None,
    targets: Mapping[str, Tensor] | None = None,
) -> Placement:
    r"""Where the checkpoint `tensors`, by name and shape, go in `model`, which may be on meta.

    `targets` are the tensors to fill; by default the model's, as `model_tensors` gives them.

    `mapping` says it where names are not enough: from a tensor's name, or `re:` and a regular
    expression that the whole name must match, to where it goes. That is the name of one of the
    model's tensors, a `Part`, several of them, or None for a tensor that is left out on purpose.
    Names that it does not match find their places as if there were none. A fused projection, fed by
    three tensors, and the other way round:

        {r"re:(.+)\.q_proj\.weight": Part(r"\1.qkv.weight", slice(0, 64)),
         r"re:(.+)\.k_proj\.weight": Part(r"\1.qkv.weight", slice(64, 96)),
         r"re:(.+)\.v_proj\.weight": Part(r"\1.qkv.weight", slice(96, 128))}

        {r"re:(.+)\.qkv\.weight": [Part(r"\1.q_proj.weight", source_index=slice(0, 64)),
                                   Part(r"\1.k_proj.weight", source_index=slice(64, 96)),
                                   Part(r"\1.v_proj.weight", source_index=slice(96, 128))]}

    Experts of 32 rows, to one tensor [experts, gate and up, in], and the other way round:

        {r"re:(.+)\.(\d+)\.gate\.weight": Part(r"\1.gate_up", (r"\2", slice(0, 32))),
         r"re:(.+)\.(\d+)\.up\.weight": Part(r"\1.gate_up", (r"\2", slice(32, 64)))}

        {r"re:(.+)\.gate_up": [Part(rf"\1.{n}.{name}.weight", source_index=(n, rows))
                               for n in range(8)
                               for name, rows in [("gate", slice(0, 32)), ("up", slice(32, 64))]]}

    Raises CheckpointError where shapes do not fit, a name comes twice or two tensors fill the same
    elements; SchemeError for a mapping that cannot be followed; Fp8StreamError where transformers
    lacks what is needed.
    """
    wanted = model_tensors(model) if targets is None else targets
    shapes = _unique(tensors)
    rules = [_Rule(key, rule) for key, rule in (mapping or {}).items()]
    found = _Search(model, {name: tuple(tensor.shape) for name, tensor in wanted.items()})
    rest = {name: shape for name, shape in shapes.items() if not _follow(found, rules, name, shape)}
    conversions = _by_name(found, model, rest)
    found.check_shapes()
    ties = _ties(model, wanted)
    places, duplicates = _once(found, ties)
    missing, optional = _missing(model, found.missing(places, ties))
    return Placement(
        places=tuple(places),
        composed=tuple(found.composed),
        ties=ties,
        duplicates=tuple(duplicates),
        missing=missing,
        optional=optional,
        unexpected=tuple(found.unexpected),
        ignored=tuple(found.ignored),
        stranded=tuple(found.stranded),
        unused=tuple(rule.key for rule in rules if not rule.matched),
        leftover=tuple(found.leftover),
        conversions=conversions,
    )


def _missing(
    model: nn.Module, lacking: Iterable[Missing]
) -> tuple[tuple[Missing, ...], tuple[str, ...]]:
    """What of what lacks the model needs, and what it says it can do without."""
    known = either(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    every = tuple(lacking)
    optional = dict.fromkeys(gap.target for gap in every if known and known.search(gap.target))
    return tuple(gap for gap in every if gap.target not in optional), tuple(optional)


def what_came(
    model: nn.Module, placement: Placement, came: Container[str], shapes: Mapping[str, Shape]
) -> Placement:
    """What is left of a placement in the model's tensors, of these `shapes`, where not all of the
    checkpoint's `came`."""
    places = tuple(place for place in placement.places if place.source in came)
    composed = tuple(c for c in placement.composed if all(name in came for name in c.sources))
    lost = {place.target for place in placement.places if place.source not in came}
    lost |= {name for c in placement.composed if c not in composed for name in c.targets}
    filled = {target: [(p.region, p.source) for p in of] for target, of in _by_target(places)}
    lacking = (
        gap for name in sorted(lost) for gap in gaps(name, shapes[name], filled.get(name, ()))
    )
    missing, optional = _missing(model, lacking)
    return replace(
        placement,
        places=places,
        composed=composed,
        missing=(*placement.missing, *missing),
        optional=(*placement.optional, *optional),
    )


def checkpoint_names(model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> list[Saved]:
    """What saving `model` writes: for a model of transformers, what its `save_pretrained` does.

    `tensors` are those to save; by default the model's, as `model_tensors` gives them. Of tied ones
    the name is kept that transformers keeps. Raises Fp8StreamError where transformers lacks what is
    needed.
    """
    own = model_tensors(model) if tensors is None else tensors
    kept = _kept(model, own)
    library = Library.of(model)
    if library is None:
        return [as_it_is(name, tensor) for name, tensor in kept.items()]
    return convert_out(library, kept, own)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every persistent parameter and buffer under each of its names."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        at = f"{path}." if path else ""
        own = {**module._parameters, **module._buffers}
        for name, tensor in own.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                found[at + name] = tensor
    return found


_EXPERT = re.compile(r"(?:.+\.)?(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


class _Search(Findings):
    """Findings that know the matrices of one expert, where the model has all experts in one tensor.

    Engines call them so whatever the architecture, and transformers does not know of it where its
    own checkpoints are fused.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, Shape]) -> None:
        super().__init__(targets)
        self._model = model

    @cached_property
    def _experts(self) -> Mapping[str, ExpertsForm]:
        return experts_of(self._model)

    def same(self, name: str, target: str, shape: Shape) -> None:
        """Places all of `name` in `target`, or, if there is none, where that is part of."""
        part = None if target in self.targets else self._part(name, target)
        if part is None:
            super().same(name, target, shape)
            return
        try:
            self.places += _placed(name, shape, part, self.targets[part.target])
        except ValueError as error:
            self.problems.append(f"{name} for {part.target}: {error}")

    def _part(self, name: str, target: str) -> Part | None:
        """Where the matrix of one expert goes; None for any other tensor.

        `target` says which module is meant, but transformers may have renamed the matrix after
        those of a dense layer, so that is told by `name`.
        """
        match = _EXPERT.fullmatch(name)
        if match is None:
            return None
        called = self._modules(".".join(target.split(".")[:-3]))
        module = next((module for module in called if module in self._experts), None)
        if module is None:
            return None
        form = self._experts[module]
        taken = form.taken(int(match[1]), match[2])
        if taken is None:
            return None
        parameter, index = taken
        filled = f"{module}.{parameter}" if module else parameter
        return Part(filled, index, transpose=form.transposed)

    def _modules(self, name: str) -> tuple[str, ...]:
        """What a module may be called here: checkpoints come of models with a head and without."""
        prefix = f"{getattr(self._model, 'base_model_prefix', '')}."
        return name, f"{prefix}{name}", name.removeprefix(prefix)


class _Rule:
    """An entry of the mapping."""

    def __init__(self, key: str, rule: Rule) -> None:
        self.key, self.matched = key, False
        try:
            self._pattern = re.compile(key[3:] if key.startswith("re:") else re.escape(key))
        except re.error as error:
            raise SchemeError(f"mapping: {key}: not a regular expression: {error}") from None
        parts = [] if rule is None else [rule] if isinstance(rule, str | Part) else rule
        self._parts = [Part(part) if isinstance(part, str) else part for part in parts]

    def parts(self, name: str) -> list[Part] | None:
        """Where `name` goes, groups filled in; None where the entry is not about it."""
        match = self._pattern.fullmatch(name)
        if match is None:
            return None
        self.matched = True
        return [self._filled(part, match) for part in self._parts]

    def _filled(self, part: Part, match: re.Match[str]) -> Part:
        try:
            return Part(
                match.expand(part.target),
                _indices(part.index, match),
                _indices(part.source_index, match),
                part.transpose,
            )
        except (re.error, IndexError, ValueError) as error:
            raise SchemeError(f"mapping: {self.key}: {match[0]}: {error}") from None


def _follow(found: Findings, rules: Sequence[_Rule], name: str, shape: Shape) -> bool:
    """Places `name` as the mapping says; whether it says anything."""
    said = [parts for rule in rules if (parts := rule.parts(name)) is not None]
    for part in (part for parts in said for part in parts):
        if part.target not in found.targets:
            raise SchemeError(f"mapping: {name}: the model has no {part.target}")
        try:
            found.places += _placed(name, shape, part, found.targets[part.target])
        except ValueError as error:
            raise SchemeError(f"mapping: {name} to {part.target}: {error}") from None
    taken = [(_taken(shape, part.source_index), name) for parts in said for part in parts]
    if taken:
        found.leftover += gaps(name, shape, taken, once=False)
    elif said:
        found.ignored.append(name)
    return bool(said)


def _by_name(found: Findings, model: nn.Module, shapes: Mapping[str, Shape]) -> tuple[Any, ...]:
    """Places tensors as transformers would, for its models; the conversions that it took."""
    library = Library.of(model)
    if library is not None:
        return convert_in(library, found, shapes)
    for name, shape in shapes.items():
        found.same(name, name, shape)
    return ()


def _indices(index: Index, match: re.Match[str]) -> tuple[int | slice, ...]:
    def number(item: Any) -> Any:
        return int(match.expand(item)) if isinstance(item, str) else item

    def filled(item: IndexItem) -> int | slice:
        if isinstance(item, slice):
            return slice(number(item.start), number(item.stop), number(item.step))
        return int(number(item))

    return tuple(map(filled, index if isinstance(index, tuple) else (index,)))


def _placed(name: str, shape: Shape, part: Part, target_shape: Shape) -> list[Place]:
    """The places of a part of `name`. Raises ValueError where it does not fit."""
    taken, region = _taken(shape, part.source_index), _taken(target_shape, part.index)
    pieces = whole(name, shape)
    for axis, window in enumerate(taken):
        pieces = cut(pieces, axis, window)
    source, target = _kept_axes(taken, part.source_index), _kept_axes(region, part.index)
    if part.transpose:
        source = [*source[:-2], *source[-1:], *source[-2:-1]]
    found = tuple(len(taken[axis]) for axis in source)
    expected = tuple(len(region[axis]) for axis in target)
    if found != expected:
        raise ValueError(f"expected {expected}, found {found}")
    places = []
    for piece in pieces:
        steps = dict(zip(target, (piece.steps[axis] for axis in source), strict=True))
        filled = tuple(steps.get(axis, 0) for axis in range(len(region)))
        places.append(Place(name, part.target, target_shape, region, piece.first, filled))
    return places


def _taken(shape: Shape, index: Index) -> Region:
    """The region of a tensor that `index` takes, an axis that an integer takes with one element."""
    items = index if isinstance(index, tuple) else (index,)
    if len(items) > len(shape):
        raise ValueError(f"{len(items)} indices, but {len(shape)} axes")
    return tuple(
        _range(side, item)
        for side, item in zip(
            shape, (*items, *[slice(None)] * (len(shape) - len(items))), strict=True
        )
    )


def _range(side: int, item: IndexItem) -> range:
    if isinstance(item, slice):
        taken = range(*item.indices(side))
        beyond = item.stop is not None and item.stop > side
        if beyond or not taken or taken.step < 0:
            raise ValueError(f"{region_text((item,))} is no part of an axis of {side}")
        return taken
    at = int(item)
    if not -side <= at < side:
        raise ValueError(f"{at} is no index of an axis of {side}")
    return range(at % side, at % side + 1)


def _kept_axes(region: Region, index: Index) -> list[int]:
    """The axes that an index leaves: those that no integer takes."""
    items = index if isinstance(index, tuple) else (index,)
    gone = {axis for axis, item in enumerate(items) if not isinstance(item, slice)}
    return [axis for axis in range(len(region)) if axis not in gone]


def _once(found: Findings, ties: Mapping[str, str]) -> tuple[list[Place], list[Place]]:
    """Of the names of a tied tensor one is filled, that which most comes for; the others again."""
    coming: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    filled = [(place.target, place.elements) for place in found.places]
    filled += [(name, math.prod(s)) for one in found.composed for name, s in one.targets.items()]
    for name, elements in filled:
        coming[ties.get(name, name)][name] += elements
    most = {name: max(of, key=lambda n: (of[n], n == name)) for name, of in coming.items()}
    first: list[Place] = []
    again: list[Place] = []
    for place in found.places:
        name = ties.get(place.target, place.target)
        moved = place if name == place.target else replace(place, target=name)
        (first if most[name] == place.target else again).append(moved)
    return first, again


def _ties(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """From each further name of a tensor to the one that is filled."""
    known = dict(getattr(model, "all_tied_weights_keys", None) or {})
    ties = {a: b for a, b in known.items() if a in tensors and b in tensors and a != b}
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        if name not in ties and first.setdefault(id(tensor), name) != name:
            ties[name] = first[id(tensor)]
    for name in ties:
        seen = {name}
        while ties[name] in ties and ties[name] not in seen:
            seen.add(ties[name])
            ties[name] = ties[ties[name]]
    return ties


def _kept(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors to save: those that are tied once, as transformers does."""
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    names = [name for name in tensors if name not in left_out]
    ties = _ties(model, tensors)
    shared: dict[str, list[str]] = defaultdict(list)
    for name in names:
        shared[ties.get(name, name)].append(name)
    patterns = _tied_patterns(model)
    gone: set[str] = set()
    for group in shared.values():
        if len(group) > 1:
            known = [n for n in sorted(group) if any(re.search(p, n) for p in patterns)]
            gone.update(known[: len(group) - 1])
            gone.update([name for name in group if name not in gone][1:])
    return {name: tensors[name] for name in names if name not in gone}


def _tied_patterns(model: nn.Module) -> list[str]:
    return [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in getattr(module, "_tied_weights_keys", None) or ()
    ]


def _unique(tensors: Iterable[tuple[str, Sequence[int]]]) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for name, shape in tensors:
        if name in shapes:
            raise CheckpointError(f"{name}: comes twice in the checkpoint")
        shapes[name] = tuple(shape)
    return shapes


def _by_target(places: Iterable[Place]) -> Iterable[tuple[str, Sequence[Place]]]:
    return _grouped(places, lambda place: place.target).items()


def _grouped(places: Iterable[Place], key: Callable[[Place], str]) -> Mapping[str, Sequence[Place]]:
    groups: dict[str, list[Place]] = defaultdict(list)
    for place in places:
        groups[key(place)].append(place)
    return dict(groups)
