"""Rows of Parquet as batches of tensors, the same global batches whatever the plan.

Which rows form global batch b of epoch e depends on the seed alone. Each replica then takes its contiguous
share of the batch's rows, as equal as can be; the last ones may get none of a short batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import torch

from raypar.compute.checkpoint import resolve
from raypar.compute.session import Loop, Session, current
from raypar.compute.tree import like_dict
from raypar.planning.errors import DataError, UsageError, near_names


class Batch(dict[str, torch.Tensor]):
    """One batch: a tensor for each column, rows first. Asking for another column raises DataError."""

    def __missing__(self, column: str) -> torch.Tensor:
        raise DataError(f"the batch has no column {column!r}; {near_names(column, self)}")


like_dict(Batch)


def check_datasets(datasets: Mapping[str, Any] | None) -> None:
    """Raise DataError for a data set that is missing, empty, or no Parquet; reads the footers only."""
    for name, path in (datasets or {}).items():
        if not isinstance(path, str | os.PathLike):
            raise DataError(f"datasets[{name!r}]: found {type(path).__name__}, needed the path or URI of Parquet data")
        rows = sum(count_rows(name, file, fs) for fs, file in files_of(name, path))
        if rows == 0:
            raise DataError(f"datasets[{name!r}]: {os.fspath(path)} has no row, needed at least one")


def files_of(name: str, path: str | os.PathLike[str]) -> list[tuple[pafs.FileSystem, str]]:
    """The Parquet files of a data set: one file, or all *.parquet below a folder, by name."""
    text = os.fspath(path)
    try:
        fs, inside = resolve(text)
        info = fs.get_file_info(inside)
        if info.type == pafs.FileType.Directory:
            entries = fs.get_file_info(pafs.FileSelector(inside, recursive=True))
            found = sorted(entry.path for entry in entries if entry.path.endswith(".parquet"))
        else:
            found = [inside] if info.type == pafs.FileType.File else []
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"datasets[{name!r}]: {text} cannot be reached: {error}") from error
    if not found:
        what = "holds no *.parquet file" if info.type == pafs.FileType.Directory else "does not exist"
        raise DataError(f"datasets[{name!r}]: {text} {what}, needed a Parquet file or a folder of them")
    return [(fs, file) for file in found]


def count_rows(name: str, file: str, fs: pafs.FileSystem) -> int:
    try:
        return int(pq.read_metadata(file, filesystem=fs).num_rows)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"datasets[{name!r}]: {file} is no Parquet file: {error}") from error


class Table:
    """The chosen columns of a data set as arrays with one row an example."""

    def __init__(self, name: str, path: str | os.PathLike[str], columns: Sequence[str] | None) -> None:
        tables = []
        for fs, file in files_of(name, path):
            known = pq.read_schema(file, filesystem=fs).names
            for column in columns or []:
                if column not in known:
                    raise DataError(f"batches({name!r}): {file} has no column {column!r}; {near_names(column, known)}")
            tables.append(pq.read_table(file, columns=list(columns) if columns else None, filesystem=fs))
        try:
            table = pa.concat_tables(tables)
        except pa.ArrowException as error:
            raise DataError(
                f"batches({name!r}): the files of {os.fspath(path)} differ in their schema: {error}"
            ) from error
        self.rows = table.num_rows
        if self.rows == 0:
            raise DataError(f"batches({name!r}): {os.fspath(path)} has no row, needed at least one")
        self.columns = {column: _as_array(name, column, table.column(column)) for column in table.column_names}

    def take(self, rows: np.ndarray) -> Batch:
        return Batch({name: torch.from_numpy(values[rows]) for name, values in self.columns.items()})


def _as_array(name: str, column: str, chunks: pa.ChunkedArray) -> np.ndarray:
    """A column as one NumPy array, without a Python object a value."""
    array = chunks.combine_chunks()
    is_tensor = isinstance(chunks.type, pa.FixedShapeTensorType)
    array = array.storage if is_tensor else array
    sizes = []
    nulls = array.null_count
    while pa.types.is_fixed_size_list(array.type):
        sizes.append(array.type.list_size)
        array = array.flatten()
        nulls += array.null_count
    if nulls:
        raise DataError(f"batches({name!r}): column {column!r} has {nulls} nulls; fill them or drop these rows")
    shape = list(chunks.type.shape) if is_tensor else sizes
    kind = array.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DataError(
            f"batches({name!r}): column {column!r} has type {chunks.type}, needed numbers, booleans, or lists of a "
            "fixed size of them; choose the columns to read with batches(…, columns=[…])"
        )
    values: np.ndarray = array.to_numpy(zero_copy_only=False)
    return values.reshape(len(chunks), *shape)


def batches(
    name: str,
    *,
    batch_size: int,
    shuffle: bool = True,
    drop_last: bool = False,
    columns: Sequence[str] | None = None,
    seed: int = 0,
) -> Iterator[Batch]:
    """The batches of a data set that are still to do in this epoch, as this replica's share of each.

    name:       a key of Trainer(datasets=…).
    batch_size: rows of a global batch, over all replicas; each gets its share of them.
    shuffle:    another order of all rows in every epoch, drawn from (seed, epoch); False: as stored.
    drop_last:  leave out a last batch that is not full.
    columns:    names of the columns to read; None: all.

    Yields a dict of CPU tensors by column, rows first: a fixed-shape tensor column as its shape, a list of
    fixed size as one dimension. The columns are read once and stay in memory.

    After a resume within an epoch, loops over a data set pass over the batches that steps have trained on, until a
    step trains on that data set again: a loop that evaluates on the same rows stands behind the one that trains.
    What a step has trained on is the newest batch of each loop around it, of both in
    `for a, b in zip(batches("a", …), batches("b", …))`. So train on each batch before the next one is taken: those
    that were fetched ahead count as trained on, and a resumed run leaves them out.

    Raises DataError for an unknown name or column, a column that holds no numbers, or nulls; UsageError where a
    resumed epoch would go on with another batch_size, shuffle or seed.
    """
    session = current("batches")
    if name not in session.datasets:
        raise DataError(
            f"batches({name!r}): no such data set; {near_names(name, session.datasets)}; see Trainer(datasets=…)"
        )
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise UsageError(f"batches({name!r}, batch_size={batch_size!r}): needed a whole number of at least 1")
    wanted = (name, None if columns is None else tuple(columns))
    if wanted not in session.tables:
        session.tables[wanted] = Table(name, session.datasets[name], columns)
    table: Table = session.tables[wanted]
    if drop_last and table.rows < batch_size:
        raise DataError(
            f"batches({name!r}, batch_size={batch_size}, drop_last=True): the data set has {table.rows} rows, so that "
            "no batch is full; lower batch_size or keep the last batch"
        )
    return _batches(session, name, table, batch_size, shuffle, drop_last, seed)


def _batches(
    session: Session, name: str, table: Table, batch_size: int, shuffle: bool, drop_last: bool, seed: int
) -> Iterator[Batch]:
    count = table.rows // batch_size if drop_last else -(-table.rows // batch_size)
    order = np.arange(table.rows)
    if shuffle:
        order = np.random.default_rng([seed, session.position.epoch]).permutation(table.rows)
    loop = Loop(name, count, {"batch_size": batch_size, "shuffle": bool(shuffle), "seed": int(seed)})
    start = session.begin_loop(loop)
    try:
        for index in range(start, count):
            session.next_batch(loop, index)
            rows = order[index * batch_size : (index + 1) * batch_size]
            yield table.take(np.array_split(rows, session.size)[session.rank])
        session.full_pass(loop)
    finally:
        session.end_loop(loop)
