"""Codes and scales against the weight that they stand for, in a pass over it that stays in cache.

Tile by tile, as fp8.py quantizes: the quotient weight / scale is cast once more and compared with
the stored codes as bytes, which settles all of a tile at once where they are equal. What is left of
the quotient when the codes are taken from it is the error, in units of the scale. Sums are kept for
each row, so that several weights may lie below each other in a slab.

Codes that others wrote need not be ours: a quotient of bfloat16 numbers, or one rounded twice, is
within 2^-8 of the true one, and rounding never changes an order. So their code must lie between
those of quotient * (1 - 2^-8) and of quotient * (1 + 2^-8).

Nor need their scales be ours, but they must fit the values: codes that are right under a scale of a
million are all zero. See `scale_bounds`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8stream.fp8 import FP8_MAX, Quantizer, divide, multiply, scale_of_tile
from fp8stream.scheme import Granularity

# What a scratch takes for each of its elements: the quotients, the decoded codes, two bytes.
BYTES_AN_ELEMENT = 4 + 4 + 2
BOUND = 2.0**-8
# What a number loses that goes through bfloat16 twice, as a scale that is made of its inverse.
_TWICE_ROUNDED = 2.0**-7
# How many times the least a scale may be. One that is rounded up to a power of two is twice that;
# one of a tensor may be shared with other tensors, of larger values.
ROOM = {Granularity.CHANNEL: 16, Granularity.BLOCK: 16, Granularity.TENSOR: 64}
# Tools keep scales from becoming smaller than this, whatever the values: the epsilon of float32, or
# a largest value of 1e-4.
_FLOOR = 2.0**-22
_MAGNITUDE, _SIGN, _LARGEST = 0x7F, 0x80, 0x7E
# The bits of a code, shifted, are those of a float16 that is smaller by this.
_HALF = 256.0
_BYTES_A_WORD = 8
# Where the second of two scratches may begin, to be read by words.
_ALIGNED = 64


@dataclass(frozen=True)
class Rows:
    """What was found in each row of a slab.

    `error` and `weight` (float64) are sums of squares, `largest` (float32) the largest error;
    `zeros` and `saturated` count codes, as `wrong` does those that are not as they must be, of
    which `first` is the first column, and `expected` the code that must stand there.
    """

    error: Tensor
    weight: Tensor
    largest: Tensor
    zeros: Tensor
    saturated: Tensor
    wrong: Tensor
    first: Tensor
    expected: Tensor

    @staticmethod
    def zero(rows: int) -> "Rows":
        error, weight = (torch.zeros(rows, dtype=torch.float64) for _ in range(2))
        zeros, saturated, wrong, first = (torch.zeros(rows, dtype=torch.int32) for _ in range(4))
        expected = torch.zeros(rows, dtype=torch.uint8)
        return Rows(error, weight, torch.zeros(rows), zeros, saturated, wrong, first, expected)


class Comparer:
    """Compares slabs of rows through scratches that are used again and again, on the CPU."""

    def __init__(self, quantizer: Quantizer, scratch_elements: int) -> None:
        """`quantizer` has a scratch of `scratch_elements`; those here come on top of it."""
        self.quantizer = quantizer
        self._decoded = torch.empty(scratch_elements, dtype=torch.float32)
        self._half = torch.empty(scratch_elements + _ALIGNED, dtype=torch.int16)

    def compare(
        self,
        weight: Tensor,
        codes: Tensor,
        granularity: Granularity,
        scale: Tensor,
        stored: Tensor,
        exact: bool,
    ) -> Rows:
        """Compares `codes` [rows, columns] (float8_e4m3fn) with `weight` of the same shape.

        Codes must be those under `scale`, or if not `exact` within the bound of them; errors are
        those under the `stored` scales. Both are float32, shaped as the granularity says.
        """
        found = Rows.zero(weight.shape[0])
        same = scale is stored or torch.equal(scale, stored)
        for rows, columns in self.quantizer.tiles(weight.shape, granularity):
            tile, tile_codes = weight[rows, columns], codes[rows, columns].view(torch.uint8)
            part = scale_of_tile(scale, granularity, rows, columns)
            wide = self.quantizer.widen(tile)
            found.weight[rows] += _squares(wide)
            divide(wide, part, granularity)
            self._check(wide, tile_codes, exact, found, rows, columns.start)
            self._count(tile_codes, found, rows)
            if not same:
                part = scale_of_tile(stored, granularity, rows, columns)
                divide(self.quantizer.widen(tile), part, granularity)
            self._measure(wide, tile_codes, part, granularity, found, rows)
        return found

    def _bytes(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Two scratches of bytes, one for each element of a tile."""
        size, pool = shape.numel(), self._half.view(torch.uint8)
        begin = -(-size // _ALIGNED) * _ALIGNED
        return pool[:size].view(shape), pool[begin : begin + size].view(shape)

    def _check(
        self, wide: Tensor, codes: Tensor, exact: bool, found: Rows, rows: slice, column: int
    ) -> None:
        """Notes the codes that are not those of the quotients `wide`."""
        expected, there = self._bytes(codes.shape)
        there.copy_(codes)
        expected.view(torch.float8_e4m3fn).copy_(wide if exact else self._times(wide, 1))
        if _are_equal(expected, there):
            return
        wrong = torch.ne(expected, there, out=there) if exact else self._outside(wide, codes)
        if not exact:
            if not _has_any(wrong):
                return
            wrong = wrong.clone()  # a scratch is in the way
            expected.view(torch.float8_e4m3fn).copy_(self._times(wide, 1))
        _note(wrong, expected, found, rows, column)

    def _times(self, quotient: Tensor, factor: float) -> Tensor:
        """Quotients times `factor` in the second scratch, as large as any code can say."""
        wide = self._decoded[: quotient.numel()].view(quotient.shape)
        torch.mul(quotient, factor, out=wide)
        wide.clamp_(-FP8_MAX, FP8_MAX)
        return wide

    def _outside(self, quotient: Tensor, codes: Tensor) -> Tensor:
        """Nonzero bytes where a code is none that lies within the bound of its quotient."""
        least, most = self._bytes(codes.shape)
        least.view(torch.float8_e4m3fn).copy_(self._times(quotient, 1 - BOUND))
        most.view(torch.float8_e4m3fn).copy_(self._times(quotient, 1 + BOUND))
        quarters = self._decoded.view(torch.uint8)[: 4 * codes.numel()].view(4, *codes.shape)
        magnitude, other, wrong, signs = quarters.unbind()
        torch.bitwise_and(codes, _MAGNITUDE, out=magnitude)
        # Of a code that is zero the sign says nothing.
        torch.ne(magnitude, 0, out=signs).mul_(_SIGN)
        torch.bitwise_xor(codes, least, out=wrong).bitwise_and_(signs)
        torch.lt(magnitude, least.bitwise_and_(_MAGNITUDE), out=other)
        wrong.bitwise_or_(other)
        torch.gt(magnitude, most.bitwise_and_(_MAGNITUDE), out=other)
        wrong.bitwise_or_(other)
        return wrong

    def _count(self, codes: Tensor, found: Rows, rows: slice) -> None:
        """Counts the codes at zero and at the limit."""
        magnitude, equal = self._bytes(codes.shape)
        torch.bitwise_and(codes, _MAGNITUDE, out=magnitude)
        found.zeros[rows] += _row_sums(torch.eq(magnitude, 0, out=equal))
        found.saturated[rows] += _row_sums(torch.eq(magnitude, _LARGEST, out=equal))

    def _measure(
        self,
        quotient: Tensor,
        codes: Tensor,
        scale: Tensor,
        granularity: Granularity,
        found: Rows,
        rows: slice,
    ) -> None:
        """Adds up the squares of errors, and finds the largest; `quotient` becomes the errors."""
        half = self._half[: codes.numel()].view(codes.shape).copy_(codes.view(torch.int8))
        half.bitwise_left_shift_(7).bitwise_and_(~0x4000)
        decoded = self._decoded[: codes.numel()].view(codes.shape).copy_(half.view(torch.float16))
        quotient.sub_(decoded, alpha=_HALF)
        if granularity is Granularity.BLOCK:
            # A row has many scales, so that all is weighed before it is added up.
            multiply(quotient, scale, granularity)
            scale = torch.ones(1)
        each = scale.reshape(-1)
        found.error[rows] += _squares(quotient) * each.double().square_()
        largest = quotient.abs_().amax(1) * each
        torch.maximum(found.largest[rows], largest, out=found.largest[rows])


@dataclass(frozen=True)
class ScaleBounds:
    """What the scales of another tool may be, float32, for groups of some largest values: at least
    `least` and at most `most`. `usual` is the most that leaves values the precision of the format;
    above are those that a tool or a dtype keeps from becoming any smaller."""

    least: Tensor
    usual: Tensor
    most: Tensor


def scale_bounds(amax: Tensor, dtype: torch.dtype, granularity: Granularity) -> ScaleBounds:
    """The bounds of scales in `dtype` for groups whose largest magnitudes are `amax` (float32).

    Any scale will do for a group of zeros, and where `dtype` has no number as small as the scale.
    """
    due = (amax / FP8_MAX).to(dtype).float()
    numbers = torch.finfo(dtype)
    least = due * (1 - _TWICE_ROUNDED) - numbers.smallest_normal * numbers.eps
    usual = due * ROOM[granularity]
    return ScaleBounds(least, usual, usual.clamp(min=_FLOOR).masked_fill(due == 0, torch.inf))


def largest_relative_error(groups: float, squares: float) -> float:
    """The most that the norm of a weight's error may be over that of the weight itself.

    `squares` is the square of the latter, `groups` the sum, over all of the weight's values, of the
    squares of their scales: by which the values are wrong that are subnormal under these.
    """
    return float(((2.0**-4 + _TWICE_ROUNDED) ** 2 + 1.25 * 2.0**-20 * groups / squares) ** 0.5)


def _squares(wide: Tensor) -> Tensor:
    """The sum of squares of each row of `wide`, float64 [rows]."""
    norms: Tensor = torch.linalg.vector_norm(wide, 2, dim=1)
    squares = norms.double().square_()
    odd = ~((squares > _SURE[0]) & (squares < _SURE[1]))
    if bool(odd.any()):
        # Beyond what float32 has squares of, unless it is a row of zeros.
        step = max(1, _SUMMED_AT_ONCE // max(1, wide.shape[1]))
        for rows in torch.split(torch.nonzero(odd & wide.any(1)).flatten(), step):
            squares[rows] = wide[rows].double().square_().sum(1)
    return squares


# Sums of squares between these are right in float32.
_SURE = (2.0**-80, 2.0**120)


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two contiguous tensors of bytes, at addresses of whole words, are the same."""
    size = one.numel() // _BYTES_A_WORD * _BYTES_A_WORD
    one, other = one.reshape(-1), other.reshape(-1)
    words = (part[:size].view(torch.int64) for part in (one, other))
    return torch.equal(*words) and torch.equal(one[size:], other[size:])


def _has_any(flags: Tensor) -> bool:
    return bool(flags.amax())


def _row_sums(flags: Tensor) -> Tensor:
    """How many of the bytes of each row are 1, as whole numbers [rows]."""
    rows, columns = flags.shape
    words = columns // _BYTES_A_WORD
    # Each byte of a sum of words is a sum of bytes, as long as those are no more than 255.
    together = next(
        count for count in range(min(words, 128), -1, -1) if not count or not words % count
    )
    if columns % _BYTES_A_WORD or together < 4:
        step = max(1, _SUMMED_AT_ONCE // max(1, columns))
        parts = [flags[row : row + step].sum(1) for row in range(0, rows, step)]
        return torch.cat(parts)
    sums = flags.view(torch.int64).view(rows, -1, together).sum(2)
    for shift, mask in _FOLDS:
        sums = (sums & mask) + ((sums >> shift) & mask)
    return sums.sum(1)


# Bytes of a word to pairs of them, and so on, up to one number.
_FOLDS = ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0xFFFFFFFF))
_SUMMED_AT_ONCE = 32768


def _note(wrong: Tensor, expected: Tensor, found: Rows, rows: slice, column: int) -> None:
    """Counts what is `wrong` in each row, and remembers the first of each."""
    for row in torch.nonzero(wrong.amax(1)).flatten().tolist():
        flags = wrong[row] != 0
        at, place = rows.start + row, int(flags.byte().argmax())
        if not found.wrong[at]:
            found.first[at] = column + place
            found.expected[at] = expected[row, place]
        found.wrong[at] += int(flags.sum())
