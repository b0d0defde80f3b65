"""Batches of row groups: one window of rows is in memory while the next one is read.

    thread   │ reads window 0 │ reads window 1 ······ │ reads window 2 ······ │
    loop     │ ·············· │ batches of window 0   │ batches of window 1   │ …

At any time the rows of two windows are in memory, and only those that this replica takes. A data set no larger than one
window is read once and stays in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing
from typing import Any, TypeVar

import numpy as np

from raypar.data.parquet import Arrays, RowGroups
from raypar.data.row_order import RowOrder, Window

_READERS = 2
"""Row groups that are read at the same time: one is decoded while another one comes from the store."""


def load(
    groups: RowGroups,
    numbers: tuple[int, ...],
    rows: np.ndarray,
    buffers: Arrays,
    readers: Executor,
    stopped: threading.Event,
) -> Arrays:
    """Some rows of the row groups `numbers`, numbered through the groups laid end to end; `rows` ascend.

    `buffers` are used if they are large enough: the arrays may be longer than `rows`. Row groups without any of the
    rows are not read. Stops early once `stopped` is set.
    """
    loaded: Arrays = {}
    lock = threading.Lock()
    borders = np.cumsum([0, *(groups.sizes[number] for number in numbers)])
    wanted = np.flatnonzero(np.diff(np.searchsorted(rows, borders))).tolist() or [0]  # one, for the shapes

    def place(column: str, values: np.ndarray) -> np.ndarray:
        with lock:
            if column not in loaded:
                fits = column in buffers and len(buffers[column]) >= len(rows)
                loaded[column] = buffers[column] if fits else np.empty((len(rows), *values.shape[1:]), values.dtype)
            return loaded[column]

    def fill(at: int) -> None:
        first = borders[at]
        for arrays in groups.read(numbers[at]):
            if stopped.is_set():
                return
            size = len(next(iter(arrays.values())))
            begin, end = np.searchsorted(rows, (first, first + size))
            for column, values in arrays.items():
                target = place(column, values)[begin:end]
                if len(target) == size:
                    target[:] = values
                else:
                    np.take(values, rows[begin:end] - first, axis=0, out=target, mode="clip")
            first += size

    for _ in readers.map(fill, wanted):  # raises the error of one, and drops those that have not started
        pass
    return loaded


def batches(groups: RowGroups, order: RowOrder, first: int, replica: int, replicas: int) -> Generator[Arrays]:
    """A replica's shares of the batches from number `first` on."""
    windows = order.windows(first, replica, replicas)
    if order.rows <= order.window:
        yield from _cut((window, window.rows, whole(groups)) for window in windows)
        return
    stopped = threading.Event()
    spare: list[Arrays] = []  # the buffers of the previous window, once its batches are done

    def filled() -> Iterator[tuple[Window, np.ndarray, Arrays]]:
        for window in windows:
            rows, places = _without_gaps(window.rows, sum(groups.sizes[number] for number in window.groups))
            yield window, places, load(groups, window.groups, rows, spare.pop() if spare else {}, readers, stopped)

    with _readers() as readers, closing(ahead(filled(), stopped.set)) as coming:
        yield from _cut(coming, spare)


def _without_gaps(rows: np.ndarray, of: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows in ascending order, and the position of each of `rows` there."""
    if len(rows) == of:
        return np.arange(of), rows
    is_taken = np.zeros(of, bool)
    is_taken[rows] = True
    return np.flatnonzero(is_taken), (np.cumsum(is_taken) - 1)[rows]


def whole(groups: RowGroups) -> Arrays:
    """All rows, read once."""
    if not groups.table:
        numbers = tuple(range(len(groups.sizes)))
        with _readers() as readers:
            groups.table = load(groups, numbers, np.arange(groups.rows), {}, readers, threading.Event())
    return groups.table


def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_READERS, "raypar reads row groups")


def _cut(windows: Iterator[tuple[Window, np.ndarray, Arrays]], spare: list[Arrays] | None = None) -> Generator[Arrays]:
    """The batches of windows, each given with the positions of its rows and its arrays, then put into `spare`."""
    parts: list[Arrays] = []
    for window, places, arrays in windows:
        begin = 0
        for size, is_whole in window.pieces:
            rows = places[begin : begin + size]
            parts.append({column: np.take(values, rows, axis=0) for column, values in arrays.items()})
            begin += size
            if is_whole:
                yield _joined(parts)
                parts = []
        if spare is not None:
            spare.append(arrays)


def _joined(parts: list[Arrays]) -> Arrays:
    if len(parts) == 1:
        return parts[0]
    return {column: np.concatenate([part[column] for part in parts]) for column in parts[0]}


T = TypeVar("T")


def ahead(items: Iterator[T], stop: Callable[[], Any]) -> Generator[T]:
    """The items, each made on a thread while the previous one is in use: two of them exist at any time.

    An error of `items` is raised in place of the item. The thread ends with the items, when one fails, and when this
    generator is closed; `stop` is called before the wait for the thread, so that it need not finish its item.
    """
    end: Any = object()
    with ThreadPoolExecutor(1, "raypar reads ahead") as thread:
        try:
            coming = thread.submit(next, items, end)
            while (item := coming.result()) is not end:
                coming = thread.submit(next, items, end)
                yield item
        finally:
            stop()
