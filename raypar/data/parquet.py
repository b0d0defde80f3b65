"""The row groups of Parquet files: found, checked by the files' footers, and read one after the other.

Footers say how many rows, which types, and in most files also how many nulls a row group has. So most of what is wrong
is known before a row is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raypar.data.columns import bytes_of, item_shape, to_array
from raypar.errors import DataError, RunError, near_names
from raypar.storage import Storage

_STEP_BYTES = 1 << 20
"""What is decoded at once: less than a processor's cache, so that it is still there when it is copied to its place."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class File:
    """A Parquet file and its footer."""

    fs: pafs.FileSystem
    path: str
    footer: pq.FileMetaData
    schema: pa.Schema


def files_of(who: str, path: str | os.PathLike[str]) -> list[tuple[pafs.FileSystem, str]]:
    """The Parquet files of a data set: one file, or all *.parquet below a folder by name, but for hidden ones."""
    text = os.fspath(path)
    try:
        storage = Storage.open(path, label=f"{who}: {text}", error=DataError)
        fs, inside = storage.filesystem, storage.path
        info = fs.get_file_info(inside)
        if info.type == pafs.FileType.Directory:
            entries = fs.get_file_info(pafs.FileSelector(inside, recursive=True))
            found = sorted(entry.path for entry in entries if _is_data(entry, inside))
        else:
            found = [inside] if info.type == pafs.FileType.File else []
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{who}: {text} cannot be reached: {error}") from error
    if not found:
        what = "holds no *.parquet file" if info.type == pafs.FileType.Directory else "does not exist"
        raise DataError(f"{who}: {text} {what}, needed a Parquet file or a folder of them")
    return [(fs, file) for file in found]


def _is_data(entry: pafs.FileInfo, folder: str) -> bool:
    """As Spark and pyarrow see it: what begins with a dot or an underscore, also a folder, is not yet or no data."""
    below = entry.path[len(folder) :].split("/")
    hidden = any(part.startswith((".", "_")) for part in below)
    return entry.type == pafs.FileType.File and entry.path.endswith(".parquet") and not hidden


def _open(who: str, where: tuple[pafs.FileSystem, str]) -> File:
    fs, path = where
    try:
        with pq.ParquetFile(path, filesystem=fs) as file:
            return File(fs, path, file.metadata, file.schema_arrow)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{who}: {path} is no Parquet file: {error}") from error


