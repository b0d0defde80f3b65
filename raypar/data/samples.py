"""Batches out of single samples: a torch data set that can be indexed, or an iterable that comes as it comes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import default_collate

from raypar.data.batch import Batch
from raypar.data.row_order import RowOrder, share
from raypar.errors import DataError
from raypar.tree import map_tensors


def indexed(who: str, dataset: Any, order: RowOrder, first: int, replica: int, replicas: int) -> Generator[Any]:
    """A replica's shares of the batches from number `first` on, each sample fetched by its index.

    In the thread of the loop: a sample may draw random numbers, which must come in the same order in every run.
    """
    for window in order.windows(first, replica, replicas):
        begin = 0
        for size, _ in window.pieces:
            rows = window.rows[begin : begin + size].tolist()
            begin += size
            yield collate(who, _fetch(dataset, rows or [0]), rows)


def _fetch(dataset: Any, rows: list[int]) -> Sequence[Any]:
    if hasattr(dataset, "__getitems__"):  # what a DataLoader asks for, too
        found: Sequence[Any] = dataset.__getitems__(rows)
        return found
    return [dataset[row] for row in rows]


def streamed(
    who: str,
    factory: Callable[[], Iterable[Any]],
    batch_size: int,
    drop_last: bool,
    first: int,
    replica: int,
    replicas: int,
) -> Generator[Any]:
    """A replica's shares of the batches from number `first` on. Every replica goes through all samples."""
    samples = factory()
    if not isinstance(samples, Iterable):
        raise DataError(f"{who}: {factory!r} returned {type(samples).__name__}, needed an iterable of samples")
    rest = iter(islice(samples, first * batch_size, None))
    while True:
        batch = list(islice(rest, batch_size))
        if not batch or (drop_last and len(batch) < batch_size):
            return
        begin, end = share(len(batch), replica, replicas)
        yield collate(who, batch[begin:end] or batch[:1], range(begin, end))


def collate(who: str, samples: Sequence[Any], rows: Sequence[int]) -> Any:
    """Samples as one batch, by torch's default_collate: a dict as Batch, a tuple as tuple. Where there are no `rows`
    for this replica one sample tells what a batch is like, and each tensor has no row."""
    try:
        batch = default_collate(list(samples))
    except KeyError as error:
        raise DataError(f"{who}: these samples do not form a batch: one has no {error}, which the first has") from error
    except (TypeError, RuntimeError, ValueError) as error:
        raise DataError(f"{who}: these samples do not form a batch: {error}") from error
    if isinstance(batch, Mapping):
        batch = Batch(batch)
    elif isinstance(batch, list):
        batch = tuple(batch)
    return batch if rows else map_tensors(_without_rows, batch)


def _without_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:0]
