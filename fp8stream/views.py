"""A matrix inside a tensor: where its rows and columns lie, and the runs of bytes that hold them.

Experts share tensors, transposed or row by row in turn. Each is still a matrix [rows, columns] with
a first element and two steps, and whatever is read or written is a few equal runs at equal
distances. Pure.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Runs:
    """`count` runs of `length` elements, the first at `first`, each `step` after the one before."""

    first: int
    length: int
    step: int
    count: int

    @property
    def elements(self) -> int:
        return self.count * self.length

    def pieces(self, itemsize: int) -> Iterator[tuple[int, slice]]:
        """For each run the byte of the tensor at which it begins, and which bytes it is of all
        runs one after another, where an element takes `itemsize`."""
        size = self.length * itemsize
        for run in range(self.count):
            begin = (self.first + run * self.step) * itemsize
            yield begin, slice(run * size, (run + 1) * size)


@dataclass(frozen=True)
class View:
    """Element (row, column) is element `first + row * row_step + column * column_step` of a tensor.

    Either the columns of a row lie together, or the rows of a column, perhaps with those of another
    matrix between them.
    """

    first: int
    row_step: int
    column_step: int = 1

    @property
    def transposed(self) -> bool:
        return self.column_step > 1

    def index(self, row: int, column: int, shape: Sequence[int]) -> list[int]:
        """Where in a tensor of `shape` the element (row, column) lies."""
        at, place = self.first + row * self.row_step + column * self.column_step, []
        for side in reversed(shape):
            at, index = divmod(at, side)
            place.append(index)
        return place[::-1]

    def runs(self, first_row: int, rows: int, columns: int) -> Runs:
        """Where `rows` rows from `first_row` on lie. A transposed view has a run for each column,
        with what lies between its rows."""
        first = self.first + first_row * self.row_step
        if self.transposed:
            return Runs(first, (rows - 1) * self.row_step + 1, self.column_step, columns)
        if self.row_step == columns:
            return Runs(first, rows * columns, rows * columns, 1)
        return Runs(first, columns, self.row_step, rows)
