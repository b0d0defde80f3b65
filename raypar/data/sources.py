"""What a train loop can read. Each kind of data set is a class, and opens as the batches of one loop.

To add a kind: a subclass of Kind, and its line in KINDS.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
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
"""How many bytes of rows are shuffled together in memory if `window` does not say how many rows."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one call of `raypar.batches` asks for, and the replica that asks. Raises UsageError for wrong values."""

    name: str
    batch_size: int
    shuffle: bool = True
    drop_last: bool = False
    columns: Sequence[str] | None = None
    seed: int = 0
    window: int | None = None
    epoch: int = 0
    replica: int = 0
    replicas: int = 1

    def __post_init__(self) -> None:
        for argument, least in (("batch_size", 1), ("seed", 0), ("window", 1)):
            value = getattr(self, argument)
            if argument == "window" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"{self.called_with(argument)}: needed a whole number of at least {least}")
        if self.columns is not None and (isinstance(self.columns, str) or not self.columns):
            needed = "needed a list of at least one name; None reads all columns"
            raise UsageError(f"{self.called_with('columns')}: {needed}")

    @property
    def caller(self) -> str:
        """How error messages begin."""
        return f"batches({self.name!r})"

    def called_with(self, argument: str) -> str:
        """The same, with one of the arguments."""
        return f"batches({self.name!r}, {argument}={getattr(self, argument)!r})"

    def order(self, sizes: tuple[int, ...], window: int) -> RowOrder:
        """The order of a data set's rows in the epoch. Raises DataError if no batch would be full."""
        seed = self.seed if self.shuffle else None
        order = RowOrder(sizes, self.batch_size, window, seed, self.epoch, self.drop_last)
        if order.count == 0:
            raise DataError(
                f"{self.caller}: batch_size={self.batch_size} and drop_last=True, but the data set has {order.rows} "
                "rows, so no batch is full; lower batch_size or keep the last batch"
            )
        return order


@dataclass(frozen=True)
class Source:
    """A data set as one loop reads it.

    read:   this replica's shares of the batches from a given number on.
    count:  the number of batches of an epoch; None if only the end of the data tells.
    layout: what decides, besides the arguments of `batches`, which rows are in which batch.
    only_whole_epochs: it can be read from its first batch on only.
    """

    read: Callable[[int], Generator[Any]]
    count: int | None = None
    layout: dict[str, int] = field(default_factory=dict)
    only_whole_epochs: bool = False


class Kind(ABC):
    """One kind of data set.

    name:        as error messages call it.
    shuffles:    raypar decides the order of its rows.
    has_columns: `columns` and `window` may be set.
    """

    name: str
    shuffles = False
    has_columns = False

    @abstractmethod
    def fits(self, dataset: Any) -> bool:
        """Whether a data set is of this kind."""

    def check(self, caller: str, dataset: Any) -> None:  # noqa: B027  # some kinds have nothing to check
        """Raise DataError, before a run starts, for what can be known then."""

    @abstractmethod
    def open(self, dataset: Any, reading: Reading, tables: dict[Any, RowGroups]) -> Source:
        """Find out what there is to read; `tables` holds what the loops of this replica have opened so far."""


