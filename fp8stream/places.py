"""Geometry: regions of a tensor, and the elements of other tensors that fill them.

A piece of a tensor is a region, a range for each axis, and the first element and the steps with
which a source is read to fill it. Cutting, joining, turning and reshaping tensors only moves pieces
about, so where every element came from is known without a look at one. Pure.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from fp8stream.views import View

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Region = tuple[range, ...]

_MOST_PIECES = 1 << 16


class Matrix(NamedTuple):
    """One matrix [out, in] of a place: where it lies in the source, and where in the target.

    Both views count in elements of their tensors, which lie contiguous in row-major order.
    """

    shape: tuple[int, int]
    source: View
    target: View


@dataclass(frozen=True, slots=True)
class Place:
    """Elements of the tensor `source`, and the `region` of the tensor `target` that they fill.

    `region` has a range for each axis of the target, of shape `target_shape`. Its element number
    `(i, j, ...)` is element `first + i * steps[0] + j * steps[1] + ...` of the source, counted in
    row-major order.
    """

    source: str
    target: str
    target_shape: Shape
    region: Region
    first: int
    steps: Shape

    @property
    def shape(self) -> Shape:
        """The shape of the region."""
        return tuple(map(len, self.region))

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def whole(self) -> bool:
        """Whether the region is all of the target."""
        return self.shape == self.target_shape

    def target_index(self) -> tuple[slice, ...]:
        """The region as an index of the target."""
        return tuple(slice(part.start, part.stop, part.step) for part in self.region)

    def read(self, source: "Tensor") -> "Tensor":
        """The elements of `source` in the shape of the region; a view where it is contiguous."""
        flat = source.contiguous()
        return flat.as_strided(self.shape, self.steps, flat.storage_offset() + self.first)

    def apply(self, target: "Tensor", source: "Tensor") -> None:
        """Fills the region of `target`, cast to its dtype, from `source`."""
        target.detach()[self.target_index()].copy_(self.read(source.detach()))

    def covers(self, other: "Place") -> bool:
        """Whether it fills all that another place does."""
        sides = zip(self.region, other.region, strict=False)
        same = self.target == other.target and len(self.region) == len(other.region)
        return same and all(len(meet(one, part)) == len(part) for one, part in sides)

    def part(self, region: Region) -> "Place":
        """What of it fills `region`, which it covers."""
        skipped = [
            (part.start - own.start) // own.step * step
            for own, part, step in zip(self.region, region, self.steps, strict=True)
        ]
        steps = tuple(
            step * part.step // own.step
            for own, part, step in zip(self.region, region, self.steps, strict=True)
        )
        return replace(self, region=region, first=self.first + sum(skipped), steps=steps)

    @property
    def span(self) -> int:
        """How many elements of the source lie from the first that is read to the last."""
        return 1 + sum((len(p) - 1) * s for p, s in zip(self.region, self.steps, strict=True))

    def spans(self, most: int) -> Iterator["Place"]:
        """The place in pieces, each of which spans at `most` so many elements of the source."""
        if self.span <= max(1, most):
            yield self
            return
        reach = [(len(p) - 1) * s for p, s in zip(self.region, self.steps, strict=True)]
        axis = reach.index(max(reach))
        part, step = self.region[axis], self.steps[axis]
        half = len(part) // 2
        for some, skipped in ((part[:half], 0), (part[half:], half)):
            region = (*self.region[:axis], some, *self.region[axis + 1 :])
            yield from replace(self, region=region, first=self.first + skipped * step).spans(most)

    def matrices(self, transposed: bool = False) -> Iterator[Matrix]:
        """The matrices of the last two axes, one for every index of those before.

        They are [out, in]; `transposed` says that the target has [in, out]. A vector is one row.
        """
        pad = max(0, 2 - len(self.steps))
        region = (range(1),) * pad + self.region
        steps, ahead = (0,) * pad + self.steps, (0,) * pad + strides(self.target_shape)
        into = tuple(a * part.step for a, part in zip(ahead, region, strict=True))
        start = sum(a * part.start for a, part in zip(ahead, region, strict=True))
        row, column = (-1, -2) if transposed else (-2, -1)
        shape = len(region[row]), len(region[column])
        for index in product(*(range(len(part)) for part in region[:-2])):
            source = self.first + sum(map(math.prod, zip(index, steps, strict=False)))
            target = start + sum(map(math.prod, zip(index, into, strict=False)))
            yield Matrix(
                shape,
                View(source, steps[row], steps[column]),
                View(target, into[row], into[column]),
            )


class Piece(NamedTuple):
    """Elements of `source` in a region of some tensor; the words are those of `Place`."""

    source: str
    region: Region
    first: int
    steps: Shape

    def place(self, target: str, shape: Shape) -> Place:
        return Place(self.source, target, shape, self.region, self.first, self.steps)

    def along(self, axis: int, *new: tuple[range, int], first: int = 0) -> "Piece":
        """With `new` ranges and steps instead of those of `axis`, and `first` elements later."""
        after = axis + 1
        parts, steps = tuple(part for part, _ in new), tuple(step for _, step in new)
        return Piece(
            self.source,
            self.region[:axis] + parts + self.region[after:],
            self.first + first,
            self.steps[:axis] + steps + self.steps[after:],
        )


def strides(shape: Sequence[int]) -> Shape:
    """Elements between neighbours along each axis of a contiguous tensor."""
    strides, step = [], 1
    for side in reversed(shape):
        strides.append(step)
        step *= side
    return tuple(reversed(strides))


def whole(source: str, shape: Shape) -> list[Piece]:
    """All of `source`, where it has elements."""
    if 0 in shape:
        return []
    return [Piece(source, tuple(map(range, shape)), 0, strides(shape))]


def cut(pieces: Iterable[Piece], axis: int, window: range) -> list[Piece]:
    """What lies in `window` along `axis`, which is then numbered from 0."""
    inside = []
    for piece in pieces:
        part, step = piece.region[axis], piece.steps[axis]
        common = meet(part, window)
        if common:
            start = (common.start - window.start) // window.step
            run = stepped(start, common.step // window.step, len(common))
            skipped = (common.start - part.start) // part.step
            stride = step * (common.step // part.step) if len(common) > 1 else step
            inside.append(piece.along(axis, (run, stride), first=skipped * step))
    return inside


def shifted(pieces: Iterable[Piece], axis: int, by: int) -> list[Piece]:
    """`by` places further along `axis`."""
    moved = []
    for piece in pieces:
        part = piece.region[axis]
        later = range(part.start + by, part.stop + by, part.step)
        moved.append(piece.along(axis, (later, piece.steps[axis])))
    return moved


def turned(pieces: Iterable[Piece], axes: Sequence[int]) -> list[Piece]:
    """With the axes in another order."""
    return [
        piece._replace(
            region=tuple(piece.region[axis] for axis in axes),
            steps=tuple(piece.steps[axis] for axis in axes),
        )
        for piece in pieces
    ]


def without_axis(pieces: Iterable[Piece], axis: int) -> list[Piece]:
    """Without an axis of one element."""
    return [piece.along(axis) for piece in pieces]


def with_axis(pieces: Iterable[Piece], axis: int, at: int = 0) -> list[Piece]:
    """With an axis more before `axis`, along which all lie at `at`."""
    return [
        piece._replace(
            region=(*piece.region[:axis], range(at, at + 1), *piece.region[axis:]),
            steps=(*piece.steps[:axis], 0, *piece.steps[axis:]),
        )
        for piece in pieces
    ]


def reshaped(pieces: list[Piece], old: Shape, new: Shape) -> list[Piece]:
    """The same elements in row-major order under another shape."""
    axis = 0
    for sides, into in _groups(old, new):
        if sides != into:
            pieces = with_axis(pieces, axis) if not sides else pieces
            for at in range(1, len(sides)):
                size = math.prod(sides[:at]), sides[at]
                pieces = _limited(part for piece in pieces for part in _merge(piece, axis, size))
            for at, side in enumerate(into[:-1]):
                low, size = axis + at, (side, math.prod(into[at + 1 :]))
                pieces = _limited(part for piece in pieces for part in _split(piece, low, size))
            pieces = without_axis(pieces, axis) if not into else pieces
        axis += len(into)
    return pieces


def _groups(old: Shape, new: Shape) -> Iterator[tuple[Shape, Shape]]:
    """Neighbouring axes of one shape with those of the other that have as many elements."""
    a = b = 0
    while a < len(old) or b < len(new):
        first, second = a, b
        a, b = min(a + 1, len(old)), min(b + 1, len(new))
        while math.prod(old[first:a]) != math.prod(new[second:b]):
            if math.prod(old[first:a]) < math.prod(new[second:b]):
                a += 1
            else:
                b += 1
        yield old[first:a], new[second:b]


def _merge(piece: Piece, axis: int, size: tuple[int, int]) -> Iterator[Piece]:
    """Makes one axis of two with `size` elements: in one piece, or a piece for each row or column
    of the two, whichever are fewer."""
    (rows, columns), (down, right) = piece.region[axis : axis + 2], piece.steps[axis : axis + 2]
    side = size[1]
    joined = piece.along(axis + 1)
    goes_on = len(rows) == 1 or (rows.step == 1 and down == side * right)
    if goes_on and len(columns) == side:
        yield joined.along(axis, (stepped(rows.start * side, 1, len(rows) * side), right))
    elif len(rows) <= len(columns):
        for number, row in enumerate(rows):
            part = stepped(row * side + columns.start, columns.step, len(columns))
            yield joined.along(axis, (part, right), first=number * down)
    else:
        for number, column in enumerate(columns):
            part = stepped(rows.start * side + column, rows.step * side, len(rows))
            yield joined.along(axis, (part, down), first=number * right)


def _split(piece: Piece, axis: int, size: tuple[int, int]) -> Iterator[Piece]:
    """Makes two axes of `size` elements of one: in one piece where whole rows are filled."""
    part, step, side = piece.region[axis], piece.steps[axis], size[1]
    if part.step == 1 and part.start % side == 0 and len(part) % side == 0:
        rows = stepped(part.start // side, 1, len(part) // side)
        yield piece.along(axis, (rows, step * side), (range(side), step))
        return
    for row in range(part.start // side, (part.stop - 1) // side + 1):
        window = range(row * side, (row + 1) * side)
        for inside in cut([piece], axis, window):
            columns = inside.region[axis], inside.steps[axis]
            yield inside.along(axis, (range(row, row + 1), 0), columns)


def _limited(pieces: Iterable[Piece]) -> list[Piece]:
    found = []
    for piece in pieces:
        found.append(piece)
        if len(found) > _MOST_PIECES:
            raise ValueError(f"more than {_MOST_PIECES} pieces")
    return found


def stepped(start: int, step: int, count: int) -> range:
    """`count` numbers from `start` on; equal ranges are written alike."""
    return range(start, start + step * (count - 1) + 1, step if count > 1 else 1)


def meet(one: range, other: range) -> range:
    """The numbers that are in both."""
    low, stop = max(one.start, other.start), min(one.stop, other.stop)
    if one.step == other.step == 1:
        return range(low, stop)
    shared = math.gcd(one.step, other.step)
    apart, off = divmod(other.start - one.start, shared)
    if off:
        return range(0)
    period = other.step // shared
    step = one.step * period
    at = one.start + apart * pow(one.step // shared, -1, period) % period * one.step
    return range(at - (at - low) // step * step, stop, step)


def region_text(region: Iterable[range | slice]) -> str:
    """A region as one would index it."""
    return ", ".join(
        f"{part.start}:{part.stop}" + (f":{part.step}" if part.step not in (1, None) else "")
        for part in region
    )
