from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypar.data.parquet import RowGroups
from raypar.errors import DataError, RunError
from support.store import memory_store


def write(path: Path, size: int = 1000, statistics: bool = True, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=size, write_statistics=statistics)
    return path


def rows_of(groups: RowGroups, column: str = "x") -> list[Any]:
    groups.check()
    found: list[Any] = []
    for number in range(len(groups.sizes)):
        for some in groups.read(number):
            found += some[column].tolist()
    return found


# ---------------------------------------------------------------- what is there


def test_row_groups_are_numbered_through_files(tmp_path: Path):
    write(tmp_path / "b.parquet", size=2, x=[5, 6, 7])
    write(tmp_path / "a.parquet", size=3, x=[0, 1, 2, 3])
    groups = RowGroups("here", tmp_path)
    assert (groups.sizes, groups.rows) == ((3, 1, 2, 1), 7)
    assert rows_of(groups) == [0, 1, 2, 3, 5, 6, 7]


def test_hidden_files_are_not_data(tmp_path: Path):
    """Spark writes a folder train.parquet, and what is not yet whole below _temporary."""
    write(tmp_path / "d" / "train.parquet" / "part-0.parquet", x=[1])
    for hidden in ("_temporary/0/part-1.parquet", ".part-2.parquet", "_part-3.parquet"):
        write(tmp_path / "d" / hidden, x=[2])
    assert rows_of(RowGroups("here", tmp_path / "d")) == [1]
    assert rows_of(RowGroups("here", tmp_path / "d" / "_temporary")) == [2]


def test_any_pyarrow_file_system_will_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A URI names it: s3://, gs://, hdfs://. Here one in memory stands for them."""
    memory = memory_store(monkeypatch)
    memory.create_dir("bucket/d")
    for name, x in (("a", [1, 2]), ("b", [3])):
        pq.write_table(pa.table({"x": x}), f"bucket/d/{name}.parquet", filesystem=memory)
    assert rows_of(RowGroups("here", "mem://bucket/d")) == [1, 2, 3]
    assert rows_of(RowGroups("here", "mem://bucket/d/b.parquet")) == [3]


def test_a_large_row_group_is_read_in_steps(tmp_path: Path):
    """What is decoded at once is no larger than a processor's cache, also where a file is one row group."""
    x = np.arange(400 * 2048, dtype=np.float32).reshape(400, 2048)
    path = write(tmp_path / "a.parquet", x=pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 2048))
    groups = RowGroups("here", path)
    assert groups.row_bytes == 2048 * 4
    steps = [some["x"] for some in groups.read(0)]
    assert {len(some) for some in steps} <= {128, 400 % 128}
    assert np.array_equal(np.concatenate(steps), x)


def test_row_bytes_count_all_columns(tmp_path: Path):
    """Whichever are chosen."""
    path = write(
        tmp_path / "a.parquet",
        x=pa.array([1, 2], pa.int16()),
        flag=[True, False],
        lists=[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]],
        name=["a", "b"],
    )
    assert RowGroups("here", path).row_bytes == RowGroups("here", path, ["x"]).row_bytes == 2 + 1 + 3 * 8


def test_columns_after_nested_ones(tmp_path: Path):
    """A footer lists the leaves of all columns, one after the other."""
    path = write(
        tmp_path / "a.parquet",
        point=pa.array([{"a": 1, "b": "c"}], pa.struct([("a", pa.int8()), ("b", pa.string())])),
        pairs=pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int8())),
        image=pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((1, 2, 2))),
        gaps=pa.array([None], pa.int64()),
    )
    groups = RowGroups("here", path)
    assert groups.problem("image") is None
    assert "has 1 nulls" in (groups.problem("gaps") or "")
    assert "has type struct" in (groups.problem("point") or "")


