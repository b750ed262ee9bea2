"""Quantize everything at once: whole tensors, eager torch, none of fp8stream's own arithmetic."""

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from fp8stream.scheme import Granularity

BLOCK = 128


def amax_of(weights: list[torch.Tensor], granularity: Granularity) -> torch.Tensor:
    """The largest magnitudes of the first of `weights`; over all of them for tensor scales."""
    if granularity is Granularity.TENSOR:
        return torch.stack([w.float().abs().max() for w in weights]).max().reshape(1)
    wide = weights[0].float().abs()
    if granularity is Granularity.CHANNEL:
        return wide.max(dim=1, keepdim=True).values
    rows, columns = wide.shape
    padded = torch.zeros(-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK)
    padded[:rows, :columns] = wide
    blocks = padded.reshape(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)
    return blocks.permute(0, 2, 1, 3).flatten(2).max(dim=2).values


def quantize(
    weights: list[torch.Tensor], granularity: Granularity
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of the first of `weights`, which share one scale under tensor scales."""
    amax = amax_of(weights, granularity)
    scale = torch.div(amax, torch.tensor(448.0))
    scale = torch.maximum(scale, torch.tensor(torch.finfo(torch.float32).tiny))
    scale[amax == 0] = 1.0
    wide = expand(scale, weights[0].shape, granularity)
    codes = torch.div(weights[0].float(), wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scale


def expand(scale: torch.Tensor, shape: torch.Size, granularity: Granularity) -> torch.Tensor:
    """`scale` for every element of a weight of `shape`."""
    if granularity is not Granularity.BLOCK:
        return scale.expand(shape)
    rows = torch.arange(shape[0]) // BLOCK
    columns = torch.arange(shape[1]) // BLOCK
    return scale[rows][:, columns]


def compressed_tensors(
    weight: torch.Tensor, granularity: Granularity
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of `weight` by compressed-tensors' own code."""
    args = QuantizationArgs(
        num_bits=8,
        type="float",
        symmetric=True,
        strategy=granularity.value,
        block_structure=[BLOCK, BLOCK] if granularity is Granularity.BLOCK else None,
    )
    amax = amax_of([weight], granularity)
    scale, zero_point = calculate_qparams(-amax, amax, args)
    codes = ct_quantize(weight, scale, zero_point, args, dtype=torch.float8_e4m3fn)
    return codes, scale.reshape(granularity.scale_shape(weight.shape))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, NaN and signed zeros included."""
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and torch.equal(_bytes(one), _bytes(other))
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
