"""Products with codes, and the operands that torch's kernels take.

Torch has a kernel for rows on the CPU too, which tells whether operands lie as they must.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8stream import matmul
from fp8stream.fp8 import dequantize_weight, quantize_weight
from fp8stream.matmul import quantize_activations
from fp8stream.scheme import Granularity
from tests import oracle
from tests.live import (
    BLOCK,
    DTYPES,
    compiled,
    dtypes,
    granularities,
    layer,
    on_gpu,
    random,
    relative,
)


@pytest.mark.parametrize("columns", [1, 100, 128, 129, 300, 384])
@granularities
@dtypes
def test_activations_are_quantized_as_weights_are(
    columns: int, granularity: Granularity, dtype: torch.dtype
) -> None:
    x = random(7, columns, dtype=dtype)
    x[3] = 0
    codes, scale = quantize_activations(x, granularity)
    assert codes.dtype == torch.float8_e4m3fn
    assert codes.shape == x.shape
    width = BLOCK if granularity is Granularity.BLOCK else columns
    for number, group in enumerate(torch.split(x, width, 1)):
        wanted, wanted_scale = oracle.quantize([group], Granularity.CHANNEL)
        assert torch.equal(scale[:, number : number + 1], wanted_scale)
        assert oracle.same(torch.split(codes, width, 1)[number].contiguous(), wanted)
    assert torch.equal(scale[3], torch.ones_like(scale[3]))


@granularities
def test_runs_change_nothing(granularity: Granularity, monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer(130, 700, granularity)
    whole = module.dequantize()
    assert torch.equal(whole, dequantize_weight(module.weight.data, module.weight_scale.data))
    monkeypatch.setattr(matmul, "_RUN", 1)
    runs = list(matmul._dequantized_runs(module.weight.data, module.weight_scale.data))
    assert len(runs) > 5
    assert torch.equal(module.dequantize(), whole)
    assert torch.equal(module.dequantize(torch.bfloat16), whole.bfloat16())


@granularities
def test_a_run_is_small(granularity: Granularity) -> None:
    module = layer(1700, 2000, granularity)
    runs = matmul._dequantized_runs(module.weight.data, module.weight_scale.data)
    assert max(wide.numel() for _, wide in runs) <= matmul._RUN < module.weight.numel() / 3


def test_every_code_is_the_number_that_it_is() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    numbers = codes.float()
    numbers[numbers.isnan()] = 0
    for each in (codes, numbers.to(torch.float8_e4m3fn)):
        for scale in (torch.full((1,), 7e35), torch.full((2, 1), 2.0**-126), torch.ones(1, 1)):
            found = matmul.dequantized(each, scale, torch.float32)
            assert torch.equal(found.nan_to_num(1e9), (each.float() * scale).nan_to_num(1e9))


def test_a_kernel_is_looked_for_while_a_graph_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is a constant of the graph, and not a part of it."""
    asked: list[tuple[Any, ...]] = []

    def answer(*question: Any) -> bool:
        asked.append(question)
        return False

    constant = torch.compiler.assume_constant_result(answer)  # type: ignore[no-untyped-call]
    monkeypatch.setattr(matmul, "_has_kernel", constant)
    module = layer(256, 256, Granularity.BLOCK)
    x = random(3, 256)
    assert torch.equal(compiled(module, "eager")(x), module(x))
    assert asked[0] == (torch.device("cpu"), True, torch.float32)
    assert not matmul._has_kernel(torch.device("cpu"), False, torch.float32)


@pytest.mark.parametrize("granularity", [Granularity.CHANNEL, Granularity.TENSOR])
@pytest.mark.parametrize("tokens", [1, 3, 64])
@dtypes
def test_operands_of_rows_are_as_the_kernel_wants_them(
    granularity: Granularity, tokens: int, dtype: torch.dtype
) -> None:
    module = layer(640, 256, granularity, bias=False)
    x = random(tokens, 640)
    operands = *quantize_activations(x, granularity), module.weight, module.weight_scale
    try:
        found = matmul._scaled_rows(*operands, dtype)
    except NotImplementedError:
        pytest.skip("this torch has no such kernel for the CPU")
    assert found.dtype == dtype
    assert relative(found.float(), module(x)) < 1e-6 + torch.finfo(dtype).eps / 2


