"""transformers' own knowledge of how its models are stored, in both directions.

Its renamings and converters are applied by its own code, in its own order, to names and to tensors
without data; nothing of them is written down here. What only moves elements becomes places, and
whatever computes is left to transformers, on the tensors themselves.
"""

import importlib
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fp8stream.errors import CheckpointError, Fp8StreamError
from fp8stream.filled import Composed, Findings
from fp8stream.places import Place, Shape, whole
from fp8stream.tracing import NotGeometryError, Traced, traced


@dataclass(frozen=True)
class Saved:
    """A tensor as it would be saved: `places` lead from the model's tensors into it.

    Where its values must be computed, there are none, and `composed` makes it.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    places: tuple[Place, ...]
    composed: Composed | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """The model's tensors that it is made of."""
        if self.composed:
            return self.composed.sources
        return tuple(dict.fromkeys(place.source for place in self.places))

    def values(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """It, on the host and contiguous, made of the model's `tensors`; nothing else is moved
        there. It may lie in their memory."""
        if self.composed:
            sources = {name: tensors[name].detach() for name in self.sources}
            return self.composed.convert(sources)[self.name].cpu().contiguous()
        if len(self.places) == 1 and self.places[0].whole:
            only = self.places[0].read(tensors[self.places[0].source].detach())
            return only.to(self.dtype).contiguous().cpu()
        made = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        for place in self.places:
            place.apply(made, tensors[place.source])
        return made


def as_it_is(name: str, tensor: Tensor) -> Saved:
    shape = tuple(tensor.shape)
    places = [piece.place(name, shape) for piece in whole(name, shape)]
    return Saved(name, shape, tensor.dtype, tuple(places))


class Library:
    """What is used of transformers, and the model as its conversions see it."""

    _NEEDED = (
        "WeightConverter",
        "WeightRenaming",
        "PrefixChange",
        "rename_source_key",
        "apply_renamings",
        "apply_converters",
        "dot_natural_key",
    )

    def __init__(self, model: Any, loading: Any, mapping: Any) -> None:
        self.model = model
        self.loading = loading
        self.mapping = mapping

    @classmethod
    def of(cls, model: nn.Module) -> "Library | None":
        """None where `model` is not one of transformers."""
        base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
        if base is None or not isinstance(model, base):
            return None
        try:
            loading = importlib.import_module("transformers.core_model_loading")
            mapping = importlib.import_module("transformers.conversion_mapping")
            for name in cls._NEEDED:
                getattr(loading, name)
            getattr(mapping, "get_model_conversion_mapping")  # noqa: B009
        except (ImportError, AttributeError) as error:
            version = getattr(sys.modules.get("transformers"), "__version__", "unknown")
            raise Fp8StreamError(
                f"transformers {version} cannot tell how {type(model).__name__} is stored "
                f"({error}): install transformers 5.23 or a later 5.x"
            ) from None
        return cls(model, loading, mapping)

    def run(
        self, converter: Any, key: str, members: Iterable[tuple[str, Tensor]], model: Any
    ) -> dict[str, Any]:
        """What `converter` makes of `members`, each a pattern and a tensor, in order."""
        fresh = deepcopy(converter)
        for pattern, tensor in members:
            fresh.add_tensor(key, key, pattern, tensor)
        made = fresh.convert(key, model=model, config=self.model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}


class _AsOfNow:
    """A model whose parameters have the shapes of the tensors that are asked about."""

    def __init__(self, model: Any, shapes: Mapping[str, Shape]) -> None:
        self._model, self._shapes = model, shapes

    def get_parameter(self, name: str) -> Tensor:
        """A tensor without data."""
        return torch.empty(self._shapes[name], device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _Direction:
    """Transforms of transformers, to a model or from one."""

    def __init__(
        self, library: Library, transforms: Sequence[Any], shapes: Mapping[str, Shape]
    ) -> None:
        loading = library.loading
        self.library = library
        self.renamings = [t for t in transforms if isinstance(t, loading.WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
        self._by_pattern = {p: c for c in self.converters for p in c.source_patterns}
        self._shapes = shapes
        self._model = _AsOfNow(library.model, shapes)

    def converter(self, pattern: str) -> Any:
        return self._by_pattern[pattern]

    def trace(self, key: str, members: Sequence["_Member"]) -> "dict[str, Traced] | Composed":
        """Where the elements of `members` go, by the names of what is made of them.

        Raises ValueError where they do not fit together.
        """
        converter = self.converter(members[0].pattern)
        tensors = [(member.pattern, member.traced()) for member in members]
        try:
            return self.library.run(converter, key, tensors, self._model)
        except NotGeometryError:
            return self._compose(converter, key, [m for m in members if m.name])
        except (RuntimeError, LookupError, AttributeError, TypeError) as error:
            raise ValueError(str(error)) from None

    def _compose(self, converter: Any, key: str, members: Sequence["_Member"]) -> Composed:
        library, model = self.library, self._model

        def run(tensor_of: Callable[[str], Tensor]) -> dict[str, Tensor]:
            tensors = ((member.pattern, tensor_of(member.name)) for member in members)
            return library.run(converter, key, tensors, model)

        shapes = {member.name: member.shape for member in members}
        try:
            made = run(lambda name: torch.empty(shapes[name], device="meta"))
        except Exception as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        targets = {name: tuple(tensor.shape) for name, tensor in made.items()}
        return Composed(tuple(shapes), targets, run)


class _Member(NamedTuple):
    """A tensor that goes through a converter, under which of its patterns; no name for a hole."""

    pattern: str
    name: str
    shape: Shape

    def traced(self) -> Traced:
        return traced(self.name, self.shape) if self.name else Traced(self.shape, [])


def convert_in(library: Library, search: Findings, shapes: Mapping[str, Shape]) -> tuple[Any, ...]:
    """Places the tensors of a checkpoint as `from_pretrained` would; the transforms it used."""
    loading, targets = library.loading, search.targets
    transforms = library.mapping.get_model_conversion_mapping(library.model)
    direction = _Direction(library, transforms, targets)
    renamings, converters = direction.renamings, direction.converters
    ignored = _ignored(library.model)
    prefix = library.model.base_model_prefix
    groups: dict[str, list[_Member]] = defaultdict(list)
    for name in sorted(shapes, key=loading.dot_natural_key):
        key, pattern = loading.rename_source_key(name, renamings, converters, prefix, targets)
        if key not in targets and name in targets:
            key, pattern = loading.rename_source_key(name, [], [], prefix, targets)
        if key not in targets and ignored is not None and ignored.search(key):
            search.ignored.append(name)
        elif key in targets and pattern is not None:
            groups[key].append(_Member(pattern, name, shapes[name]))
        else:
            search.same(name, key, shapes[name])
    for key, members in groups.items():
        _place_group(direction, search, key, members)
    return tuple(transform for transform in transforms if transform.was_used())


def _ignored(model: Any) -> re.Pattern[str] | None:
    """Names that `from_pretrained` passes over in silence when the model has no use for them."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return either(patterns)


def wider(model: nn.Module, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """The dtype that `from_pretrained` gives the tensor of a name in a model of `dtype`.

    Some are kept in float32, which a skeleton made in `dtype` does not show.
    """
    planned = getattr(model, "_get_dtype_plan", None)
    plan: Mapping[str, torch.dtype] = planned(dtype) if planned else {}
    rules = [(re.compile(key.replace("*", ".*")), wide) for key, wide in plan.items()]
    return lambda name: next((wide for rule, wide in rules if rule.search(name)), dtype)


def either(patterns: Iterable[str]) -> re.Pattern[str] | None:
    found = [f"({pattern})" for pattern in sorted(patterns)]
    return re.compile("|".join(found)) if found else None


def _place_group(direction: _Direction, search: Findings, key: str, members: list[_Member]) -> None:
    """Places tensors that one converter takes together; where some are not there, the others."""
    problem = _place_all(direction, search, key, members) if _numbered(direction, members) else "?"
    if not problem:
        return
    filled_up = _with_holes(direction, members, search.targets[key])
    if len(filled_up) == len(members):
        search.problems.append(f"{members[0].name} for {key}: {problem}")
    elif _place_all(direction, search, key, filled_up):
        search.stranded += [member.name for member in members]


def _place_all(
    direction: _Direction, search: Findings, key: str, members: Sequence[_Member]
) -> str:
    """Places `members`, or else says why they do not fit."""
    try:
        made = direction.trace(key, members)
    except ValueError as error:
        return str(error)
    problem = _misfit(made, search.targets)
    if not problem and isinstance(made, Composed):
        search.composed.append(made)
    elif not problem and not isinstance(made, Composed):
        for name, one in made.items():
            search.places += [piece.place(name, one.sides) for piece in one.pieces]
    return problem


def _misfit(made: dict[str, Traced] | Composed, targets: Mapping[str, Shape]) -> str:
    """What was made that is not as the model has it."""
    shapes = made.targets if isinstance(made, Composed) else {n: t.sides for n, t in made.items()}
    for name, shape in shapes.items():
        if name not in targets:
            return f"the model has no {name}"
        if shape != targets[name]:
            return f"expected {targets[name]}, found {shape}"
    return ""


def _numbered(direction: _Direction, members: Sequence[_Member]) -> bool:
    """Whether each list among `members`, which are in order, is numbered from 0 without a gap.

    transformers goes by the order alone: where a number is missing, the next would take its place.
    """
    lists: dict[str, list[_Member]] = defaultdict(list)
    for member in members:
        lists[member.pattern].append(member)
    return all(
        _number(direction, of_list[-1]) in (None, len(of_list) - 1) for of_list in lists.values()
    )


def _with_holes(direction: _Direction, members: Sequence[_Member], target: Shape) -> list[_Member]:
    """`members` with a hole for every tensor that is not there.

    Raises CheckpointError where two are the same number of a list.
    """
    patterns = direction.converter(members[0].pattern).source_patterns
    lists: dict[str, dict[int, _Member]] = {pattern: {} for pattern in patterns}
    for at, member in enumerate(members):
        number = _number(direction, member)
        other = lists[member.pattern].setdefault(at if number is None else number, member)
        if other is not member:
            raise CheckpointError(f"{other.name} and {member.name} fill the same place")
    starred = [of_list for pattern, of_list in lists.items() if "*." in pattern]
    highest = max((number for of_list in starred for number in of_list), default=0)
    count = max(highest + 1, *target[:1])
    filled_up: list[_Member] = []
    for pattern, of_list in lists.items():
        like = next(iter(of_list.values()), members[0])
        numbers = range(count) if "*." in pattern else list(of_list) or [0]
        filled_up += [of_list.get(n, _Member(pattern, "", like.shape)) for n in numbers]
    return filled_up


def _number(direction: _Direction, member: _Member) -> int | None:
    """The number of a tensor in the list that its pattern stands for."""
    if "*." not in member.pattern:
        return None
    key = direction.library.loading.apply_renamings(member.name, direction.renamings)
    pattern = member.pattern.replace("*.", r"(?P<number>[0-9]+)\.", 1).replace("*.", r".*\.")
    match = re.search(pattern, key)
    return int(match["number"]) if match else None


def convert_out(
    library: Library, kept: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> list[Saved]:
    """The tensors of a model under the names of a checkpoint, as `save_pretrained` has them."""
    loading = library.loading
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    transforms = [one.reverse_transform() for one in reversed(_saved_transforms(library))]
    direction = _Direction(library, transforms, shapes)
    groups: dict[str, list[_Member]] = defaultdict(list)
    saved = []
    for name in sorted(kept, key=loading.dot_natural_key):
        key, pattern = loading.apply_converters(name, direction.converters)
        if pattern is None:
            key = loading.apply_renamings(name, direction.renamings)
            places = [piece.place(key, shapes[name]) for piece in whole(name, shapes[name])]
            saved.append(Saved(key, shapes[name], kept[name].dtype, tuple(places)))
        else:
            groups[key].append(_Member(pattern, name, shapes[name]))
    for key, members in groups.items():
        saved += _save_group(direction, key, members, kept[members[0].name].dtype)
    return saved


def _saved_transforms(library: Library) -> list[Any]:
    """Those that loading used; else the model's own, but for prefixes, that no one knows of."""
    used = getattr(library.model, "_weight_conversions", None)
    if used is not None:
        return list(used)
    every = library.mapping.get_model_conversion_mapping(library.model, add_legacy=False)
    return [one for one in every if not isinstance(one, library.loading.PrefixChange)]


def _save_group(
    direction: _Direction, key: str, members: Sequence[_Member], dtype: torch.dtype
) -> Iterator[Saved]:
    """What one converter makes of the model's tensors that it takes together."""
    try:
        made = direction.trace(key, members)
    except ValueError as error:
        raise CheckpointError(f"{members[0].name}: cannot be saved as {key}: {error}") from None
    rename = direction.library.loading.apply_renamings
    if isinstance(made, Composed):
        names = {name: rename(name, direction.renamings) for name in made.targets}
        composed = _named(made, names)
        for name, shape in composed.targets.items():
            yield Saved(name, shape, dtype, (), composed)
        return
    for target, one in made.items():
        name = rename(target, direction.renamings)
        places = tuple(piece.place(name, one.sides) for piece in one.pieces)
        yield Saved(name, one.sides, dtype, places)


def _named(composed: Composed, names: Mapping[str, str]) -> Composed:
    """The same under other names."""

    def run(tensor_of: Callable[[str], Tensor]) -> dict[str, Tensor]:
        return {names[name]: tensor for name, tensor in composed.made_by(tensor_of).items()}

    targets = {names[name]: shape for name, shape in composed.targets.items()}
    return Composed(composed.sources, targets, run)
