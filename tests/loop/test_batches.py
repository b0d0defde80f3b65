from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar import tree
from raypar.data.batch import Batch
from raypar.data.parquet import RowGroups
from raypar.data.sources import check_datasets
from raypar.errors import DataError, UsageError
from raypar.loop.batches import batches
from raypar.loop.local import run_local
from raypar.loop.session import RunSpec, current, epochs
from raypar.planning.plan import Plan, Timeouts
from raypar.storage import Storage

Batches = list[Batch]


def write(path: Path, **columns: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return str(path)


def numbered(path: Path, rows: int, first: int = 0) -> str:
    """A file whose only column counts its rows."""
    return write(path, row=pa.array(range(first, first + rows)))


def shares(
    path: Any, replicas: int = 1, passes: int = 1, read: Callable[..., Any] = batches, **options: Any
) -> list[list[Batches]]:
    """What each replica gets in each epoch."""
    epochs_of: list[list[Batches]] = [[] for _ in range(replicas)]

    def loop() -> None:
        for _ in epochs(passes):
            epochs_of[current("the test").replica].append(list(read("train", **options)))

    nowhere = Storage.open("/dev/null", "run")  # nothing can be written there
    run_local(RunSpec(loop, Plan(data=replicas), {"train": path}, Timeouts(), nowhere))
    return epochs_of


def rows_of(of_epoch: Batches) -> list[list[int]]:
    return [batch["row"].tolist() for batch in of_epoch]


def test_a_small_data_set_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each epoch and each evaluation read and decoded the whole file again."""
    path = write(tmp_path / "rows.parquet", a=pa.array([1, 2]), b=pa.array([3, 4]))
    read: list[Any] = []
    original = RowGroups.read

    def counting(groups: RowGroups, number: int) -> Any:
        read.append(groups.columns)
        return original(groups, number)

    monkeypatch.setattr(RowGroups, "read", counting)

    def loop() -> None:
        for _ in epochs(3):
            assert [set(batch) for batch in batches("train", batch_size=2)] == [{"a", "b"}]
            assert [set(batch) for batch in batches("train", batch_size=1, columns=["a"])] == [{"a"}, {"a"}]

    run_local(RunSpec(loop, Plan(), {"train": path}, Timeouts(), Storage.open("/dev/null", "run")))
    assert read == [["a", "b"], ["a"]]


# ---------------------------------------------------------------- columns as tensors


@pytest.mark.parametrize(
    ("column", "shape", "dtype"),
    [
        (pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((6, 1, 4, 5), np.float32)), (6, 1, 4, 5), torch.float32),
        (pa.FixedSizeListArray.from_arrays(pa.array(range(18)), 3), (6, 3), torch.int64),
        (
            pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(24)), 2), 2),
            (6, 2, 2),
            torch.float64,
        ),
        (pa.array(range(6)), (6,), torch.int64),
        (pa.array(range(6), pa.uint8()), (6,), torch.uint8),
        (pa.array([0.5] * 6, pa.float16()), (6,), torch.float16),
        (pa.array([True, False] * 3), (6,), torch.bool),
    ],
)
def test_a_column_becomes_a_tensor(tmp_path: Path, column: pa.Array, shape: tuple[int, ...], dtype: torch.dtype):
    (((batch,),),) = shares(write(tmp_path / "t.parquet", x=column), batch_size=6)
    assert (tuple(batch["x"].shape), batch["x"].dtype) == (shape, dtype)


def test_a_tensor_column_keeps_its_shape(tmp_path: Path):
    images = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    path = write(tmp_path / "t.parquet", image=pa.FixedShapeTensorArray.from_numpy_ndarray(images), row=range(4))
    (((first, second),),) = shares(path, batch_size=2)
    for batch in (first, second):
        assert torch.equal(batch["image"], torch.from_numpy(images[batch["row"].numpy()]))


def test_writing_to_a_batch_changes_no_data(tmp_path: Path):
    def read_twice(name: str, **options: Any) -> Batches:
        for batch in batches(name, **options):
            batch["row"] += 100
        return list(batches(name, **options))

    (((batch,),),) = shares(numbered(tmp_path / "t.parquet", 3), batch_size=3, shuffle=False, read=read_twice)
    assert batch["row"].tolist() == [0, 1, 2]


def test_only_chosen_columns_are_read(tmp_path: Path):
    """Others may hold anything."""
    path = write(tmp_path / "t.parquet", x=[1, 2], name=["a", "b"], empty=[None, 1])
    (((batch,),),) = shares(path, batch_size=2, columns=["x"])
    assert list(batch) == ["x"]


def test_a_batch_can_be_a_models_inputs():
    batch = Batch(x=torch.ones(2), y=torch.zeros(2))
    assert len(tree.leaves(batch)) == 2
    again = tree.map_tensors(lambda t: t + 1, batch)
    assert isinstance(again, Batch)
    assert again["x"].tolist() == [2, 2]
    assert tree.unpack(tree.pack(tree.flatten(batch)[1], None))[0] == tree.flatten(batch)[1]


def test_a_missing_column_names_near_ones():
    with pytest.raises(DataError, match=r"the batch has no column 'lable'; did you mean 'label'\?"):
        Batch(label=torch.ones(1))["lable"]


# ---------------------------------------------------------------- files and folders


def test_a_folder_is_all_its_parquet_files(tmp_path: Path):
    numbered(tmp_path / "d" / "b.parquet", 2, first=10)
    numbered(tmp_path / "d" / "a.parquet", 2, first=0)
    numbered(tmp_path / "d" / "c" / "a.parquet", 1, first=20)
    (tmp_path / "d" / "_SUCCESS").write_text("")
    (tmp_path / "d" / ".a.parquet.123").write_text("half written")
    for path in (tmp_path / "d", str(tmp_path / "d"), f"file://{tmp_path}/d"):
        check_datasets({"train": path})
        (((batch,),),) = shares(path, batch_size=9, shuffle=False)
        assert batch["row"].tolist() == [0, 1, 10, 11, 20]


def test_a_file_without_rows_is_fine(tmp_path: Path):
    numbered(tmp_path / "a.parquet", 2)
    write(tmp_path / "b.parquet", row=pa.array([], pa.int64()))
    (((batch,),),) = shares(tmp_path, batch_size=2, shuffle=False)
    assert batch["row"].tolist() == [0, 1]


# ---------------------------------------------------------------- which rows form which batch


def test_unshuffled_rows_come_as_stored(tmp_path: Path):
    ((first, second),) = shares(numbered(tmp_path / "t.parquet", 5), passes=2, batch_size=2, shuffle=False)
    assert rows_of(first) == rows_of(second) == [[0, 1], [2, 3], [4]]


def test_each_row_comes_once_per_epoch(tmp_path: Path):
    """Each epoch has another order."""
    ((first, second),) = shares(numbered(tmp_path / "t.parquet", 50), passes=2, batch_size=8)
    for of_epoch in (first, second):
        assert sorted(chain(*rows_of(of_epoch))) == list(range(50))
        assert [len(rows) for rows in rows_of(of_epoch)] == [8, 8, 8, 8, 8, 8, 2]
    assert rows_of(first) != rows_of(second)


def test_only_the_seed_decides_the_order(tmp_path: Path):
    path = numbered(tmp_path / "t.parquet", 50)
    torch.manual_seed(1)
    one = shares(path, passes=2, batch_size=8, seed=3)
    torch.manual_seed(2)
    same, other = shares(path, passes=2, batch_size=8, seed=3), shares(path, passes=2, batch_size=8, seed=4)
    assert [rows_of(batch) for batch in one[0]] == [rows_of(batch) for batch in same[0]]
    assert rows_of(one[0][0]) != rows_of(other[0][0])


def test_the_batch_size_does_not_change_the_order(tmp_path: Path):
    path = numbered(tmp_path / "t.parquet", 20)
    orders = [list(chain(*rows_of(shares(path, batch_size=size)[0][0]))) for size in (1, 3, 20)]
    assert orders[0] == orders[1] == orders[2]


def test_windows_keep_the_global_batches(
    tmp_path: Path,
):
    """Of a data set that is larger than a window."""
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"row": range(100)}), path, row_group_size=10)
    ((first, second),) = shares(path, passes=2, batch_size=16, window=30)
    for of_epoch in (first, second):
        assert sorted(chain(*rows_of(of_epoch))) == list(range(100))
    assert rows_of(first) != rows_of(second)
    for replicas in (2, 3):
        of_replicas = [rows_of(of_epochs[0]) for of_epochs in shares(path, replicas, batch_size=16, window=30)]
        assert [list(chain(*of_batch)) for of_batch in zip(*of_replicas, strict=True)] == rows_of(first)


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 40), batch_size=st.integers(1, 12), replicas=st.integers(1, 4), shuffle=st.booleans())
def test_shares_form_the_same_global_batches(
    tmp_path_factory: pytest.TempPathFactory, rows: int, batch_size: int, replicas: int, shuffle: bool
):
    """Whatever the number of replicas."""
    path = numbered(tmp_path_factory.mktemp("d") / "t.parquet", rows)
    ((whole,),) = shares(path, batch_size=batch_size, shuffle=shuffle)
    parts = [rows_of(of_replica[0]) for of_replica in shares(path, replicas, batch_size=batch_size, shuffle=shuffle)]
    for index, batch in enumerate(rows_of(whole)):
        mine = [part[index] for part in parts]
        assert list(chain(*mine)) == batch
        sizes = [len(part) for part in mine]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1
    assert {len(part) for part in parts} == {-(-rows // batch_size)}


def test_a_share_may_have_no_rows(tmp_path: Path):
    (((one,),), ((other,),)) = shares(numbered(tmp_path / "t.parquet", 1), 2, batch_size=8)
    assert (one["row"].tolist(), other["row"].tolist()) == ([0], [])
    assert other["row"].dtype == torch.int64


def test_a_short_last_batch_can_be_dropped(tmp_path: Path):
    path = numbered(tmp_path / "t.parquet", 7)
    assert rows_of(shares(path, batch_size=3, shuffle=False, drop_last=True)[0][0]) == [[0, 1, 2], [3, 4, 5]]
    assert rows_of(shares(path, batch_size=7, shuffle=False, drop_last=True)[0][0]) == [[0, 1, 2, 3, 4, 5, 6]]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "nowhere.parquet", r"datasets\['train'\]: .*nowhere\.parquet does not exist, needed a Parquet"),
        (
            lambda d: (d / "empty").mkdir() or d / "empty",
            r"empty contains no \*\.parquet file, needed a Parquet file or a",
        ),
        (lambda d: write(d / "t.parquet", x=pa.array([], pa.int64())), r"t\.parquet has no rows, needed at least one"),
        (lambda d: (d / "t.parquet").write_text("text") and d / "t.parquet", r"t\.parquet is not a Parquet file"),
        (lambda d: [1, 2], r"datasets\['train'\]: found list, needed the path or URI of Parquet data, a torch\.utils"),
        (
            lambda d: write(d / "t.parquet", name=["a", "b"], n=[1, None]),
            r"t\.parquet, column 'name' has type string, needed numbers",
        ),
        (lambda d: "nosuch://bucket/t.parquet", r"nosuch://bucket/t\.parquet cannot be reached"),
    ],
)
def test_unreadable_data_sets_are_refused_early(tmp_path: Path, make: Callable[[Path], Any], message: str):
    with pytest.raises(DataError, match=message):
        check_datasets({"good": numbered(tmp_path / "good.parquet", 1), "train": make(tmp_path)})


def test_no_data_sets_are_fine():
    check_datasets(None)
    check_datasets({})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ["lable"]}, r"batches\('train'\): .*t\.parquet has no column 'lable'; did you mean 'label'\?"),
        ({}, r"batches\('train'\): .*t\.parquet, column 'name' has type string, .* batches\(…, columns=\[…\]\)"),
        ({"columns": ["ragged"]}, r"t\.parquet, row group 0, column 'ragged' contains lists of different lengths"),
        ({"columns": ["when"]}, r"column 'when' has type timestamp"),
        ({"columns": ["gaps"]}, r"t\.parquet, row group 0, column 'gaps' has 1 nulls; fill them or drop these rows"),
        ({"columns": ["inner"]}, r"t\.parquet, row group 0, column 'inner' has 1 nulls; fill them or drop these rows"),
        ({"columns": ["label"], "batch_size": 9, "drop_last": True}, r"has 3 rows, so no batch is full; lower"),
    ],
)  # fmt: skip
def test_unusable_columns_are_refused(tmp_path: Path, options: dict[str, Any], message: str):
    path = write(
        tmp_path / "t.parquet",
        label=[1, 2, 3],
        name=["a", "b", "c"],
        ragged=[[1], [2, 3], []],
        when=pa.array([0, 1, 2], pa.timestamp("s")),
        gaps=[1.0, None, 3.0],
        inner=pa.array([[1, 2], [3, None], [5, 6]], pa.list_(pa.int64(), 2)),
    )
    with pytest.raises(DataError, match=message):
        shares(path, **({"batch_size": 2} | options))


def test_an_unknown_data_set_names_near_ones(tmp_path: Path):
    with pytest.raises(
        DataError, match=r"batches\('trian'\): Trainer\(datasets=…\) has no such data set; did you mean 'train'\?"
    ):
        shares(numbered(tmp_path / "t.parquet", 1), read=lambda name, **_: batches("trian", batch_size=1))


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, "2", True, None])
def test_a_batch_size_is_positive(tmp_path: Path, batch_size: Any):
    with pytest.raises(UsageError, match=r"batches\('train', batch_size=.*\): needed a whole number of at least 1"):
        shares(numbered(tmp_path / "t.parquet", 1), batch_size=batch_size)


@pytest.mark.parametrize(("argument", "value"), [("window", 0), ("window", 1.5), ("seed", -1), ("seed", None)])
def test_a_window_and_a_seed_are_whole_numbers(tmp_path: Path, argument: str, value: Any):
    with pytest.raises(UsageError, match=rf"batches\('train', {argument}={value}\): needed a whole number of at least"):
        shares(numbered(tmp_path / "t.parquet", 1), batch_size=1, **{argument: value})


@pytest.mark.parametrize("columns", ["row", [], ()])
def test_columns_are_a_list_of_names(tmp_path: Path, columns: Any):
    with pytest.raises(UsageError, match=r"batches\('train', columns=.*\): needed a list of at least one name"):
        shares(numbered(tmp_path / "t.parquet", 1), batch_size=1, columns=columns)


def test_wrong_arguments_are_refused_at_the_call(tmp_path: Path):
    """They are not refused only when the first batch is asked for."""

    def read(name: str, **options: Any) -> Batches:
        with pytest.raises(DataError):
            batches(name, batch_size=1, columns=["nosuch"])
        return []

    assert shares(numbered(tmp_path / "t.parquet", 1), read=read) == [[[]]]


def test_outside_a_train_loop_there_are_no_batches():
    with pytest.raises(UsageError, match=r"raypar\.batches was called outside a train loop; needed: a call from"):
        batches("train", batch_size=1)
