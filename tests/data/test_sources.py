"""Data sets of every kind as runs see them that crash and go on; those that are no Parquet also in the small."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from raypar.checkpoint.manifest import newest_checkpoint, read_manifest
from raypar.data.parquet import RowGroups
from raypar.data.sources import RayDataShard, check_datasets
from raypar.errors import DataError, UsageError
from raypar.loop.batches import batches
from raypar.loop.local import run_local
from raypar.loop.parallelize import parallelize
from raypar.loop.replica import report
from raypar.loop.session import RunSpec, current, epochs
from raypar.planning.plan import Plan, Timeouts
from raypar.storage import Storage

ROWS = 10


class Crash(Exception):
    """What ends a loop in the midst of a run."""


class Stream(IterableDataset[tuple[float]]):
    def __iter__(self) -> Iterator[tuple[float]]:
        return ((float(row),) for row in range(ROWS))


def indexed() -> Any:
    return TensorDataset(torch.arange(float(ROWS)))


def streamed() -> Any:
    return lambda: ((float(row),) for row in range(ROWS))


def sharded() -> Any:
    """As Ray Train gives one to each replica: every one its own rows."""

    def read(rows: int, drop_last: bool) -> Iterator[dict[str, torch.Tensor]]:
        session = current("the test")
        own = torch.arange(float(ROWS))[session.replica :: session.size]
        return iter({"x": part} for part in own.split(rows) if len(part) == rows or not drop_last)

    return RayDataShard(read)


def rows_of(batch: Any) -> torch.Tensor:
    found = batch["x"] if isinstance(batch, dict) else batch[0]
    assert isinstance(found, torch.Tensor)
    return found.float()


def train(
    folder: Path,
    dataset: Any,
    replicas: int = 1,
    crash_after: int | None = None,
    passes: int = 2,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> list[list[list[float]]]:
    """The rows of each replica's steps in each epoch; the run saves behind step `crash_after`, and crashes."""
    found: list[list[list[float]]] = [[] for _ in range(passes)]

    def loop() -> None:
        replica = parallelize(
            lambda: nn.Linear(1, 1),
            loss_fn=F.mse_loss,
            optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=1e-4),
        )
        steps = 0
        for epoch in epochs(passes):
            for batch in batches("train", **{"batch_size": 4} | options):
                rows = rows_of(batch)
                replica.train_step(rows[:, None], rows[:, None])
                found[epoch].append(rows.tolist())
                steps += 1
                if steps == crash_after:
                    report({}, replica)
                    raise Crash
        report({}, replica)

    storage = Storage.open(folder, "run")
    if crash_after is None:
        run_local(RunSpec(loop, Plan(data=replicas), {"train": dataset}, Timeouts(), storage), on_progress=on_progress)
    else:
        with pytest.raises(Crash):
            run_local(RunSpec(loop, Plan(data=replicas), {"train": dataset}, Timeouts(), storage))
    return found


def saved_position(folder: Path) -> dict[str, Any]:
    storage = Storage.open(folder, "run")
    path = newest_checkpoint(storage)
    assert path is not None
    position: dict[str, Any] = read_manifest(path, storage.filesystem)["position"]
    return position


# ---------------------------------------------------------------- epochs, and going on


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("make", [indexed, streamed, Stream])
def test_each_row_comes_once_an_epoch(tmp_path: Path, make: Callable[[], Any], replicas: int):
    shuffle = make is indexed
    for of_epoch in train(tmp_path, make(), replicas, shuffle=shuffle):
        assert sorted(chain(*of_epoch)) == list(range(ROWS))
        assert len(of_epoch) == 3 * replicas


def test_a_torch_data_set_is_shuffled_as_parquet_is(tmp_path: Path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"x": pa.array(map(float, range(ROWS)))}), path, row_group_size=3)
    assert train(tmp_path / "a", indexed(), seed=5) == train(tmp_path / "b", path, seed=5)


