"""A matrix wherever it lies in a tensor, against numpy's own slices."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fp8stream.device import Lane
from fp8stream.header import TensorSpec
from fp8stream.layout import OutputTensor
from fp8stream.memory import Workspace
from fp8stream.plan import Batch, Slab
from fp8stream.reader import ShardReader
from fp8stream.scheme import Granularity
from fp8stream.views import Runs, View
from fp8stream.weights import WeightPlan

Integers = NDArray[np.int64]

BEGIN = 24  # where the tensor lies in its file
WHOLE = View(0, 1)
# Integers as wide as the dtype, so that every element of a tensor can tell its place.
PLACES = {"BF16": ("<i2", torch.int16), "F32": ("<i4", torch.int32)}


@dataclass(frozen=True)
class Case:
    """A matrix [rows, columns] in a tensor, as a view and as numpy slices it."""

    tensor: Integers
    matrix: Integers
    view: View


def laid(
    transposed: bool, lead: int, step: int, part: int, expert: int, shape: tuple[int, int]
) -> Case:
    """Rows `lead + part`, `lead + part + step`, ... of one expert out of three."""
    rows, columns = shape
    height = lead + step * rows
    sides = (columns, height) if transposed else (height, columns)
    tensor = np.arange(3 * height * columns).reshape(3, *sides)
    upright = tensor[expert].T if transposed else tensor[expert]
    row, column = (1, height) if transposed else (columns, 1)
    view = View(expert * height * columns + (lead + part) * row, step * row, column)
    return Case(tensor, upright[lead + part :: step], view)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A matrix plain, with other rows before or between its own, transposed, or all of that."""
    step = draw(st.integers(1, 3))
    return laid(
        draw(st.booleans()),
        draw(st.integers(0, 3)),
        step,
        draw(st.integers(0, step - 1)),
        draw(st.integers(0, 2)),
        draw(st.tuples(st.integers(1, 9), st.integers(1, 9))),
    )


CASES = {
    "plain": laid(False, 0, 1, 0, 1, (4, 6)),
    "the second half of the rows": laid(False, 4, 1, 0, 1, (4, 6)),
    "every second row": laid(False, 0, 2, 1, 1, (4, 6)),
    "transposed": laid(True, 0, 1, 0, 1, (4, 6)),
    "the second half of transposed rows": laid(True, 4, 1, 0, 1, (4, 6)),
    "every second transposed row": laid(True, 0, 2, 1, 1, (4, 6)),
}


def slab_of(case: Case, dtype: str, first_row: int, rows: int) -> Slab:
    size = case.tensor.size * PLACES[dtype][1].itemsize
    spec = TensorSpec("experts", dtype, case.tensor.shape, "model.safetensors", BEGIN, size)
    output = OutputTensor("unused", "F8_E4M3", ())
    height, columns = case.matrix.shape
    places = (case.view, output, WHOLE, output, WHOLE)
    weight = WeightPlan(spec, Granularity.CHANNEL, (height, columns), *places)
    return Slab(weight, first_row, rows)


def streamed(case: Case, dtype: str, first_row: int, rows: int, directory: Path) -> torch.Tensor:
    """The rows by way of the reader and the buffers of a worker."""
    integer, _ = PLACES[dtype]
    path = directory / "model.safetensors"
    path.write_bytes(bytes(BEGIN) + case.tensor.astype(integer).tobytes())
    slab = slab_of(case, dtype, first_row, rows)
    # No more than the plan says that a worker needs for so many rows.
    room = rows * slab.weight.row_bytes
    assert slab.nbytes <= room
    slot = Lane(Workspace(1, room, room, 1), torch.device("cpu")).take()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        shard = ShardReader(descriptor, path, path.name, b"")
        shard.read_runs(slot.source_bytes[: slab.nbytes], slab.runs, slab.weight.spec)
    finally:
        os.close(descriptor)
    # The integers go with the buffers, which nothing else holds.
    return slot.source(Batch((slab,))).clone()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("views")


@given(case=cases(), dtype=st.sampled_from(list(PLACES)), data=st.data())
def test_a_slab_of_a_view_is_what_numpy_slices(
    directory: Path, case: Case, dtype: str, data: st.DataObject
) -> None:
    first_row = data.draw(st.integers(0, len(case.matrix) - 1))
    rows = data.draw(st.integers(1, len(case.matrix) - first_row))
    found = streamed(case, dtype, first_row, rows, directory).view(PLACES[dtype][1])
    assert found.tolist() == case.matrix[first_row : first_row + rows].tolist()


@given(case=cases(), data=st.data())
def test_runs_lie_in_the_tensor_and_hold_the_rows_wanted(case: Case, data: st.DataObject) -> None:
    first_row = data.draw(st.integers(0, len(case.matrix) - 1))
    rows = data.draw(st.integers(1, len(case.matrix) - first_row))
    runs = case.view.runs(first_row, rows, case.matrix.shape[1])
    begins = [runs.first + run * runs.step for run in range(runs.count)]
    read = [at for begin in begins for at in range(begin, begin + runs.length)]
    assert len(read) == runs.elements == len(set(read))
    assert read == sorted(read)
    assert 0 <= read[0] <= read[-1] < case.tensor.size
    # `matrix` holds places: nothing more is read than what lies between rows of a column.
    wanted = case.matrix[first_row : first_row + rows]
    assert set(wanted.flatten().tolist()) <= set(read)
    if not case.view.transposed:
        assert read == wanted.flatten().tolist()


@given(case=cases())
def test_index_is_where_an_element_lies(case: Case) -> None:
    rows, columns = case.matrix.shape
    for row in range(rows):
        for column in range(columns):
            place = case.view.index(row, column, case.tensor.shape)
            assert case.tensor[tuple(place)] == case.matrix[row, column]


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("plain", Runs(24 + 6, 12, 12, 1)),
        ("the second half of the rows", Runs(48 + 24 + 6, 12, 12, 1)),
        ("every second row", Runs(48 + 6 + 12, 6, 12, 2)),
        ("transposed", Runs(24 + 1, 2, 4, 6)),
        ("the second half of transposed rows", Runs(48 + 4 + 1, 2, 8, 6)),
        ("every second transposed row", Runs(48 + 1 + 2, 3, 8, 6)),
    ],
)
def test_rows_one_and_two_are_as_few_runs_as_can_be(name: str, runs: Runs) -> None:
    case = CASES[name]
    assert case.view.runs(1, 2, 6) == runs


@pytest.mark.parametrize("name", list(CASES))
def test_index_names_the_element_in_the_tensors_own_sides(name: str) -> None:
    case = CASES[name]
    place = {
        "plain": [1, 2, 5],
        "the second half of the rows": [1, 6, 5],
        "every second row": [1, 5, 5],
        "transposed": [1, 5, 2],
        "the second half of transposed rows": [1, 5, 6],
        "every second transposed row": [1, 5, 5],
    }[name]
    assert case.view.index(2, 5, case.tensor.shape) == place
