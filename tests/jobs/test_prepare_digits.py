from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

import prepare_digits
from prepare_digits import prepare


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return prepare(str(tmp_path_factory.mktemp("digits") / "new" / "folder"))


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    table = pq.read_table(path).combine_chunks()
    return table["image"].chunk(0).to_numpy_ndarray(), table["label"].to_numpy()


def test_every_image_is_in_one_of_the_two_files(digits: dict[str, Path]):
    images, labels = (np.concatenate(parts) for parts in zip(*(read(path) for path in digits.values()), strict=True))
    assert len(images) == 1797
    assert sorted(labels) == sorted(load_digits().target)
    assert len(np.unique(images, axis=0)) == len(np.unique(load_digits().images, axis=0))


@pytest.mark.parametrize(("name", "rows"), [("train", 1437), ("test", 360)])
def test_rows_columns_and_values(digits: dict[str, Path], name: str, rows: int):
    schema = pq.read_schema(digits[name])
    assert schema.field("image").type == pa.fixed_shape_tensor(pa.float32(), (1, 28, 28))
    assert schema.field("label").type == pa.int64()
    images, labels = read(digits[name])
    assert images.shape == (rows, 1, 28, 28)
    assert images.min() >= 0.0
    assert images.max() == 1.0
    counts = np.bincount(labels)
    assert len(counts) == 10
    assert counts.max() - counts.min() <= rows // 100 + 1  # every digit about as often


def test_a_row_group_is_a_part_of_the_file(digits: dict[str, Path]):
    assert pq.read_metadata(digits["train"]).num_row_groups == 12


def test_the_split_is_the_same_everywhere(digits: dict[str, Path], tmp_path: Path):
    for name, path in prepare(str(tmp_path)).items():
        assert path.read_bytes() == digits[name].read_bytes()


def test_what_is_there_is_not_written_again(digits: dict[str, Path]):
    before = [path.stat().st_mtime_ns for path in digits.values()]
    prepare(str(digits["train"].parent))
    assert [path.stat().st_mtime_ns for path in digits.values()] == before


def test_a_write_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full_disk(table: pa.Table, file: object, **options: object) -> None:
        file.write(b"PAR1")
        raise OSError("No space left on device")

    monkeypatch.setattr(prepare_digits.pq, "write_table", full_disk)
    with pytest.raises(OSError, match="No space left"):
        prepare(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
