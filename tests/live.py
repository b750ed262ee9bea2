"""What the tests of live modules share: random layers, and how far products are apart."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fp8stream.fp8 import quantize_weight
from fp8stream.linear import FP8Linear
from fp8stream.scheme import Granularity

BLOCK = 128
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
granularities = pytest.mark.parametrize("granularity", list(Granularity))
dtypes = pytest.mark.parametrize("dtype", DTYPES)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(
    columns: int,
    rows: int,
    granularity: Granularity,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> FP8Linear:
    made = FP8Linear(columns, rows, granularity, bias, None, dtype, **options)
    weight = random(rows, columns, seed=1) * random(rows, 1, seed=2).exp() * 0.05
    codes, scale = quantize_weight(weight, granularity)
    made.weight.data.copy_(codes)
    made.weight_scale.data.copy_(scale)
    if made.bias is not None:
        made.bias.data.copy_(random(rows, seed=3))
    return made


def bits(module: nn.Module) -> list[bytes]:
    """Codes and scales, as bytes."""
    kept = [n for n, _ in module.named_parameters() if not n.endswith("bias")]
    return [
        module.get_parameter(n).detach().contiguous().view(torch.uint8).numpy().tobytes()
        for n in kept
    ]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).double().norm() / wanted.double().norm())


def compiled(module: nn.Module, backend: str) -> Callable[..., torch.Tensor]:
    torch._dynamo.reset()
    made: Callable[..., torch.Tensor] = torch.compile(module, fullgraph=True, backend=backend)
    return made
