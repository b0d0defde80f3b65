from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar.data import windows
from raypar.data.parquet import Arrays, RowGroups
from raypar.data.row_order import RowOrder
from raypar.errors import DataError, RunError
from support.waiting import LIMIT


def write(folder: Path, sizes: list[int], files: int = 1) -> RowGroups:
    """Row groups of these sizes in some files, whose column "row" counts them and "wide" repeats that."""
    first = 0
    for file in range(files):
        with pq.ParquetWriter(
            folder / f"{file}.parquet", pa.schema({"row": pa.int64(), "wide": pa.list_(pa.int64(), 3)})
        ) as to:
            for size in sizes[file::files]:
                rows = np.arange(first, first + size)
                wide = pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(rows, 3)), 3)
                to.write_table(pa.table({"row": rows, "wide": wide}), row_group_size=max(1, size))
                first += size
    groups = RowGroups("batches('train')", folder)
    groups.check()
    return groups


def request_of(groups: RowGroups, batch_size: int = 4, window: int = 10, **options: int | None) -> RowOrder:
    return RowOrder(groups.sizes, batch_size, window, **{"seed": 0} | options)  # type: ignore[arg-type]


def read(groups: RowGroups, order: RowOrder, first: int = 0, replica: int = 0, replicas: int = 1) -> list[list[int]]:
    found = []
    for batch in windows.batches(groups, order, first, replica, replicas):
        assert np.array_equal(batch["wide"], np.repeat(batch["row"][:, None], 3, axis=1))
        found.append(batch["row"].tolist())
    return found


