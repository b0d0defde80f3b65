"""The row groups of Parquet files: listed, checked by the files' footers, and read one after the other.

Footers give the number of rows, the types, and in most files also the number of nulls of each row group. So most errors
are known before a row is read.
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
"""Bytes decoded at a time: less than a processor's cache, so that they are still cached when they are copied."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class File:
    """A Parquet file and its footer."""

    fs: pafs.FileSystem
    path: str
    footer: pq.FileMetaData
    schema: pa.Schema


def files_of(caller: str, path: str | os.PathLike[str]) -> list[tuple[pafs.FileSystem, str]]:
    """The Parquet files of a data set: one file, or all *.parquet below a folder, by name, without hidden ones."""
    text = os.fspath(path)
    try:
        storage = Storage.open(path, label=f"{caller}: {text}", error=DataError)
        fs, inside = storage.filesystem, storage.path
        info = fs.get_file_info(inside)
        if info.type == pafs.FileType.Directory:
            entries = fs.get_file_info(pafs.FileSelector(inside, recursive=True))
            files = sorted(entry.path for entry in entries if _is_data(entry, inside))
        else:
            files = [inside] if info.type == pafs.FileType.File else []
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{caller}: {text} cannot be reached: {error}") from error
    if not files:
        problem = "contains no *.parquet file" if info.type == pafs.FileType.Directory else "does not exist"
        raise DataError(f"{caller}: {text} {problem}, needed a Parquet file or a folder of them")
    return [(fs, file) for file in files]


def _is_data(entry: pafs.FileInfo, folder: str) -> bool:
    """As in Spark and pyarrow: a file or folder whose name starts with a dot or an underscore is not (yet) data."""
    below = entry.path[len(folder) :].split("/")
    hidden = any(part.startswith((".", "_")) for part in below)
    return entry.type == pafs.FileType.File and entry.path.endswith(".parquet") and not hidden


def _open(caller: str, place: tuple[pafs.FileSystem, str]) -> File:
    fs, path = place
    try:
        with pq.ParquetFile(path, filesystem=fs) as file:
            return File(fs, path, file.metadata, file.schema_arrow)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{caller}: {path} is not a Parquet file: {error}") from error


class RowGroups:
    """All row groups of a data set, numbered through its files.

    sizes:     rows of each row group; `rows`: their sum.
    columns:   the chosen columns, which `read` yields.
    row_bytes: bytes of a row in memory, over all columns that are tensors, chosen or not.

    Raises DataError, beginning with `caller`, for what the footers tell: no file, no row, a column that is missing, has
    different types in two files, or is not a tensor; nulls; lists of different lengths.
    """

    def __init__(self, caller: str, path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> None:
        self.caller = caller
        with ThreadPoolExecutor(16) as pool:  # a remote store answers many requests at once
            self.files = list(pool.map(partial(_open, caller), files_of(caller, path)))
        self.groups = [(file, number) for file in self.files for number in range(file.footer.num_row_groups)]
        self.sizes = tuple(int(file.footer.row_group(number).num_rows) for file, number in self.groups)
        self.rows = sum(self.sizes)
        if self.rows == 0:
            raise DataError(f"{caller}: {os.fspath(path)} has no rows, needed at least one")
        self.names = list(dict.fromkeys(name for file in self.files for name in file.schema.names))
        if columns is None:
            self.columns = self.names
        else:
            self.columns = list(columns)
            for column in self.columns:
                for file in self.files:
                    if column not in file.schema.names:
                        near = near_names(column, file.schema.names)
                        raise DataError(f"{caller}: {file.path} has no column {column!r}; {near}")
        self.row_bytes = max(1, sum(map(self._bytes, self.names)))
        self.table: Arrays = {}  # all rows, once they were loaded to stay
        self._shapes: dict[str, tuple[int, ...]] = {}  # the shape of a value of each column, once one was read

    def check(self) -> None:
        """Raise DataError for the first of the chosen columns that cannot be read."""
        for column in self.columns:
            problem = self.problem(column)
            if problem is not None:
                raise DataError(f"{self.caller}: {problem}; choose the columns to read with batches(…, columns=[…])")

    def problem(self, column: str) -> str | None:
        """Why a column cannot be read, as far as the footers tell; None if nothing is wrong."""
        first, kind = None, None
        for file in self.files:
            count = file.schema.names.count(column)
            if count != 1:
                columns = f"{count} columns" if count else "no column"
                return f"the files differ in their schema: {file.path} has {columns} {column!r}, needed one in each"
            other = _type(file.schema, column)
            if first is None:
                first, kind = file.path, other
            elif other != kind:
                return (
                    f"the files differ in their schema: {file.path}, column {column!r} has type {other}, in {first} it "
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
                location = f"{file.path}, row group {number}, column {column!r}"
                if any_length and group.num_rows:
                    length = chunk.num_values / group.num_rows
                    if length % 1 or length != (lengths or length):
                        return f"{location} contains lists of different lengths; needed lists of one length: pad them"
                    lengths = length
                statistics = chunk.statistics
                if statistics is not None and statistics.has_null_count and statistics.null_count:
                    return f"{location} has {statistics.null_count} nulls; fill them or drop these rows"
        return None

    def _bytes(self, column: str) -> float:
        """The bytes of a column's row in memory; 0 if the column is not a tensor."""
        file, number = next(pair for pair in self.groups if column in pair[0].schema.names)
        kind = _type(file.schema, column)
        if item_shape(kind) is None:
            return 0
        group = file.footer.row_group(number)
        return bytes_of(kind, group.column(_leaf(file.schema, column)).num_values / max(1, group.num_rows))

    def read(self, group: int) -> Iterator[Arrays]:
        """The rows of a group, some at a time, in arrays that are valid only until the next ones are requested.

        Raises DataError for values that are not tensors, which no footer tells; RunError if the store fails or a page
        is damaged (always noticed only in files with checksums: write_page_checksum=True of pyarrow).
        """
        file, number = self.groups[group]
        location = f"{file.path}, row group {number}"
        step = int(max(1, min(65536, _STEP_BYTES // self.row_bytes)))
        try:
            with pq.ParquetFile(
                file.path, filesystem=file.fs, metadata=file.footer, pre_buffer=True, page_checksum_verification=True
            ) as opened:
                chosen: dict[str, Any] = {"row_groups": [number], "columns": self.columns}
                # One thread per group: several groups are read at once, which keeps the cores busy already.
                for rows in opened.iter_batches(step, use_threads=False, **chosen):
                    yield {column: self._array(location, column, rows.column(column)) for column in self.columns}
        except OSError as error:
            raise RunError(f"{self.caller}: {location} could not be read: {error}") from error
        except pa.ArrowException as error:
            raise DataError(f"{self.caller}: {location} cannot be read: {error}") from error

    def _array(self, location: str, column: str, values: pa.Array) -> np.ndarray:
        try:
            array = to_array(values)
            if array.shape[1:] != self._shapes.setdefault(column, array.shape[1:]):
                raise ValueError(
                    f"contains lists of shape {array.shape[1:]}, earlier ones have {self._shapes[column]}; needed "
                    "lists of one length: pad them"
                )
        except ValueError as error:
            raise DataError(f"{self.caller}: {location}, column {column!r} {error}") from None
        return array


def _type(schema: pa.Schema, column: str) -> pa.DataType:
    return schema.field(schema.names.index(column)).type


def _leaf(schema: pa.Schema, column: str) -> int:
    """The number of a column in a footer; a column of numbers, or of lists of them, is stored as one leaf."""
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
