from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from raypar.data.batch import Batch
from raypar.data.row_order import RowOrder
from raypar.data.samples import collate, indexed, streamed
from raypar.errors import DataError


class Numbers(Dataset[Any]):
    """Counts its rows, and remembers which were fetched."""

    def __init__(self, rows: int, sample: Callable[[int], Any] = lambda row: row) -> None:
        self.rows, self.sample = rows, sample
        self.fetched: list[int] = []

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> Any:
        if not 0 <= row < self.rows:
            raise IndexError(row)
        self.fetched.append(row)
        return self.sample(row)


def of_stream(rows: int, batch_size: int, first: int = 0, replica: int = 0, replicas: int = 1, **options: Any) -> Any:
    drop_last = options.pop("drop_last", False)
    found = streamed("here", lambda: iter(range(rows)), batch_size, drop_last, first, replica, replicas)
    return [batch.tolist() for batch in found]


# ---------------------------------------------------------------- what can be indexed


def test_each_replica_fetches_its_own_samples():
    """In the order of the seed, which is the same for all replicas."""
    order = RowOrder((51,), batch_size=8, window=51, seed=1, epoch=2)
    expected = np.random.default_rng([1, 2]).permutation(51).tolist()
    sets = [Numbers(51) for _ in range(3)]
    shares = [list(indexed("here", each, order, 0, replica, 3)) for replica, each in enumerate(sets)]
    whole = [torch.cat(parts).tolist() for parts in zip(*shares, strict=True)]
    assert list(chain(*whole)) == expected
    assert sorted(chain(*(each.fetched for each in sets))) == list(range(51))


def test_a_resumed_epoch_fetches_no_earlier_sample():
    numbers = Numbers(10)
    order = RowOrder((10,), batch_size=4, window=10, seed=None)
    assert [batch.tolist() for batch in indexed("here", numbers, order, 2, 0, 1)] == [[8, 9]]
    assert numbers.fetched == [8, 9]


def test_samples_are_fetched_on_request():
    """Not ahead, and not on a thread: random transforms draw from torch's one generator, as dropout does."""
    numbers = Numbers(10)
    with closing(indexed("here", numbers, RowOrder((10,), 4, 10, None), 0, 0, 1)) as found:
        next(found)
        assert numbers.fetched == [0, 1, 2, 3]


def test_samples_are_fetched_together():
    """If the data set can."""

    class AtOnce(Numbers):
        def __getitems__(self, rows: list[int]) -> list[int]:
            return [-row for row in rows]

    assert [batch.tolist() for batch in indexed("here", AtOnce(3), RowOrder((3,), 2, 3, None), 0, 0, 1)] == [
        [0, -1],
        [-2],
    ]


# ---------------------------------------------------------------- what comes as it comes


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_stream_has_global_batches(replicas: int):
    """Whatever the number of replicas."""
    shares = [of_stream(11, 4, replica=replica, replicas=replicas) for replica in range(replicas)]
    assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_a_resumed_stream_skips_trained_samples():
    assert of_stream(11, 4, first=2) == [[8, 9, 10]]
    assert of_stream(11, 4, first=3) == []


def test_a_stream_can_drop_its_last_batch():
    assert of_stream(11, 4, drop_last=True) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_stream_without_end_is_read_batch_by_batch():
    def forever() -> Iterator[int]:
        row = 0
        while True:
            yield row
            row += 1

    with closing(streamed("here", forever, 3, False, 0, 0, 1)) as found:
        assert [next(found).tolist() for _ in range(2)] == [[0, 1, 2], [3, 4, 5]]


def test_a_function_returns_an_iterable():
    with pytest.raises(DataError, match=r"here: .* returned int, needed an iterable of samples"):
        next(streamed("here", lambda: 3, 1, False, 0, 0, 1))  # type: ignore[arg-type,return-value]


# ---------------------------------------------------------------- samples as a batch


class Pair(NamedTuple):
    x: torch.Tensor
    y: int


@pytest.mark.parametrize("rows", [[7, 8], []])
def test_a_batch_has_the_form_of_its_samples(rows: list[int]):
    """Also if it has no rows."""

    def batch_of(sample: Any) -> Any:
        return collate("here", [sample] * (len(rows) or 1), rows)

    x = torch.ones(3)
    named = batch_of({"x": x, "y": {"z": 1}})
    assert isinstance(named, Batch)
    assert (named["x"].shape, named["y"]["z"].shape) == ((len(rows), 3), (len(rows),))
    pair = batch_of((x, 1))
    assert isinstance(pair, tuple)
    assert (pair[0].shape, pair[1].dtype) == ((len(rows), 3), torch.int64)
    assert batch_of(Pair(x, 1)).y.shape == (len(rows),)
    assert batch_of(np.ones((2, 2), np.float32)).shape == (len(rows), 2, 2)


def test_samples_that_do_not_fit_together_are_told():
    with pytest.raises(DataError, match=r"here: these samples do not form a batch: .*equal size"):
        collate("here", [torch.ones(2), torch.ones(3)], [0, 1])
    with pytest.raises(DataError, match=r"here: these samples do not form a batch: .*object"):
        collate("here", [object()], [0])
    with pytest.raises(DataError, match="one has no 'label', which the first has"):
        collate("here", [{"label": 1}, {"lable": 1}], [0, 1])
    with pytest.raises(DataError, match="only one element tensors"):
        collate("here", [1, torch.ones(2)], [0, 1])