class Reads:
    """What was read: the row groups, and how many of them at once at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: list[int] = []
        original = RowGroups.read

        def counting(groups: RowGroups, number: int) -> Iterator[Arrays]:
            self.groups.append(number)
            yield from original(groups, number)

        monkeypatch.setattr(RowGroups, "read", counting)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("raypar reads")]


# ---------------------------------------------------------------- which rows


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    files=st.integers(1, 3),
    batch_size=st.integers(1, 12),
    window=st.integers(1, 80),
    replicas=st.integers(1, 3),
    shuffle=st.booleans(),
)
def test_global_batches_do_not_depend_on_replicas(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    files: int,
    batch_size: int,
    window: int,
    replicas: int,
    shuffle: bool,
):
    """Each row comes once per epoch."""
    groups = write(tmp_path_factory.mktemp("d"), sizes, files=min(files, len(sizes)))
    order = request_of(groups, batch_size, window, seed=3 if shuffle else None)
    alone = read(groups, order)
    assert sorted(chain(*alone)) == list(range(sum(sizes)))
    assert [len(batch) for batch in alone[:-1]] == [batch_size] * (len(alone) - 1)
    shares = [read(groups, order, 0, replica, replicas) for replica in range(replicas)]
    assert [list(chain(*each)) for each in zip(*shares, strict=True)] == alone
    middle = len(alone) // 2
    assert read(groups, order, middle) == alone[middle:]


def test_a_batch_may_span_windows(tmp_path: Path):
    groups = write(tmp_path, [3] * 7)
    found = read(groups, request_of(groups, batch_size=10, window=3))
    assert [len(batch) for batch in found] == [10, 10, 1]
    assert sorted(chain(*found)) == list(range(21))


# ---------------------------------------------------------------- what is read


def test_a_resumed_epoch_reads_nothing_earlier(tmp_path: Path, reads: Reads):
    groups = write(tmp_path, [5] * 20)
    order = request_of(groups, batch_size=5, window=10)
    whole = read(groups, order)
    assert sorted(reads.groups) == list(range(20))
    reads.groups.clear()
    assert read(groups, order, first=17) == whole[17:]
    assert len(reads.groups) == 4  # batches 17 to 19: half of one window of two groups, and all of the next
    assert set(reads.groups) == {group for window in order.windows(17) for group in window.groups}


def test_only_needed_row_groups_are_read(tmp_path: Path, reads: Reads):
    """Those with rows of the replica."""
    groups = write(tmp_path, [5] * 20)
    order = request_of(groups, batch_size=50, window=10, seed=None)
    assert read(groups, order, replica=1, replicas=2) == [list(range(25, 50)), list(range(75, 100))]
    assert sorted(reads.groups) == [*range(5, 10), *range(15, 20)]


def test_one_window_is_read_once(tmp_path: Path, reads: Reads):
    """Each epoch and each evaluation read and decoded the whole file again."""
    groups = write(tmp_path, [5] * 4)
    for epoch in range(3):
        assert sorted(chain(*read(groups, request_of(groups, window=20, epoch=epoch)))) == list(range(20))
    assert sorted(reads.groups) == list(range(4))
    assert not readers()


def test_two_windows_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever the size of the data set. Buffers that are used again are the same arrays."""
    groups = write(tmp_path, [5] * 40)
    buffers: dict[int, np.ndarray] = {}
    original = windows.load

    def watched(*args: object) -> Arrays:
        arrays = original(*args)  # type: ignore[arg-type]
        buffers.update({id(values): values for values in arrays.values()})  # keeps them, so that no id comes twice
        return arrays

    monkeypatch.setattr(windows, "load", watched)
    for replicas in (1, 2):
        buffers.clear()
        assert len(read(groups, request_of(groups, batch_size=10, window=20), replicas=replicas)) == 20
        assert len(buffers) <= 2 * 2  # of two columns
        assert {len(values) for values in buffers.values()} == {20 // replicas}


def test_no_more_than_the_window_ahead_is_read(tmp_path: Path, reads: Reads):
    groups = write(tmp_path, [5] * 40)
    window_of = {group: at for at, each in enumerate(request_of(groups, 5, 20).windows()) for group in each.groups}
    with closing(windows.batches(groups, request_of(groups, 5, 20), 0, 0, 1)) as found:
        for index, _ in enumerate(found):
            assert max(window_of[group] for group in reads.groups) <= index // 4 + 1


def test_a_batch_is_the_loops_own_to_change(tmp_path: Path):
    groups = write(tmp_path, [5] * 8)
    for window in (10, 40):
        kept = list(windows.batches(groups, request_of(groups, window=window), 0, 0, 1))
        for batch in kept:
            batch["row"] += 100
        assert sorted(chain(*(batch["row"].tolist() for batch in kept))) == list(range(100, 140))
        assert sorted(chain(*read(groups, request_of(groups, window=window)))) == list(range(40))


# ---------------------------------------------------------------- how it ends


def test_the_threads_end_with_the_loop(tmp_path: Path):
    """With the epoch, a break, or an error."""
    groups = write(tmp_path, [5] * 20)
    assert len(read(groups, request_of(groups))) == 25
    assert not readers()
    for _ in windows.batches(groups, request_of(groups), 0, 0, 1):
        assert readers()
        break
    assert not readers()

    def fail() -> None:
        for _ in windows.batches(groups, request_of(groups), 0, 0, 1):
            raise KeyError("the loop's own")

    with pytest.raises(KeyError, match="the loop's own"):
        fail()
    assert not readers()


def test_leaving_a_loop_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The thread went on until the window was whole, which takes long where the store is slow."""
    groups = write(tmp_path, [5] * 4)
    order = request_of(groups, batch_size=5, window=5)
    second = [window.groups[0] for window in order.windows()][1]
    original, in_second = RowGroups.read, threading.Event()

    def endless(groups: RowGroups, number: int) -> Iterator[Arrays]:
        yield from original(groups, number)
        while number == second:
            in_second.set()
            yield {"row": np.zeros(0, np.int64)}

    monkeypatch.setattr(RowGroups, "read", endless)
    found = windows.batches(groups, order, 0, 0, 1)
    next(found)
    assert in_second.wait(LIMIT)
    found.close()
    assert not readers()


@pytest.mark.parametrize(
    ("raised", "wanted"), [(OSError("HTTP 503"), RunError), (pa.ArrowInvalid("bad page"), DataError)]
)
def test_a_reading_error_is_raised_in_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, wanted: type[Exception]
):
    """A store that fails may answer again, so that the run may be tried again; what cannot be decoded stays so."""
    groups = write(tmp_path, [5] * 8)
    order = request_of(groups, batch_size=5, window=5)
    third = [window.groups[0] for window in order.windows()][2]
    original = pq.ParquetFile.iter_batches

    def failing(self: pq.ParquetFile, *args: object, row_groups: list[int], **options: object) -> Iterator[object]:
        if row_groups == [third]:
            raise raised
        return original(self, *args, row_groups=row_groups, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", failing)
    found = windows.batches(groups, order, 0, 0, 1)
    for _ in range(2):
        next(found)
    with pytest.raises(
        wanted, match=rf"batches\('train'\): .*0\.parquet, row group {third} .*be read: {raised}"
    ) as error:
        next(found)
    assert error.value.retryable == (wanted is RunError)  # type: ignore[attr-defined]
    assert not readers()