# ---------------------------------------------------------------- what is wrong, from the footers


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": pa.array([1, 2, 3, None])}, r"a\.parquet, row group 1, column 'x' has 1 nulls; fill them or drop"),
        (
            {"x": pa.array([[1, 2], [3, 4], [5, None], None], pa.list_(pa.int64(), 2))},
            r"a\.parquet, row group 1, column 'x' has 2 nulls",
        ),
        (
            {"x": [[1], [2], [3], [4, 5]]},
            r"a\.parquet, row group 1, column 'x' contains lists of different lengths",
        ),
        ({"x": [[1], [2], [3, 4], [5, 6]]}, r"a\.parquet, row group 1, column 'x' contains lists of different"),
        ({"x": ["a"] * 4}, r"a\.parquet, column 'x' has type string, needed numbers, booleans, or lists of one length"),
        ({"x": [[["a"]]] * 4}, r"a\.parquet, column 'x' has type list<.*string"),
    ],
)
def test_footers_tell_errors_early(tmp_path: Path, columns: dict[str, Any], message: str):
    groups = RowGroups("here", write(tmp_path / "a.parquet", size=2, **columns))
    with pytest.raises(DataError, match=rf"here: .*{message}.*; choose the columns to read with batches"):
        groups.check()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"y": [1]}, r"the files differ in their schema: .*b\.parquet has no column 'x'"),
        (
            {"x": [1.5]},
            r"differ in their schema: .*b\.parquet, column 'x' has type double, in .*a\.parquet it has int64",
        ),
        ({"x": [1], "z": [1]}, r"differ in their schema: .*a\.parquet has no column 'z'"),
    ],
)
def test_files_that_differ_in_their_schema_are_told_apart(tmp_path: Path, other: dict[str, Any], message: str):
    write(tmp_path / "a.parquet", x=[1])
    write(tmp_path / "b.parquet", **other)
    with pytest.raises(DataError, match=message):
        RowGroups("here", tmp_path).check()


def test_two_columns_of_one_name_are_refused(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"]), path)
    with pytest.raises(DataError, match=r"a\.parquet has 2 columns 'x', needed one"):
        RowGroups("here", path).check()


def test_harmless_differences_between_files(tmp_path: Path):
    """In columns that are not chosen, in the order of columns, and in metadata."""
    write(tmp_path / "a.parquet", x=[1], y=[1.5], z=["a"])
    write(tmp_path / "b.parquet", z=[2], x=pa.array([2]), y=[2.5])
    table = pq.read_table(tmp_path / "b.parquet").replace_schema_metadata({"made": "by hand"})
    pq.write_table(table, tmp_path / "b.parquet")
    groups = RowGroups("here", tmp_path, ["y", "x"])
    assert (rows_of(groups), rows_of(groups, "y")) == ([1, 2], [1.5, 2.5])


def test_a_column_missing_from_one_file_is_named(tmp_path: Path):
    write(tmp_path / "a.parquet", label=[1])
    write(tmp_path / "b.parquet", lable=[1])
    with pytest.raises(DataError, match=r"here: .*b\.parquet has no column 'label'; did you mean 'lable'\?"):
        RowGroups("here", tmp_path, ["label"])


# ---------------------------------------------------------------- what is wrong, seen when it is read


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": pa.array([1, 2, 3, None])}, r"a\.parquet, row group 1, column 'x' has 1 nulls"),
        (
            {"x": [[1, 2], [3, 4], [5], [6, 7, 8]]},
            r"row group 1, column 'x' contains lists of 1 to 3 values; needed lists",
        ),
        (
            {"x": [[[1], [2]], [[3], [4]], [[1, 2]], [[3, 4]]]},
            r"row group 1, column 'x' contains lists of shape \(1, 2\), earlier ones have \(2, 1\)",
        ),
    ],
)
def test_errors_that_no_footer_tells(tmp_path: Path, columns: dict[str, Any], message: str):
    """Files may come without statistics, and a footer only counts the numbers in a row group's lists."""
    groups = RowGroups("here", write(tmp_path / "a.parquet", size=2, statistics=False, **columns))
    groups.check()
    with pytest.raises(DataError, match=message):
        rows_of(groups)


def test_a_damaged_file_is_named(tmp_path: Path):
    """With its row group."""
    path = write(tmp_path / "a.parquet", size=500, x=np.random.default_rng(0).integers(0, 1 << 60, 1000))
    groups = RowGroups("here", path)
    content = bytearray(path.read_bytes())
    content[10:60] = b"\xff" * 50
    path.write_bytes(content)
    with pytest.raises(Exception, match=r"here: .*a\.parquet, row group 0 (could not|cannot) be read"):
        rows_of(groups)


def test_checksums_reveal_a_damaged_page(tmp_path: Path):
    """One wrong byte in what is stored as it is changes a number, and nothing else would tell."""
    path = tmp_path / "rows.parquet"
    table = pa.table({"x": np.arange(1000.0)})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[content.index(np.float64(500.0).tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"rows\.parquet, row group 0 could not be read: .*CRC"):
        rows_of(RowGroups("here", path))
