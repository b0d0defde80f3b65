"""Which rows form which batch, and which of them a replica reads.

The order belongs to the epoch: it depends on the seed, the epoch and how the rows are stored, and on nothing else.
Global batch b is rows b · batch_size to (b + 1) · batch_size of it, and replica r takes the r-th share of each batch.

    row groups, as stored     0 0 0 | 1 1 | 2 2 2 | 3 3
    in an order of the epoch  3 3 | 0 0 0 | 2 2 2 | 1 1
    windows of at most 5      3 3   0 0 0 | 2 2 2   1 1      groups that are read together
    permuted in each window   0 3 0 0 3   | 1 2 2 1 2
    batches of 4              └──0──┘ └──1─┘  └──2──┘        found without looking at earlier ones
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np


def share(rows: int, replica: int, replicas: int) -> tuple[int, int]:
    """Where a replica's share of `rows` rows begins and ends: contiguous, as equal as possible, larger ones first."""
    size, larger = divmod(rows, replicas)
    begin = replica * size + min(replica, larger)
    return begin, begin + size + (replica < larger)


@dataclass(frozen=True)
class Window:
    """Row groups that are read together, and what one replica takes of them.

    groups: their numbers.
    rows:   the rows to take, in the order of the epoch; numbered through the groups laid end to end.
    pieces: for one batch after the other, how many of these rows it takes, and whether they complete its share.
    """

    groups: tuple[int, ...]
    rows: np.ndarray
    pieces: tuple[tuple[int, bool], ...]


@dataclass(frozen=True)
class RowOrder:
    """The order of the rows in one epoch, and how it is divided into global batches.

    sizes:     rows of each row group, as they are stored.
    window:    how many rows are shuffled together: as many whole row groups as fit, at least one.
    seed:      None leaves the rows in the order in which they are stored.
    drop_last: leave out a last batch that is not full.
    """

    sizes: tuple[int, ...]
    batch_size: int
    window: int
    seed: int | None
    epoch: int = 0
    drop_last: bool = False

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    @property
    def count(self) -> int:
        """The number of batches of the epoch."""
        return self.rows // self.batch_size if self.drop_last else -(-self.rows // self.batch_size)

    def windows(self, first: int = 0, replica: int = 0, replicas: int = 1) -> Iterator[Window]:
        """What a replica reads for the batches from number `first` on: nothing of earlier batches, and no window
        without a row for this replica (but one in which its share of a batch is empty)."""
        end = min(self.rows, self.count * self.batch_size)
        together = self._groups()
        borders = pairwise(accumulate((sum(self.sizes[group] for group in groups) for groups in together), initial=0))
        for number, (groups, (low, high)) in enumerate(zip(together, borders, strict=True)):
            if high <= first * self.batch_size or low >= end:
                continue
            order = self._permutation(number, high - low, whole=len(together) == 1)
            rows, pieces = [], []
            for batch in range(max(first, low // self.batch_size), -(-min(high, end) // self.batch_size)):
                begin = batch * self.batch_size
                start, stop = share(min(self.batch_size, end - begin), replica, replicas)
                start, stop = begin + start, begin + stop
                if max(start, low) < min(stop, high):
                    rows.append(order[max(start, low) - low : min(stop, high) - low])
                    pieces.append((len(rows[-1]), stop <= high))
                elif start == stop and low <= begin:
                    pieces.append((0, True))
            if pieces:
                yield Window(groups, np.concatenate([order[:0], *rows]), tuple(pieces))

    def _groups(self) -> list[tuple[int, ...]]:
        """The row groups of each window."""
        order = np.flatnonzero(self.sizes)
        if self.seed is not None and self.rows > self.window:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        windows: list[list[int]] = []
        room = 0
        for group in order.tolist():
            if not windows or self.sizes[group] > room:
                windows.append([])
                room = self.window
            windows[-1].append(group)
            room -= self.sizes[group]
        return [tuple(groups) for groups in windows]

    def _permutation(self, number: int, rows: int, *, whole: bool) -> np.ndarray:
        if self.seed is None:
            return np.arange(rows)
        # The first of several windows is not number 0: NumPy pads a short seed with zeros, and the seed that permutes
        # the row groups is a short one.
        window = [] if whole else [number + 1]
        return np.random.default_rng([self.seed, self.epoch, *window]).permutation(rows)
