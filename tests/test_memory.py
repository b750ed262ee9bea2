"""The budget: planned with integers, measured on this process."""

import gc
import mmap
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8stream.errors import BudgetError
from fp8stream.memory import (
    MIB,
    MemoryUsage,
    PeakMeter,
    SlabDemand,
    Workspace,
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


@pytest.mark.parametrize("text", ["9223372036854775808", "100000000T", "9" * 400])
def test_a_size_that_no_system_has(text: str) -> None:
    """Nor a journal, whose numbers have at most twenty digits when they are read again."""
    with pytest.raises(ValueError, match="is more than any file"):
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


@given(demands, st.integers(1, 1 << 32), st.integers(1, 128), st.integers(0, 8))
def test_a_workspace_is_within_the_budget_or_refused_with_the_least_that_works(
    demand: SlabDemand, budget: int, threads: int, gpus: int
) -> None:
    try:
        workspace = plan_workspace(demand, budget, threads, gpus)
    except BudgetError as error:
        least = parse_size(str(error).rpartition(" ")[2])
        assert least > budget
        workspace = plan_workspace(demand, least, threads, gpus)
        budget = least
    assert workspace.total_bytes <= budget
    assert 1 <= workspace.workers <= max(threads, 2 * gpus)
    assert workspace.workers <= demand.layers
    assert demand.row_bytes <= workspace.slab_bytes <= max(demand.row_bytes + 511, 16 * MIB)
    assert 0 <= workspace.codes_bytes - workspace.slab_bytes // demand.itemsize < 512
    assert workspace.scratch_elements >= demand.row_elements
    assert (workspace.device_bytes > 0) == (gpus > 0)


def test_a_larger_budget_never_gives_less() -> None:
    demand = SlabDemand(4 * MIB, 16384, 2, 100)
    sizes = [plan_workspace(demand, n * MIB, 4) for n in (16, 32, 64, 128, 256, 1024)]
    assert [s.workers for s in sizes] == sorted(s.workers for s in sizes)


@pytest.mark.parametrize("gpus", [0, 1])
def test_from_some_budget_on_more_of_it_changes_nothing(gpus: int) -> None:
    """Large buffers would leave the caches: what a budget leaves over is left alone."""
    demand = SlabDemand(row_bytes=128 * 1024, row_elements=8192, layers=1000)
    sizes = {plan_workspace(demand, n << 30, 2, gpus) for n in (1, 4, 64)}
    assert len(sizes) == 1


def test_a_gpus_memory_is_counted_as_torch_takes_it() -> None:
    """Pinned memory in powers of two, device memory in segments."""
    space = Workspace(1, slab_bytes=3 * MIB, codes_bytes=MIB, scratch_elements=MIB, slots=2, gpus=1)
    assert space.host_bytes == (8 + 2) * MIB
    assert space.device_bytes == (20 + 20 + 20 + 4) * MIB
    assert space.total_bytes == space.host_bytes + space.device_bytes


def test_the_meter_sees_a_peak_that_is_gone_at_the_end() -> None:
    gc.collect()  # or what other tests left may go while we look
    with PeakMeter(interval=0.001) as meter:
        # From the system: the C library may have kept as much of what other tests gave back.
        block = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE)
        for _ in range(64):
            block.write(bytes(MIB))
        time.sleep(0.05)
        block.close()
    grown = meter.peak.anonymous - meter.baseline.anonymous
    assert 64 * MIB <= grown <= 72 * MIB


def test_usage_is_that_of_the_kernel() -> None:
    usage = MemoryUsage.now()
    assert 0 < usage.anonymous < usage.resident
