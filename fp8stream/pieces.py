"""A weight of the model that can be FP8, and the pieces of a checkpoint that fill it.

A piece is a run of rows of one matrix, with a place for its codes and one for its scales, so that
it streams as any other weight does. Pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fp8stream.header import TensorSpec
from fp8stream.layout import OutputTensor
from fp8stream.places import Place
from fp8stream.scheme import BLOCK, CODE_DTYPE, SCALE_DTYPE, Granularity
from fp8stream.views import View
from fp8stream.weights import WeightPlan


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
class Piece:
    """Rows of one part of one matrix, `first` and on, every `step`-th row of the matrix."""

    spec: TensorSpec
    expert: int
    part: int
    first: int
    rows: int
    source: View


def pieces_of(
    weight: Weight,
    places: Sequence[Place],
    specs: Mapping[str, TensorSpec],
    granularity: Granularity,
) -> list[Piece] | None:
    """The weight's rows as they come; None where rows, or blocks of them, do not come whole."""
    pieces: list[Piece] = []
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


def _of_place(weight: Weight, place: Place, spec: TensorSpec) -> list[Piece] | None:
    row, column = (-1, -2) if weight.transposed else (-2, -1)
    columns, rows = place.region[column], place.region[row]
    if columns != range(weight.shape[1]):
        return None
    steps = place.steps
    leading = place.region[0] if weight.experts else range(1)
    found: list[Piece] = []
    for number, expert in enumerate(leading):
        first = place.first + (number * steps[0] if weight.experts else 0)
        cut = _by_part(weight, rows)
        if cut is None:
            return None
        for part, begin, count, skipped, stride in cut:
            source = View(first + skipped * steps[row], stride * steps[row], steps[column])
            if source.column_step != 1 and source.row_step > source.column_step:
                return None
            found.append(Piece(spec, expert, part, begin, count, source))
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


def weight_plan(
    weight: Weight, piece: Piece, granularity: Granularity, shared: str | None
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


def _scales_at(weight: Weight, piece: Piece, granularity: Granularity) -> View:
    """Where the piece's scales begin, and the step from one row of them to the next."""
    if granularity is Granularity.TENSOR:
        return View(piece.expert, 1)
    each = weight.shape[0] // weight.parts
    height, width = granularity.scale_shape((each, weight.shape[1]))
    turns, step = weight.interleaved, weight.parts if weight.interleaved else 1
    begin = piece.expert * height * weight.parts + (piece.part if turns else piece.part * height)
    first = piece.first // granularity.row_multiple
    return View((begin + first * step) * width, step * width)
