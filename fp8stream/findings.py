"""What is found of a tensor, added up over the slabs that it goes through in.

A tensor with a thousand wrong values is one problem: how many there are, and the first of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fp8stream.comparison import ROOM, Rows, largest_relative_error, scale_bounds
from fp8stream.device import TORCH_DTYPES
from fp8stream.expectation import LayerError, Problem
from fp8stream.fp8 import FP8_MAX
from fp8stream.header import TensorSpec
from fp8stream.plan import Slab
from fp8stream.scheme import BLOCK, Granularity
from fp8stream.views import View
from fp8stream.weights import WeightPlan


@dataclass
class Difference:
    """How many of `total` values are not as they must be, and the first of them."""

    total: int
    count: int = 0
    place: list[int] = field(default_factory=list)
    expected: str = ""
    found: str = ""

    def add(self, count: int, place: list[int], expected: str, found: str) -> None:
        """`count` values of a part that comes after those before; `place` is that of the first."""
        if not self.count:
            self.place, self.expected, self.found = place, expected, found
        self.count += count

    def says(self, what: str) -> str:
        """The problem, of values called `what`."""
        return (
            f"{self.count} of {self.total} {what} differ, the first at {self.place}: expected "
            f"{self.expected}, found {self.found}"
        )

    def says_of_scales(self, what: str) -> str:
        """The problem, of scales that are `what`."""
        which = f"{self.count} of {self.total} scales are {what}, the first at {self.place}"
        which = which if self.total > 1 else f"the scale is {what}"
        return f"{which}: expected {self.expected}, found {self.found}"


class WeightSums:
    """What is added up over the slabs of a weight, which come in order."""

    def __init__(self, weight: WeightPlan) -> None:
        grid = torch.Size(weight.granularity.scale_shape(weight.shape))
        self.weight = weight
        self.finite = True
        self._size = weight.shape[0] * weight.shape[1]
        self._squares = self._error = self._largest = 0.0
        self._zeros = self._saturated = self._ones = self._not_scales = 0
        self._codes, self._scales = Difference(self._size), Difference(grid.numel())
        self._small, self._large = Difference(grid.numel()), Difference(grid.numel())
        together = {Granularity.CHANNEL: weight.shape[1], Granularity.BLOCK: BLOCK * BLOCK}
        self._values_a_scale = together.get(weight.granularity, self._size)
        self._squares_of_scales = 0.0
        # Of a weight with one scale.
        self._amax = torch.zeros(1)
        self._one: Tensor | None = None

    def add(self, rows: Rows, part: slice, first_row: int, codes: Tensor) -> None:
        """Of a batch with these `rows` and `codes` (bytes), the part that is a slab of the weight.

        `first_row` is that of the slab in the weight.
        """
        self._squares += float(rows.weight[part].sum())
        self._error += float(rows.error[part].sum())
        largest = float(rows.largest[part].amax())
        self._largest = max(self._largest, largest) if largest == largest else largest
        self._zeros += int(rows.zeros[part].sum())
        self._saturated += int(rows.saturated[part].sum())
        wrong = rows.wrong[part]
        if bool(wrong.amax()):
            row = _first(wrong != 0)
            column = int(rows.first[part][row])
            place = self.weight.codes_at.index(first_row + row, column, self.weight.codes.shape)
            expected, found = int(rows.expected[part][row]), int(codes[part][row, column])
            self._codes.add(int(wrong.sum()), place, f"0x{expected:02x}", f"0x{found:02x}")

    def add_scales(self, stored: Tensor, due: Tensor | None, slab: Slab) -> None:
        """The float32 scales `stored` for a slab, which must be those that are `due`, if any."""
        granularity = self.weight.granularity
        if granularity is Granularity.TENSOR and slab.first_row:
            return  # they came with the first
        self._ones += int((stored == 1).sum())
        good = torch.isfinite(stored) & (stored > 0)
        self._not_scales += good.numel() - int(good.sum())
        if due is not None:
            self.compare_scales(due, stored, slab.first_row // granularity.row_multiple)

    def fit_scales(self, stored: Tensor, amax: Tensor, slab: Slab) -> None:
        """Another tool's scales `stored` for a slab, of groups whose largest values are `amax`."""
        granularity = self.weight.granularity
        if granularity is Granularity.TENSOR:
            self._amax, self._one = torch.maximum(self._amax, amax), stored
        else:
            self._fit(stored, amax, slab.first_row // granularity.row_multiple)

    def _fit(self, stored: Tensor, amax: Tensor, first: int) -> None:
        """Notes what scales do not fit the values; `first` is the first row of them."""
        weight = self.weight
        bounds = scale_bounds(amax, TORCH_DTYPES[weight.scales.dtype], weight.granularity)
        least, room = amax / FP8_MAX, ROOM[weight.granularity]
        of, large = "the largest value / 448", stored > bounds.most
        words = f"at least {{:.3g}} ({of})", f"at most {{:.3g}} ({room} times {of})"
        self._note(self._small, stored < bounds.least, least, stored, first, words[0])
        self._note(self._large, large, bounds.usual, stored, first, words[1])
        usual = stored[stored <= bounds.usual].double().square_()
        self._squares_of_scales += float(usual.sum()) * self._values_a_scale

    def compare_scales(self, due: Tensor, stored: Tensor, first: int) -> None:
        """Scales to the bit; `first` is the first row of them in the weight's."""
        if same_bits(due, stored):
            return
        wrong = due.view(torch.int32) != stored.view(torch.int32)
        self._note(self._scales, wrong, due, stored, first, "{:.9g}")

    def _note(
        self,
        differs: Difference,
        wrong: Tensor,
        due: Tensor,
        stored: Tensor,
        first: int,
        words: str,
    ) -> None:
        """The scales that are `wrong`; `words` are for what is `due`, and have its digits."""
        if not bool(wrong.any()):
            return
        at, weight = _first(wrong.reshape(-1)), self.weight
        row, column = divmod(at, due.shape[-1])
        place = weight.scales_at.index(first + row, column, weight.scales.shape)
        expected, found = (float(scales.reshape(-1)[at]) for scales in (due, stored))
        differs.add(int(wrong.sum()), place, words.format(expected), f"{found:.9g}")

    def result(self) -> LayerError:
        """The error of the whole weight."""
        relative = (self._error / self._squares) ** 0.5 if self._squares else 0.0
        return LayerError(
            self.weight.name,
            _number(relative if self._squares or not self._error else float("inf")),
            _number(self._largest),
            self._zeros / self._size,
            self._saturated / self._size,
            self._ones,
        )

    def problems(self, found: Mapping[str, TensorSpec], exact: bool) -> Iterator[Problem]:
        """What is wrong with the weight's tensors, which `found` tells the files of."""
        codes, scales = found[self.weight.codes.name], found[self.weight.scales.name]
        if not self.finite:
            source = "the source has NaN or infinity here, which has no code"
            yield Problem(codes.file, codes.name, source)
            return
        if self._scales.count:
            yield Problem(scales.file, scales.name, self._scales.says("scales"))
        elif self._not_scales:
            wrong = f"{self._not_scales} of {self._scales.total} scales are not positive numbers"
            yield Problem(scales.file, scales.name, wrong)
            return
        elif not exact:
            yield from self._ill_fitting(scales)
        if self._codes.count:
            what = "codes" if exact else "codes beyond the bound"
            yield Problem(codes.file, codes.name, self._codes.says(what))
        elif not (exact or self._small.count or self._large.count):
            yield from self._too_far(codes)

    def _ill_fitting(self, scales: TensorSpec) -> Iterator[Problem]:
        """Scales that do not fit the values."""
        if self._one is not None:
            self._fit(self._one, self._amax, 0)
        for differs, what in ((self._small, "too small"), (self._large, "too large")):
            if differs.count:
                yield Problem(scales.file, scales.name, differs.says_of_scales(what))

    def _too_far(self, codes: TensorSpec) -> Iterator[Problem]:
        """A weight that has lost more than the format takes, although its scales are in bounds:
        they may be the smallest of a tool."""
        if not self._squares:
            return
        relative = (self._error / self._squares) ** 0.5
        most = largest_relative_error(self._squares_of_scales, self._squares)
        if not relative <= most:
            wrong = (
                "the values are lost under the scales: expected a relative error of at most "
                f"{most:.3g}, found {relative:.3g}"
            )
            yield Problem(codes.file, codes.name, wrong)


def compare_bytes(
    first: memoryview, second: memoryview, begin: int, spec: TensorSpec, differs: Difference
) -> None:
    """Notes where two runs of bytes, from byte `begin` of a tensor on, differ."""
    one, other = (torch.frombuffer(part, dtype=torch.uint8) for part in (first, second))
    words = len(one) // 8 * 8
    same = torch.equal(one[:words].view(torch.int64), other[:words].view(torch.int64))
    if same and torch.equal(one[words:], other[words:]):
        return
    wrong = one != other
    at = _first(wrong)
    place = View(0, 1).index((begin + at) // spec.itemsize, 0, spec.shape)
    differs.add(int(wrong.sum()), place, f"0x{int(one[at]):02x}", f"0x{int(other[at]):02x}")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two float32 tensors are the same, NaN and the signs of zeros included."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def _first(flags: Tensor) -> int:
    return int(flags.byte().argmax())


def _number(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