@pytest.fixture
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """The default dtype, for one test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("default_dtype", [*DTYPES, torch.float64], indirect=True)
def test_a_kernel_is_tried_in_float32_whatever_the_default(default_dtype: torch.dtype) -> None:
    device = torch.device("cpu")
    operands = quantize_activations(torch.ones(1, 128), Granularity.CHANNEL)
    try:
        matmul._scaled_rows(*operands, *operands, torch.float32)
    except NotImplementedError:
        pytest.skip("this torch has no such kernel for the CPU")
    assert matmul._is_right(device, False, torch.bfloat16)
    assert not matmul._is_right(device, True, torch.bfloat16)


@pytest.mark.parametrize("block", [False, True])
def test_a_kernel_gets_rows_that_lie_one_after_the_other(
    block: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of gate, where they lie in turns with those of up."""
    seen: list[torch.Tensor] = []

    def kernel(*operands: Any, **more: Any) -> torch.Tensor:
        seen.extend(o for o in (*operands, *more.values()) if isinstance(o, torch.Tensor))
        return torch.zeros(4, 256)

    monkeypatch.setattr(torch, "_scaled_mm", kernel)
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", kernel, raising=False)
    granularity = Granularity.BLOCK if block else Granularity.CHANNEL
    x, x_scale = quantize_activations(random(4, 512), granularity)
    weight, scale = quantize_weight(random(512, 512), granularity)
    scaled = matmul._scaled_blocks if block else matmul._scaled_rows
    scaled(x, x_scale, weight[::2], scale[::2], torch.float32)
    assert [t.shape for t in seen if t.dtype == weight.dtype] == [(4, 512), (512, 256)]
    assert all(t.is_contiguous() or t.T.is_contiguous() for t in seen)


@pytest.mark.parametrize("tokens", [1, 3, 4, 64])
@pytest.mark.parametrize("columns", [128, 512, 640])
def test_operands_of_blocks_are_as_the_kernel_wants_them(tokens: int, columns: int) -> None:
    """Torch's own rules for shapes and strides, without the kernel."""
    if not hasattr(torch.nn.functional, "scaled_mm"):
        pytest.skip("this torch multiplies no blocks")
    with FakeTensorMode():
        x, x_scale = quantize_activations(torch.empty(tokens, columns), Granularity.BLOCK)
        weight = torch.empty(256, columns, dtype=torch.float8_e4m3fn)
        scale = torch.empty(2, columns // BLOCK)
        found = matmul._scaled_blocks(x, x_scale, weight, scale, torch.bfloat16)
        assert (found.shape, found.dtype) == ((tokens, 256), torch.bfloat16)
        with pytest.raises(RuntimeError, match="128x128 blockwise"):
            matmul._scaled_blocks(x, x_scale, weight, scale.T.contiguous().T[:1], torch.bfloat16)


@on_gpu
@granularities
@dtypes
@pytest.mark.parametrize("tokens", [1, 3, 64])
@pytest.mark.parametrize(("columns", "rows"), [(640, 256), (512, 384), (128, 128), (80, 48)])
def test_torchs_kernel_and_runs_agree(
    granularity: Granularity, dtype: torch.dtype, tokens: int, columns: int, rows: int
) -> None:
    module = layer(columns, rows, granularity, dtype=dtype).cuda()
    x = random(tokens, columns, dtype=dtype).cuda()
    codes, scale = quantize_activations(x, granularity)
    runs = torch.ops.fp8stream.linear_by_runs(
        codes, scale, module.weight, module.weight_scale, module.bias, torch.float32
    )
    assert relative(module(x).float(), runs) < 2 * torch.finfo(dtype).eps + 2e-3


@on_gpu
@granularities
def test_a_kernel_is_used_where_it_must_exist(granularity: Granularity) -> None:
    block = granularity is Granularity.BLOCK
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")
    if block and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("torch multiplies blocks on Hopper alone")
    if block and not hasattr(torch.nn.functional, "scaled_mm"):
        pytest.skip("this torch multiplies no blocks")
    assert matmul._has_kernel(torch.device("cuda", 0), block, torch.bfloat16)
