"""Batches of single samples: from a torch data set that can be indexed, or from an iterable with its own order."""

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


def indexed(caller: str, dataset: Any, order: RowOrder, first: int, replica: int, replicas: int) -> Generator[Any]:
    """A replica's shares of the batches from number `first` on, each sample fetched by its index.

    Runs in the thread of the loop: samples may draw random numbers, which must come in the same order in every run.
    """
    for window in order.windows(first, replica, replicas):
        begin = 0
        for size, _ in window.pieces:
            rows = window.rows[begin : begin + size].tolist()
            begin += size
            yield collate(caller, _fetch(dataset, rows or [0]), rows)


def _fetch(dataset: Any, rows: list[int]) -> Sequence[Any]:
    if hasattr(dataset, "__getitems__"):  # as a DataLoader does
        samples: Sequence[Any] = dataset.__getitems__(rows)
        return samples
    return [dataset[row] for row in rows]


def streamed(
    caller: str,
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
        raise DataError(f"{caller}: {factory!r} returned {type(samples).__name__}, needed an iterable of samples")
    rest = iter(islice(samples, first * batch_size, None))
    while True:
        batch = list(islice(rest, batch_size))
        if not batch or (drop_last and len(batch) < batch_size):
            return
        begin, end = share(len(batch), replica, replicas)
        yield collate(caller, batch[begin:end] or batch[:1], range(begin, end))


def collate(caller: str, samples: Sequence[Any], rows: Sequence[int]) -> Any:
    """Samples as one batch, by torch's default_collate: dicts become a Batch, tuples a tuple. Without `rows` for this
    replica one sample tells what a batch is like, and each tensor gets no row."""
    try:
        batch = default_collate(list(samples))
    except KeyError as error:
        raise DataError(
            f"{caller}: these samples do not form a batch: one has no {error}, which the first has"
        ) from error
    except (TypeError, RuntimeError, ValueError) as error:
        raise DataError(f"{caller}: these samples do not form a batch: {error}") from error
    if isinstance(batch, Mapping):
        batch = Batch(batch)
    elif isinstance(batch, list):
        batch = tuple(batch)
    return batch if rows else map_tensors(_without_rows, batch)


def _without_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:0]
