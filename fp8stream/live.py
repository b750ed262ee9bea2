"""A live model's tensors as the place where codes, scales and kept tensors go.

A sink like the writer of files, but what comes is copied into storage that is there already and
stays where it is. Of a model that is spread over ranks each holds a part, and takes from what comes
what is its own, so that the parts put together are the whole to the bit.
"""

import math
import threading
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8stream.coverage import Coverage
from fp8stream.device import TORCH_DTYPES, bytes_of
from fp8stream.errors import CheckpointError
from fp8stream.header import TensorSpec
from fp8stream.places import Place, strides
from fp8stream.reader import ShardReader
from fp8stream.views import Runs


@dataclass(frozen=True)
class Part:
    """What of a tensor of `shape` a rank holds: a range of each of its sides."""

    shape: tuple[int, ...]
    ranges: tuple[range, ...]

    @staticmethod
    def whole(shape: Sequence[int]) -> "Part":
        return Part(tuple(shape), tuple(map(range, shape)))

    @property
    def is_whole(self) -> bool:
        return self.held == self.shape

    @property
    def held(self) -> tuple[int, ...]:
        """The shape of the part."""
        return tuple(map(len, self.ranges))

    def take(self, into: Tensor, first: int, values: Tensor) -> None:
        """Copies what of `values`, elements `first` and on of the whole, belongs to the part.

        They are whole rows of the last side, unless the part is the whole.
        """
        if self.is_whole:
            into.view(-1)[first : first + len(values)].copy_(values)
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
    part: Part

    @property
    def values(self) -> Tensor:
        """The storage as numbers that can be copied: codes are bytes."""
        narrow = self.tensor.dtype == torch.float8_e4m3fn
        return self.tensor.detach().view(torch.uint8) if narrow else self.tensor.detach()


class ModelSink:
    """Puts what comes into `targets`, by the names that the plan has for them.

    A tensor that is kept goes to the `places` of its name. Each code may come once. Given `units`,
    which say for each layer's number with what it must change together, and `unit_of`, which says
    it of each target, nothing of a unit is touched before all of it came: `changed` holds those
    that are new.
    """

    def __init__(
        self,
        targets: Mapping[str, Held],
        places: Mapping[str, Sequence[Place]],
        specs: Mapping[str, TensorSpec],
        units: Mapping[int, str] | None = None,
        unit_of: Mapping[str, str] | None = None,
    ) -> None:
        self._targets = targets
        self._places = places
        self._specs = specs
        self._units = units
        self._left = Counter((units or {}).values())
        self._staged: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self._unit_of = unit_of or {}
        self._came: dict[str, Coverage] = {}
        self._lock = threading.Lock()
        self.changed: set[str] = set()

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
        if not held.part.is_whole:
            for number, run in enumerate(values):
                self._write(name, held, into, runs.first + number * runs.step, run)
            return
        if into.dtype == torch.uint8:
            turn, at = runs.first // runs.step, runs.first % runs.step
            key = f"{name}[{at}::{runs.step}]"
            self._claim(key, into.numel() // runs.step, turn, runs.count)
        flat = into.view(-1)[runs.first :]
        flat.as_strided(values.shape, (runs.step, 1), flat.storage_offset()).copy_(values)

    def copy(
        self, name: str, offset: int, length: int, source: ShardReader, at: int, buffer: memoryview
    ) -> int:
        """Takes what fits the buffer; all of what does not go to one place as it is."""
        spec, places = self._specs[name], self._places.get(name, ())
        if not places:
            return length
        if len(places) == 1 and self._is_straight(spec, places[0]):
            return self._copy_straight(spec, places[0], offset, length, source, at, buffer)
        whole = torch.empty(spec.shape, dtype=dtype_of(spec))
        source.read_into(bytes_of(whole), spec.offset, name)
        for place in places:
            held, into = self._into(place.target)
            place = place if held.part.is_whole else place.within(held.part.ranges) or place
            if place.shape != () and 0 in place.shape:
                continue
            place.apply(into, whole)
        return length

    def _is_straight(self, spec: TensorSpec, place: Place) -> bool:
        """Whether the tensor is the target, element for element, all of which is held."""
        held = self._targets[place.target]
        same = place.whole and place.shape == spec.shape and place.first == 0
        straight = same and place.steps == strides(spec.shape) and held.part.is_whole
        return straight and held.tensor.is_contiguous()

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
        size = min(length, len(buffer) // spec.itemsize * spec.itemsize)
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
            staged = self._staged[self._unit_of[name]]
            if name not in staged:
                # What no layer writes, as of a part that never came, stays what it is.
                staged[name] = held.values.clone()
            return held, staged[name]

    def _claim(self, name: str, size: int, first: int, count: int) -> None:
        with self._lock:
            try:
                self._came.setdefault(name, Coverage(size)).add(first, first + count)
            except ValueError as error:
                raise CheckpointError(f"tensor {name!r}: {error}") from None

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes whole tensors, by the names of their targets."""
        for name, tensor in tensors.items():
            held = self._targets[name]
            values = tensor[tuple(slice(r.start, r.stop) for r in held.part.ranges)]
            held.values.copy_(values)

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


def dtype_of(spec: TensorSpec) -> torch.dtype:
    """The torch dtype of a checkpoint tensor. Raises CheckpointError for one that torch lacks."""
    found = TORCH_DTYPES.get(spec.dtype) or OTHER_DTYPES.get(spec.dtype)
    if found is None:
        raise CheckpointError(f"{spec.file}: tensor {spec.name!r}: {spec.dtype} cannot be loaded")
    return found


OTHER_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
