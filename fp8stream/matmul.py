"""Products with weights that are codes, as live FP8 modules need them.

Activations are quantized on the way in, a scale for each token, or for each token and 128 inputs
where weights have block scales. Where torch has a kernel for such operands it is used; elsewhere
weights are dequantized in runs of a few MiB, so that a 16-bit copy of a weight never exists.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from fp8stream.fp8 import Quantizer, dequantize_weight, multiply, scale_of_tile, weight_scale
from fp8stream.scheme import BLOCK, Granularity

CODES = torch.float8_e4m3fn
# Elements of a weight that are dequantized at a time: 4 MiB of float32.
_RUN = 1 << 20
# Multiples that kernels want of a weight's two sides, with scales of rows and of blocks.
_ALIGNED = 16
_HALF, _NAN = 256.0, 0x3F80


def quantize_activations(
    x: Tensor,
    granularity: Granularity,
    largest: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes of `x` [tokens, in], and float32 scales by the rule of weights.

    One scale a token, [tokens, 1]; under block granularity one for each 128 inputs, [tokens,
    ceil(in / 128)]. A token, or a group, that has a NaN or infinity gets one for a scale. Where `x`
    has some of a token's inputs alone, `largest` makes of their largest magnitudes those of all.
    """
    wide = x.float()
    columns = wide.shape[1]
    if granularity is not Granularity.BLOCK or columns <= BLOCK:
        amax = wide.abs().amax(1, keepdim=True)
        if largest is not None and granularity is not Granularity.BLOCK:
            amax = largest(amax)
        scale = weight_scale(amax)
        return (wide / scale).to(CODES), scale
    ragged = functional.pad(wide, (0, -columns % BLOCK))
    groups = ragged.view(wide.shape[0], -(-columns // BLOCK), BLOCK)
    scale = weight_scale(groups.abs().amax(2))
    codes = (groups / scale[:, :, None]).flatten(1)[:, :columns]
    return codes.to(CODES).contiguous(), scale


def _dequantize_activations(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 [tokens, in]."""
    each = scale if scale.shape[1] == 1 else scale.repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]
    return codes.float() * each


def granularity_of(weight: Tensor, scale: Tensor) -> Granularity:
    """What the shape of a matrix' scales says: where it could be two, they mean the same."""
    if scale.ndim == 1:
        return Granularity.TENSOR
    return Granularity.CHANNEL if scale.shape == (weight.shape[0], 1) else Granularity.BLOCK


def multiply_codes(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """x @ weight.T + bias in `dtype`: `x` [tokens, in] are codes with scales, or plain numbers."""
    block = granularity_of(weight, scale) is Granularity.BLOCK
    side = BLOCK if block else _ALIGNED
    fits = weight.shape[0] % side == 0 and weight.shape[1] % side == 0
    if x_scale is None or not fits or not _has_kernel(x.device, block, dtype):
        product: Tensor = torch.ops.fp8stream.linear_by_runs(x, x_scale, weight, scale, bias, dtype)
        return product
    product = (_scaled_blocks if block else _scaled_rows)(x, x_scale, weight, scale, dtype)
    return product if bias is None else (product + bias).to(dtype)


def _scaled_rows(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Torch's kernel with a scale for each row of both operands."""
    columns = scale.reshape(1, -1).expand(1, weight.shape[0]).contiguous()
    weight = weight.contiguous()
    return torch._scaled_mm(x, weight.t(), scale_a=x_scale, scale_b=columns, out_dtype=dtype)


def _scaled_blocks(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Torch's kernel with scales of 1x128 by 128x128.

    cuBLAS wants tokens in fours, the scales of `x` token by token and those of the weight in
    fours along the inputs: torch before `scaled_mm` did not, and was wrong without a word. Rows
    that lie in turns with others are put together: what was tried lay one after the other.
    """
    recipe = functional.ScalingType
    tokens = x.shape[0]
    more = -tokens % 4
    x = functional.pad(x.view(torch.uint8), (0, 0, 0, more)).view(CODES)
    x_scale = functional.pad(x_scale, (0, 0, 0, more), value=1.0)
    scale = functional.pad(scale, (0, -scale.shape[1] % 4), value=1.0).contiguous()
    weight = weight.contiguous()
    product = functional.scaled_mm(
        x,
        weight.t(),
        x_scale.t().contiguous().t(),
        recipe.BlockWise1x128,
        scale.t(),
        recipe.BlockWise128x128,
        output_dtype=dtype,
    )
    return product[:tokens]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@cache
def _has_kernel(device: torch.device, block: bool, dtype: torch.dtype) -> bool:
    """Whether torch multiplies codes on `device` to `dtype`, and rightly so."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    return _is_right(device, block, dtype)


def _is_right(device: torch.device, block: bool, dtype: torch.dtype) -> bool:
    """Whether torch's kernel for `device` works: tried on ragged tokens and five blocks.

    That depends on the GPU, torch, cuBLAS and the dtype in ways that no version number tells.
    """
    granularity = Granularity.BLOCK if block else Granularity.CHANNEL
    numbers = torch.arange(259 * 5 * BLOCK, dtype=torch.float32, device=device)
    ramp = numbers.remainder(251).view(259, -1) / 64 - 1
    x, x_scale = quantize_activations(ramp[:3], granularity)
    weight = ramp[3:].to(CODES)
    grid = granularity.scale_shape(weight.shape)
    scale = 1 + numbers[: math.prod(grid)].view(grid) / 8
    try:
        found = (_scaled_blocks if block else _scaled_rows)(x, x_scale, weight, scale, dtype)
    except (RuntimeError, ValueError, AttributeError, TypeError):
        return False
    operands = _dequantize_activations(x, x_scale), dequantize_weight(weight, scale)
    wanted = operands[0].double() @ operands[1].double().T
    return bool((found - wanted).abs().max() <= wanted.abs().max() / 64)


def _dequantized_runs(weight: Tensor, scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Runs of rows in float32, in a scratch that the next run overwrites."""
    granularity = granularity_of(weight, scale)
    # Whole rows, and of blocks whole bands.
    least = granularity.row_multiple * (weight.shape[1] + -weight.shape[1] % BLOCK)
    elements = max(_RUN, least, BLOCK * BLOCK)
    quantizer = Quantizer(weight.device, elements)
    widen: Callable[[Tensor], Tensor] = quantizer.widen
    if weight.device.type == "cpu":
        half = torch.empty(elements, dtype=torch.int16, device="cpu")
        widen, scale = partial(_decode, quantizer, half), scale * _HALF
    for rows, columns in quantizer.tiles(weight.shape, granularity):
        wide = widen(weight[rows, columns])
        yield rows, multiply(wide, scale_of_tile(scale, granularity, rows, columns), granularity)


def _decode(quantizer: Quantizer, half: Tensor, codes: Tensor) -> Tensor:
    """`codes` / 256 in float32, in the quantizer's scratch: 12 times faster than torch's cast.

    The bits of a code, moved, are those of a float16 that is smaller by this; but NaN is none.
    """
    bits = half[: codes.numel()].view(codes.shape).copy_(codes.view(torch.int8))
    bits.bitwise_left_shift_(7).bitwise_and_(~0x4000)
    if int((bits & _NAN).amax()) == _NAN:
        return quantizer.widen(codes).div_(_HALF)
    return quantizer.widen(bits.view(torch.float16))


@torch.library.custom_op(
    "fp8stream::linear_by_runs",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor? x_scale, Tensor weight, Tensor scale, Tensor? bias, ScalarType dtype)"
        " -> Tensor"
    ),
)
def _linear_by_runs(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`multiply_codes` on any device: an operator, so that a compiler does not unroll the runs.

    Sums are float32's on the CPU; on a GPU the operands are rounded to `dtype`.
    """
    compute = torch.float32 if x.device.type == "cpu" or dtype == torch.float64 else dtype
    values = x if x_scale is None else _dequantize_activations(x, x_scale)
    values = values.to(compute)
    product = torch.empty((x.shape[0], weight.shape[0]), dtype=dtype, device=x.device)
    for rows, wide in _dequantized_runs(weight, scale):
        added = None if bias is None else bias[rows].to(compute)
        product[:, rows] = functional.linear(values, wide.to(compute), added)
    return product


@_linear_by_runs.register_fake
def _(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


def partial_dtype(x: Tensor) -> torch.dtype:
    """What a rank's part of a sum is rounded to: where it costs nothing, not at all."""
    return torch.float32 if x.device.type == "cpu" and x.dtype.itemsize < 4 else x.dtype


def dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Run by run: nothing as large as the result is made beside it."""
    with torch.no_grad():
        numbers = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        for rows, wide in _dequantized_runs(weight, scale):
            numbers[rows] = wide
        return numbers
