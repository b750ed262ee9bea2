"""Numerics: against whole-tensor arithmetic, against compressed-tensors, and at the edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8stream.fp8 import (
    SMALLEST_NORMAL,
    Quantizer,
    dequantize_weight,
    is_finite,
    quantize_weight,
    weight_scale,
)
from fp8stream.scheme import Granularity
from tests import oracle

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
granularities = pytest.mark.parametrize("granularity", list(Granularity))


def random_weight(
    rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    granularity=st.sampled_from(Granularity),
    dtype=st.sampled_from(DTYPES),
    scratch=st.integers(128 * 128, 200_000),
    seed=st.integers(0, 1 << 30),
)
def test_tiles_change_no_bit(
    rows: int, columns: int, granularity: Granularity, dtype: torch.dtype, scratch: int, seed: int
) -> None:
    weight = random_weight(rows, columns, dtype, seed)
    codes = torch.full(weight.shape, float("nan")).to(torch.float8_e4m3fn)
    scale = Quantizer(CPU, scratch).quantize(weight, granularity, codes)
    expected_codes, expected_scale = oracle.quantize([weight], granularity)
    assert oracle.same(scale, expected_scale)
    assert oracle.same(codes, expected_codes)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1),
    granularity=st.sampled_from(Granularity),
)
def test_any_finite_float32_quantizes_to_finite_codes_within_half_a_step(
    values: list[float], granularity: Granularity
) -> None:
    weight = torch.tensor([values], dtype=torch.float32)
    codes, scale = quantize_weight(weight, granularity)
    assert is_finite(scale)
    assert is_finite(codes.float())
    error = (dequantize_weight(codes, scale).double() - weight.double()).abs()
    wide = oracle.expand(scale, weight.shape, granularity).double()
    # Three mantissa bits: half a step is 1/16 of the value, and 2^-10 below the normal range.
    bound = torch.maximum(weight.double().abs() / 16, wide * 2**-10) * (1 + 1e-6)
    assert (error <= bound).all()


@granularities
@pytest.mark.parametrize("shape", [(256, 384), (100, 200), (129, 130)])
def test_float32_codes_and_scales_are_those_of_compressed_tensors(
    granularity: Granularity, shape: tuple[int, int]
) -> None:
    weight = random_weight(*shape)
    codes, scale = quantize_weight(weight, granularity)
    their_codes, their_scale = oracle.compressed_tensors(weight, granularity)
    assert oracle.same(scale, their_scale)
    assert oracle.same(codes, their_codes)


@granularities
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_show_in_the_scales(
    granularity: Granularity, bad: float, dtype: torch.dtype
) -> None:
    weight = random_weight(300, 200, dtype)
    weight[299, 199] = bad
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    assert not is_finite(Quantizer(CPU, 128 * 128).quantize(weight, granularity, codes))


@granularities
def test_a_group_of_zeros_has_scale_one_and_codes_zero(granularity: Granularity) -> None:
    codes, scale = quantize_weight(torch.zeros(130, 70), granularity)
    assert (scale == 1).all()
    assert (codes.view(torch.uint8) == 0).all()


def test_the_scale_never_falls_below_the_smallest_normal_number() -> None:
    smallest_subnormal = torch.tensor([2.0**-149])
    assert weight_scale(smallest_subnormal) == SMALLEST_NORMAL


def test_no_quotient_needs_a_clamp() -> None:
    """The bound that lets the code leave the clamp out, for every mantissa of amax."""
    amax = (torch.arange(1 << 23, dtype=torch.int32) | 0x3F800000).view(torch.float32)
    assert (amax / weight_scale(amax)).max() < 448.0001


def test_the_cast_rounds_to_nearest_even() -> None:
    values = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    midpoints = (values[:-1] + values[1:]) / 2
    codes = midpoints.to(torch.float8_e4m3fn).view(torch.uint8)
    assert (codes % 2 == 0).all()


def test_a_given_tensor_scale_is_used() -> None:
    weight = random_weight(10, 64)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scale = torch.tensor([1.0])
    assert Quantizer(CPU, 1000).quantize(weight, Granularity.TENSOR, codes, scale) is scale
    assert oracle.same(codes, weight.to(torch.float8_e4m3fn))
