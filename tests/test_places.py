"""Pieces follow a tensor through whatever moves its elements, and no element is filled twice."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp8stream.errors import CheckpointError
from fp8stream.filled import Findings
from fp8stream.places import Place, Region, region_text
from fp8stream.tracing import NotGeometryError, Traced, traced

Draw = Callable[[st.SearchStrategy[int]], int]
SIDES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


def numbered(shape: tuple[int, ...], first: int = 0) -> Tensor:
    return torch.arange(first, first + math.prod(shape)).reshape(shape)


def followed(made: Traced, sources: dict[str, Tensor]) -> Tensor:
    """What the pieces of `made` say that it holds."""
    full = torch.full(made.sides, -1)
    for piece in made.pieces:
        piece.place("made", made.sides).apply(full, sources[piece.source])
    return full


def moved(data: st.DataObject, tensors: list[Tensor]) -> list[Tensor]:
    """One operation on tensors of one shape, drawn at random, as transformers' code would do it."""
    draw, one = data.draw, tensors[0]
    axis = draw(st.integers(0, one.ndim - 1))
    other = draw(st.integers(0, one.ndim - 1))
    side = one.shape[axis]
    match draw(st.integers(0, 9)):
        case 0:
            return [torch.cat(tensors, dim=axis)]
        case 1:
            return [torch.stack(tensors, dim=axis)]
        case 2:
            return list(torch.chunk(one, draw(st.integers(1, 3)), dim=axis))[:1]
        case 3:
            return list(torch.split(one, [side - side // 2, side // 2], dim=axis))[:1]
        case 4:
            return [t.transpose(axis, other).contiguous() for t in tensors]
        case 5:
            return list(torch.unbind(one, dim=axis)) if one.ndim > 1 else tensors
        case 6 if side % 2 == 0:
            shape = [
                *one.shape[:axis],
                *draw(st.permutations([2, side // 2])),
                *one.shape[axis + 1 :],
            ]
            split = [t.reshape(shape).transpose(axis, axis + 1) for t in tensors]
            return [t.reshape(one.shape).contiguous() for t in split]
        case 7:
            step = draw(st.integers(1, 3))
            start = draw(st.integers(0, side - 1))
            return [t.movedim(axis, 0)[start::step].movedim(0, axis).contiguous() for t in tensors]
        case 8:
            return [t.reshape(-1) for t in tensors]
        case _:
            return [t.unsqueeze(axis).flatten(axis, axis + 1) for t in tensors]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_was_followed_is_what_torch_makes(data: st.DataObject) -> None:
    shape = tuple(data.draw(SIDES))
    count = data.draw(st.integers(1, 3))
    sources = {str(n): numbered(shape, 1000 * n) for n in range(count)}
    real = list(sources.values())
    ghosts: list[Tensor] = [traced(name, shape) for name in sources]
    for _ in range(data.draw(st.integers(1, 5))):
        record = _Record(data)
        real = moved(record, real)  # type: ignore[arg-type]
        ghosts = moved(record.again(), ghosts)  # type: ignore[arg-type]
        if not real or real[0].ndim > 6 or real[0].numel() > 5000:
            break
    for tensor, ghost in zip(real, ghosts, strict=True):
        assert isinstance(ghost, Traced)
        assert torch.equal(followed(ghost, sources), tensor)


class _Record:
    """Draws that can be drawn again."""

    def __init__(self, data: st.DataObject | None, drawn: list[object] | None = None) -> None:
        self._data = data
        self._drawn: list[object] = [] if drawn is None else drawn
        self._replay = iter(list(self._drawn)) if data is None else None

    def draw(self, strategy: st.SearchStrategy[object]) -> object:
        if self._replay is not None:
            return next(self._replay)
        assert self._data is not None
        self._drawn.append(self._data.draw(strategy))
        return self._drawn[-1]

    def again(self) -> "_Record":
        return _Record(None, self._drawn)


@pytest.mark.parametrize(
    "operation", [lambda t: t * 2, lambda t: t + t, lambda t: t.float(), lambda t: t.sum()]
)
def test_what_computes_is_no_geometry(operation: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NotGeometryError):
        operation(traced("a", (4, 2)))


def test_a_conversion_that_takes_very_many_pieces_is_left_to_transformers() -> None:
    with pytest.raises(NotGeometryError):
        traced("a", (70_000, 70_000)).t().reshape(-1)


@st.composite
def regions(draw: Draw, shape: tuple[int, ...]) -> Region:
    parts = []
    for side in shape:
        start = draw(st.integers(0, side - 1))
        step = draw(st.integers(1, 3))
        count = draw(st.integers(1, (side - 1 - start) // step + 1))
        parts.append(range(start, start + (count - 1) * step + 1, step if count > 1 else 1))
    return tuple(parts)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_is_missing_and_what_comes_twice(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=0, max_size=3)))
    found = Findings({"t": shape})
    times = torch.zeros(shape, dtype=torch.int)
    drawn = data.draw(st.lists(regions(shape), max_size=5))
    careful = data.draw(st.booleans())
    for number, region in enumerate(drawn):
        place = Place(str(number), "t", shape, region, 0, (0,) * len(shape))
        if careful and times[place.target_index()].any():
            continue
        times[place.target_index()] += 1
        found.places.append(place)
    if (times > 1).any():
        with pytest.raises(CheckpointError, match="both fill t"):
            found.missing(found.places, {})
        return
    for gap in found.missing(found.places, {}):
        index = tuple(slice(part.start, part.stop, part.step) for part in gap.region)
        assert not times[index].any(), region_text(gap.region)
        times[index] = 1
    assert (times == 1).all()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_matrices_and_parts_of_places(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=0, max_size=4)))
    region = data.draw(regions(shape))
    counts = tuple(map(len, region))
    source = numbered(counts).transpose(0, -1).contiguous() if counts else numbered(())
    steps = torch.arange(source.numel()).reshape(source.shape)
    steps = steps.transpose(0, -1) if counts else steps
    place = Place("s", "t", shape, region, 0, tuple(steps.stride()))
    whole = torch.full(shape, -1)
    place.apply(whole, source)
    assert torch.equal(whole[place.target_index()].reshape(-1), torch.arange(place.elements))
    for transposed in (False, True):
        full = torch.full(shape, -1)
        flat = full.view(-1)
        for one in place.matrices(transposed):
            for row in range(one.shape[0]):
                for column in range(one.shape[1]):
                    at = one.target.first + row * one.target.row_step
                    of = one.source.first + row * one.source.row_step
                    into = at + column * one.target.column_step
                    flat[into] = source.reshape(-1)[of + column * one.source.column_step]
        assert torch.equal(full, whole)
    for piece in place.spans(data.draw(st.integers(1, 9))):
        assert place.covers(piece)
        assert piece == place.part(piece.region)
        some = source.reshape(-1)[piece.first : piece.first + piece.span]
        assert torch.equal(some.as_strided(piece.shape, piece.steps), piece.read(source))
        assert torch.equal(piece.read(source), whole[piece.target_index()])
        whole[piece.target_index()] = -1
    assert bool((whole == -1).all())
