"""What a train loop can read: each kind of data set opened as the batches of one loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from raypar.data import samples, windows
from raypar.data.batch import Batch
from raypar.data.parquet import RowGroups
from raypar.data.row_order import RowOrder
from raypar.errors import DataError, UsageError

WINDOW_BYTES = 256 << 20
"""Of rows in memory that are shuffled together, where `window` does not say how many."""

_KINDS = (
    "the path or URI of Parquet data, a torch.utils.data.Dataset, a function without arguments that returns a fresh "
    "iterable of samples, or a ray.data.Dataset"
)


@dataclass(frozen=True)
class RayDataShard:
    """A data set that others have cut into one shard a replica: `read(rows, drop_last)` goes through this replica's,
    so many rows at a time, each batch a dict of tensors by column."""

    read: Callable[[int, bool], Iterator[Mapping[str, torch.Tensor]]]


def check_datasets(datasets: Mapping[str, Any] | None) -> None:
    """Raise DataError for a data set that is missing, empty, or nothing that `batches` can read. Of Parquet the footers
    are read; a data set of which no column can be read is refused, one of which some can is left to `batches`."""
    for name, given in (datasets or {}).items():
        who = f"datasets[{name!r}]"
        if is_path(given):
            groups = RowGroups(who, given)
            if all(groups.problem(column) is not None for column in groups.columns):
                groups.check()
        elif is_indexed(given):
            _length(who, given)
        elif not callable(given) and not isinstance(given, IterableDataset | RayDataShard):
            raise DataError(f"{who}: found {type(given).__name__}, needed {_KINDS}")


def is_path(given: Any) -> bool:
    return isinstance(given, str | os.PathLike)


def is_indexed(given: Any) -> bool:
    return isinstance(given, Dataset) and not isinstance(given, IterableDataset)


def _length(who: str, dataset: Any) -> int:
    try:
        rows = len(dataset)
    except (TypeError, NotImplementedError):
        raise DataError(f"{who}: {type(dataset).__name__} has no len(), needed its number of rows") from None
    if rows == 0:
        raise DataError(f"{who}: {type(dataset).__name__} has no row, needed at least one")
    return rows


@dataclass(frozen=True)
class Source:
    """A data set as one loop reads it.

    read:   this replica's shares of the batches from a number on.
    count:  the batches of an epoch, None where only its end tells.
    layout: what decides, besides the arguments of `batches`, which rows are in which batch.
    only_whole_epochs: it can be read from its first batch on only.
    """

    read: Callable[[int], Generator[Any]]
    count: int | None = None
    layout: dict[str, int] = field(default_factory=dict)
    only_whole_epochs: bool = False


def open_source(
    name: str,
    given: Any,
    columns: Sequence[str] | None,
    wanted: RowOrder,
    place: tuple[int, int],
    opened: dict[Any, Any],
) -> Source:
    """Find out what there is to read.

    wanted: the order but for the sizes of the data set.
    place:  which replica of how many reads.
    opened: what was opened before, so that footers and small data sets are read once.
    """
    who, (_, replicas) = f"batches({name!r})", place
    if is_path(given):
        groups = _row_groups(opened, name, given, columns)
        window = min(groups.rows, wanted.window or max(1, int(WINDOW_BYTES // groups.row_bytes)))
        order = replace(wanted, sizes=groups.sizes, window=window)
        layout = {"window": window, "rows": order.rows, "row_groups": len(groups.sizes)}
        return Source(lambda first: _of_parquet(groups, order, first, *place), _count(who, order), layout)
    if is_indexed(given):
        rows = _length(who, given)
        order = replace(wanted, sizes=(rows,), window=rows)
        return Source(
            lambda first: samples.indexed(who, given, order, first, *place), _count(who, order), {"rows": rows}
        )
    size, drop_last = wanted.batch_size, wanted.drop_last
    if isinstance(given, RayDataShard):
        if size % replicas:
            raise UsageError(
                f"batches({name!r}, batch_size={size}): needed a multiple of {replicas}, since each replica has a "
                "shard of its own"
            )
        return Source(lambda first: _of_shard(given, size // replicas, drop_last), only_whole_epochs=True)
    factory = partial(iter, given) if isinstance(given, IterableDataset) else given
    return Source(lambda first: samples.streamed(who, factory, size, drop_last, first, *place))


def _row_groups(opened: dict[Any, Any], name: str, path: Any, columns: Sequence[str] | None) -> RowGroups:
    """The footers, and the rows too where they fit into a window: read once, for all loops and epochs."""
    wanted = (name, None if columns is None else tuple(columns))
    if wanted not in opened:
        groups = RowGroups(f"batches({name!r})", path, columns)
        groups.check()
        opened[wanted] = groups
    found: RowGroups = opened[wanted]
    return found


def _count(who: str, order: RowOrder) -> int:
    if order.count == 0:
        raise DataError(
            f"{who}: batch_size={order.batch_size} and drop_last=True, but the data set has {order.rows} rows, so that "
            "no batch is full; lower batch_size or keep the last batch"
        )
    return order.count


def _of_parquet(groups: RowGroups, order: RowOrder, first: int, replica: int, replicas: int) -> Generator[Batch]:
    with closing(windows.batches(groups, order, first, replica, replicas)) as found:
        for arrays in found:
            yield Batch({column: torch.from_numpy(values) for column, values in arrays.items()})


def _of_shard(shard: RayDataShard, rows: int, drop_last: bool) -> Generator[Batch]:
    for batch in shard.read(rows, drop_last):
        yield Batch(batch)
