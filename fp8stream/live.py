"""A live model's tensors as the place where codes, scales and kept tensors go.

A sink like the writer of files, but what comes is copied into storage that is there already and
stays where it is. Of a model that is spread over ranks each holds a part, and takes from what comes
what is its own, so that the parts put together are the whole to the bit.
"""

import math
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8stream.coverage import Coverage
from fp8stream.device import dtype_of
from fp8stream.errors import CheckpointError
from fp8stream.header import TensorSpec
from fp8stream.places import Piece, Place, cut, reshaped, strides
from fp8stream.reader import ShardReader
from fp8stream.views import Runs


@dataclass(frozen=True)
class Share:
    """What a rank holds of a tensor of shape `of`: a tensor of the shape `local`.

    It is a range of each side of `shape`, which is `of` but where matrices that lie below each
    other, as gate and up do, are cut one by one: those get a side of their own.
    """

    of: tuple[int, ...]
    local: tuple[int, ...]
    shape: tuple[int, ...]
    ranges: tuple[range, ...]

    @staticmethod
    def whole(shape: Sequence[int]) -> "Share":
        sides = tuple(shape)
        return Share(sides, sides, sides, tuple(map(range, sides)))

    @staticmethod
    def cut(shape: Sequence[int], axis: int, rank: int, ranks: int, parts: int = 1) -> "Share":
        """The part number `rank` of `ranks` equal ones along `axis`, or along each of the `parts`
        that lie there one after another."""
        sides, at = tuple(shape), axis % len(shape)
        each = sides[at] // parts // ranks
        inner = (parts,) if parts > 1 else ()
        view = (*sides[:at], *inner, sides[at] // parts, *sides[at + 1 :])
        ranges = [range(side) for side in view]
        ranges[at + len(inner)] = range(rank * each, (rank + 1) * each)
        local = (*sides[:at], each * parts, *sides[at + 1 :])
        return Share(sides, local, view, tuple(ranges))

    @property
    def is_whole(self) -> bool:
        return self.held == self.shape

    @property
    def held(self) -> tuple[int, ...]:
        """The shape of the part, seen as `shape` is."""
        return tuple(map(len, self.ranges))

    def inside(self, place: Place) -> list[Place]:
        """What of a place in the whole tensor lies in the part, as places in its `held` shape."""
        if self.is_whole:
            return [place]
        pieces = [Piece(place.source, place.region, place.first, place.steps)]
        pieces = reshaped(pieces, self.of, self.shape)
        for axis, window in enumerate(self.ranges):
            pieces = cut(pieces, axis, window)
        return [piece.place(place.target, self.held) for piece in pieces]

    def span(self) -> tuple[int, int]:
        """Elements of the whole tensor, whole rows of its last side, that all of the part lies in:
        the first, and the one after the last."""
        *ranges, _ = self.ranges or (range(1),)
        *steps, _ = strides(self.shape or (1,))
        sides = list(zip(ranges, steps, strict=True))
        first = sum(range_.start * step for range_, step in sides)
        last = sum((range_.stop - 1) * step for range_, step in sides)
        return first, last + (self.shape or (1,))[-1]

    def local_run(self, first: int, last: int) -> int | None:
        """Where the part has element `first` of the whole, if it has all from there to `last`, and
        in one run; None if not."""
        at = max(
            (n for n, side in enumerate(self.shape) if len(self.ranges[n]) != side), default=-1
        )
        begin, end, local = first, last, 0
        for number, (step, inner) in enumerate(
            zip(strides(self.shape), strides(self.held), strict=True)
        ):
            (one, begin), (other, end) = divmod(begin, step), divmod(end, step)
            range_ = self.ranges[number]
            apart = one != other if number < at else other not in range_
            if number <= at and (apart or one not in range_):
                return None
            local += (one - range_.start) * inner
        return local

    def of_whole(self, tensor: Tensor) -> Tensor:
        """The part of a whole tensor, in its `local` shape."""
        index = tuple(slice(range_.start, range_.stop) for range_ in self.ranges)
        return tensor.reshape(self.shape)[index].reshape(self.local)

    def take(self, into: Tensor, first: int, values: Tensor) -> None:
        """Copies what of `values`, elements `first` and on of the whole, belongs to the part.

        They are whole rows of the last side, unless the part is the whole.
        """
        begin = self.local_run(first, first + len(values) - 1)
        if begin is not None:
            into.view(-1)[begin : begin + len(values)].copy_(values)
            return
        *sides, width = self.shape
        *held, columns = self.ranges
        rows = values.view(-1, width)[:, columns.start : columns.stop]
        place = torch.arange(first // width, first // width + len(rows))
        local, mine, step = torch.zeros_like(place), torch.ones(len(rows), dtype=torch.bool), 1
        for side, range_ in zip(reversed(sides), reversed(held), strict=True):
            at = place % side
            mine &= (at >= range_.start) & (at < range_.stop)
            local += (at - range_.start) * step
            place, step = place // side, step * len(range_)
        target = into.view(-1, len(columns))
        target[local[mine].to(into.device)] = rows[mine].to(into.device, into.dtype)


@dataclass(frozen=True)
class Held:
    """A tensor of the model, or a rank's part of one; its storage stays where it is."""

    tensor: Tensor
    part: Share

    @property
    def values(self) -> Tensor:
        """The storage as numbers that can be copied: codes are bytes."""
        narrow = self.tensor.dtype == torch.float8_e4m3fn
        return self.tensor.detach().view(torch.uint8) if narrow else self.tensor.detach()


# Elements of a tensor: of how many, from which on.
Elements = Callable[[int, int], Tensor]


class ModelSink:
    """Puts what comes into `targets`, by the names that the plan has for them.

    A tensor that is kept goes to the `places` of its name. Each code may come once. Given `units`,
    which say of each layer's number with what it must change together, and `unit_of`, which says it
    of each target, nothing of a unit is touched before all of it came: `changed` holds those that
    are new.
    """

    def __init__(
        self,
        targets: Mapping[str, Held],
        places: Mapping[str, Sequence[Place]],
        specs: Mapping[str, TensorSpec],
        units: Mapping[int, str] | None = None,
        unit_of: Callable[[str], str] | None = None,
    ) -> None:
        self._targets = targets
        self._places = places
        self._specs = specs
        self._units = units
        self._left = Counter((units or {}).values())
        self._staged: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self._unit_of = unit_of or str
        self._came: dict[str, Coverage] = {}
        self._lock = threading.Lock()
        self.changed: set[str] = set()
        # Bytes of the source that were not read, as other ranks hold them.
        self.passed_over = 0

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Raises CheckpointError if any code of it came before."""
        held, into = self._into(name)
        values = torch.frombuffer(data, dtype=into.dtype)
        self._write(name, held, into, offset // into.element_size(), values)

    def _write(self, name: str, held: Held, into: Tensor, first: int, values: Tensor) -> None:
        if into.dtype == torch.uint8:
            self._claim(name, math.prod(held.part.shape), first, len(values))
        held.part.take(into, first, values)

    def write_runs(self, name: str, runs: Runs, data: memoryview) -> None:
        """As `write`, for many runs of elements at once.

        Runs of a tensor that begin at the same place between two steps are claimed together.
        """
        held, into = self._into(name)
        values = torch.frombuffer(data, dtype=into.dtype).view(runs.count, runs.length)
        last = runs.first + (runs.count - 1) * runs.step + runs.length - 1
        begin = held.part.local_run(runs.first, last)
        if begin is None:
            for number, run in enumerate(values):
                self._write(name, held, into, runs.first + number * runs.step, run)
            return
        if into.dtype == torch.uint8:
            turn, at = runs.first // runs.step, runs.first % runs.step
            key = f"{name}[{at}::{runs.step}]"
            self._claim(key, math.prod(held.part.shape) // runs.step, turn, runs.count)
        flat = into.view(-1)[begin:]
        flat.as_strided(values.shape, (runs.step, 1), flat.storage_offset()).copy_(values)

    def copy(
        self, name: str, offset: int, length: int, source: ShardReader, at: int, buffer: memoryview
    ) -> int:
        """Takes what fits the buffer; all of what does not go to one place as it is."""
        spec, places = self._specs[name], self._places.get(name, ())
        if not places:
            return length
        if len(places) == 1 and self._is_straight(spec, places[0], len(buffer)):
            return self._copy_straight(spec, places[0], offset, length, source, at, buffer)

        def elements(first: int, count: int) -> Tensor:
            piece = buffer[: count * spec.itemsize]
            source.read_into(piece, spec.offset + first * spec.itemsize, name)
            return torch.frombuffer(piece, dtype=dtype_of(spec))

        self.fill(name, elements, len(buffer) // spec.itemsize)
        return length

    def fill(self, name: str, elements: Elements, most: int) -> None:
        """Takes all of the source's tensor `name` to its places, at `most` so many elements at a
        time."""
        for place in self._places.get(name, ()):
            held, into = self._into(place.target)
            target = into if held.part.is_whole else into.view(held.part.held)
            for inside in held.part.inside(place):
                for piece in inside.spans(most):
                    some = elements(piece.first, piece.span)
                    target[piece.target_index()].copy_(some.as_strided(piece.shape, piece.steps))

    def _is_straight(self, spec: TensorSpec, place: Place, room: int) -> bool:
        """Whether the tensor is the target, element for element, and can come in runs of `room`
        bytes: of whole rows, if a part of it is held."""
        held = self._targets[place.target]
        same = place.whole and place.shape == spec.shape and place.first == 0
        fits = held.part.is_whole or held.part.shape[-1] * spec.itemsize <= room
        return same and place.steps == strides(spec.shape) and held.tensor.is_contiguous() and fits

    def _copy_straight(
        self,
        spec: TensorSpec,
        place: Place,
        offset: int,
        length: int,
        source: ShardReader,
        at: int,
        buffer: memoryview,
    ) -> int:
        held, into = self._into(place.target)
        begin, end = (element * spec.itemsize for element in held.part.span())
        if not begin <= offset < end:
            # Other ranks' rows are not read.
            size = min(length, begin - offset) if offset < begin else length
            with self._lock:
                self.passed_over += size
            return size
        width = spec.itemsize * (1 if held.part.is_whole else held.part.shape[-1])
        size = min(length, end - offset, len(buffer) // width * width)
        source.read_into(buffer[:size], at, spec.name)
        source.give_back(at, size)
        values = torch.frombuffer(buffer[:size], dtype=dtype_of(spec))
        held.part.take(into, offset // spec.itemsize, values)
        return size

    def _into(self, name: str) -> tuple[Held, Tensor]:
        """The tensor called `name`, and where what comes for it goes: to a copy, where its unit
        is to change all at once."""
        held = self._targets[name]
        if self._units is None:
            return held, held.values
        with self._lock:
            staged = self._staged[self._unit_of(name)]
            if name not in staged:
                # What no layer writes, as of a part that never came, stays what it is.
                with torch.inference_mode(False):
                    staged[name] = held.values.clone()
            return held, staged[name]

    def _claim(self, name: str, size: int, first: int, count: int) -> None:
        with self._lock:
            try:
                self._came.setdefault(name, Coverage(size)).add(first, first + count)
            except ValueError as error:
                raise CheckpointError(f"tensor {name!r}: {error}") from None

    def put(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Takes whole tensors, by the names of their targets: all of the layer `number`."""
        for name, tensor in tensors.items():
            held, into = self._into(name)
            into.copy_(held.part.of_whole(tensor))
        self.finished(number)

    def finished(self, layer: int) -> None:
        """Puts a unit in place whose last layer this was."""
        if self._units is None:
            return
        unit = self._units[layer]
        with self._lock:
            self._left[unit] -= 1
            if self._left[unit]:
                return
            staged = self._staged.pop(unit, {})
        for name, tensor in staged.items():
            self._targets[name].values.copy_(tensor)
        self.changed.add(unit)
