"""`raypar.batches`: rows as batches of tensors, the same global batches whatever the plan.

Which rows form global batch b of epoch e depends on the data and the seed alone (see raypar.planning.order). Each
replica takes its contiguous share of the batch's rows, as equal as can be; the last ones may get none of a short batch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from raypar.compute import samples, windows
from raypar.compute.batch import Batch
from raypar.compute.parquet import RowGroups
from raypar.compute.session import Loop, Session, current
from raypar.planning.errors import DataError, UsageError, near_names
from raypar.planning.order import Order

logger = logging.getLogger("raypar")

WINDOW_BYTES = 256 << 20
"""Of rows in memory that are shuffled together, where `window` does not say how many."""

_KINDS = (
    "the path or URI of Parquet data, a torch.utils.data.Dataset, a function without arguments that returns a fresh "
    "iterable of samples, or a ray.data.Dataset"
)


@dataclass(frozen=True)
class Sharded:
    """A data set that others have cut into one shard a replica: `read(rows, drop_last)` goes through this replica's,
    so many rows at a time, each batch a dict of tensors by column."""

    read: Callable[[int, bool], Iterator[Mapping[str, torch.Tensor]]]


def check_datasets(datasets: Mapping[str, Any] | None) -> None:
    """Raise DataError for a data set that is missing, empty, or nothing that `batches` can read. Of Parquet the footers
    are read; a data set of which no column can be read is refused, one of which some can is left to `batches`."""
    for name, given in (datasets or {}).items():
        who = f"datasets[{name!r}]"
        if _is_path(given):
            groups = RowGroups(who, given)
            if all(groups.problem(column) is not None for column in groups.columns):
                groups.check()
        elif _is_indexed(given):
            _length(who, given)
        elif not callable(given) and not isinstance(given, IterableDataset | Sharded):
            raise DataError(f"{who}: found {type(given).__name__}, needed {_KINDS}")


def _is_path(given: Any) -> bool:
    return isinstance(given, str | os.PathLike)


def _is_indexed(given: Any) -> bool:
    return isinstance(given, Dataset) and not isinstance(given, IterableDataset)


def _length(who: str, dataset: Any) -> int:
    try:
        rows = len(dataset)
    except (TypeError, NotImplementedError):
        raise DataError(f"{who}: {type(dataset).__name__} has no len(), needed its number of rows") from None
    if rows == 0:
        raise DataError(f"{who}: {type(dataset).__name__} has no row, needed at least one")
    return rows


def batches(
    name: str,
    *,
    batch_size: int,
    shuffle: bool = True,
    drop_last: bool = False,
    columns: Sequence[str] | None = None,
    seed: int = 0,
    window: int | None = None,
) -> Iterator[Any]:
    """The batches of a data set that are still to do in this epoch, as this replica's share of each.

    name:       a key of Trainer(datasets=…).
    batch_size: rows of a global batch, over all replicas; each gets its share of them.
    shuffle:    another order of the rows in every epoch, drawn from (seed, epoch); False: as stored.
    drop_last:  leave out a last batch that is not full.
    columns:    of Parquet, the names of the columns to read; None: all.
    window:     of Parquet, how many rows are shuffled together; None: as many as fill 256 MiB.

    What a batch is, on the CPU, rows first:

    - **Parquet**: a dict of tensors by column, a fixed-shape tensor column as its shape, a list of fixed size as one
      dimension (also within another), and a list of any size where all have the same length.
    - **torch.utils.data.Dataset**: what torch's default_collate makes of its samples: a dict of tensors where a sample
      is a dict, a tuple of tensors where it is a tuple. Each replica fetches its own samples only, in the thread of the
      loop, so that random transforms repeat. Slow ones are better done once: write Parquet.
    - **a function** that returns a fresh iterable of samples, or an IterableDataset: the same. Needs shuffle=False: its
      order is its own, and must be the same at each call and on each replica, each of which goes through all of it.
    - **ray.data.Dataset**: a dict of tensors by column. Ray Train cuts it into equal shards, one a replica (a few rows
      may be left over), and a batch takes as many rows of each; so batch_size must be a multiple of the replicas.
      Needs shuffle=False: shuffle it with Ray Data. A resumed run repeats the epoch that it was in, and logs it.

    **How Parquet is shuffled.** A data set of no more rows than `window` is permuted as a whole, and stays in memory.
    A larger one is read in windows: its row groups are permuted, then as many of them as have no more than `window`
    rows together (at least one) are read and their rows permuted. So each row comes once an epoch, at a place that may
    be anywhere; but rows of one row group come near each other, within one window. Where rows that lie together are
    alike (sorted by class or by time), shuffle them once before they are written, or make the window larger and the row
    groups smaller. A replica keeps its rows of two windows, the next being read while the batches of one are trained
    on, whatever the size of the data set. Nothing is read that lies before the batch at which a resumed run goes on.

    After a resume within an epoch, loops over a data set pass over the batches that steps have trained on, until a
    step trains on that data set again: a loop that evaluates on the same rows stands behind the one that trains.
    What a step has trained on is the newest batch of each loop around it, of both in
    `for a, b in zip(batches("a", …), batches("b", …))`. So train on each batch before the next one is taken: those
    that were fetched ahead count as trained on, and a resumed run leaves them out.

    Raises DataError for an unknown name or column, a column that holds no numbers, nulls, or lists of several lengths:
    at the call where the files' footers tell, else when they are read. UsageError for arguments that the data set does
    not take, and where a resumed epoch would go on with another batch_size, shuffle, seed or window or with other rows.
    """
    session = current("batches")
    if name not in session.datasets:
        raise DataError(
            f"batches({name!r}): no such data set; {near_names(name, session.datasets)}; see Trainer(datasets=…)"
        )
    given, who = session.datasets[name], f"batches({name!r}"
    for argument, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("window", window, 1)):
        if not (argument == "window" and value is None):
            _check_whole(who, argument, value, least)
    for argument, chosen in (("columns", columns), ("window", window)):
        if chosen is not None and not _is_path(given):
            raise UsageError(f"{who}, {argument}={chosen!r}): it is for Parquet, found a {type(given).__name__}")
    if columns is not None and (isinstance(columns, str) or not columns):
        raise UsageError(f"{who}, columns={columns!r}): needed a list of at least one name; None reads all columns")
    if shuffle and not _is_path(given) and not _is_indexed(given):
        raise UsageError(
            f"{who}, shuffle=True): found a {type(given).__name__}, whose order is its own; needed shuffle=False"
        )
    wanted = Order((), batch_size, window or 0, int(seed) if shuffle else None, session.position.epoch, drop_last)
    source = _open(session, name, given, columns, wanted)
    batching = {"batch_size": batch_size, "shuffle": bool(shuffle), "seed": int(seed), **source.layout}
    return _batches(session, Loop(name, source.count, batching), source)


def _check_whole(who: str, argument: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{who}, {argument}={value!r}): needed a whole number of at least {least}")


@dataclass(frozen=True)
class _Source:
    """A data set as one loop reads it.

    read:   this replica's shares of the batches from a number on.
    count:  the batches of an epoch, None where only its end tells.
    layout: what decides, besides the arguments of `batches`, which rows are in which batch.
    """

    read: Callable[[int], Generator[Any]]
    count: int | None = None
    layout: dict[str, int] = field(default_factory=dict)
    only_whole_epochs: bool = False


def _open(session: Session, name: str, given: Any, columns: Sequence[str] | None, wanted: Order) -> _Source:
    """Find out what there is to read; `wanted` is the order but for the sizes of the data set."""
    who, place = f"batches({name!r})", (session.rank, session.size)
    if _is_path(given):
        groups = _row_groups(session, name, given, columns)
        window = min(groups.rows, wanted.window or max(1, int(WINDOW_BYTES // groups.row_bytes)))
        order = replace(wanted, sizes=groups.sizes, window=window)
        layout = {"window": window, "rows": order.rows, "row_groups": len(groups.sizes)}
        return _Source(lambda first: _of_parquet(groups, order, first, *place), _count(who, order), layout)
    if _is_indexed(given):
        rows = _length(who, given)
        order = replace(wanted, sizes=(rows,), window=rows)
        return _Source(
            lambda first: samples.indexed(who, given, order, first, *place), _count(who, order), {"rows": rows}
        )
    size, drop_last = wanted.batch_size, wanted.drop_last
    if isinstance(given, Sharded):
        if size % session.size:
            raise UsageError(
                f"batches({name!r}, batch_size={size}): needed a multiple of {session.size}, since each replica has a "
                "shard of its own"
            )
        return _Source(lambda first: _of_shard(given, size // session.size, drop_last), only_whole_epochs=True)
    factory = partial(iter, given) if isinstance(given, IterableDataset) else given
    return _Source(lambda first: samples.streamed(who, factory, size, drop_last, first, *place))


def _row_groups(session: Session, name: str, path: Any, columns: Sequence[str] | None) -> RowGroups:
    """The footers, and the rows too where they fit into a window: read once, for all loops and epochs."""
    wanted = (name, None if columns is None else tuple(columns))
    if wanted not in session.tables:
        groups = RowGroups(f"batches({name!r})", path, columns)
        groups.check()
        session.tables[wanted] = groups
    found: RowGroups = session.tables[wanted]
    return found


def _count(who: str, order: Order) -> int:
    if order.count == 0:
        raise DataError(
            f"{who}: batch_size={order.batch_size} and drop_last=True, but the data set has {order.rows} rows, so that "
            "no batch is full; lower batch_size or keep the last batch"
        )
    return order.count


def _of_parquet(groups: RowGroups, order: Order, first: int, replica: int, replicas: int) -> Generator[Batch]:
    with closing(windows.batches(groups, order, first, replica, replicas)) as found:
        for arrays in found:
            yield Batch({column: torch.from_numpy(values) for column, values in arrays.items()})


def _of_shard(shard: Sharded, rows: int, drop_last: bool) -> Generator[Batch]:
    for batch in shard.read(rows, drop_last):
        yield Batch(batch)


def _batches(session: Session, loop: Loop, source: _Source) -> Generator[Any]:
    """What `batches` returns: the batches of a source, known to the session as a loop."""
    if source.only_whole_epochs and (done := session.restart(loop.name)):
        logger.warning(
            "batches(%r): this data set resumes by epoch only, so epoch %d begins again, of which %d batches were "
            "trained on before.",
            loop.name,
            session.position.epoch,
            done,
        )
    start = index = session.begin_loop(loop)
    try:
        with closing(source.read(start)) as read:
            for batch, is_last in (
                _with_the_last_known(read) if loop.count is None else ((each, False) for each in read)
            ):
                if is_last:
                    loop.count = index + 1
                session.next_batch(loop, index)
                index += 1
                yield batch
        if index == 0:
            raise DataError(
                f"batches({loop.name!r}): the data set gave no sample, or too few for a full batch; a function must "
                "return a fresh iterable at each call"
            )
        loop.count = index
        session.full_pass(loop)
    finally:
        session.end_loop(loop)


def _with_the_last_known(items: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
    """Each with whether it is the last, which takes the next one to know."""
    end: Any = object()
    item = next(items, end)
    while item is not end:
        following = next(items, end)
        yield item, following is end
        item = following
