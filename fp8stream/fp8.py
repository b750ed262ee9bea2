"""All the numerics: amax -> weight_scale -> float8_e4m3fn codes, and back.

A weight is widened to float32 one tile at a time, into a scratch small enough to stay in cache, and
everything happens there: amax, one true division, one cast. A tile never changes a result, since a
scale group always lies within one (or, for tensor scales, amax is taken first and max is exact), so
every device, thread count and slab size gives the same bytes.

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

    `scratch_elements` must hold one row at least. Weights are [rows, columns] in bfloat16, float16
    or float32; codes are [rows, columns] float8_e4m3fn on the same device.
    """

    def __init__(self, device: torch.device, scratch_elements: int) -> None:
        self._scratch = torch.empty(scratch_elements, dtype=torch.float32, device=device)

    def amax(self, weight: Tensor) -> Tensor:
        """The largest magnitude in `weight`: a float32 scalar on its device, NaN if it has one."""
        tiles = [_amax(self._widen(weight[rows])) for rows in self._row_tiles(weight.shape)]
        return torch.stack(tiles).amax()

    def quantize(
        self, weight: Tensor, granularity: Granularity, codes: Tensor, scale: Tensor | None = None
    ) -> Tensor:
        """Fills `codes` and returns the float32 scales of `weight`, shaped as the granularity says.

        Under tensor granularity `scale` [1] may be given, when the group is larger than `weight`.
        Under block granularity a slab that is not the weight's last has a multiple of 128 rows.
        """
        if granularity is Granularity.BLOCK:
            return self._quantize_blocks(weight, codes)
        if granularity is Granularity.CHANNEL:
            return self._quantize_rows(weight, codes)
        scale = weight_scale(self.amax(weight)).reshape(1) if scale is None else scale
        for rows in self._row_tiles(weight.shape):
            _encode(self._widen(weight[rows]), scale, codes[rows])
        return scale

    def _quantize_rows(self, weight: Tensor, codes: Tensor) -> Tensor:
        scales = torch.empty((weight.shape[0], 1), device=weight.device)
        for rows in self._row_tiles(weight.shape):
            tile = self._widen(weight[rows])
            scales[rows] = weight_scale(_amax(tile, 1))[:, None]
            _encode(tile, scales[rows], codes[rows])
        return scales

    def _quantize_blocks(self, weight: Tensor, codes: Tensor) -> Tensor:
        shape = Granularity.BLOCK.scale_shape(weight.shape)
        scales = torch.empty(shape, device=weight.device)
        for rows, columns in self._block_tiles(weight.shape):
            tile = self._widen(weight[rows, columns])
            scale = weight_scale(_amax_of_blocks(tile))
            scales[_blocks(rows), _blocks(columns)] = scale
            wide = scale.repeat_interleave(BLOCK, dim=1)[:, None, : tile.shape[1]]
            _encode(_bands(tile), wide, _bands(codes[rows, columns]))
        return scales

    def _widen(self, tile: Tensor) -> Tensor:
        """`tile` in float32, in the scratch."""
        return self._scratch[: tile.numel()].view(tile.shape).copy_(tile)

    def _row_tiles(self, shape: torch.Size) -> Iterator[slice]:
        rows, columns = shape
        step = max(1, self._scratch.numel() // max(1, columns))
        return (slice(row, min(row + step, rows)) for row in range(0, rows, step))

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


def _amax(tile: Tensor, *dims: int) -> Tensor:
    """The largest magnitude along `dims`; two reductions beat one pass over a copy of |tile|."""
    return torch.maximum(torch.amax(tile, dims), -torch.amin(tile, dims))


def _amax_of_blocks(tile: Tensor) -> Tensor:
    """[bands, blocks] of a tile [bands * 128 or a ragged last band, columns]."""
    columns = _amax(_bands(tile), 1)
    # Padding in the mathematics only: the ragged last block is filled up with zeros.
    padded = torch.nn.functional.pad(columns, (0, -columns.shape[1] % BLOCK))
    return padded.view(len(columns), -1, BLOCK).amax(2)


def _bands(tile: Tensor) -> Tensor:
    """`tile` [rows, columns] seen as [bands, 128 or a ragged last band's rows, columns]."""
    return tile.view(-1, min(BLOCK, tile.shape[0]), tile.shape[1])


def _blocks(part: slice) -> slice:
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))


def _encode(tile: Tensor, scale: Tensor, codes: Tensor) -> None:
    """`codes` of a float32 `tile`, which is overwritten.

    A clamp to +-448 would change nothing: with scale >= amax / 448 rounded once, the quotient is at
    most 448.00003, which rounds to 448 whether or not the cast saturates.
    """
    codes.copy_(tile.div_(scale))


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