class RowGroups:
    """All row groups of a data set, numbered through its files.

    sizes:     rows of each; `rows` of all.
    columns:   the chosen ones, which `read` gives.
    row_bytes: of a row in memory, over all columns that are tensors, chosen or not.

    Raises DataError, with `who` in front, for what the footers tell: no file, no row, a column that is missing, of
    another type in another file or no tensor, nulls, lists that differ in their length.
    """

    def __init__(self, who: str, path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> None:
        self.who = who
        with ThreadPoolExecutor(16) as pool:  # a store far away answers many at once
            self.files = list(pool.map(partial(_open, who), files_of(who, path)))
        self.groups = [(file, number) for file in self.files for number in range(file.footer.num_row_groups)]
        self.sizes = tuple(int(file.footer.row_group(number).num_rows) for file, number in self.groups)
        self.rows = sum(self.sizes)
        if self.rows == 0:
            raise DataError(f"{who}: {os.fspath(path)} has no row, needed at least one")
        self.names = list(dict.fromkeys(name for file in self.files for name in file.schema.names))
        if columns is None:
            self.columns = self.names
        else:
            self.columns = list(columns)
            for column in self.columns:
                for file in self.files:
                    if column not in file.schema.names:
                        near = near_names(column, file.schema.names)
                        raise DataError(f"{who}: {file.path} has no column {column!r}; {near}")
        self.row_bytes = max(1, sum(map(self._bytes, self.names)))
        self.table: Arrays = {}  # all rows, where they were kept
        self._shapes: dict[str, tuple[int, ...]] = {}  # of a value of each column, once one was read

    def check(self) -> None:
        """Raise DataError for the first of the chosen columns that cannot be read."""
        for column in self.columns:
            wrong = self.problem(column)
            if wrong is not None:
                raise DataError(f"{self.who}: {wrong}; choose the columns to read with batches(…, columns=[…])")

    def problem(self, column: str) -> str | None:
        """What keeps a column from being read, as far as the footers tell it."""
        first, kind = None, None
        for file in self.files:
            several = file.schema.names.count(column)
            if several != 1:
                which = f"{several} columns" if several else "no column"
                return f"the files differ in their schema: {file.path} has {which} {column!r}, needed one in each"
            found = _type(file.schema, column)
            if first is None:
                first, kind = file.path, found
            elif found != kind:
                return (
                    f"the files differ in their schema: {file.path}, column {column!r} has type {found}, in {first} it "
                    f"has {kind}; needed the same in all"
                )
        if item_shape(kind) is None:
            return (
                f"{first}, column {column!r} has type {kind}, needed numbers, booleans, or lists of one length of them"
            )
        any_length = None in (item_shape(kind) or ())
        lengths = None
        for file in self.files:
            leaf = _leaf(file.schema, column)
            for number in range(file.footer.num_row_groups):
                group = file.footer.row_group(number)
                chunk = group.column(leaf)
                where = f"{file.path}, row group {number}, column {column!r}"
                if any_length and group.num_rows:
                    length = chunk.num_values / group.num_rows
                    if length % 1 or length != (lengths or length):
                        return f"{where} holds lists that differ in their length; needed lists of one length: pad them"
                    lengths = length
                statistics = chunk.statistics
                if statistics is not None and statistics.has_null_count and statistics.null_count:
                    return f"{where} has {statistics.null_count} nulls; fill them or drop these rows"
        return None

    def _bytes(self, column: str) -> float:
        """What a row of a column takes in memory; 0 for one that is no tensor."""
        file, number = next(each for each in self.groups if column in each[0].schema.names)
        kind = _type(file.schema, column)
        if item_shape(kind) is None:
            return 0
        group = file.footer.row_group(number)
        return bytes_of(kind, group.column(_leaf(file.schema, column)).num_values / max(1, group.num_rows))

    def read(self, group: int) -> Iterator[Arrays]:
        """The rows of a group, some at a time, in arrays that are only good until the next ones are asked for.

        Raises DataError for values that are no tensor, which no footer tells; RunError where the store fails, or a page
        is damaged, which a file without checksums (write_page_checksum=True of pyarrow) does not always tell.
        """
        file, number = self.groups[group]
        where = f"{file.path}, row group {number}"
        step = int(max(1, min(65536, _STEP_BYTES // self.row_bytes)))
        try:
            with pq.ParquetFile(
                file.path, filesystem=file.fs, metadata=file.footer, pre_buffer=True, page_checksum_verification=True
            ) as opened:
                chosen: dict[str, Any] = {"row_groups": [number], "columns": self.columns}
                # One thread a group: several groups are read at once, which keeps the cores busy with less ado.
                for some in opened.iter_batches(step, use_threads=False, **chosen):
                    yield {column: self._array(where, column, some.column(column)) for column in self.columns}
        except OSError as error:
            raise RunError(f"{self.who}: {where} could not be read: {error}") from error
        except pa.ArrowException as error:
            raise DataError(f"{self.who}: {where} cannot be read: {error}") from error

    def _array(self, where: str, column: str, values: pa.Array) -> np.ndarray:
        try:
            found = to_array(values)
            if found.shape[1:] != self._shapes.setdefault(column, found.shape[1:]):
                raise ValueError(
                    f"holds lists of shape {found.shape[1:]}, others before it have {self._shapes[column]}; needed "
                    "lists of one length: pad them"
                )
        except ValueError as error:
            raise DataError(f"{self.who}: {where}, column {column!r} {error}") from None
        return found


def _type(schema: pa.Schema, column: str) -> pa.DataType:
    return schema.field(schema.names.index(column)).type


def _leaf(schema: pa.Schema, column: str) -> int:
    """Where a footer tells of a column that holds numbers or lists of them; such a one is stored as one leaf."""
    before = schema.names.index(column)
    return sum(_leaves(schema.field(index).type) for index in range(before))


def _leaves(kind: pa.DataType) -> int:
    if isinstance(kind, pa.BaseExtensionType):
        return _leaves(kind.storage_type)
    if pa.types.is_map(kind):
        return _leaves(kind.key_type) + _leaves(kind.item_type)
    if pa.types.is_struct(kind):
        return sum(_leaves(field.type) for field in kind)
    if pa.types.is_nested(kind) and not pa.types.is_union(kind):
        return _leaves(kind.value_type)
    return 1
