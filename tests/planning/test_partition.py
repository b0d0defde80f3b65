from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar.planning.partition import balanced_cuts


def slowest(costs: Sequence[float], placement: Sequence[int], starts: Sequence[int]) -> float:
    """The cost of the worst stage, where stages that share an actor share its time."""
    shared = Counter(placement)
    ends = [*starts[1:], len(costs)]
    spans = zip(starts, ends, placement, strict=True)
    return max(sum(costs[start:end]) * shared[actor] for start, end, actor in spans)


def best_of_all_cuts(costs: Sequence[float], placement: Sequence[int]) -> float:
    inner = combinations(range(1, len(costs)), len(placement) - 1)
    return min(slowest(costs, placement, [0, *starts]) for starts in inner)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    stages = draw(st.integers(1, 5))
    placement = draw(st.lists(st.integers(0, 3), min_size=stages, max_size=stages))
    costs = draw(st.lists(st.integers(0, 20), min_size=stages, max_size=9))
    return costs, placement


@settings(deadline=None)
@given(problems())
def test_no_other_split_is_faster(problem: tuple[list[int], list[int]]):
    costs, placement = problem
    starts = balanced_cuts(costs, placement)
    assert slowest(costs, placement, starts) == best_of_all_cuts(costs, placement)


@settings(deadline=None)
@given(problems())
def test_every_stage_gets_modules(problem: tuple[list[int], list[int]]):
    """And no module is left out."""
    costs, placement = problem
    starts = balanced_cuts(costs, placement)
    assert len(starts) == len(placement)
    assert starts[0] == 0
    assert all(start < end for start, end in zip(starts, [*starts[1:], len(costs)], strict=True))


@pytest.mark.parametrize(
    ("costs", "placement", "starts"),
    [
        ([5, 1, 1, 1, 1, 1], [0, 1], [0, 1]),
        ([1, 1, 1, 1, 1, 5], [0, 1], [0, 5]),
        ([3, 3, 3, 3], [0, 1], [0, 2]),
        ([7], [0], [0]),
        ([1, 2, 3], [0, 1, 2], [0, 1, 2]),
        ([0.5, 0.25, 0.25, 1.0], [0, 1], [0, 3]),
    ],
)
def test_splits_balance_the_stages(costs: list[float], placement: list[int], starts: list[int]):
    assert balanced_cuts(costs, placement) == starts


def test_stages_on_one_actor_get_less():
    assert balanced_cuts([1] * 8, [0, 1, 2]) == [0, 3, 6]
    assert balanced_cuts([1] * 8, [0, 1, 0]) == [0, 2, 6]


def test_between_equal_cuts_the_later_one_wins():
    assert balanced_cuts([4, 0, 0, 4], [0, 1]) == [0, 3]
