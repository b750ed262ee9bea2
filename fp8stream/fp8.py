"""All the numerics: amax -> weight_scale -> float8_e4m3fn codes, and back.

A weight goes through tile by tile, in a scratch small enough to stay in cache: first amax, on the
bits of |weight|, whose order as integers is that of the numbers; then one widening to float32, one
true division, one cast. A tile never changes a result, since max is exact and everything else works
on one element, so every device, thread count and slab size gives the same bytes.

    weight_scale = max(amax / 448, smallest normal float32), and 1 where amax is 0
    code         = round to nearest even, float8_e4m3fn, of weight / weight_scale
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from fp8stream.scheme import BLOCK, Granularity

FP8_MAX = 448.0
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
# As integers magnitudes are ordered as the numbers are, infinity and then NaN above all.
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def weight_scale(amax: Tensor) -> Tensor:
    """The float32 scale of groups whose largest magnitude is `amax` (float32, any shape).

    NaN and infinity stay visible in the scale: see `is_finite`.
    """
    # Tensors, not Python numbers: CUDA turns division by a number into multiplication by its
    # reciprocal, which rounds otherwise.
    limit = torch.full((), FP8_MAX, device=amax.device)
    scale = (amax / limit).clamp(min=SMALLEST_NORMAL)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def is_finite(scale: Tensor) -> bool:
    """Whether the weights behind `scale` are all finite: a NaN or infinity among them shows here.

    Torch casts infinity to 448 without a word, so this must be asked before codes are kept.
    """
    return bool(torch.isfinite(scale).all())


class Quantizer:
    """Quantizes slabs of rows through one reused float32 scratch.

    `scratch_elements` must hold one row at least, and 128x128 elements. Weights are [rows, columns]
    in bfloat16, float16 or float32; codes are [rows, columns] float8_e4m3fn on the same device.
    """

    def __init__(self, device: torch.device, scratch_elements: int) -> None:
        self._scratch = torch.empty(scratch_elements, dtype=torch.float32, device=device)

    def amax(self, weight: Tensor, granularity: Granularity) -> Tensor:
        """The largest magnitude of each scale group, float32, shaped as the granularity says.

        NaN where a group has one. Under tensor granularity [1], whatever part `weight` is.
        """
        bits = _BITS[weight.dtype]
        shape = granularity.scale_shape(weight.shape)
        largest = torch.zeros(shape, dtype=bits, device=weight.device)
        for rows, columns in self.tiles(weight.shape, granularity):
            magnitudes = self._magnitudes(weight[rows, columns]).view(bits)
            if granularity is Granularity.BLOCK:
                largest[_blocks(rows), _blocks(columns)] = _amax_of_blocks(magnitudes)
            elif granularity is Granularity.CHANNEL:
                torch.amax(magnitudes, 1, keepdim=True, out=largest[rows])
            else:
                torch.maximum(largest, magnitudes.amax(), out=largest)
        return largest.view(weight.dtype).float()

    def quantize(
        self, weight: Tensor, granularity: Granularity, codes: Tensor, scale: Tensor | None = None
    ) -> Tensor:
        """Fills `codes` and returns the float32 scales of `weight`, shaped as the granularity says.

        Under tensor granularity `scale` [1] may be given, when the group is larger than `weight`.
        Under block granularity a slab that is not the weight's last has a multiple of 128 rows.
        """
        scale = weight_scale(self.amax(weight, granularity)) if scale is None else scale
        for rows, columns in self.tiles(weight.shape, granularity):
            wide = self.widen(weight[rows, columns])
            divide(wide, scale_of_tile(scale, granularity, rows, columns), granularity)
            # A clamp to +-448 would change nothing: with scale >= amax / 448 rounded once, the
            # quotient is at most 448.00003, which rounds to 448 whether or not the cast saturates.
            codes[rows, columns].copy_(wide)
        return scale

    def widen(self, tile: Tensor) -> Tensor:
        """`tile` in float32, in the scratch."""
        return self._scratch[: tile.numel()].view(tile.shape).copy_(tile)

    def _magnitudes(self, tile: Tensor) -> Tensor:
        """|tile| in its own dtype, in the scratch; laid out as `tile` is, so that it streams."""
        flat = self._scratch.view(tile.dtype)[: tile.numel()]
        if tile.stride(0) < tile.stride(1):
            return torch.abs(tile, out=flat.view(tile.shape[1], tile.shape[0]).T)
        return torch.abs(tile, out=flat.view(tile.shape))

    def tiles(self, shape: torch.Size, granularity: Granularity) -> Iterator[tuple[slice, slice]]:
        """The parts of a slab that fit the scratch, of whole scale groups or of one tensor's."""
        if granularity is Granularity.BLOCK:
            return self._block_tiles(shape)
        rows, columns = shape
        step = max(1, self._scratch.numel() // max(1, columns))
        every = slice(0, columns)
        return ((slice(row, min(row + step, rows)), every) for row in range(0, rows, step))

    def _block_tiles(self, shape: torch.Size) -> Iterator[tuple[slice, slice]]:
        """Whole blocks that fit the scratch; a ragged last band of rows is a tile of its own."""
        rows, columns = shape
        width = min(columns, max(BLOCK, self._scratch.numel() // BLOCK // BLOCK * BLOCK))
        height = max(BLOCK, self._scratch.numel() // max(1, width) // BLOCK * BLOCK)
        even = rows // BLOCK * BLOCK
        edges = [*range(0, even, height), even]
        bands = [slice(a, b) for a, b in pairwise(edges) if a < b]
        if even < rows:
            bands.append(slice(even, rows))
        for band in bands:
            for column in range(0, columns, width):
                yield band, slice(column, min(column + width, columns))


def _amax_of_blocks(tile: Tensor) -> Tensor:
    """[bands, blocks] of a tile [bands * 128 or a ragged last band, columns]."""
    columns = _bands(tile).amax(1)
    even = columns.shape[1] // BLOCK * BLOCK
    whole = columns[:, :even].view(len(columns), -1, BLOCK).amax(2)
    if even == columns.shape[1]:
        return whole
    return torch.cat((whole, columns[:, even:].amax(1, keepdim=True)), 1)


def _widen_blocks(scale: Tensor, columns: int) -> Tensor:
    """Block scales [bands, blocks] as [bands, 1, columns]: one for each column of a band."""
    return scale.repeat_interleave(BLOCK, dim=1)[:, None, :columns]


def _bands(tile: Tensor) -> Tensor:
    """`tile` [rows, columns] seen as [bands, 128 or a ragged last band's rows, columns]."""
    return tile.view(-1, min(BLOCK, tile.shape[0]), tile.shape[1])


def _blocks(part: slice) -> slice:
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))


def scale_of_tile(scale: Tensor, granularity: Granularity, rows: slice, columns: slice) -> Tensor:
    """What part of a slab's scales is the tile's."""
    if granularity is Granularity.BLOCK:
        return scale[_blocks(rows), _blocks(columns)]
    return scale[rows] if granularity is Granularity.CHANNEL else scale


def divide(wide: Tensor, scale: Tensor, granularity: Granularity) -> Tensor:
    """A float32 tile over its scales, in its place."""
    if granularity is Granularity.BLOCK:
        _bands(wide).div_(_widen_blocks(scale, wide.shape[1]))
        return wide
    return wide.div_(scale)


def multiply(wide: Tensor, scale: Tensor, granularity: Granularity) -> Tensor:
    """A float32 tile times its scales, in its place."""
    if granularity is Granularity.BLOCK:
        _bands(wide).mul_(_widen_blocks(scale, wide.shape[1]))
        return wide
    return wide.mul_(scale)


def quantize_weight(weight: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Codes and float32 scales of a whole weight [out, in]; NaN and infinity show in the scales."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scratch = max(BLOCK * BLOCK, weight.numel())
    scales = Quantizer(weight.device, scratch).quantize(weight, granularity, codes)
    return codes, scales


def dequantize_weight(codes: Tensor, scale: Tensor) -> Tensor:
    """`codes` [out, in] times `scale` ([1], [out, 1] or [ceil(out/128), ceil(in/128)]), float32."""
    wide = codes.float()
    if scale.ndim == 2 and scale.shape != (wide.shape[0], 1):
        blocks = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        return wide * blocks[: wide.shape[0], : wide.shape[1]]
    return wide * scale
