from __future__ import annotations

from itertools import chain, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar.data.row_order import RowOrder, Window, share

SIZES = st.lists(st.integers(0, 9), max_size=12).filter(any).map(tuple)


def orders(seed: st.SearchStrategy[int | None] | None = None) -> st.SearchStrategy[RowOrder]:
    return st.builds(
        RowOrder,
        sizes=SIZES,
        batch_size=st.integers(1, 12),
        window=st.integers(1, 40),
        seed=st.one_of(st.none(), st.integers(0, 3)) if seed is None else seed,
        epoch=st.integers(0, 3),
        drop_last=st.booleans(),
    )


def numbers(order: RowOrder, window: Window) -> list[int]:
    """The rows that a replica takes of a window, as their places in the whole data set."""
    begins = np.cumsum([0, *order.sizes])
    ends_to_ends = np.concatenate([np.arange(begins[group], begins[group + 1]) for group in window.groups])
    found: list[int] = ends_to_ends[window.rows].tolist()
    return found


def batches(order: RowOrder, first: int = 0, replica: int = 0, replicas: int = 1) -> list[list[int]]:
    """What a replica gets, put together from the pieces of the windows."""
    found: list[list[int]] = []
    part: list[int] = []
    for window in order.windows(first, replica, replicas):
        rows = iter(numbers(order, window))
        for size, whole in window.pieces:
            part += [next(rows) for _ in range(size)]
            if whole:
                found.append(part)
                part = []
        assert not list(rows)
    assert not part
    return found


@settings(deadline=None, max_examples=300)
@given(orders())
def test_each_row_comes_once_per_epoch(order: RowOrder):
    """Except those of a last short batch that is dropped."""
    found = batches(order)
    rows = list(chain(*found))
    assert len(found) == order.count
    assert len(rows) == len(set(rows)) == (order.count * order.batch_size if order.drop_last else order.rows)
    assert all(len(batch) == order.batch_size for batch in found[:-1])


@settings(deadline=None, max_examples=300)
@given(orders(), st.integers(1, 4))
def test_shares_make_up_the_global_batches(order: RowOrder, replicas: int):
    of_replicas = [batches(order, 0, replica, replicas) for replica in range(replicas)]
    for index, batch in enumerate(batches(order)):
        assert [of_replica[index] for of_replica in of_replicas] == [
            part.tolist() for part in np.array_split(batch, replicas)
        ]


@settings(deadline=None, max_examples=300)
@given(orders(), st.integers(1, 3), st.data())
def test_reading_starts_at_the_first_window_needed(order: RowOrder, replicas: int, data: st.DataObject):
    first = data.draw(st.integers(0, max(0, order.count - 1)))
    replica = data.draw(st.integers(0, replicas - 1))
    assert batches(order, first, replica, replicas) == batches(order, 0, replica, replicas)[first:]
    windows = list(order.windows())
    held = [sum(order.sizes[group] for group in window.groups) for window in windows]
    passed = sum(np.cumsum(held) <= first * order.batch_size)
    assert [each.groups for each in order.windows(first)] == [each.groups for each in windows[passed:]]


@settings(deadline=None, max_examples=300)
@given(orders())
def test_windows_hold_whole_row_groups(order: RowOrder):
    """Each group once, and no more rows than the window may have."""
    found = [window.groups for window in order.windows()]
    if not order.drop_last:
        assert sorted(chain(*found)) == [group for group, size in enumerate(order.sizes) if size]
    for groups in found:
        assert len(groups) == 1 or sum(order.sizes[group] for group in groups) <= order.window


@settings(deadline=None)
@given(orders(seed=st.none()))
def test_without_a_seed_rows_come_as_they_are_stored(order: RowOrder):
    rows = list(chain(*batches(order)))
    assert rows == list(range(len(rows)))


@settings(deadline=None)
@given(SIZES, st.integers(0, 5), st.integers(0, 5))
def test_one_window_is_permuted_as_a_whole(sizes: tuple[int, ...], seed: int, epoch: int):
    """However it is stored."""
    order = RowOrder(sizes, batch_size=3, window=sum(sizes), seed=seed, epoch=epoch)
    whole = np.random.default_rng([seed, epoch]).permutation(sum(sizes)).tolist()
    assert list(chain(*batches(order))) == whole


def test_the_order_is_the_same_whatever_the_batch_size():
    found = {tuple(chain(*batches(RowOrder((4, 4, 4, 4), size, window=8, seed=1)))) for size in (1, 2, 3, 5, 16)}
    assert len(found) == 1


def test_each_seed_epoch_and_window_has_its_order():
    """NumPy fills short seeds up with zeros, so that [seed, epoch] and [seed, epoch, 0] are one."""
    found = {
        tuple(chain(*batches(RowOrder((10,) * 6, 4, window=20, seed=seed, epoch=epoch))))
        for seed, epoch in product(range(3), repeat=2)
    }
    assert len(found) == 9
    order = RowOrder((50,) * 3, batch_size=50, window=50, seed=0)
    inside = {tuple(row % 50 for row in batch) for batch in batches(order)}
    assert len(inside) == 3
    assert tuple(np.random.default_rng([0, 0]).permutation(50)) not in inside


def test_rows_of_a_group_stay_together():
    """A row may come anywhere in the epoch, but near those of its group."""
    places: set[int] = set()
    for epoch in range(60):
        found = list(chain(*batches(RowOrder((5,) * 8, batch_size=4, window=10, seed=0, epoch=epoch))))
        places.add(found.index(17))
        of_group = [found.index(row) for row in range(15, 20)]
        assert max(of_group) // 10 == min(of_group) // 10
    assert len(places) > 30


@pytest.mark.parametrize(
    ("rows", "replicas", "expected"), [(7, 3, [(0, 3), (3, 5), (5, 7)]), (1, 3, [(0, 1), (1, 1), (1, 1)])]
)
def test_shares_are_contiguous(rows: int, replicas: int, expected: list[tuple[int, int]]):
    """And the first ones are larger."""
    assert [share(rows, replica, replicas) for replica in range(replicas)] == expected
