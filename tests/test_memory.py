"""The budget: planned with integers, measured on this process."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8stream.errors import BudgetError
from fp8stream.memory import (
    MIB,
    MemoryUsage,
    PeakMeter,
    SlabDemand,
    format_size,
    parse_size,
    plan_workspace,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1048576", 1 << 20),
        ("256MiB", 256 << 20),
        ("256mib", 256 << 20),
        ("1GiB", 1 << 30),
        ("5GB", 5 * 10**9),
        ("1.5 KiB", 1536),
        ("10k", 10_000),
        ("2T", 2 * 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "lots", "1XB", "1 GiB 2", "0.1", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a"):
        parse_size(text)


def test_sizes_for_the_eye() -> None:
    assert [format_size(n) for n in (0, 1023, 1536, 5 << 30, 3 << 41)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 GiB",
        "6.0 TiB",
    ]


demands = st.builds(
    lambda rows, columns, itemsize, multiple, layers: SlabDemand(
        min(rows, multiple) * columns * itemsize,
        rows * columns * itemsize,
        columns,
        itemsize,
        layers,
    ),
    st.integers(1, 20_000),
    st.integers(1, 60_000),
    st.sampled_from([2, 4]),
    st.sampled_from([1, 128]),
    st.integers(1, 100),
)


@given(demands, st.integers(1, 1 << 32), st.integers(1, 128), st.booleans())
def test_a_workspace_is_within_the_budget_or_refused_with_the_least_that_works(
    demand: SlabDemand, budget: int, threads: int, on_gpu: bool
) -> None:
    try:
        workspace = plan_workspace(demand, budget, threads, on_gpu)
    except BudgetError as error:
        least = parse_size(str(error).rpartition(" ")[2])
        assert least > budget
        workspace = plan_workspace(demand, least, threads, on_gpu)
        budget = least
    assert workspace.total_bytes <= budget
    assert 1 <= workspace.workers <= max(threads, 2 if on_gpu else 1)
    assert workspace.workers <= demand.layers
    assert demand.row_bytes <= workspace.slab_bytes <= max(demand.row_bytes, 16 * MIB)
    assert workspace.codes_bytes == workspace.slab_bytes // demand.itemsize
    assert workspace.scratch_elements >= demand.row_elements
    assert (workspace.device_bytes > 0) == on_gpu


def test_a_larger_budget_never_gives_less() -> None:
    demand = SlabDemand(4 * MIB, 200 * MIB, 16384, 2, 100)
    sizes = [plan_workspace(demand, n * MIB, 4, False) for n in (16, 32, 64, 128, 256, 1024)]
    assert [s.workers for s in sizes] == sorted(s.workers for s in sizes)


def test_the_meter_sees_a_peak_that_is_gone_at_the_end() -> None:
    with PeakMeter(interval=0.001) as meter:
        block = torch.ones(32 * MIB, dtype=torch.uint8)
        time.sleep(0.05)
        del block
    grown = meter.peak.anonymous - meter.baseline.anonymous
    assert 32 * MIB <= grown <= 40 * MIB


def test_usage_is_that_of_the_kernel() -> None:
    usage = MemoryUsage.now()
    assert 0 < usage.anonymous < usage.resident