class Parquet(Kind):
    """Files with columns, read by row group in windows of bounded memory."""

    name = "the path or URI of Parquet data"
    shuffles = has_columns = True

    def fits(self, dataset: Any) -> bool:
        return isinstance(dataset, str | os.PathLike)

    def check(self, caller: str, dataset: Any) -> None:
        """From the footers: a data set of which no column can be read is refused, others are left to `batches`."""
        groups = RowGroups(caller, dataset)
        if all(groups.problem(column) is not None for column in groups.columns):
            groups.check()

    def open(self, dataset: Any, reading: Reading, tables: dict[Any, RowGroups]) -> Source:
        groups = self._row_groups(dataset, reading, tables)
        window = min(groups.rows, reading.window or max(1, int(WINDOW_BYTES // groups.row_bytes)))
        order = reading.order(groups.sizes, window)
        layout = {"window": window, "rows": order.rows, "row_groups": len(groups.sizes)}

        def read(first: int) -> Generator[Batch]:
            with closing(windows.batches(groups, order, first, reading.replica, reading.replicas)) as batches:
                for arrays in batches:
                    yield Batch({column: torch.from_numpy(values) for column, values in arrays.items()})

        return Source(read, order.count, layout)

    def _row_groups(self, path: Any, reading: Reading, tables: dict[Any, RowGroups]) -> RowGroups:
        """The footers, and the rows too if they fit into a window: read once, for all loops and epochs."""
        key = (reading.name, None if reading.columns is None else tuple(reading.columns))
        if key not in tables:
            groups = RowGroups(reading.caller, path, reading.columns)
            groups.check()
            tables[key] = groups
        return tables[key]


class Indexed(Kind):
    """Samples that are fetched by their index."""

    name = "a torch.utils.data.Dataset"
    shuffles = True

    def fits(self, dataset: Any) -> bool:
        return isinstance(dataset, Dataset) and not isinstance(dataset, IterableDataset)

    def check(self, caller: str, dataset: Any) -> None:
        self._length(caller, dataset)

    def open(self, dataset: Any, reading: Reading, tables: dict[Any, RowGroups]) -> Source:
        rows = self._length(reading.caller, dataset)
        order = reading.order((rows,), rows)

        def read(first: int) -> Generator[Any]:
            return samples.indexed(reading.caller, dataset, order, first, reading.replica, reading.replicas)

        return Source(read, order.count, {"rows": rows})

    def _length(self, caller: str, dataset: Any) -> int:
        try:
            rows = len(dataset)
        except (TypeError, NotImplementedError):
            raise DataError(f"{caller}: {type(dataset).__name__} has no len(), needed its number of rows") from None
        if rows == 0:
            raise DataError(f"{caller}: {type(dataset).__name__} has no rows, needed at least one")
        return rows


class Stream(Kind):
    """Samples that come in an order of their own, all of them to every replica."""

    name = "a function without arguments that returns a fresh iterable of samples"

    def fits(self, dataset: Any) -> bool:
        return isinstance(dataset, IterableDataset) or callable(dataset)

    def open(self, dataset: Any, reading: Reading, tables: dict[Any, RowGroups]) -> Source:
        factory = partial(iter, dataset) if isinstance(dataset, IterableDataset) else dataset

        def read(first: int) -> Generator[Any]:
            size, drop_last = reading.batch_size, reading.drop_last
            return samples.streamed(reading.caller, factory, size, drop_last, first, reading.replica, reading.replicas)

        return Source(read)


@dataclass(frozen=True)
class RayDataShard:
    """This replica's shard of a data set that others have divided among the replicas.

    read: (rows, drop_last) -> the batches of the shard, that many rows each, as dicts of tensors by column.
    """

    read: Callable[[int, bool], Iterator[Mapping[str, torch.Tensor]]]


class RayData(Kind):
    """What Ray Train divides into a shard per replica."""

    name = "a ray.data.Dataset"

    def fits(self, dataset: Any) -> bool:
        return isinstance(dataset, RayDataShard)

    def open(self, dataset: Any, reading: Reading, tables: dict[Any, RowGroups]) -> Source:
        if reading.batch_size % reading.replicas:
            raise UsageError(
                f"{reading.called_with('batch_size')}: needed a multiple of {reading.replicas}, since each replica has "
                "its own shard"
            )

        def read(first: int) -> Generator[Batch]:
            for batch in dataset.read(reading.batch_size // reading.replicas, reading.drop_last):
                yield Batch(batch)

        return Source(read, only_whole_epochs=True)


KINDS: tuple[Kind, ...] = (Parquet(), Indexed(), Stream(), RayData())


def _kind_of(caller: str, dataset: Any) -> Kind:
    for kind in KINDS:
        if kind.fits(dataset):
            return kind
    names = [kind.name for kind in KINDS]
    needed = f"{', '.join(names[:-1])}, or {names[-1]}"
    raise DataError(f"{caller}: found {type(dataset).__name__}, needed {needed}")


def check_datasets(datasets: Mapping[str, Any] | None) -> None:
    """Raise DataError for a data set that is missing, empty, or nothing that `batches` can read."""
    for name, dataset in (datasets or {}).items():
        caller = f"datasets[{name!r}]"
        _kind_of(caller, dataset).check(caller, dataset)


def open_source(dataset: Any, reading: Reading, tables: dict[Any, RowGroups]) -> Source:
    """A data set as a loop reads it. Raises UsageError for arguments that its kind does not take, and DataError."""
    kind, type_name = _kind_of(reading.caller, dataset), type(dataset).__name__
    for argument in ("columns", "window"):
        if getattr(reading, argument) is not None and not kind.has_columns:
            raise UsageError(f"{reading.called_with(argument)}: it is for Parquet, found a {type_name}")
    if reading.shuffle and not kind.shuffles:
        raise UsageError(
            f"{reading.called_with('shuffle')}: found a {type_name}, whose order is its own; needed shuffle=False"
        )
    return kind.open(dataset, reading, tables)
