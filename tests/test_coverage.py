"""Exactly once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8stream.coverage import Coverage

ranges = st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda pair: sorted(pair))


@given(parts=st.lists(ranges))
def test_coverage_agrees_with_a_set_of_numbers(parts: list[list[int]]) -> None:
    coverage, seen = Coverage(30), set[int]()
    for start, stop in parts:
        new = set(range(start, stop))
        if new & seen:
            with pytest.raises(ValueError, match="came before"):
                coverage.add(start, stop)
        else:
            coverage.add(start, stop)
            seen |= new
    missing = sorted(set(range(30)) - seen)
    gap = coverage.gap()
    assert (gap is None) == (not missing)
    if gap:
        assert gap[0] == missing[0]
        assert set(range(*gap)) <= set(missing)
        assert gap[1] in seen | {30}


@pytest.mark.parametrize("part", [(-1, 2), (0, 31), (5, 4)])
def test_what_lies_outside_is_refused(part: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="outside"):
        Coverage(30).add(*part)


def test_nothing_covers_nothing() -> None:
    assert Coverage(0).gap() is None


def test_neighbours_are_joined_in_any_order() -> None:
    coverage = Coverage(1000)
    for start in [*range(0, 1000, 20), *range(10, 1000, 20)]:
        coverage.add(start, start + 10)
    assert coverage.gap() is None
    assert len(coverage._starts) == 1