@pytest.mark.parametrize("make", [indexed, streamed, Stream])
@pytest.mark.parametrize("step", range(1, 6))
def test_a_crashed_run_resumes_at_the_next_batch(tmp_path: Path, make: Callable[[], Any], step: int):
    """Also behind the last batch of an epoch, where only the end of the stream tells that it was the last."""
    shuffle = make is indexed
    before = train(tmp_path, make(), crash_after=step, shuffle=shuffle)
    position = saved_position(tmp_path)
    assert (position["epoch"], position["trained"]) == (step // 3, {"train": step % 3} if step % 3 else {})
    after = train(tmp_path, make(), shuffle=shuffle)
    for epoch in range(2):
        assert sorted(chain(*before[epoch], *after[epoch])) == list(range(ROWS))


def test_a_resumed_run_skips_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It reads only those that the rest of the epoch needs."""
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"x": pa.array(map(float, range(40)))}), path, row_group_size=4)
    read: list[int] = []
    original = RowGroups.read

    def counting(groups: RowGroups, number: int) -> Any:
        read.append(number)
        return original(groups, number)

    before = train(tmp_path, path, crash_after=7, passes=1, window=8)
    monkeypatch.setattr(RowGroups, "read", counting)
    after = train(tmp_path, path, passes=1, window=8, replicas=3)
    assert sorted(chain(*before[0], *after[0])) == list(range(40))
    assert len(set(read)) == 4  # of 10: batches 7 to 9 lie in the last two windows, of two row groups each


def test_shards_of_others_restart_the_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """And the log says so."""
    first = train(tmp_path, sharded(), crash_after=4, shuffle=False)
    assert [len(steps) for steps in first] == [3, 1]
    with caplog.at_level(logging.WARNING, "raypar"):
        second = train(tmp_path, sharded(), shuffle=False)
    assert [len(steps) for steps in second] == [0, 3]
    assert "resumes by epoch only, so epoch 1 begins again, of which 1 batches were trained on before" in caplog.text


def test_global_batches_take_from_each_shard(tmp_path: Path):
    """As many rows of each."""
    first, second = train(tmp_path, sharded(), replicas=2, shuffle=False)
    assert sorted(first) == sorted(second) == [[0, 2], [1, 3], [4, 6], [5, 7], [8], [9]]
    full, _ = train(tmp_path / "b", sharded(), replicas=2, shuffle=False, drop_last=True)
    assert sorted(full) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    with pytest.raises(
        UsageError, match=r"batches\('train', batch_size=3\): needed a multiple of 2, since each replica"
    ):
        train(tmp_path / "c", sharded(), replicas=2, shuffle=False, batch_size=3)


def test_a_stream_has_no_total_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Progress shows none before the end of the stream."""
    monkeypatch.setattr("raypar.loop.session.Rate.count", lambda rate, samples: True)
    shown: list[dict[str, Any]] = []
    train(tmp_path, streamed(), passes=1, on_progress=shown.append, shuffle=False, batch_size=2)
    assert (shown[0]["done"], shown[0]["total"]) == (1, None)
    assert (shown[-1]["done"], shown[-1]["total"]) == (5, 5)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("make", [streamed, Stream, sharded])
def test_streams_and_shards_are_not_shuffled(tmp_path: Path, make: Callable[[], Any]):
    with pytest.raises(
        UsageError, match=r"batches\('train', shuffle=True\): found a \w+, whose order is its own; needed"
    ):
        train(tmp_path, make())


@pytest.mark.parametrize("options", [{"columns": ["x"]}, {"window": 3}])
@pytest.mark.parametrize("make", [indexed, streamed])
def test_columns_and_windows_are_of_parquet(tmp_path: Path, make: Callable[[], Any], options: dict[str, Any]):
    with pytest.raises(UsageError, match=r"batches\('train', \w+=.*\): it is for Parquet, found a \w+"):
        train(tmp_path, make(), **options)


def test_a_stream_that_gives_nothing_is_told(tmp_path: Path):
    """Most of all the one that a function has returned before, and that is at its end."""
    only = iter([(1.0,)])
    with pytest.raises(DataError, match=r"gave no sample, or too few .* return a fresh iterable at each call"):
        train(tmp_path, lambda: only, shuffle=False)


def test_an_epoch_needs_a_batch(tmp_path: Path):
    with pytest.raises(DataError, match="gave no sample, or too few for a full batch"):
        train(tmp_path / "a", streamed(), shuffle=False, batch_size=11, drop_last=True)
    with pytest.raises(DataError, match="the data set has 10 rows, so no batch is full"):
        train(tmp_path / "b", indexed(), batch_size=11, drop_last=True)


class NoLength(Dataset[int]):
    def __getitem__(self, row: int) -> int:
        return row


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (NoLength(), r"datasets\['train'\]: NoLength has no len\(\), needed its number of rows"),
        (TensorDataset(torch.zeros(0)), r"datasets\['train'\]: TensorDataset has no rows, needed at least one"),
        (3, r"datasets\['train'\]: found int, needed the path or URI of Parquet data, .* or a ray\.data\.Dataset"),
    ],
)
def test_what_is_no_data_set_is_refused(given: Any, message: str):
    """Before a run starts."""
    with pytest.raises(DataError, match=message):
        check_datasets({"train": given})


def test_checking_reads_no_sample():
    def never() -> Any:
        raise AssertionError("read on the driver")

    check_datasets({"a": indexed(), "b": never, "c": Stream()})
