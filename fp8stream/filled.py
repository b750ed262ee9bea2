"""What was found of a checkpoint's tensors in a model, and whether it is all of the model.

Completeness is shown by region, never by counting: a tensor is cut into boxes at the bounds of all
that fills it, and each box must be filled by one.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from fp8stream.errors import CheckpointError, listed
from fp8stream.places import Place, Region, Shape, meet, region_text, stepped, whole

if TYPE_CHECKING:
    from torch import Tensor

_LISTED = 5
_Filled = tuple[Region, str]


@dataclass(frozen=True)
class Composed:
    """Tensors whose values transformers computes from others: they must all be there at once.

    `targets` are the shapes of what comes out. Holds on to the model that it was found for.
    """

    sources: tuple[str, ...]
    targets: Mapping[str, Shape]
    made_by: "Callable[[Callable[[str], Tensor]], dict[str, Tensor]]" = field(
        repr=False, compare=False
    )

    def convert(self, tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """The targets, made by transformers' own code from the sources in `tensors`."""
        return self.made_by(tensors.__getitem__)


class Missing(NamedTuple):
    """A region of a model's tensor that nothing fills."""

    target: str
    shape: Shape
    region: Region

    @property
    def whole(self) -> bool:
        """Whether nothing at all comes for the tensor."""
        return tuple(map(len, self.region)) == self.shape

    def __str__(self) -> str:
        return self.target if self.whole else f"{self.target}[{region_text(self.region)}]"


class Findings:
    """What has been found of a checkpoint's tensors so far."""

    def __init__(self, targets: Mapping[str, Shape]) -> None:
        self.targets = targets
        self.places: list[Place] = []
        self.composed: list[Composed] = []
        self.unexpected: list[str] = []
        self.ignored: list[str] = []
        self.stranded: list[str] = []
        self.leftover: list[Missing] = []
        self.problems: list[str] = []

    def same(self, name: str, target: str, shape: Shape) -> None:
        """Places all of `name` in `target`."""
        expected = self.targets.get(target)
        if expected is None:
            self.unexpected.append(name)
        elif expected != shape:
            into = "" if name == target else f" for {target}"
            self.problems.append(f"{name}: expected {expected}{into}, found {shape}")
        else:
            self.places += [piece.place(target, shape) for piece in whole(name, shape)]

    def check_shapes(self) -> None:
        """Raises CheckpointError where tensors do not have the shapes that the model expects."""
        if self.problems:
            raise CheckpointError(
                f"shapes differ from the model's: {listed(self.problems, _LISTED, '; ')}"
            )

    def missing(self, places: Iterable[Place], ties: Mapping[str, str]) -> list[Missing]:
        """What `places` and `composed` leave of the model's tensors, where `ties` lead from names
        to others of the same tensor. Raises CheckpointError for what is filled twice."""
        return [
            gap
            for target, filled in self._filled(places, ties).items()
            for gap in gaps(target, self.targets[target], filled)
        ]

    def _filled(self, places: Iterable[Place], ties: Mapping[str, str]) -> dict[str, list[_Filled]]:
        """For each target, tied ones under one name, what fills which region."""
        filled: dict[str, list[_Filled]] = {name: [] for name in self.targets if name not in ties}
        for place in places:
            filled[place.target].append((place.region, place.source))
        for one in self.composed:
            for target, shape in one.targets.items():
                everything = tuple(map(range, shape)), one.sources[0]
                filled[ties.get(target, target)].append(everything)
        return filled


def gaps(name: str, shape: Shape, filled: Sequence[_Filled], once: bool = True) -> list[Missing]:
    """What nothing fills, gaps that follow each other along the first axis as one.

    Raises CheckpointError for what is filled more than `once`.
    """
    if 0 in shape or (len(filled) == 1 and tuple(map(len, filled[0][0])) == shape):
        return []
    found: list[Region] = []
    for region, names in _cells(shape, filled):
        if len(names) > 1 and once:
            raise CheckpointError(
                f"{names[0]} and {names[1]} both fill {name}[{region_text(region)}]: map one of "
                "them elsewhere, or to None"
            )
        if not names:
            found[-1:] = _joined(found[-1:], region)
    return [Missing(name, shape, region) for region in found]


def _joined(before: list[Region], region: Region) -> list[Region]:
    """`region` and the one before, if any; as one if it goes on where that ends."""
    for one in before:
        first, second = one[0], region[0]
        if one[1:] == region[1:] and first.stop == second.start and first.step == second.step == 1:
            return [(range(first.start, second.stop), *one[1:])]
    return [*before, region]


def _cells(
    shape: Shape, filled: Sequence[_Filled], axis: int = 0
) -> Iterator[tuple[Region, list[str]]]:
    """Boxes that make up a tensor of `shape`, and the names of those that fill each."""
    rest = tuple(map(range, shape[axis:]))
    if all(region[axis:] == rest for region, _ in filled):
        yield rest, [name for _, name in filled]
        return
    for part, inside in _cuts(shape[axis], filled, axis):
        for region, names in _cells(shape, inside, axis + 1):
            yield (part, *region), names


def _cuts(size: int, filled: Sequence[_Filled], axis: int) -> Iterator[tuple[range, list[_Filled]]]:
    """The parts of an axis between the bounds of all regions, and what lies over each."""
    over: dict[range, list[_Filled]] = defaultdict(list)
    for item in filled:
        over[item[0][axis]].append(item)
    step = min(size, math.lcm(*(part.step for part in over)))
    for phase in range(step):
        # Along each phase steps are 1, and every part is an interval.
        lanes = {part: meet(part, range(phase, size, step)) for part in over}
        bounds: dict[int, list[range]] = defaultdict(list)
        for part, lane in lanes.items():
            if lane:
                bounds[(lane.start - phase) // step].append(part)
                bounds[(lane[-1] - phase) // step + 1].append(part)
        count = -(-(size - phase) // step)
        edges = sorted({0, count, *bounds})
        active: dict[range, None] = {}
        for low, high in pairwise(edges):
            for part in bounds.get(low, ()):
                if part in active:
                    del active[part]
                else:
                    active[part] = None
            inside = [item for part in active for item in over[part]]
            yield stepped(phase + low * step, step, high - low), inside
